//! What happens during a job, as data.

use std::time::Duration;

use highwater_hypervisor::Consistency;
use highwater_model::PointId;

/// Is told what happens. Called from several threads; must not block for long.
pub trait Observer: Sync {
    /// Takes note of an event.
    fn event(&self, event: &Event<'_>);
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event<'a> {
    /// A job begins for a VM.
    Started {
        /// VM name.
        vm: &'a str,
    },
    /// Something left behind was tidied, in words.
    Healed(&'a str),
    /// The user should know.
    Warning(&'a str),
    /// How a disk will be read.
    Planned {
        /// Target name.
        disk: &'a str,
        /// Mode word.
        mode: &'a str,
        /// Named reason as a word, if there is one.
        reason: Option<&'a str>,
        /// The same as a sentence.
        sentence: Option<&'a str>,
        /// Size of the disk, bytes.
        size_bytes: u64,
        /// Bytes to look at: what the bitmap calls dirty, or all of the disk.
        dirty_bytes: u64,
    },
    /// A disk is not part of the backup.
    Skipped {
        /// Target name.
        disk: &'a str,
        /// Why.
        reason: &'a str,
    },
    /// The hypervisor is about to be asked for the point in time.
    Beginning,
    /// The point in time is taken.
    Begun {
        /// How consistent it is.
        consistency: Consistency,
        /// How long the guest was frozen, milliseconds.
        frozen_ms: Option<u64>,
        /// How long its processors were stopped, microseconds.
        stopped_us: Option<u64>,
    },
    /// How far the copying is, several times a second.
    Progress(&'a [DiskProgress]),
    /// A disk is done or has failed.
    DiskDone {
        /// Target name.
        disk: &'a str,
        /// Why it failed, if it did.
        failure: Option<&'a str>,
        /// What was done for it; `None` if it failed.
        done: Option<DiskDone>,
    },
    /// Ending the session at the VM was not all plain: warnings say what was
    /// left, or done.
    EndedWithWarnings,
    /// Everything is stored; the manifest is about to be written.
    Committing,
    /// The restore point exists.
    Committed {
        /// Its id.
        point: PointId,
    },
}

/// What was done for one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskDone {
    /// Size of the disk, bytes.
    pub size_bytes: u64,
    /// Bytes that the bitmap called dirty, or all of the disk.
    pub dirty_bytes: u64,
    /// Bytes transferred.
    pub read_bytes: u64,
    /// Bytes added to the repository (restore: 0).
    pub stored_bytes: u64,
    /// How long it took.
    pub elapsed: Duration,
}

/// How far one disk is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskProgress {
    /// Target name.
    pub disk: String,
    /// Bytes of the disk looked at so far (mapped, skipped, read or written).
    pub done_bytes: u64,
    /// Bytes of the disk in all.
    pub size_bytes: u64,
    /// Bytes transferred.
    pub read_bytes: u64,
    /// Bytes added to the repository.
    pub stored_bytes: u64,
}
