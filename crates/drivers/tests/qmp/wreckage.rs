//! What a killed qmpbackup leaves, made as qmpbackup makes it.

use highwater_hypervisor::{Driver as _, Foreign, Wreckage};
use highwater_testkit::{Attach, BareLab, BareVm, DiskSpec, MIB, tool};
use serde_json::{Value, json};

use crate::rig::{add_bitmap, disk, driver, node, observe};

const UUID: &str = "9d3a6a3e-1111-2222-3333-444444444444";

fn run(vm: &BareVm, command: &str, arguments: &Value) {
    vm.qmp(command, arguments).unwrap();
}

/// Makes what is there while its job runs.
fn wreck(lab: &BareLab, vm: &BareVm, target: &str) -> (std::path::PathBuf, std::path::PathBuf) {
    let facts = observe(&mut driver(vm));
    let node = node(&facts, target);
    let beside = lab.path("FULL-1706260646-disk1.fleece.qcow2");
    let partial = lab.path("FULL-1706260646-disk1.qcow2.partial");
    for image in [&beside, &partial] {
        let create = tool("qemu-img").args(["create", "-q", "-f", "qcow2"]);
        create.arg(image).arg("16M").run().unwrap();
    }
    let image = |name: &str, path: &std::path::Path| json!({"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": path}});
    run(vm, "blockdev-add", &image("qmpbackup-disk1", &partial));
    run(
        vm,
        "blockdev-add",
        &image("qmpbackup-disk1-fleece", &beside),
    );
    let filter = json!({"driver": "copy-before-write", "node-name": "qmpbackup-disk1-cbw",
        "file": node, "target": "qmpbackup-disk1-fleece", "on-cbw-error": "break-snapshot",
        "cbw-timeout": 45});
    run(vm, "blockdev-add", &filter);
    let device = disk(&facts, target).device.clone().unwrap();
    let path = if device.starts_with('/') {
        device
    } else {
        format!("/machine/peripheral/{device}")
    };
    let set = json!({"path": path, "property": "drive", "value": "qmpbackup-disk1-cbw"});
    run(vm, "qom-set", &set);
    let access = json!({"driver": "snapshot-access", "file": "qmpbackup-disk1-cbw",
        "node-name": "qmpbackup-disk1-snap"});
    run(vm, "blockdev-add", &access);
    add_bitmap(vm, &node, &format!("qmpbackup-{UUID}"));
    add_bitmap(vm, &node, "foreign");
    let job = json!({"job-id": "qmpbackup.virtio0.disk1", "device": "qmpbackup-disk1-snap",
        "target": "qmpbackup-disk1", "sync": "full", "speed": 1});
    run(vm, "blockdev-backup", &job);
    (beside, partial)
}

fn kinds(wreckage: &Wreckage) -> Vec<&str> {
    wreckage
        .wrecks
        .iter()
        .map(|wreck| wreck.kind.as_str())
        .collect()
}

#[test]
fn a_killed_qmpbackup_is_cleared_away_and_nothing_else_is() {
    let lab = BareLab::start().unwrap();
    let vm = lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB))
        .start()
        .unwrap();
    vm.write("vda", "write -P 7 0 8M").unwrap();
    let before = vm.graph().unwrap().without_bitmaps();
    let (beside, partial) = wreck(&lab, &vm, "virtio0");
    let mut own = driver(&vm);
    let name = own.find("web01").unwrap();

    let found = own.wreckage(&name, Foreign::Qmpbackup).unwrap();
    assert_eq!(found.in_use, None);
    assert_eq!(
        kinds(&found),
        [
            "job", "node", "filter", "node", "node", "file", "file", "bitmap"
        ]
    );
    let harmless: Vec<_> = found.wrecks.iter().filter(|it| !it.harms).collect();
    assert_eq!(harmless.len(), 1);
    assert_eq!(harmless[0].kind, "bitmap");

    let cleared = own.clear_wreckage(&name, Foreign::Qmpbackup).unwrap();
    assert_eq!(cleared.warnings, [""; 0]);
    assert_eq!(cleared.wrecks, found.wrecks);
    assert_eq!(vm.graph().unwrap().without_bitmaps(), before);
    assert!(!beside.exists() && !partial.exists());
    let left: Vec<_> = vm
        .bitmaps("vda")
        .unwrap()
        .into_iter()
        .map(|it| it.name)
        .collect();
    assert_eq!(left, ["foreign"]);
    // The guest writes to its own image again.
    vm.write("vda", "write -P 9 1M 64k").unwrap();
    assert_eq!(vm.bitmaps("vda").unwrap().len(), 1);
    let again = own.clear_wreckage(&name, Foreign::Qmpbackup).unwrap();
    assert_eq!(again, Wreckage::default());
}

