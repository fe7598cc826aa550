//! The decision as a table: each fact that speaks against an increment.

use highwater_model::DATA_FILE_FORMAT;

use super::*;
use crate::rows::view::{self, disk, parent};
use crate::{ImageLink, Place};

fn link(name: &str, inode: u64) -> ImageLink {
    ImageLink {
        inode: Some((1, inode)),
        ..view::link(name, "qcow2")
    }
}

fn tell(plan: &DiskPlan) -> String {
    match plan {
        DiskPlan::Incremental {
            tail_from, audit, ..
        } => format!("incremental {tail_from:?}{}", tell_audit(*audit)),
        DiskPlan::Differential {
            tail_from, audit, ..
        } => format!("differential {tail_from:?}{}", tell_audit(*audit)),
        DiskPlan::Full(why) => format!("full {}", why.map_or("asked", Why::word)),
        DiskPlan::Rescan(why) => format!("rescan {}", why.word()),
        DiskPlan::Copy => "copy".to_owned(),
        DiskPlan::Refuse(refusal) => format!("refuse {refusal:?}"),
    }
}

fn tell_audit(duty: AuditDuty) -> String {
    match duty {
        AuditDuty::Sampled => String::new(),
        AuditDuty::Mandatory(why) => format!(" audited: {}", why.word()),
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
        |disk, _| disk.record = Record::Unidentified,
        "rescan process-unknown",
    );
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
        |disk, _| disk.marks = MarkSupport::No(Unfit::NotQcow2),
        "rescan no-marks-on-raw",
    );
    check(
        |disk, _| disk.marks = MarkSupport::No(Unfit::Qcow2Version2),
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
        "incremental None audited: image-replaced",
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
        marks: MarkSupport::No(Unfit::NotQcow2),
        ..disk()
    };
    assert_eq!(
        tell(&plan_disk(Level::Auto, History::ThisDisk, &raw, None)),
        "rescan no-marks-on-raw"
    );
}

#[test]
fn a_mark_that_only_a_process_holds_is_good_as_long_as_that_process_lives() {
    for (unfit, gone) in [
        (Unfit::NotQcow2, "rescan no-marks-on-raw"),
        (Unfit::Qcow2Version2, "rescan no-marks-on-qcow2-v2"),
    ] {
        let marks = MarkSupport::WhileRunning(unfit);
        check(|disk, _| disk.marks = marks, "incremental None");
        let lost = |change: fn(&mut DiskView), expected| {
            let apply = |disk: &mut DiskView, _: &mut ParentView| {
                disk.marks = marks;
                change(disk);
            };
            check(apply, expected);
        };
        lost(|disk| disk.bitmap = BitmapView::Missing, gone);
        lost(|disk| disk.record = Record::Remade, "rescan mark-remade");
        lost(
            |disk| disk.record = Record::Unidentified,
            "rescan process-unknown",
        );
    }
}

#[test]
fn where_only_images_are_seen_they_say_which_disk_it_is() {
    let other_device = |identity: &mut Identity| {
        identity.serial = Some("other".to_owned());
        identity.device = None;
    };
    check(
        |disk, _| other_device(&mut disk.identity),
        "full disk-swapped",
    );
    let unseen_now = |disk: &mut DiskView, _: &mut ParentView| {
        other_device(&mut disk.identity);
        disk.identity.device_unknown = true;
    };
    check(unseen_now, "incremental None");
    let unseen_then = |disk: &mut DiskView, parent: &mut ParentView| {
        other_device(&mut disk.identity);
        parent.identity.device_unknown = true;
    };
    check(unseen_then, "incremental None");
    let another_image = |disk: &mut DiskView, _: &mut ParentView| {
        disk.identity.device_unknown = true;
        disk.identity.chain = vec![view::link("/b.qcow2", "qcow2")];
    };
    check(another_image, "full chain-changed");
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

#[test]
fn a_moved_image_is_believed_only_after_an_audit() {
    let moved = "incremental None audited: image-replaced";
    check(|disk, _| disk.identity.chain[0].inode = Some((2, 7)), moved);
    check(|_, parent| parent.identity.chain[0].inode = None, moved);
    // A backing file whose times are those of then, on a device that has
    // another number since the host was booted.
    check(
        |disk, parent| {
            disk.identity.chain.push(link("/base.qcow2", 9));
            parent.identity = disk.identity.clone();
            disk.identity.chain[1].inode = Some((2, 9));
        },
        moved,
    );
    check(
        |disk, parent| {
            disk.identity.chain.push(link("/base.qcow2", 9));
            parent.identity = disk.identity.clone();
            disk.identity.chain[1].inode = Some((2, 9));
            disk.identity.chain[1].stamp = Some((100, 5, 6));
        },
        "rescan backing-changed",
    );
}

#[test]
fn writes_that_were_counted_and_are_in_no_bitmap_prove_that_it_lied() {
    let since = |bytes, dirty_bytes| Some(WritesSince { bytes, dirty_bytes });
    check(|disk, _| disk.writes = since(4096, 0), "rescan bitmap-lied");
    check(|disk, _| disk.writes = since(0, 0), "incremental None");
    check(
        |disk, _| disk.writes = since(1 << 40, 65_536),
        "incremental None",
    );
}

#[test]
fn counters_say_nothing_about_another_process_or_a_new_device() {
    let counted = |process: u32, bytes, operations| Counted {
        process,
        bytes,
        operations,
    };
    let then = counted(1, 1000, 10);
    let between = |now| WritesSince::between(&then, &now, 0).map(|since| since.bytes);
    assert_eq!(between(counted(1, 1512, 11)), Some(512));
    assert_eq!(between(counted(1, 1000, 10)), Some(0));
    assert_eq!(between(counted(2, 9999, 99)), None);
    assert_eq!(between(counted(1, 9999, 9)), None);
    assert_eq!(between(counted(1, 999, 11)), None);
}

#[test]
fn a_mark_that_was_found_lying_is_never_believed_again() {
    check(|_, parent| parent.mark_lied = true, "rescan bitmap-lied");
}
