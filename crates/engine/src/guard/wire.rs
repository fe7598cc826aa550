//! What mover and guard say to each other: one JSON document per line.
//!
//! Both ends are the same binary, so there is no version to negotiate.

use std::io::{self, BufRead, Write};
use std::path::PathBuf;

use highwater_hypervisor::{
    BeginOrder, Begun, Ended, Foreign, HypervisorError, LeftDirectory, MarkOrder, RunState,
    Surroundings, Swept, VmFacts, VmRef, Wreckage,
};
use highwater_model::SessionId;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::lock::LockHolder;

/// Longest line accepted, bytes. The longest real one holds a domain XML
/// (libvirt refuses definitions far below this).
const LINE_BYTES_MAX: u64 = 64 << 20;

/// A message of the mover.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Message {
    /// Echoed in the reply.
    pub(super) id: u64,
    pub(super) request: Request,
}

/// What the mover asks for.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// Connect to a hypervisor. First of all.
    Hello { connect: String, lock_dir: PathBuf },
    /// List all VMs.
    List,
    /// Find a VM by name or UUID.
    Find { name: String },
    /// Take the VM's lock; wait for a dying holder for a while.
    Lock { vm: VmRef, wait_ms: u64 },
    /// Give the VM back, unless a session is still there.
    Release,
    /// Report facts.
    Observe { vm: VmRef },
    /// Take the point in time.
    Begin { order: Box<BeginOrder> },
    /// The manifest is about to be written: from now on nobody but a reader of
    /// the repository knows whether the backup exists.
    Committing,
    /// End the session.
    Finish { outcome: Outcome },
    /// End the session of a guard that died, which made this order of it.
    Settle {
        order: Box<BeginOrder>,
        outcome: Outcome,
    },
    /// End what a dead session left.
    EndLeftover { vm: VmRef, session: SessionId },
    /// Change a mark.
    Mark { vm: VmRef, order: MarkOrder },
    /// Say who holds the VM's lock.
    LockHolder { vm: VmRef },
    /// Report what lies around.
    Survey { vm: VmRef },
    /// Report directories that dead sessions left.
    Leftovers { vm: VmRef, places: Vec<PathBuf> },
    /// Remove them. Only under the VM's lock.
    Sweep { vm: VmRef, places: Vec<PathBuf> },
    /// Report what another program left.
    Wreckage { vm: VmRef, of: Foreign },
    /// Remove it. Only under the VM's lock.
    ClearWreckage { vm: VmRef, of: Foreign },
    /// Start a VM that is off, paused. Only under its lock.
    StartPaused { vm: VmRef },
    /// Shut it off again, unless somebody has resumed it. Only under its lock.
    StopIfStarted { vm: VmRef },
    /// "I live." No reply.
    Beat,
}

/// How the mover's part ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The manifest is durable.
    Committed,
    /// The manifest was not written: the new mark is removed.
    Failed,
    /// Nobody knows: both marks stay, the next run reads the manifest.
    Unknown,
}

/// What the guard says.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    /// The reply to a request.
    Reply {
        id: u64,
        result: Result<Reply, HypervisorError>,
    },
    /// The running session broke.
    Lost { error: HypervisorError },
}

/// A good reply.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply {
    Done,
    Vms(Vec<(VmRef, RunState)>),
    Vm(VmRef),
    Facts(Box<VmFacts>),
    Begun(Box<Begun>),
    Ended(Ended),
    Holder(Option<LockHolder>),
    Surroundings(Surroundings),
    Leftovers(Vec<LeftDirectory>),
    Swept(Swept),
    Wreckage(Wreckage),
    Stopped(bool),
}

/// Writes one message and its line end in one call.
pub(super) fn send<T: Serialize>(stream: &mut impl Write, message: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(message).map_err(io::Error::other)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Reads one message; `None` at the end of the stream.
pub(super) fn receive<T: DeserializeOwned>(stream: &mut impl BufRead) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    let read = io::Read::take(&mut *stream, LINE_BYTES_MAX).read_until(b'\n', &mut line)?;
    if read == 0 {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_slice(&line)
        .map(Some)
        .map_err(io::Error::other)
}