#[test]
fn a_throttle_that_qmpbackup_left_out_is_put_back() {
    let lab = BareLab::start().unwrap();
    let vm = lab
        .vm("web01")
        .disk_as(
            DiskSpec::qcow2("vda", 16 * MIB),
            Attach::blockdev("virtio-blk-pci").throttled(),
        )
        .start()
        .unwrap();
    let before = vm.graph().unwrap().without_bitmaps();
    let target = observe(&mut driver(&vm)).disks[0].target.clone();
    wreck(&lab, &vm, &target);
    let mut own = driver(&vm);
    let name = own.find("web01").unwrap();
    let cleared = own.clear_wreckage(&name, Foreign::Qmpbackup).unwrap();
    assert_eq!(cleared.warnings, [""; 0]);
    assert_eq!(vm.graph().unwrap().without_bitmaps(), before);
}

#[test]
fn a_fleece_whose_qemu_is_gone_is_removed_unless_another_one_has_it_open() {
    let lab = BareLab::start().unwrap();
    let vm = lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB))
        .start()
        .unwrap();
    let (beside, partial) = wreck(&lab, &vm, "virtio0");
    vm.kill().unwrap();
    vm.start().unwrap();
    let mut own = driver(&vm);
    let name = own.find("web01").unwrap();
    let held = std::fs::File::open(&beside).unwrap();
    let found = own.wreckage(&name, Foreign::Qmpbackup).unwrap();
    assert_eq!(kinds(&found), [""; 0]);
    drop(held);
    let cleared = own.clear_wreckage(&name, Foreign::Qmpbackup).unwrap();
    assert_eq!(kinds(&cleared), ["file"]);
    assert!(!beside.exists());
    // What somebody may want to look at stays.
    assert!(partial.exists());
}

/// What a living one looks like to others: an interpreter that runs it.
struct Living(std::process::Child);

impl Living {
    fn start(lab: &BareLab, socket: &std::path::Path) -> Self {
        let program = lab.path("qmpbackup");
        std::fs::write(&program, "read forever\n").unwrap();
        let mut command = std::process::Command::new("sh");
        command.arg(program).arg("--socket").arg(socket);
        command.stdin(std::process::Stdio::piped());
        Self(command.spawn().unwrap())
    }
}

impl Drop for Living {
    fn drop(&mut self) {
        // Its input ends, and so does it.
        drop(self.0.stdin.take());
        let _ended = self.0.wait();
    }
}

#[test]
fn a_qmpbackup_that_is_at_work_on_this_vm_is_left_alone() {
    let lab = BareLab::start().unwrap();
    let start = |name: &str| lab.vm(name).disk(DiskSpec::qcow2("vda", 16 * MIB)).start();
    let (vm, other) = (start("web01").unwrap(), start("web02").unwrap());
    vm.write("vda", "write -P 7 0 8M").unwrap();
    wreck(&lab, &vm, "virtio0");
    let living = Living::start(&lab, &vm.second_socket());
    let mut own = driver(&vm);
    let name = own.find("web01").unwrap();
    let before = vm.graph().unwrap();
    let cleared = own.clear_wreckage(&name, Foreign::Qmpbackup).unwrap();
    assert!(cleared.in_use.is_some_and(|why| why.contains("is running")));
    assert_eq!(cleared.wrecks, []);
    assert_eq!(vm.graph().unwrap(), before);
    let mut elsewhere = driver(&other);
    let name = elsewhere.find("web02").unwrap();
    assert_eq!(
        elsewhere
            .wreckage(&name, Foreign::Qmpbackup)
            .unwrap()
            .in_use,
        None
    );
    drop(living);
    let name = own.find("web01").unwrap();
    assert_eq!(
        own.clear_wreckage(&name, Foreign::Qmpbackup)
            .unwrap()
            .in_use,
        None
    );
}
