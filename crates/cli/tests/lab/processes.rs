//! The processes of a running backup, and signals to them.

use std::fs;
use std::process::Child;

use anyhow::{Context as _, Result};
use highwater_testkit::tool;

/// Returns the process id of the one that touches the repository.
pub(crate) fn mover_of(started: &Child) -> u32 {
    started.id()
}

/// Returns the process id of the one that owns the VM.
pub(crate) fn guard_of(started: &Child) -> Result<u32> {
    only_child(mover_of(started))
}

fn only_child(pid: u32) -> Result<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    let child = children.trim().parse();
    child.with_context(|| format!("process {pid} has not one child: `{children}`"))
}

/// Sends a signal by its option, such as `-STOP`.
pub(crate) fn signal(signal: &str, pid: u32) -> Result<()> {
    let sent = tool("kill").args([signal, &pid.to_string()]).run();
    sent.map(drop)
}
