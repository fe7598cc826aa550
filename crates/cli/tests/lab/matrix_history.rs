//! Histories: long ones, quick ones, ones with holes, and those of several VMs
//! in one repository.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{DiskSpec, KIB, MIB, Vm, tool};
use serde_json::Value;

use crate::matrix::{Reading, Subject, check, take, write_to};
use crate::support::{Bed, mode, point};

fn subject(vm: &Vm, target: &str, size_bytes: u64) -> Result<Subject> {
    let reading = Reading::Image(vm.image(target), "qcow2");
    Subject::new(target, size_bytes, reading, "incremental")
}

#[test]
fn each_of_forty_increments_comes_back() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 3 * MIB + 512))
        .start()?;
    let mut subjects = [subject(&vm, "vda", 3 * MIB + 512)?];
    let mut points = Vec::new();
    for number in 0..41 {
        subjects[0].write(&vm, 4)?;
        let (taken, report) = take(&bed, &vm, &[], &subjects)?;
        let expected = if number == 0 {
            "full: first-backup"
        } else {
            "incremental"
        };
        assert_eq!(mode(&report, "vda"), expected, "{report}");
        points.push(taken);
    }
    for taken in &points {
        check(&bed, taken)?;
    }
    bed.assert_tidy(&vm, 1)
}

#[test]
fn a_point_comes_back_when_the_manifests_of_all_others_are_gone() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 3 * MIB))
        .disk(DiskSpec::qcow2("vdb", 3 * MIB))
        .start()?;
    let mut subjects = [subject(&vm, "vda", 3 * MIB)?, subject(&vm, "vdb", 3 * MIB)?];
    let mut points = Vec::new();
    for _ in 0..6 {
        write_to(&vm, &mut subjects, 12)?;
        points.push(take(&bed, &vm, &[], &subjects)?.0);
    }
    let kept = &points[3];
    for manifest in manifests(&bed)? {
        if !manifest.to_string_lossy().contains(&kept.point[3..]) {
            fs::remove_file(manifest)?;
        }
    }
    check(&bed, kept)?;
    // The newest mark has no manifest now, and the kept point's mark is gone.
    for expected in ["rescan: bitmap-missing", "incremental"] {
        subjects[0].write(&vm, 4)?;
        let (taken, report) = take(&bed, &vm, &[], &subjects)?;
        assert_eq!(mode(&report, "vda"), expected, "{report}");
        check(&bed, &taken)?;
    }
    check(&bed, kept)?;
    bed.assert_tidy(&vm, 1)
}

fn manifests(bed: &Bed) -> Result<Vec<std::path::PathBuf>> {
    let mut found = Vec::new();
    for vm in fs::read_dir(bed.repo().join("points"))? {
        for manifest in fs::read_dir(vm?.path())? {
            found.push(manifest?.path());
        }
    }
    ensure!(found.len() > 1, "{found:?}");
    Ok(found)
}

#[test]
fn two_backups_within_a_second_are_two_points_in_their_order() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", MIB))
        .start()?;
    let mut subjects = [subject(&vm, "vda", MIB)?];
    let second = |report: &Value| -> Result<String> {
        let shown: Value = serde_json::from_str(&bed.run(&["show", &point(report), "--json"])?)?;
        let taken_at = shown["taken_at"].as_str().context("a time")?;
        Ok(taken_at.chars().take("2026-11-20T03:00:00".len()).collect())
    };
    // On a slow machine a pair may lie on both sides of a second's end.
    for attempt in 0..20 {
        subjects[0].write(&vm, 2)?;
        let (first, first_report) = take(&bed, &vm, &[], &subjects)?;
        subjects[0].write(&vm, 2)?;
        let (then, then_report) = take(&bed, &vm, &[], &subjects)?;
        if second(&first_report)? != second(&then_report)? {
            continue;
        }
        assert_eq!(mode(&then_report, "vda"), "incremental", "{then_report}");
        check(&bed, &first)?;
        check(&bed, &then)?;
        for (name, taken) in [("web01~1", &first), ("web01", &then)] {
            let shown: Value = serde_json::from_str(&bed.run(&["show", name, "--json"])?)?;
            assert_eq!(shown["point"], taken.point[3..], "attempt {attempt}");
        }
        return bed.assert_tidy(&vm, 1);
    }
    anyhow::bail!("no two backups began within one second")
}

