//! Freezes the guest's file systems around the point in time, and says what
//! that made of it.

use std::sync::Arc;

use highwater_hypervisor::{
    BeginOrder, Consistency, ErrorKind, HypervisorError, Quiesce, RunState, VmRef,
};
use highwater_model::step::{Step, pass};

use super::QmpDriver;
use super::agent::{self, Door, Frozen, Outcome};
use super::client::Client;
use super::sequence::cannot_begin;
use crate::directories::SessionPaths;
use crate::host;

/// What came of the wish to freeze. Dropping it thaws.
pub(super) struct Freeze(Option<Frozen>);

impl QmpDriver {
    /// Freezes the guest as ordered, if it runs.
    pub(super) fn freeze(
        &self,
        order: &BeginOrder,
        state: RunState,
        paths: &SessionPaths,
        warnings: &mut Vec<String>,
    ) -> Result<Freeze, HypervisorError> {
        if state != RunState::Running {
            return Ok(Freeze(None));
        }
        let outcome = agent::freeze(
            &order.vm,
            self.agent().as_ref(),
            order.quiesce,
            &order.freeze_mountpoints,
            &|| paths.note_freezing(),
        )?;
        match outcome {
            Outcome::Frozen(frozen) => {
                pass(Step::Frozen);
                Ok(Freeze(Some(frozen)))
            }
            Outcome::Not(because) => {
                warnings
                    .extend(because.map(|because| format!("the guest was not frozen: {because}")));
                Ok(Freeze(None))
            }
        }
    }

    /// Returns where the VM's agent listens, if one was named.
    pub(super) fn agent(&self) -> Option<Door> {
        let address = self.options.agent.clone()?;
        let process = self.process().map(|found| found.identity);
        let client = self.client().ok();
        let is_over = move || match &process {
            Some(process) => !host::is_alive(process),
            // Nobody can tell which one it is; but its monitor ends with it.
            None => client.as_ref().is_some_and(Client::is_closed),
        };
        Some(Door {
            address,
            is_over: Arc::new(is_over),
        })
    }

    /// Thaws a guest that a dead session left frozen. Returns a warning.
    pub(super) fn thaw_after(&self, vm: &VmRef, paths: &SessionPaths) -> Option<String> {
        if !paths.froze_guest() {
            return None;
        }
        let because = match self.agent().as_ref().map(agent::thaw_after) {
            Some(Ok(was_frozen)) => {
                paths.note_thawed();
                let warning = "the guest was left frozen by the session and is thawed";
                return was_frozen.then(|| warning.to_owned());
            }
            Some(Err(because)) => because,
            None => "no agent was named (`?agent=SOCKET` in the connection)".to_owned(),
        };
        // No error: an agent that is gone for good must not keep the VM from
        // being backed up. The note stays, and the next run asks again.
        Some(format!(
            "cannot tell whether the guest of VM `{}` is still frozen by session {}: {because}; \
             `guest-fsfreeze-thaw` at its agent thaws it",
            vm.name,
            paths.session()
        ))
    }
}

impl Freeze {
    /// Says how consistent the point is, and thaws.
    pub(super) fn settle(
        self,
        order: &BeginOrder,
        was_taken: bool,
        state: RunState,
        warnings: &mut Vec<String>,
    ) -> Result<(Consistency, Option<u64>), HypervisorError> {
        let Some(mut frozen) = self.0 else {
            let consistency = if state == RunState::Running {
                Consistency::Crash
            } else {
                Consistency::Paused
            };
            return Ok((consistency, None));
        };
        let held = was_taken && frozen.holds();
        let elapsed = frozen.thaw()?;
        let frozen_ms = Some(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX));
        if held || !was_taken {
            return Ok((Consistency::Filesystem, frozen_ms));
        }
        let because = "the guest did not stay frozen until the point in time was taken";
        if order.quiesce == Quiesce::Require {
            return Err(
                HypervisorError::new(ErrorKind::CannotFreeze, cannot_begin(&order.vm))
                    .because(because),
            );
        }
        warnings.push(because.to_owned());
        Ok((Consistency::Crash, frozen_ms))
    }
}
