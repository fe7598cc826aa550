//! Room that the guest's scratch files need. A repository in the same file system
//! takes it from them faster than the guard can look.

use highwater_hypervisor::{ErrorKind, HypervisorError, ScratchReserve};
use highwater_model::format_size;

use super::Begin;

/// Says why nothing more may be written, if there is too little room left.
pub(super) fn shortage(session: &Begin) -> Option<HypervisorError> {
    let ScratchReserve { dir, bytes } = session.begun.reserve.as_ref()?;
    // A place that cannot be asked is the guard's to judge.
    let found = rustix::fs::statvfs(dir).ok()?;
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    // The guard gives a session up at the reserve itself; who writes stops before.
    if free >= bytes.saturating_add(bytes / 2) {
        return None;
    }
    let order = &session.order;
    let message = format!(
        "cannot go on with session {} of VM `{}`",
        order.session, order.vm.name
    );
    Some(
        HypervisorError::new(ErrorKind::SessionLost, message)
            .because(format!(
                "scratch directory `{}` has only {} free, and the guest may need them",
                dir.display(),
                format_size(free)
            ))
            .hint("choose a scratch directory with more room (`--scratch-dir`)"),
    )
}
