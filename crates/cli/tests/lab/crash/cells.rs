//! What must come of a blow at a step, and why.

use std::fmt;

use highwater_model::step::Step;

use super::blows::Blow;

/// One cell of the matrix.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cell {
    pub(super) step: Step,
    pub(super) blow: Blow,
}

impl fmt::Display for Cell {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} x {:?}", self.step.word(), self.blow)
    }
}

/// What a backup is about when it passes a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// It looks at the VM, and tidies up after others.
    Looking,
    /// It begins a session; there is no job yet.
    Starting,
    /// The job runs, and some bytes may not be read yet.
    Running,
    /// All bytes were read; no manifest is there.
    Read,
    /// The manifest may come at any moment.
    Committing,
    /// The manifest is there.
    Committed,
    /// Nothing is left to do.
    Done,
}

pub(super) const fn phase(step: Step) -> Phase {
    match step {
        Step::ClaimSet
        | Step::Locked
        | Step::Observed
        | Step::LeftoverEnded
        | Step::Swept
        | Step::BitmapRemoved
        | Step::MarkTidied
        | Step::MarkToldAgain
        | Step::Planned => Phase::Looking,
        Step::DirectoriesMade
        | Step::SecretDefined
        | Step::ScratchMade
        | Step::QmpServerStarted
        | Step::QmpBitmapsAdded
        | Step::QmpKeyAdded
        | Step::QmpFleeceAdded
        | Step::QmpFilterAdded
        | Step::Frozen
        | Step::OffMarkAdded
        | Step::QmpStopNoted
        | Step::QmpStopped => Phase::Starting,
        // The first pack may be written while the last bytes are read.
        Step::QmpSwitched
        | Step::QmpResumed
        | Step::QmpSnapshotAdded
        | Step::QmpMerged
        | Step::QmpExported
        | Step::OffExported
        | Step::Started
        | Step::Begun
        | Step::PackWritten
        | Step::PackStored => Phase::Running,
        Step::Copied | Step::IndexStored | Step::CommitTold => Phase::Read,
        Step::Committing | Step::ManifestWritten => Phase::Committing,
        Step::Committed
        | Step::JobSeen
        | Step::QmpExportsRemoved
        | Step::QmpServerStopped
        | Step::QmpSnapshotRemoved
        | Step::QmpSwitchedBack
        | Step::QmpFilterRemoved
        | Step::QmpFleeceRemoved
        | Step::JobAborted
        | Step::JobEnded
        | Step::FilesRemoved
        | Step::SessionEnded
        | Step::Distrusted
        | Step::RecordDeleted
        | Step::MarkGivenUp
        | Step::MergeStored
        | Step::MergedDeleted => Phase::Committed,
        Step::IndexMerged => Phase::Done,
    }
}

/// Says whether what the guest writes at the step is in the run's point.
pub(super) const fn takes_the_point_later(step: Step) -> bool {
    matches!(phase(step), Phase::Looking | Phase::Starting)
}

/// Says whether the plan is made right after the step.
const fn is_before_the_plan(step: Step) -> bool {
    matches!(
        step,
        Step::BitmapRemoved | Step::MarkTidied | Step::MarkToldAgain
    )
}

/// How the struck run ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// Somehow, but not as a success.
    Killed,
    /// With exit code 1, an error, and what state things are in.
    Failed,
    /// With exit code 0.
    Done,
    /// In one of these two ways.
    Either,
}

/// Whether there is a point of the struck run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Point {
    Made,
    None,
    Either,
}

/// How the next plain backup reads each disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    Incremental,
    /// QEMU took its bitmaps with it.
    Rescan,
    /// The same, unless the struck run has found the VM off, and read its images.
    RescanUnlessOff,
}

impl Next {
    pub(super) fn allows(self, mode: &str) -> bool {
        match self {
            Self::Incremental => mode == "incremental",
            Self::Rescan => matches!(
                mode,
                "rescan: bitmap-missing" | "rescan: bitmap-inconsistent"
            ),
            Self::RescanUnlessOff => Self::Incremental.allows(mode) || Self::Rescan.allows(mode),
        }
    }
}

/// What must come of a cell.
pub(super) struct Expected {
    pub(super) end: End,
    pub(super) point: Point,
    /// Nothing but marks is left at the VM when the run has ended.
    pub(super) is_tidy: bool,
    pub(super) next: Next,
}

