//! Runs that end badly, and objects that get lost: no hole between points.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::tool;

use super::{Story, signal};
use crate::processes::mover_of;
use crate::support::{Bed, assert_same, disk, mode, wait_for_job, write_noise};

const KIB: u64 = 1 << 10;

/// virtnbdbackup finding 2: an increment of the VM that is off is stored under
/// the name of the increment before, and overwrites it.
#[test]
fn finding_2_a_vm_that_is_off_costs_no_earlier_point() -> Result<()> {
    let mut story = Story::of_one_disk()?;
    story.backup("full: first-backup")?;
    story.vm.write("vda", "write -P 2 8M 1M")?;
    story.backup("incremental")?;
    story.vm.destroy()?;
    let change = ["-f", "qcow2", "-c", "write -P 3 9M 1M"];
    tool("qemu-io")
        .args(change)
        .arg(story.vm.image("vda"))
        .run()?;
    let report = story.bed.backup(&story.vm, &[])?;
    ensure!(mode(&report, "vda") == "incremental", "{report}");
    // What was written while it was off, and nothing that was there before.
    ensure!(
        disk(&report, "vda")["dirty_bytes"] == 1024 * KIB,
        "{report}"
    );
    story.all_points_are_right()?;
    story.vm.start()?;
    let report = story.backup("incremental")?;
    ensure!(disk(&report, "vda")["dirty_bytes"] == 0, "{report}");
    story.all_points_are_right()?;
    story.bed.assert_tidy(&story.vm, 1)
}

/// virtnbdbackup finding 3: an increment killed in mid transfer keeps its
/// checkpoint; with level auto the next one starts there, and the guest's writes
/// before it are in no backup.
#[test]
fn finding_3_what_a_killed_increment_would_have_held_is_in_the_next() -> Result<()> {
    let mut story = Story::of_one_disk()?;
    story.backup("full: first-backup")?;
    for by in ["-KILL", "-TERM"] {
        write_noise(&story.bed, &story.vm, "vda", 8, 20)?;
        let args = ["backup", "web01", "-l", "auto"];
        let mut child = story.bed.spawn_slow(&args)?;
        wait_for_job(&story.vm)?;
        story.vm.write("vda", "write -P 5 60M 64k")?;
        signal(by, mover_of(&child)?)?;
        ensure!(!child.wait()?.success(), "it ended before it was killed");
        story.vm.write("vda", "write -P 6 61M 64k")?;
        let report = story.backup_as(&["-l", "auto"], "incremental")?;
        let dirty = disk(&report, "vda")["dirty_bytes"].as_u64();
        ensure!(dirty == Some((20 * 1024 + 128) * KIB), "{report}");
        story.bed.assert_tidy(&story.vm, 1)?;
    }
    story.all_points_are_right()
}

fn files(folder: &Path) -> Result<BTreeSet<PathBuf>> {
    let list = tool("find").arg(folder).args(["-type", "f"]).run()?;
    Ok(list.lines().map(PathBuf::from).collect())
}

/// virtnbdbackup finding 4: a restore takes the increments in the order of
/// their files' times, and never asks whether one is missing.
#[test]
fn finding_4_a_lost_object_or_a_changed_time_never_gives_a_wrong_disk() -> Result<()> {
    let mut story = Story::of_one_disk()?;
    story.backup("full: first-backup")?;
    let mut middle = BTreeSet::new();
    for round in 2..5 {
        let before = files(&story.bed.repo())?;
        let write = format!("write -P {round} {round}M 1M");
        story.vm.write("vda", &write)?;
        story.backup("incremental")?;
        if round == 3 {
            middle = &files(&story.bed.repo())? - &before;
        }
    }
    for (age, file) in files(&story.bed.repo())?.iter().enumerate() {
        // Neither the order in which they were made nor its reverse.
        let date = format!("2020-01-{:02}", age * 7 % 28 + 1);
        tool("touch").args(["-d", &date]).arg(file).run()?;
    }
    story.all_points_are_right()?;
    // Manifest, packs and index of the one in the middle, each in its turn.
    ensure!(middle.len() >= 3, "{middle:?}");
    for lost in &middle {
        let away = story.bed.lab.path("away");
        fs::rename(lost, &away)?;
        let right = right_or_refused(&story).with_context(|| lost.display().to_string())?;
        let is_manifest = lost.starts_with(story.bed.repo().join("points"));
        // No point but its own depends on a manifest.
        ensure!(!is_manifest || right == 3, "{right} without {lost:?}");
        fs::rename(&away, lost)?;
    }
    story.all_points_are_right()
}

