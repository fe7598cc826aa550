//! What keeps others from a VM: a lock among those who share a directory, and a
//! claim among all who reach the VM.

use std::path::Path;
use std::time::{Duration, Instant};

use highwater_hypervisor::{Driver, HypervisorError, VmRef};

use super::claims::{self, HeldClaim, Patience};
use super::lock::{self, LockHolder, VmLock};

/// A VM that is held. The claim goes first: who shares the lock's directory need
/// not wait for it.
#[derive(Debug)]
pub(super) struct Hold {
    pub(super) vm: VmRef,
    /// `None` while no session can be at the VM.
    claim: Option<HeldClaim>,
    _lock: VmLock,
}

impl Hold {
    /// Takes the VM's lock, and claims it; waits for a holder that lives.
    pub(super) fn take(
        driver: &mut dyn Driver,
        lock_dir: &Path,
        vm: &VmRef,
        patience: Patience<'_>,
    ) -> Result<Self, HypervisorError> {
        driver.act_for(None);
        let until = Instant::now() + patience.wait;
        let lock = lock::take(lock_dir, vm, patience.wait)?;
        let mut hold = Self {
            vm: vm.clone(),
            claim: None,
            _lock: lock,
        };
        let left = Patience {
            wait: until.saturating_duration_since(Instant::now()),
            ..patience
        };
        hold.claim(driver, left)?;
        Ok(hold)
    }

    fn claim(
        &mut self,
        driver: &mut dyn Driver,
        patience: Patience<'_>,
    ) -> Result<(), HypervisorError> {
        if let Some(claimant) = driver.claimant(&self.vm)? {
            let claim = claims::take(claimant, &self.vm, patience)?;
            driver.act_for(Some(claim.id()));
            self.claim = Some(claim);
        }
        Ok(())
    }

    /// Claims a VM that could not be claimed when it was locked, because it was
    /// off.
    pub(super) fn complete(
        &mut self,
        driver: &mut dyn Driver,
        is_given_up: &dyn Fn() -> bool,
    ) -> Result<(), HypervisorError> {
        if self.claim.is_none() {
            let wait = Duration::ZERO;
            self.claim(driver, Patience::new(wait, is_given_up))?;
        }
        Ok(())
    }

    /// Returns whether another one was seen to have taken the VM over.
    pub(super) fn is_lost(&self) -> bool {
        self.claim.as_ref().is_some_and(HeldClaim::is_lost)
    }
}

/// Returns who holds a VM, by lock or by claim. Takes nothing.
pub(super) fn holder(
    driver: &mut dyn Driver,
    lock_dir: &Path,
    vm: &VmRef,
) -> Result<Option<LockHolder>, HypervisorError> {
    if let Some(holder) = lock::holder(lock_dir, vm)? {
        return Ok(Some(holder));
    }
    match driver.claimant(vm)? {
        Some(mut claimant) => claims::holder(claimant.as_mut()),
        None => Ok(None),
    }
}
