//! Why a backup did not happen.

use highwater_hypervisor::{HypervisorError, JobFacts, RunState};
use highwater_plan::Refusal;
use highwater_repo::RepoError;

use super::CopyError;
use crate::guard::Outcome;

/// Why a backup did not happen. In every case no restore point was added,
/// except where [`BackupError::CommitUnknown`] says that nobody knows.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "the messages say what each is; fields are what they name"
)]
pub enum BackupError {
    #[error("cannot look at VM `{vm}`")]
    Observe { vm: String, source: HypervisorError },
    #[error("cannot back up VM `{vm}`: {}", job_words(job.as_ref()))]
    Busy { vm: String, job: Option<JobFacts> },
    #[error("cannot back up VM `{vm}`: {}", because.as_deref().unwrap_or(state_words(*state)))]
    WrongState {
        vm: String,
        state: RunState,
        because: Option<String>,
    },
    #[error("cannot back up disk `{disk}` of VM `{vm}`: no such disk")]
    NoSuchDisk {
        vm: String,
        disk: String,
        known: Vec<String>,
    },
    #[error("cannot back up disk `{disk}` of VM `{vm}`: {reason}")]
    DiskCannot {
        vm: String,
        disk: String,
        reason: &'static str,
    },
    #[error("cannot back up VM `{vm}`: no disk of it can be backed up")]
    NoDisks { vm: String },
    #[error("cannot back up disk `{disk}` of VM `{vm}`: {}", refusal_words(*refusal, because.as_deref()))]
    Refused {
        vm: String,
        disk: String,
        refusal: Refusal,
        because: Option<String>,
    },
    #[error("cannot tidy VM `{vm}` before the backup")]
    Tidy { vm: String, source: HypervisorError },
    #[error("cannot freeze a point in time of VM `{vm}`")]
    Begin { vm: String, source: HypervisorError },
    #[error("cannot commit the backup of VM `{vm}` without its guard")]
    GuardLost { vm: String, source: HypervisorError },
    #[error("cannot commit the backup of VM `{vm}`")]
    Lost { vm: String, source: HypervisorError },
    #[error("cannot read disk `{disk}` of VM `{vm}`: the hypervisor exports nothing for it")]
    NoExport { vm: String, disk: String },
    #[error("cannot read VM `{vm}`")]
    Copy { vm: String, source: Box<CopyError> },
    #[error("cannot read disk `{disk}` of VM `{vm}`")]
    AllDisksFailed {
        vm: String,
        disk: String,
        source: Option<Box<CopyError>>,
    },
    #[error("cannot store the backup of VM `{vm}`")]
    Store { vm: String, source: Box<RepoError> },
    #[error("cannot tell whether the backup of VM `{vm}` was stored")]
    CommitUnknown { vm: String, source: Box<RepoError> },
    #[error("interrupted: the backup of VM `{vm}` was given up")]
    Interrupted { vm: String },
}

impl BackupError {
    pub(super) fn observe(vm: &str, source: HypervisorError) -> Self {
        Self::Observe {
            vm: vm.to_owned(),
            source,
        }
    }

    pub(super) fn repository(vm: &str, source: RepoError) -> Self {
        Self::Store {
            vm: vm.to_owned(),
            source: Box::new(source),
        }
    }

    pub(super) fn copy(vm: &str, source: CopyError) -> Self {
        match source {
            CopyError::Interrupted => Self::Interrupted { vm: vm.to_owned() },
            CopyError::Store { source } => Self::Store {
                vm: vm.to_owned(),
                source,
            },
            other => Self::Copy {
                vm: vm.to_owned(),
                source: Box::new(other),
            },
        }
    }

    /// Returns what the guard is told about the marks.
    pub(super) const fn outcome(&self) -> Outcome {
        match self {
            Self::CommitUnknown { .. } => Outcome::Unknown,
            _ => Outcome::Failed,
        }
    }
}

fn job_words(job: Option<&JobFacts>) -> String {
    match job {
        None => "a job runs on it".to_owned(),
        Some(JobFacts::Ours(session)) => format!("highwater's session {session} runs on it"),
        Some(JobFacts::ForeignBackup(None)) => "another program's backup job runs on it".to_owned(),
        Some(JobFacts::ForeignBackup(Some(place))) => {
            format!("another program's backup job runs on it (its data go to `{place}`)")
        }
        Some(JobFacts::Forgotten) => "libvirt died while it started a backup job, has lost what \
             it knew of the job, and holds the VM for it"
            .to_owned(),
        Some(JobFacts::Other(word)) => format!("a job runs on it ({word})"),
    }
}

const fn state_words(state: RunState) -> &'static str {
    match state {
        RunState::Running => "it is running",
        RunState::Paused => "it is paused",
        RunState::PausedOnError => "it is paused because a write of it failed",
        RunState::NotResumed => {
            "it is loaded from a saved state or a migration, and not resumed since"
        }
        RunState::Off => "it is off",
        RunState::Other => "it is neither running nor paused",
    }
}

fn refusal_words(refusal: Refusal, because: Option<&str>) -> String {
    match refusal {
        Refusal::GraphChanged => {
            "its image chain was changed behind the hypervisor's back".to_owned()
        }
        Refusal::GraphUnknown => {
            let because = because.map_or_else(String::new, |because| format!(" ({because})"));
            format!("cannot learn which image the guest writes to{because}")
        }
        Refusal::BitmapBusy => "its bitmap is in use".to_owned(),
        Refusal::NoIncrement(why) => format!("no increment is possible: {}", why.sentence()),
    }
}
