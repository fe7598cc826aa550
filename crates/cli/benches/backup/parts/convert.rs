//! Everything, compressed, beside qemu-img reading the same export.

use std::process::Command;

use anyhow::Result;

use crate::bed::{self, Bed};
use crate::bound::{Limit, goal};
use crate::measure::Cost;
use crate::stage::{Part, Stage, take_turns};
use crate::table::{OURS, Run, Table};

const WHAT: &str = "full, zstd";
const ONE: Run = (WHAT, OURS);
const THREE: Run = (WHAT, "highwater, level 3");
const PEER: Run = (WHAT, "qemu-img convert -c -W -m 8");

pub(super) fn run(stage: &mut Stage) -> Result<Part> {
    let rounds = stage.rounds;
    let files = stage.files()?;
    let bed = &files.bed;
    let there = |name: &str| bed.lab().path(name);
    let mut table = Table::default();
    for round in 0..rounds {
        take_turns(
            &mut table,
            round,
            &[
                (ONE, &|| bed.full(there("one"), "zstd:1")),
                (PEER, &|| convert(bed)),
                (THREE, &|| bed.full(there("three"), "zstd:3")),
            ],
        )?;
    }
    let faster = |ours| table.ratio(PEER, ours, |cost| cost.wall_seconds);
    let larger = |ours| table.ratio(ours, PEER, Cost::stored);
    let bounds = vec![
        goal(
            "full, zstd:1: times faster than qemu-img convert -c",
            faster(ONE),
            Limit::AtLeast(1.7),
        ),
        goal(
            "full, zstd:1: times the size of qemu-img's",
            larger(ONE),
            Limit::AtMost(1.06),
        ),
        goal(
            "full, zstd:3: times faster than qemu-img convert -c",
            faster(THREE),
            Limit::AtLeast(1.2),
        ),
        goal(
            "full, zstd:3: times the size of qemu-img's",
            larger(THREE),
            Limit::AtMost(1.01),
        ),
    ];
    let about = format!(
        "{}. qemu-img (`-o compression_type=zstd -W -m 8`) reads the export of a backup job of the same QEMU over the same kind of socket; beginning and ending the job is not counted for it.",
        files.text()
    );
    Ok(Part {
        about,
        table,
        bounds,
    })
}

fn convert(bed: &Bed) -> Result<Cost> {
    let to = bed.lab().path("converted.qcow2");
    let cost = bed.on_export(|uri| {
        let mut command = Command::new("qemu-img");
        command
            .args(["convert", "-f", "raw", "-O", "qcow2", "-c", "-o"])
            .args(["compression_type=zstd", "-W", "-m", "8", uri])
            .arg(&to);
        command
    })?;
    let cost = cost.with_stored(&to)?;
    bed::remove(&to)?;
    Ok(cost)
}
