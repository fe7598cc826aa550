//! Places that cannot be written to: scratch files, and targets of a restore.

use std::fs;

use anyhow::{Context as _, Result, ensure};

use crate::scene::{Mount, Scene};
use crate::support::write_noise;

const MIB: u64 = 1 << 20;

const TIDIED: &str = "state: no restore point was added; earlier ones are untouched; the session at the VM was ended";

#[test]
fn a_scratch_directory_that_cannot_be_used_costs_nothing() -> Result<()> {
    let mut scene = Scene::start()?;
    let place = |name: &str| scene.bed.lab.path(name);
    fs::write(place("file"), "")?;
    fs::create_dir(place("ro"))?;
    let mounts = [
        Mount::read_only(&place("ro"))?,
        Mount::memory(&place("full"), 2 * MIB)?,
    ];
    for (name, lines) in [
        (
            "file/scratch",
            &[
                "error: cannot freeze a point in time of VM `web01`",
                "  because: cannot create directory `LAB/file/scratch/HASH`",
                "  because: Not a directory (os error 20)",
                TIDIED,
                "hint: choose another place with `--scratch-dir`",
            ][..],
        ),
        (
            "ro/scratch",
            &[
                "error: cannot freeze a point in time of VM `web01`",
                "  because: cannot create directory `LAB/ro/scratch/HASH`",
                "  because: Read-only file system (os error 30)",
                TIDIED,
                "hint: choose another place with `--scratch-dir`",
            ],
        ),
        (
            "full",
            &[
                "error: cannot freeze a point in time of VM `web01`",
                "  because: cannot use scratch directory `LAB/full/HASH`",
                "  because: it has 1.9 MiB free, and 16 MiB are needed",
                TIDIED,
                "hint: free some space, or choose another one with `--scratch-dir`",
            ],
        ),
    ] {
        let path = scene.bed.lab.path(name);
        let dir = path.to_str().context("a path is text")?;
        scene.refused(&["backup", "web01", "--scratch-dir", dir], 1, lines)?;
        scene.tidy()?;
    }
    ensure!(
        fs::read_dir(scene.bed.lab.path("full"))?.next().is_none(),
        "something was left"
    );
    scene.mounts.extend(mounts);
    // One that is not there yet is made.
    let new = scene.bed.lab.path("new/scratch");
    let dir = new.to_str().context("a path is text")?;
    scene.bed.backup(&scene.vm, &["--scratch-dir", dir])?;
    ensure!(fs::read_dir(&new)?.next().is_none(), "something was left");
    scene.vm.write("vda", "write -P 5 4M 64k")?;
    scene.unharmed()
}

#[test]
fn a_restore_to_a_bad_place_harms_nothing_there() -> Result<()> {
    let mut scene = Scene::start()?;
    write_noise(&scene.bed, &scene.vm, "vda", 32, 16)?;
    scene.bed.backup(&scene.vm, &[])?;
    let place = |name: &str| scene.bed.lab.path(name);
    fs::write(place("file"), "mine")?;
    fs::create_dir(place("there"))?;
    fs::write(place("there/vda.qcow2"), "mine too")?;
    fs::create_dir(place("ro"))?;
    let mounts = [
        Mount::read_only(&place("ro"))?,
        Mount::ext4(&place("full.img"), 8 * MIB, &[], &place("full"))?,
    ];
    let partial = "state: disks restored before are complete; the one under way was removed";
    for (to, lines) in [
        (
            "file",
            &[
                "error: cannot write LAB/file",
                "  because: File exists (os error 17)",
                partial,
                "hint: choose another place with --to",
            ][..],
        ),
        (
            "there",
            &[
                "error: cannot restore to LAB/there/vda.qcow2: it exists",
                "state: nothing was overwritten",
                "hint: choose another place, or move what is there away",
            ],
        ),
        (
            "file/below",
            &[
                "error: cannot write LAB/file/below",
                "  because: Not a directory (os error 20)",
                partial,
                "hint: choose another place with --to",
            ],
        ),
        (
            "ro/out",
            &[
                "error: cannot write LAB/ro/out",
                "  because: Read-only file system (os error 30)",
                partial,
                "hint: choose another place with --to",
            ],
        ),
        (
            "full/out",
            &[
                "error: cannot write LAB/full/out/vda.qcow2",
                "  because: No space left on device (os error 28)",
                partial,
                "hint: free some space there, or choose another place with --to",
            ],
        ),
    ] {
        let path = scene.bed.lab.path(to);
        let dir = path.to_str().context("a path is text")?;
        scene.refused(&["restore", "web01", "--to", dir], 1, lines)?;
    }
    ensure!(fs::read(place("file"))? == b"mine");
    ensure!(fs::read(place("there/vda.qcow2"))? == b"mine too");
    ensure!(fs::read_dir(place("there"))?.count() == 1);
    ensure!(fs::read_dir(place("ro"))?.next().is_none());
    ensure!(
        fs::read_dir(place("full/out"))?.next().is_none(),
        "something was left"
    );
    scene.mounts.extend(mounts);
    scene.vm.write("vda", "write -P 6 5M 64k")?;
    scene.unharmed()
}
