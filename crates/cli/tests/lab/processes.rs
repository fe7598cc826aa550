//! The processes of a running backup, and signals to them.

use std::fs;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::tool;

const PATIENCE: Duration = Duration::from_secs(20);

/// Returns the process id of the one that was started, and watches.
pub(crate) fn front_of(started: &Child) -> u32 {
    started.id()
}

/// Returns the process id of the one that touches the repository.
pub(crate) fn mover_of(started: &Child) -> Result<u32> {
    only_child(front_of(started))
}

/// Returns the process id of the one that owns the VM.
pub(crate) fn guard_of(started: &Child) -> Result<u32> {
    only_child(mover_of(started)?)
}

/// Kills all three so that none sees another die: `first` before `second`.
pub(crate) fn kill_all(started: &mut Child, first: u32, second: u32) -> Result<()> {
    signal("-STOP", front_of(started))?;
    signal("-KILL", first)?;
    signal("-KILL", second)?;
    started.kill()?;
    started.wait()?;
    wait_for_end(first)?;
    wait_for_end(second)
}

/// Waits until a process that is not ours to wait for has ended.
pub(crate) fn wait_for_end(pid: u32) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while fs::exists(format!("/proc/{pid}/exe"))? {
        ensure!(Instant::now() < end, "process {pid} does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn only_child(pid: u32) -> Result<u32> {
    let of = format!("/proc/{pid}/task/{pid}/children");
    let end = Instant::now() + PATIENCE;
    loop {
        let children = fs::read_to_string(&of)?;
        let child = children.trim().parse();
        // It may be about to be started.
        if child.is_ok() || Instant::now() >= end {
            return child.with_context(|| format!("process {pid} has not one child: `{children}`"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Sends a signal by its option, such as `-STOP`.
pub(crate) fn signal(signal: &str, pid: u32) -> Result<()> {
    let sent = tool("kill").args([signal, &pid.to_string()]).run();
    sent.map(drop)
}
