//! How is one disk read: what changed, everything, or not at all?

use highwater_model::{MarkName, PointId};

use crate::audit::AuditDuty;
use crate::identity::{Difference, Identity, Place, difference, has_moved, unseen};
use crate::why::{Refusal, Why};

/// What the user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Level {
    /// Incremental where it is safe, else everything.
    Auto,
    /// Everything, and a new mark.
    Full,
    /// Incremental or nothing: refuses where `Auto` would rescan.
    Incremental,
    /// What changed since the mark, without moving it.
    Differential,
    /// Everything, without touching any mark.
    Copy,
}

impl Level {
    /// Returns the word of the command line, JSON and manifest.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Full => "full",
            Self::Incremental => "incremental",
            Self::Differential => "differential",
            Self::Copy => "copy",
        }
    }

    /// Returns whether a backup of this level leaves a new mark.
    pub const fn leaves_a_mark(self) -> bool {
        match self {
            Self::Auto | Self::Full | Self::Incremental => true,
            Self::Differential | Self::Copy => false,
        }
    }
}

/// What is observed of a disk now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskView {
    /// Size the guest sees, bytes.
    pub size_bytes: u64,
    /// What identifies it.
    pub identity: Identity,
    /// Where its topmost image is.
    pub place: Place,
    /// Whether a mark can live on it.
    pub marks: MarkSupport,
    /// The parent mark's bitmap on this disk, however many nodes it spans.
    pub bitmap: BitmapView,
    /// The hypervisor's record of the parent's mark.
    pub record: Record,
    /// Whether an export would show what the guest writes.
    pub root: RootView,
    /// What the guest has written since the parent's point, if it was counted.
    pub writes: Option<WritesSince>,
}

/// The newest proven restore point whose mark is on this disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentView {
    /// The point.
    pub point: PointId,
    /// Its mark.
    pub mark: MarkName,
    /// Size of its image, bytes.
    pub size_bytes: u64,
    /// What identified the disk then.
    pub identity: Identity,
    /// Granularity of the bitmap then, bytes.
    pub granularity: Option<u32>,
    /// Whether its image has the repository's chunk size.
    pub same_chunk_size: bool,
    /// Whether the topmost page of its tree can be read and is right.
    pub tree_is_readable: bool,
    /// Whether a later backup found its mark lying and could leave no other.
    pub mark_lied: bool,
}

/// What a hypervisor process counts of a disk's guest writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counted<P> {
    /// The process that counts, unmistakably.
    pub process: P,
    /// Bytes written.
    pub bytes: u64,
    /// Write operations.
    pub operations: u64,
}

/// Guest writes since the parent's point against what the bitmap shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WritesSince {
    /// Bytes that were certainly written since.
    pub bytes: u64,
    /// Bytes the bitmap calls dirty.
    pub dirty_bytes: u64,
}

impl WritesSince {
    /// Compares two counts. `then` must have been taken after the point and
    /// `now` before the bitmap was asked: so every write in between was one
    /// that the bitmap had to show. Nothing is known of another process, nor
    /// where a counter began anew.
    pub fn between<P: PartialEq>(
        then: &Counted<P>,
        now: &Counted<P>,
        dirty_bytes: u64,
    ) -> Option<Self> {
        if then.process != now.process || now.operations < then.operations {
            return None;
        }
        Some(Self {
            // A write of no bytes is an operation too, and dirties nothing.
            bytes: now.bytes.checked_sub(then.bytes)?,
            dirty_bytes,
        })
    }

    /// Says whether writes are missing from the bitmap for certain.
    const fn prove_a_lie(self) -> bool {
        self.bytes > 0 && self.dirty_bytes == 0
    }
}

/// Whether a mark can live on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MarkSupport {
    /// It can.
    Yes,
    /// Only in the memory of the process that runs the VM, which is all that an
    /// image of this kind allows.
    WhileRunning(Unfit),
    /// It cannot.
    No(Unfit),
}

/// What keeps a bitmap out of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unfit {
    /// Raw, or another format without bitmaps.
    NotQcow2,
    /// qcow2 version 2.
    Qcow2Version2,
}

impl Unfit {
    const fn why(self) -> Why {
        match self {
            Self::NotQcow2 => Why::NoMarksOnRaw,
            Self::Qcow2Version2 => Why::NoMarksOnQcow2V2,
        }
    }
}