#[test]
fn disks_of_one_name_on_two_vms_are_two_disks() -> Result<()> {
    let bed = Bed::start()?;
    let start = |name: &str| {
        let vm = bed.lab.vm(name).disk(DiskSpec::qcow2("vda", 2 * MIB));
        vm.disk(DiskSpec::qcow2("vdb", 3 * MIB)).start()
    };
    let vms = [start("web01")?, start("web02")?];
    let mut points = Vec::new();
    let mut subjects = Vec::new();
    for vm in &vms {
        subjects.push([subject(vm, "vda", 2 * MIB)?, subject(vm, "vdb", 3 * MIB)?]);
    }
    for round in 0..3 {
        for (number, (vm, subjects)) in vms.iter().zip(&mut subjects).enumerate() {
            // Otherwise both VMs would draw the same.
            write_to(vm, &mut *subjects, 5 + number)?;
            let (taken, report) = take(&bed, vm, &[], subjects)?;
            if round > 0 {
                assert_eq!(mode(&report, "vda"), "incremental", "{report}");
            }
            points.push(taken);
        }
    }
    for taken in &points {
        check(&bed, taken)?;
    }
    let newest = &points[points.len() - 2..];
    for (vm, taken) in vms.iter().zip(newest) {
        let shown: Value = serde_json::from_str(&bed.run(&["show", vm.name(), "--json"])?)?;
        assert_eq!(shown["point"], taken.point[3..]);
        bed.assert_tidy(vm, 1)?;
    }
    Ok(())
}

/// A copy of an image has the marks of the original in it.
#[test]
fn a_clone_with_the_marks_of_its_original_has_a_history_of_its_own() -> Result<()> {
    let bed = Bed::start()?;
    let original = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 2 * MIB))
        .start()?;
    let mut subjects = [subject(&original, "vda", 2 * MIB)?];
    subjects[0].write(&original, 10)?;
    bed.backup(&original, &[])?;
    original.destroy()?;
    let copy = bed.lab.path("clone.qcow2");
    fs::copy(original.image("vda"), &copy)?;
    original.start()?;
    let clone = bed
        .lab
        .vm("web02")
        .disk(DiskSpec::existing("vda", &copy, "qcow2"))
        .start()?;
    clone.write("vda", "write -P 77 1M 64k")?;
    clone.flush("vda")?;
    let of_clone = [subject(&clone, "vda", 2 * MIB)?];
    let (first, report) = take(&bed, &clone, &[], &of_clone)?;
    assert_eq!(mode(&report, "vda"), "full: first-backup", "{report}");
    assert_eq!(clone.bitmaps("vda")?.len(), 1);
    subjects[0].write(&original, 3)?;
    let (then, report) = take(&bed, &original, &[], &subjects)?;
    assert_eq!(mode(&report, "vda"), "incremental", "{report}");
    check(&bed, &first)?;
    check(&bed, &then)?;
    bed.assert_tidy(&clone, 1)?;
    bed.assert_tidy(&original, 1)
}

