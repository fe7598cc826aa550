//! A repository that is full, unplugged or removed in the midst of a backup.

use std::cmp::Ordering;
use std::fs;
use std::path::Path;
use std::process::{Child, Output};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use highwater_testkit::{DiskSpec, tool};

use crate::scene::{Mount, Scene, message};
use crate::support::{Bed, assert_same, disk, mode, point, reference, write_noise};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
const PATIENCE: Duration = Duration::from_mins(1);

const TIDIED: &str = "state: no restore point was added; earlier ones are untouched; the session at the VM was ended";
const FREE: &str =
    "hint: free some space in the repository, then run `highwater backup web01` again";

/// A scene whose repository lies on a small ext4 file system of its own.
fn small(bytes: u64, options: &[&str]) -> Result<Scene> {
    let bed = Bed::without_repository()?;
    let image = bed.lab.path("small.img");
    let mount = Mount::ext4(&image, bytes, options, &bed.repo())?;
    bed.run(&["init", "--encryption", "none"])?;
    Scene::of(bed, vec![mount])
}

/// Takes all space of a file system but so many bytes.
fn fill_but(dir: &Path, left: u64) -> Result<()> {
    let ballast = dir.join("ballast");
    drop(fs::remove_file(&ballast));
    rustix::fs::sync();
    let file = fs::File::create(&ballast)?;
    let mut step = 16 * MIB;
    for _ in 0..200 {
        let room = rustix::fs::statvfs(dir)?;
        let free = room.f_bavail * room.f_frsize;
        let len = file.metadata()?.len();
        match free.cmp(&left) {
            Ordering::Equal => return Ok(()),
            Ordering::Less => file.set_len(len.saturating_sub(left - free))?,
            Ordering::Greater => {
                let more = (free - left).min(step);
                let whole = rustix::fs::FallocateFlags::empty();
                // The file system needs some of it for itself.
                if rustix::fs::fallocate(&file, whole, len, more).is_err() {
                    step = (step / 2).max(BLOCK);
                }
            }
        }
        file.sync_all()?;
    }
    Ok(())
}

#[test]
fn a_repository_that_fills_up_costs_one_backup_and_no_mark() -> Result<()> {
    let scene = small(160 * MIB, &[])?;
    write_noise(&scene.bed, &scene.vm, "vda", 64, 64)?;
    fill_but(&scene.bed.repo(), 20 * MIB)?;
    scene.refused(
        &["backup", "web01"],
        1,
        &[
            "error: cannot store the backup of VM `web01`",
            "  because: cannot go on after a failed upload",
            "  because: cannot write a pack",
            "  because: cannot write `tmp` in LAB/repo",
            "  because: No space left on device (os error 28)",
            TIDIED,
            FREE,
        ],
    )?;
    scene.tidy()?;
    fs::remove_file(scene.bed.repo().join("ballast"))?;
    scene.unharmed()
}

#[test]
fn no_space_for_index_or_manifest_costs_no_more() -> Result<()> {
    let scene = small(24 * MIB, &[])?;
    let repo = scene.bed.repo();
    // Makes the manifest some blocks long, so that each step meets it.
    let noise = ["-N", "20000", "-An", "-v", "-tx8", "/dev/urandom"];
    let noise = tool("od").args(noise).run()?;
    let words: Vec<&str> = noise.split_whitespace().collect();
    let tags: Vec<String> = words.chunks(5).map(<[&str]>::concat).collect();
    let mut backup = vec!["backup", "web01"];
    backup.extend(tags.iter().flat_map(|tag| ["--tag", tag]));
    let mut failed_at = Vec::new();
    for blocks in 0..64 {
        fill_but(&repo, blocks * BLOCK)?;
        let output = scene.bed.output(&backup)?;
        if output.status.success() {
            break;
        }
        let told = message(&scene.bed, &output.stderr);
        ensure!(output.status.code() == Some(1), "{told:#?}");
        let ends = [
            "  because: No space left on device (os error 28)",
            TIDIED,
            FREE,
        ];
        ensure!(told.ends_with(&ends.map(str::to_owned)), "{told:#?}");
        let object = told
            .iter()
            .find_map(|line| line.split_once("cannot write `"));
        let folder = object.and_then(|(_, rest)| rest.split(['/', '`']).next());
        // A pack gets its name when it is whole.
        failed_at.extend(folder.map(|folder| folder.replace("tmp", "packs")));
        scene.bed.assert_tidy(&scene.vm, 1)?;
    }
    failed_at.dedup();
    // Where the index fails depends on the blocks that the folders take.
    ensure!(
        failed_at.first().is_some_and(|first| first == "packs")
            && failed_at.last().is_some_and(|last| last == "points"),
        "it failed at {failed_at:?}"
    );
    fs::remove_file(repo.join("ballast"))?;
    scene.vm.write("vda", "write -P 4 2M 64k")?;
    scene.unharmed()
}

#[test]
fn a_repository_without_inodes_is_told_to_be_full() -> Result<()> {
    let scene = small(32 * MIB, &["-N", "700"])?;
    let ballast = scene.bed.repo().join("ballast");
    fs::create_dir(&ballast)?;
    let full = (0..).find_map(|number| fs::File::create(ballast.join(format!("{number}"))).err());
    ensure!(full.is_some_and(|error| error.raw_os_error() == Some(28)));
    let output = scene.bed.output(&["backup", "web01"])?;
    let told = message(&scene.bed, &output.stderr);
    ensure!(output.status.code() == Some(1), "{told:#?}");
    let ends = [
        "  because: No space left on device (os error 28)",
        TIDIED,
        FREE,
    ];
    ensure!(told.ends_with(&ends.map(str::to_owned)), "{told:#?}");
    scene.tidy()?;
    fs::remove_dir_all(&ballast)?;
    scene.unharmed()
}

