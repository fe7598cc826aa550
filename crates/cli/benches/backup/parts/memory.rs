//! Memory for a huge disk with data all over it.

use anyhow::Result;
use highwater_testkit::{DiskSpec, GIB, KIB, Lab, Scattered};

use crate::bed::{self, Bed};
use crate::bound::{Limit, gate};
use crate::disk::{Blocks, Random};
use crate::stage::{Part, Stage};
use crate::table::{OURS, Run, Table};

const SIZE_BYTES: u64 = 8 * 1024 * GIB;
const CHUNKS: u64 = 200_704;
const WRITES: u64 = 2000;
const WRITE_BYTES: u64 = 16 * KIB;
const MEMORY_MIB_MAX: f64 = 256.0;
const FULL: Run = ("8 TiB: full", OURS);
const INCREMENTAL: Run = ("8 TiB: 2000 random writes", OURS);
const RESCAN: Run = ("8 TiB: bitmap lost", OURS);
const RESTORE: Run = ("8 TiB: restore as qcow2", OURS);
const RESTORE_RAW: Run = ("8 TiB: restore as raw", OURS);

pub(super) fn run(stage: &mut Stage) -> Result<Part> {
    let lab = Lab::start()?;
    let image = lab.path("huge.qcow2");
    let disk = Scattered {
        size_bytes: SIZE_BYTES,
        pieces: stage.scaled(CHUNKS),
    };
    disk.write(&image)?;
    let bed = Bed::start(&lab, "web01", DiskSpec::existing("vda", &image, "qcow2"))?;
    // Encrypted, because deriving the key takes memory, too.
    let repo = bed.encrypted_repository(lab.path("repo"))?;
    let mut random = Random::new();
    let mut table = Table::default();
    table.add(FULL, bed.backup(&repo, "full", &[])?);
    write(&bed, stage.scaled(WRITES), &mut random)?;
    table.add(INCREMENTAL, bed.backup(&repo, "incremental", &[])?);
    write(&bed, stage.scaled(WRITES), &mut random)?;
    bed.lose_bitmap()?;
    table.add(RESCAN, bed.backup(&repo, "rescan", &[])?);
    let out = lab.path("restored");
    table.add(RESTORE, bed.restore(&repo, &out, &[])?);
    bed.compare(&out)?;
    bed::remove(&out)?;
    let file = lab.path("restored.raw");
    let args = ["-d", "vda", "--format", "raw"];
    table.add(RESTORE_RAW, bed.restore(&repo, &file, &args)?);
    bed::remove(&file)?;

    let peak = [FULL, INCREMENTAL, RESCAN, RESTORE, RESTORE_RAW]
        .map(|run| (run, table.largest(run, |cost| cost.memory_mib)));
    let bounds = peak
        .iter()
        .map(|((what, _), mib)| {
            let what = format!("{what}: MiB of anonymous memory");
            gate(&what, *mib, Limit::AtMost(MEMORY_MIB_MAX))
        })
        .collect();
    let about = format!(
        "A qcow2 disk of 8 TiB on tmpfs, {} chunks of 64 KiB allocated all over it, 4 KiB in each; an encrypted repository. Once each: memory, not time, is what counts.",
        disk.pieces
    );
    Ok(Part {
        about,
        table,
        bounds,
    })
}

fn write(bed: &Bed, writes: u64, random: &mut Random) -> Result<()> {
    let places = random.places(writes, WRITE_BYTES, SIZE_BYTES);
    let blocks = Blocks::make(bed.lab(), WRITE_BYTES, places.into_iter(), random)?;
    bed.write(&blocks)
}
