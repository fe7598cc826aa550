//! Disks that are left out, each with its reason; guests that are paused.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{DiskSpec, Vm, compare_images};
use serde_json::{Value, json};

use crate::support::{Bed, disk, mode, point};

const MIB: u64 = 1 << 20;

/// Like [`Bed::assert_tidy`] where the VM has nodes that the testkit knows no
/// image of.
fn assert_nothing_but_a_mark(bed: &Bed, vm: &Vm) -> Result<()> {
    let left = vm.leftovers(&bed.runtime().join("scratch"))?;
    ensure!(
        !left.job && left.exports.is_empty() && left.files.is_empty(),
        "{left:?}"
    );
    ensure!(left.checkpoints.len() == 1, "{left:?}");
    ensure!(vm.state()? == "running", "the guest is {}", vm.state()?);
    Ok(())
}

#[test]
fn what_is_left_out_is_named_with_its_reason() -> Result<()> {
    let bed = Bed::start()?;
    fs::File::create(bed.lab.path("cd.iso"))?.set_len(MIB)?;
    fs::File::create(bed.lab.path("floppy.img"))?.set_len(1440 << 10)?;
    let drive = |device: &str, file: &str, dev: &str, bus: &str| {
        let source = bed.lab.path(file);
        let xml = format!(
            "<disk type='file' device='{device}'><driver name='qemu' type='raw'/>\
             <source file='{}'/><target dev='{dev}' bus='{bus}'/></disk>",
            source.display()
        );
        DiskSpec::raw_xml(dev, &xml)
    };
    let empty = "<disk type='file' device='cdrom'><target dev='hdb' bus='ide'/></disk>";
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", MIB))
        .disk(DiskSpec::raw("vdb", MIB).element("<shareable/>"))
        .disk(DiskSpec::qcow2("vdc", MIB).element("<transient/>"))
        .disk(DiskSpec::raw("vdd", MIB).element("<readonly/>"))
        .disk(DiskSpec::qcow2("vde", MIB))
        .disk(drive("cdrom", "cd.iso", "hda", "ide"))
        .disk(DiskSpec::raw_xml("hdb", empty))
        .disk(drive("floppy", "floppy.img", "fda", "fdc"))
        .start()?;
    let report = bed.backup(&vm, &["-x", "vde"])?;
    assert_eq!(
        report["disks"].as_array().map(Vec::len),
        Some(1),
        "{report}"
    );
    let shown: Value = serde_json::from_str(&bed.run(&["show", &point(&report), "--json"])?)?;
    let text = bed.run(&["show", "web01"])?;
    let expected = [
        (
            "vdb",
            "shared with other VMs, so it has no single point in time",
        ),
        ("vdc", "transient: its content is thrown away at shutdown"),
        ("vdd", "read-only for the guest"),
        ("vde", "left out by the user"),
        ("hda", "a CD-ROM drive"),
        ("hdb", "a drive without a medium"),
        ("fda", "a floppy drive"),
    ];
    for (target, reason) in expected {
        let entry = json!({"disk": target, "reason": reason});
        let skipped = shown["skipped"].as_array().context("a list")?;
        assert!(skipped.contains(&entry), "no {entry} in {shown}");
        assert!(text.contains(&format!("{target}       {reason}")), "{text}");
    }
    assert_eq!(
        shown["skipped"].as_array().map(Vec::len),
        Some(expected.len())
    );
    let (code, stderr) = bed.fail(&["backup", "web01", "-d", "hda"])?;
    assert_eq!(code, 2, "{stderr}");
    assert!(
        stderr.contains("cannot back up disk `hda` of VM `web01`: a CD-ROM drive"),
        "{stderr}"
    );
    let (code, stderr) = bed.fail(&["backup", "web01", "-d", "vdz"])?;
    assert_eq!(code, 2, "{stderr}");
    assert!(
        stderr.contains("hint: its disks are: fda, hda, hdb, vda"),
        "{stderr}"
    );
    assert_nothing_but_a_mark(&bed, &vm)
}

#[test]
fn a_paused_vm_stays_paused_and_its_point_says_so() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB))
        .start()?;
    vm.write("vda", "write -P 1 1M 1M")?;
    bed.lab.virsh(&["suspend", "web01"])?;
    for expected in ["full: first-backup", "incremental"] {
        let report = bed.backup(&vm, &[])?;
        assert_eq!(mode(&report, "vda"), expected);
        assert_eq!(report["consistency"], "paused", "{report}");
        assert_eq!(vm.state()?, "paused");
    }
    let (code, stderr) = bed.fail(&["backup", "web01", "--quiesce", "require"])?;
    assert_eq!(code, 1, "{stderr}");
    assert!(
        stderr.contains("because: the VM is paused, so its agent cannot answer"),
        "{stderr}"
    );
    assert_eq!(vm.state()?, "paused");
    let dir = bed.restore("web01", "out", &[])?;
    compare_images(&vm.image("vda"), &dir.join("vda.qcow2"))?;
    bed.lab.virsh(&["resume", "web01"])?;
    vm.write("vda", "write -P 2 2M 64k")?;
    let report = bed.backup(&vm, &[])?;
    assert_eq!(report["consistency"], "crash");
    assert_eq!(disk(&report, "vda")["dirty_bytes"], 64 << 10);
    bed.assert_tidy(&vm, 1)
}

#[test]
fn a_required_freeze_without_an_agents_channel_fails_and_leaves_nothing() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB))
        .start()?;
    let (code, stderr) = bed.fail(&["backup", "web01", "--quiesce", "require"])?;
    assert_eq!(code, 1, "{stderr}");
    assert!(
        stderr.contains("cannot freeze the file systems of VM `web01`"),
        "{stderr}"
    );
    assert!(stderr.contains("hint: is the guest agent"), "{stderr}");
    bed.assert_tidy(&vm, 0)?;
    // Without the wish nobody is bothered about it at every backup.
    let report = bed.backup(&vm, &[])?;
    assert_eq!(report["warnings"], json!([]));
    Ok(())
}
