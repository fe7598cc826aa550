//! How is one disk read: what changed, everything, or not at all?

use highwater_model::{DATA_FILE_FORMAT, MarkName, PointId};

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
}

/// What identifies a disk: its serial or device name, and its image chain.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Identity {
    /// Serial number.
    pub serial: Option<String>,
    /// Device name.
    pub device: Option<String>,
    /// Images, topmost first; the data file of one follows it.
    pub chain: Vec<ImageLink>,
}

/// One image of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageLink {
    /// Path or URI.
    pub name: String,
    /// Format.
    pub format: String,
    /// Device and inode number, where it is a file that can be seen.
    pub inode: Option<(u64, u64)>,
    /// Length, modification and change time, likewise. Compared for backing
    /// files only: the topmost image changes with every write.
    pub stamp: Option<(u64, i64, i64)>,
}

/// Where the topmost image of a disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A file or device of this host: its inode number must be known.
    Host,
    /// Behind a server, which tells nothing that identifies it.
    ///
    /// What makes a mark safe there is where it lies: in the image, with the
    /// data it speaks of, under a name that is used once. Whatever the server
    /// gives out under the same address (another image, an older copy) has
    /// either no such bitmap or one that was kept together with its data.
    Network,
}

/// Whether a mark can live on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MarkSupport {
    /// It can.
    Yes,
    /// Raw, or another format without bitmaps.
    NotQcow2,
    /// qcow2 version 2.
    Qcow2Version2,
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
    /// It would be lost when QEMU ends.
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
    },
    /// Like `Incremental`, but the mark stays where it is.
    Differential {
        /// The point whose tree is built on.
        parent: PointId,
        /// The mark whose bitmap says what changed.
        since: MarkName,
        /// First byte that is read whatever the bitmap says.
        tail_from: Option<u64>,
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
        MarkSupport::Yes => None,
        MarkSupport::NotQcow2 => Some(Why::NoMarksOnRaw),
        MarkSupport::Qcow2Version2 => Some(Why::NoMarksOnQcow2V2),
    }
}

/// Returns the first fact that speaks against an increment.
///
/// Identity comes before the bitmap: a perfect bitmap on another disk proves
/// nothing about this one.
fn first_doubt(disk: &DiskView, parent: &ParentView) -> Option<Doubt> {
    if let Some(why) = identity_doubt(&disk.identity, &parent.identity) {
        return Some(why);
    }
    if disk.size_bytes < parent.size_bytes {
        return Some(Doubt::Untracked(Why::DiskShrank));
    }
    if let Some(why) = why_no_marks(disk).or_else(|| unseen(disk)) {
        return Some(Doubt::Tracked(why));
    }
    let tracked = |why| Some(Doubt::Tracked(why));
    match (disk.bitmap, disk.record) {
        (BitmapView::Missing, _) => return tracked(Why::BitmapMissing),
        (BitmapView::Inconsistent, _) => return tracked(Why::BitmapInconsistent),
        (BitmapView::NotPersistent, _) => return tracked(Why::BitmapNotPersistent),
        (BitmapView::Busy, _) => return Some(Doubt::Busy),
        (BitmapView::NotRecording, _) => return tracked(Why::BitmapNotRecording),
        (BitmapView::Recording { .. }, Record::Remade) => return tracked(Why::MarkRemade),
        (BitmapView::Recording { .. }, Record::Forgotten | Record::Refused) => {
            return tracked(Why::MarkRefused);
        }
        (BitmapView::Recording { granularity }, Record::Proven) => {
            if parent.granularity.is_some_and(|then| then != granularity) {
                return tracked(Why::BitmapGranularity);
            }
        }
    }
    if !parent.same_chunk_size {
        return tracked(Why::ChunkSizeDiffers);
    }
    if !parent.tree_is_readable {
        return tracked(Why::ParentDamaged);
    }
    None
}

