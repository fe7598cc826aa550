//! The parts of the benchmark, each a group of rows that share a VM.

mod chain;
mod convert;
mod files;
mod full;
mod large;
mod latency;
mod memory;
mod random;
mod scattered;

use anyhow::{Result, ensure};

use crate::stage::{Part, Stage};

/// A part that can be chosen.
pub(crate) struct Choice {
    /// What it is called on the command line.
    pub(crate) name: &'static str,
    /// What it is about.
    pub(crate) title: &'static str,
    /// Runs it.
    pub(crate) run: fn(&mut Stage) -> Result<Part>,
    /// It works on the VM with files, see [`Stage::files`].
    pub(crate) wants_files: bool,
}

/// All of them; those that share a VM stand together.
const ALL: [Choice; 9] = [
    Choice {
        name: "full",
        title: "Everything, against virtnbdbackup and nbdcopy",
        run: full::run,
        wants_files: true,
    },
    Choice {
        name: "convert",
        title: "Everything, against qemu-img convert",
        run: convert::run,
        wants_files: true,
    },
    Choice {
        name: "random",
        title: "2000 random writes, with the bitmap and without",
        run: random::run,
        wants_files: true,
    },
    Choice {
        name: "latency",
        title: "50 ms of latency",
        run: latency::run,
        wants_files: true,
    },
    Choice {
        name: "files",
        title: "Everything, encrypted, against programs that back up files",
        run: files::run,
        wants_files: false,
    },
    Choice {
        name: "scattered",
        title: "16384 scattered chunks, against virtnbdbackup",
        run: scattered::run,
        wants_files: false,
    },
    Choice {
        name: "chain",
        title: "Restore of the latest of 30 increments",
        run: chain::run,
        wants_files: false,
    },
    Choice {
        name: "large",
        title: "Nothing changed on a disk of 1 TiB",
        run: large::run,
        wants_files: false,
    },
    Choice {
        name: "memory",
        title: "Memory for a disk of 8 TiB",
        run: memory::run,
        wants_files: false,
    },
];

/// Returns the parts named in `HIGHWATER_BENCH_PARTS`, all if none is.
pub(crate) fn chosen() -> Result<Vec<&'static Choice>> {
    let wanted = std::env::var("HIGHWATER_BENCH_PARTS").unwrap_or_default();
    let wanted: Vec<&str> = wanted
        .split([' ', ','])
        .filter(|word| !word.is_empty())
        .collect();
    for name in &wanted {
        let names: Vec<&str> = ALL.iter().map(|part| part.name).collect();
        ensure!(
            names.contains(name),
            "there is no part `{name}`, but {}",
            names.join(", ")
        );
    }
    let is_wanted = |part: &&Choice| wanted.is_empty() || wanted.contains(&part.name);
    Ok(ALL.iter().filter(is_wanted).collect())
}
