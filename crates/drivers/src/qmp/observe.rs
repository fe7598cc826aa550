//! Reports everything about a VM. Changes nothing.

use highwater_hypervisor::{ErrorKind, HypervisorError, VmFacts, VmRef};

use super::QmpDriver;

impl QmpDriver {
    pub(super) fn observe_vm(&mut self, vm: &VmRef) -> Result<VmFacts, HypervisorError> {
        Err(HypervisorError::new(
            ErrorKind::Other,
            format!("cannot observe VM `{}`", vm.name),
        ))
    }
}