/// Returns what of the chain nobody can compare. Two unknowns are equal, and
/// prove nothing.
fn unseen(disk: &DiskView) -> Option<Why> {
    let chain = &disk.identity.chain;
    let top_is_unseen = chain.first().is_none_or(|top| top.inode.is_none());
    if disk.place == Place::Host && top_is_unseen {
        return Some(Why::ImageUnseen);
    }
    let (written, below) = chain.split_at(written_links(chain));
    // A bitmap speaks of a data file, and does not lie in it: wherever it is,
    // it must be the one of then.
    if written.iter().skip(1).any(|data| data.inode.is_none()) {
        return Some(Why::ImageUnseen);
    }
    // No bitmap of this disk records what is written to an image below it.
    below
        .iter()
        .any(|backing| backing.stamp.is_none())
        .then_some(Why::BackingUnseen)
}

/// Returns how many links at the top of a chain the guest writes to: the image,
/// and its data file if it has one.
fn written_links(chain: &[ImageLink]) -> usize {
    let has_data_file = chain
        .get(1)
        .is_some_and(|second| second.format == DATA_FILE_FORMAT);
    chain.len().min(if has_data_file { 2 } else { 1 })
}

fn identity_doubt(now: &Identity, then: &Identity) -> Option<Doubt> {
    let differs = |now: &Option<String>, then: &Option<String>| now != then;
    if differs(&now.serial, &then.serial) {
        return Some(Doubt::Untracked(Why::DiskSwapped));
    }
    // A device name is positional (`virtio-disk0`); it only speaks where no
    // serial number does.
    if now.serial.is_none() && differs(&now.device, &then.device) {
        return Some(Doubt::Untracked(Why::DiskSwapped));
    }
    let same_names = now.chain.len() == then.chain.len()
        && now
            .chain
            .iter()
            .zip(&then.chain)
            .all(|(now, then)| now.name == then.name && now.format == then.format);
    if !same_names {
        return Some(Doubt::Untracked(Why::ChainChanged));
    }
    let written = written_links(&now.chain);
    for (depth, (now, then)) in now.chain.iter().zip(&then.chain).enumerate() {
        // The audit that may clear a changed inode (reboot, migration) is not
        // there yet; until it is, only a full read is proof.
        if now.inode != then.inode {
            return Some(Doubt::Tracked(Why::ImageReplaced));
        }
        if depth >= written && now.stamp != then.stamp {
            return Some(Doubt::Tracked(Why::BackingChanged));
        }
    }
    None
}

fn since_mark(level: Level, disk: &DiskView, parent: &ParentView) -> DiskPlan {
    let tail_from = (disk.size_bytes > parent.size_bytes).then_some(parent.size_bytes);
    let (point, since) = (parent.point, parent.mark.clone());
    if level == Level::Differential {
        return DiskPlan::Differential {
            parent: point,
            since,
            tail_from,
        };
    }
    DiskPlan::Incremental {
        parent: point,
        since,
        tail_from,
    }
}

#[cfg(test)]
mod tests {
    use highwater_model::{RepoId, Timestamp};

    use super::*;

    fn link(name: &str, inode: u64) -> ImageLink {
        ImageLink {
            name: name.to_owned(),
            format: "qcow2".to_owned(),
            inode: Some((1, inode)),
            stamp: Some((100, 5, 5)),
        }
    }

    fn disk() -> DiskView {
        DiskView {
            size_bytes: 100,
            identity: Identity {
                serial: None,
                device: Some("virtio-disk0".to_owned()),
                chain: vec![link("/a.qcow2", 7)],
            },
            place: Place::Host,
            marks: MarkSupport::Yes,
            bitmap: BitmapView::Recording {
                granularity: 65_536,
            },
            record: Record::Proven,
            root: RootView::Same,
        }
    }

    fn parent() -> ParentView {
        let point = PointId::new(Timestamp::from_unix_ms(1));
        ParentView {
            point,
            mark: MarkName::new(RepoId::from_bytes([1; 16]), point),
            size_bytes: 100,
            identity: disk().identity,
            granularity: Some(65_536),
            same_chunk_size: true,
            tree_is_readable: true,
        }
    }

    fn tell(plan: &DiskPlan) -> String {
        match plan {
            DiskPlan::Incremental { tail_from, .. } => format!("incremental {tail_from:?}"),
            DiskPlan::Differential { tail_from, .. } => format!("differential {tail_from:?}"),
            DiskPlan::Full(why) => format!("full {}", why.map_or("asked", Why::word)),
            DiskPlan::Rescan(why) => format!("rescan {}", why.word()),
            DiskPlan::Copy => "copy".to_owned(),
            DiskPlan::Refuse(refusal) => format!("refuse {refusal:?}"),
        }
    }

