//! A tracked disk to which all is well, for the cases to change.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use highwater_model::{MarkName, PointId, RepoId, Timestamp};

use crate::disk::plan_disk;
use crate::{
    AuditDuty, BitmapView, DiskPlan, DiskView, FoundMark, History, Identity, ImageLink, Level,
    MarkSupport, Parent, ParentView, Place, Record, Refusal, RootView, Why,
};

pub(super) const OURS: RepoId = RepoId::from_bytes([1; 16]);
pub(super) const THEIRS: RepoId = RepoId::from_bytes([2; 16]);

/// An image as it is recorded, or as it is found.
pub(crate) fn link(name: &str, format: &str) -> ImageLink {
    ImageLink {
        name: name.to_owned(),
        format: format.to_owned(),
        inode: Some((1, 7)),
        stamp: Some((100, 5, 5)),
    }
}

pub(crate) fn disk() -> DiskView {
    DiskView {
        size_bytes: 100,
        identity: Identity {
            serial: None,
            device: Some("virtio-disk0".to_owned()),
            device_unknown: false,
            chain: vec![link("/a.qcow2", "qcow2")],
        },
        place: Place::Host,
        marks: MarkSupport::Yes,
        bitmap: BitmapView::Recording {
            granularity: 65_536,
        },
        record: Record::Proven,
        root: RootView::Same,
        writes: None,
    }
}

pub(crate) fn parent() -> ParentView {
    // Made once: a point's id is drawn.
    static MARK: LazyLock<MarkName> = LazyLock::new(|| mark(OURS, 1));
    ParentView {
        point: MARK.point(),
        mark: MARK.clone(),
        size_bytes: 100,
        identity: disk().identity,
        granularity: Some(65_536),
        same_chunk_size: true,
        tree_is_readable: true,
        mark_lied: false,
    }
}

pub(super) fn mark(repo: RepoId, at: i64) -> MarkName {
    MarkName::new(repo, PointId::new(Timestamp::from_unix_ms(at)))
}

/// The plan of a disk that differs from a healthy one by `change`.
pub(super) fn plan(change: impl FnOnce(&mut DiskView, &mut ParentView)) -> DiskPlan {
    let (mut disk, mut parent) = (disk(), parent());
    change(&mut disk, &mut parent);
    plan_disk(Level::Auto, History::ThisDisk, &disk, Some(&parent))
}

/// The plan of a disk that has no parent.
pub(super) fn plan_untracked(history: History, marks: MarkSupport) -> DiskPlan {
    let disk = DiskView { marks, ..disk() };
    plan_disk(Level::Auto, history, &disk, None)
}

pub(super) fn incremental() -> DiskPlan {
    let parent = parent();
    DiskPlan::Incremental {
        parent: parent.point,
        since: parent.mark,
        tail_from: None,
        audit: AuditDuty::Sampled,
    }
}

pub(super) const fn full(why: Why) -> DiskPlan {
    DiskPlan::Full(Some(why))
}

pub(super) const fn rescan(why: Why) -> DiskPlan {
    DiskPlan::Rescan(why)
}

pub(super) const fn refused(refusal: Refusal) -> DiskPlan {
    DiskPlan::Refuse(refusal)
}

/// Marks that lie at the VM.
pub(super) fn found(marks: &[&MarkName]) -> Vec<FoundMark> {
    let found = |mark: &&MarkName| FoundMark {
        name: (*mark).clone(),
        is_of_vm: true,
    };
    marks.iter().map(found).collect()
}

/// The mark that each disk needs, `vda` first.
pub(super) fn needs(marks: &[&MarkName]) -> Vec<Parent> {
    let targets = ["vda", "vdb", "vdc"];
    let parent = |(target, mark): (&str, &&MarkName)| Parent {
        target: target.to_owned(),
        mark: (*mark).clone(),
    };
    targets.into_iter().zip(marks).map(parent).collect()
}

/// Points that have a manifest.
pub(super) fn committed(marks: &[&MarkName]) -> BTreeSet<PointId> {
    marks.iter().map(|mark| mark.point()).collect()
}
