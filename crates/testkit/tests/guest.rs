//! The real guest: does it boot, obey, and write what it says?

use highwater_testkit::{DiskSpec, Lab, MIB, NumberedWriter, Numbering, guest};

#[test]
fn a_guest_boots_runs_commands_and_freezes() {
    let lab = Lab::start().unwrap();
    guest::make_ext4(&lab.path("data.raw"), 64 * MIB).unwrap();
    let vm = lab
        .vm("web01")
        .disk(DiskSpec::existing("vda", &lab.path("data.raw"), "raw"))
        .guest()
        .start()
        .unwrap();
    let guest = vm.guest().unwrap();
    guest.run("echo high > /data/water && sync").unwrap();
    assert_eq!(guest.run("cat /data/water").unwrap(), "high\n");
    guest.run("false").unwrap_err();

    guest.wait_for_agent().unwrap();
    guest
        .agent(r#"{"execute":"guest-fsfreeze-freeze"}"#)
        .unwrap();
    assert!(guest.is_frozen().unwrap());
    guest.agent(r#"{"execute":"guest-fsfreeze-thaw"}"#).unwrap();
    assert!(!guest.is_frozen().unwrap());
}

#[test]
fn a_copy_of_disks_at_rest_holds_all_acknowledged_blocks() {
    let lab = Lab::start().unwrap();
    let numbering = Numbering {
        slots: 256,
        stride_bytes: 16 << 10,
        disks: vec!["/dev/vda".to_owned(), "/dev/vdb".to_owned()],
    };
    let vm = lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", numbering.disk_bytes()))
        .disk(DiskSpec::qcow2("vdb", numbering.disk_bytes()))
        .guest()
        .start()
        .unwrap();
    let guest = vm.guest().unwrap();
    let writer = NumberedWriter::start(&guest, &numbering, 64).unwrap();
    while writer.acknowledged() < 1000 {
        std::thread::yield_now();
    }
    let last = writer.stop().unwrap();

    let copies = [lab.path("a.raw"), lab.path("b.raw")];
    vm.raw_copy("vda", &copies[0]).unwrap();
    vm.raw_copy("vdb", &copies[1]).unwrap();
    let found = numbering.check_prefix(&[&copies[0], &copies[1]], last, last);
    assert_eq!(found.unwrap(), last);
    // The same disks, taken at different points in time.
    vm.write("vdb", "write -z 0 4k").unwrap();
    vm.raw_copy("vdb", &copies[1]).unwrap();
    let found = numbering.check_prefix(&[&copies[0], &copies[1]], last, last);
    found.unwrap_err();
}