pub(super) const fn expected(cell: Cell) -> Expected {
    let (end, point) = outcome(cell);
    Expected {
        end,
        point,
        is_tidy: is_tidy(cell),
        next: match cell.blow {
            Blow::KillQemu if takes_the_point_later(cell.step) => Next::RescanUnlessOff,
            Blow::KillQemu => Next::Rescan,
            // No death of ours, nor of libvirtd, nor of the store is worth a
            // rescan: the old mark has gone on, or the new one counts.
            Blow::KillMover
            | Blow::KillGuard
            | Blow::KillAll
            | Blow::RestartLibvirtd
            | Blow::MissLibvirtd
            | Blow::KillLibvirtd
            | Blow::StoreBroken
            | Blow::StoreHiccup
            | Blow::StoreFull
            | Blow::StoreDone
            | Blow::StoreLost => Next::Incremental,
        },
    }
}

const FAILED: (End, Point) = (End::Failed, Point::None);
const DONE: (End, Point) = (End::Done, Point::Made);
/// The bytes come from QEMU, so who manages the VM may be gone for a while.
const FAILED_OR_DONE: (End, Point) = (End::Either, Point::Either);

const fn outcome(cell: Cell) -> (End, Point) {
    let phase = phase(cell.step);
    match cell.blow {
        Blow::KillMover | Blow::KillAll => match phase {
            Phase::Looking | Phase::Starting | Phase::Running | Phase::Read | Phase::Committing => {
                (End::Killed, Point::None)
            }
            Phase::Committed | Phase::Done => (End::Killed, Point::Made),
        },
        Blow::KillGuard => match phase {
            // Nobody may commit whose guard does not know of it.
            Phase::Looking | Phase::Starting | Phase::Running | Phase::Read => FAILED,
            Phase::Committing | Phase::Committed | Phase::Done => DONE,
        },
        Blow::KillQemu => match phase {
            // A VM that is found off is backed up from its images.
            Phase::Looking | Phase::Starting => FAILED_OR_DONE,
            // What was read before is right.
            Phase::Running | Phase::Read => FAILED_OR_DONE,
            Phase::Committing | Phase::Committed | Phase::Done => DONE,
        },
        Blow::RestartLibvirtd | Blow::MissLibvirtd | Blow::KillLibvirtd => match phase {
            Phase::Looking | Phase::Starting | Phase::Running | Phase::Read => FAILED_OR_DONE,
            Phase::Committing | Phase::Committed | Phase::Done => DONE,
        },
        // What is read next may be a page of the parent's tree. One that cannot be
        // read makes a rescan, and the run goes on.
        Blow::StoreHiccup if is_before_the_plan(cell.step) => FAILED_OR_DONE,
        Blow::StoreBroken | Blow::StoreHiccup | Blow::StoreFull => match cell.step {
            // Its bytes are in the file, which only wants its name.
            Step::ManifestWritten => DONE,
            _ => match phase {
                Phase::Looking
                | Phase::Starting
                | Phase::Running
                | Phase::Read
                | Phase::Committing => FAILED,
                // The index is merged another time.
                Phase::Committed | Phase::Done => DONE,
            },
        },
        Blow::StoreDone => match cell.step {
            // The next object is the manifest: nobody knows that it is there.
            Step::IndexStored | Step::CommitTold | Step::Committing => (End::Failed, Point::Made),
            Step::ManifestWritten => DONE,
            _ => match phase {
                Phase::Looking
                | Phase::Starting
                | Phase::Running
                | Phase::Read
                | Phase::Committing => FAILED,
                Phase::Committed | Phase::Done => DONE,
            },
        },
        Blow::StoreLost => match cell.step {
            Step::ManifestWritten => DONE,
            _ => match phase {
                Phase::Looking
                | Phase::Starting
                | Phase::Running
                | Phase::Read
                | Phase::Committing => FAILED,
                Phase::Committed | Phase::Done => DONE,
            },
        },
    }
}

/// Whether somebody is left who can tidy up, and has the means.
const fn is_tidy(cell: Cell) -> bool {
    match cell.blow {
        Blow::KillMover
        | Blow::KillGuard
        | Blow::KillQemu
        | Blow::RestartLibvirtd
        | Blow::MissLibvirtd
        | Blow::StoreBroken
        | Blow::StoreHiccup
        | Blow::StoreFull
        | Blow::StoreDone
        | Blow::StoreLost => true,
        // Nobody is left, or nobody who can speak to the VM.
        Blow::KillAll | Blow::KillLibvirtd => false,
    }
}
