//! An increment of many chunks that lie apart, beside virtnbdbackup.

use std::thread;

use anyhow::{Result, anyhow};
use highwater_testkit::{DiskSpec, KIB, Lab};

use crate::bed::Bed;
use crate::bound::{Limit, goal};
use crate::disk::{Blocks, Random};
use crate::stage::{Part, Stage, take_turns};
use crate::table::{OURS, Table};

const CHUNKS: u64 = 16384;
const CHUNK_BYTES: u64 = 64 * KIB;
/// One chunk in so many is written.
const STRIDE: u64 = 8;
const WHAT: &str = "16384 scattered chunks of 64 KiB, incremental, not compressed";
const PEER: &str = "virtnbdbackup";

pub(super) fn run(stage: &mut Stage) -> Result<Part> {
    let chunks = stage.scaled(CHUNKS);
    let mut random = Random::new();
    let mut table = Table::default();
    for round in 0..stage.rounds {
        // All of it anew: the increments of all rounds would not fit in memory.
        let lab = Lab::start()?;
        let start = |name: &str| {
            let disk = DiskSpec::qcow2("vda", chunks * STRIDE * CHUNK_BYTES);
            Bed::start(&lab, name, disk)
        };
        // Twins: virtnbdbackup makes no increment where another program's
        // checkpoints are.
        let (our_bed, their_bed) = (start("web01")?, start("web02")?);
        let repo = our_bed.repository(lab.path("ours"))?;
        let set = lab.path("theirs");
        our_bed.backup(&repo, "full", &[])?;
        their_bed.theirs_backup(&set, "full", &[])?;
        let places: Vec<u64> = (0..chunks)
            .map(|chunk| (chunk * STRIDE + random.next() % STRIDE) * CHUNK_BYTES)
            .collect();
        let blocks = Blocks::make(&lab, CHUNK_BYTES, places.into_iter(), &mut random)?;
        // Both at once: many small writes are mostly waited for.
        thread::scope(|scope| {
            let theirs = scope.spawn(|| their_bed.write(&blocks));
            our_bed.write(&blocks)?;
            theirs.join().map_err(|_| anyhow!("a write panicked"))?
        })?;
        drop(blocks);
        take_turns(
            &mut table,
            round,
            &[
                ((WHAT, OURS), &|| {
                    our_bed.backup(&repo, "incremental", &["--compression", "none"])
                }),
                ((WHAT, PEER), &|| their_bed.theirs_backup(&set, "inc", &[])),
            ],
        )?;
    }
    let bounds = vec![goal(
        "16384 scattered chunks: times faster than virtnbdbackup",
        table.times_faster(WHAT, PEER),
        Limit::AtLeast(4.0),
    )];
    let about =
        "Two VMs, each with an empty qcow2 disk of 8 GiB on tmpfs, whose guests write the same: \
         one chunk in eight, 1 GiB in all, bytes that cannot be compressed."
            .to_owned();
    Ok(Part {
        about,
        table,
        bounds,
    })
}
