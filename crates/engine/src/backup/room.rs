//! Room that the guest's scratch files need. A repository in the same file system
//! takes it from them faster than the guard can look.

use highwater_hypervisor::HypervisorError;

use super::Begin;

/// Says why nothing more may be written, if there is too little room left.
pub(super) fn shortage(session: &Begin) -> Option<HypervisorError> {
    let reserve = session.begun.reserve.as_ref()?;
    // A place that cannot be asked is the guard's to judge.
    let found = rustix::fs::statvfs(&reserve.dir).ok()?;
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    // The guard gives a session up at the reserve itself; who writes stops before.
    if free >= reserve.bytes.saturating_add(reserve.bytes / 2) {
        return None;
    }
    Some(reserve.shortage(&session.order.vm, session.order.session, free))
}
