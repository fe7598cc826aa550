//! What would hit whatever session a VM has is done only by whom it belongs to,
//! and in time (ADR 0015).

use highwater_hypervisor::{
    ACT_MAX, CLAIM_GONE, ErrorKind, HypervisorError, Sign, SignKind, Signs, VmRef,
};
use highwater_model::ClaimId;

use crate::sys::Deadline;

/// Where the signs at one VM are.
pub(crate) trait Board {
    /// Which VM.
    fn vm(&self) -> &VmRef;
    /// Reads all of them.
    fn signs(&self) -> Result<Signs, HypervisorError>;
    /// Sets one up.
    fn set(&self, sign: &Sign) -> Result<(), HypervisorError>;
    /// Removes one.
    fn remove(&self, id: ClaimId, kind: SignKind) -> Result<(), HypervisorError>;
}

/// Does something that would hit whatever session the VM has, though it is meant
/// for one: only while the claim stands, and not later than [`ACT_MAX`] after that
/// was seen. Whoever comes next sees the sign, and waits for that time. Without a
/// claim nobody else is there.
pub(crate) fn act<T>(
    board: &impl Board,
    claim: Option<ClaimId>,
    act: impl FnOnce() -> Result<T, HypervisorError>,
) -> Result<T, HypervisorError> {
    let Some(claim) = claim else {
        return act();
    };
    board.set(&Sign::Acting(claim))?;
    let done = within_deadline(board, claim, act);
    // One that stays keeps the next backup waiting for a while, no more.
    drop(board.remove(claim, SignKind::Acting));
    done
}

fn within_deadline<T>(
    board: &impl Board,
    claim: ClaimId,
    act: impl FnOnce() -> Result<T, HypervisorError>,
) -> Result<T, HypervisorError> {
    // Before the look: the time counts from it.
    let _deadline = Deadline::after(ACT_MAX).map_err(|source| {
        let name = &board.vm().name;
        let message = format!("cannot set a deadline for ending a job of VM `{name}`");
        HypervisorError::new(ErrorKind::Other, message).because(source.to_string())
    })?;
    expect(board, claim)?;
    act()
}

/// Fails if the claim is not there.
pub(crate) fn expect(board: &impl Board, claim: ClaimId) -> Result<(), HypervisorError> {
    if board.signs()?.claim(claim).is_some() {
        return Ok(());
    }
    let message = format!("cannot go on with VM `{}`", board.vm().name);
    Err(HypervisorError::new(ErrorKind::Busy, message).because(CLAIM_GONE))
}
