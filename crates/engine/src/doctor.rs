//! Looks at a VM as a backup would, says what is wrong, and repairs it.
//!
//! ```text
//! examine   facts, surroundings, history ▸ plan ▸ findings        changes nothing
//! mend      lock ▸ (examine ▸ repair the first finding) until none is left
//! purge     lock ▸ every mark of this repository
//! ```
//!
//! What is wrong is decided by `plan::diagnose`, from the same facts, parents
//! and plans that a backup has; each repair is decided on fresh facts.

mod examine;
mod mend;

use highwater_hypervisor::{
    Foreign, HypervisorError, JobFacts, LeftDirectory, RunState, Surroundings, VmRef, Wreckage,
};
use highwater_model::MarkName;
use highwater_plan::{Finding, MarkOnDisk, Refusal, Verdict};
use highwater_repo::RepoError;

use crate::Event;
use crate::backup::{BackupContext, BackupOptions, DiskEstimate};
use crate::guard::LockHolder;

/// What the user asked for.
#[derive(Debug, Clone, Copy)]
pub struct DoctorOptions<'a> {
    /// How the next backup would be made.
    pub backup: &'a BackupOptions,
    /// Repair what can be repaired.
    pub fix: bool,
    /// Remove every mark of this repository, too.
    pub purge_marks: bool,
    /// Remove what this program has left, too, if anything is repaired at all.
    pub foreign: Option<Foreign>,
}

/// What was found at a VM, and what was done about it.
#[derive(Debug)]
pub struct Checkup {
    /// The VM.
    pub vm: VmRef,
    /// Whether and how it runs.
    pub state: RunState,
    /// Whether the bitmaps of all its disks are seen.
    pub tells_bitmaps: bool,
    /// The living backup that holds it.
    pub held_by: Option<LockHolder>,
    /// The job that runs on it.
    pub job: Option<JobFacts>,
    /// What lies around it.
    pub surroundings: Surroundings,
    /// Directories of dead sessions.
    pub left: Vec<LeftDirectory>,
    /// What qmpbackup has left.
    pub wreckage: Wreckage,
    /// What is (still) to be told, the worst first.
    pub findings: Vec<Finding>,
    /// All marks of any Highwater.
    pub marks: Vec<MarkReport>,
    /// How the graph was changed, for disks where it was.
    pub changed: Vec<ChangedGraph>,
    /// What the next backup would do.
    pub next: NextBackup,
    /// What was repaired.
    pub fixed: Vec<String>,
    /// What could not be, and why.
    pub failed: Vec<(String, HypervisorError)>,
    /// What the user should know beside that.
    pub warnings: Vec<String>,
}

impl Checkup {
    /// Returns whether nothing has to be done by anybody.
    pub fn is_healthy(&self) -> bool {
        self.failed.is_empty() && !self.findings.iter().any(Finding::needs_something)
    }
}

/// A mark and what it is good for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MarkReport {
    /// Its name.
    pub name: MarkName,
    /// Whether the hypervisor has a record of it.
    pub has_record: bool,
    /// What it is good for.
    pub verdict: Verdict,
    /// Where it is.
    pub disks: Vec<MarkOnDisk>,
}

/// A disk of which a backup would read something else than the guest sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChangedGraph {
    /// Target name.
    pub disk: String,
    /// The node the guest writes to; empty if it is not known.
    pub guest: String,
    /// The node a backup would read.
    pub exported: String,
    /// The file below the guest's node.
    pub file: Option<String>,
    /// Why nobody knows.
    pub unknown: Option<String>,
}

/// What a plain backup would do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NextBackup {
    /// Why there would be none.
    pub refused: Option<Refused>,
    /// What it would read.
    pub disks: Vec<DiskEstimate>,
    /// What it would tidy first.
    pub would_heal: Vec<String>,
}

/// Why a backup would be refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refused {
    /// A living backup of ours runs: the next one waits for it.
    Held,
    /// Somebody else's job runs.
    Job,
    /// Somebody else uses QEMU's NBD server.
    NbdServer,
    /// The VM is in no state for it.
    State,
    /// A disk cannot be read.
    Disk {
        /// Target name.
        disk: String,
        /// Why.
        refusal: Refusal,
    },
    /// There is no disk to back up.
    NoDisks,
}

/// Why a VM could not be looked at.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "the messages say what each is; fields are what they name"
)]
pub enum DoctorError {
    #[error("cannot look at VM `{vm}`")]
    Observe { vm: String, source: HypervisorError },
    #[error("cannot repair VM `{vm}` now")]
    Locked { vm: String, source: HypervisorError },
    #[error("cannot read the restore points of VM `{vm}`")]
    History { vm: String, source: Box<RepoError> },
    #[error("interrupted: the repair of VM `{vm}` was given up")]
    Interrupted { vm: String },
}

/// Looks at one VM, and repairs it if asked to.
///
/// Without a wish to repair nothing at all is changed: no lock is kept, no file
/// is made, no mark or job is touched.
pub fn doctor(
    context: &BackupContext<'_>,
    vm_name: &str,
    options: &DoctorOptions<'_>,
) -> Result<Checkup, DoctorError> {
    let observe = |source| DoctorError::Observe {
        vm: vm_name.to_owned(),
        source,
    };
    let vm = context.guard.find(vm_name).map_err(observe)?;
    context.observer.event(&Event::Started { vm: &vm.name });
    let ward = Ward {
        context,
        options,
        vm: &vm,
    };
    if options.fix || options.purge_marks {
        ward.mend()
    } else {
        Ok(ward.examine(false)?.checkup)
    }
}

/// One VM that is looked at.
struct Ward<'a> {
    context: &'a BackupContext<'a>,
    options: &'a DoctorOptions<'a>,
    vm: &'a VmRef,
}
