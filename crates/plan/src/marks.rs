//! Which of our marks at a VM are needed, unfinished or superseded?

use std::collections::BTreeSet;

use highwater_model::{MarkName, PointId, RepoId};

/// A mark of any Highwater repository found at a VM: as a record of the
/// hypervisor, as a bitmap on some disk, or both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundMark {
    /// Its name.
    pub name: MarkName,
    /// Whether it is this VM's: see [`MarkTraces::are_of_vm`].
    pub is_of_vm: bool,
}

/// Where a mark is met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MarkTraces {
    /// Whether the hypervisor has a record of it at this VM.
    pub has_record: bool,
    /// Whether a disk of this VM has its bitmap in the topmost image.
    pub is_on_top: bool,
    /// Whether its point is one of this VM's.
    pub is_committed: bool,
}

impl MarkTraces {
    /// Decides whether the mark is this VM's.
    ///
    /// One that only lies in a backing file came there with that file: it is of
    /// the VM whose disk the file is or was, and several VMs may share the file
    /// (linked clones of a template). It is none of this VM's business.
    pub const fn are_of_vm(self) -> bool {
        self.has_record || self.is_on_top || self.is_committed
    }
}

/// The parent of one disk: the newest proven point whose mark is on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parent {
    /// Target name of the disk.
    pub target: String,
    /// The mark.
    pub mark: MarkName,
}

/// Returns the marks of `repo` whose backup never committed: we died before
/// the manifest was durable.
///
/// They are removed before anything else. Nothing is lost by that: the older
/// mark has gone on recording since its own creation.
pub fn unfinished_marks(
    repo: RepoId,
    found: &[FoundMark],
    committed: &BTreeSet<PointId>,
) -> Vec<MarkName> {
    sorted(
        found
            .iter()
            .filter(|mark| is_ours(repo, mark) && !committed.contains(&mark.name.point())),
    )
}

/// Returns the marks of `repo` that no disk needs any more.
///
/// A mark covers several disks; as long as one of them needs it, it stays.
/// Marks of other repositories and of other VMs are never touched.
pub fn superseded_marks(repo: RepoId, found: &[FoundMark], parents: &[Parent]) -> Vec<MarkName> {
    let needed: BTreeSet<&MarkName> = parents.iter().map(|parent| &parent.mark).collect();
    sorted(
        found
            .iter()
            .filter(|mark| is_ours(repo, mark) && !needed.contains(&mark.name)),
    )
}

fn is_ours(repo: RepoId, mark: &FoundMark) -> bool {
    mark.is_of_vm && mark.name.is_of(repo)
}

/// A mark on one disk, as far as giving it up early depends on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MarkUse {
    /// The mark.
    pub mark: MarkName,
    /// Whether it is this VM's.
    pub is_of_vm: bool,
    /// Whether it lies in an image below the topmost one, too.
    pub is_below: bool,
    /// Whether an increment of this disk may still begin at it, now or later.
    pub is_usable: bool,
}

/// Returns the marks of `repo` that lie in some backing file and that no disk
/// can use.
///
/// They are removed before the point in time. Removed after it, as others are,
/// they would change the backing file that the new point has just described,
/// and the next backup could not tell that from a stranger's write.
pub fn useless_marks_below(repo: RepoId, marks: &[MarkUse]) -> Vec<MarkName> {
    let usable: BTreeSet<&MarkName> = marks
        .iter()
        .filter(|one| one.is_usable)
        .map(|one| &one.mark)
        .collect();
    let below = marks.iter().filter(|one| one.is_of_vm && one.is_below);
    let useless: BTreeSet<&MarkName> = below
        .map(|one| &one.mark)
        .filter(|mark| mark.is_of(repo) && !usable.contains(mark))
        .collect();
    useless.into_iter().cloned().collect()
}

fn sorted<'a>(marks: impl Iterator<Item = &'a FoundMark>) -> Vec<MarkName> {
    let unique: BTreeSet<&MarkName> = marks.map(|mark| &mark.name).collect();
    unique.into_iter().cloned().collect()
}

