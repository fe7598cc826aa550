//! Where settings, passphrases and keys come from.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::shelf::{Said, Shelf};

const PASSPHRASE: &str = "correct horse battery";

/// `list` in an encrypted repository, told no passphrase yet.
fn list(shelf: &Shelf) -> Command {
    let mut command = shelf.command(&["list"]);
    command.env_remove("HIGHWATER_PASSWORD");
    command
}

fn secret(path: &Path, text: &str, mode: u32) -> Result<String> {
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    Ok(path.to_str().context("a path is text")?.to_owned())
}

#[test]
fn every_source_of_a_passphrase_opens_the_repository() -> Result<()> {
    let shelf = Shelf::encrypted()?;
    let file = secret(&shelf.path("pass"), "correct horse battery\nmore\n", 0o600)?;
    let credentials = shelf.path("credentials");
    fs::create_dir(&credentials)?;
    secret(&credentials.join("highwater.password"), PASSPHRASE, 0o400)?;
    let config = shelf.path("config.toml");
    let configured = |text: String| secret(&config, &text, 0o600);
    let show = format!("cat {file}");
    let opens = |what: &str, command: &mut Command| -> Result<()> {
        let said = Said::of(&command.output()?);
        assert_eq!(
            (said.code, said.stderr.as_str()),
            (Some(0), "no restore points yet\n"),
            "{what}"
        );
        Ok(())
    };
    opens(
        "--password-file",
        list(&shelf).args(["--password-file", &file]),
    )?;
    opens(
        "--password-command",
        list(&shelf).args(["--password-command", &show]),
    )?;
    opens(
        "empty variables name nothing",
        list(&shelf)
            .args(["--key-file", &file])
            .env("HIGHWATER_PASSWORD_FILE", "")
            .env("HIGHWATER_PASSWORD_COMMAND", &show),
    )?;
    opens("value", list(&shelf).env("HIGHWATER_PASSWORD", PASSPHRASE))?;
    opens("file", list(&shelf).env("HIGHWATER_PASSWORD_FILE", &file))?;
    opens(
        "command",
        list(&shelf).env("HIGHWATER_PASSWORD_COMMAND", &show),
    )?;
    opens(
        "descriptor",
        list(&shelf)
            .env("HIGHWATER_PASSWORD_FD", "0")
            .stdin(Stdio::from(fs::File::open(&file)?)),
    )?;
    opens(
        "credential",
        list(&shelf).env("CREDENTIALS_DIRECTORY", &credentials),
    )?;
    let of_config = |shelf: &Shelf| {
        let mut command = list(shelf);
        command.env("HIGHWATER_CONFIG", &config);
        command
    };
    configured(format!("password-file = \"{file}\""))?;
    opens("configured file", &mut of_config(&shelf))?;
    configured(format!("password-command = \"{show}\""))?;
    opens("configured command", &mut of_config(&shelf))?;
    Ok(())
}

#[test]
fn a_flag_goes_before_the_environment_and_that_before_the_configuration() -> Result<()> {
    let shelf = Shelf::encrypted()?;
    let right = secret(&shelf.path("right"), PASSPHRASE, 0o600)?;
    let wrong = secret(&shelf.path("wrong"), "wrong", 0o600)?;
    let config = secret(
        &shelf.path("config.toml"),
        &format!("password-file = \"{wrong}\"\nrepo = \"/nowhere\""),
        0o600,
    )?;
    let code = |command: &mut Command| -> Result<Option<i32>> {
        Ok(command
            .env("HIGHWATER_CONFIG", &config)
            .output()?
            .status
            .code())
    };
    assert_eq!(
        code(&mut list(&shelf))?,
        Some(12),
        "the configured one is used"
    );
    let mut command = list(&shelf);
    command.env("HIGHWATER_PASSWORD_FILE", &right);
    assert_eq!(code(&mut command)?, Some(0), "the environment goes first");
    assert_eq!(
        code(command.args(["--password-file", &wrong]))?,
        Some(12),
        "then the flag"
    );
    let mut command = list(&shelf);
    command.env_remove("HIGHWATER_REPO");
    assert_eq!(
        code(&mut command)?,
        Some(10),
        "the configured repository is used"
    );
    Ok(())
}

