//! A session from begin to end.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use highwater_hypervisor::{
    Consistency, Driver as _, ErrorKind, JobFacts, Quiesce, RunState, SkipReason,
};
use highwater_testkit::{DiskSpec, ErrorPolicy, MIB, compare_images};

use crate::reading::{mark_name, read_export};
use crate::rig::{Rig, assert_only_marks, make_luks};

#[test]
fn nobody_but_the_hypervisors_group_can_enter_the_directories_of_a_session() {
    let mut rig = Rig::start();
    let vm = rig
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", MIB))
        .start()
        .unwrap();
    let order = rig.order(&vm, &[("vda", None)]);
    rig.driver.begin(&order).unwrap();
    for dir in [&order.socket_dir, &order.scratch_dir] {
        let mode = std::fs::metadata(dir).unwrap().mode();
        assert_eq!(mode & 0o007, 0, "{mode:o}");
    }
    rig.driver.end(&order).unwrap();
}

/// As distributions run QEMU: as a user of its own.
#[test]
fn a_qemu_that_is_not_root_reaches_its_directories_through_its_group() {
    let mut rig = Rig::start();
    let open = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    open(rig.lab.dir().parent().unwrap(), 0o711);
    let vm = rig
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB))
        .define()
        .unwrap();
    let xml = rig.lab.virsh(&["dumpxml", "web01"]).unwrap();
    let label = "<seclabel type='static' model='dac' relabel='yes'><label>+65534:+65533</label>";
    rig.lab
        .define(&xml.replace("</domain>", &format!("{label}</seclabel></domain>")))
        .unwrap();
    vm.start().unwrap();

    let mut order = rig.order(&vm, &[("vda", None)]);
    let begun = rig.driver.begin(&order).unwrap();
    let dir = std::fs::metadata(&order.socket_dir).unwrap();
    assert_eq!(
        (dir.uid(), dir.gid(), dir.mode() & 0o777),
        (0, 65533, 0o770)
    );
    read_export(&begun.exports[0], &rig.lab.path("read.raw"));
    rig.driver.end(&order).unwrap();

    let closed = rig.lab.path("closed");
    std::fs::create_dir(&closed).unwrap();
    open(&closed, 0o700);
    order.scratch_dir = closed.join("session");
    let error = rig.driver.begin(&order).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Scratch);
    assert!(error.because[0].contains("may not enter"), "{error:?}");
    assert!(!order.scratch_dir.exists() && !order.socket_dir.exists());
}

#[test]
fn a_begin_that_fails_leaves_nothing() {
    let mut rig = Rig::start();
    let vm = rig
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB))
        .start()
        .unwrap();
    let kept = rig.leave_mark(&vm, &["vda"]).name;

    let unknown = mark_name();
    let order = rig.order(&vm, &[("vda", Some(&unknown))]);
    assert_eq!(
        rig.driver.begin(&order).unwrap_err().kind,
        ErrorKind::UnknownMark
    );
    assert_only_marks(&rig, &vm, &order, &[&kept]);

    // The record is there and its bitmap is not.
    vm.monitor(&serde_json::json!({"execute": "block-dirty-bitmap-remove",
        "arguments": {"node": node(&mut rig, &vm), "name": kept.to_string()}}))
        .unwrap();
    let order = rig.order(&vm, &[("vda", Some(&kept))]);
    let error = rig.driver.begin(&order).unwrap_err();
    assert_eq!(
        (error.kind, error.because.len()),
        (ErrorKind::BadMark, 1),
        "{error:?}"
    );
    assert_only_marks(&rig, &vm, &order, &[&kept]);
    assert_eq!(vm.state().unwrap(), "running");
}

fn node(rig: &mut Rig, vm: &highwater_testkit::Vm) -> String {
    rig.observe(vm).disks[0].chain[0].node.clone().unwrap()
}

#[test]
fn an_order_that_makes_no_sense_is_refused_before_anything_is_done() {
    let mut rig = Rig::start();
    let vm = rig
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", MIB))
        .disk(DiskSpec::raw("vdb", MIB).element("<shareable/>"))
        .start()
        .unwrap();
    assert_eq!(rig.observe(&vm).skipped[0].reason, SkipReason::Shareable);
    for disks in [&[("vdz", None)][..], &[("vdb", None)], &[]] {
        let order = rig.order(&vm, disks);
        assert_eq!(
            rig.driver.begin(&order).unwrap_err().kind,
            ErrorKind::NoSuchDisk
        );
        assert_only_marks(&rig, &vm, &order, &[]);
    }
    let order = rig.order(&vm, &[("vda", None), ("vda", None)]);
    rig.driver.begin(&order).unwrap_err();
}

