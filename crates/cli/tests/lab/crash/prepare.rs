//! What has to be wrong before a run for it to pass a step.

use anyhow::{Context as _, Result, ensure};
use highwater_model::step::Step;
use serde_json::json;

use super::blows::{Blow, Waiting};
use super::life::Life;

/// What a step needs to be passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Preparation {
    /// Every run passes it.
    None,
    /// A session that nobody was left to end: its job runs, its mark records.
    DeadSession,
    /// A session that died before its job: only directories.
    DeadStart,
    /// The parent's mark, of which libvirt has forgotten its record.
    Forgotten,
    /// An unfinished mark, of which libvirt has forgotten its record.
    UnfinishedForgotten,
    /// As many index files as are merged with the next one.
    Merge,
    /// A mark that somebody cleared, after many writes.
    Liar,
    /// An encrypted disk, and so encrypted scratch files.
    Encrypted,
    /// A guest with an agent.
    Guest,
    /// A VM without libvirt.
    OverQmp,
    /// A VM that is off.
    Off,
}

pub(super) const fn preparation(step: Step) -> Preparation {
    match step {
        Step::ClaimSet
        | Step::Locked
        | Step::Observed
        | Step::Planned
        | Step::DirectoriesMade
        | Step::ScratchMade
        | Step::Started
        | Step::Begun
        | Step::PackWritten
        | Step::PackStored
        | Step::Copied
        | Step::IndexStored
        | Step::CommitTold
        | Step::Committing
        | Step::ManifestWritten
        | Step::Committed
        | Step::JobSeen
        | Step::JobAborted
        | Step::JobEnded
        | Step::FilesRemoved
        | Step::SessionEnded
        | Step::RecordDeleted
        | Step::MarkGivenUp
        | Step::IndexMerged => Preparation::None,
        Step::QmpServerStarted
        | Step::QmpBitmapsAdded
        | Step::QmpKeyAdded
        | Step::QmpFleeceAdded
        | Step::QmpFilterAdded
        | Step::QmpStopNoted
        | Step::QmpStopped
        | Step::QmpSwitched
        | Step::QmpResumed
        | Step::QmpSnapshotAdded
        | Step::QmpMerged
        | Step::QmpExported
        | Step::QmpExportsRemoved
        | Step::QmpServerStopped
        | Step::QmpSnapshotRemoved
        | Step::QmpSwitchedBack
        | Step::QmpFilterRemoved
        | Step::QmpFleeceRemoved => Preparation::OverQmp,
        Step::OffMarkAdded | Step::OffExported => Preparation::Off,
        Step::LeftoverEnded | Step::MarkTidied => Preparation::DeadSession,
        Step::Swept => Preparation::DeadStart,
        Step::MarkToldAgain => Preparation::Forgotten,
        Step::BitmapRemoved => Preparation::UnfinishedForgotten,
        Step::MergeStored | Step::MergedDeleted => Preparation::Merge,
        Step::Distrusted => Preparation::Liar,
        Step::SecretDefined => Preparation::Encrypted,
        Step::Frozen => Preparation::Guest,
    }
}

/// Index files that a run with one more merges (`FAN_IN` of the repository).
const MERGED: usize = 8;

impl Life {
    /// Leaves the VM as a run needs it to pass the step.
    pub(super) fn prepare(&mut self, step: Step) -> Result<()> {
        match preparation(step) {
            Preparation::None | Preparation::Encrypted => Ok(()),
            Preparation::DeadSession => self.die_at(Step::Begun),
            Preparation::DeadStart => self.die_at(Step::ScratchMade),
            Preparation::Forgotten => self.forget_newest_mark(),
            Preparation::UnfinishedForgotten => {
                self.die_at(Step::Begun)?;
                self.end_job()?;
                self.forget_newest_mark()
            }
            Preparation::Liar => self.clear_mark(),
            Preparation::Merge => {
                while !self.merges_next()? {
                    self.write()?;
                    self.backs_up(|mode| mode == "incremental")?;
                }
                Ok(())
            }
            Preparation::Guest => anyhow::bail!("this VM has no guest"),
            Preparation::Off => anyhow::bail!("this VM runs"),
            Preparation::OverQmp => anyhow::bail!("libvirt has this VM's monitor"),
        }
    }

    fn die_at(&mut self, step: Step) -> Result<()> {
        self.write()?;
        let waiting = Waiting::at(&self.bed, &self.vm, step, Blow::KillAll)?;
        waiting.strike(&self.bed, &self.vm, Blow::KillAll).map(drop)
    }

    /// As an admin may do who finds it in the way.
    fn end_job(&self) -> Result<()> {
        self.bed.lab.virsh(&["domjobabort", self.vm.name()])?;
        super::blows::wait_until(|| Ok(!self.vm.job_running()?))
    }

    /// Clears what tells of so many writes that an audit cannot miss them all.
    fn clear_mark(&mut self) -> Result<()> {
        self.write_often(100)?;
        let image = self.vm.image("vda");
        let places = self.vm.bitmaps_everywhere()?;
        let mut places = places.iter();
        let place = places.find(|place| place.file == image && place.bitmap.recording);
        let place = place.context("a mark on vda")?;
        let arguments = json!({"node": place.node, "name": place.bitmap.name});
        let clear = json!({"execute": "block-dirty-bitmap-clear", "arguments": arguments});
        self.vm.monitor(&clear).map(drop)
    }

    fn forget_newest_mark(&self) -> Result<()> {
        let name = self.vm.name();
        let list = ["checkpoint-list", name, "--name", "--topological"];
        let marks = self.bed.lab.virsh(&list)?;
        let newest = marks.split_whitespace().max().context("a mark")?;
        self.bed
            .lab
            .virsh(&["checkpoint-delete", name, newest, "--metadata"])
            .map(drop)
    }

    /// Says whether one more index file will have some merged.
    pub(super) fn merges_next(&self) -> Result<bool> {
        let files = std::fs::read_dir(self.bed.repo().join("index"))?;
        let mut small = 0;
        for file in files {
            // Of the lowest tier.
            small += usize::from(file?.metadata()?.len() < 32 << 10);
        }
        ensure!(small <= MERGED, "{small} index files, and none was merged");
        Ok(small + 1 >= MERGED)
    }
}
