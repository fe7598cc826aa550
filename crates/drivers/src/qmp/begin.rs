//! Takes a point in time.

use highwater_hypervisor::{BeginOrder, Begun, ErrorKind, HypervisorError};

use super::QmpDriver;

impl QmpDriver {
    pub(super) fn begin_session(&mut self, order: &BeginOrder) -> Result<Begun, HypervisorError> {
        Err(HypervisorError::new(
            ErrorKind::Other,
            format!("cannot begin a backup of VM `{}` over QMP", order.vm.name),
        )
        .because("not there yet"))
    }
}
