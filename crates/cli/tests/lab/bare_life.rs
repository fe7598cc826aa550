//! The random life of a VM without libvirt: over QEMU's own monitor, off, and
//! killed in between, every point is what the disks were, every plain backup
//! succeeds, and nothing of ours is left but marks.

mod act;
mod draw;

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use highwater_testkit::workload::Random;
use highwater_testkit::{Attach, DiskSpec, Graph, KIB, MIB, Qemu, Workload};

use crate::life::number;
use crate::tale::{BareBed, Tale};
use crate::waiting::Ended;
use draw::Operation;

const DISKS: [&str; 3] = ["vda", "vdb", "vdc"];

/// What the next plain backup has to find of a disk's mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    /// There is no point of this disk.
    None,
    /// It records, whoever of us died.
    Good,
    /// QEMU died, or somebody took it.
    Broken,
    /// QEMU died while a backup was about to make a new one.
    Unsure,
    /// It was lost with the QEMU that had it: no image keeps it.
    Raw,
}

impl Mark {
    /// Whether a plain backup may read a disk in this way.
    fn allows(self, mode: &str) -> bool {
        let is_broken = mode.starts_with("rescan: bitmap-") || mode == "rescan: no-mark-yet";
        match self {
            Self::None => mode == "full: first-backup",
            Self::Good => mode == "incremental",
            Self::Broken => is_broken,
            Self::Unsure => is_broken || mode == "incremental",
            // A point of images that are off leaves no mark on them.
            Self::Raw => mode == "rescan: no-marks-on-raw" || mode == "rescan: no-mark-yet",
        }
    }
}

struct Disk {
    name: &'static str,
    is_raw: bool,
    mark: Mark,
    writes: Workload,
    /// Bitmaps of somebody else.
    theirs: Vec<String>,
}

struct Life {
    tale: Tale,
    disks: Vec<Disk>,
    /// What QEMU is made of while no backup runs.
    graph: Graph,
    is_paused: bool,
    /// What a session without processes has left is still there.
    is_littered: bool,
    /// So that each bitmap of others has a name of its own.
    bitmaps: u64,
    /// The last run of which somebody died; others may still be on their way.
    last: Option<Ended>,
    log: Vec<String>,
}

impl Life {
    fn begin(seed: u64, qemu: Qemu) -> Result<Self> {
        let mut random = Random(seed);
        let bed = BareBed::start()?;
        let sizes = [0, 1, 2].map(|_| 4 * MIB + random.below(8 * 1024) * 512);
        // A discard of 64 KiB empties no larger cluster.
        let cluster = [4 * KIB, 64 * KIB][usize::try_from(random.below(2))?];
        let specs = [
            (DiskSpec::qcow2("vda", sizes[0]), Attach::drive().id("vda")),
            (
                DiskSpec::qcow2("vdb", sizes[1]).cluster(cluster),
                Attach::blockdev("virtio-blk-pci"),
            ),
            (DiskSpec::raw("vdc", sizes[2]), Attach::drive().id("vdc")),
        ];
        let mut vm = bed.lab.vm("kvm0").qemu(qemu);
        for (spec, attach) in specs {
            vm = vm.disk_as(spec, attach);
        }
        let vm = vm.start()?;
        let disks = DISKS.iter().zip(sizes).map(|(name, size)| {
            Ok(Disk {
                name,
                is_raw: *name == "vdc",
                mark: Mark::None,
                writes: Workload::new(random.next(), usize::try_from(size)?),
                theirs: Vec::new(),
            })
        });
        Ok(Self {
            disks: disks.collect::<Result<_>>()?,
            graph: vm.graph()?,
            tale: Tale::of(&bed, &vm, &DISKS),
            is_paused: false,
            is_littered: false,
            bitmaps: 0,
            last: None,
            log: vec![format!("sizes {sizes:?}, clusters of {cluster}")],
        })
    }

