//! Undoes what dead sessions left.

use std::path::PathBuf;

use highwater_hypervisor::{HypervisorError, LeftDirectory, Swept, VmRef};

use super::QmpDriver;

#[expect(
    clippy::unnecessary_wraps,
    clippy::unused_self,
    reason = "not there yet"
)]
impl QmpDriver {
    pub(super) fn find_leftovers(
        &mut self,
        _vm: &VmRef,
        _places: &[PathBuf],
    ) -> Result<Vec<LeftDirectory>, HypervisorError> {
        Ok(Vec::new())
    }

    pub(super) fn sweep_leftovers(
        &mut self,
        _vm: &VmRef,
        _places: &[PathBuf],
    ) -> Result<Swept, HypervisorError> {
        Ok(Swept::default())
    }
}
