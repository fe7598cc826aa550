//! Restore after many increments, beside virtnbdrestore and qemu-img.

use std::path::Path;
use std::process::Command;

use anyhow::Result;
use highwater_testkit::{DiskSpec, GIB, KIB, Lab, compare_images};

use crate::bed::{self, Bed};
use crate::bound::{Limit, goal};
use crate::disk::{self, Blocks, Random};
use crate::measure::{self, Cost};
use crate::stage::{Part, Stage, take_turns};
use crate::table::{OURS, Table};

const DISK_BYTES: u64 = 4 * GIB;
const FILES_BYTES: u64 = GIB;
const INCREMENTS: usize = 30;
const WRITES: u64 = 400;
const WRITE_BYTES: u64 = 64 * KIB;
const WHAT: &str = "restore of the latest of 30 increments";
const PEER: &str = "virtnbdrestore";
const CONVERT: &str = "qemu-img convert -W of the disk's qcow2";

pub(super) fn run(stage: &mut Stage) -> Result<Part> {
    let lab = Lab::start()?;
    let template = lab.path("template.qcow2");
    let files_bytes =
        disk::qcow2_with_files(&lab, &template, DISK_BYTES, stage.scaled(FILES_BYTES))?;
    let changes = Changes {
        writes: stage.scaled(WRITES),
        within: files_bytes,
    };

    // Twins, one after the other: virtnbdbackup makes no increment where
    // another program's checkpoints are.
    let set = lab.path("theirs");
    let theirs = start(&lab, "web02", &template)?;
    theirs.theirs_backup(&set, "full", &["-z"])?;
    changes.with_each(&theirs, || {
        theirs.theirs_backup(&set, "inc", &["-z"]).map(drop)
    })?;

    let ours = start(&lab, "web01", &template)?;
    bed::remove(&template)?;
    let repo = ours.repository(lab.path("ours"))?;
    ours.backup(&repo, "full", &[])?;
    changes.with_each(&ours, || ours.backup(&repo, "incremental", &[]).map(drop))?;
    ours.vm().flush("vda")?;
    theirs.vm().flush("vda")?;
    let image = ours.vm().image("vda");
    compare_images(&image, &theirs.vm().image("vda"))?;

    let mut table = Table::default();
    for round in 0..stage.rounds {
        let is_first = round == 0;
        take_turns(
            &mut table,
            round,
            &[
                ((WHAT, OURS), &|| {
                    kept_if_right(&ours, is_first, |out| ours.restore(&repo, out, &[]))
                }),
                ((WHAT, PEER), &|| {
                    kept_if_right(&theirs, is_first, |out| theirs.theirs_restore(&set, out))
                }),
                ((WHAT, CONVERT), &|| {
                    kept_if_right(&ours, is_first, |out| convert(&image, out))
                }),
            ],
        )?;
    }
    let bounds = vec![
        goal(
            "latest of 30 increments: times faster than virtnbdrestore",
            table.times_faster(WHAT, PEER),
            Limit::AtLeast(4.0),
        ),
        goal(
            "latest of 30 increments: times the speed of qemu-img convert",
            table.times_faster(WHAT, CONVERT),
            Limit::AtLeast(1.0),
        ),
    ];
    let about = format!(
        "A qcow2 disk of {} GiB on tmpfs, ext4 with {} MiB of files; before each increment the guest writes {} random blocks of 64 KiB among them, bytes that cannot be compressed. The backups are compressed (zstd:1, lz4). qemu-img copies the disk's own image, `-W -m 8`.",
        DISK_BYTES / GIB,
        files_bytes >> 20,
        changes.writes,
    );
    Ok(Part {
        about,
        table,
        bounds,
    })
}

fn start(lab: &Lab, name: &str, template: &Path) -> Result<Bed> {
    let image = lab.path(&format!("{name}.qcow2"));
    std::fs::copy(template, &image)?;
    Bed::start(lab, name, DiskSpec::existing("vda", &image, "qcow2"))
}

/// What the guest writes, the same for each VM.
struct Changes {
    writes: u64,
    within: u64,
}

impl Changes {
    fn with_each(&self, bed: &Bed, back_up: impl Fn() -> Result<()>) -> Result<()> {
        let mut random = Random::new();
        for _ in 0..INCREMENTS {
            let places = random.places(self.writes, WRITE_BYTES, self.within);
            let blocks = Blocks::make(bed.lab(), WRITE_BYTES, places.into_iter(), &mut random)?;
            bed.write(&blocks)?;
            back_up()?;
        }
        Ok(())
    }
}

fn kept_if_right(
    bed: &Bed,
    compare: bool,
    restore: impl FnOnce(&Path) -> Result<Cost>,
) -> Result<Cost> {
    let out = bed.lab().path("restored");
    std::fs::create_dir(&out)?;
    let cost = restore(&out)?;
    if compare {
        bed.compare(&out)?;
    }
    bed::remove(&out)?;
    Ok(cost)
}

fn convert(image: &Path, out: &Path) -> Result<Cost> {
    let mut command = Command::new("qemu-img");
    command
        .args(["convert", "-U", "-f", "qcow2", "-O", "qcow2", "-W"])
        .args(["-m", "8"])
        .arg(image)
        .arg(out.join("copy.qcow2"));
    Ok(measure::run(&mut command, None)?.1)
}
