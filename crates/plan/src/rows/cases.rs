//! Each row as a pure decision.

use highwater_model::SessionId;

use super::view::{
    OURS, THEIRS, committed, disk, found, full, incremental, link, mark, needs, parent, plan,
    plan_untracked, refused, rescan,
};
use crate::{
    AuditDuty, AuditView, BitmapView, DiskPlan, History, HotChunk, JobView, Level, MarkSupport,
    Place, Record, Refusal, RootView, Unfit, VmGate, VmState, Why, WritesSince, choose_audit, gate,
    plan_disk, superseded_marks, unfinished_marks,
};

macro_rules! pure {
    ($($name:ident: $found:literal => $done:literal;)+) => {
        mod row {
            $(#[test]
            fn $name() {
                super::$name();
            })+
        }
    };
}
crate::with_rows!(pure);

fn all_is_well() {
    assert_eq!(plan(|_, _| {}), incremental());
}

fn first_backup() {
    let plan = plan_untracked(History::Nothing, MarkSupport::Yes);
    assert_eq!(plan, full(Why::FirstBackup));
}

fn new_disk() {
    let plan = plan_untracked(History::OtherDisks, MarkSupport::Yes);
    assert_eq!(plan, full(Why::NewDisk));
}

/// What is gone is not planned; it only holds no mark any more.
fn disk_gone() {
    let (old, new) = (mark(OURS, 1), mark(OURS, 2));
    let only_vda = needs(&[&new]);
    assert_eq!(
        superseded_marks(OURS, &found(&[&old, &new]), &only_vda),
        [old]
    );
}

fn bitmap(view: BitmapView, why: Why) {
    assert_eq!(plan(|disk, _| disk.bitmap = view), rescan(why));
    // Whatever libvirt says of the mark.
    for record in [
        Record::Remade,
        Record::Unidentified,
        Record::Forgotten,
        Record::Refused,
    ] {
        let plan = plan(|disk, _| {
            disk.bitmap = view;
            disk.record = record;
        });
        assert_eq!(plan, rescan(why));
    }
}

fn qemu_killed_before_its_bitmap_was_stored() {
    bitmap(BitmapView::Missing, Why::BitmapMissing);
}

fn qemu_killed_after_its_bitmap_was_stored() {
    bitmap(BitmapView::Inconsistent, Why::BitmapInconsistent);
}

fn bitmap_removed_while_the_vm_runs() {
    bitmap(BitmapView::Missing, Why::BitmapMissing);
}

fn bitmap_removed_while_the_vm_is_off() {
    bitmap(BitmapView::Missing, Why::BitmapMissing);
}

fn bitmap_disabled() {
    bitmap(BitmapView::NotRecording, Why::BitmapNotRecording);
}

fn bitmap_remade_only_in_memory() {
    bitmap(BitmapView::NotPersistent, Why::BitmapNotPersistent);
}

fn bitmap_remade_with_other_granularity() {
    let plan = plan(|disk, _| disk.bitmap = BitmapView::Recording { granularity: 4096 });
    assert_eq!(plan, rescan(Why::BitmapGranularity));
}

/// A bitmap that lies looks like one that does not. Only counted writes that
/// are in none of it give it away before anything is read; and once it was
/// found out, nobody believes it.
fn lies() {
    let writes =
        |bytes, dirty_bytes| plan(|disk, _| disk.writes = Some(WritesSince { bytes, dirty_bytes }));
    assert_eq!(writes(4096, 0), rescan(Why::BitmapLied));
    assert_eq!(writes(4096, 65_536), incremental());
    assert_eq!(writes(0, 0), incremental());
    let found_out = plan(|_, parent| parent.mark_lied = true);
    assert_eq!(found_out, rescan(Why::BitmapLied));
    assert_eq!(plan(|_, _| {}).audit(), Some(AuditDuty::Sampled));
}

fn bitmap_remade_over_qmp() {
    lies();
}

fn data_file_written_around_qemu() {
    lies();
}

/// Each disk is planned from its own facts alone.
fn bitmaps_gone_on_some_disks() {
    assert_eq!(plan(|_, _| {}), incremental());
    bitmap(BitmapView::Missing, Why::BitmapMissing);
}

fn bitmap_in_use() {
    let busy = plan(|disk, _| disk.bitmap = BitmapView::Busy);
    assert_eq!(busy, refused(Refusal::BitmapBusy));
}

fn mark_remade_by_libvirt() {
    let plan = plan(|disk, _| disk.record = Record::Remade);
    assert_eq!(plan, rescan(Why::MarkRemade));
}

