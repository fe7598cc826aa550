//! Domains that are shut off, saved, or started for their backup.

use std::path::Path;

use highwater_hypervisor::{
    Consistency, DiskFacts, Driver as _, ErrorKind, MarkOrder, Redefinition, RootNode, RunState,
    WhenStarted,
};
use highwater_model::MarkName;
use highwater_testkit::{DiskSpec, MIB, Vm, tool};

use crate::reading::{dirty_ranges, disk_facts};
use crate::rig::{Rig, assert_only_marks, make_luks};

/// What tells a disk from others and what it can do: the same on and off.
fn identity(disk: &DiskFacts) -> impl PartialEq + std::fmt::Debug + use<> {
    let links = disk.chain.iter();
    let chain: Vec<_> = links
        .map(|link| {
            (
                link.name.clone(),
                link.format.clone(),
                link.place,
                link.inode,
            )
        })
        .collect();
    let device = (disk.serial.clone(), disk.device.clone(), disk.device_known);
    let image = (disk.format.clone(), disk.size_bytes, disk.source.clone());
    let can = (
        disk.marks,
        disk.encrypted,
        disk.write_errors,
        disk.file_bytes.is_some(),
    );
    (
        disk.target.clone(),
        device,
        chain,
        image,
        can,
        disk.root_node.clone(),
    )
}

fn raw_disk(rig: &Rig, bus: &str, target: &str, address: &str) -> DiskSpec {
    let path = rig.lab.path(&format!("{target}.img"));
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let xml = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/>\
         <source file='{}'/><target dev='{target}' bus='{bus}'/>{address}</disk>",
        path.display()
    );
    DiskSpec::raw_xml(target, &xml)
}

#[test]
fn a_disk_is_the_same_disk_whether_its_vm_is_on_or_off() {
    let mut rig = Rig::start();
    let at = |name: &str| rig.lab.path(name);
    let create = |options: &str, path: &Path| {
        tool("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-o", options])
            .arg(path)
            .arg("4M")
            .run()
            .unwrap();
    };
    std::fs::create_dir(at("sub")).unwrap();
    create("compat=1.1", &at("base.qcow2"));
    create(
        "backing_file=../base.qcow2,backing_fmt=qcow2",
        &at("sub/mid.qcow2"),
    );
    create(
        "backing_file=sub/mid.qcow2,backing_fmt=qcow2",
        &at("top.qcow2"),
    );
    let lsi = "<controller type='scsi' index='3' model='lsilogic'/>";
    let on_lsi = "<address type='drive' controller='3' bus='0' target='0' unit='2'/>";
    let vm = rig
        .lab
        .vm("web01")
        .disk(DiskSpec::existing("vda", &at("top.qcow2"), "qcow2"))
        .disk(DiskSpec::qcow2("vdab", MIB).serial("S1"))
        .disk(DiskSpec::qcow2("vdc", MIB).data_file())
        .disk(DiskSpec::qcow2("vdd", MIB).compat_v2())
        .disk(DiskSpec::raw("vde", MIB))
        .disk(DiskSpec::raw("sda", MIB))
        .disk(DiskSpec::raw("hdb", MIB))
        .disk(raw_disk(&rig, "ide", "hdc", ""))
        .disk(raw_disk(&rig, "scsi", "sdr", on_lsi))
        .device(lsi)
        .define()
        .unwrap();
    let off = rig.observe(&vm);
    assert_eq!(off.run_state, RunState::Off);
    assert!(!off.expects_records);
    vm.start().unwrap();
    let on = rig.observe(&vm);
    assert_eq!(off.disks.len(), 9);
    for (off, on) in off.disks.iter().zip(&on.disks) {
        assert_eq!(identity(off), identity(on));
    }
    vm.destroy().unwrap();
    let again = rig.observe(&vm);
    for (off, again) in off.disks.iter().zip(&again.disks) {
        assert_eq!(identity(off), identity(again));
    }
}

#[test]
fn a_disk_on_usb_is_the_same_disk_whether_its_vm_is_on_or_off() {
    let mut rig = Rig::start();
    let path = rig.lab.path("stick.img");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let xml = format!(
        "<domain type='qemu'><name>web01</name><memory unit='MiB'>16</memory>\
         <os><type arch='x86_64' machine='pc'>hvm</type></os><devices>\
         <controller type='usb' model='qemu-xhci'/>\
         <disk type='file' device='disk'><driver name='qemu' type='raw'/>\
         <source file='{}'/><target dev='sdq' bus='usb'/></disk></devices></domain>",
        path.display()
    );
    rig.lab.define(&xml).unwrap();
    let found = rig.driver.find("web01").unwrap();
    let off = rig.driver.observe(&found).unwrap();
    rig.lab.virsh(&["start", "web01", "--paused"]).unwrap();
    let on = rig.driver.observe(&found).unwrap();
    assert_eq!(identity(&off.disks[0]), identity(&on.disks[0]));
}

