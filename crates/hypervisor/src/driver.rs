//! The contract of a driver.

use std::path::PathBuf;
use std::time::Duration;

use highwater_model::{ClaimId, SessionId};

use crate::{
    BeginOrder, Begun, Claimant, Ended, ErrorKind, Foreign, HypervisorError, LeftDirectory,
    MarkOrder, RunState, Surroundings, Swept, VmFacts, VmRef, Wreckage,
};

/// Talks to what runs the VMs.
///
/// One value belongs to one process (the guard) and one thread. No method may
/// wait without a limit for anything but the hypervisor's own reply, and none
/// touches the repository.
pub trait Driver {
    /// Returns all VMs of this connection, sorted by name, and how each runs.
    fn list(&mut self) -> Result<Vec<(VmRef, RunState)>, HypervisorError>;

    /// Finds a VM by name or UUID.
    fn find(&mut self, name_or_uuid: &str) -> Result<VmRef, HypervisorError>;

    /// Reports everything about a VM. Changes nothing.
    ///
    /// Write counters are read before bitmaps: each write that is counted was
    /// one that the bitmaps, as they are reported, had to record.
    fn observe(&mut self, vm: &VmRef) -> Result<VmFacts, HypervisorError>;

    /// Takes the point in time: all disks, and the new mark, or nothing.
    ///
    /// Asks for running jobs *before* it freezes. The new mark's bitmap was seen
    /// on each disk that was to get it, recording and persistent. When it returns an error, no
    /// job, scratch file, directory, new mark or frozen file system of this
    /// order is left, or the error says which is (`left_behind`).
    fn begin(&mut self, order: &BeginOrder) -> Result<Begun, HypervisorError>;

    /// Looks whether the session still stands: its job runs and no trouble
    /// (I/O error at the scratch file, guest stopped by it) was reported.
    fn check(&mut self, vm: &VmRef, session: SessionId) -> Result<(), HypervisorError>;

    /// Returns whether something was heard of the session since its last
    /// [`check`](Self::check) that makes another one urgent: a stopped guest
    /// waits for it. Asks nobody, so it may be called many times a second.
    fn is_alarmed(&mut self, session: SessionId) -> bool;

    /// Ends the session's job if, and only if, it is this session's, waits
    /// until it is gone, and removes its scratch and socket directories.
    /// May be called again; a session that is gone is no error.
    fn end(&mut self, order: &BeginOrder) -> Result<Ended, HypervisorError>;

    /// Ends a job that an earlier, dead session of Highwater left behind, and
    /// whatever of its files can be found from it.
    fn end_leftover(&mut self, vm: &VmRef, session: SessionId) -> Result<Ended, HypervisorError>;

    /// Changes one mark. Removing one that is not there is no error.
    fn mark(&mut self, vm: &VmRef, order: &MarkOrder) -> Result<(), HypervisorError>;

    /// Reports what lies around a VM, for people. Changes nothing.
    fn survey(&mut self, vm: &VmRef) -> Result<Surroundings, HypervisorError>;

    /// Returns the directories that sessions of this VM made, below `places`
    /// or where their twin says, and that no running job of it uses. Changes
    /// nothing.
    fn leftovers(
        &mut self,
        vm: &VmRef,
        places: &[PathBuf],
    ) -> Result<Vec<LeftDirectory>, HypervisorError>;

    /// Removes them, and lets a guest run again that such a session left
    /// frozen or stopped, unless its process is known to be another one now. The caller holds the VM's lock, so whoever made them
    /// is dead. Nothing of another VM, and nothing that a session did not make
    /// itself, is touched.
    fn sweep(&mut self, vm: &VmRef, places: &[PathBuf]) -> Result<Swept, HypervisorError>;

    /// Reports what another program has left at a VM. Changes nothing.
    fn wreckage(&mut self, vm: &VmRef, of: Foreign) -> Result<Wreckage, HypervisorError> {
        let (_, _) = (vm, of);
        Ok(Wreckage::default())
    }

    /// Removes it, unless it is in use; returns what was removed. The caller
    /// holds the VM's lock, and was told to by a person.
    fn clear_wreckage(&mut self, vm: &VmRef, of: Foreign) -> Result<Wreckage, HypervisorError> {
        let (_, _) = (vm, of);
        Ok(Wreckage::default())
    }

    /// Starts a VM that is off, paused, so that it can be backed up as one that
    /// runs. Who finds it later can tell that it was started so.
    fn start_paused(&mut self, vm: &VmRef) -> Result<(), HypervisorError> {
        Err(HypervisorError::new(
            ErrorKind::WrongState,
            format!("cannot start VM `{}` paused", vm.name),
        )
        .because("only libvirt can start a VM"))
    }

    /// Shuts a VM off that [`start_paused`](Self::start_paused) has started and
    /// nobody has resumed since; says whether it was one.
    fn stop_if_started(&mut self, vm: &VmRef) -> Result<bool, HypervisorError> {
        let _ = vm;
        Ok(false)
    }

    /// Returns the means to claim a VM among all who can reach it; `None` while
    /// no session can be there: it has no process, or is being saved or moved.
    fn claimant(&mut self, vm: &VmRef) -> Result<Option<Box<dyn Claimant>>, HypervisorError>;

    /// From now on acts for this claim. What would hit whatever job there is,
    /// is done only while the claim is there, and between the look and the deed
    /// no more than [`ACT_MAX`] pass: the sign [`Sign::Acting`](crate::Sign)
    /// stands meanwhile, and a process that was kept from it for longer dies
    /// instead of doing it. What of other sessions is to be removed is listed
    /// first, and then the claim looked for: what has come since is not in the
    /// list.
    fn act_for(&mut self, claim: Option<ClaimId>);

    /// Fails ([`ErrorKind::Busy`](crate::ErrorKind::Busy)) if the claim that this acts for is not there
    /// any more. No error without a claim.
    fn still_claimed(&mut self, vm: &VmRef) -> Result<(), HypervisorError>;
}

/// Longest time between a look whose job there is and the request that ends it.
///
/// Both take milliseconds; a QEMU whose storage hangs may keep the reply back
/// for longer, and then the guard dies and another one goes on.
pub const ACT_MAX: Duration = Duration::from_secs(20);
