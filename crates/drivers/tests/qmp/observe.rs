//! What is reported of a VM, however it was started.

use highwater_hypervisor::{
    DiskSource, Driver as _, FirmwareRole, JobFacts, MarkSupport, NoMarks, Place, RootNode,
    RunState, SkipReason, WriteErrorPolicy,
};
use highwater_testkit::{Attach, BareLab, DiskSpec, MIB, Qemu, tool};
use serde_json::json;

use crate::rig::{add_bitmap, connect, disk, driver, node, observe};

fn every_shape(qemu: Qemu) {
    let lab = BareLab::start().unwrap();
    let qcow2 = |name: &str| DiskSpec::qcow2(name, 16 * MIB);
    let vm = lab
        .vm("web01")
        .qemu(qemu)
        .disk(qcow2("d1"))
        .disk_as(
            qcow2("d2").serial("S2"),
            Attach::drive_and_device("virtio-blk-pci").id("data"),
        )
        .disk_as(qcow2("d3"), Attach::blockdev("virtio-blk-pci").throttled())
        .args(["-device", "virtio-scsi-pci,id=scsi"])
        .disk_as(qcow2("d4").serial("S4"), Attach::json("scsi-hd"))
        .disk_as(qcow2("d5"), Attach::blockdev("ide-hd"))
        .disk_as(
            qcow2("d6").serial("S6"),
            Attach::blockdev("nvme").node("a-node-name-of-31-characters-xx"),
        )
        .prelaunch()
        .start()
        .unwrap();
    let mut own = driver(&vm);
    let facts = observe(&mut own);
    let mut images = std::collections::BTreeSet::new();
    for (name, facts) in ["d1", "d2", "d3", "d4", "d5", "d6"]
        .into_iter()
        .zip(&facts.disks)
    {
        assert!(facts.target.len() > 1);
        assert_eq!(facts.root_node, RootNode::Same, "{name}");
        assert_eq!(facts.marks, MarkSupport::Yes, "{name}");
        assert_eq!(facts.size_bytes, 16 * MIB, "{name}");
        assert_eq!(facts.format, "qcow2");
        assert_eq!(facts.chain.len(), 1, "{name}");
        assert!(facts.chain[0].inode.is_some(), "{name}");
        assert!(facts.counters.is_some(), "{name}");
        images.insert(facts.chain[0].name.clone());
        // The node that is reported is one that takes bitmaps.
        add_bitmap(&vm, facts.chain[0].node.as_deref().unwrap(), "seen");
    }
    assert_eq!(images.len(), 6, "{images:?}");
    assert_eq!(disk(&facts, "virtio0").serial, None);
    assert_eq!(disk(&facts, "data").serial.as_deref(), Some("S2"));
    let again = observe(&mut own);
    for facts in &again.disks {
        let seen = facts.bitmaps.iter().find(|it| it.name == "seen").unwrap();
        assert!(seen.recording && seen.persistent && !seen.busy);
        assert_eq!(seen.node, *facts.chain[0].node.as_ref().unwrap());
    }
    for name in ["d1", "d3", "d5"] {
        vm.write(name, "write -P 1 0 64k").unwrap();
    }
    let written = observe(&mut own);
    let dirty: Vec<u64> = written
        .disks
        .iter()
        .map(|it| it.bitmaps[0].dirty_bytes)
        .collect();
    assert_eq!(
        dirty.iter().filter(|bytes| **bytes == 65536).count(),
        3,
        "{dirty:?}"
    );

    // The same names after a restart.
    let names = |facts: &highwater_hypervisor::VmFacts| -> Vec<_> {
        let named = facts.disks.iter();
        named
            .map(|it| {
                (
                    it.target.clone(),
                    it.device.clone(),
                    it.chain[0].name.clone(),
                )
            })
            .collect()
    };
    vm.quit().unwrap();
    vm.start().unwrap();
    let restarted = observe(&mut own);
    assert_eq!(names(&restarted), names(&written));
    assert!(restarted.disks.iter().all(|it| it.bitmaps[0].in_image));
}

#[test]
fn disks_are_found_however_they_were_attached() {
    every_shape(Qemu::default());
}

#[test]
fn disks_are_found_however_they_were_attached_to_qemu_7_2() {
    every_shape(Qemu::V7_2);
}