#[test]
fn the_users_configuration_is_found_where_it_belongs() -> Result<()> {
    let shelf = Shelf::with_points()?;
    let dir = shelf.path("home/.config/highwater");
    fs::create_dir_all(&dir)?;
    let text = format!("repo = \"{}\"", shelf.repo().display());
    secret(&dir.join("config.toml"), &text, 0o600)?;
    let mut command = shelf.command(&["list"]);
    command
        .env_remove("HIGHWATER_REPO")
        .env_remove("HIGHWATER_CONFIG")
        .env("XDG_CONFIG_HOME", shelf.path("home/.config"));
    let said = Said::of(&command.output()?);
    said.expect(0, &[]);
    assert!(said.stdout.contains("web01"), "{said:?}");
    Ok(())
}

#[test]
fn a_secret_that_others_can_read_is_warned_about_and_strict_makes_it_a_code() -> Result<()> {
    let shelf = Shelf::encrypted()?;
    let file = secret(&shelf.path("pass"), PASSPHRASE, 0o644)?;
    for (more, code) in [(&[][..], 0), (&["--strict"], 4)] {
        let mut command = list(&shelf);
        command.args(["--password-file", &file]).args(more);
        Said::of(&command.output()?).expect(code, &["warning: ", "mode 0644: run `chmod 600`"]);
    }
    let mut command = list(&shelf);
    command.args(["--password-file", &file, "--strict"]);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
    Said::of(&command.output()?).expect(0, &[]);
    Ok(())
}

#[test]
fn a_key_file_is_used_whole_or_not_at_all() -> Result<()> {
    let shelf = Shelf::without_repository()?;
    let init = |key: &str| -> Result<Said> {
        shelf.say(&["init", "--encryption", "keyfile", "--key-file", key])
    };
    let long = secret(&shelf.path("long"), &"k".repeat((64 << 10) + 1), 0o600)?;
    init(&long)?.expect(2, &["it has more than 64 KiB"]);
    let empty = secret(&shelf.path("empty"), "", 0o600)?;
    init(&empty)?.expect(2, &["it is empty"]);
    assert!(!shelf.repo().exists());
    let longest = secret(&shelf.path("longest"), &"k".repeat(64 << 10), 0o600)?;
    init(&longest)?.expect(0, &[]);
    shelf.say(&["list", "--key-file", &longest])?.expect(0, &[]);
    shelf
        .say(&["list", "--key-file", &long])?
        .expect(2, &["it has more than 64 KiB"]);
    Ok(())
}

/// Runs a command at a terminal of its own and types; returns all it shows,
/// and its exit code. `script` is of util-linux and gives it a terminal.
fn at_a_terminal(command: &str, shelf: &Shelf, typed: &str) -> Result<(String, Option<i32>)> {
    let line = format!("{} {command}", env!("CARGO_BIN_EXE_highwater"));
    let mut child = Command::new("script")
        .args(["-q", "-e", "-c", &line, "/dev/null"])
        .env("HIGHWATER_REPO", shelf.repo())
        .env("HIGHWATER_CONFIG", "")
        .env_remove("HIGHWATER_PASSWORD")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("no `script`: install util-linux (bsdutils)")?;
    let mut stdin = child.stdin.take().context("it has a stdin")?;
    stdin.write_all(typed.as_bytes())?;
    let output = child.wait_with_output()?;
    drop(stdin);
    Ok((
        String::from_utf8_lossy(&output.stdout).into_owned(),
        output.status.code(),
    ))
}

