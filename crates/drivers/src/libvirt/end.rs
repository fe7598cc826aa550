//! Looks after a running session, and ends it.
//!
//! Aborting is the normal end of a pull-mode job. libvirt aborts whatever job a
//! VM has, so whose it is gets asked right before. Our claim keeps other
//! sessions from starting in between, and a deadline keeps us from aborting when
//! it does so no longer (see [`claims::act`]).

use std::path::Path;
use std::time::{Duration, Instant};

use highwater_hypervisor::{
    BeginOrder, Ended, ErrorKind, HypervisorError, MORE_ROOM, RunState, VmRef,
};
use highwater_model::step::{Step, pass};
use highwater_model::{ClaimId, SessionId};

use super::begin::Watch;
use super::claims;
use super::connection::{Dialer, LibvirtDriver};
use super::error::{code, explain};
use super::jobs::{backup_job, run_state};
use super::quiesce;
use super::remains;
use super::scratch::forget_secret;
use super::sys::handles::DomainHandle;
use crate::directories::{SessionPaths, free_bytes};
use crate::host;
use crate::offline;

/// How long an aborted job may take to vanish; it has to finish requests that
/// are under way on slow storage (31 s were seen).
const GONE_DEADLINE: Duration = Duration::from_secs(90);
const GONE_INTERVAL: Duration = Duration::from_millis(20);

impl LibvirtDriver {
    pub(super) fn check_session(
        &mut self,
        vm: &VmRef,
        session: SessionId,
    ) -> Result<(), HypervisorError> {
        if let Some(looked) = self.offline.check(vm, session) {
            return looked;
        }
        let lost = |because: &str| HypervisorError::session_lost(vm, session, because);
        // Before anything is asked: what comes meanwhile is looked at next time.
        if let Some(watch) = self.watches.get_mut(&session) {
            watch.heard = watch.log();
        }
        let domain = self.domain(vm).map_err(|error| match error.kind {
            // A transient VM is forgotten when it ends.
            ErrorKind::NoSuchVm => lost("the VM is gone"),
            _ => error,
        })?;
        let state = run_state(vm, &domain)?;
        if state == RunState::Off {
            return Err(lost("the VM was shut down"));
        }
        match backup_job(vm, &domain)? {
            None => {
                return Err(lost("its job was ended by somebody else"));
            }
            Some(job) if job.session != Some(session) => {
                return Err(lost("another backup job runs in its place"));
            }
            Some(_) => {}
        }
        match self.watches.get(&session) {
            Some(watch) => look(vm, session, watch, state),
            None => Ok(()),
        }
    }

    pub(super) fn end_session(&mut self, order: &BeginOrder) -> Result<Ended, HypervisorError> {
        if self.offline.has(order.session) {
            return Ok(self.offline.end(order));
        }
        let paths = SessionPaths::of_order(order);
        offline::end_stray(&paths, order.session);
        let domain = match self.domain(&order.vm) {
            Ok(domain) => domain,
            // A VM that is gone has no job; its files still are ours to remove.
            Err(error) if error.kind == ErrorKind::NoSuchVm => {
                self.watches.remove(&order.session);
                paths.note_thawed();
                return Ok(Ended {
                    ended_job: false,
                    warnings: paths.remove(),
                });
            }
            Err(error) => return Err(error),
        };
        let mut ended = self.stop_job(&order.vm, &domain, order.session, &paths)?;
        pass(Step::JobEnded);
        self.watches.remove(&order.session);
        ended.warnings.extend(paths.remove());
        pass(Step::FilesRemoved);
        Ok(ended)
    }

    pub(super) fn end_leftover_session(
        &mut self,
        vm: &VmRef,
        session: SessionId,
    ) -> Result<Ended, HypervisorError> {
        let domain = self.domain(vm)?;
        let Some(job) = backup_job(vm, &domain)?.filter(|job| job.session == Some(session)) else {
            let cleared = remains::clear_unless_job(vm, &domain, self.claim)?;
            return Ok(Ended {
                ended_job: !cleared.sessions.is_empty(),
                warnings: cleared.warnings,
            });
        };
        let scratch = job.disks.iter().find_map(|disk| disk.scratch.as_deref());
        let dir = |file: Option<&Path>| file.and_then(Path::parent).map(Path::to_path_buf);
        let (Some(socket_dir), Some(scratch_dir)) = (dir(job.socket.as_deref()), dir(scratch))
        else {
            return Err(HypervisorError::new(
                ErrorKind::Other,
                format!("cannot end session {session} of VM `{}`", vm.name),
            )
            .because("its job does not say where its files are")
            .hint(format!("end it with `virsh domjobabort {}`", vm.name)));
        };
        let paths = SessionPaths::of_leftover(session, &socket_dir, &scratch_dir);
        let mut ended = self.stop_job(vm, &domain, session, &paths)?;
        ended.warnings.extend(paths.remove());
        Ok(ended)
    }

