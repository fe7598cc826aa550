//! Everything on a running VM, beside virtnbdbackup, and beside nbdcopy on a disk.

use std::process::Command;

use anyhow::Result;

use crate::bed;
use crate::bound::{Limit, goal};
use crate::measure::Cost;
use crate::stage::{Part, Stage, disk_dir, take_turns};
use crate::table::{OURS, Table};

const NONE: &str = "full, not compressed";
const ZSTD: &str = "full, compressed (zstd:1, -z is lz4)";
const DISK: &str = "full, not compressed, onto a disk";
const PEER: &str = "virtnbdbackup";
const COPY: &str = "nbdcopy --flush";

pub(super) fn run(stage: &mut Stage) -> Result<Part> {
    let rounds = stage.rounds;
    let files = stage.files()?;
    let bed = &files.bed;
    // What is restored is compared first: a fast wrong copy is no result.
    check(bed)?;
    let dir = disk_dir()?;
    let there = |name: &str| bed.lab().path(name);
    let mut table = Table::default();
    for round in 0..rounds {
        take_turns(
            &mut table,
            round,
            &[
                ((NONE, OURS), &|| bed.full(there("plain"), "none")),
                ((NONE, PEER), &|| bed.theirs_full(&[])),
                ((ZSTD, OURS), &|| bed.full(there("packed"), "zstd:1")),
                ((ZSTD, PEER), &|| bed.theirs_full(&["-z"])),
                ((DISK, OURS), &|| bed.full(dir.path().join("repo"), "none")),
                ((DISK, COPY), &|| copy(bed, &dir.path().join("copy.raw"))),
            ],
        )?;
    }
    let bounds = vec![
        goal(
            "full, not compressed: times faster than virtnbdbackup",
            table.times_faster(NONE, PEER),
            Limit::AtLeast(3.0),
        ),
        goal(
            "full, not compressed, onto a disk: times the speed of nbdcopy to a file",
            table.times_faster(DISK, COPY),
            Limit::AtLeast(0.8),
        ),
        goal(
            "full, zstd:1: times faster than virtnbdbackup -z",
            table.times_faster(ZSTD, PEER),
            Limit::AtLeast(3.0),
        ),
        goal(
            "full, zstd:1: times the size of virtnbdbackup -z",
            table.times_larger(ZSTD, PEER),
            Limit::AtMost(1.0),
        ),
    ];
    let about = format!(
        "{}. Rows \"onto a disk\" write to a real disk, and end when the data is on it (nbdcopy: `--flush`).",
        files.text()
    );
    Ok(Part {
        about,
        table,
        bounds,
    })
}

fn check(bed: &bed::Bed) -> Result<()> {
    let repo = bed.repository(bed.lab().path("checked"))?;
    bed.backup(&repo, "full", &["--compression", "zstd:1"])?;
    let out = bed.lab().path("restored");
    bed.restore(&repo, &out, &[])?;
    bed.compare(&out)?;
    bed::remove(&out)?;
    bed.remove_repository(&repo)
}

fn copy(bed: &bed::Bed, to: &std::path::Path) -> Result<Cost> {
    let cost = bed.on_export(|uri| {
        let mut command = Command::new("nbdcopy");
        command.args(["--flush", uri]).arg(to);
        command
    })?;
    let cost = cost.with_stored(to)?;
    bed::remove(to)?;
    Ok(cost)
}