    /// Plans at level `auto` after `change` and compares.
    fn check(change: impl FnOnce(&mut DiskView, &mut ParentView), expected: &str) {
        let (mut disk, mut parent) = (disk(), parent());
        change(&mut disk, &mut parent);
        assert_eq!(
            tell(&plan_disk(
                Level::Auto,
                History::ThisDisk,
                &disk,
                Some(&parent)
            )),
            expected
        );
    }

    #[test]
    fn incremental_needs_every_fact_to_be_known_and_right() {
        check(|_, _| {}, "incremental None");
        check(
            |disk, _| disk.bitmap = BitmapView::Missing,
            "rescan bitmap-missing",
        );
        check(
            |disk, _| disk.bitmap = BitmapView::Inconsistent,
            "rescan bitmap-inconsistent",
        );
        check(
            |disk, _| disk.bitmap = BitmapView::NotRecording,
            "rescan bitmap-not-recording",
        );
        check(
            |disk, _| disk.bitmap = BitmapView::NotPersistent,
            "rescan bitmap-not-persistent",
        );
        check(
            |disk, _| disk.bitmap = BitmapView::Recording { granularity: 4096 },
            "rescan bitmap-granularity",
        );
        check(|disk, _| disk.record = Record::Remade, "rescan mark-remade");
        check(
            |disk, _| disk.record = Record::Forgotten,
            "rescan mark-refused",
        );
        check(
            |disk, _| disk.record = Record::Refused,
            "rescan mark-refused",
        );
        check(
            |_, parent| parent.same_chunk_size = false,
            "rescan chunk-size-differs",
        );
        check(
            |_, parent| parent.tree_is_readable = false,
            "rescan parent-damaged",
        );
        check(
            |disk, _| disk.marks = MarkSupport::NotQcow2,
            "rescan no-marks-on-raw",
        );
        check(
            |disk, _| disk.marks = MarkSupport::Qcow2Version2,
            "rescan no-marks-on-qcow2-v2",
        );
    }

    #[test]
    fn another_disk_in_the_same_place_is_never_an_increment() {
        check(
            |disk, _| disk.identity.serial = Some("b".to_owned()),
            "full disk-swapped",
        );
        check(
            |disk, _| disk.identity.device = Some("virtio-disk1".to_owned()),
            "full disk-swapped",
        );
        check(
            |disk, _| disk.identity.chain = vec![link("/b.qcow2", 7)],
            "full chain-changed",
        );
        check(
            |disk, _| disk.identity.chain.insert(0, link("/overlay.qcow2", 8)),
            "full chain-changed",
        );
        check(
            |disk, _| disk.identity.chain = vec![link("/a.qcow2", 8)],
            "rescan image-replaced",
        );
        check(
            |disk, _| disk.identity.chain = Vec::new(),
            "full chain-changed",
        );
    }

    #[test]
    fn a_serial_number_outweighs_the_device_name() {
        check(
            |disk, parent| {
                disk.identity.serial = Some("s".to_owned());
                parent.identity.serial = Some("s".to_owned());
                disk.identity.device = Some("virtio-disk3".to_owned());
            },
            "incremental None",
        );
    }

    #[test]
    fn a_written_backing_file_is_a_rescan_and_a_written_top_image_is_not() {
        check(
            |disk, parent| {
                disk.identity.chain.push(link("/base.qcow2", 9));
                parent.identity.chain.push(link("/base.qcow2", 9));
                disk.identity.chain[1].stamp = Some((100, 6, 6));
            },
            "rescan backing-changed",
        );
        check(
            |disk, _| disk.identity.chain[0].stamp = Some((200, 9, 9)),
            "incremental None",
        );
    }

