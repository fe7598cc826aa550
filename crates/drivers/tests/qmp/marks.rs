//! Marks are bitmaps and nothing else.

use highwater_hypervisor::{Driver as _, ErrorKind, MarkOrder};
use highwater_testkit::{BareLab, BareVm, DiskSpec, MIB, tool};
use serde_json::json;

use crate::rig::{add_bitmap, disk, driver, mark, node, observe};

fn two_disks(lab: &BareLab) -> BareVm {
    lab.vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB))
        .disk(DiskSpec::qcow2("vdb", 16 * MIB))
        .prelaunch()
        .start()
        .unwrap()
}

fn names(vm: &BareVm, disk: &str) -> Vec<String> {
    let found = vm.bitmaps(disk).unwrap();
    let mut names: Vec<String> = found.into_iter().map(|bitmap| bitmap.name).collect();
    names.sort();
    names
}

#[test]
fn a_mark_is_removed_from_all_disks_and_nothing_else_is() {
    let lab = BareLab::start().unwrap();
    let vm = two_disks(&lab);
    let mut own = driver(&vm);
    let facts = observe(&mut own);
    let (old, new) = (mark(1), mark(2));
    for disk in ["virtio0", "virtio1"] {
        let node = node(&facts, disk);
        for name in [old.to_string(), new.to_string(), "foreign".to_owned()] {
            add_bitmap(&vm, &node, &name);
        }
    }
    for _ in 0..2 {
        own.mark(&facts.vm, &MarkOrder::Remove(old.clone()))
            .unwrap();
        for disk in ["vda", "vdb"] {
            assert_eq!(names(&vm, disk), ["foreign".to_owned(), new.to_string()]);
        }
    }
    let nodes = vec![node(&facts, "virtio1"), "gone".to_owned()];
    let order = MarkOrder::Distrust {
        name: new.clone(),
        nodes,
    };
    own.mark(&facts.vm, &order).unwrap();
    assert_eq!(names(&vm, "vda"), ["foreign".to_owned(), new.to_string()]);
    assert_eq!(names(&vm, "vdb"), ["foreign"]);
}

#[test]
fn a_mark_that_is_in_use_is_busy_and_stays() {
    let lab = BareLab::start().unwrap();
    let vm = two_disks(&lab);
    let mut own = driver(&vm);
    let facts = observe(&mut own);
    let (name, on) = (mark(1), node(&facts, "virtio0"));
    add_bitmap(&vm, &on, &name.to_string());
    vm.write("vda", "write -P 1 0 8M").unwrap();
    let sink = json!({"driver": "null-co", "node-name": "sink", "size": 16 * MIB});
    vm.qmp("blockdev-add", &sink).unwrap();
    let job = json!({"job-id": "theirs", "device": on, "target": "sink", "speed": 1,
        "sync": "incremental", "bitmap": name.to_string()});
    vm.qmp("blockdev-backup", &job).unwrap();
    let facts = observe(&mut own);
    assert!(disk(&facts, "virtio0").bitmaps[0].busy);
    let error = own.mark(&facts.vm, &MarkOrder::Remove(name.clone()));
    assert_eq!(error.unwrap_err().kind, ErrorKind::Busy);
    let cancel = json!({"device": "theirs", "force": true});
    vm.qmp("block-job-cancel", &cancel).unwrap();
    while observe(&mut own).job.is_some() {}
    own.mark(&facts.vm, &MarkOrder::Remove(name)).unwrap();
}

#[test]
fn a_mark_in_a_backing_file_is_told_with_the_command_that_removes_it() {
    let lab = BareLab::start().unwrap();
    let (base, name) = (lab.path("base.qcow2"), mark(1));
    let create = tool("qemu-img").args(["create", "-q", "-f", "qcow2"]);
    create.arg(&base).arg("16M").run().unwrap();
    let add = tool("qemu-img").args(["bitmap", "--add"]).arg(&base);
    add.arg(name.to_string()).run().unwrap();
    let spec = DiskSpec::qcow2("vda", 16 * MIB).backing(&base, "qcow2");
    let vm = lab.vm("web01").disk(spec).prelaunch().start().unwrap();
    let mut own = driver(&vm);
    let facts = observe(&mut own);
    assert_eq!(disk(&facts, "virtio0").chain.len(), 2);
    assert_eq!(disk(&facts, "virtio0").bitmaps.len(), 1);
    let error = own.mark(&facts.vm, &MarkOrder::Remove(name)).unwrap_err();
    assert!(error.hint.unwrap().contains("qemu-img bitmap --remove"));
}

#[test]
fn marks_of_a_vm_that_was_not_resumed_are_left_alone() {
    let lab = BareLab::start().unwrap();
    let vm = lab.vm("web01").incoming().start().unwrap();
    let mut own = driver(&vm);
    let name = own.find("web01").unwrap();
    let error = own.mark(&name, &MarkOrder::Remove(mark(1))).unwrap_err();
    assert_eq!(error.kind, ErrorKind::WrongState);
}