/// Starts a backup that goes on for a while, and waits for its first pack.
fn midway(scene: &Scene) -> Result<Child> {
    write_noise(&scene.bed, &scene.vm, "vda", 64, 96)?;
    let packs = || packs_in(&scene.bed.repo());
    let before = packs()?;
    let mut child = scene.bed.spawn_slow(&["backup", "web01"])?;
    let end = Instant::now() + PATIENCE;
    while packs()? == before {
        ensure!(child.try_wait()?.is_none(), "it ended too early");
        ensure!(Instant::now() < end, "no pack came");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(child)
}

fn packs_in(repo: &Path) -> Result<usize> {
    let mut packs = 0;
    for folder in fs::read_dir(repo.join("packs"))? {
        packs += fs::read_dir(folder?.path())?.count();
    }
    Ok(packs)
}

/// Fails unless the backup ended for want of its repository, and well.
fn lost(scene: &Scene, output: &Output, because: &[&str]) -> Result<()> {
    let told = message(&scene.bed, &output.stderr);
    ensure!(
        output.status.code() == Some(1),
        "{}: {told:#?}",
        output.status
    );
    ensure!(
        told.first()
            .is_some_and(|line| line == "error: cannot store the backup of VM `web01`"),
        "{told:#?}"
    );
    let named = told
        .iter()
        .any(|line| because.iter().any(|part| line.contains(part)));
    ensure!(named, "none of {because:?} in {told:#?}");
    ensure!(told.contains(&TIDIED.to_owned()), "{told:#?}");
    ensure!(
        told.last().is_some_and(|line| line.starts_with("hint: ")
            && line.ends_with("then run `highwater backup web01` again")),
        "{told:#?}"
    );
    scene.bed.assert_tidy(&scene.vm, 1)
}

#[test]
fn a_repository_that_is_unplugged_costs_one_backup_and_no_mark() -> Result<()> {
    let mut scene = small(400 * MIB, &[])?;
    let child = midway(&scene)?;
    scene.mounts[0].unplug()?;
    let output = child.wait_with_output()?;
    lost(
        &scene,
        &output,
        &["os error 5", "os error 30", "os error 117"],
    )?;
    // Plugged in again: as a copy, since the labs of other tests may have the
    // dead one mounted, and keep it so.
    scene.mounts.clear();
    let dead = scene.bed.lab.path("small.img");
    let image = scene.bed.lab.path("copy.img");
    tool("cp").arg(&dead).arg(&image).run()?;
    scene.mounts.push(Mount::again(&image, &scene.bed.repo())?);
    scene.unharmed()
}

#[test]
fn a_repository_that_is_unmounted_is_not_made_anew_below() -> Result<()> {
    let mut scene = small(400 * MIB, &[])?;
    let child = midway(&scene)?;
    scene.mounts[0].detach()?;
    let output = child.wait_with_output()?;
    lost(&scene, &output, &["os error 2"])?;
    ensure!(fs::read_dir(scene.bed.repo())?.next().is_none());
    scene.mounts.clear();
    let image = scene.bed.lab.path("small.img");
    scene.mounts.push(Mount::again(&image, &scene.bed.repo())?);
    scene.unharmed()
}

#[test]
fn a_repository_that_is_removed_leaves_the_vm_as_it_was() -> Result<()> {
    let scene = Scene::start()?;
    let child = midway(&scene)?;
    fs::rename(scene.bed.repo(), scene.bed.lab.path("away"))?;
    let output = child.wait_with_output()?;
    lost(&scene, &output, &["os error 2"])?;
    ensure!(!scene.bed.repo().exists());
    let again = scene.bed.output(&["backup", "web01"])?;
    ensure!(again.status.code() == Some(10));
    fs::rename(scene.bed.lab.path("away"), scene.bed.repo())?;
    scene.unharmed()
}

#[test]
fn a_full_repository_fails_the_run_of_every_disk_and_none_loses_its_mark() -> Result<()> {
    let bed = Bed::without_repository()?;
    let image = bed.lab.path("small.img");
    let mount = Mount::ext4(&image, 96 * MIB, &[], &bed.repo())?;
    bed.run(&["init", "--encryption", "none"])?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 64 * MIB))
        .disk(DiskSpec::qcow2("vdb", 64 * MIB))
        .start()?;
    bed.backup(&vm, &[])?;
    write_noise(&bed, &vm, "vda", 0, 20)?;
    write_noise(&bed, &vm, "vdb", 8, 20)?;
    fill_but(&bed.repo(), 4 * MIB)?;
    let (code, stderr) = bed.fail(&["backup", "web01"])?;
    ensure!(code == 1 && stderr.contains(FREE), "{code}: {stderr}");
    bed.assert_tidy(&vm, 1)?;
    fs::remove_file(bed.repo().join("ballast"))?;
    let report = bed.backup(&vm, &[])?;
    let dir = bed.restore(&point(&report), "out", &["--format", "raw"])?;
    for target in ["vda", "vdb"] {
        ensure!(mode(&report, target) == "incremental", "{report}");
        ensure!(disk(&report, target)["dirty_bytes"] == 20 * MIB, "{report}");
        let raw = reference(&bed, &vm, target, &format!("{target}.ref"))?;
        assert_same(&raw, &dir.join(format!("{target}.raw")))?;
    }
    drop((vm, mount));
    Ok(())
}