#[test]
fn what_cannot_hold_a_mark_for_good_says_why() {
    let lab = BareLab::start().unwrap();
    let vm = lab
        .vm("web01")
        .disk(DiskSpec::raw("raw", 16 * MIB))
        .disk(DiskSpec::qcow2("old", 16 * MIB).compat_v2())
        .disk(DiskSpec::qcow2("data", 16 * MIB).data_file())
        .prelaunch()
        .start()
        .unwrap();
    let facts = observe(&mut driver(&vm));
    let marks = |target: &str| disk(&facts, target).marks;
    assert_eq!(
        marks("virtio0"),
        MarkSupport::WhileRunning(NoMarks::NotQcow2)
    );
    assert_eq!(
        marks("virtio1"),
        MarkSupport::WhileRunning(NoMarks::Qcow2Version2)
    );
    assert_eq!(marks("virtio2"), MarkSupport::Yes);
    assert_eq!(disk(&facts, "virtio2").chain.len(), 2);
    assert!(disk(&facts, "virtio2").chain[1].inode.is_some());
    let raw = disk(&facts, "virtio0");
    assert_eq!(raw.format, "raw");
    assert_eq!(raw.source, DiskSource::File(vm.image("raw")));
}

#[test]
fn what_is_no_disk_of_the_guests_own_is_skipped_with_its_reason() {
    let lab = BareLab::start().unwrap();
    let other = lab
        .vm("other")
        .disk(DiskSpec::raw("x", MIB))
        .create()
        .unwrap();
    let image = other.image("x").display().to_string();
    let drive = |rest: &str| format!("file={image},format=raw,{rest}");
    let vm = lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB))
        .disk_as(
            DiskSpec::raw("shared", MIB),
            Attach::drive_and_device("virtio-blk-pci").options(",share-rw=on"),
        )
        .uefi()
        .args([
            "-drive",
            &drive("if=none,id=cd,media=cdrom,readonly=on"),
            "-device",
            "ide-cd,drive=cd",
            "-device",
            "ide-cd,id=empty",
            "-drive",
            &drive("if=virtio,readonly=on,id=ro"),
            "-drive",
            &drive("if=virtio,snapshot=on,id=gone"),
        ])
        .prelaunch()
        .start()
        .unwrap();
    let facts = observe(&mut driver(&vm));
    let mut skipped: Vec<_> = facts.skipped.iter().map(|it| it.reason).collect();
    skipped.sort_by_key(|reason| format!("{reason:?}"));
    assert_eq!(
        skipped,
        [
            SkipReason::Cdrom,
            SkipReason::Cdrom,
            SkipReason::ReadOnly,
            SkipReason::Shareable,
            SkipReason::Transient
        ],
        "{:?}",
        facts.skipped
    );
    assert_eq!(facts.disks.len(), 1);
    let roles: Vec<_> = facts.firmware.iter().map(|it| it.role).collect();
    assert_eq!(roles, [FirmwareRole::Loader, FirmwareRole::Nvram]);
    assert!(facts.firmware[1].path.ends_with("web01-vars.fd"));
}

#[test]
fn a_vm_runs_as_qemu_says() {
    let lab = BareLab::start().unwrap();
    let vm = lab.vm("web01").start().unwrap();
    let mut own = driver(&vm);
    assert_eq!(observe(&mut own).run_state, RunState::Running);
    vm.qmp("stop", &json!({})).unwrap();
    assert_eq!(observe(&mut own).run_state, RunState::Paused);
    drop(own);
    let vm = lab.vm("moved").disk(DiskSpec::qcow2("vda", MIB)).incoming();
    let vm = vm.start().unwrap();
    let facts = observe(&mut driver(&vm));
    assert_eq!(facts.run_state, RunState::NotResumed);
    assert_eq!(facts.disks.len(), 1);
}

