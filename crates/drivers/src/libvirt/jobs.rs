//! What runs on a VM: its state, and jobs that keep a backup from starting.

use highwater_hypervisor::{ErrorKind, HypervisorError, JobFacts, RunState, VmRef};

use super::connection::query_blocks;
use super::domain_xml::DomainXml;
use super::error::{code, explain};
use super::record_xml::{self, BackupJob};
use super::remains;
use super::sys::CallError;
use super::sys::handles::DomainHandle;
use crate::blocks::Blocks;

/// Numbers of `virDomainState` and of the reason for being paused.
mod state {
    pub(super) const RUNNING: i32 = 1;
    pub(super) const BLOCKED: i32 = 2;
    pub(super) const PAUSED: i32 = 3;
    pub(super) const SHUTOFF: i32 = 5;
    pub(super) const PAUSED_USER: i32 = 1;
    pub(super) const PAUSED_IO_ERROR: i32 = 5;
}

/// Names of `virDomainJobOperation`, in its order.
const OPERATIONS: [&str; 11] = [
    "job of unknown kind",
    "start",
    "save",
    "restore",
    "incoming migration",
    "migration",
    "snapshot",
    "snapshot revert",
    "dump",
    "backup",
    "snapshot delete",
];

/// Returns whether and how the VM runs.
pub(super) fn run_state(vm: &VmRef, domain: &DomainHandle) -> Result<RunState, HypervisorError> {
    let (found, reason) = domain.state().map_err(|error| {
        explain(
            format!("cannot ask for the state of VM `{}`", vm.name),
            &error,
        )
    })?;
    Ok(match (found, reason) {
        (state::RUNNING | state::BLOCKED, _) => RunState::Running,
        (state::PAUSED, state::PAUSED_IO_ERROR) => RunState::PausedOnError,
        (state::PAUSED, _) => RunState::Paused,
        (state::SHUTOFF, _) => RunState::Off,
        _ => RunState::Other,
    })
}

/// Returns the same, and tells a VM that was loaded and not resumed from one that
/// is paused.
///
/// QEMU leaves the images of such a VM to whoever had them before. Older ones do
/// not refuse what writes to them: they abort, and the guest is lost. Where QEMU
/// does not tell, only a VM that somebody has paused is believed to be one; one
/// that was loaded has another reason in libvirt, also after a second suspend.
pub(super) fn run_state_with_images(
    vm: &VmRef,
    domain: &DomainHandle,
    blocks: &Blocks,
) -> Result<RunState, HypervisorError> {
    let state = run_state(vm, domain)?;
    if state != RunState::Paused {
        return Ok(state);
    }
    let is_own = match blocks.are_active() {
        Some(are_active) => are_active,
        None => domain
            .state()
            .is_ok_and(|(_, reason)| reason == state::PAUSED_USER),
    };
    Ok(if is_own { state } else { RunState::NotResumed })
}

/// Fails where nothing may be written to a VM's images, not even a bitmap.
pub(super) fn expect_own_images(
    vm: &VmRef,
    domain: &DomainHandle,
    message: impl FnOnce() -> String,
) -> Result<(), HypervisorError> {
    // Nobody but the one that is paused needs to be asked more.
    if run_state(vm, domain)? != RunState::Paused {
        return Ok(());
    }
    let blocks = query_blocks(vm, domain)?;
    if run_state_with_images(vm, domain, &blocks)? != RunState::NotResumed {
        return Ok(());
    }
    let name = &vm.name;
    Err(HypervisorError::new(ErrorKind::WrongState, message())
        .because("the VM was loaded from a saved state or a migration, and not resumed since")
        .hint(format!(
            "its disks are not its own before it runs: `virsh resume {name}`"
        )))
}

/// Returns the running backup job, if there is one.
pub(super) fn backup_job(
    vm: &VmRef,
    domain: &DomainHandle,
) -> Result<Option<BackupJob>, HypervisorError> {
    let message = || format!("cannot look for a backup job of VM `{}`", vm.name);
    match domain.backup_xml() {
        Ok(xml) => record_xml::backup_job(&xml).map(Some).map_err(|error| {
            HypervisorError::new(ErrorKind::Other, message()).because(error.to_string())
        }),
        Err(CallError {
            code: code::NO_BACKUP | code::OPERATION_INVALID,
            ..
        }) => Ok(None),
        Err(error) => Err(explain(message(), &error)),
    }
}

/// Returns a job that keeps a backup from starting. Never waits for it: a
/// second `backup-begin` would wait 30 s for the first and then fail.
pub(super) fn running_job(
    vm: &VmRef,
    domain: &DomainHandle,
    definition: &DomainXml,
) -> Result<Option<JobFacts>, HypervisorError> {
    if let Some(job) = backup_job(vm, domain)? {
        return Ok(Some(
            job.session
                .map_or(JobFacts::ForeignBackup(job.place), JobFacts::Ours),
        ));
    }
    let stats = match domain.job_stats() {
        Ok(stats) => stats,
        // Off since the state was asked for.
        Err(CallError {
            code: code::OPERATION_INVALID,
            ..
        }) => return Ok(None),
        // It died within a start call: it holds the VM for a backup job, and
        // has nothing that tells of the job.
        Err(CallError {
            code: code::INTERNAL,
            ..
        }) => {
            let ours = remains::forgotten_session(vm, domain)?;
            return Ok(Some(ours.map_or(JobFacts::Forgotten, JobFacts::Ours)));
        }
        Err(error) => {
            return Err(explain(
                format!("cannot look for jobs of VM `{}`", vm.name),
                &error,
            ));
        }
    };
    // Kinds above 2 are results of jobs that have ended.
    if matches!(stats.kind, 1 | 2) {
        let word = usize::try_from(stats.operation)
            .ok()
            .and_then(|at| OPERATIONS.get(at));
        return Ok(Some(JobFacts::Other(
            (*word.unwrap_or(&"job of unknown kind")).to_owned(),
        )));
    }
    // Block copies are jobs of one disk, which libvirt does not count above.
    let copied = definition.disks.iter().find(|disk| disk.mirrored);
    Ok(copied.map(|disk| JobFacts::Other(format!("block copy of {}", disk.target))))
}

/// Says that a job is in the way, and whose it is.
pub(super) fn busy(vm: &VmRef, job: &JobFacts) -> HypervisorError {
    let error = HypervisorError::new(
        ErrorKind::Busy,
        format!("cannot begin a backup of VM `{}`", vm.name),
    );
    match job {
        JobFacts::Ours(session) => error.because(format!(
            "highwater's session {session} runs on it, or died there"
        )),
        JobFacts::ForeignBackup(_) => error
            .because("another program's backup job runs on it")
            .hint("wait for it, or end it with `virsh domjobabort` if its program is gone"),
        JobFacts::Forgotten => error
            .because("libvirt holds it for a backup job that it has lost")
            .hint("shut the VM down, restart libvirtd, and start the VM again"),
        JobFacts::Other(word) => error.because(format!("a {word} runs on it")),
    }
}
