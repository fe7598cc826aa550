//! Freezes the guest's file systems around the point in time, and says what
//! that made of it.

use std::time::Duration;

use highwater_hypervisor::{
    BeginOrder, Consistency, ErrorKind, HypervisorError, Quiesce, RunState, VmRef,
};

use super::QmpDriver;
use super::sequence::cannot_begin;
use crate::directories::SessionPaths;

/// What came of the wish to freeze.
pub(super) struct Freeze;

impl QmpDriver {
    /// Freezes the guest as ordered, if it runs.
    pub(super) fn freeze(
        &self,
        order: &BeginOrder,
        state: RunState,
        _paths: &SessionPaths,
        warnings: &mut Vec<String>,
    ) -> Result<Freeze, HypervisorError> {
        if state != RunState::Running {
            return Ok(Freeze);
        }
        let because = "no socket of a guest agent is given";
        match order.quiesce {
            Quiesce::Off => Ok(Freeze),
            Quiesce::Try => {
                warnings.push(format!("the guest was not frozen: {because}"));
                Ok(Freeze)
            }
            Quiesce::Require => Err(HypervisorError::new(
                ErrorKind::CannotFreeze,
                cannot_begin(&order.vm),
            )
            .because(because)
            .hint("name it in the connection: `qmp:/path/to.sock?agent=/path/to/agent.sock`")),
        }
    }

    /// Thaws a guest that a dead session left frozen. Returns a warning.
    pub(super) fn thaw_after(&self, _vm: &VmRef, paths: &SessionPaths) -> Option<String> {
        paths.note_thawed();
        None
    }
}

impl Freeze {
    pub(super) fn settle(
        self,
        _started: bool,
        state: RunState,
        _wish: Quiesce,
        _vm: &VmRef,
        _warnings: &mut Vec<String>,
    ) -> Result<(Consistency, Option<u64>), HypervisorError> {
        let _ = Duration::ZERO;
        Ok(match state {
            RunState::Running => (Consistency::Crash, None),
            _ => (Consistency::Paused, None),
        })
    }
}
