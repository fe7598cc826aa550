//! Every way in which a disk can hang on a VM.

use highwater_hypervisor::{Driver as _, ErrorKind};
use highwater_testkit::{Attach, BareLab, DiskSpec, MIB, Qemu};

use crate::reading::{dirty_ranges, read_export};
use crate::rig::{Rig, mark_of};

const SIZE: u64 = 8 * MIB;

/// Takes a full and an incremental backup of the one disk, with writes before
/// and after each point.
fn is_backed_up(what: &str, qemu: Qemu, attach: Attach) {
    let lab = BareLab::start().unwrap();
    let vm = lab
        .vm("web01")
        .qemu(qemu)
        .disk_as(DiskSpec::qcow2("vda", SIZE), attach)
        .start()
        .unwrap();
    let mut rig = Rig::at(vm);
    let facts = rig.driver.observe(&rig.found.clone()).unwrap();
    let target = facts.disks[0].target.clone();
    let tidy = rig.vm.graph().unwrap().without_bitmaps();
    rig.vm.write("vda", "write -P 1 1M 1M").unwrap();
    let mut parent = None;
    for round in 0..2_u8 {
        let copy = lab.path("point.raw");
        rig.vm.raw_copy("vda", &copy).unwrap();
        let order = rig.order(&[(&target, parent.as_ref())]);
        let begun = rig
            .driver
            .begin(&order)
            .unwrap_or_else(|error| panic!("{what}: {error:?}"));
        assert_eq!(begun.stopped_us, None, "{what}");
        rig.vm
            .write("vda", &format!("write -P {} 1536k 1M", 7 + round))
            .unwrap();
        rig.driver.check(&order.vm, order.session).unwrap();
        let read = read_export(&begun.exports[0], &lab.path("read.raw"));
        assert!(
            std::fs::read(read).unwrap() == std::fs::read(&copy).unwrap(),
            "{what}"
        );
        if parent.is_some() {
            assert_eq!(
                dirty_ranges(&begun.exports[0]),
                [(1536 << 10, 1 << 20)],
                "{what}"
            );
        }
        let ended = rig.driver.end(&order).unwrap();
        assert_eq!((ended.ended_job, ended.warnings), (true, vec![]), "{what}");
        assert_eq!(rig.vm.graph().unwrap().without_bitmaps(), tidy, "{what}");
        rig.assert_no_files();
        rig.vm.no_nbd_server().unwrap();
        parent = Some(mark_of(&order).clone());
    }
}

#[test]
fn a_disk_is_backed_up_however_it_hangs_on_its_vm() {
    for (what, attach) in [
        ("-drive if=virtio", Attach::drive()),
        ("virtio-blk", Attach::drive_and_device("virtio-blk-pci")),
        ("virtio-blk, blockdev", Attach::blockdev("virtio-blk-pci")),
        (
            "without an id",
            Attach::blockdev("virtio-blk-pci").anonymous(),
        ),
        ("json:", Attach::json("virtio-blk-pci")),
        ("iothread", Attach::blockdev("virtio-blk-pci").iothread()),
        ("virtio-scsi", Attach::drive_and_device("scsi-hd")),
        (
            "virtio-scsi, iothread",
            Attach::blockdev("scsi-hd").iothread(),
        ),
        ("ahci", Attach::drive_and_device("ide-hd")),
        ("nvme", Attach::drive_and_device("nvme")),
        ("usb-storage", Attach::drive_and_device("usb-storage")),
        (
            "throttled drive",
            Attach::drive_and_device("virtio-blk-pci").throttled(),
        ),
        (
            "throttle filter",
            Attach::blockdev("virtio-blk-pci").throttled(),
        ),
        (
            "throttle filter, iothread",
            Attach::blockdev("virtio-blk-pci").throttled().iothread(),
        ),
        (
            "a name of 31 characters",
            Attach::blockdev("virtio-blk-pci").node("a-node-name-of-31-characters-xx"),
        ),
    ] {
        is_backed_up(what, Qemu::System, attach);
    }
}

#[test]
fn with_qemu_7_2_a_disk_is_backed_up_unless_exporting_it_would_end_the_guest() {
    for (what, attach) in [
        ("-drive if=virtio", Attach::drive()),
        ("virtio-scsi", Attach::drive_and_device("scsi-hd")),
        ("ahci", Attach::drive_and_device("ide-hd")),
        ("nvme", Attach::drive_and_device("nvme")),
        (
            "throttle filter",
            Attach::blockdev("virtio-blk-pci").throttled(),
        ),
    ] {
        is_backed_up(what, Qemu::V7_2, attach);
    }
    for device in ["virtio-blk-pci", "scsi-hd"] {
        let lab = BareLab::start().unwrap();
        let disk = DiskSpec::qcow2("vda", SIZE);
        let attach = Attach::blockdev(device).iothread();
        let vm = lab.vm("web01").qemu(Qemu::V7_2).disk_as(disk, attach);
        let mut rig = Rig::at(vm.start().unwrap());
        let before = rig.vm.graph().unwrap();
        let order = rig.order(&[("vda", None)]);
        let error = rig.driver.begin(&order).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Other);
        assert!(error.because[0].contains("iothread"), "{error:?}");
        assert_eq!(rig.vm.graph().unwrap(), before);
        rig.assert_no_files();
    }
}
