//! Watches over a session.

use highwater_hypervisor::{HypervisorError, VmRef};
use highwater_model::SessionId;

use super::QmpDriver;

/// What is watched for one session.
pub(super) struct Watch;

#[expect(
    clippy::unnecessary_wraps,
    clippy::unused_self,
    reason = "not there yet"
)]
impl QmpDriver {
    pub(super) fn check_session(
        &mut self,
        _vm: &VmRef,
        _session: SessionId,
    ) -> Result<(), HypervisorError> {
        Ok(())
    }

    pub(super) fn is_session_alarmed(&mut self, session: SessionId) -> bool {
        self.watches.contains_key(&session)
    }
}
