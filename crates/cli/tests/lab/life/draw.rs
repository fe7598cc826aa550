//! What happens next: drawn from a seed and from what the model knows.

use highwater_model::step::Step;
use highwater_testkit::workload::Random;

use super::model::{Disk, Model, PLUGGED, Power};

/// One thing that happens in a life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Operation {
    Writes {
        disk: usize,
        count: u64,
        flushed: bool,
    },
    Backup {
        repository: usize,
        options: Vec<String>,
        fresh_runtime: bool,
    },
    /// A plain backup that waits at a step until something has happened.
    Held {
        repository: usize,
        step: Step,
        meanwhile: Meanwhile,
    },
    Restore {
        repository: usize,
        nth: u64,
        one_disk: bool,
        format: &'static str,
    },
    Verify {
        repository: usize,
        read_data: bool,
    },
    List {
        repository: usize,
        nth: u64,
    },
    /// QEMU's own tools read what the model says.
    Look,
    Doctor {
        repository: usize,
        what: Doctor,
    },
    Vm(VmLife),
    Disk {
        disk: usize,
        what: DiskLife,
    },
    Harm {
        repository: usize,
        disk: usize,
        what: Harm,
    },
    Foreign(Foreign),
}

/// What happens while a backup waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meanwhile {
    Writes(u64),
    /// Somebody lists, restores and asks the doctor.
    Looks,
    /// Whoever passes the step dies.
    Dies,
    MoverDies,
    GuardDies,
    BothDie,
    QemuDies,
    LibvirtdRestarts,
    /// It is back when the backup has ended.
    LibvirtdDies,
    Terminated,
    Interrupted,
    /// The repository fails from then on, or once: an action of `HIGHWATER_FAULT`.
    StoreFails(&'static str),
}