    fn live(&mut self, seed: u64, operations: u64) -> Result<()> {
        for number in 0..operations {
            // What one draws changes nothing for those after it.
            let mut random = Random(seed ^ (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let operation = Operation::draw(self, &mut random);
            self.log.push(format!("{number:5}  {operation:?}"));
            self.act(&operation, &mut random)?;
        }
        self.log.push("  end".to_owned());
        self.back_up()?;
        self.tale.ends_well()
    }

    /// Fails unless the disks are what the guest wrote: nobody of us lost any of
    /// it on its way.
    fn check_disks(&self) -> Result<()> {
        let copy = self.tale.bed.lab.path("look.raw");
        for disk in &self.disks {
            self.tale.vm.raw_copy(disk.name, &copy)?;
            disk.writes.check(&copy)?;
        }
        Ok(std::fs::remove_file(copy)?)
    }

    /// Fails if anything of a session is left, or something of others is not.
    fn check_tidy(&self) -> Result<()> {
        self.tale.no_files()?;
        for disk in &self.disks {
            let bitmaps = self.tale.vm.bitmaps(disk.name)?.into_iter();
            let mut theirs: Vec<_> = bitmaps
                .map(|it| it.name)
                .filter(|it| !it.starts_with("hw-"))
                .collect();
            theirs.sort();
            ensure!(
                theirs == disk.theirs,
                "bitmaps of others on {}: {theirs:?}, not {:?}",
                disk.name,
                disk.theirs
            );
        }
        if !self.tale.vm.is_active() {
            return Ok(());
        }
        let mut before = self.graph.clone().without_bitmaps();
        let state = if self.is_paused { "paused" } else { "running" };
        state.clone_into(&mut before.state);
        let now = self.tale.vm.graph()?.without_bitmaps();
        ensure!(now == before, "before: {before:#?}\nnow: {now:#?}");
        Ok(())
    }

    /// After a plain backup: each disk that can have a mark has one.
    fn check_marks(&self) -> Result<()> {
        let runs = self.tale.vm.is_active();
        for disk in self.disks.iter().filter(|disk| runs || !disk.is_raw) {
            let marks = self.tale.marks(disk.name)?;
            ensure!(marks.len() == 1, "marks on {}: {marks:?}", disk.name);
        }
        Ok(())
    }
}

fn live(seed: u64, operations: u64, qemu: Qemu) -> Result<()> {
    let mut life = Life::begin(seed, qemu)?;
    let lived = life.live(seed, operations);
    lived.map_err(|error| {
        anyhow!(
            "{error:#}\n\nwhat happened:\n{}\n\nreplay{}: HIGHWATER_LIFE_SEED={seed} \
             HIGHWATER_LIFE_OPERATIONS={operations} cargo nextest run -p highwater --test lab \
             -E 'test(=bare_life::a_life_of_any_seed_loses_nothing)'",
            life.log.join("\n"),
            if qemu == Qemu::System {
                ""
            } else {
                " (with the system's QEMU)"
            }
        )
    })
}

#[test]
fn a_random_life_without_libvirt_loses_nothing() -> Result<()> {
    live(1, 25, Qemu::System)
}

#[test]
fn a_random_life_with_qemu_7_2_loses_nothing() -> Result<()> {
    live(2, 25, Qemu::V7_2)
}

/// Found by a life: QEMU dies while nobody knows whether there will be a point, and
/// the session is ended once more when that is known.
#[test]
fn a_dead_qemu_is_not_waited_for() -> Result<()> {
    let began = Instant::now();
    live(16, 2, Qemu::System)?;
    ensure!(began.elapsed() < Duration::from_secs(40));
    Ok(())
}

/// Of one seed, or of one after the other for some time (`make soak`).
#[test]
fn a_life_of_any_seed_loses_nothing() -> Result<()> {
    let first = number("HIGHWATER_LIFE_SEED")?.unwrap_or(3);
    let operations = number("HIGHWATER_LIFE_OPERATIONS")?.unwrap_or(25);
    let seconds = number("HIGHWATER_LIFE_SECONDS")?.unwrap_or(0);
    let began = Instant::now();
    for seed in first.. {
        live(seed, operations, Qemu::System)?;
        let since = began.elapsed();
        eprintln!("seeds {first} to {seed} survived in {} s", since.as_secs());
        if since >= Duration::from_secs(seconds) {
            break;
        }
    }
    Ok(())
}
