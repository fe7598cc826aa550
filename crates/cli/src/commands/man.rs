//! `highwater man`: the manual pages, made from the same words as `--help`.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use clap::{Command, CommandFactory as _};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use crate::advice::{self, CliError};
use crate::args::{self, Args};
use crate::env;

/// What the pages tell beside the arguments.
const VARIABLES: [(&str, &str); 9] = [
    (env::REPO, "repository, as with --repo"),
    (env::CONNECT, "hypervisor, as with --connect"),
    (
        env::CONFIG,
        "configuration file, as with --config; empty for none",
    ),
    (
        env::PROFILE,
        "profile of the configuration, as with --profile",
    ),
    (env::PASSWORD, "the passphrase itself"),
    (
        env::PASSWORD_FILE,
        "a file whose first line is the passphrase",
    ),
    (
        env::PASSWORD_COMMAND,
        "a shell command whose first line of output is the passphrase",
    ),
    (
        env::PASSWORD_FD,
        "number of an open descriptor to read the passphrase from",
    ),
    (env::KEY_FILE, "key file, as with --key-file"),
];

const CODES: [(u8, &str); 10] = [
    (advice::DONE, "done"),
    (advice::FAILED, "failed"),
    (advice::USAGE, "usage, or a mistake in the configuration"),
    (
        advice::SOME_FAILED,
        "some of several VMs, or one disk of a VM, failed",
    ),
    (
        advice::WARNED,
        "done with warnings, under --strict; doctor: something is to be done",
    ),
    (advice::NO_REPOSITORY, "no repository"),
    (advice::BUSY, "the VM is locked or busy"),
    (advice::WRONG_KEY, "wrong key"),
    (advice::DAMAGE, "damage found"),
    (advice::INTERRUPTED, "interrupted"),
];

pub(crate) fn run(args: &args::Man) -> Result<u8, CliError> {
    let mut command = Args::command();
    // Gives every subcommand the global options and its full name.
    command.build();
    write(&args.dir, &command, "highwater")?;
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        write(&args.dir, sub, &format!("highwater-{}", sub.get_name()))?;
    }
    Ok(advice::DONE)
}

fn write(dir: &Path, command: &Command, name: &str) -> Result<(), CliError> {
    let path = dir.join(format!("{name}.1"));
    page(command, name)
        .and_then(|text| File::create(&path)?.write_all(&text))
        .map_err(|source| CliError::Write { path, source })
}

fn page(command: &Command, name: &str) -> std::io::Result<Vec<u8>> {
    let is_root = name == "highwater";
    let command = command
        .clone()
        .name(name.to_owned())
        .display_name(name.to_owned());
    let mut text = Vec::new();
    Man::new(command)
        .section("1")
        .manual("Highwater")
        .render(&mut text)?;
    let mut more = Roff::new();
    if is_root {
        more.control("SH", ["ENVIRONMENT"]);
        for (variable, meaning) in VARIABLES {
            more.control("TP", [])
                .text([bold(variable)])
                .text([roman(meaning)]);
        }
        more.control("SH", ["EXIT STATUS"]);
        for (code, meaning) in CODES {
            more.control("TP", [])
                .text([bold(code.to_string())])
                .text([roman(meaning)]);
        }
        more.control("SH", ["FILES"]);
        for (file, meaning) in [
            ("/etc/highwater/config.toml", "configuration of the host"),
            (
                "~/.config/highwater/config.toml",
                "configuration of a user, over that of the host",
            ),
        ] {
            more.control("TP", [])
                .text([bold(file)])
                .text([roman(meaning)]);
        }
    } else {
        more.control("SH", ["SEE ALSO"]);
        more.text([bold("highwater"), roman("(1)")]);
    }
    more.to_writer(&mut text)?;
    Ok(text)
}