#[test]
fn at_a_terminal_a_passphrase_is_asked_for_twice_at_init_and_never_shown() -> Result<()> {
    let shelf = Shelf::without_repository()?;
    let init = "init --encryption passphrase";
    let (shown, code) = at_a_terminal(init, &shelf, "tidal\nother\n")?;
    assert_eq!(code, Some(2), "{shown}");
    assert!(
        shown.contains("cannot use two different passphrases"),
        "{shown}"
    );
    assert!(!shelf.repo().exists());
    let (shown, code) = at_a_terminal(init, &shelf, "tidal\ntidal\n")?;
    assert_eq!(code, Some(0), "{shown}");
    assert!(
        shown.contains("new passphrase: ") && shown.contains("the same again: "),
        "{shown}"
    );
    let (shown, code) = at_a_terminal("list", &shelf, "tidal\n")?;
    assert_eq!(code, Some(0), "{shown}");
    assert!(shown.contains("passphrase of the repository: "), "{shown}");
    let (_, code) = at_a_terminal("list", &shelf, "neap\n")?;
    assert_eq!(code, Some(12));
    Ok(())
}

/// Asks at a terminal for a passphrase, types when it asks, and returns what the
/// shell then says of the exit code and of the terminal.
fn after_the_question(command: &str, shelf: &Shelf, typed: &[u8]) -> Result<String> {
    let program = env!("CARGO_BIN_EXE_highwater");
    let line = format!("{} ; echo code=$?; stty -a", command.replace("HW", program));
    let mut child = Command::new("script")
        .args(["-q", "-c", &line, "/dev/null"])
        .env("HIGHWATER_REPO", shelf.repo())
        .env("HIGHWATER_CONFIG", "")
        .env_remove("HIGHWATER_PASSWORD")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("no `script`: install util-linux (bsdutils)")?;
    let mut stdin = child.stdin.take().context("it has a stdin")?;
    let mut stdout = child.stdout.take().context("it has a stdout")?;
    let mut shown = Vec::new();
    let question = b"passphrase of the repository: ";
    let mut byte = [0];
    while !shown.ends_with(question) {
        anyhow::ensure!(stdout.read(&mut byte)? > 0, "it did not ask");
        shown.extend(byte);
    }
    // The question comes before the terminal is taken apart.
    std::thread::sleep(Duration::from_millis(300));
    stdin.write_all(typed)?;
    stdout.read_to_end(&mut shown)?;
    child.wait()?;
    Ok(String::from_utf8_lossy(&shown).into_owned())
}

#[test]
fn whoever_is_ended_while_it_asks_for_a_passphrase_leaves_the_terminal_as_it_was() -> Result<()> {
    let shelf = Shelf::without_repository()?;
    let init = "init --encryption passphrase";
    let (shown, code) = at_a_terminal(init, &shelf, "tidal\ntidal\n")?;
    assert_eq!(code, Some(0), "{shown}");
    for (command, typed) in [
        // Without a handler for signals, and with one.
        ("HW list", &b"\x03"[..]),
        ("HW verify", b"\x03"),
        (
            "timeout --foreground --preserve-status -s TERM 2 HW list",
            b"",
        ),
        (
            "timeout --foreground --preserve-status -s TERM 2 HW verify",
            b"",
        ),
    ] {
        let shown = after_the_question(command, &shelf, typed)?;
        assert!(shown.contains("code=130"), "{command}: {shown}");
        for flag in ["isig", "icanon", "echo"] {
            let mut words = shown.split_whitespace();
            assert!(words.any(|word| word == flag), "{command}: {flag}: {shown}");
        }
    }
    Ok(())
}