#[test]
fn a_foreign_job_keeps_us_out_and_is_not_touched_by_our_end() {
    let mut rig = Rig::start();
    let vm = rig
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB))
        .start()
        .unwrap();
    let xml = rig.lab.path("backup.xml");
    let scratch = rig.lab.path("foreign.scratch");
    std::fs::write(
        &xml,
        format!(
            "<domainbackup mode='pull'><server transport='unix' socket='{}'/><disks>\
             <disk name='vda' type='file'><scratch file='{}'/></disk></disks></domainbackup>",
            rig.lab.path("foreign.sock").display(),
            scratch.display()
        ),
    )
    .unwrap();
    rig.lab
        .virsh(&["backup-begin", "web01", xml.to_str().unwrap()])
        .unwrap();
    let socket = rig.lab.path("foreign.sock").display().to_string();
    let job = rig.observe(&vm).job;
    assert_eq!(job, Some(JobFacts::ForeignBackup(Some(socket))));

    let order = rig.order(&vm, &[("vda", None)]);
    let error = rig.driver.begin(&order).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Busy);
    let ended = rig.driver.end(&order).unwrap();
    assert!(!ended.ended_job);
    rig.driver.end_leftover(&order.vm, order.session).unwrap();
    assert!(vm.job_running().unwrap() && scratch.exists());
}

#[test]
fn a_paused_guest_is_backed_up_and_stays_paused() {
    let mut rig = Rig::start();
    let vm = rig
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", MIB))
        .start()
        .unwrap();
    rig.lab.virsh(&["suspend", "web01"]).unwrap();
    let mut order = rig.order(&vm, &[("vda", None)]);
    order.quiesce = Quiesce::Try;
    assert_eq!(
        rig.driver.begin(&order).unwrap().consistency,
        Consistency::Paused
    );
    rig.driver.end(&order).unwrap();
    assert_eq!(rig.observe(&vm).run_state, RunState::Paused);
    order.quiesce = Quiesce::Require;
    assert_eq!(
        rig.driver.begin(&order).unwrap_err().kind,
        ErrorKind::CannotFreeze
    );
}

#[test]
fn a_session_survives_a_restart_of_libvirtd() {
    let mut rig = Rig::start();
    let vm = rig
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB))
        .start()
        .unwrap();
    let order = rig.order(&vm, &[("vda", None)]);
    rig.driver.begin(&order).unwrap();
    rig.lab.restart_libvirtd().unwrap();
    rig.driver.check(&order.vm, order.session).unwrap();
    assert!(rig.driver.end(&order).unwrap().ended_job);
    let mark = order.new_mark.as_ref().unwrap().name.clone();
    assert_only_marks(&rig, &vm, &order, &[&mark]);
}

#[test]
fn raw_and_version_2_disks_are_read_beside_one_that_gets_the_mark() {
    let mut rig = Rig::start();
    let vm = rig
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB).data_file())
        .disk(DiskSpec::qcow2("vdb", 16 * MIB).compat_v2())
        .disk(DiskSpec::raw("vdc", 8 * MIB + 513))
        .start()
        .unwrap();
    let mut order = rig.order(&vm, &[("vda", None), ("vdb", None), ("vdc", None)]);
    order.new_mark.as_mut().unwrap().disks = vec!["vda".into()];
    for disk in ["vda", "vdb", "vdc"] {
        vm.write(disk, "write -P 0x5a 4M 128k").unwrap();
    }
    let begun = rig.driver.begin(&order).unwrap();
    for export in &begun.exports {
        let expected = rig.lab.path("expected.raw");
        vm.raw_copy(&export.target, &expected).unwrap();
        compare_images(&expected, &read_export(export, &rig.lab.path("read.raw"))).unwrap();
    }
    rig.driver.end(&order).unwrap();
    assert_eq!(rig.observe(&vm).checkpoints[0].disks, ["vda"]);
}

