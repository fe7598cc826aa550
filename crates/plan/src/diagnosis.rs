//! What is wrong at a VM, how bad it is, and who has to do something about it.
//!
//! A finding is repaired only if it is ours beyond doubt: a name of our own
//! making, of this repository. Whatever else lies around is told and left alone.

use std::collections::{BTreeMap, BTreeSet};

use highwater_model::{MarkName, PointId, RepoId, SessionId};

use crate::disk::{BitmapView, DiskPlan};
use crate::marks::{FoundMark, Parent, superseded_marks, unfinished_marks};
use crate::vm::{JobView, VmState};
use crate::why::{Refusal, Why};

/// Everything that is known when a VM is looked at.
#[derive(Debug, Clone)]
pub struct Scene<'a> {
    /// The repository on whose behalf it is looked at.
    pub repo: RepoId,
    /// Whether and how the VM runs.
    pub state: VmState,
    /// What job runs on it.
    pub job: JobView,
    /// Whether a living backup of ours holds the VM.
    pub is_held: bool,
    /// All points of the VM.
    pub committed: &'a BTreeSet<PointId>,
    /// Those whose manifest cannot be read.
    pub unreadable: &'a BTreeSet<PointId>,
    /// The parent of each disk.
    pub parents: &'a [Parent],
    /// Needed marks that the hypervisor forgot and can be told again.
    pub forgotten: &'a BTreeSet<MarkName>,
    /// All marks of any Highwater.
    pub marks: &'a [MarkView],
    /// What the next backup would do with each disk.
    pub disks: &'a [(String, DiskPlan)],
    /// Sessions that left directories.
    pub left: &'a [SessionId],
    /// Sessions that the hypervisor's process holds something of, without a job.
    pub remains: &'a [SessionId],
    /// What is not ours.
    pub strange: &'a [Strange],
    /// What another program's backup has left.
    pub wrecks: Wrecks,
}

/// How much another program's backup has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wrecks {
    /// Things that do harm where they are.
    pub harmful: usize,
    /// Things that the program would use again.
    pub harmless: usize,
    /// Whether the program is at work.
    pub is_in_use: bool,
}

/// A mark as it is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MarkView {
    /// Its name.
    pub name: MarkName,
    /// Whether it is this VM's.
    pub is_of_vm: bool,
    /// Whether the hypervisor has a record of it.
    pub has_record: bool,
    /// Its bitmap on each disk that has one, or that the record names.
    pub disks: Vec<MarkOnDisk>,
}

/// A mark on one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MarkOnDisk {
    /// Target name.
    pub target: String,
    /// State of its bitmap; `None` where nobody looked: the VM is off, or the
    /// mark is another VM's.
    pub bitmap: Option<BitmapView>,
    /// What it calls dirty, bytes.
    pub dirty_bytes: u64,
}

/// Something at the VM that is not ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Strange {
    /// A record of the hypervisor.
    Checkpoint {
        /// Its name.
        name: String,
        /// Targets of its disks.
        disks: Vec<String>,
    },
    /// A bitmap without such a record.
    Bitmap {
        /// Its name.
        name: String,
        /// Target of the disk it is on.
        disk: String,
        /// Whether it records.
        recording: bool,
    },
    /// A job inside the hypervisor's process.
    InnerJob {
        /// Its name.
        id: String,
        /// Its kind.
        kind: String,
    },
    /// An export.
    Export {
        /// Its name.
        id: String,
        /// The node that it shows.
        node: String,
        /// Whether it is one of QEMU's NBD server. There is one server only,
        /// and a backup needs it.
        is_nbd: bool,
    },
    /// A block node.
    Node {
        /// Its name.
        node: String,
        /// Its driver.
        driver: String,
        /// The disk whose guest device writes to it.
        root_of: Option<String>,
    },
    /// What the guest's disk does when a write fails.
    WriteErrors {
        /// Target name.
        disk: String,
        /// Whether the guest is not even told.
        is_ignored: bool,
    },
}

