//! Each finding, from a healthy VM with one thing changed.

use highwater_model::Timestamp;

use super::*;
use crate::audit::AuditDuty;

fn repo(n: u8) -> RepoId {
    RepoId::from_bytes([n; 16])
}

fn mark(repo_number: u8, ms: i64) -> MarkName {
    MarkName::new(repo(repo_number), PointId::new(Timestamp::from_unix_ms(ms)))
}

fn view(name: &MarkName) -> MarkView {
    MarkView {
        name: name.clone(),
        is_of_vm: true,
        has_record: true,
        disks: Vec::new(),
    }
}

#[test]
fn a_mark_of_another_vm_is_told_and_left_alone() {
    for is_held in [false, true] {
        check(&["nothing: other-vm"], |it, _| {
            it.is_held = is_held;
            it.marks.extend([1, 9].map(|ms| MarkView {
                is_of_vm: false,
                has_record: false,
                ..view(&mark(1, ms))
            }));
        });
    }
}

fn parent(target: &str, mark: &MarkName) -> Parent {
    Parent {
        target: target.to_owned(),
        mark: mark.clone(),
    }
}

fn since(mark: &MarkName) -> DiskPlan {
    DiskPlan::Incremental {
        parent: mark.point(),
        since: mark.clone(),
        tail_from: None,
        audit: AuditDuty::Sampled,
    }
}

/// A VM whose disks have the newest of the marks as parent.
struct Case {
    state: VmState,
    job: JobView,
    is_held: bool,
    committed: BTreeSet<PointId>,
    unreadable: BTreeSet<PointId>,
    parents: Vec<Parent>,
    forgotten: BTreeSet<MarkName>,
    marks: Vec<MarkView>,
    disks: Vec<(String, DiskPlan)>,
    left: Vec<SessionId>,
    remains: Vec<SessionId>,
    strange: Vec<Strange>,
    wrecks: Wrecks,
}

impl Case {
    fn healthy(mark: &MarkName) -> Self {
        Self {
            state: VmState::Alive,
            job: JobView::None,
            is_held: false,
            committed: BTreeSet::from([mark.point()]),
            unreadable: BTreeSet::new(),
            parents: vec![parent("vda", mark)],
            forgotten: BTreeSet::new(),
            marks: vec![view(mark)],
            disks: vec![("vda".to_owned(), since(mark))],
            left: Vec::new(),
            remains: Vec::new(),
            strange: Vec::new(),
            wrecks: Wrecks::default(),
        }
    }

    fn told(&self) -> Vec<String> {
        let scene = Scene {
            repo: repo(1),
            state: self.state,
            job: self.job,
            is_held: self.is_held,
            committed: &self.committed,
            unreadable: &self.unreadable,
            parents: &self.parents,
            forgotten: &self.forgotten,
            marks: &self.marks,
            disks: &self.disks,
            left: &self.left,
            remains: &self.remains,
            strange: &self.strange,
            wrecks: self.wrecks,
        };
        diagnose(&scene, &judge_marks(&scene))
            .iter()
            .map(|it| format!("{}: {}", it.remedy.word(), it.problem.word()))
            .collect()
    }
}

/// Changes a healthy VM and says what must be told of it.
fn check(expected: &[&str], change: impl FnOnce(&mut Case, &MarkName)) {
    let newest = mark(1, 5);
    let mut case = Case::healthy(&newest);
    change(&mut case, &newest);
    assert_eq!(case.told(), expected);
}

fn session() -> SessionId {
    SessionId::from_bytes([7; 8])
}

#[test]
fn a_healthy_vm_has_no_findings() {
    check(&[], |_, _| {});
}

#[test]
fn a_job_is_a_dead_session_only_if_nobody_holds_the_vm() {
    let ours = JobView::Ours(session());
    check(&["fix: dead-session"], |it, _| it.job = ours);
    check(&["fix: dead-session"], |it, _| {
        (it.job, it.state) = (ours, VmState::Stuck);
    });
    check(&[], |it, _| (it.job, it.is_held) = (ours, true));
    check(&["hand: foreign-job"], |it, _| it.job = JobView::Foreign);
    check(&["hand: paused-on-error"], |it, _| {
        it.state = VmState::Stuck;
    });
}

#[test]
fn a_mark_is_removed_only_if_it_is_ours_and_nobody_needs_it() {
    check(&["fix: unfinished-mark"], |it, _| {
        it.marks.push(view(&mark(1, 9)));
    });
    let old = mark(1, 2);
    check(&["fix: superseded-mark"], |it, _| {
        it.marks.push(view(&old));
        it.committed.insert(old.point());
    });
    check(&["fix: unneeded-mark"], |it, _| it.parents.clear());
    check(&["nothing: other-repository"], |it, _| {
        it.marks.push(view(&mark(2, 9)));
        it.marks.push(view(&mark(2, 1)));
    });
    // One disk of two still builds on the old one.
    check(&[], |it, _| {
        it.marks.push(view(&old));
        it.committed.insert(old.point());
        it.parents.push(parent("vdb", &old));
        it.disks.push(("vdb".to_owned(), since(&old)));
    });
    // Nobody knows what the newest point says of its mark.
    check(&["nothing: unreadable-point"], |it, newest| {
        it.parents.clear();
        it.unreadable.insert(newest.point());
    });
}