/// The engine takes the mark for re-made where this says that it is not the
/// original.
fn bitmap_remade_after_a_crash() {
    let process = |pid| (pid, 7, "boot".to_owned());
    let (made_by, held_by) = (process(1), process(2));
    let found = crate::origin(Some(&made_by), Some(&held_by), false);
    assert_eq!(found, crate::Origin::Another);
    mark_remade_by_libvirt();
}

fn process_unknown() {
    let process = (1, 7, "boot".to_owned());
    for (made_by, held_by) in [(Some(&process), None), (None, Some(&process)), (None, None)] {
        let found = crate::origin(made_by, held_by, false);
        assert_eq!(found, crate::Origin::Unknown);
    }
    let plan = plan(|disk, _| disk.record = Record::Unidentified);
    assert_eq!(plan, rescan(Why::ProcessUnknown));
}

/// Told again, it is proven; only as long as it is not, nothing is believed.
fn forgotten() {
    let untold = plan(|disk, _| disk.record = Record::Forgotten);
    assert_eq!(untold, rescan(Why::MarkRefused));
    assert_eq!(plan(|disk, _| disk.record = Record::Proven), incremental());
}

fn undefined_and_defined() {
    forgotten();
}

fn transient_started_again() {
    forgotten();
}

fn checkpoint_forgotten_while_the_vm_runs() {
    forgotten();
}

fn checkpoint_refused() {
    let plan = plan(|disk, _| disk.record = Record::Refused);
    assert_eq!(plan, rescan(Why::MarkRefused));
}

fn died_before_commit() {
    let (old, died) = (mark(OURS, 1), mark(OURS, 2));
    let found = found(&[&old, &died]);
    assert_eq!(
        unfinished_marks(OURS, &found, &committed(&[&old])),
        std::slice::from_ref(&died)
    );
    // The older one is still what the disk needs.
    assert_eq!(superseded_marks(OURS, &found, &needs(&[&old])), [died]);
    assert_eq!(plan(|_, _| {}), incremental());
}

fn died_before_settling() {
    let (old, new) = (mark(OURS, 1), mark(OURS, 2));
    let found = found(&[&old, &new]);
    assert!(unfinished_marks(OURS, &found, &committed(&[&old, &new])).is_empty());
    assert_eq!(superseded_marks(OURS, &found, &needs(&[&new])), [old]);
}

fn partial_runs() {
    let marks = [mark(OURS, 1), mark(OURS, 2), mark(OURS, 3)];
    let [first, second, third] = &marks;
    let found = found(&[first, second, third]);
    let none = superseded_marks(OURS, &found, &needs(&[third, first, second]));
    assert!(none.is_empty(), "{none:?}");
    let given_up = superseded_marks(OURS, &found, &needs(&[third, second, second]));
    assert_eq!(given_up, std::slice::from_ref(first));
    let given_up = superseded_marks(OURS, &found, &needs(&[third, third, third]));
    assert_eq!(given_up, [first.clone(), second.clone()]);
}

/// A disk that failed is not in the manifest, so its parent is the older one.
fn failed_disk() {
    let (old, new) = (mark(OURS, 1), mark(OURS, 2));
    let found = found(&[&old, &new]);
    assert!(superseded_marks(OURS, &found, &needs(&[&new, &old])).is_empty());
    assert_eq!(plan(|_, _| {}), incremental());
}

fn copies_only() {
    let plan = plan_untracked(History::ThisDisk, MarkSupport::Yes);
    assert_eq!(plan, rescan(Why::NoMarkYet));
}

fn parent_unreadable() {
    let damaged = plan(|_, parent| parent.tree_is_readable = false);
    assert_eq!(damaged, rescan(Why::ParentDamaged));
    let other = plan(|_, parent| parent.same_chunk_size = false);
    assert_eq!(other, rescan(Why::ChunkSizeDiffers));
}

/// Whatever QEMU did with the image: what counts is what is found.
fn managed_save() {
    all_is_well();
}

fn internal_snapshot() {
    all_is_well();
}

fn chain_changed(chain: &[&str]) {
    let changed = plan(|disk, _| {
        disk.identity.chain = chain.iter().map(|name| link(name, "qcow2")).collect();
    });
    assert_eq!(changed, full(Why::ChainChanged));
}

/// A perfect bitmap proves nothing about another chain.
fn external_snapshot() {
    chain_changed(&["/overlay.qcow2", "/a.qcow2"]);
}

fn external_snapshot_of_one_disk() {
    external_snapshot();
    all_is_well();
}

fn snapshot_and_commit() {
    external_snapshot();
    let merged = plan(|_, parent| {
        parent
            .identity
            .chain
            .insert(0, link("/overlay.qcow2", "qcow2"));
    });
    assert_eq!(merged, full(Why::ChainChanged));
}