/// What a mark is good for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The next backup builds on it, on these disks.
    Needed(Vec<String>),
    /// The same, once the hypervisor is told about it again.
    Forgotten(Vec<String>),
    /// The running backup made it.
    InFlight,
    /// Its backup never committed.
    Unfinished,
    /// A newer mark took its place on every disk.
    Superseded,
    /// No disk needs it, and there is none newer.
    Unneeded,
    /// The next backup would build on it, and cannot.
    Useless(Why),
    /// The manifest of its point cannot be read, so nobody knows.
    Unreadable,
    /// Another repository's.
    OtherRepository,
    /// Another VM's, which has or had a backing file of this one as its disk.
    OtherVm,
}

impl Verdict {
    /// Returns the word of JSON.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Needed(_) => "needed",
            Self::Forgotten(_) => "forgotten",
            Self::InFlight => "in-flight",
            Self::Unfinished => "unfinished",
            Self::Superseded => "superseded",
            Self::Unneeded => "unneeded",
            Self::Useless(_) => "useless",
            Self::Unreadable => "unreadable",
            Self::OtherRepository => "other-repository",
            Self::OtherVm => "other-vm",
        }
    }
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// The job of a session whose owner is dead.
    DeadSession(SessionId),
    /// Somebody else's job, which keeps a backup from starting.
    ForeignJob,
    /// The VM stands still because a write of it failed.
    Stuck,
    /// The guest writes to another node than a backup would read.
    GraphChanged {
        /// Target name.
        disk: String,
    },
    /// Whether it does cannot be learned.
    GraphUnknown {
        /// Target name.
        disk: String,
    },
    /// Somebody uses the bitmap that a backup needs.
    BitmapBusy {
        /// Target name.
        disk: String,
    },
    /// The bitmap that the next increment of a disk would be built on lies.
    BitmapLied {
        /// Target name.
        disk: String,
    },
    /// Directories of a dead session.
    LeftDirectories(SessionId),
    /// What a dead session left in the hypervisor's process.
    Remains(SessionId),
    /// A mark that should not be there, or not so.
    Mark {
        /// Its name.
        name: MarkName,
        /// What is wrong.
        verdict: Verdict,
    },
    /// A point whose manifest cannot be read.
    UnreadablePoint(PointId),
    /// Marks of another repository.
    OtherRepository {
        /// The beginning of its id.
        repo: String,
        /// Its marks.
        marks: Vec<MarkName>,
    },
    /// Marks of another VM in a backing file.
    OtherVm(Vec<MarkName>),
    /// Something that is not ours.
    Strange(Strange),
    /// What another program's backup has left.
    Wreckage(Wrecks),
}

impl Problem {
    /// Returns the word of JSON.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::DeadSession(_) => "dead-session",
            Self::ForeignJob => "foreign-job",
            Self::Stuck => "paused-on-error",
            Self::GraphChanged { .. } => "graph-changed",
            Self::GraphUnknown { .. } => "graph-unknown",
            Self::BitmapBusy { .. } => "bitmap-busy",
            Self::BitmapLied { .. } => "bitmap-lied",
            Self::LeftDirectories(_) => "left-directories",
            Self::Remains(_) => "session-remains",
            Self::Mark { verdict, .. } => match verdict {
                Verdict::Forgotten(_) => "forgotten-mark",
                Verdict::Unfinished => "unfinished-mark",
                Verdict::Superseded => "superseded-mark",
                Verdict::Useless(_) => "useless-mark",
                Verdict::Unneeded
                | Verdict::Needed(_)
                | Verdict::InFlight
                | Verdict::Unreadable
                | Verdict::OtherRepository
                | Verdict::OtherVm => "unneeded-mark",
            },
            Self::UnreadablePoint(_) => "unreadable-point",
            Self::OtherRepository { .. } => "other-repository",
            Self::OtherVm(_) => "other-vm",
            Self::Wreckage(_) => "foreign-wreckage",
            Self::Strange(strange) => match strange {
                Strange::Checkpoint { .. } => "foreign-checkpoint",
                Strange::Bitmap { .. } => "foreign-bitmap",
                Strange::InnerJob { .. } => "foreign-inner-job",
                Strange::Export { .. } => "foreign-export",
                Strange::Node { .. } => "foreign-node",
                Strange::WriteErrors { .. } => "write-errors",
            },
        }
    }
}

/// Who has to do something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Remedy {
    /// A person: no program of ours can or may.
    Hand,
    /// The doctor, and likewise the next backup.
    Fix,
    /// The next backup, when it can: not now.
    NextBackup,
    /// Nobody.
    Nothing,
}

