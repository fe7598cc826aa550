//! Marks between sessions: what is found, and what removing and redefining do.

use highwater_hypervisor::{Driver as _, ErrorKind, MarkOrder, Redefinition};
use highwater_testkit::{DiskSpec, MIB, Vm};

use crate::reading::{dirty_ranges, mark_name};
use crate::rig::Rig;

fn start(rig: &Rig) -> Vm {
    rig.lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB))
        .disk(DiskSpec::qcow2("vdb", 16 * MIB))
        .start()
        .unwrap()
}

fn assert_no_marks(vm: &Vm) {
    assert!(vm.checkpoints().unwrap().is_empty());
    for disk in ["vda", "vdb"] {
        assert!(vm.bitmaps(disk).unwrap().is_empty(), "{disk}");
    }
}

#[test]
fn a_mark_is_reported_with_its_nonce_and_removed_from_all_disks() {
    let mut rig = Rig::start();
    let vm = start(&rig);
    let mark = rig.leave_mark(&vm, &["vda", "vdb"]);
    let facts = rig.observe(&vm);
    let record = &facts.checkpoints[0];
    assert_eq!(record.mark.as_ref(), Some(&mark.name));
    assert_eq!(record.nonce, Some(mark.nonce));
    assert_eq!(record.disks, ["vda", "vdb"]);
    assert!(record.created_s.is_some());
    for disk in ["vda", "vdb"] {
        let bitmap = rig.bitmap(&vm, disk, &mark.name).unwrap();
        assert!(bitmap.recording && bitmap.persistent && !bitmap.busy && !bitmap.inconsistent);
        assert_eq!((bitmap.granularity, bitmap.dirty_bytes), (65_536, 0));
    }
    rig.remove(&vm, &mark.name);
    assert_no_marks(&vm);
    rig.remove(&vm, &mark.name);
}

#[test]
fn a_bitmap_that_qemu_never_stored_is_missing_after_its_death_and_its_mark_is_removed() {
    let mut rig = Rig::start();
    let vm = start(&rig);
    let mark = rig.leave_mark(&vm, &["vda", "vdb"]).name;
    vm.kill_qemu().unwrap();
    vm.start().unwrap();
    assert_eq!(rig.bitmap(&vm, "vda", &mark), None);
    assert_eq!(rig.observe(&vm).checkpoints.len(), 1);
    rig.remove(&vm, &mark);
    assert_no_marks(&vm);
}

#[test]
fn a_mark_that_is_broken_on_one_disk_is_removed_from_the_others_too() {
    let mut rig = Rig::start();
    let vm = start(&rig);
    let mark = rig.leave_mark(&vm, &["vda", "vdb"]).name;
    let node = rig.observe(&vm).disks[0].chain[0].node.clone().unwrap();
    vm.monitor(&serde_json::json!({"execute": "block-dirty-bitmap-remove",
        "arguments": {"node": node, "name": mark.to_string()}}))
        .unwrap();
    rig.remove(&vm, &mark);
    assert_no_marks(&vm);
}

#[test]
fn a_mark_that_libvirt_forgot_is_redefined_and_gives_an_exact_increment() {
    let mut rig = Rig::start();
    let vm = start(&rig);
    let mark = rig.leave_mark(&vm, &["vda", "vdb"]);
    vm.write("vda", "write -P 1 3M 64k").unwrap();
    let created_s = rig.observe(&vm).checkpoints[0].created_s.unwrap();
    rig.lab
        .virsh(&[
            "checkpoint-delete",
            "web01",
            &mark.name.to_string(),
            "--metadata",
        ])
        .unwrap();

    let order = rig.order(&vm, &[("vda", Some(&mark.name))]);
    assert_eq!(
        rig.driver.begin(&order).unwrap_err().kind,
        ErrorKind::UnknownMark
    );
    let redefinition = Redefinition {
        name: mark.name.clone(),
        nonce: mark.nonce,
        created_s,
        disks: mark.disks.clone(),
    };
    rig.driver
        .mark(&order.vm, &MarkOrder::Redefine(redefinition))
        .unwrap();
    let record = rig.observe(&vm).checkpoints.remove(0);
    assert_eq!(
        (record.nonce, record.created_s),
        (Some(mark.nonce), Some(created_s))
    );
    let begun = rig.driver.begin(&order).unwrap();
    assert_eq!(dirty_ranges(&begun.exports[0]), [(3 * MIB, 64 << 10)]);
    rig.driver.end(&order).unwrap();
    rig.remove(&vm, &order.new_mark.unwrap().name);
    rig.remove(&vm, &mark.name);
    assert_no_marks(&vm);
}

#[test]
fn a_mark_without_a_bitmap_is_not_redefined() {
    let mut rig = Rig::start();
    let vm = start(&rig);
    let find = rig.find(&vm);
    let mut redefinition = Redefinition {
        name: mark_name(),
        nonce: highwater_model::Nonce::random(),
        created_s: 1_795_259_190,
        disks: vec!["vda".into()],
    };
    let error = rig
        .driver
        .mark(&find, &MarkOrder::Redefine(redefinition.clone()))
        .unwrap_err();
    assert_eq!(error.kind, ErrorKind::BadMark);
    redefinition.disks.clear();
    rig.driver
        .mark(&find, &MarkOrder::Redefine(redefinition))
        .unwrap_err();
    assert_no_marks(&vm);
}

#[test]
fn a_bitmap_without_a_record_is_removed_in_backing_files_too() {
    let mut rig = Rig::start();
    let vm = start(&rig);
    let mark = rig.leave_mark(&vm, &["vda", "vdb"]).name;
    // The bitmap of vda is now in a backing file and in the overlay.
    rig.lab
        .virsh(&[
            "snapshot-create-as",
            "web01",
            "snap",
            "--disk-only",
            "--no-metadata",
        ])
        .unwrap();
    rig.lab
        .virsh(&[
            "checkpoint-delete",
            "web01",
            &mark.to_string(),
            "--metadata",
        ])
        .unwrap();
    let facts = rig.observe(&vm);
    assert_eq!(facts.disks[0].chain.len(), 2);
    assert_eq!(
        facts.disks[0].bitmaps.len(),
        2,
        "{:?}",
        facts.disks[0].bitmaps
    );
    rig.remove(&vm, &mark);
    for disk in &rig.observe(&vm).disks {
        assert_eq!(disk.bitmaps, []);
    }
}

#[test]
fn marks_of_others_are_never_touched() {
    let mut rig = Rig::start();
    let vm = start(&rig);
    let xml = rig.lab.path("checkpoint.xml");
    std::fs::write(
        &xml,
        "<domaincheckpoint><name>theirs</name></domaincheckpoint>",
    )
    .unwrap();
    rig.lab
        .virsh(&["checkpoint-create", "web01", xml.to_str().unwrap()])
        .unwrap();
    let mark = rig.leave_mark(&vm, &["vda"]).name;
    rig.remove(&vm, &mark);
    assert_eq!(vm.checkpoints().unwrap(), ["theirs"]);
    assert_eq!(vm.bitmaps("vda").unwrap().len(), 1);
    assert_eq!(rig.observe(&vm).checkpoints[0].mark, None);
}
