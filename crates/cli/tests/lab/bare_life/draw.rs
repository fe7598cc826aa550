//! What happens next in the life of a VM without libvirt.

use highwater_model::step::Step;
use highwater_testkit::workload::Random;

use super::{Life, Mark};

/// One thing that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Writes {
        disk: usize,
        count: usize,
    },
    Backup(Level),
    /// A plain backup waits at a step until somebody has died.
    Killed {
        step: Step,
        death: Death,
    },
    /// A backup of the images waits until the VM has been started.
    Started(Step),
    Start,
    End(End),
    /// Somebody stops the guest, or lets it go on.
    PauseOrResume,
    MarkRemoved(usize),
    ForeignBitmap(usize),
    DoctorFix,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    Auto,
    Full,
    Differential,
    Copy,
}

/// Who dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Death {
    Mover,
    Guard,
    All,
    Qemu,
}

/// How QEMU ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Kill,
    Quit,
    Terminate,
}

const DEATHS: [Death; 4] = [Death::Mover, Death::Guard, Death::All, Death::Qemu];

fn one<T: Copy>(random: &mut Random, of: &[T]) -> T {
    let place = usize::try_from(random.below(of.len() as u64)).unwrap_or(0);
    of[place]
}

/// Returns the steps that a plain backup may pass: all but libvirt's, and those of
/// the other way.
fn steps(is_on: bool) -> Vec<Step> {
    let other = if is_on { "off-" } else { "qmp-" };
    let never = [
        Step::SecretDefined,
        Step::ScratchMade,
        Step::Frozen,
        Step::MarkToldAgain,
        Step::RecordDeleted,
        Step::Distrusted,
        Step::QmpKeyAdded,
        Step::JobAborted,
        Step::BitmapRemoved,
        Step::MergeStored,
        Step::MergedDeleted,
        // The guard has ended by then.
        Step::IndexMerged,
    ];
    let steps = Step::ALL.iter().copied();
    steps
        .filter(|step| !step.word().starts_with(other) && !never.contains(step))
        .collect()
}

impl Operation {
    /// Draws the next one that is possible.
    pub(super) fn draw(life: &Life, random: &mut Random) -> Self {
        loop {
            let drawn = Self::draw_any(life, random);
            if drawn.is_possible(life) {
                return drawn;
            }
        }
    }

    fn draw_any(life: &Life, random: &mut Random) -> Self {
        let disk = usize::try_from(random.below(life.disks.len() as u64)).unwrap_or(0);
        match random.below(100) {
            0..22 => Self::Writes {
                disk,
                count: 1 + usize::try_from(random.below(16)).unwrap_or(0),
            },
            22..40 => Self::Backup(one(
                random,
                &[
                    Level::Auto,
                    Level::Auto,
                    Level::Auto,
                    Level::Full,
                    Level::Differential,
                    Level::Copy,
                ],
            )),
            40..60 => Self::Killed {
                step: one(random, &steps(life.tale.vm.is_active())),
                death: one(random, &DEATHS),
            },
            60..68 => Self::Started(one(
                random,
                &[
                    Step::OffExported,
                    Step::Begun,
                    Step::PackStored,
                    Step::Copied,
                    Step::Committed,
                    Step::SessionEnded,
                ],
            )),
            68..78 => Self::Start,
            78..86 => Self::End(one(random, &[End::Kill, End::Quit, End::Terminate])),
            86..89 => Self::PauseOrResume,
            89..93 => Self::MarkRemoved(disk),
            93..96 => Self::ForeignBitmap(disk),
            _ => Self::DoctorFix,
        }
    }

    fn is_possible(self, life: &Life) -> bool {
        let is_on = life.tale.vm.is_active();
        match self {
            // Refused otherwise.
            Self::Backup(Level::Differential) => {
                life.disks.iter().all(|disk| disk.mark == Mark::Good)
            }
            Self::Killed { death, .. } => is_on || death != Death::Qemu,
            Self::Start | Self::Started(_) => !is_on,
            Self::Writes { .. } | Self::End(_) => is_on,
            // A dead session may hold the guest, and the marks.
            Self::PauseOrResume => is_on && !life.is_littered,
            Self::MarkRemoved(disk) => {
                let disk = &life.disks[disk];
                !life.is_littered && disk.mark == Mark::Good && (is_on || !disk.is_raw)
            }
            Self::ForeignBitmap(disk) => is_on && !life.is_littered && !life.disks[disk].is_raw,
            Self::Backup(_) | Self::DoctorFix => true,
        }
    }
}