/// The parent mark's bitmap on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BitmapView {
    /// There is none of that name.
    Missing,
    /// It was not closed properly and is worthless.
    Inconsistent,
    /// It does not record.
    NotRecording,
    /// It would be lost when QEMU ends, though the image could hold it.
    NotPersistent,
    /// A job or export uses it.
    Busy,
    /// It records every write.
    Recording {
        /// Bytes per bit.
        granularity: u32,
    },
}

/// The hypervisor's record of a mark (libvirt: the checkpoint).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// It is there, and nonce and creation time are the recorded ones.
    Proven,
    /// It is there, but nonce or creation time differ: somebody re-made it.
    Remade,
    /// It is the recorded one, but nobody knows whether the bitmap is.
    Unidentified,
    /// The hypervisor does not know it.
    Forgotten,
    /// It was forgotten, and telling the hypervisor again was refused.
    Refused,
}

/// Whether an export would show what the guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RootView {
    /// It would.
    Same,
    /// The graph was changed behind the hypervisor's back.
    Differs,
    /// Nobody knows.
    Unknown,
}

/// How a disk is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskPlan {
    /// What changed since the mark, and everything from `tail_from` on (the
    /// disk has grown: the new part is clean in the bitmap).
    Incremental {
        /// The point whose tree is built on.
        parent: PointId,
        /// The mark whose bitmap says what changed.
        since: MarkName,
        /// First byte that is read whatever the bitmap says.
        tail_from: Option<u64>,
        /// How much of what the bitmap calls clean is read again.
        audit: AuditDuty,
    },
    /// Like `Incremental`, but the mark stays where it is.
    Differential {
        /// The point whose tree is built on.
        parent: PointId,
        /// The mark whose bitmap says what changed.
        since: MarkName,
        /// First byte that is read whatever the bitmap says.
        tail_from: Option<u64>,
        /// How much of what the bitmap calls clean is read again.
        audit: AuditDuty,
    },
    /// Everything is read; only what the repository lacks is stored. `None`
    /// where the user asked for it.
    Full(Option<Why>),
    /// A tracked disk is read as a whole because its mark cannot be trusted.
    Rescan(Why),
    /// Everything, no mark.
    Copy,
    /// Not at all.
    Refuse(Refusal),
}

impl DiskPlan {
    /// Returns how much depends on the audit of an increment.
    pub const fn audit(&self) -> Option<AuditDuty> {
        match self {
            Self::Incremental { audit, .. } | Self::Differential { audit, .. } => Some(*audit),
            Self::Full(_) | Self::Rescan(_) | Self::Copy | Self::Refuse(_) => None,
        }
    }
}

/// What the repository holds of a disk that has no parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum History {
    /// Nothing, not even of the VM.
    Nothing,
    /// Points of the VM, but none with this disk.
    OtherDisks,
    /// Points with this disk, but none whose mark is on it.
    ThisDisk,
}

/// Decides how to read one disk; `history` speaks where there is no parent.
pub fn plan_disk(
    level: Level,
    history: History,
    disk: &DiskView,
    parent: Option<&ParentView>,
) -> DiskPlan {
    match disk.root {
        RootView::Differs => return DiskPlan::Refuse(Refusal::GraphChanged),
        RootView::Unknown => return DiskPlan::Refuse(Refusal::GraphUnknown),
        RootView::Same => {}
    }
    match level {
        Level::Copy => return DiskPlan::Copy,
        Level::Full => return DiskPlan::Full(None),
        Level::Auto | Level::Incremental | Level::Differential => {}
    }
    let doubt = match parent {
        None => why_untracked(history, disk),
        Some(parent) => match first_doubt(disk, parent) {
            None => return since_mark(level, disk, parent),
            Some(doubt) => doubt,
        },
    };
    match (level, doubt) {
        (_, Doubt::Busy) => DiskPlan::Refuse(Refusal::BitmapBusy),
        (Level::Incremental | Level::Differential, Doubt::Untracked(why) | Doubt::Tracked(why)) => {
            DiskPlan::Refuse(Refusal::NoIncrement(why))
        }
        (_, Doubt::Untracked(why)) => DiskPlan::Full(Some(why)),
        (_, Doubt::Tracked(why)) => DiskPlan::Rescan(why),
    }
}

