//! What the engine asks of a driver, and what the driver answers.

use std::path::PathBuf;

use highwater_model::{MarkName, Nonce, SessionId, Timestamp, format_size};
use serde::{Deserialize, Serialize};

use crate::{HypervisorError, VmRef, WriteCounters};

/// Freeze a point in time over all listed disks and export it for reading.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BeginOrder {
    /// Which VM.
    pub vm: VmRef,
    /// Names the session; every export's name carries it.
    pub session: SessionId,
    /// The disks, each with what is to be read.
    pub disks: Vec<DiskOrder>,
    /// The mark to create at the very same point in time; `None` leaves none.
    pub new_mark: Option<NewMark>,
    /// Whether to freeze the guest's file systems.
    pub quiesce: Quiesce,
    /// File systems to freeze; empty means all.
    pub freeze_mountpoints: Vec<String>,
    /// Private directory (0700, or 0770 with the hypervisor's group) for the
    /// socket; the driver creates it and removes it at the end.
    pub socket_dir: PathBuf,
    /// Private directory for scratch files, likewise created and removed.
    pub scratch_dir: PathBuf,
    /// What a VM that is off, and is started meanwhile, does to the session.
    pub when_started: WhenStarted,
}

/// What becomes of the session of a VM that is off when somebody starts the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum WhenStarted {
    /// The VM starts at once, and the session is lost.
    Yield,
    /// The VM does not start before the session has ended: its images are locked.
    Hold,
}

/// One disk of a [`BeginOrder`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskOrder {
    /// Target name.
    pub target: String,
    /// What is to be read.
    pub mode: ReadMode,
}

/// What is to be read of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReadMode {
    /// Everything; no bitmap is exported.
    All,
    /// What changed since a mark; its bitmap is exported.
    Since(MarkName),
}

/// A mark to create with the point in time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewMark {
    /// Its name.
    pub name: MarkName,
    /// Its nonce, kept where the hypervisor keeps it (libvirt: description).
    pub nonce: Nonce,
    /// Targets of the disks that get it; never empty.
    pub disks: Vec<String>,
}

/// Whether to freeze the guest's file systems around the point in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Quiesce {
    /// Never.
    Off,
    /// If the agent answers; otherwise go on without.
    Try,
    /// Or fail.
    Require,
}

/// A session that has begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begun {
    /// One export per ordered disk, in the same order.
    pub exports: Vec<Export>,
    /// How consistent the point in time is.
    pub consistency: Consistency,
    /// Wall clock just before the point in time was taken.
    pub taken_at: Timestamp,
    /// How long the guest was frozen, milliseconds; `None` if it was not.
    pub frozen_ms: Option<u64>,
    /// How long its processors were stopped for the point in time, microseconds;
    /// `None` if they were not.
    pub stopped_us: Option<u64>,
    /// Creation time of the new mark as the hypervisor records it, seconds since
    /// the epoch; where it keeps no record, the one to tell it later.
    pub mark_created_s: Option<i64>,
    /// What was learnt of the disks right after the point in time.
    pub disks: Vec<BegunDisk>,
    /// What the user should know (an agent that did not answer, …).
    pub warnings: Vec<String>,
    /// Whether images are read that others may write to: what was read is right
    /// only if [`check`](crate::Driver::check) still passes after the last byte.
    pub reads_images: bool,
    /// Room that the scratch files may still need; `None` if all of it is theirs.
    pub reserve: Option<ScratchReserve>,
}

/// Room for scratch files. A guest whose scratch file finds none is stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScratchReserve {
    /// Where they lie.
    pub dir: PathBuf,
    /// With less left in its file system than this the session is given up, bytes.
    pub bytes: u64,
}

impl ScratchReserve {
    /// Says that a session has to be given up because so little is left.
    pub fn shortage(&self, vm: &VmRef, session: SessionId, free_bytes: u64) -> HypervisorError {
        let because = format!(
            "scratch directory `{}` has only {} free",
            self.dir.display(),
            format_size(free_bytes)
        );
        HypervisorError::session_lost(vm, session, because).hint(MORE_ROOM)
    }
}

/// What to do about scratch files that find no room.
pub const MORE_ROOM: &str = "choose a scratch directory with more room (`--scratch-dir`)";

/// What is known of a disk right after the point in time was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BegunDisk {
    /// Target name.
    pub target: String,
    /// Granularity of the new mark's bitmap, bytes, if the disk got one.
    pub granularity: Option<u32>,
    /// What the guest has written so far. Read after the point: every write
    /// that is not counted here is in the new mark's bitmap.
    pub counters: Option<WriteCounters>,
}

/// Where a disk of the point in time can be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    /// Target name.
    pub target: String,
    /// Address of the NBD server.
    pub address: ExportAddress,
    /// NBD export name.
    pub name: String,
    /// Full meta context of the exported bitmap
    /// (`qemu:dirty-bitmap:…`), if one was ordered.
    pub dirty_context: Option<String>,
    /// Reads are right only within one aligned piece of so many bytes, and what
    /// the server says of zeroes is not to be believed. `None`: all is right.
    pub exact_within: Option<u64>,
}

/// Address of an NBD server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExportAddress {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP address.
    Tcp(String, u16),
}

/// How consistent a point in time is for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Consistency {
    /// File systems were frozen, proven by asking after the start call returned.
    Filesystem,
    /// As after a power cut.
    Crash,
    /// The VM was off.
    Offline,
    /// The VM was paused before and after.
    Paused,
}

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Ended {
    /// Whether a job of this session was found and ended.
    pub ended_job: bool,
    /// What could not be tidied; the next run repairs it.
    pub warnings: Vec<String>,
}

/// Something to do to a mark outside a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MarkOrder {
    /// Give the whole mark up: its record and its bitmaps, on all disks.
    Remove(MarkName),
    /// Take a mark off one disk, whose bitmap was found to lie: the others go on
    /// with theirs.
    Distrust {
        /// Its name.
        name: MarkName,
        /// The nodes of the disk on which its bitmap is.
        nodes: Vec<String>,
    },
    /// Tell the hypervisor about a mark that is on the disks but not in its records.
    Redefine(Redefinition),
}

/// A mark as it has to be told to a hypervisor that forgot it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redefinition {
    /// Its name.
    pub name: MarkName,
    /// Its nonce.
    pub nonce: Nonce,
    /// Its creation time as first recorded, seconds since the epoch.
    pub created_s: i64,
    /// Targets of its disks; validated against the bitmaps on them.
    pub disks: Vec<String>,
}