#[test]
fn a_mark_made_off_is_told_to_libvirt_when_the_vm_runs_and_removed_when_it_is_off() {
    let mut rig = Rig::start();
    let vm = rig.lab.vm("web01").disk(DiskSpec::qcow2("vda", 16 * MIB));
    let vm = vm.define().unwrap();
    let order = rig.order(&vm, &[("vda", None)]);
    let begun = rig.driver.begin(&order).unwrap();
    assert_eq!(begun.consistency, Consistency::Offline);
    rig.driver.end(&order).unwrap();
    let mark = order.new_mark.clone().unwrap();
    assert_eq!(vm.checkpoints().unwrap(), [] as [String; 0]);
    vm.start().unwrap();
    vm.write("vda", "write -P 7 1M 64k").unwrap();
    let told = MarkOrder::Redefine(Redefinition {
        name: mark.name.clone(),
        nonce: mark.nonce,
        created_s: begun.mark_created_s.unwrap(),
        disks: vec!["vda".to_owned()],
    });
    let found = rig.find(&vm);
    rig.driver.mark(&found, &told).unwrap();
    let next = rig.order(&vm, &[("vda", Some(&mark.name))]);
    let begun = rig.driver.begin(&next).unwrap();
    assert_eq!(dirty_ranges(&begun.exports[0]), [(1 << 20, 64 << 10)]);
    rig.driver.end(&next).unwrap();
    let newer = next.new_mark.clone().unwrap().name;
    vm.destroy().unwrap();
    // Off, libvirt is not told, and knows both.
    rig.driver.mark(&found, &told).unwrap();
    assert_eq!(vm.checkpoints().unwrap().len(), 2);
    let last = rig.order(&vm, &[("vda", Some(&newer))]);
    let begun = rig.driver.begin(&last).unwrap();
    assert_eq!(dirty_ranges(&begun.exports[0]), []);
    rig.driver.end(&last).unwrap();
    rig.remove(&vm, &mark.name);
    rig.remove(&vm, &newer);
    rig.remove(&vm, &newer);
    assert_eq!(vm.checkpoints().unwrap(), [] as [String; 0]);
    let left = last.new_mark.clone().unwrap().name;
    assert_eq!(names(&vm), [left.to_string()]);
    vm.start().unwrap();
    assert_only_marks_in_image(&mut rig, &vm, &left);
}

fn names(vm: &Vm) -> Vec<String> {
    let bitmaps = vm.bitmaps("vda").unwrap().into_iter();
    bitmaps.map(|bitmap| bitmap.name).collect()
}

fn assert_only_marks_in_image(rig: &mut Rig, vm: &Vm, mark: &MarkName) {
    let bitmap = rig.bitmap(vm, "vda", mark).unwrap();
    assert!(bitmap.recording && !bitmap.inconsistent, "{bitmap:?}");
}

#[test]
fn a_vm_that_libvirt_starts_in_mid_session_starts_at_once_and_its_mark_can_be_removed() {
    let mut rig = Rig::start();
    let vm = rig.lab.vm("web01").disk(DiskSpec::qcow2("vda", 16 * MIB));
    let vm = vm.define().unwrap();
    let order = rig.order(&vm, &[("vda", None)]);
    rig.driver.begin(&order).unwrap();
    rig.driver.check(&order.vm, order.session).unwrap();
    vm.start().unwrap();
    assert!(rig.driver.is_alarmed(order.session));
    let lost = rig.driver.check(&order.vm, order.session).unwrap_err();
    assert_eq!(lost.kind, ErrorKind::SessionLost, "{lost:?}");
    rig.driver.end(&order).unwrap();
    let mark = order.new_mark.clone().unwrap().name;
    assert_only_marks_in_image(&mut rig, &vm, &mark);
    rig.remove(&vm, &mark);
    assert_only_marks(&rig, &vm, &order, &[]);
    vm.destroy().unwrap();
    let mut held = rig.order(&vm, &[("vda", None)]);
    held.when_started = WhenStarted::Hold;
    rig.driver.begin(&held).unwrap();
    assert!(vm.start().is_err());
    rig.driver.check(&held.vm, held.session).unwrap();
    rig.driver.end(&held).unwrap();
    vm.start().unwrap();
}