/// Linked clones share the image of a template, and the mark in it.
#[test]
fn a_linked_clone_leaves_the_mark_of_its_template_alone() -> Result<()> {
    let bed = Bed::start()?;
    let template = bed
        .lab
        .vm("template")
        .disk(DiskSpec::qcow2("vda", 2 * MIB))
        .start()?;
    let mut subjects = [subject(&template, "vda", 2 * MIB)?];
    subjects[0].write(&template, 10)?;
    let (of_template, _) = take(&bed, &template, &[], &subjects)?;
    template.destroy()?;
    let base = template.image("vda");
    let overlay = bed.lab.path("clone.qcow2");
    tool("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
        .args([&base, &overlay])
        .run()?;
    let before = fs::read(&base)?;
    let clone = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::existing("vda", &overlay, "qcow2"))
        .start()?;
    let mut of_clone = [subject(&clone, "vda", 2 * MIB)?];
    let mut points = vec![of_template];
    for expected in ["full: first-backup", "incremental", "incremental"] {
        of_clone[0].write(&clone, 5)?;
        let (taken, report) = take(&bed, &clone, &[], &of_clone)?;
        assert_eq!(mode(&report, "vda"), expected, "{report}");
        for list in ["healed", "warnings"] {
            assert_eq!(report[list], serde_json::json!([]), "{report}");
        }
        points.push(taken);
    }
    let told: Value = serde_json::from_str(&bed.run(&["doctor", "web01", "--json"])?)?;
    assert_eq!(told["findings"][0]["kind"], "other-vm", "{told:#}");
    assert_eq!(told["status"], "healthy", "{told:#}");
    let told: Value =
        serde_json::from_str(&bed.run(&["doctor", "web01", "--purge-marks", "--json"])?)?;
    assert_eq!(told["marks"][0]["verdict"], "other-vm", "{told:#}");
    clone.destroy()?;
    assert!(before == fs::read(&base)?, "the template was written to");
    template.start()?;
    subjects[0].write(&template, 3)?;
    let (taken, report) = take(&bed, &template, &[], &subjects)?;
    assert_eq!(mode(&report, "vda"), "incremental", "{report}");
    points.push(taken);
    for taken in &points {
        check(&bed, taken)?;
    }
    bed.assert_tidy(&template, 1)
}

/// QEMU answers a question about a map with at most this many ranges.
const EXTENTS_OF_ONE_REPLY: u64 = 131_072;
const BLOCK: u64 = 4 * KIB;

/// Writes every second block of the disk while the VM is off: as fast as no
/// guest could, and tracked like a guest's writes.
fn write_every_second_block(bed: &Bed, image: &Path, salt: u8) -> Result<()> {
    let source = bed.lab.path("every-second.raw");
    let file = fs::File::create(&source)?;
    let blocks = EXTENTS_OF_ONE_REPLY + 100;
    file.set_len(blocks * BLOCK)?;
    for block in (0..blocks).step_by(2) {
        let mut bytes = [salt; 4 << 10];
        bytes[..8].copy_from_slice(&block.to_le_bytes());
        file.write_all_at(&bytes, block * BLOCK)?;
    }
    let convert = tool("qemu-img").args(["convert", "-n", "--target-is-zero", "-S", "4k"]);
    let convert = convert.args(["-f", "raw", "-O", "qcow2"]);
    convert.arg(&source).arg(image).run()?;
    Ok(())
}

#[test]
fn a_disk_in_more_pieces_than_one_reply_can_name_comes_back() -> Result<()> {
    let bed = Bed::start()?;
    let size = (EXTENTS_OF_ONE_REPLY + 100) * BLOCK;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", size).cluster(BLOCK))
        .define()?;
    let subjects = [subject(&vm, "vda", size)?];
    let mut points = Vec::new();
    for salt in [1, 2] {
        write_every_second_block(&bed, &vm.image("vda"), salt)?;
        vm.start()?;
        let (taken, report) = take(&bed, &vm, &[], &subjects)?;
        if salt == 2 {
            assert_eq!(mode(&report, "vda"), "incremental", "{report}");
            let dirty = crate::support::disk(&report, "vda")["dirty_bytes"].as_u64();
            assert_eq!(dirty, Some(size / 2), "{report}");
        }
        points.push(taken);
        vm.destroy()?;
    }
    for taken in &points {
        check(&bed, taken)?;
    }
    Ok(())
}
