//! What the driver reports about a VM.

use highwater_hypervisor::{
    DiskSource, Driver as _, ErrorKind, FirmwareRole, MarkSupport, NoMarks, RootNode, RunState,
    SkipReason, WriteErrorPolicy,
};
use highwater_testkit::{DiskSpec, ErrorPolicy, Lab, MIB, tool};
use serde_json::json;

use crate::reading::disk_facts;
use crate::rig::Rig;

/// Serves a raw file over NBD for as long as the lab lives.
fn nbd_server(lab: &Lab) -> std::path::PathBuf {
    let (image, socket) = (lab.path("network.raw"), lab.path("network.sock"));
    std::fs::File::create(&image)
        .unwrap()
        .set_len(16 * MIB)
        .unwrap();
    lab.inside("qemu-nbd")
        .args(["-t", "-f", "raw", "-e", "8", "--fork", "-x", "export", "-k"])
        .arg(&socket)
        .arg(&image)
        .run()
        .unwrap();
    socket
}

#[test]
fn every_kind_of_disk_is_reported_or_left_out_with_its_reason() {
    let mut rig = Rig::start();
    let lab = rig.lab.clone();
    let socket = nbd_server(&lab);
    let pool = lab.path("pool");
    std::fs::create_dir(&pool).unwrap();
    let volume = pool.join("volume.qcow2");
    tool("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&volume)
        .arg("16M")
        .run()
        .unwrap();
    let pool_text = pool.to_str().unwrap();
    lab.virsh(&["pool-create-as", "images", "dir", "--target", pool_text])
        .unwrap();
    std::fs::write(lab.path("cd.iso"), vec![0; 1 << 20]).unwrap();
    std::fs::write(lab.path("floppy.img"), vec![0; 1440 << 10]).unwrap();
    tool("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(lab.path("base.qcow2"))
        .arg("16M")
        .run()
        .unwrap();
    let simple = |device: &str, file: &str, dev: &str, bus: &str| {
        format!(
            "<disk type='file' device='{device}'><driver name='qemu' type='raw'/>\
             <source file='{}'/><target dev='{dev}' bus='{bus}'/></disk>",
            lab.path(file).display()
        )
    };
    let vm = lab
        .vm("web01")
        .disk(
            DiskSpec::qcow2("vda", 16 * MIB)
                .backing(&lab.path("base.qcow2"), "qcow2")
                .serial("S1"),
        )
        .disk(DiskSpec::qcow2("vdb", 16 * MIB).compat_v2())
        .disk(DiskSpec::raw("vdc", 8 * MIB + 513).error_policy(ErrorPolicy::Report))
        .disk(DiskSpec::qcow2("vdd", 16 * MIB).data_file())
        .disk(DiskSpec::raw_xml(
            "vde",
            &format!(
                "<disk type='network' device='disk'><driver name='qemu' type='raw'/>\
                 <source protocol='nbd' name='export'><host transport='unix' socket='{}'/></source>\
                 <target dev='vde' bus='virtio'/></disk>",
                socket.display()
            ),
        ))
        .disk(DiskSpec::raw_xml(
            "vdf",
            "<disk type='volume' device='disk'><driver name='qemu' type='qcow2'/>\
             <source pool='images' volume='volume.qcow2'/><target dev='vdf' bus='virtio'/></disk>",
        ))
        .disk(DiskSpec::raw("vdg", MIB).element("<shareable/>"))
        .disk(DiskSpec::qcow2("vdh", MIB).element("<transient/>"))
        .disk(DiskSpec::raw("vdi", MIB).element("<readonly/>"))
        .disk(DiskSpec::raw_xml(
            "hda",
            &simple("cdrom", "cd.iso", "hda", "ide"),
        ))
        .disk(DiskSpec::raw_xml(
            "hdb",
            "<disk type='file' device='cdrom'><target dev='hdb' bus='ide'/></disk>",
        ))
        .disk(DiskSpec::raw_xml(
            "fda",
            &simple("floppy", "floppy.img", "fda", "fdc"),
        ))
        .start()
        .unwrap();

    let facts = rig.observe(&vm);
    assert_eq!(facts.run_state, RunState::Running);
    assert!(facts.persistent && facts.job.is_none() && facts.checkpoints.is_empty());
    let skipped: std::collections::BTreeMap<_, _> = facts
        .skipped
        .iter()
        .map(|skipped| (skipped.target.as_str(), skipped.reason))
        .collect();
    let expected = [
        ("fda", SkipReason::Floppy),
        ("hda", SkipReason::Cdrom),
        ("hdb", SkipReason::Empty),
        ("vdg", SkipReason::Shareable),
        ("vdh", SkipReason::Transient),
        ("vdi", SkipReason::ReadOnly),
    ];
    assert_eq!(skipped, expected.into_iter().collect());
    let seen: Vec<_> = facts
        .disks
        .iter()
        .map(|disk| {
            (
                disk.target.as_str(),
                disk.format.as_str(),
                disk.size_bytes / MIB,
                disk.marks,
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            ("vda", "qcow2", 16, MarkSupport::Yes),
            ("vdb", "qcow2", 16, MarkSupport::No(NoMarks::Qcow2Version2)),
            ("vdc", "raw", 8, MarkSupport::No(NoMarks::NotQcow2)),
            ("vdd", "qcow2", 16, MarkSupport::Yes),
            ("vde", "raw", 16, MarkSupport::No(NoMarks::NotQcow2)),
            ("vdf", "qcow2", 16, MarkSupport::Yes),
        ]
    );
    for disk in &facts.disks {
        assert_eq!(disk.root_node, RootNode::Same, "{}", disk.target);
        assert!(disk.counters.is_some(), "{}", disk.target);
    }
    let vda = disk_facts(&facts, "vda");
    assert_eq!(vda.serial.as_deref(), Some("S1"));
    assert_eq!(vda.device.as_deref(), Some("virtio-disk0"));
    assert_eq!(vda.chain.len(), 2);
    assert!(
        vda.chain
            .iter()
            .all(|link| link.inode.is_some() && link.node.is_some()),
        "{vda:?}"
    );
    let vdc = disk_facts(&facts, "vdc");
    assert_eq!(
        (vdc.size_bytes, vdc.file_bytes),
        (8 * MIB + 1024, Some(8 * MIB + 513))
    );
    assert_eq!(vdc.write_errors, WriteErrorPolicy::Report);
    assert_eq!(
        disk_facts(&facts, "vde").source,
        DiskSource::Network(format!("nbd+unix:///export?socket={}", socket.display()))
    );
    assert_eq!(
        disk_facts(&facts, "vdf").source,
        DiskSource::Volume {
            pool: "images".into(),
            volume: "volume.qcow2".into(),
            path: Some(volume)
        }
    );
}

#[test]
fn a_network_disk_and_a_volume_are_read_like_any_other() {
    use crate::reading::{dirty_ranges, read_export};
    let mut rig = Rig::start();
    let lab = rig.lab.clone();
    let socket = nbd_server(&lab);
    let pool = lab.path("pool");
    std::fs::create_dir(&pool).unwrap();
    let volume = pool.join("volume.qcow2");
    tool("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&volume)
        .arg("16M")
        .run()
        .unwrap();
    lab.virsh(&[
        "pool-create-as",
        "images",
        "dir",
        "--target",
        pool.to_str().unwrap(),
    ])
    .unwrap();
    let vm = lab
        .vm("web01")
        .disk(DiskSpec::raw_xml(
            "vda",
            &format!(
                "<disk type='network' device='disk'><driver name='qemu' type='raw'/>\
                 <source protocol='nbd' name='export'><host transport='unix' socket='{}'/></source>\
                 <target dev='vda' bus='virtio'/></disk>",
                socket.display()
            ),
        ))
        .disk(DiskSpec::raw_xml(
            "vdb",
            "<disk type='volume' device='disk'><driver name='qemu' type='qcow2'/>\
             <source pool='images' volume='volume.qcow2'/><target dev='vdb' bus='virtio'/></disk>",
        ))
        .start()
        .unwrap();
    vm.write("vda", "write -P 7 1M 1M").unwrap();
    vm.flush("vda").unwrap();
    let mark = rig.leave_mark(&vm, &["vdb"]).name;
    vm.write("vdb", "write -P 8 2M 64k").unwrap();
    let mut order = rig.order(&vm, &[("vda", None), ("vdb", Some(&mark))]);
    order.new_mark.as_mut().unwrap().disks = vec!["vdb".into()];
    let begun = rig.driver.begin(&order).unwrap();
    let read = std::fs::read(read_export(&begun.exports[0], &lab.path("read.raw"))).unwrap();
    assert!(read == std::fs::read(lab.path("network.raw")).unwrap());
    assert!(read[1 << 20..2 << 20].iter().all(|byte| *byte == 7));
    assert_eq!(dirty_ranges(&begun.exports[1]), [(2 * MIB, 64 << 10)]);
    rig.driver.end(&order).unwrap();
}

#[test]
fn a_graph_changed_behind_libvirts_back_is_seen() {
    let mut rig = Rig::start();
    let vm = rig
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB))
        .start()
        .unwrap();
    let node = disk_facts(&rig.observe(&vm), "vda").chain[0]
        .node
        .clone()
        .unwrap();
    vm.monitor(&json!({"execute": "blockdev-snapshot-sync", "arguments": {
        "node-name": node, "snapshot-node-name": "behind",
        "snapshot-file": rig.lab.path("overlay.qcow2"), "format": "qcow2"}}))
        .unwrap();
    assert_eq!(
        disk_facts(&rig.observe(&vm), "vda").root_node,
        RootNode::Differs {
            guest: "behind".into(),
            exported: node
        }
    );
}

#[test]
fn a_backup_jobs_own_filter_is_no_changed_graph() {
    let mut rig = Rig::start();
    let vm = rig
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB))
        .start()
        .unwrap();
    let order = rig.order(&vm, &[("vda", None)]);
    rig.driver.begin(&order).unwrap();
    let facts = rig.observe(&vm);
    assert_eq!(facts.disks[0].root_node, RootNode::Same);
    assert_eq!(facts.disks[0].bitmaps.len(), 1);
    rig.driver.end(&order).unwrap();
}