#[test]
fn a_saved_vm_is_backed_up_as_after_a_power_cut_and_its_saved_state_is_not_harmed() {
    let mut rig = Rig::start();
    let vm = rig.lab.vm("web01").disk(DiskSpec::qcow2("vda", 16 * MIB));
    let vm = vm.start().unwrap();
    let old = rig.leave_mark(&vm, &["vda"]).name;
    vm.write("vda", "write -P 7 1M 64k").unwrap();
    rig.lab.virsh(&["managedsave", "web01"]).unwrap();
    let order = rig.order(&vm, &[("vda", Some(&old))]);
    let begun = rig.driver.begin(&order).unwrap();
    assert_eq!(begun.consistency, Consistency::Crash);
    assert!(begun.warnings[0].contains("saved"), "{begun:?}");
    assert_eq!(dirty_ranges(&begun.exports[0]), [(1 << 20, 64 << 10)]);
    rig.driver.end(&order).unwrap();
    let error = rig.driver.start_paused(&order.vm).unwrap_err();
    assert_eq!(error.kind, ErrorKind::WrongState, "{error:?}");
    // Goes on from where it was saved.
    vm.start().unwrap();
    let new = order.new_mark.clone().unwrap().name;
    for mark in [&old, &new] {
        assert_only_marks_in_image(&mut rig, &vm, mark);
    }
    vm.write("vda", "write -P 8 5M 64k").unwrap();
    vm.destroy().unwrap();
    let next = rig.order(&vm, &[("vda", Some(&new))]);
    let begun = rig.driver.begin(&next).unwrap();
    assert_eq!(begun.consistency, Consistency::Offline);
    assert_eq!(dirty_ranges(&begun.exports[0]), [(5 << 20, 64 << 10)]);
    rig.driver.end(&next).unwrap();
}

#[test]
fn an_encrypted_disk_of_a_vm_that_is_off_is_refused_with_the_way_out() {
    let mut rig = Rig::start();
    let image = rig.lab.path("luks.qcow2");
    let encryption = make_luks(&rig.lab, &image);
    let xml = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
         <source file='{}'>{encryption}</source><target dev='vda' bus='virtio'/></disk>",
        image.display()
    );
    let vm = rig.lab.vm("web01").disk(DiskSpec::raw_xml("vda", &xml));
    let vm = vm.define().unwrap();
    let facts = rig.observe(&vm);
    let disk = disk_facts(&facts, "vda");
    assert!(disk.encrypted);
    let RootNode::Unknown(why) = &disk.root_node else {
        panic!("{disk:?}")
    };
    assert!(why.contains("--start-paused"), "{why}");
    let order = rig.order(&vm, &[("vda", None)]);
    let error = rig.driver.begin(&order).unwrap_err();
    assert!(error.because[0].contains("encrypted"), "{error:?}");
}

#[test]
fn a_vm_started_for_its_backup_is_shut_off_again_with_its_bitmaps_stored() {
    let mut rig = Rig::start();
    let vm = rig.lab.vm("web01").disk(DiskSpec::qcow2("vda", 16 * MIB));
    let vm = vm.define().unwrap();
    let before = rig.observe(&vm).definition;
    let found = rig.find(&vm);
    assert!(!rig.driver.stop_if_started(&found).unwrap());
    rig.driver.start_paused(&found).unwrap();
    assert_eq!(rig.observe(&vm).run_state, RunState::Paused);
    assert_eq!(rig.observe(&vm).definition, before);
    rig.driver.start_paused(&found).unwrap_err();
    let mark = rig.leave_mark(&vm, &["vda"]).name;
    assert!(rig.driver.stop_if_started(&found).unwrap());
    assert_eq!(rig.observe(&vm).run_state, RunState::Off);
    assert_only_marks_in_image(&mut rig, &vm, &mark);
    assert_eq!(rig.observe(&vm).definition, before);
}

#[test]
fn whoever_finds_a_vm_that_a_dead_backup_started_shuts_it_off_and_no_other() {
    let mut rig = Rig::start();
    let vm = rig.lab.vm("web01").disk(DiskSpec::qcow2("vda", 16 * MIB));
    let vm = vm.define().unwrap();
    let found = rig.find(&vm);
    let places = [rig.lab.path("run"), rig.lab.path("scratch")];
    rig.driver.start_paused(&found).unwrap();
    let mut stranger = rig.stranger();
    let swept = stranger.sweep(&found, &places).unwrap();
    assert!(swept.warnings[0].contains("shut off again"), "{swept:?}");
    assert_eq!(vm.state().unwrap(), "shut off");
    // Somebody has resumed it, and stopped it again: it is theirs.
    rig.driver.start_paused(&found).unwrap();
    for action in ["resume", "suspend"] {
        rig.lab.virsh(&[action, "web01"]).unwrap();
    }
    let swept = stranger.sweep(&found, &places).unwrap();
    assert!(swept.warnings.is_empty(), "{swept:?}");
    assert!(!stranger.stop_if_started(&found).unwrap());
    assert_eq!(vm.state().unwrap(), "paused");
    vm.destroy().unwrap();
    // One that a person has started paused bears no sign.
    rig.lab.virsh(&["start", "web01", "--paused"]).unwrap();
    stranger.sweep(&found, &places).unwrap();
    assert!(!stranger.stop_if_started(&found).unwrap());
    assert_eq!(vm.state().unwrap(), "paused");
}
