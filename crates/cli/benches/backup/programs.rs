//! Which versions were measured.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

/// Returns the versions of all that takes part, a line each.
pub(crate) fn versions() -> Result<String> {
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
    let lines = [
        format!("highwater: {} (commit {commit})", env!("CARGO_PKG_VERSION")),
        format!(
            "QEMU: {}",
            first_line("qemu-system-x86_64", &["--version"])?
        ),
        format!("libvirt: {}", first_line("libvirtd", &["--version"])?),
        format!("virtnbdbackup: {}", first_line("virtnbdbackup", &["-V"])?),
        format!("libnbd: {}", first_line("nbdcopy", &["--version"])?),
        format!("kernel: {}, {cores} processors", kernel.trim()),
    ];
    Ok(lines.join("\n"))
}

/// Returns how busy the machine is, everything counted: a processor that others
/// use is none for a program that works on several at once.
pub(crate) fn load() -> Result<String> {
    let text = std::fs::read_to_string("/proc/loadavg")?;
    let minute = text.split(' ').next().context("an empty loadavg")?;
    Ok(minute.to_owned())
}

fn first_line(program: &str, args: &[&str]) -> Result<String> {
    let output = Command::new(program).args(args).output().with_context(|| {
        format!("cannot start {program}: is it installed? `scripts/setup.sh --for bench` does")
    })?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(said.lines().next().unwrap_or("unknown").to_owned())
}