/// Restores all points; each must be right or refused. Says how many are right.
fn right_or_refused(story: &Story) -> Result<usize> {
    let mut right = 0;
    for taken in &story.points {
        let to = story.bed.lab.path("maybe.raw");
        let place = to.to_str().context("a path is text")?;
        let args = ["restore", &taken.point, "-d", "vda", "--to", place];
        let output = story.bed.output(&args)?;
        if output.status.success() {
            assert_same(&taken.disks[0].1, &to)?;
            fs::remove_file(&to)?;
            right += 1;
        }
        ensure!(!to.exists(), "a refused restore left a file");
    }
    Ok(right)
}

/// Flips a bit in the middle of the largest pack, which holds chunks: what the
/// restore needs before it meets them is whole.
fn damage(bed: &Bed) -> Result<()> {
    let packs = files(&bed.repo().join("packs"))?;
    let length = |pack: &&PathBuf| fs::metadata(pack).map_or(0, |found| found.len());
    let pack = packs.iter().max_by_key(length).context("no pack")?;
    let mut bytes = fs::read(pack)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    Ok(fs::write(pack, bytes)?)
}

/// virtnbdbackup finding 5: a bad frame is logged, the restore goes on, ends
/// with 0 and defines the VM.
#[test]
fn finding_5_a_bad_chunk_ends_a_restore_with_20_and_nothing_is_left_or_defined() -> Result<()> {
    let mut story = Story::of_one_disk()?;
    write_noise(&story.bed, &story.vm, "vda", 8, 4)?;
    story.backup("full: first-backup")?;
    damage(&story.bed)?;
    let domains = story.bed.lab.virsh(&["list", "--all", "--name"])?;
    for compressed in [false, true] {
        let to = story.bed.lab.path("out");
        let place = to.to_str().context("a path is text")?;
        let format = if compressed { "qcow2" } else { "raw" };
        let args = ["restore", "web01", "--to", place, "--format", format];
        let (code, told) = story.bed.fail(&args)?;
        ensure!(code == 20, "{code}: {told}");
        ensure!(files(&to).is_ok_and(|left| left.is_empty()) || !to.exists());
    }
    let after = story.bed.lab.virsh(&["list", "--all", "--name"])?;
    ensure!(domains == after, "{after}");
    let (code, told) = story.bed.fail(&["verify", "--read-data"])?;
    ensure!(code == 20, "{code}: {told}");
    Ok(())
}

/// virtnbdbackup finding 8: when tracking is lost, a full is stored on top of
/// the old chain, and where it is zero the older data shows through.
#[test]
fn finding_8_nothing_stale_shows_through_after_tracking_was_lost() -> Result<()> {
    let mut story = Story::of_one_disk()?;
    story.vm.write("vda", "write -P 0xaa 0 16M")?;
    story.backup("full: first-backup")?;
    story.vm.write("vda", "write -P 0xbb 4M 4M")?;
    story.backup("incremental")?;
    let zeroing = ["write -z 1M 1M", "discard 5M 1M", "write -z -u 12M 2M"];
    story.vm.write_all("vda", &zeroing.map(str::to_owned))?;
    story.vm.flush("vda")?;
    story.vm.kill_qemu()?;
    story.vm.start()?;
    story.backup("rescan: bitmap-missing")?;
    story.vm.write("vda", "discard 0 1M")?;
    story.backup("incremental")?;
    story.all_points_are_right()?;
    story.bed.assert_tidy(&story.vm, 1)
}