/// Why an increment is not safe.
enum Doubt {
    /// There is no tracking to go on with: a new beginning for this disk.
    Untracked(Why),
    /// There was tracking, and it cannot be trusted.
    Tracked(Why),
    /// Somebody uses the bitmap at this moment.
    Busy,
}

fn why_untracked(history: History, disk: &DiskView) -> Doubt {
    match history {
        History::Nothing => Doubt::Untracked(Why::FirstBackup),
        History::OtherDisks => Doubt::Untracked(Why::NewDisk),
        History::ThisDisk => Doubt::Tracked(why_no_marks(disk).unwrap_or(Why::NoMarkYet)),
    }
}

fn why_no_marks(disk: &DiskView) -> Option<Why> {
    match disk.marks {
        MarkSupport::Yes | MarkSupport::WhileRunning(_) => None,
        MarkSupport::No(unfit) => Some(unfit.why()),
    }
}

/// Returns the first fact that speaks against an increment.
///
/// Identity comes before the bitmap: a perfect bitmap on another disk proves
/// nothing about this one.
fn first_doubt(disk: &DiskView, parent: &ParentView) -> Option<Doubt> {
    match difference(&disk.identity, &parent.identity) {
        Some(Difference::Another(why)) => return Some(Doubt::Untracked(why)),
        Some(Difference::Changed(why)) => return Some(Doubt::Tracked(why)),
        None => {}
    }
    if disk.size_bytes < parent.size_bytes {
        return Some(Doubt::Untracked(Why::DiskShrank));
    }
    if let Some(why) = why_no_marks(disk).or_else(|| unseen(&disk.identity, disk.place)) {
        return Some(Doubt::Tracked(why));
    }
    let tracked = |why| Some(Doubt::Tracked(why));
    // Before the bitmap, which was taken off the disk for it, is missed.
    if parent.mark_lied {
        return tracked(Why::BitmapLied);
    }
    match (disk.bitmap, disk.record) {
        (BitmapView::Missing, _) => {
            return tracked(match disk.marks {
                // It went with the process that held it.
                MarkSupport::WhileRunning(unfit) => unfit.why(),
                MarkSupport::Yes | MarkSupport::No(_) => Why::BitmapMissing,
            });
        }
        (BitmapView::Inconsistent, _) => return tracked(Why::BitmapInconsistent),
        (BitmapView::NotPersistent, _) => return tracked(Why::BitmapNotPersistent),
        (BitmapView::Busy, _) => return Some(Doubt::Busy),
        (BitmapView::NotRecording, _) => return tracked(Why::BitmapNotRecording),
        (BitmapView::Recording { .. }, Record::Remade) => return tracked(Why::MarkRemade),
        (BitmapView::Recording { .. }, Record::Forgotten | Record::Refused) => {
            return tracked(Why::MarkRefused);
        }
        (BitmapView::Recording { .. }, Record::Unidentified) => {
            return tracked(Why::ProcessUnknown);
        }
        (BitmapView::Recording { granularity }, Record::Proven) => {
            if parent.granularity.is_some_and(|then| then != granularity) {
                return tracked(Why::BitmapGranularity);
            }
        }
    }
    if disk.writes.is_some_and(WritesSince::prove_a_lie) {
        return tracked(Why::BitmapLied);
    }
    if !parent.same_chunk_size {
        return tracked(Why::ChunkSizeDiffers);
    }
    if !parent.tree_is_readable {
        return tracked(Why::ParentDamaged);
    }
    None
}

fn since_mark(level: Level, disk: &DiskView, parent: &ParentView) -> DiskPlan {
    let tail_from = (disk.size_bytes > parent.size_bytes).then_some(parent.size_bytes);
    let audit = if has_moved(&disk.identity, &parent.identity) {
        AuditDuty::Mandatory(Why::ImageReplaced)
    } else {
        AuditDuty::Sampled
    };
    let (point, since) = (parent.point, parent.mark.clone());
    if level == Level::Differential {
        return DiskPlan::Differential {
            parent: point,
            since,
            tail_from,
            audit,
        };
    }
    DiskPlan::Incremental {
        parent: point,
        since,
        tail_from,
        audit,
    }
}

#[cfg(test)]
mod tests;