fn snapshot_and_commit_between_backups() {
    all_is_well();
}

fn block_copy_to_qcow2() {
    chain_changed(&["/copy.qcow2"]);
}

fn block_copy_to_raw() {
    let copied = plan(|disk, _| {
        disk.identity.chain = vec![link("/copy.raw", "raw")];
        disk.marks = MarkSupport::No(Unfit::NotQcow2);
    });
    assert_eq!(copied, full(Why::ChainChanged));
    // A copy to the same name would be no better.
    let copied = plan(|disk, _| disk.identity.chain = vec![link("/a.qcow2", "raw")]);
    assert_eq!(copied, full(Why::ChainChanged));
    let afterwards = plan_untracked(History::ThisDisk, MarkSupport::No(Unfit::NotQcow2));
    assert_eq!(afterwards, rescan(Why::NoMarksOnRaw));
}

fn overlay_by_qemu_img() {
    chain_changed(&["/overlay.qcow2", "/a.qcow2"]);
    // The overlay under the old name, the old image under another.
    chain_changed(&["/a.qcow2", "/base.qcow2"]);
}

fn overlay_committed_by_qemu_img() {
    all_is_well();
}

fn snapshot_behind_libvirt() {
    for (root, refusal) in [
        (RootView::Differs, Refusal::GraphChanged),
        (RootView::Unknown, Refusal::GraphUnknown),
    ] {
        assert_eq!(plan(|disk, _| disk.root = root), refused(refusal));
        // A backup of any level would read the wrong image.
        for level in [
            Level::Full,
            Level::Incremental,
            Level::Differential,
            Level::Copy,
        ] {
            let mut disk = disk();
            disk.root = root;
            let plan = plan_disk(level, History::ThisDisk, &disk, Some(&parent()));
            assert_eq!(plan, refused(refusal));
        }
    }
}

/// All that QEMU would keep with the image came along with it.
fn image_moved() {
    let moved = plan(|disk, _| disk.identity.chain[0].inode = Some((1, 8)));
    let must = Some(AuditDuty::Mandatory(Why::ImageReplaced));
    assert_eq!(moved.audit(), must);
    assert_eq!(plan(|_, _| {}).audit(), Some(AuditDuty::Sampled));
}

fn older_copy_moved_into_place() {
    image_moved();
    let without_the_mark = plan(|disk, _| {
        disk.identity.chain[0].inode = Some((1, 8));
        disk.bitmap = BitmapView::Missing;
    });
    assert_eq!(without_the_mark, rescan(Why::BitmapMissing));
}

fn older_data_file() {
    for place in [0, 1] {
        let other = plan(|disk, parent| {
            let data = link("/a.data", highwater_model::DATA_FILE_FORMAT);
            parent.identity.chain.push(data.clone());
            disk.identity.chain.push(data);
            disk.identity.chain[place].inode = Some((1, 8));
        });
        assert_eq!(other, rescan(Why::ImageReplaced));
    }
}

fn older_copy_written_into_place() {
    bitmap(BitmapView::Missing, Why::BitmapMissing);
}

fn older_copy_with_its_mark_in_place() {
    all_is_well();
}

fn below(change: impl FnOnce(&mut crate::ImageLink)) -> DiskPlan {
    plan(|disk, parent| {
        let base = link("/base.qcow2", "qcow2");
        parent.identity.chain.push(base.clone());
        disk.identity.chain.push(base);
        change(&mut disk.identity.chain[1]);
    })
}

fn backing_file_changed() {
    assert_eq!(below(|_| {}), incremental());
    for stamp in [(101, 5, 5), (100, 6, 5), (100, 5, 6)] {
        let changed = below(|base| base.stamp = Some(stamp));
        assert_eq!(changed, rescan(Why::BackingChanged));
    }
}

fn backing_file_unseen() {
    let unseen = plan(|disk, parent| {
        let mut base = link("nbd://there", "raw");
        (base.inode, base.stamp) = (None, None);
        parent.identity.chain.push(base.clone());
        disk.identity.chain.push(base);
    });
    assert_eq!(unseen, rescan(Why::BackingUnseen));
}

fn image_unseen() {
    let unseen = |place| {
        plan(|disk, parent| {
            disk.place = place;
            disk.identity.chain[0].inode = None;
            parent.identity.chain[0].inode = None;
        })
    };
    assert_eq!(unseen(Place::Host), rescan(Why::ImageUnseen));
    // Behind a server the mark is believed because of where it lies.
    assert_eq!(unseen(Place::Network), incremental());
}

fn swapped_disks() {
    chain_changed(&["/b.qcow2"]);
}

