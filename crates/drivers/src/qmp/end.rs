//! Ends a session.

use highwater_hypervisor::{BeginOrder, Ended, HypervisorError, VmRef};
use highwater_model::SessionId;

use super::QmpDriver;

#[expect(
    clippy::unnecessary_wraps,
    clippy::unused_self,
    reason = "not there yet"
)]
impl QmpDriver {
    pub(super) fn end_session(&mut self, _order: &BeginOrder) -> Result<Ended, HypervisorError> {
        Ok(Ended::default())
    }

    pub(super) fn end_leftover_session(
        &mut self,
        _vm: &VmRef,
        _session: SessionId,
    ) -> Result<Ended, HypervisorError> {
        Ok(Ended::default())
    }
}
