//! What nothing costs on a large disk, and after many restore points.

use anyhow::Result;
use highwater_testkit::{DiskSpec, GIB, KIB, Lab, MIB, Scattered};

use crate::bed::Bed;
use crate::bound::{Limit, gate};
use crate::measure::Cost;
use crate::stage::{Part, Stage, take_turns};
use crate::table::{OURS, Run, Table};

const SIZE_BYTES: u64 = 1024 * GIB;
const ALLOCATED_BYTES: u64 = 20 * GIB;
const CLUSTER_BYTES: u64 = 64 * KIB;
const SMALL_BYTES: u64 = 64 * MIB;
const POINTS: usize = 1000;
const FULL: Run = ("full, 1 TiB with 20 GiB allocated, once", OURS);
const SMALL: Run = ("nothing changed, 64 MiB, first points", OURS);
const FEW: Run = ("nothing changed, 1 TiB, first points", OURS);
const SMALL_LATER: Run = ("nothing changed, 64 MiB, beside 1000 points", OURS);
const MANY: Run = ("nothing changed, 1 TiB, after 1000 points", OURS);
/// What a busy machine adds to one of two equal runs.
const NOISE_SECONDS: f64 = 0.15;

pub(super) fn run(stage: &mut Stage) -> Result<Part> {
    let lab = Lab::start()?;
    let image = lab.path("large.qcow2");
    let disk = Scattered {
        size_bytes: SIZE_BYTES,
        pieces: stage.scaled(ALLOCATED_BYTES / CLUSTER_BYTES),
    };
    disk.write(&image)?;
    let large = Bed::start(&lab, "web01", DiskSpec::existing("vda", &image, "qcow2"))?;
    let small = Bed::start(&lab, "web02", DiskSpec::qcow2("vda", SMALL_BYTES))?;
    small.vm().write("vda", "write -P 0xab 0 1M")?;
    let mut table = Table::default();

    let repo = large.repository(lab.path("large"))?;
    let small_repo = small.repository(lab.path("small"))?;
    table.add(FULL, large.backup(&repo, "full", &[])?);
    small.backup(&small_repo, "full", &[])?;
    let mut measure = |on_large: Run, on_small: Run| {
        (0..stage.rounds).try_for_each(|round| {
            take_turns(
                &mut table,
                round,
                &[
                    (on_large, &|| large.backup(&repo, "incremental", &[])),
                    (on_small, &|| small.backup(&small_repo, "incremental", &[])),
                ],
            )
        })
    };
    measure(FEW, SMALL)?;
    let points = usize::try_from(stage.scaled(POINTS as u64))?;
    eprintln!("bench:  making restore points until there are {points}");
    for _ in stage.rounds + 1..points {
        large.backup(&repo, "incremental", &[])?;
    }
    measure(MANY, SMALL_LATER)?;

    let seconds = |run| table.median(run, |cost: &Cost| cost.wall_seconds);
    let bounds = vec![
        gate(
            "nothing changed on 1 TiB, first points: seconds",
            seconds(FEW),
            Limit::AtMost(1.0),
        ),
        gate(
            "nothing changed on 1 TiB, after 1000 points: seconds",
            seconds(MANY),
            Limit::AtMost(1.0),
        ),
        gate(
            "nothing changed: seconds that 1 TiB costs more than 64 MiB",
            seconds(FEW) - seconds(SMALL),
            Limit::AtMost(NOISE_SECONDS),
        ),
        gate(
            "nothing changed: seconds that 1000 points cost",
            seconds(MANY) - seconds(FEW),
            Limit::AtMost(NOISE_SECONDS),
        ),
    ];
    let about = format!(
        "A qcow2 disk of 1 TiB on tmpfs, {} clusters of 64 KiB allocated all over it, 4 KiB in each. \
         A second VM has a disk of 64 MiB and a repository of its own.",
        disk.pieces
    );
    Ok(Part {
        about,
        table,
        bounds,
    })
}