fn other_serial() {
    let serial = |serial: &str| Some(serial.to_owned());
    let other = plan(|disk, parent| {
        (disk.identity.serial, parent.identity.serial) = (serial("b"), serial("a"));
    });
    assert_eq!(other, full(Why::DiskSwapped));
    let gone = plan(|_, parent| parent.identity.serial = serial("a"));
    assert_eq!(gone, full(Why::DiskSwapped));
    let device = plan(|disk, _| disk.identity.device = Some("virtio-disk1".to_owned()));
    assert_eq!(device, full(Why::DiskSwapped));
}

fn grown() {
    let grown = plan(|disk, _| disk.size_bytes = 130);
    let DiskPlan::Incremental { tail_from, .. } = grown else {
        panic!("{grown:?}")
    };
    assert_eq!(tail_from, Some(100));
}

fn grown_while_running() {
    grown();
}

fn grown_while_off() {
    grown();
}

fn shrunk() {
    assert_eq!(plan(|disk, _| disk.size_bytes = 99), full(Why::DiskShrank));
}

fn raw_and_version_2() {
    for (marks, why) in [
        (MarkSupport::No(Unfit::NotQcow2), Why::NoMarksOnRaw),
        (MarkSupport::No(Unfit::Qcow2Version2), Why::NoMarksOnQcow2V2),
    ] {
        assert_eq!(plan(|disk, _| disk.marks = marks), rescan(why));
        assert_eq!(plan_untracked(History::ThisDisk, marks), rescan(why));
        assert_eq!(
            plan_untracked(History::Nothing, marks),
            full(Why::FirstBackup)
        );
    }
}

/// What QEMU does when a write fails is no matter of the plan.
fn write_errors_reported() {
    all_is_well();
}

fn write_errors_ignored() {
    all_is_well();
}

/// What is not named like a mark of ours never gets here.
fn foreign_marks() {
    for name in ["virtnbdbackup.0", "hw-", "hw-1", "backup-vda"] {
        assert!(name.parse::<highwater_model::MarkName>().is_err(), "{name}");
    }
    all_is_well();
}

fn other_repository() {
    let (ours, theirs) = (mark(OURS, 1), mark(THEIRS, 2));
    let found = found(&[&ours, &theirs]);
    assert!(unfinished_marks(OURS, &found, &committed(&[&ours])).is_empty());
    assert!(superseded_marks(OURS, &found, &needs(&[&ours])).is_empty());
    assert_eq!(superseded_marks(THEIRS, &found, &[]), [theirs]);
}

fn busy() {
    assert_eq!(gate(VmState::Alive, JobView::Foreign), VmGate::Busy);
    assert_eq!(gate(VmState::Alive, JobView::None), VmGate::Open);
}

fn foreign_backup_job() {
    busy();
}

fn foreign_block_job() {
    busy();
}

/// QEMU refuses the second server itself; until then nothing speaks against it.
fn foreign_nbd_server() {
    assert_eq!(gate(VmState::Alive, JobView::None), VmGate::Open);
    died_before_commit();
}

fn dead_session() {
    let session = SessionId::from_bytes([1; 8]);
    for state in [VmState::Alive, VmState::Stuck] {
        assert_eq!(
            gate(state, JobView::Ours(session)),
            VmGate::EndLeftoverFirst(session)
        );
    }
    died_before_commit();
}

/// The plan only says that clean blocks are looked at, and which come first.
fn bitmap_cleared() {
    assert_eq!(plan(|_, _| {}), incremental());
    let hot = [HotChunk { chunk: 9, score: 1 }];
    let view = |duty| AuditView {
        chunks: 100,
        chunk_bytes: 1 << 16,
        hot: &hot,
        mounted: &[0],
        smallest_bytes: u64::MAX,
        mark: "mark",
        duty,
        wish: None,
    };
    for duty in [AuditDuty::Sampled, AuditDuty::Mandatory(Why::ImageReplaced)] {
        assert_eq!(choose_audit(&view(duty)).places, [9, 0]);
    }
}

/// Nothing that can be observed is left of it: the audit has to find it.
fn shrunk_and_grown() {
    assert_eq!(plan(|_, _| {}), incremental());
}

fn writes_in_no_bitmap() {
    let since =
        |bytes, dirty_bytes| plan(|disk, _| disk.writes = Some(WritesSince { bytes, dirty_bytes }));
    assert_eq!(since(512, 0), rescan(Why::BitmapLied));
    assert_eq!(since(512, 65_536), incremental());
    assert_eq!(since(0, 0), incremental());
}

fn lie_found_by_a_differential() {
    let plan = plan(|_, parent| parent.mark_lied = true);
    assert_eq!(plan, rescan(Why::BitmapLied));
}