impl Remedy {
    /// Returns the word of JSON.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Hand => "hand",
            Self::Fix => "fix",
            Self::NextBackup => "next-backup",
            Self::Nothing => "nothing",
        }
    }
}

/// Something that was found, and who has to do something about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What it is.
    pub problem: Problem,
    /// Who.
    pub remedy: Remedy,
}

impl Finding {
    /// Returns whether the VM is not healthy because of it.
    pub const fn needs_something(&self) -> bool {
        matches!(self.remedy, Remedy::Hand | Remedy::Fix)
    }
}

/// Says of each mark what it is good for.
pub fn judge_marks(scene: &Scene<'_>) -> Vec<Verdict> {
    let found: Vec<FoundMark> = scene
        .marks
        .iter()
        .map(|mark| FoundMark {
            name: mark.name.clone(),
            is_of_vm: mark.is_of_vm,
        })
        .collect();
    let unfinished = unfinished_marks(scene.repo, &found, scene.committed);
    let superseded = superseded_marks(scene.repo, &found, scene.parents);
    let newest = scene.parents.iter().map(|parent| parent.mark.point()).max();
    let judge = |mark: &MarkView| {
        let name = &mark.name;
        if !name.is_of(scene.repo) {
            return Verdict::OtherRepository;
        }
        if !mark.is_of_vm {
            return Verdict::OtherVm;
        }
        if unfinished.contains(name) {
            return if scene.is_held {
                Verdict::InFlight
            } else {
                Verdict::Unfinished
            };
        }
        if scene.unreadable.contains(&name.point()) {
            return Verdict::Unreadable;
        }
        if superseded.contains(name) {
            return if newest.is_some_and(|newest| newest > name.point()) {
                Verdict::Superseded
            } else {
                Verdict::Unneeded
            };
        }
        of_a_parent(scene, name)
    };
    scene.marks.iter().map(judge).collect()
}

/// A mark that some disk's next increment would build on: useless only if it is
/// the mark's own fault that none of them can.
fn of_a_parent(scene: &Scene<'_>, name: &MarkName) -> Verdict {
    let disks: Vec<String> = scene
        .parents
        .iter()
        .filter(|parent| parent.mark == *name)
        .map(|parent| parent.target.clone())
        .collect();
    if scene.forgotten.contains(name) {
        return Verdict::Forgotten(disks);
    }
    let faults: Option<Vec<Why>> = disks
        .iter()
        .map(|target| {
            let plan = scene.disks.iter().find(|(disk, _)| disk == target);
            plan.and_then(|(_, plan)| fault_of_mark(plan))
        })
        .collect();
    match faults.as_deref() {
        Some([first, ..]) => Verdict::Useless(*first),
        Some([]) | None => Verdict::Needed(disks),
    }
}

/// Returns why the mark itself is no good, if that is why the disk is read as a
/// whole. What may still change (a busy bitmap, an image or a process that
/// cannot be seen) is no fault of it.
const fn fault_of_mark(plan: &DiskPlan) -> Option<Why> {
    match plan {
        DiskPlan::Rescan(
            why @ (Why::BitmapMissing
            | Why::BitmapInconsistent
            | Why::BitmapNotRecording
            | Why::BitmapNotPersistent
            | Why::BitmapGranularity
            | Why::MarkRemade
            | Why::MarkRefused),
        ) => Some(*why),
        _ => None,
    }
}