#[test]
fn completions_are_scripts_that_bash_takes_and_that_complete() -> Result<()> {
    let shelf = Shelf::without_repository()?;
    let script = shelf.path("highwater.bash");
    fs::write(&script, shelf.run(&["completions", "bash"])?)?;
    let ask = format!(
        "source {} && COMP_WORDS=(highwater re) COMP_CWORD=1 && _highwater highwater re highwater \
         && echo \"${{COMPREPLY[@]}}\"",
        script.display()
    );
    let output = Command::new("bash")
        .args(["--norc", "-ec", &ask])
        .output()?;
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).trim(),
        "restore",
        "{output:?}"
    );
    for shell in ["zsh", "fish", "elvish", "powershell"] {
        assert!(
            shelf.run(&["completions", shell])?.contains("restore"),
            "{shell}"
        );
    }
    Ok(())
}

#[test]
fn there_is_a_manual_page_of_every_command() -> Result<()> {
    let shelf = Shelf::without_repository()?;
    let dir = shelf.path("man");
    fs::create_dir(&dir)?;
    shelf.run(&["man", dir.to_str().unwrap()])?;
    let help = shelf.run(&["--help"])?;
    let commands = help
        .split_once("Commands:")
        .context("commands are listed")?
        .1;
    let commands = commands.split("\n\n").next().unwrap_or_default();
    let mut pages = 0;
    for command in commands
        .lines()
        .filter_map(|line| line.split_whitespace().next())
    {
        let page = fs::read_to_string(dir.join(format!("highwater-{command}.1")))
            .with_context(|| command.to_owned())?;
        assert!(page.contains(".SH SYNOPSIS"), "{command}");
        pages += 1;
    }
    assert!(pages >= 8, "{help}");
    let main = fs::read_to_string(dir.join("highwater.1"))?;
    for part in ["HIGHWATER_PASSWORD_FILE", "EXIT STATUS", "config.toml"] {
        assert!(main.contains(part), "{part}");
    }
    Ok(())
}

#[test]
fn a_stream_of_events_is_lines_of_json_that_end_with_the_exit_code() -> Result<()> {
    let shelf = Shelf::with_points()?;
    let out = shelf.path("out");
    let to = out.to_str().unwrap();
    for (args, code, first) in [
        (&["restore", "web01", "--to", to][..], 0, "begin"),
        (&["restore", "web01", "--to", to], 1, "begin"),
        (&["list"], 0, "result"),
        (&["show", "nobody"], 1, "result"),
        (&["show"], 2, "result"),
    ] {
        let said = shelf.say(&[args, &["--json=events"]].concat())?;
        assert_eq!(said.code, Some(code), "{said:?}");
        let lines: Vec<serde_json::Value> = said
            .stdout
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<_, _>>()?;
        assert!(lines.iter().all(|line| line["schema"] == 1), "{said:?}");
        assert_eq!(lines[0]["event"], first, "{said:?}");
        let [.., result, end] = lines.as_slice() else {
            panic!("{said:?}");
        };
        assert_eq!(
            (&result["event"], &end["event"]),
            (&"result".into(), &"end".into())
        );
        assert_eq!(end["exit_code"], code);
    }
    Ok(())
}

#[test]
fn a_restore_keeps_to_its_limit() -> Result<()> {
    let shelf = Shelf::plain()?;
    // 16 chunks that differ: 1 MiB of data, which 512 KiB/s take 2 s for.
    let content: Vec<u8> = (0..1_u32 << 18).flat_map(u32::to_le_bytes).collect();
    shelf.add(&crate::shelf::Told {
        vm: "web01",
        hours: 0,
        disk: "vda",
        file: "/nvram/vars.fd",
        content: &content,
    })?;
    for (name, to) in [("file", "vda.raw"), ("stream", "-")] {
        let to = if to == "-" {
            to.to_owned()
        } else {
            shelf.path(to).display().to_string()
        };
        let began = std::time::Instant::now();
        let args = [
            "restore", "web01", "-d", "vda", "--to", &to, "--limit", "512KiB",
        ];
        shelf.say(&args)?.expect(0, &[]);
        assert!(
            began.elapsed().as_millis() > 1500,
            "{name}: {:?}",
            began.elapsed()
        );
    }
    Ok(())
}
