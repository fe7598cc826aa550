//! VMs without libvirt.
#![allow(
    clippy::unwrap_used,
    reason = "what a test cannot do fails it, with the error and the line"
)]

use highwater_testkit::{
    Attach, BareLab, DiskSpec, MIB, NumberedWriter, Numbering, Qemu, Workload, compare_images, tool,
};
use serde_json::json;

fn shapes(qemu: Qemu) -> Vec<(DiskSpec, Attach)> {
    // QEMU 7.2 itself dies now and then of the monitor's `qemu-io` on a disk that a
    // thread serves; 10.0 does not.
    let threaded = |attach: Attach| match qemu {
        Qemu::System => attach.iothread(),
        Qemu::V7_2 => attach,
    };
    let disk = |name: &str| DiskSpec::qcow2(name, 16 * MIB);
    let long = "a-node-name-of-31-characters-xx";
    vec![
        (disk("v0"), Attach::drive()),
        (disk("v1"), Attach::drive().id("virtio1")),
        (
            disk("v2"),
            threaded(Attach::drive_and_device("virtio-blk-pci")),
        ),
        (disk("v3"), Attach::json("virtio-blk-pci").anonymous()),
        (disk("v4"), Attach::blockdev("virtio-blk-pci").node(long)),
        (disk("v5"), Attach::blockdev("scsi-hd").throttled()),
        (disk("v6"), Attach::drive_and_device("ide-hd").throttled()),
        (disk("v7"), Attach::blockdev("nvme")),
        (
            DiskSpec::raw("v8", 16 * MIB),
            Attach::drive_and_device("usb-storage"),
        ),
        (
            disk("v9").data_file(),
            threaded(Attach::blockdev("scsi-hd")),
        ),
    ]
}

fn every_shape_of_disk_is_written_and_copied(qemu: Qemu) {
    let lab = BareLab::start().unwrap();
    let mut vm = lab.vm("kvm0").qemu(qemu).tcp();
    for (disk, attach) in shapes(qemu) {
        vm = vm.disk_as(disk, attach);
    }
    let vm = vm.start().unwrap();
    assert!(vm.tcp_uri().unwrap().starts_with("qmp:tcp:127.0.0.1:"));
    let before = vm.graph().unwrap();
    for (number, (disk, _)) in shapes(qemu).iter().enumerate() {
        let name = disk.target();
        let mut work = Workload::new(u64::try_from(number).unwrap(), 16 << 20);
        work.run(&vm, name, 20).unwrap();
        let copy = lab.path("copy.raw");
        vm.raw_copy(name, &copy).unwrap();
        work.check(&copy).unwrap();
    }
    assert_eq!(vm.graph().unwrap(), before);
    vm.no_nbd_server().unwrap();
    vm.quit().unwrap();
    vm.start().unwrap();
    assert_eq!(vm.graph().unwrap().roots.len(), 10);
}

#[test]
fn a_bare_qemu_has_disks_of_every_shape() {
    every_shape_of_disk_is_written_and_copied(Qemu::System);
}

#[test]
fn qemu_7_2_has_disks_of_every_shape() {
    every_shape_of_disk_is_written_and_copied(Qemu::V7_2);
}

#[test]
fn a_bitmap_survives_quit_and_sigterm_and_not_sigkill() {
    let lab = BareLab::start().unwrap();
    let attach = Attach::drive().node("virtual0");
    let disk = DiskSpec::qcow2("vda", 16 * MIB);
    let vm = lab.vm("kvm0").disk_as(disk, attach).start().unwrap();
    let add = |name: &str| {
        let bitmap = json!({"node": "virtual0", "name": name, "persistent": true});
        vm.qmp("block-dirty-bitmap-add", &bitmap).unwrap();
    };
    add("kept");
    vm.quit().unwrap();
    vm.start().unwrap();
    vm.terminate().unwrap();
    assert_eq!(vm.bitmaps("vda").unwrap().len(), 1);
    vm.start().unwrap();
    add("never-stored");
    vm.kill().unwrap();
    assert!(!vm.is_active());
    vm.start().unwrap();
    let bitmaps = vm.bitmaps("vda").unwrap();
    assert_eq!(bitmaps.len(), 1, "{bitmaps:?}");
    assert!(bitmaps[0].inconsistent);
}

#[test]
fn the_state_at_the_start_is_as_told() {
    let lab = BareLab::start().unwrap();
    let state = |vm: highwater_testkit::BareBuilder| vm.start().unwrap().state().unwrap();
    assert_eq!(state(lab.vm("a").prelaunch()), "prelaunch");
    assert_eq!(state(lab.vm("b").incoming()), "inmigrate");
    assert_eq!(state(lab.vm("c").uefi().nameless()), "running");
}

#[test]
fn a_bare_vm_dies_with_the_thread_that_started_it() {
    let lab = BareLab::start().unwrap();
    let there = lab.clone();
    let vm = std::thread::spawn(move || there.vm("kvm0").start().unwrap());
    let vm = vm.join().unwrap();
    let gone = || Ok(!vm.is_active());
    highwater_testkit::wait_until("QEMU is gone", std::time::Duration::from_secs(10), gone)
        .unwrap();
}

#[test]
fn a_bare_vm_boots_a_real_guest_with_its_agent_and_its_writer() {
    let lab = BareLab::start().unwrap();
    let image = lab.path("data.raw");
    highwater_testkit::guest::make_ext4(&image, 32 * MIB).unwrap();
    let vm = lab
        .vm("kvm0")
        .disk(DiskSpec::existing("vda", &image, "raw"))
        .disk(DiskSpec::qcow2("vdb", 16 * MIB))
        .guest()
        .start()
        .unwrap();
    let guest = vm.guest().unwrap();
    guest.wait_for_agent().unwrap();
    guest.run("echo tide >/data/file; sync").unwrap();
    assert!(!guest.is_frozen().unwrap());
    let numbering = Numbering {
        slots: 64,
        stride_bytes: 65_536,
        disks: vec!["/dev/vdb".into()],
    };
    let writer = NumberedWriter::start(&guest, &numbering, 4).unwrap();
    assert!(writer.stop().unwrap() > 0);
    vm.quit().unwrap();
    let found = tool("debugfs")
        .args(["-R", "cat /file"])
        .arg(&image)
        .run()
        .unwrap();
    assert_eq!(found, "tide\n");
    let copy = lab.path("copy.raw");
    vm.raw_copy("vda", &copy).unwrap();
    compare_images(&copy, &image).unwrap();
}
