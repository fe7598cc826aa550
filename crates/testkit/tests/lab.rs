//! The lab itself: does a private libvirtd come up, serve, and go away?
#![allow(
    clippy::disallowed_methods,
    reason = "files of a lab die with the test: nothing here must be durable"
)]

use highwater_testkit::{DiskSpec, Lab, Leftovers, MIB, Workload, compare_images, tool};

#[test]
fn what_the_guest_writes_is_what_a_copy_holds() {
    let lab = Lab::start().unwrap();
    let vm = lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 64 * MIB))
        .disk(DiskSpec::raw("vdb", 8 * MIB))
        .start()
        .unwrap();
    vm.write("vda", "write -P 0xab 10M 3M").unwrap();
    vm.write("vdb", "write -P 0xcd 0 64k").unwrap();

    vm.raw_copy("vda", &lab.path("a.raw")).unwrap();
    assert_eq!(vm.state().unwrap(), "running");
    compare_images(&lab.path("a.raw"), &vm.image("vda")).unwrap();
    let mut expected = vec![0; 64 << 20];
    expected[10 << 20..13 << 20].fill(0xab);
    assert!(std::fs::read(lab.path("a.raw")).unwrap() == expected);
}

#[test]
fn a_guest_write_that_fails_is_an_error() {
    let lab = Lab::start().unwrap();
    let vm = lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", MIB))
        .start()
        .unwrap();
    vm.write("vda", "write 100M 4k").unwrap_err();
    vm.write("vda", "wriet 0 4k").unwrap_err();
    vm.write("vda", "write -P 1 0 4k").unwrap();
    vm.write("vda", "read -P 2 0 4k").unwrap_err();
    vm.write("vda", "read -P 1 0 4k").unwrap();
}

#[test]
fn a_vm_outlives_libvirtd_but_not_its_own_qemu() {
    let lab = Lab::start().unwrap();
    let vm = lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", MIB))
        .start()
        .unwrap();
    lab.restart_libvirtd().unwrap();
    assert_eq!(vm.state().unwrap(), "running");
    vm.write("vda", "write 0 64k").unwrap();
    vm.kill_qemu().unwrap();
    assert_eq!(vm.state().unwrap(), "shut off");
    vm.start().unwrap();
    assert_eq!(
        vm.leftovers(&lab.path("scratch")).unwrap(),
        Leftovers::default()
    );
}

#[test]
fn nothing_of_a_lab_outlives_it() {
    let lab = Lab::start().unwrap();
    let vm = lab
        .vm("gone")
        .disk(DiskSpec::qcow2("vda", MIB))
        .start()
        .unwrap();
    let dir = lab.dir();
    drop((lab, vm));
    assert!(!dir.exists());
    // What still names the directory is a process that should be dead.
    let processes = tool("ps").args(["-eo", "args"]).run().unwrap();
    let left = processes
        .lines()
        .filter(|line| line.contains(dir.to_str().unwrap()));
    assert_eq!(left.collect::<Vec<_>>(), Vec::<&str>::new());
}

#[test]
fn leftovers_of_a_backup_are_all_seen() {
    let lab = Lab::start().unwrap();
    let vm = lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", MIB))
        .start()
        .unwrap();
    let scratch = lab.path("scratch");
    std::fs::create_dir(&scratch).unwrap();
    let backup = format!(
        "<domainbackup mode='pull'><server transport='unix' socket='{0}/nbd.sock'/><disks>\
         <disk name='vda' type='file'><scratch file='{0}/vda'/></disk></disks></domainbackup>",
        scratch.display()
    );
    std::fs::write(lab.path("backup.xml"), backup).unwrap();
    let checkpoint = "<domaincheckpoint><name>c1</name></domaincheckpoint>";
    std::fs::write(lab.path("checkpoint.xml"), checkpoint).unwrap();
    let (backup, checkpoint) = (lab.path("backup.xml"), lab.path("checkpoint.xml"));
    lab.virsh(&[
        "backup-begin".as_ref(),
        "web01".as_ref(),
        backup.as_os_str(),
        checkpoint.as_os_str(),
    ])
    .unwrap();

    let left = vm.leftovers(&scratch).unwrap();
    assert!(left.job);
    assert_eq!(left.checkpoints, ["c1"]);
    assert_eq!(left.bitmaps, ["vda/c1"]);
    assert_eq!(left.exports.len(), 1);
    assert_eq!(left.nodes.len(), 3, "{:?}", left.nodes);
    assert_eq!(left.files, [scratch.join("nbd.sock"), scratch.join("vda")]);
}

#[test]
fn a_seeded_workload_leaves_the_disk_its_model_says() {
    let lab = Lab::start().unwrap();
    let vm = lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB))
        .disk(
            DiskSpec::qcow2("vdb", 16 * MIB)
                .extended_l2()
                .cluster(64 << 10),
        )
        .disk(DiskSpec::qcow2("vdc", 16 * MIB).data_file())
        .start()
        .unwrap();
    for (seed, disk) in [(1, "vda"), (2, "vdb"), (3, "vdc")] {
        let mut workload = Workload::new(seed, 16 << 20);
        for _ in 0..3 {
            workload.run(&vm, disk, 40).unwrap();
            let copy = lab.path(&format!("{disk}.raw"));
            vm.raw_copy(disk, &copy).unwrap();
            workload.check(&copy).unwrap();
        }
    }
}

/// Each of twenty tests has a lab of its own and they run side by side.
mod side_by_side {
    use super::*;

    fn one_of_many() -> anyhow::Result<()> {
        let lab = Lab::start()?;
        // All have the same name: nothing is shared in which they could clash.
        let disk = DiskSpec::qcow2("vda", 8 * MIB);
        let vm = lab.vm("twin").disk(disk).start()?;
        vm.write("vda", "write -P 7 1M 1M")?;
        vm.raw_copy("vda", &lab.path("copy.raw"))?;
        compare_images(&lab.path("copy.raw"), &vm.image("vda"))
    }

    macro_rules! labs {
        ($($name:ident)*) => { $(#[test] fn $name() { one_of_many().unwrap(); })* };
    }
    labs! {
        a01 a02 a03 a04 a05 a06 a07 a08 a09 a10
        a11 a12 a13 a14 a15 a16 a17 a18 a19 a20
    }
}

#[test]
fn firmware_variables_and_a_tpm_are_there_to_be_saved() {
    let lab = Lab::start().unwrap();
    let vm = lab
        .vm("secure")
        .disk(DiskSpec::raw("sda", MIB).serial("hw-1"))
        .uefi()
        .tpm()
        .start()
        .unwrap();
    vm.write("sda", "write 0 4k").unwrap();
    assert!(lab.path("secure-vars.fd").exists());
    let uuid = vm.uuid().unwrap();
    assert!(lab.lib_dir().join("swtpm").join(uuid).exists());
}
