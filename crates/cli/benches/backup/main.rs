//! Measures backup and restore against other programs, and holds the bounds of `docs/limits.md`.
//!
//! `make bench` runs it. One VM in a lab on tmpfs, one disk with the files of
//! an operating system; every program reads the same export of the same QEMU.
//! The programs take turns, and each round goes the other way round, so that a
//! machine that is busy with other things is so for all of them. What counts
//! is the ratio within a round, and of the rounds the median.
//!
//! `HIGHWATER_BENCH_ROUNDS` says how many rounds there are instead of 3.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::cast_precision_loss,
    clippy::disallowed_methods,
    reason = "a measurement prints; its files die with the lab, so none must be durable"
)]

mod bed;
mod measure;
mod programs;
mod table;

use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};

use bed::Bed;
use table::{Bound, Table};

/// Fewer have no median worth the name.
const ROUNDS_MIN: usize = 3;
/// What a guest writes between two increments.
const WRITES: usize = 2000;

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns whether all bounds hold.
fn run() -> Result<bool> {
    let rounds = match std::env::var("HIGHWATER_BENCH_ROUNDS") {
        Ok(text) => text
            .parse()
            .context("HIGHWATER_BENCH_ROUNDS is no number")?,
        Err(_) => ROUNDS_MIN,
    };
    ensure!(
        rounds >= ROUNDS_MIN,
        "{rounds} rounds are too few: at least {ROUNDS_MIN}"
    );
    let versions = programs::versions()?;
    let load = programs::load()?;
    measure::adopt_orphans()?;
    eprintln!("bench: making a disk");
    let mut bed = Bed::start()?;
    let mut table = Table::default();
    for round in 0..rounds {
        eprintln!("bench: round {} of {rounds}, everything", round + 1);
        full_round(&bed, round, &mut table)?;
    }
    increments(&mut bed, rounds, &mut table)?;

    println!("{versions}");
    println!("load: {load} before, {} at the end", programs::load()?);
    println!("Disk: {}. {rounds} rounds, medians.\n", bed.disk_text());
    println!("{}", table.text());
    let bounds = [
        Bound::at_least(
            "full, none: times faster than virtnbdbackup",
            table.ratio(FULL_NONE),
            2.0,
        ),
        Bound::at_least(
            "full, zstd:1: times faster than virtnbdbackup -z",
            table.ratio(FULL_ZSTD),
            2.0,
        ),
        Bound::at_most(
            "2000 writes of 16 KiB: MiB stored",
            table.stored_mib(CHANGED),
            75.0,
        ),
        Bound::at_most("nothing changed: seconds", table.wall(UNCHANGED), 1.0),
    ];
    for bound in &bounds {
        println!("{}", bound.text());
    }
    Ok(bounds.iter().all(Bound::holds))
}

const FULL_NONE: &str = "full, not compressed";
const FULL_ZSTD: &str = "full, compressed";
const RESTORE: &str = "restore of the compressed one";
const COPY: &str = "bytes of the export to a raw file";
const CHANGED: &str = "2000 random writes of 16 KiB";
const UNCHANGED: &str = "nothing changed";
const RESCAN: &str = "2000 such writes, bitmap lost";

type Step = fn(&Bed, bool, &mut Table) -> Result<()>;

/// Each program once; every other round in reverse.
fn full_round(bed: &Bed, round: usize, table: &mut Table) -> Result<()> {
    let mut steps: [Step; 5] = [ours_plain, theirs_plain, ours_packed, theirs_packed, anchor];
    if !round.is_multiple_of(2) {
        steps.reverse();
    }
    // What is restored is compared once: a fast wrong copy is no result.
    steps
        .iter()
        .try_for_each(|step| step(bed, round == 0, table))
}

fn ours_plain(bed: &Bed, _compare: bool, table: &mut Table) -> Result<()> {
    let repo = bed.repository("plain")?;
    let cost = bed.ours(
        &repo,
        &[
            "backup",
            bed.vm_name(),
            "--level",
            "full",
            "--compression",
            "none",
        ],
    )?;
    table.add(FULL_NONE, "highwater", cost.stored(&repo)?);
    bed.remove(&repo)
}

fn theirs_plain(bed: &Bed, _compare: bool, table: &mut Table) -> Result<()> {
    let set = bed.directory("theirs")?;
    let cost = bed.theirs_backup(&set, &[])?;
    table.add(FULL_NONE, "virtnbdbackup", cost.stored(&set)?);
    bed.remove(&set)
}

fn ours_packed(bed: &Bed, compare: bool, table: &mut Table) -> Result<()> {
    let repo = bed.repository("packed")?;
    let cost = bed.ours(
        &repo,
        &[
            "backup",
            bed.vm_name(),
            "--level",
            "full",
            "--compression",
            "zstd:1",
        ],
    )?;
    table.add(FULL_ZSTD, "highwater", cost.stored(&repo)?);
    let out = bed.dir().join("restored");
    let to = out.to_str().context("a path is text")?;
    let cost = bed.ours(&repo, &["restore", bed.vm_name(), "--to", to])?;
    table.add(RESTORE, "highwater", cost);
    if compare {
        bed.compare(&out)?;
    }
    bed.remove(&out)?;
    bed.remove(&repo)
}

fn theirs_packed(bed: &Bed, compare: bool, table: &mut Table) -> Result<()> {
    let set = bed.directory("theirs")?;
    let cost = bed.theirs_backup(&set, &["-z"])?;
    table.add(FULL_ZSTD, "virtnbdbackup", cost.stored(&set)?);
    let out = bed.directory("restored")?;
    table.add(RESTORE, "virtnbdbackup", bed.theirs_restore(&set, &out)?);
    if compare {
        bed.compare(&out)?;
    }
    bed.remove(&out)?;
    bed.remove(&set)
}

fn anchor(bed: &Bed, _compare: bool, table: &mut Table) -> Result<()> {
    table.add(COPY, "nbdcopy", bed.nbdcopy()?);
    Ok(())
}

/// One repository, one point after the other.
fn increments(bed: &mut Bed, rounds: usize, table: &mut Table) -> Result<()> {
    let repo = bed.repository("increments")?;
    let vm = bed.vm_name().to_owned();
    let plain = ["backup", vm.as_str()];
    bed.ours(&repo, &plain)?;
    for round in 0..rounds {
        eprintln!("bench: round {} of {rounds}, increments", round + 1);
        bed.write_randomly(WRITES)?;
        table.add(
            CHANGED,
            "highwater",
            bed.ours_growing(&repo, &plain, "incremental")?,
        );
        table.add(
            UNCHANGED,
            "highwater",
            bed.ours_growing(&repo, &plain, "incremental")?,
        );
        bed.write_randomly(WRITES)?;
        bed.lose_bitmap()?;
        table.add(
            RESCAN,
            "highwater",
            bed.ours_growing(&repo, &plain, "rescan")?,
        );
    }
    let out = bed.dir().join("restored");
    let to = out.to_str().context("a path is text")?;
    bed.ours(&repo, &["restore", &vm, "--to", to])?;
    bed.compare(&out)?;
    bed.remove(&out)?;
    bed.remove(&repo)
}