#[test]
fn firmware_and_tpm_are_reported_where_they_lie() {
    let mut rig = Rig::start();
    let vm = rig
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", MIB))
        .uefi()
        .tpm()
        .start()
        .unwrap();
    let facts = rig.observe(&vm);
    let nvram = facts
        .firmware
        .iter()
        .find(|file| file.role == FirmwareRole::Nvram)
        .unwrap();
    assert!(nvram.path.exists(), "{nvram:?}");
    let uuid = facts.vm.uuid.as_ref().unwrap();
    let state = facts.tpm_state.unwrap();
    assert_eq!(
        state.to_str().unwrap(),
        format!("/var/lib/libvirt/swtpm/{uuid}/tpm2")
    );
    // The lab keeps /var/lib/libvirt elsewhere; seen from inside it is there.
    rig.lab.inside("test").arg("-d").arg(&state).run().unwrap();
    assert!(facts.definition.contains("<tpm "));
}

#[test]
fn the_process_of_a_vm_is_told_from_the_next_one() {
    let mut rig = Rig::start();
    let vm = rig
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", MIB))
        .start()
        .unwrap();
    let first = rig.observe(&vm).process.unwrap();
    assert_eq!(rig.observe(&vm).process, Some(first.clone()));
    vm.destroy().unwrap();
    assert_eq!(rig.observe(&vm).process, None);
    vm.start().unwrap();
    let second = rig.observe(&vm).process.unwrap();
    assert_ne!(first, second);
    assert_eq!(first.boot_id, second.boot_id);
}

