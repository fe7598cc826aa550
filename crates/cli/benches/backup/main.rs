//! Measures backup and restore against other programs, and holds the bounds of `docs/limits.md`.
//!
//! `make bench` runs it. Real VMs in labs on tmpfs; every program reads the same
//! data of the same QEMU, or of a twin where it cannot. The programs take turns,
//! and each round goes the other way round, so that a machine that is busy with
//! other things is so for all of them. What counts is the ratio within a round,
//! and of the rounds the median.
//!
//! A *gate* that is missed fails the benchmark; a missed *goal* is said.
//!
//! * `HIGHWATER_BENCH_PARTS`: which parts to run, instead of all.
//! * `HIGHWATER_BENCH_ROUNDS`: how many rounds, instead of 3.
//! * `HIGHWATER_BENCH_SCALE`: a factor for sizes and counts, to try the benchmark
//!   itself; with less than 1 no bound is judged.
//! * `HIGHWATER_BENCH_DISK`: a directory on a real disk, instead of one in `target`.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::cast_precision_loss,
    clippy::disallowed_methods,
    reason = "a measurement prints; its files die with the lab, so none must be durable"
)]

mod bed;
mod bound;
mod disk;
mod measure;
mod parts;
mod programs;
mod proxy;
mod report;
mod stage;
mod table;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;

use report::Report;
use stage::{Part, Stage};

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

/// Returns whether all gates hold.
fn run() -> Result<bool> {
    let mut stage = Stage::from_env()?;
    let chosen = parts::chosen()?;
    let mut report = Report::begin()?;
    measure::adopt_orphans()?;
    for choice in chosen {
        if !choice.wants_files {
            stage.end_files();
        }
        eprintln!("bench: {}: {}", choice.name, choice.title);
        let start = Instant::now();
        let outcome = (choice.run)(&mut stage);
        tell(&outcome);
        eprintln!("bench:  done in {:.0} s", start.elapsed().as_secs_f64());
        report.add(choice, outcome);
    }
    println!("{}", report.markdown(&stage)?);
    eprintln!("bench: numbers in {}", report.write_json(&stage)?.display());
    Ok(report.is_good(&stage))
}

fn tell(outcome: &Result<Part>) {
    match outcome {
        Ok(part) => {
            for bound in &part.bounds {
                eprintln!("bench:  {}", bound.line());
            }
        }
        Err(error) => eprintln!("bench:  FAILED: {error:#}"),
    }
}
