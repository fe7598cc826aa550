//! Which versions were measured.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

/// Programs that a release of the operating system may lack.
const OPTIONAL: [(&str, &str); 5] = [
    ("virtnbdbackup", "-V"),
    ("restic", "version"),
    ("rustic", "--version"),
    ("borg", "--version"),
    ("strace", "--version"),
];

/// Returns the versions of all that takes part.
pub(crate) fn versions() -> Result<Vec<String>> {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let cores = std::thread::available_parallelism()?;
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let git = |args: &[&str]| {
        let output = Command::new("git")
            .arg("-C")
            .arg(here)
            .args(args)
            .output()
            .ok()?;
        output
            .status
            .success()
            .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let mut commit = git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or("unknown".to_owned());
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]);
    if changed.is_some_and(|list| !list.is_empty()) {
        commit.push_str(", with changes");
    }
    let mut versions = vec![
        format!("highwater {} (commit {commit})", env!("CARGO_PKG_VERSION")),
        first_line("qemu-system-x86_64", "--version")?,
        first_line("libvirtd", "--version")?,
        first_line("nbdcopy", "--version")?,
    ];
    for (program, argument) in OPTIONAL {
        // Some say only the number.
        let said = first_line(program, argument).unwrap_or("not installed".to_owned());
        let named = said.to_lowercase().contains(program);
        versions.push(if named {
            said
        } else {
            format!("{program} {said}")
        });
    }
    versions.push(format!("kernel {}", kernel.trim()));
    versions.push(format!("{cores} processors"));
    Ok(versions)
}

/// Says whether a program can be run.
pub(crate) fn is_installed(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok()
}

/// Returns how busy the machine is, everything counted: a processor that others
/// use is none for a program that works on several at once.
pub(crate) fn load() -> Result<String> {
    let text = std::fs::read_to_string("/proc/loadavg")?;
    let minute = text.split(' ').next().context("an empty loadavg")?;
    Ok(minute.to_owned())
}

fn first_line(program: &str, argument: &str) -> Result<String> {
    let output = Command::new(program)
        .arg(argument)
        .output()
        .with_context(|| {
            format!("cannot start {program}: is it installed? `scripts/setup.sh --for bench` does")
        })?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(said.lines().next().unwrap_or("unknown").to_owned())
}