    #[test]
    fn what_cannot_be_compared_is_not_taken_for_equal() {
        let unseen = |disk: &mut DiskView, parent: &mut ParentView, depth: usize| {
            disk.identity.chain.push(link("/base.qcow2", 9));
            let link = &mut disk.identity.chain[depth];
            (link.inode, link.stamp) = (None, None);
            parent.identity = disk.identity.clone();
        };
        check(
            |disk, parent| unseen(disk, parent, 0),
            "rescan image-unseen",
        );
        check(
            |disk, parent| {
                unseen(disk, parent, 0);
                disk.place = Place::Network;
            },
            "incremental None",
        );
        for place in [Place::Host, Place::Network] {
            check(
                |disk, parent| {
                    unseen(disk, parent, 1);
                    disk.place = place;
                },
                "rescan backing-unseen",
            );
        }
    }

    #[test]
    fn a_data_file_may_be_written_and_not_replaced() {
        let with_data = |disk: &mut DiskView, parent: &mut ParentView| {
            let mut data = link("/a.data", 9);
            DATA_FILE_FORMAT.clone_into(&mut data.format);
            disk.identity.chain.push(data);
            disk.identity.chain.push(link("/base.qcow2", 10));
            parent.identity = disk.identity.clone();
        };
        let check_link = |at: usize, change: fn(&mut ImageLink), expected: &str| {
            check(
                |disk, parent| {
                    with_data(disk, parent);
                    change(&mut disk.identity.chain[at]);
                },
                expected,
            );
        };
        check_link(1, |data| data.stamp = Some((200, 9, 9)), "incremental None");
        check_link(1, |data| data.stamp = None, "incremental None");
        check_link(
            1,
            |data| data.inode = Some((1, 11)),
            "rescan image-replaced",
        );
        check_link(2, |base| base.stamp = None, "rescan backing-changed");
        check(
            |disk, parent| {
                with_data(disk, parent);
                disk.identity.chain[1].inode = None;
                parent.identity = disk.identity.clone();
            },
            "rescan image-unseen",
        );
    }

    #[test]
    fn a_grown_disk_is_read_from_its_old_end_and_a_shrunk_one_as_a_whole() {
        check(|disk, _| disk.size_bytes = 101, "incremental Some(100)");
        check(|disk, _| disk.size_bytes = 99, "full disk-shrank");
    }

    #[test]
    fn a_busy_bitmap_or_a_changed_graph_is_refused() {
        check(
            |disk, _| disk.bitmap = BitmapView::Busy,
            "refuse BitmapBusy",
        );
        check(
            |disk, _| disk.root = RootView::Differs,
            "refuse GraphChanged",
        );
        check(
            |disk, _| disk.root = RootView::Unknown,
            "refuse GraphUnknown",
        );
    }

    #[test]
    fn without_a_parent_a_disk_is_new() {
        let tell_new = |history| tell(&plan_disk(Level::Auto, history, &disk(), None));
        assert_eq!(tell_new(History::Nothing), "full first-backup");
        assert_eq!(tell_new(History::OtherDisks), "full new-disk");
        assert_eq!(tell_new(History::ThisDisk), "rescan no-mark-yet");
        let raw = DiskView {
            marks: MarkSupport::NotQcow2,
            ..disk()
        };
        assert_eq!(
            tell(&plan_disk(Level::Auto, History::ThisDisk, &raw, None)),
            "rescan no-marks-on-raw"
        );
    }

    #[test]
    fn each_level_keeps_its_word() {
        let (disk, parent) = (disk(), parent());
        let mut broken = disk.clone();
        broken.bitmap = BitmapView::Missing;
        let table = [
            (Level::Auto, "incremental None", "rescan bitmap-missing"),
            (Level::Full, "full asked", "full asked"),
            (
                Level::Incremental,
                "incremental None",
                "refuse NoIncrement(BitmapMissing)",
            ),
            (
                Level::Differential,
                "differential None",
                "refuse NoIncrement(BitmapMissing)",
            ),
            (Level::Copy, "copy", "copy"),
        ];
        for (level, healthy, lost) in table {
            assert_eq!(
                tell(&plan_disk(level, History::ThisDisk, &disk, Some(&parent))),
                healthy
            );
            assert_eq!(
                tell(&plan_disk(level, History::ThisDisk, &broken, Some(&parent))),
                lost
            );
        }
        assert_eq!(
            tell(&plan_disk(
                Level::Incremental,
                History::Nothing,
                &disk,
                None
            )),
            "refuse NoIncrement(FirstBackup)"
        );
    }
}