    /// Aborts the job if it is this session's, waits until it is gone, and lets
    /// the guest run again if the session's scratch file stopped it.
    pub(super) fn stop_job(
        &self,
        vm: &VmRef,
        domain: &DomainHandle,
        session: SessionId,
        paths: &SessionPaths,
    ) -> Result<Ended, HypervisorError> {
        let (dialer, claim) = (&self.dialer, self.claim);
        let is_ours = |job: &super::record_xml::BackupJob| job.session == Some(session);
        let mut ended = Ended::default();
        let since = Instant::now();
        while run_state(vm, domain)? != RunState::Off
            && backup_job(vm, domain)?.as_ref().is_some_and(is_ours)
        {
            if since.elapsed() > GONE_DEADLINE {
                return Err(
                    HypervisorError::new(ErrorKind::Busy, cannot_end(vm, session))
                        .because("its job was aborted and does not end"),
                );
            }
            if ended.ended_job {
                std::thread::sleep(GONE_INTERVAL);
                continue;
            }
            match abort_job(vm, domain, claim, session) {
                Ok(false) => {}
                Ok(true) => {
                    ended.ended_job = true;
                    pass(Step::JobAborted);
                }
                // It was shut off since it was looked at, and the job went with it.
                Err(error) if error.kind == ErrorKind::WrongState => {}
                Err(error) => return Err(error),
            }
        }
        if ended.ended_job && run_state(vm, domain)? != RunState::Off {
            // Silent where it has to remove something: a job of ours was ended, and
            // that is all of it.
            ended
                .warnings
                .extend(remains::clear_unless_job(vm, domain, claim)?.warnings);
        }
        ended.warnings.extend(forget_secret(session, domain));
        if !ended.ended_job && is_another_qemu(vm, paths) {
            paths.note_thawed();
            return Ok(ended);
        }
        if paths.froze_guest() {
            ended.warnings.extend(thaw(vm, domain, dialer, paths)?);
        }
        let is_stopped = run_state(vm, domain)? == RunState::PausedOnError;
        let had_session = ended.ended_job || paths.exist();
        if is_stopped && had_session && !paths.was_stopped_before() {
            domain.resume().map_err(|error| {
                explain(
                    format!("cannot resume VM `{}` after an I/O error", vm.name),
                    &error,
                )
                .hint(format!("run `virsh resume {}`", vm.name))
            })?;
            ended.warnings.push(
                "the guest was stopped by an I/O error during the session and runs again"
                    .to_owned(),
            );
        }
        Ok(ended)
    }
}

/// Aborts the job if it is this session's; says whether it was.
fn abort_job(
    vm: &VmRef,
    domain: &DomainHandle,
    claim: Option<ClaimId>,
    session: SessionId,
) -> Result<bool, HypervisorError> {
    claims::act(vm, domain, claim, || {
        let job = backup_job(vm, domain)?;
        if job.is_none_or(|job| job.session != Some(session)) {
            return Ok(false);
        }
        pass(Step::JobSeen);
        match domain.abort_job() {
            Ok(()) => Ok(true),
            // It ended by itself since it was looked for.
            Err(error) if error.code == code::OPERATION_INVALID => Ok(false),
            Err(error) => Err(explain(cannot_end(vm, session), &error)),
        }
    })
}

fn cannot_end(vm: &VmRef, session: SessionId) -> String {
    format!("cannot end session {session} of VM `{}`", vm.name)
}

/// Returns whether the VM is run by another QEMU than the session's. If nobody
/// can tell it counts as the same: a guest that stays frozen or stopped is the
/// worse mistake.
fn is_another_qemu(vm: &VmRef, paths: &SessionPaths) -> bool {
    let Some(then) = paths.process() else {
        return false;
    };
    let now = vm.uuid.as_deref().and_then(host::qemu_process);
    now.is_some_and(|now| now.identity != then)
}

/// Thaws a guest that the session froze and, being killed, never thawed.
fn thaw(
    vm: &VmRef,
    domain: &DomainHandle,
    dialer: &Dialer,
    paths: &SessionPaths,
) -> Result<Option<String>, HypervisorError> {
    if run_state(vm, domain)? == RunState::Off {
        paths.note_thawed();
        return Ok(None);
    }
    let warning = match quiesce::thaw_after(vm, domain, dialer) {
        Ok(false) => None,
        Ok(true) => Some("the guest was left frozen by the session and is thawed".to_owned()),
        // No error: an agent that is gone for good must not keep the VM from
        // being backed up. The note stays, and the next run asks again.
        Err(because) => {
            return Ok(Some(format!(
                "cannot tell whether the guest is still frozen by session {}: {because}; \
                 `virsh domfsthaw {}` thaws it",
                paths.session(),
                vm.name
            )));
        }
    };
    paths.note_thawed();
    Ok(warning)
}

/// Looks at everything that was watched.
fn look(
    vm: &VmRef,
    session: SessionId,
    watch: &Watch,
    state: RunState,
) -> Result<(), HypervisorError> {
    let lost = |because: &str| HypervisorError::session_lost(vm, session, because);
    let log = watch.log();
    if log.stopped {
        // It runs again, but the job's QEMU is gone.
        return Err(lost("QEMU ended"));
    }
    let error = log
        .io_errors
        .iter()
        .find(|(alias, _)| watch.aliases.contains(alias));
    if let Some((alias, reason)) = error {
        let because = format!("a guest write to `{alias}` failed ({reason})");
        return Err(lost(&because).hint(MORE_ROOM));
    }
    if log.paused_on_error || (state == RunState::PausedOnError && !watch.was_stopped_before) {
        return Err(lost("QEMU stopped the guest: a write failed").hint(MORE_ROOM));
    }
    if log.job_completed {
        return Err(lost("its job ended"));
    }
    if let Some(reserve) = &watch.reserve {
        let free = free_bytes(&reserve.dir)?;
        if free < reserve.bytes || (log.threshold_passed && free < reserve.bytes.saturating_mul(2))
        {
            return Err(reserve.shortage(vm, session, free));
        }
    }
    Ok(())
}