#[test]
fn where_a_full_scratch_file_would_lose_writes_its_space_is_reserved() {
    let mut rig = Rig::start();
    let vm = rig
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB).error_policy(ErrorPolicy::Ignore))
        .disk(DiskSpec::raw("vdb", 8 * MIB + 512).error_policy(ErrorPolicy::Report))
        .start()
        .unwrap();
    vm.write("vda", "write -P 1 0 16M").unwrap();
    vm.write("vdb", "write -P 1 0 8M").unwrap();
    let mut order = rig.order(&vm, &[("vda", None), ("vdb", None)]);
    order.new_mark.as_mut().unwrap().disks = vec!["vda".into()];
    for (disk, copy) in [("vda", "vda.raw"), ("vdb", "vdb.raw")] {
        vm.raw_copy(disk, &rig.lab.path(copy)).unwrap();
    }
    let begun = rig.driver.begin(&order).unwrap();
    let reserved = || -> u64 {
        let files = std::fs::read_dir(&order.scratch_dir).unwrap();
        files
            .map(|file| file.unwrap().metadata().unwrap().blocks() * 512)
            .sum()
    };
    let before = reserved();
    assert!(before >= 24 * MIB);
    vm.write("vda", "write -P 2 0 16M").unwrap();
    vm.write("vdb", "write -P 2 0 8M").unwrap();
    // Every block was overwritten, and no new space was needed for the old ones.
    assert_eq!(reserved(), before);
    for export in &begun.exports {
        let expected = rig.lab.path(&format!("{}.raw", export.target));
        compare_images(&expected, &read_export(export, &rig.lab.path("read.raw"))).unwrap();
    }
    rig.driver.end(&order).unwrap();
    let mark = order.new_mark.as_ref().unwrap().name.clone();
    assert_only_marks(&rig, &vm, &order, &[&mark]);
}

#[test]
fn the_scratch_file_of_an_encrypted_disk_is_encrypted_with_a_key_for_the_session_alone() {
    let mut rig = Rig::start();
    let lab = rig.lab.clone();
    let image = lab.path("luks.qcow2");
    let encryption = make_luks(&lab, &image);
    // Beside a disk that is not, and whose scratch file needs all its space.
    let vm = lab
        .vm("web01")
        .disk(DiskSpec::existing("vda", &image, "qcow2").element(&encryption))
        .disk(DiskSpec::qcow2("vdb", 8 * MIB).error_policy(ErrorPolicy::Ignore))
        .start()
        .unwrap();
    let encrypted: Vec<_> = rig
        .observe(&vm)
        .disks
        .iter()
        .map(|disk| disk.encrypted)
        .collect();
    assert_eq!(encrypted, [true, false]);
    let secrets = || lab.virsh(&["secret-list"]).unwrap().lines().count();
    let secrets_before = secrets();
    let clear_text = vec![0x5e_u8; 64 << 10];
    for disk in ["vda", "vdb"] {
        vm.write(disk, "write -P 0x5e 0 2M").unwrap();
    }
    let order = rig.order(&vm, &[("vda", None), ("vdb", None)]);
    let begun = rig.driver.begin(&order).unwrap();
    assert_eq!(secrets(), secrets_before + 1);
    for disk in ["vda", "vdb"] {
        vm.write(disk, "write -P 0 0 2M").unwrap();
    }
    let mut files: Vec<_> = std::fs::read_dir(&order.scratch_dir)
        .unwrap()
        .map(|file| file.unwrap().path())
        .filter(|path| !path.to_string_lossy().ends_with(".session"))
        .collect();
    files.sort();
    let is_clear: Vec<_> = files
        .iter()
        .map(|file| {
            std::fs::read(file)
                .unwrap()
                .chunks(64 << 10)
                .any(|chunk| chunk == clear_text)
        })
        .collect();
    assert_eq!(is_clear, [false, true], "{files:?}");
    for export in &begun.exports {
        let read = std::fs::read(read_export(export, &lab.path("read.raw"))).unwrap();
        assert_eq!(read.len(), 8 << 20);
        assert!(read[..2 << 20].iter().all(|byte| *byte == 0x5e));
    }
    rig.driver.end(&order).unwrap();
    assert_eq!(secrets(), secrets_before);
    let mark = order.new_mark.as_ref().unwrap().name.clone();
    assert_only_marks(&rig, &vm, &order, &[&mark]);
}
