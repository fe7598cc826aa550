//! How much throughput is left when an answer takes 50 ms.
//!
//! Two ways, both with the real program on a real VM:
//!
//! * *The NBD side.* A proxy takes the place of QEMU's socket before the program
//!   connects to it, and hands every byte of QEMU's on 50 ms after it came. What
//!   is asked meanwhile goes through at once, as on a long wire.
//! * *The repository.* `strace` lets each call that must wait for a file server
//!   (to sync, rename, make a directory, remove) return 50 ms late. What a client
//!   of such a server does in the background is not delayed.
//!
//! What is compared runs through the same proxy, or below the same strace,
//! without the delay, so that only the latency differs.

use std::time::Duration;

use anyhow::Result;

use crate::bed::{Bed, Repository};
use crate::bound::{Limit, goal};
use crate::measure::Cost;
use crate::proxy::Proxy;
use crate::stage::{Part, Stage, take_turns};
use crate::table::{OURS, Run, Table};

const LATENCY: Duration = Duration::from_millis(50);
const NO_LATENCY: Duration = Duration::ZERO;
const NBD_NEAR: Run = ("full, zstd:1, NBD through a proxy", OURS);
const NBD_FAR: Run = ("full, zstd:1, NBD through a proxy, 50 ms late", OURS);
const REPO_NEAR: Run = ("full, zstd:1, below strace", OURS);
const REPO_FAR: Run = ("full, zstd:1, syncs and renames 50 ms late", OURS);
/// The calls of a store that a file server must answer.
const CALLS: &str = "fsync,fdatasync,rename,renameat,renameat2,linkat,unlinkat,mkdir,mkdirat";

pub(super) fn run(stage: &mut Stage) -> Result<Part> {
    let rounds = stage.rounds;
    let files = stage.files()?;
    let bed = &files.bed;
    let mut table = Table::default();
    for round in 0..rounds {
        take_turns(
            &mut table,
            round,
            &[
                (NBD_NEAR, &|| nbd(bed, NO_LATENCY)),
                (NBD_FAR, &|| nbd(bed, LATENCY)),
                (REPO_NEAR, &|| repository(bed, NO_LATENCY)),
                (REPO_FAR, &|| repository(bed, LATENCY)),
            ],
        )?;
    }
    let left = |near, far| table.ratio(near, far, |cost| cost.wall_seconds);
    let bounds = vec![
        goal(
            "50 ms on the NBD side: share of the throughput without",
            left(NBD_NEAR, NBD_FAR),
            Limit::AtLeast(0.6),
        ),
        goal(
            "50 ms on the repository's side: share of the throughput without",
            left(REPO_NEAR, REPO_FAR),
            Limit::AtLeast(0.6),
        ),
    ];
    let about = format!(
        "{}. NBD: a proxy in the place of QEMU's socket hands on each of its bytes 50 ms after it came. Repository: each sync, rename, removal and making of a directory returns 50 ms late (strace). The rows without delay run the same way.",
        files.text()
    );
    Ok(Part {
        about,
        table,
        bounds,
    })
}

const ARGS: [&str; 4] = ["--level", "full", "--compression", "zstd:1"];

fn nbd(bed: &Bed, latency: Duration) -> Result<Cost> {
    let repo = new_repository(bed)?;
    let aside = bed.lab().path("far.sock");
    let proxy = Proxy::start(bed.runtime_dir(), aside, latency);
    let cost = bed.backup(&repo, "full", &ARGS);
    proxy.end()?;
    bed.remove_repository(&repo)?;
    cost
}

fn repository(bed: &Bed, latency: Duration) -> Result<Cost> {
    let repo = new_repository(bed)?;
    let late = format!("inject={CALLS}:delay_exit={}", latency.as_micros().max(1));
    let calls = format!("trace={CALLS}");
    let strace = [
        "strace",
        "-f",
        "--seccomp-bpf",
        "-qqq",
        "-o",
        "/dev/null",
        "-e",
        "signal=none",
        "-e",
        &calls,
        "-e",
        &late,
    ];
    let cost = bed.backup_under(&repo, "full", &ARGS, &strace.map(str::to_owned));
    bed.remove_repository(&repo)?;
    cost
}

fn new_repository(bed: &Bed) -> Result<Repository> {
    bed.repository(bed.lab().path("latency"))
}