#[test]
fn a_vm_that_is_off_is_reported_without_its_qemu() {
    let mut rig = Rig::start();
    let vm = rig
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB))
        .disk(DiskSpec::qcow2("vdb", 16 * MIB).compat_v2())
        .define()
        .unwrap();
    let facts = rig.observe(&vm);
    assert_eq!(facts.run_state, RunState::Off);
    assert_eq!(facts.disks[0].size_bytes, 16 * MIB);
    assert_eq!(facts.disks[0].marks, MarkSupport::Yes);
    assert_eq!(
        facts.disks[1].marks,
        MarkSupport::No(NoMarks::Qcow2Version2)
    );
    assert_eq!(facts.disks[0].root_node, RootNode::Same);
    assert_eq!(facts.process, None);
}

#[test]
fn vms_are_found_by_name_and_by_uuid_and_listed_by_name() {
    let mut rig = Rig::start();
    for name in ["web02", "db01"] {
        rig.lab
            .vm(name)
            .disk(DiskSpec::qcow2("vda", MIB))
            .define()
            .unwrap();
    }
    let names: Vec<_> = rig
        .driver
        .list()
        .unwrap()
        .into_iter()
        .map(|(vm, _)| vm.name)
        .collect();
    assert_eq!(names, ["db01", "web02"]);
    let found = rig.driver.find("web02").unwrap();
    assert_eq!(
        rig.driver.find(found.uuid.as_ref().unwrap()).unwrap(),
        found
    );
    let error = rig.driver.find("web03").unwrap_err();
    assert_eq!(error.kind, ErrorKind::NoSuchVm);
    assert_eq!(error.message, "cannot find VM `web03`");
}
