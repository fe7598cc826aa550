//! Restores every point and compares it: bytes, file system, files.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{DiskSpec, Numbering, compare_images, tool};

use crate::program::Show;
use crate::screen;
use crate::story::Point;
use crate::workshop::{DISKS, GUEST_PATIENCE, VM, Workshop, list_files};

/// Restores all points, oldest first, and compares both disks of each.
/// Returns the restored disks with the file systems.
pub(crate) fn restore_and_compare(
    shop: &Workshop,
    points: &[Point],
    busy: &Busy,
) -> Result<Vec<PathBuf>> {
    let mut restored = Vec::new();
    for (number, point) in (1..).zip(points) {
        let to = format!("restored-{number}");
        let id = format!("{VM}@{}", point.facts.id);
        let args = ["restore", &id, "--to", &to, "--format", "raw"];
        let answer = if number == 1 {
            Show::All
        } else {
            Show::LastLine
        };
        shop.program.run(&args, answer)?;
        let images = DISKS.map(|disk| shop.lab.path(&format!("{to}/{disk}.raw")));
        compare(number, point, &images)?;
        if number == 1 {
            let last = busy.check_blocks(&images[1])?;
            screen::checked(&format!(
                "vdb ends with block {last}: none before it is missing, none after it is there"
            ));
        }
        let [files, blocks] = images;
        // Labs lie in memory; what is compared makes room.
        for done in point.references.iter().chain([&blocks]) {
            std::fs::remove_file(done)?;
        }
        restored.push(files);
    }
    Ok(restored)
}

fn compare(number: usize, point: &Point, images: &[PathBuf; 2]) -> Result<()> {
    for ((disk, image), reference) in DISKS.iter().zip(images).zip(&point.references) {
        compare_images(reference, image)
            .with_context(|| format!("{disk} of point {number} is not what it was"))?;
    }
    tool("e2fsck")
        .arg("-fn")
        .arg(&images[0])
        .run()
        .with_context(|| format!("the file system of point {number} is damaged"))?;
    screen::checked(&format!(
        "point {number}: vda and vdb identical, byte for byte; e2fsck finds no fault"
    ));
    Ok(())
}

/// Boots a guest from the newest restored disk, mounts the older ones beside
/// it, and lets it hash all files anew.
pub(crate) fn boot_and_compare(
    shop: &Workshop,
    points: &[Point],
    restored: &[PathBuf],
    busy: &Busy,
) -> Result<usize> {
    let (newest, older) = restored.split_last().context("there are points")?;
    let mut vm = shop
        .lab
        .vm("restored")
        .disk(DiskSpec::existing("vda", newest, "raw"));
    for (image, letter) in older.iter().zip('b'..) {
        vm = vm.disk(DiskSpec::existing(&format!("vd{letter}"), image, "raw"));
    }
    let guest = vm.guest().start()?.guest()?;
    let mut files = 0;
    for (number, (point, letter)) in points.iter().zip('b'..).enumerate() {
        let root = if number + 1 == points.len() {
            "/data".to_owned()
        } else {
            let root = format!("/mnt/{}", number + 1);
            guest.run(&format!(
                "mkdir -p {root}; mount -o ro /dev/vd{letter} {root}"
            ))?;
            root
        };
        let found = guest.run_within(&list_files(&root), GUEST_PATIENCE)?;
        ensure!(
            found == point.files,
            "the files of point {} are not what they were",
            number + 1
        );
        files += found.lines().count();
        if number == 0 {
            files += busy.check_files(&guest, &root)?;
        }
    }
    guest.run("echo 'written after the restore' >/data/after && sync")?;
    Ok(files)
}

/// What was going on while the first backup ran.
pub(crate) struct Busy {
    pub(crate) numbering: Numbering,
    /// Blocks that were on the disk for certain before the backup began.
    pub(crate) blocks_before: u64,
    /// Blocks that could have been there when it had ended.
    pub(crate) blocks_after: u64,
    /// Files that were whole before the backup began.
    pub(crate) files_before: usize,
    pub(crate) files_after: usize,
}

impl Busy {
    fn check_blocks(&self, image: &Path) -> Result<u64> {
        self.numbering
            .check_prefix(&[image], self.blocks_before, self.blocks_after)
            .context("vdb of point 1 is no point in time")
    }

    /// Each line of the list was written after the file it names was, so a point
    /// in time that holds the line holds the file.
    fn check_files(&self, guest: &highwater_testkit::Guest, root: &str) -> Result<usize> {
        let said = guest.run(&format!("cd {root}/busy && sha256sum -c SUMS"))?;
        let files = said.lines().filter(|line| line.ends_with(": OK")).count();
        ensure!(
            (self.files_before..=self.files_after).contains(&files),
            "point 1 holds {files} of the files written meanwhile, which were {} to {}",
            self.files_before,
            self.files_after
        );
        Ok(files)
    }
}
