//! The processes of a running backup, and signals to them.

use std::fs;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use highwater_testkit::tool;

const PATIENCE: Duration = Duration::from_secs(20);

/// Returns the process id of the one that was started, and watches.
pub(crate) fn front_of(started: &Child) -> u32 {
    started.id()
}

/// Returns the process id of the one that touches the repository.
pub(crate) fn mover_of(started: &Child) -> Result<u32> {
    child_of(front_of(started), "highwater-mover")
}

/// Returns the process id of the one that owns the VM.
pub(crate) fn guard_of(started: &Child) -> Result<u32> {
    child_of(mover_of(started)?, "highwater-guard")
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

/// Finds the child that was started under a name; one that is dead has none.
fn child_of(pid: u32, name: &str) -> Result<u32> {
    let of = format!("/proc/{pid}/task/{pid}/children");
    let is_named = |child: &u32| {
        fs::read(format!("/proc/{child}/cmdline")).is_ok_and(|it| it.starts_with(name.as_bytes()))
    };
    let end = Instant::now() + PATIENCE;
    loop {
        let children = fs::read_to_string(&of)?;
        let mut pids = children
            .split_whitespace()
            .filter_map(|pid| pid.parse().ok());
        if let Some(child) = pids.find(is_named) {
            return Ok(child);
        }
        // It may be about to be started.
        ensure!(Instant::now() < end, "process {pid} has no {name}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Sends a signal by its option, such as `-STOP`.
pub(crate) fn signal(signal: &str, pid: u32) -> Result<()> {
    let sent = tool("kill").args([signal, &pid.to_string()]).run();
    sent.map(drop)
}
