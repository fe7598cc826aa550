//! The steps of a backup at which a test can make something happen.
//!
//! A process that dies anywhere must leave what the next run can heal. To prove
//! that for every place, and not for the moments a timer happens to hit, each
//! place where the state of VM or repository has just changed is named here and
//! passed in the code with [`pass`]. What happens there is up to a hook that a
//! debug build may install; a release build has neither hook nor call.

use std::sync::OnceLock;
use std::time::Duration;

static HOOK: OnceLock<fn(Step)> = OnceLock::new();
static PATIENCE_MAX: OnceLock<Duration> = OnceLock::new();

/// Which of the two processes of a backup passes a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Process {
    /// The one that reads the VM's disks and writes the repository.
    Mover,
    /// The one that owns the session at the VM.
    Guard,
}

macro_rules! steps {
    ($($(#[$doc:meta])* $name:ident $process:ident $word:literal)*) => {
        /// A step of a backup.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Step {
            $($(#[$doc])* $name,)*
        }

        impl Step {
            /// All steps, in the order in which a backup passes them. Those whose
            /// words begin with `qmp-` are passed over QEMU's own monitor only, those with
            /// `off-` while the VM is off only.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// Returns the word that names it in tests.
            pub const fn word(self) -> &'static str {
                match self {
                    $(Self::$name => $word,)*
                }
            }

            /// Returns who passes it.
            pub const fn process(self) -> Process {
                match self {
                    $(Self::$name => Process::$process,)*
                }
            }
        }
    };
}

steps! {
    /// Its claim is at the VM; it has not looked who else claims it.
    ClaimSet Guard "claim-set"
    /// The guard holds the VM's lock and claim.
    Locked Mover "locked"
    /// Facts were read for the first time.
    Observed Mover "observed"
    /// The job of a dead session was ended.
    LeftoverEnded Mover "leftover-ended"
    /// Directories of a dead session were removed, or what it left in QEMU.
    Swept Mover "swept"
    /// A bitmap that no record knew was removed, others of its mark are there.
    BitmapRemoved Guard "bitmap-removed"
    /// A mark that nobody finished was removed.
    MarkTidied Mover "mark-tidied"
    /// A mark that the hypervisor had forgotten was told again.
    MarkToldAgain Mover "mark-told-again"
    /// It is decided how each disk is read.
    Planned Mover "planned"
    /// The session's directories are there.
    DirectoriesMade Guard "directories-made"
    /// libvirt knows a key for encrypted scratch files, which are not there yet.
    SecretDefined Guard "secret-defined"
    /// The scratch files are there.
    ScratchMade Guard "scratch-made"
    /// QEMU's own NBD server runs, and serves nothing yet.
    QmpServerStarted Guard "qmp-server-started"
    /// The new mark's bitmaps record.
    QmpBitmapsAdded Guard "qmp-bitmaps-added"
    /// QEMU knows a key for encrypted scratch files.
    QmpKeyAdded Guard "qmp-key-added"
    /// QEMU has opened a disk's scratch file.
    QmpFleeceAdded Guard "qmp-fleece-added"
    /// The filter that will copy before the guest writes is there, not in its
    /// path.
    QmpFilterAdded Guard "qmp-filter-added"
    /// The guest's file systems are frozen; passed where there is an agent.
    Frozen Guard "frozen"
    /// QEMU knows that the guest is about to be stopped, and by whom.
    QmpStopNoted Guard "qmp-stop-noted"
    /// The guest's processors are stopped.
    QmpStopped Guard "qmp-stopped"
    /// A disk's filter is in the guest's path: its point in time is taken.
    QmpSwitched Guard "qmp-switched"
    /// The guest's processors run again.
    QmpResumed Guard "qmp-resumed"
    /// A disk's point in time can be read.
    QmpSnapshotAdded Guard "qmp-snapshot-added"
    /// It is known what changed until the point in time.
    QmpMerged Guard "qmp-merged"
    /// A disk's point in time is exported.
    QmpExported Guard "qmp-exported"
    /// The new mark is on one more image of a VM that is off.
    OffMarkAdded Guard "off-mark-added"
    /// The images of a VM that is off can be read; nobody has looked whether they
    /// are as they were.
    OffExported Guard "off-exported"
    /// The job runs and the new mark records; nobody has been told.
    Started Guard "started"
    /// The mover knows the exports.
    Begun Mover "begun"
    /// A pack is written, and has no name yet.
    PackWritten Mover "pack-written"
    /// A pack was stored.
    PackStored Mover "pack-stored"
    /// All disks were read.
    Copied Mover "copied"
    /// An index file was stored.
    IndexStored Mover "index-stored"
    /// The guard knows that a manifest may come.
    CommitTold Guard "commit-told"
    /// The mover knows that the guard knows.
    Committing Mover "committing"
    /// The manifest is written, and has no name yet.
    ManifestWritten Mover "manifest-written"
    /// The manifest is durable.
    Committed Mover "committed"
    /// It is seen that the job is the session's, and it is about to be ended.
    JobSeen Guard "job-seen"
    /// The exports are gone, the server is there.
    QmpExportsRemoved Guard "qmp-exports-removed"
    /// The server is gone, the nodes are there.
    QmpServerStopped Guard "qmp-server-stopped"
    /// A snapshot's node is gone, the filter in the guest's path.
    QmpSnapshotRemoved Guard "qmp-snapshot-removed"
    /// A filter is out of the guest's path.
    QmpSwitchedBack Guard "qmp-switched-back"
    /// A filter is gone.
    QmpFilterRemoved Guard "qmp-filter-removed"
    /// QEMU has let go of a scratch file.
    QmpFleeceRemoved Guard "qmp-fleece-removed"
    /// The session's job was told to end, and may still run.
    JobAborted Guard "job-aborted"
    /// The session's job was ended, its files are there.
    JobEnded Guard "job-ended"
    /// The session's files are gone as well.
    FilesRemoved Guard "files-removed"
    /// The mover knows that the session has ended.
    SessionEnded Mover "session-ended"
    /// The mark that lied was taken off a disk.
    Distrusted Mover "distrusted"
    /// The record of a mark was deleted, and the bitmaps it knew.
    RecordDeleted Guard "record-deleted"
    /// An old mark is gone.
    MarkGivenUp Mover "mark-given-up"
    /// A merged index file is there, and so are those that it replaces.
    MergeStored Mover "merge-stored"
    /// Some of those are gone.
    MergedDeleted Mover "merged-deleted"
    /// The index was looked after: all is done.
    IndexMerged Mover "index-merged"
}

/// Sets what happens at each step, for the whole process. The first hook stays.
pub fn on_step(hook: fn(Step)) {
    // A second one is a test's mistake, and nothing waits for it.
    let _ = HOOK.set(hook);
}

/// Says that a step was passed.
#[inline]
pub fn pass(step: Step) {
    if cfg!(debug_assertions)
        && let Some(hook) = HOOK.get()
    {
        hook(step);
    }
}

/// Lets nobody wait longer than this for what may never come back, for the whole
/// process. A test of every step cannot wait a minute at each.
pub fn limit_patience(max: Duration) {
    // As with the hook.
    let _ = PATIENCE_MAX.set(max);
}

/// Returns how long to wait for what may never come back: as long as `usual`,
/// always so in a release build.
pub fn patience(usual: Duration) -> Duration {
    match PATIENCE_MAX.get() {
        Some(max) if cfg!(debug_assertions) => usual.min(*max),
        Some(_) | None => usual,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_step_has_a_word_of_its_own() {
        let words: BTreeSet<&str> = Step::ALL.iter().map(|step| step.word()).collect();
        assert_eq!(words.len(), Step::ALL.len());
    }
}
