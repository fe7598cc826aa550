//! Tracking that was lost, re-made, or is about another disk.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{DiskSpec, MIB, tool};

use super::{Story, add_bitmap};
use crate::support::Bed;

/// qmpbackup V1: after a crash the bitmap is absent; whoever makes it anew
/// under the same name has lost all that was written before. A row of the table;
/// its test is made there.
pub(crate) fn v1_a_bitmap_re_made_after_a_crash_by_another_tool_is_not_believed() -> Result<()> {
    let mut story = Story::of_one_disk()?;
    story.backup("full: first-backup")?;
    let mark = story.vm.checkpoints()?.remove(0);
    story.vm.write("vda", "write -P 2 8M 1M")?;
    story.vm.flush("vda")?;
    story.vm.kill_qemu()?;
    story.vm.start()?;
    story.vm.write("vda", "write -P 3 10M 64k")?;
    add_bitmap(&story.vm, "vda", &mark, true)?;
    story.vm.write("vda", "write -P 4 12M 64k")?;
    story.backup("rescan: mark-remade")?;
    story.vm.write("vda", "write -P 5 14M 64k")?;
    story.backup("incremental")?;
    story.all_points_are_right()?;
    story.bed.assert_tidy(&story.vm, 1)
}

/// qmpbackup V3: an inconsistent bitmap makes every following backup fail until
/// somebody removes it by hand.
#[test]
fn v3_an_inconsistent_bitmap_costs_one_rescan_however_often_it_happens() -> Result<()> {
    let mut story = Story::of_one_disk()?;
    story.backup("full: first-backup")?;
    for round in 2..4 {
        // Stored, opened again, and then not closed.
        story.vm.destroy()?;
        story.vm.start()?;
        let write = format!("write -P {round} {round}M 1M");
        story.vm.write("vda", &write)?;
        story.vm.flush("vda")?;
        story.vm.kill_qemu()?;
        story.vm.start()?;
        story.backup("rescan: bitmap-inconsistent")?;
        story.vm.write("vda", "write -P 9 9M 64k")?;
        story.backup("incremental")?;
    }
    story.all_points_are_right()?;
    story.bed.assert_tidy(&story.vm, 1)
}

/// qmpbackup V7: the disk is rolled back to an older copy, in place and behind
/// every tool's back; a bitmap whose name is used for ever still matches.
#[test]
fn v7_a_disk_rolled_back_behind_our_back_is_never_read_by_the_wrong_mark() -> Result<()> {
    let mut story = Story::of_one_disk()?;
    story.backup("full: first-backup")?;
    story.vm.write("vda", "write -P 2 8M 1M")?;
    story.vm.destroy()?;
    let image = story.vm.image("vda");
    let older = image.with_extension("older");
    fs::copy(&image, &older)?;
    story.vm.start()?;
    story.vm.write("vda", "write -P 3 9M 1M")?;
    story.backup("incremental")?;
    story.vm.write("vda", "write -P 4 2M 1M")?;
    story.vm.destroy()?;
    // The same inode: only what is in it is older.
    let cat = tool("cp").arg("--no-target-directory");
    cat.arg(&older).arg(&image).run()?;
    story.vm.start()?;
    story.vm.write("vda", "write -P 5 3M 64k")?;
    story.backup("rescan: bitmap-missing")?;
    story.vm.write("vda", "write -P 6 4M 64k")?;
    story.backup("incremental")?;
    story.all_points_are_right()?;
    story.bed.assert_tidy(&story.vm, 1)
}

/// qmpbackup V7, the copy being younger than the last backup: its bitmap goes
/// with its data, so the increment is right.
#[test]
fn v7_a_copy_made_since_the_last_backup_brings_its_own_truth() -> Result<()> {
    let mut story = Story::of_one_disk()?;
    story.backup("full: first-backup")?;
    story.vm.write("vda", "write -P 2 8M 1M")?;
    story.vm.destroy()?;
    let image = story.vm.image("vda");
    let copy = image.with_extension("copy");
    fs::copy(&image, &copy)?;
    story.vm.start()?;
    story.vm.write("vda", "write -P 3 9M 1M")?;
    story.vm.destroy()?;
    tool("cp").arg(&copy).arg(&image).run()?;
    story.vm.start()?;
    story.vm.write("vda", "write -P 5 3M 64k")?;
    story.backup("incremental")?;
    story.all_points_are_right()?;
    story.bed.assert_tidy(&story.vm, 1)
}

/// qmpbackup V8: two data disks are taken out and put back in swapped order,
/// both with the parent's bitmap; whoever goes by the order takes one for the
/// other.
#[test]
fn v8_two_disks_put_back_in_swapped_order_are_each_told_for_what_they_are() -> Result<()> {
    let bed = Bed::start()?;
    let mut vm = bed.lab.vm("web01").disk(DiskSpec::qcow2("sda", 2 * MIB));
    for target in ["sdb", "sdc"] {
        vm = vm.disk(DiskSpec::qcow2(target, 8 * MIB));
    }
    let vm = vm.start()?;
    vm.write("sdb", "write -P 2 0 4M")?;
    vm.write("sdc", "write -P 3 0 4M")?;
    let mut story = Story::new(bed, vm, &["sda", "sdb", "sdc"]);
    story.backup("full: first-backup")?;
    for target in ["sdb", "sdc"] {
        story.vm.detach(target)?;
    }
    for (target, image) in [("sdb", "sdc"), ("sdc", "sdb")] {
        let image = story.vm.image(image);
        attach(&story, target, image.to_str().context("text")?)?;
    }
    story.vm.write("sdb", "write -P 4 5M 64k")?;
    story.vm.flush("sdb")?;
    story.vm.flush("sdc")?;
    let report = story.bed.backup(&story.vm, &[])?;
    for target in ["sdb", "sdc"] {
        let seen = crate::support::mode(&report, target);
        ensure!(seen == "full: chain-changed", "{target}: {seen}");
    }
    let dir = story
        .bed
        .restore("web01", "swapped", &["--format", "raw"])?;
    for (device, image) in [("sda", "sda"), ("sdb", "sdc"), ("sdc", "sdb")] {
        let raw = crate::support::reference(&story.bed, &story.vm, image, "now.raw")?;
        crate::support::assert_same(&raw, &dir.join(format!("{device}.raw")))?;
    }
    story.all_points_are_right()?;
    story.bed.assert_tidy(&story.vm, 1)
}

fn attach(story: &Story, target: &str, image: &str) -> Result<()> {
    let file = story.bed.lab.path("swapped.xml");
    let element = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/>\
         <source file='{image}'/><target dev='{target}' bus='scsi'/></disk>"
    );
    fs::write(&file, element)?;
    let file = file.to_str().context("text")?;
    let attach = ["attach-device", "web01", file, "--live"];
    story.bed.lab.virsh(&attach).map(drop)
}
