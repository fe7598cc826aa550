//! May a backup of this VM begin now?

use highwater_model::SessionId;

/// Whether and how the VM runs, as far as a backup cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmState {
    /// It runs or is paused: there is a process to ask.
    Alive,
    /// It is paused because a guest write failed; a backup would not help it.
    Stuck,
    /// It is off, and its images can be read.
    AtRest,
    /// It is off, and nobody may read its images, or wants to.
    Off,
    /// Crashed, shutting down, or unknown.
    Other,
}

/// A job that runs on the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobView {
    /// None.
    None,
    /// One of a Highwater session.
    Ours(SessionId),
    /// Somebody else's.
    Foreign,
}

/// Whether a backup may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmGate {
    /// It may.
    Open,
    /// After the job of a dead session of ours was ended. The caller holds the
    /// VM's lock, so the session's owner is dead.
    EndLeftoverFirst(SessionId),
    /// Not now: somebody else's job runs.
    Busy,
    /// Not in this state.
    WrongState,
}

/// Decides whether a backup may begin; the caller must hold the VM's lock.
pub const fn gate(state: VmState, job: JobView) -> VmGate {
    match (state, job) {
        (VmState::Off | VmState::Other, _) => VmGate::WrongState,
        // A dead session of ours may be the very reason why the VM is stuck.
        (VmState::Alive | VmState::Stuck, JobView::Ours(session)) => {
            VmGate::EndLeftoverFirst(session)
        }
        (VmState::Alive | VmState::Stuck, JobView::Foreign) => VmGate::Busy,
        // A job is one of a process, so what is told of one is of no matter.
        (VmState::AtRest, _) => VmGate::Open,
        (VmState::Stuck, JobView::None) => VmGate::WrongState,
        (VmState::Alive, JobView::None) => VmGate::Open,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_living_vm_without_a_foreign_job_is_backed_up() {
        let ours = JobView::Ours(SessionId::from_bytes([1; 8]));
        let after = VmGate::EndLeftoverFirst(SessionId::from_bytes([1; 8]));
        for (state, job, expected) in [
            (VmState::Alive, JobView::None, VmGate::Open),
            (VmState::Alive, JobView::Foreign, VmGate::Busy),
            (VmState::Alive, ours, after),
            (VmState::Stuck, JobView::None, VmGate::WrongState),
            (VmState::Stuck, JobView::Foreign, VmGate::Busy),
            (VmState::Stuck, ours, after),
            (VmState::Off, JobView::None, VmGate::WrongState),
            (VmState::AtRest, JobView::None, VmGate::Open),
            (VmState::Off, ours, VmGate::WrongState),
            (VmState::Other, JobView::None, VmGate::WrongState),
        ] {
            assert_eq!(gate(state, job), expected, "{state:?} {job:?}");
        }
    }
}
