//! 2000 random writes: what they cost with the bitmap, and with the bitmap lost.

use std::process::Command;

use anyhow::Result;
use highwater_testkit::KIB;

use crate::bed::{self, Bed};
use crate::bound::{Limit, gate};
use crate::disk::{Blocks, Random};
use crate::measure::Cost;
use crate::stage::{Part, Stage, take_turns};
use crate::table::{OURS, Table};

const WRITES: u64 = 2000;
const WRITE_BYTES: u64 = 16 * KIB;
const CHANGED: &str = "2000 random writes of 16 KiB";
const UNCHANGED: &str = "nothing changed";
const RESCAN: &str = "the same 2000 writes, bitmap lost";
const READ: &str = "nbdcopy to null";

pub(super) fn run(stage: &mut Stage) -> Result<Part> {
    let (rounds, writes) = (stage.rounds, stage.scaled(WRITES));
    let files = stage.files()?;
    let bed = &files.bed;
    // Two repositories follow the same VM, so that the same change is stored
    // once with a bitmap and once without.
    let kept = bed.repository(bed.lab().path("kept"))?;
    let lost = bed.repository(bed.lab().path("lost"))?;
    for repo in [&kept, &lost] {
        bed.backup(repo, "full", &[])?;
    }
    let mut random = Random::new();
    let mut table = Table::default();
    for round in 0..rounds {
        let places = random.places(writes, WRITE_BYTES, files.files_bytes);
        let blocks = Blocks::make(bed.lab(), WRITE_BYTES, places.into_iter(), &mut random)?;
        bed.write(&blocks)?;
        drop(blocks);
        table.add((CHANGED, OURS), bed.backup(&kept, "incremental", &[])?);
        table.add((UNCHANGED, OURS), bed.backup(&kept, "incremental", &[])?);
        bed.lose_bitmap()?;
        take_turns(
            &mut table,
            round,
            &[
                ((RESCAN, OURS), &|| bed.backup(&lost, "rescan", &[])),
                ((RESCAN, READ), &|| read(bed)),
            ],
        )?;
        // The first repository has lost its bitmap, too.
        bed.backup(&kept, "rescan", &[])?;
    }
    let out = bed.lab().path("restored");
    bed.restore(&lost, &out, &[])?;
    bed.compare(&out)?;
    bed::remove(&out)?;
    bed.remove_repository(&kept)?;
    bed.remove_repository(&lost)?;

    let wall = |cost: &Cost| cost.wall_seconds;
    let bounds = vec![
        gate(
            "2000 random writes of 16 KiB: MiB stored",
            table.median((CHANGED, OURS), Cost::stored),
            Limit::AtMost(75.0),
        ),
        gate(
            "2000 random writes of 16 KiB: seconds",
            table.median((CHANGED, OURS), wall),
            Limit::AtMost(1.0),
        ),
        // A hundredth for what a manifest says of the reason.
        gate(
            "bitmap lost: times the bytes stored with it",
            table.ratio((RESCAN, OURS), (CHANGED, OURS), Cost::stored),
            Limit::AtMost(1.01),
        ),
        gate(
            "bitmap lost: times the seconds of nbdcopy to null: of the same export",
            table.ratio((RESCAN, OURS), (RESCAN, READ), wall),
            Limit::AtMost(1.5),
        ),
    ];
    let about = format!(
        "{}. The guest writes to random places among the files, aligned to 16 KiB, what cannot be compressed. The bitmap is lost by killing QEMU.",
        files.text()
    );
    Ok(Part {
        about,
        table,
        bounds,
    })
}

fn read(bed: &Bed) -> Result<Cost> {
    bed.on_export(|uri| {
        let mut command = Command::new("nbdcopy");
        command.args([uri, "null:"]);
        command
    })
}
