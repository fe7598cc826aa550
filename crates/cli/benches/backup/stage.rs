//! What all parts of the benchmark share: how often, how large, and one VM.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{DiskSpec, GIB, Lab, MIB};

use crate::bed::Bed;
use crate::bound::Bound;
use crate::disk;
use crate::measure::Cost;
use crate::table::{Run, Table};

/// Fewer have no median worth the name.
const ROUNDS_MIN: usize = 3;
/// Room for the guest.
const DISK_BYTES: u64 = 8 * GIB;
/// Files on the disk; what fits in memory together with all copies.
const FILES_BYTES: u64 = 2 * GIB;

/// What all parts share.
pub(crate) struct Stage {
    /// How often everything is measured.
    pub(crate) rounds: usize,
    /// Less than 1 to try the benchmark itself: then no bound is judged.
    pub(crate) scale: f64,
    files: Option<FilesBed>,
}

/// A VM with one qcow2 disk full of an operating system's files.
pub(crate) struct FilesBed {
    /// The VM.
    pub(crate) bed: Bed,
    /// How much is in its files.
    pub(crate) files_bytes: u64,
}

/// What a part has found.
#[derive(Debug, Default)]
pub(crate) struct Part {
    /// What was measured, and how.
    pub(crate) about: String,
    /// The numbers.
    pub(crate) table: Table,
    /// What was promised about them.
    pub(crate) bounds: Vec<Bound>,
}

impl Stage {
    /// Reads `HIGHWATER_BENCH_ROUNDS` and `HIGHWATER_BENCH_SCALE`.
    pub(crate) fn from_env() -> Result<Self> {
        let rounds = number_from_env("HIGHWATER_BENCH_ROUNDS")?.unwrap_or(ROUNDS_MIN);
        let scale = number_from_env("HIGHWATER_BENCH_SCALE")?.unwrap_or(1.0);
        ensure!(
            scale > 0.0 && scale <= 1.0,
            "HIGHWATER_BENCH_SCALE must be above 0 and at most 1"
        );
        ensure!(
            rounds >= ROUNDS_MIN || scale < 1.0,
            "{rounds} rounds are too few: at least {ROUNDS_MIN}"
        );
        Ok(Self {
            rounds,
            scale,
            files: None,
        })
    }

    /// Says whether numbers mean anything.
    pub(crate) fn is_whole(&self) -> bool {
        self.scale >= 1.0
    }

    /// Returns a size or a count, less where only the benchmark is tried.
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "positive, and far below what a float holds exactly"
    )]
    pub(crate) fn scaled(&self, number: u64) -> u64 {
        (number as f64 * self.scale).ceil() as u64
    }

    /// Returns the VM with files, which is started when the first part asks.
    pub(crate) fn files(&mut self) -> Result<&FilesBed> {
        let files = match self.files.take() {
            Some(files) => files,
            None => self.start_files()?,
        };
        Ok(self.files.insert(files))
    }

    fn start_files(&self) -> Result<FilesBed> {
        eprintln!("bench:  making a disk with files");
        let lab = Lab::start()?;
        let image = lab.path("files.qcow2");
        let files_bytes =
            disk::qcow2_with_files(&lab, &image, DISK_BYTES, self.scaled(FILES_BYTES))?;
        let bed = Bed::start(&lab, "web01", DiskSpec::existing("vda", &image, "qcow2"))?;
        Ok(FilesBed { bed, files_bytes })
    }

    /// Ends that VM: its disk lies in memory that others need.
    pub(crate) fn end_files(&mut self) {
        self.files = None;
    }
}

impl FilesBed {
    /// Tells what is on the disk.
    pub(crate) fn text(&self) -> String {
        format!(
            "One qcow2 disk of {} GiB, ext4 with {} MiB of files, all on tmpfs",
            DISK_BYTES / GIB,
            self.files_bytes / MIB
        )
    }
}

/// Makes a directory on a real disk.
pub(crate) fn disk_dir() -> Result<tempfile::TempDir> {
    let base = std::env::var_os("HIGHWATER_BENCH_DISK")
        .map_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")), PathBuf::from);
    tempfile::Builder::new()
        .prefix("bench-")
        .tempdir_in(&base)
        .with_context(|| format!("cannot make a directory in {}", base.display()))
}

/// One program doing one thing.
pub(crate) type Step<'a> = (Run, &'a dyn Fn() -> Result<Cost>);

/// Lets each program have its turn; every other round goes the other way round,
/// so that a machine that is busy with other things is so for all of them.
pub(crate) fn take_turns(table: &mut Table, round: usize, steps: &[Step<'_>]) -> Result<()> {
    let mut order: Vec<&Step<'_>> = steps.iter().collect();
    if !round.is_multiple_of(2) {
        order.reverse();
    }
    for (run, step) in order {
        let cost = step().with_context(|| format!("{}, {}", run.0, run.1))?;
        table.add(*run, cost);
    }
    Ok(())
}

fn number_from_env<T: std::str::FromStr<Err: std::error::Error + Send + Sync + 'static>>(
    name: &str,
) -> Result<Option<T>> {
    match std::env::var(name) {
        Ok(text) => Ok(Some(
            text.parse()
                .with_context(|| format!("{name} is no number"))?,
        )),
        Err(_) => Ok(None),
    }
}