#[test]
fn a_job_of_somebody_else_is_told_and_what_it_adds_to_a_disk_is_not_the_disks() {
    let lab = BareLab::start().unwrap();
    let vm = lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB))
        .disk_as(
            DiskSpec::qcow2("vdb", 16 * MIB),
            Attach::drive_and_device("virtio-blk-pci").options(",werror=report"),
        )
        .prelaunch()
        .start()
        .unwrap();
    let mut own = driver(&vm);
    let facts = observe(&mut own);
    assert_eq!(facts.job, None);
    let errors: Vec<_> = facts.disks.iter().map(|disk| disk.write_errors).collect();
    assert!(errors.contains(&WriteErrorPolicy::Report), "{errors:?}");
    let target = json!({"driver": "null-co", "node-name": "sink", "size": 16 * MIB});
    vm.qmp("blockdev-add", &target).unwrap();
    let backup = json!({"job-id": "theirs", "device": node(&facts, "virtio0"), "target": "sink",
        "sync": "none"});
    vm.qmp("blockdev-backup", &backup).unwrap();
    let busy = observe(&mut own);
    assert_eq!(
        busy.job,
        Some(JobFacts::ForeignBackup(Some("theirs".to_owned())))
    );
    assert_eq!(node(&busy, "virtio0"), node(&facts, "virtio0"));
    assert_eq!(disk(&busy, "virtio0").root_node, RootNode::Same);
    assert_eq!(disk(&busy, "virtio0").bitmaps, []);
    let around = own.survey(&facts.vm).unwrap();
    assert_eq!(around.inner_jobs.len(), 1);
    assert_eq!(around.loose_nodes.len(), 1, "{around:?}");
}

#[test]
fn a_file_that_was_named_is_kept_as_the_definition() {
    let lab = BareLab::start().unwrap();
    let vm = lab.vm("web01").prelaunch().start().unwrap();
    std::fs::write(lab.path("vm.conf"), "memory = 16\n").unwrap();
    let config = lab.path("vm.conf").display().to_string();
    let facts = observe(&mut connect(&format!("{}?config={config}", vm.uri())).unwrap());
    assert_eq!(facts.definition, "memory = 16\n");
    std::fs::remove_file(lab.path("vm.conf")).unwrap();
    // One that is gone is no reason to keep something else silently.
    let mut own = connect(&format!(
        "qmp:{}?config={config}",
        vm.second_socket().display()
    ))
    .unwrap();
    assert!(own.observe(&facts.vm).is_err());
}

#[test]
fn images_that_are_relative_encrypted_or_nowhere_are_told_as_what_they_are() {
    let lab = BareLab::start().unwrap();
    let secret = ["--object", "secret,id=s0,data=x"];
    let options = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10";
    let create = tool("qemu-img").args(["create", "-q", "-f", "qcow2"]);
    let create = create.args(secret).args(["-o", options]);
    create.arg(lab.path("luks.qcow2")).arg("1M").run().unwrap();
    let plain = tool("qemu-img").args(["create", "-q", "-f", "qcow2"]);
    plain.arg(lab.path("plain.qcow2")).arg("1M").run().unwrap();
    // From the directory that tests run in.
    let here = std::env::current_dir().unwrap();
    let up = "../".repeat(here.components().count() - 1);
    let relative = format!(
        "{up}{}",
        &lab.path("plain.qcow2").display().to_string()[1..]
    );
    let vm = lab
        .vm("web01")
        .args(["-object", "secret,id=s0,data=x", "-drive"])
        .args([
            format!("if=virtio,file={}", lab.path("luks.qcow2").display())
                + ",encrypt.key-secret=s0,encrypt.format=luks",
        ])
        .args(["-drive", &format!("if=virtio,file={relative}")])
        .args(["-blockdev", "driver=null-co,size=1048576,node-name=nowhere"])
        .args(["-device", "virtio-blk-pci,drive=nowhere,id=far"])
        .prelaunch()
        .start()
        .unwrap();
    let facts = observe(&mut driver(&vm));
    let luks = disk(&facts, "virtio0");
    assert!(luks.encrypted);
    assert_eq!(luks.source, DiskSource::File(lab.path("luks.qcow2")));
    let plain = disk(&facts, "virtio1");
    assert!(!plain.encrypted);
    let real = lab.path("plain.qcow2");
    assert_eq!(plain.chain[0].name, real.display().to_string());
    assert!(plain.chain[0].inode.is_some());
    let far = disk(&facts, "far");
    assert_eq!(far.chain[0].place, Place::Network);
    assert_eq!(far.format, "raw");
    assert_eq!(far.marks, MarkSupport::WhileRunning(NoMarks::NotQcow2));
    assert_eq!(far.root_node, RootNode::Same);
}