#[cfg(test)]
mod tests {
    use highwater_model::Timestamp;

    use super::*;

    fn repo(n: u8) -> RepoId {
        RepoId::from_bytes([n; 16])
    }

    fn mark(n: u8, ms: i64) -> FoundMark {
        FoundMark {
            name: MarkName::new(repo(n), PointId::new(Timestamp::from_unix_ms(ms))),
            is_of_vm: true,
        }
    }

    #[test]
    fn a_mark_that_only_lies_in_a_backing_file_is_another_vms() {
        let are_of_vm = |has_record, is_on_top, is_committed| {
            let traces = MarkTraces {
                has_record,
                is_on_top,
                is_committed,
            };
            traces.are_of_vm()
        };
        assert!(!are_of_vm(false, false, false));
        assert!(are_of_vm(true, false, false));
        assert!(are_of_vm(false, true, false));
        assert!(are_of_vm(false, false, true));
        let theirs = FoundMark {
            is_of_vm: false,
            ..mark(1, 1)
        };
        let found = [theirs.clone()];
        assert!(unfinished_marks(repo(1), &found, &BTreeSet::new()).is_empty());
        assert!(superseded_marks(repo(1), &found, &[]).is_empty());
        let below = MarkUse {
            mark: theirs.name,
            is_of_vm: false,
            is_below: true,
            is_usable: false,
        };
        assert!(useless_marks_below(repo(1), &[below]).is_empty());
    }

    fn parent(target: &str, mark: &FoundMark) -> Parent {
        Parent {
            target: target.to_owned(),
            mark: mark.name.clone(),
        }
    }

    #[test]
    fn a_mark_without_a_manifest_is_unfinished() {
        let (done, died) = (mark(1, 1), mark(1, 2));
        let committed = BTreeSet::from([done.name.point()]);
        let found = [done.clone(), died.clone(), died.clone()];
        assert_eq!(unfinished_marks(repo(1), &found, &committed), [died.name]);
    }

    #[test]
    fn marks_of_other_repositories_are_never_touched() {
        let (ours, theirs) = (mark(1, 1), mark(2, 2));
        let found = [ours.clone(), theirs];
        let only_ours = vec![ours.name];
        assert_eq!(
            unfinished_marks(repo(1), &found, &BTreeSet::new()),
            only_ours
        );
        assert_eq!(superseded_marks(repo(1), &found, &[]), only_ours);
    }

    #[test]
    fn a_mark_stays_as_long_as_one_disk_needs_it() {
        let (old, new) = (mark(1, 1), mark(1, 2));
        let found = [old.clone(), new.clone()];
        let only_vda_moved = [parent("vda", &new), parent("vdb", &old)];
        assert!(superseded_marks(repo(1), &found, &only_vda_moved).is_empty());
        let both_moved = [parent("vda", &new), parent("vdb", &new)];
        assert_eq!(superseded_marks(repo(1), &found, &both_moved), [old.name]);
    }

    #[test]
    fn a_mark_below_goes_early_only_if_no_disk_can_use_it() {
        let (ours, theirs) = (mark(1, 1), mark(2, 2));
        let one = |mark: &FoundMark, is_below, is_usable| MarkUse {
            mark: mark.name.clone(),
            is_of_vm: mark.is_of_vm,
            is_below,
            is_usable,
        };
        let useless = |marks: &[MarkUse]| useless_marks_below(repo(1), marks);
        let below = one(&ours, true, false);
        let only_ours = vec![ours.name.clone()];
        assert_eq!(useless(&[below.clone(), below.clone()]), only_ours);
        assert_eq!(
            useless(&[below.clone(), one(&ours, false, false)]),
            only_ours
        );
        // Another disk of the VM goes on from it.
        assert!(useless(&[below.clone(), one(&ours, false, true)]).is_empty());
        assert!(useless(&[one(&ours, true, true)]).is_empty());
        // On top it is in nobody's way: it goes when the new point is durable.
        assert!(useless(&[one(&ours, false, false)]).is_empty());
        assert!(useless(&[one(&theirs, true, false)]).is_empty());
    }
}
