//! QEMU's tools, by which alone an image is altered.

use std::io;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use highwater_hypervisor::{ErrorKind, HypervisorError};
use highwater_model::step::patience;

/// It writes a few clusters; storage that takes longer hangs.
const TOOL_PATIENCE: Duration = Duration::from_mins(1);
const TOOL_INTERVAL: Duration = Duration::from_millis(2);

/// Which package has the tools, for people.
pub(crate) const PACKAGE: &str =
    "install QEMU's tools (Debian, Ubuntu: `qemu-utils`; others: `qemu-img`)";

/// What became of a bitmap that was to be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Removed {
    /// It is gone.
    Now,
    /// QEMU finds none of this name in the image.
    WasGone,
}

/// Adds a bitmap that records from now on. Fails if somebody has the image open
/// for writing.
pub(crate) fn add_bitmap(image: &Path, name: &str) -> Result<(), HypervisorError> {
    let message = || format!("cannot add bitmap `{name}` to `{}`", image.display());
    let outcome = bitmap("--add", image, name).map_err(|error| explain(message(), &error))?;
    if outcome.status.success() {
        return Ok(());
    }
    Err(refused(message(), &outcome))
}

/// Removes a bitmap, in whatever state it is.
pub(crate) fn remove_bitmap(image: &Path, name: &str) -> Result<Removed, HypervisorError> {
    let message = || format!("cannot remove bitmap `{name}` from `{}`", image.display());
    let outcome = bitmap("--remove", image, name).map_err(|error| explain(message(), &error))?;
    if outcome.status.success() {
        return Ok(Removed::Now);
    }
    let text = String::from_utf8_lossy(&outcome.stderr);
    if text.contains(&format!("Dirty bitmap '{name}' not found")) {
        return Ok(Removed::WasGone);
    }
    Err(refused(message(), &outcome))
}

fn bitmap(action: &str, image: &Path, name: &str) -> io::Result<Output> {
    let child = Command::new("qemu-img")
        .args(["bitmap", action, "-f", "qcow2"])
        .arg(image)
        .arg(name)
        // Its messages are read.
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    wait(child)
}

/// Waits for a program that says little.
fn wait(mut child: Child) -> io::Result<Output> {
    let since = Instant::now();
    while child.try_wait()?.is_none() {
        if since.elapsed() > patience(TOOL_PATIENCE) {
            // Not killed: it may be in the middle of an image's tables.
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!(
                    "process {} does not end, and is not waited for any longer: does the storage \
                     hang?",
                    child.id()
                ),
            ));
        }
        std::thread::sleep(TOOL_INTERVAL);
    }
    child.wait_with_output()
}

fn explain(message: String, error: &io::Error) -> HypervisorError {
    let failed = HypervisorError::new(ErrorKind::Other, message)
        .because(format!("cannot run `qemu-img`: {error}"));
    if error.kind() == io::ErrorKind::NotFound {
        return failed.hint(PACKAGE);
    }
    failed
}

fn refused(message: String, outcome: &Output) -> HypervisorError {
    let text = String::from_utf8_lossy(&outcome.stderr);
    let is_locked = text.contains("Failed to get");
    let kind = if is_locked {
        ErrorKind::Busy
    } else {
        ErrorKind::Other
    };
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines
        .take(8)
        .fold(HypervisorError::new(kind, message), |error, line| {
            error.because(line)
        })
}

/// Returns the version of QEMU's tools, for the report.
pub(crate) fn version() -> Option<String> {
    let child = Command::new("qemu-img")
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let outcome = wait(child).ok()?;
    let text = String::from_utf8_lossy(&outcome.stdout).into_owned();
    let version = text.split_ascii_whitespace().nth(2)?;
    let is_number = |letter: char| letter.is_ascii_digit() || letter == '.';
    Some(
        version
            .split(|letter| !is_number(letter))
            .next()?
            .to_owned(),
    )
}