#[test]
fn a_mark_is_useless_only_if_it_is_its_own_fault_on_every_disk() {
    let faults = [
        Why::BitmapMissing,
        Why::BitmapInconsistent,
        Why::BitmapNotRecording,
        Why::BitmapNotPersistent,
        Why::BitmapGranularity,
        Why::MarkRemade,
        Why::MarkRefused,
    ];
    for why in faults {
        check(&["fix: useless-mark"], |it, _| {
            it.disks[0].1 = DiskPlan::Rescan(why);
        });
        // The other disk goes on with it.
        check(&[], |it, newest| {
            it.disks[0].1 = DiskPlan::Rescan(why);
            it.parents.push(parent("vdb", newest));
            it.disks.push(("vdb".to_owned(), since(newest)));
        });
    }
    for why in [
        Why::ImageUnseen,
        Why::ParentDamaged,
        Why::BackingChanged,
        Why::ProcessUnknown,
    ] {
        check(&[], |it, _| it.disks[0].1 = DiskPlan::Rescan(why));
    }
    check(&["fix: forgotten-mark"], |it, newest| {
        it.forgotten.insert(newest.clone());
    });
}

#[test]
fn marks_of_a_vm_that_is_off_or_held_are_left_to_the_next_backup() {
    for (state, is_held) in [(VmState::Off, false), (VmState::Alive, true)] {
        check(&["next-backup: superseded-mark"], |it, _| {
            let old = mark(1, 2);
            it.marks.push(view(&old));
            it.committed.insert(old.point());
            (it.state, it.is_held) = (state, is_held);
        });
    }
    // The one in flight is no finding at all.
    check(&[], |it, _| {
        it.marks.push(view(&mark(1, 9)));
        it.left.push(session());
        it.is_held = true;
    });
    // Directories can be removed whether the VM runs or not.
    check(&["fix: left-directories"], |it, _| {
        it.left.push(session());
        it.state = VmState::Off;
    });
}

#[test]
fn wreckage_of_others_is_for_a_person_only_where_it_does_harm() {
    let left = |harmful, harmless, is_in_use| Wrecks {
        harmful,
        harmless,
        is_in_use,
    };
    check(&[], |it, _| it.wrecks = left(0, 0, true));
    check(&["nothing: foreign-wreckage"], |it, _| {
        it.wrecks = left(0, 1, false);
    });
    check(&["nothing: foreign-wreckage"], |it, _| {
        it.wrecks = left(3, 1, true);
    });
    check(&["hand: foreign-wreckage"], |it, _| {
        it.wrecks = left(3, 1, false);
    });
}

#[test]
fn marks_of_a_vm_that_is_off_are_repaired_in_its_images() {
    check(&["fix: superseded-mark"], |it, _| {
        let old = mark(1, 2);
        it.marks.push(view(&old));
        it.committed.insert(old.point());
        it.state = VmState::AtRest;
    });
}

#[test]
fn what_a_dead_session_left_in_the_hypervisor_is_ours_to_remove_unless_its_job_tells_of_it() {
    check(
        &["fix: session-remains", "fix: left-directories"],
        |it, _| {
            it.remains.push(session());
            it.left.push(session());
        },
    );
    check(&["fix: dead-session"], |it, _| {
        it.remains.push(session());
        it.job = JobView::Ours(session());
    });
    check(&[], |it, _| {
        it.remains.push(session());
        it.is_held = true;
    });
}

#[test]
fn a_disk_that_no_backup_can_read_needs_a_hand_while_the_vm_runs() {
    let refused = |refusal| DiskPlan::Refuse(refusal);
    for (refusal, word) in [
        (Refusal::GraphChanged, "hand: graph-changed"),
        (Refusal::GraphUnknown, "hand: graph-unknown"),
        (Refusal::BitmapBusy, "hand: bitmap-busy"),
    ] {
        check(&[word], |it, _| it.disks[0].1 = refused(refusal));
        check(&[], |it, _| {
            (it.disks[0].1, it.state) = (refused(refusal), VmState::Off);
        });
    }
    check(&["hand: foreign-job"], |it, _| {
        (it.disks[0].1, it.job) = (refused(Refusal::BitmapBusy), JobView::Foreign);
    });
}

#[test]
fn an_nbd_server_of_others_keeps_a_backup_from_starting_and_other_exports_do_not() {
    for (is_nbd, expected) in [
        (true, "hand: foreign-export"),
        (false, "nothing: foreign-export"),
    ] {
        check(&[expected], |it, _| {
            it.strange = vec![Strange::Export {
                id: "theirs".to_owned(),
                node: "libvirt-1-format".to_owned(),
                is_nbd,
            }];
        });
    }
}

#[test]
fn what_is_not_ours_is_told_last_and_left_alone() {
    let expected = [
        "hand: foreign-job",
        "fix: left-directories",
        "fix: unfinished-mark",
        "nothing: foreign-checkpoint",
        "nothing: foreign-bitmap",
        "nothing: write-errors",
    ];
    check(&expected, |it, _| {
        let (name, disk) = (String::from("hw-looks-like-ours"), String::from("vda"));
        it.strange = vec![
            Strange::Checkpoint {
                name: name.clone(),
                disks: vec![disk.clone()],
            },
            Strange::Bitmap {
                name,
                disk: disk.clone(),
                recording: true,
            },
            Strange::WriteErrors {
                disk,
                is_ignored: true,
            },
        ];
        it.marks.push(view(&mark(1, 9)));
        it.left.push(session());
        it.job = JobView::Foreign;
    });
}