const FAILURES: [&str; 5] = [
    "store-broken",
    "store-hiccup",
    "store-full",
    "store-done",
    "store-lost",
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doctor {
    Look,
    Fix,
    Purge,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum VmLife {
    Start,
    Off,
    OffAndOn,
    Kill,
    Reset,
    Suspend,
    Resume,
    Save,
    UndefineAndDefine,
    RestartLibvirtd,
    /// A backup finds no libvirtd.
    WithoutLibvirtd {
        repository: usize,
    },
    /// A backup beside a snapshot within the images.
    InternalSnapshot {
        repository: usize,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DiskLife {
    Toggle,
    Grow,
    GrowOff,
    ShrinkOff,
    Snapshot,
    Commit,
    BlockCopy,
    OverlayOff,
    CopyOff,
    /// An older copy of the image is kept while the VM is off.
    KeepOff,
    /// And written back into its place, or moved there.
    RollBackOff {
        moved: bool,
    },
}

/// Somebody does something to our marks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Harm {
    BitmapRemoved,
    BitmapDisabled,
    BitmapRemovedOff,
    CheckpointDeleted,
    CheckpointForgotten,
    CheckpointDeletedWithChildren,
}

/// What others do for themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Foreign {
    Checkpoint,
    CheckpointDeleted,
    Bitmap { disabled: bool },
    BackupJob { repository: usize },
    BlockJob { repository: usize },
    Server { repository: usize, exports: bool },
}

fn one<T: Clone>(random: &mut Random, of: &[T]) -> T {
    let place = usize::try_from(random.below(of.len() as u64)).unwrap_or(0);
    of[place].clone()
}

impl Operation {
    /// Draws the next one that is possible.
    pub(super) fn draw(model: &Model, random: &mut Random) -> Self {
        loop {
            let drawn = Self::draw_any(model, random);
            if drawn.is_possible(model) {
                return drawn;
            }
        }
    }

    fn draw_any(model: &Model, random: &mut Random) -> Self {
        let repository = usize::from(random.below(3) == 0);
        let disk = usize::try_from(random.below(model.disks.len() as u64)).unwrap_or(0);
        match random.below(100) {
            0..26 => Self::Writes {
                disk,
                count: 1 + random.below(20),
                flushed: random.below(4) > 0,
            },
            26..48 => Self::draw_backup(model, repository, random),
            48..62 => Self::Held {
                repository,
                step: one(random, Step::ALL),
                meanwhile: Meanwhile::draw(random),
            },
            62..67 => Self::Restore {
                repository,
                nth: random.next(),
                one_disk: random.below(2) == 0,
                format: one(random, &["raw", "qcow2"]),
            },
            67..69 => Self::Verify {
                repository,
                read_data: random.below(2) == 0,
            },
            69..71 => Self::List {
                repository,
                nth: random.next(),
            },
            71..73 => Self::Look,
            73..76 => Self::Doctor {
                repository,
                what: one(
                    random,
                    &[
                        Doctor::Look,
                        Doctor::Look,
                        Doctor::Fix,
                        Doctor::Fix,
                        Doctor::Purge,
                    ],
                ),
            },
            76..84 => Self::Vm(VmLife::draw(model, repository, random)),
            84..91 => Self::Disk {
                disk,
                what: DiskLife::draw(random),
            },
            91..95 => Self::Harm {
                repository,
                disk,
                what: one(
                    random,
                    &[
                        Harm::BitmapRemoved,
                        Harm::BitmapDisabled,
                        Harm::BitmapRemovedOff,
                        Harm::CheckpointDeleted,
                        Harm::CheckpointForgotten,
                        Harm::CheckpointForgotten,
                        Harm::CheckpointDeletedWithChildren,
                    ],
                ),
            },
            _ => Self::Foreign(Foreign::draw(repository, random)),
        }
    }

    fn draw_backup(model: &Model, repository: usize, random: &mut Random) -> Self {
        let mut options = Vec::new();
        let mut say = |words: &[&str]| options.extend(words.iter().map(|it| (*it).to_owned()));
        match random.below(10) {
            0 => say(&["-l", "full"]),
            1 => say(&["-l", "incremental"]),
            2 => say(&["-l", "differential"]),
            3 => say(&["-l", "copy"]),
            _ => {}
        }
        let attached = model.attached();
        match random.below(6) {
            0 => say(&["-d", one(random, &attached)]),
            1 if attached.len() > 1 => say(&["-x", one(random, &attached)]),
            _ => {}
        }
        match random.below(8) {
            0 => say(&["--workers", "1"]),
            1 => say(&["--compression", "none"]),
            2 => say(&["--compression", "lz4"]),
            3 => say(&["--tag", "drawn"]),
            4 => say(&["--audit", "10%"]),
            _ => {}
        }
        Self::Backup {
            repository,
            options,
            fresh_runtime: random.below(12) == 0,
        }
    }

    /// The model alone decides, so that a seed tells the whole life.
    fn is_possible(&self, model: &Model) -> bool {
        let is_on = model.power != Power::Off;
        if model.dead_session && !self.is_possible_beside_a_dead_session() {
            return false;
        }
        match self {
            Self::Writes { disk, .. } => is_on && model.disks[*disk].attached,
            Self::Backup { .. }
            | Self::Restore { .. }
            | Self::Verify { .. }
            | Self::List { .. }
            | Self::Look
            | Self::Doctor { .. } => true,
            // Frozen takes a guest with an agent.
            Self::Held { step, .. } => is_on && *step != Step::Frozen,
            Self::Vm(what) => match what {
                VmLife::Start => !is_on,
                // What is saved while paused has closed images until it goes on.
                VmLife::Suspend | VmLife::Reset | VmLife::Save => model.power == Power::Running,
                VmLife::Resume => model.power == Power::Paused,
                VmLife::Off | VmLife::OffAndOn | VmLife::Kill | VmLife::UndefineAndDefine => is_on,
                VmLife::RestartLibvirtd | VmLife::WithoutLibvirtd { .. } => true,
                // QEMU makes one of all disks or of none.
                VmLife::InternalSnapshot { .. } => {
                    let mut disks = model.disks.iter();
                    model.power == Power::Running && disks.all(Disk::may_have_internal_snapshots)
                }
            },
            Self::Disk { disk, what } => what.is_possible(model, *disk),
            Self::Harm { disk, .. } => {
                is_on && model.disks[*disk].attached && model.disks[*disk].is_tracked()
            }
            Self::Foreign(what) => {
                model.power == Power::Running
                    && (*what != Foreign::CheckpointDeleted || !model.theirs.is_empty())
            }
        }
    }

    /// What libvirt does to a VM that a job holds, or what needs it not.
    const fn is_possible_beside_a_dead_session(&self) -> bool {
        match self {
            Self::Writes { .. }
            | Self::Restore { .. }
            | Self::Verify { .. }
            | Self::List { .. }
            | Self::Look
            | Self::Held { .. }
            | Self::Doctor { .. }
            | Self::Vm(VmLife::Kill | VmLife::OffAndOn | VmLife::RestartLibvirtd) => true,
            Self::Backup { fresh_runtime, .. } => !*fresh_runtime,
            Self::Vm(_) | Self::Disk { .. } | Self::Harm { .. } | Self::Foreign(_) => false,
        }
    }
}

impl Meanwhile {
    fn draw(random: &mut Random) -> Self {
        match random.below(20) {
            16 => Self::Looks,
            17..20 => Self::StoreFails(one(random, &FAILURES)),
            0..4 => Self::Writes(1 + random.below(12)),
            4..6 => Self::Dies,
            6 => Self::MoverDies,
            7 => Self::GuardDies,
            8 | 9 => Self::BothDie,
            10 | 11 => Self::QemuDies,
            12 => Self::LibvirtdRestarts,
            13 => Self::LibvirtdDies,
            14 => Self::Terminated,
            _ => Self::Interrupted,
        }
    }
}

impl VmLife {
    fn draw(model: &Model, repository: usize, random: &mut Random) -> Self {
        if model.power == Power::Off {
            return Self::Start;
        }
        if model.power == Power::Paused && random.below(2) == 0 {
            return Self::Resume;
        }
        let all = [
            Self::Off,
            Self::OffAndOn,
            Self::OffAndOn,
            Self::Kill,
            Self::Kill,
            Self::Reset,
            Self::Suspend,
            Self::Save,
            Self::UndefineAndDefine,
            Self::RestartLibvirtd,
            Self::WithoutLibvirtd { repository },
            Self::InternalSnapshot { repository },
        ];
        one(random, &all)
    }
}

impl DiskLife {
    fn draw(random: &mut Random) -> Self {
        let all = [
            Self::Toggle,
            Self::Toggle,
            Self::Grow,
            Self::GrowOff,
            Self::ShrinkOff,
            Self::Snapshot,
            Self::Commit,
            Self::BlockCopy,
            Self::OverlayOff,
            Self::CopyOff,
            Self::KeepOff,
            Self::RollBackOff { moved: false },
            Self::RollBackOff { moved: true },
        ];
        one(random, &all)
    }

    fn is_possible(self, model: &Model, number: usize) -> bool {
        let disk = &model.disks[number];
        let is_on = model.power != Power::Off;
        let is_plugged = number == PLUGGED;
        let is_alone = disk.chain.len() == 1 && disk.is_tracked();
        // The raw file beside it would have to be copied, too.
        let is_one_file = is_alone && disk.kind != super::model::Kind::DataFile;
        match self {
            Self::Toggle => model.power == Power::Running && is_plugged,
            _ if !is_on || !disk.attached => false,
            Self::Grow | Self::GrowOff => {
                disk.shrunk_for.is_empty() && disk.bytes.len() < super::model::SIZE_MAX
            }
            Self::ShrinkOff => is_alone && disk.bytes.len() > (1 << 20),
            Self::Snapshot | Self::OverlayOff => {
                model.power == Power::Running
                    && !is_plugged
                    && disk.is_tracked()
                    && disk.chain.len() < 3
            }
            Self::Commit => model.power == Power::Running && disk.chain.len() > 1,
            Self::BlockCopy => model.power == Power::Running && !is_plugged && disk.is_tracked(),
            Self::CopyOff => is_one_file,
            Self::KeepOff => is_one_file,
            Self::RollBackOff { .. } => is_one_file && disk.kept.is_some(),
        }
    }
}

impl Foreign {
    fn draw(repository: usize, random: &mut Random) -> Self {
        match random.below(9) {
            0..3 => Self::Checkpoint,
            3 => Self::CheckpointDeleted,
            4 | 5 => Self::Bitmap {
                disabled: random.below(3) == 0,
            },
            6 => Self::BackupJob { repository },
            7 => Self::BlockJob { repository },
            _ => Self::Server {
                repository,
                exports: random.below(2) == 0,
            },
        }
    }
}