/// Returns what is to be told, the worst first; `verdicts` are of
/// [`judge_marks`].
pub fn diagnose(scene: &Scene<'_>, verdicts: &[Verdict]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut tell = |problem, remedy| findings.push(Finding { problem, remedy });
    // Whoever holds the VM tidies up himself.
    let now = |remedy| {
        if scene.is_held {
            Remedy::NextBackup
        } else {
            remedy
        }
    };
    let runs = matches!(
        scene.state,
        VmState::Alive | VmState::Stuck | VmState::AtRest
    );
    match scene.job {
        JobView::Ours(session) if !scene.is_held => {
            tell(Problem::DeadSession(session), Remedy::Fix);
        }
        JobView::Foreign => tell(Problem::ForeignJob, Remedy::Hand),
        JobView::Ours(_) | JobView::None => {
            if scene.state == VmState::Stuck && !scene.is_held {
                tell(Problem::Stuck, Remedy::Hand);
            }
        }
    }
    for (disk, plan) in scene.disks.iter().filter(|_| runs) {
        let disk = disk.clone();
        match plan {
            DiskPlan::Refuse(Refusal::GraphChanged) => {
                tell(Problem::GraphChanged { disk }, Remedy::Hand);
            }
            DiskPlan::Refuse(Refusal::GraphUnknown) => {
                tell(Problem::GraphUnknown { disk }, Remedy::Hand);
            }
            DiskPlan::Rescan(Why::BitmapLied)
            | DiskPlan::Refuse(Refusal::NoIncrement(Why::BitmapLied))
                if has_bitmap(scene, &disk) =>
            {
                tell(Problem::BitmapLied { disk }, now(Remedy::Fix));
            }
            // The job that uses it is told of.
            DiskPlan::Refuse(Refusal::BitmapBusy) if scene.job == JobView::None => {
                tell(Problem::BitmapBusy { disk }, now(Remedy::Hand));
            }
            _ => {}
        }
    }
    // They go with the job, if one tells of them.
    let of_job = |session: SessionId| scene.job == JobView::Ours(session);
    let remains = scene.remains.iter().filter(|_| !scene.is_held);
    for session in remains.filter(|session| !of_job(**session)) {
        tell(Problem::Remains(*session), Remedy::Fix);
    }
    for session in scene.left.iter().filter(|_| !scene.is_held) {
        tell(Problem::LeftDirectories(*session), Remedy::Fix);
    }
    let mut others: BTreeMap<String, Vec<MarkName>> = BTreeMap::new();
    let mut of_other_vms = Vec::new();
    for (mark, verdict) in scene.marks.iter().zip(verdicts) {
        let name = mark.name.clone();
        match verdict {
            Verdict::Needed(_) | Verdict::InFlight | Verdict::Unreadable => {}
            Verdict::OtherRepository => others.entry(repo_of(&name)).or_default().push(name),
            Verdict::OtherVm => of_other_vms.push(name),
            Verdict::Forgotten(_)
            | Verdict::Unfinished
            | Verdict::Superseded
            | Verdict::Unneeded
            | Verdict::Useless(_) => {
                // Not in images that are another process's for now.
                let remedy = if runs {
                    Remedy::Fix
                } else {
                    Remedy::NextBackup
                };
                let verdict = verdict.clone();
                tell(Problem::Mark { name, verdict }, now(remedy));
            }
        }
    }
    for point in scene.unreadable {
        tell(Problem::UnreadablePoint(*point), Remedy::Nothing);
    }
    for (repo, marks) in others {
        tell(Problem::OtherRepository { repo, marks }, Remedy::Nothing);
    }
    if !of_other_vms.is_empty() {
        tell(Problem::OtherVm(of_other_vms), Remedy::Nothing);
    }
    for strange in scene.strange {
        let remedy = if matches!(strange, Strange::Export { is_nbd: true, .. }) {
            Remedy::Hand
        } else {
            Remedy::Nothing
        };
        tell(Problem::Strange(strange.clone()), remedy);
    }
    match scene.wrecks {
        Wrecks {
            harmful: 0,
            harmless: 0,
            ..
        } => {}
        wrecks if wrecks.harmful > 0 && !wrecks.is_in_use => {
            tell(Problem::Wreckage(wrecks), Remedy::Hand);
        }
        wrecks => tell(Problem::Wreckage(wrecks), Remedy::Nothing),
    }
    findings.sort_by_key(|finding| finding.remedy);
    findings
}

/// Returns whether the bitmap of the parent's mark is on a disk.
fn has_bitmap(scene: &Scene<'_>, disk: &str) -> bool {
    let parent = scene.parents.iter().find(|parent| parent.target == disk);
    let mark = parent.and_then(|parent| scene.marks.iter().find(|it| it.name == parent.mark));
    mark.is_some_and(|mark| {
        let mut there = mark.disks.iter();
        there.any(|it| {
            let is_there = it.bitmap.is_some_and(|view| view != BitmapView::Missing);
            it.target == disk && is_there
        })
    })
}

/// Returns the digits of the repository in a mark's name.
fn repo_of(mark: &MarkName) -> String {
    let name = mark.to_string();
    name.split('-').nth(1).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests;
