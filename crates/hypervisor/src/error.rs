//! Why a driver could not do what it was asked to.

use std::fmt;

use highwater_model::SessionId;
use serde::{Deserialize, Serialize};

use crate::VmRef;

/// What kind of trouble a driver met; callers branch on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ErrorKind {
    /// The hypervisor cannot be reached, or its library is not there.
    Unreachable,
    /// No such VM.
    NoSuchVm,
    /// No such disk.
    NoSuchDisk,
    /// The VM is not in a state for this (off, crashed).
    WrongState,
    /// Another job runs on the VM.
    Busy,
    /// The exact mark cannot be used (missing or broken bitmap).
    BadMark,
    /// The hypervisor does not know the mark's record.
    UnknownMark,
    /// Freezing was required and failed.
    CannotFreeze,
    /// Scratch or socket directory trouble (space, permission).
    Scratch,
    /// The running session broke (I/O error, job gone).
    SessionLost,
    /// Anything else.
    Other,
}

/// Why a driver could not do what it was asked to. One level of message per
/// value; causes are in `because`, outermost first.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct HypervisorError {
    /// For control flow.
    pub kind: ErrorKind,
    /// *cannot ‹verb› ‹named thing›*.
    pub message: String,
    /// The causes, outermost first (the hypervisor's own words last).
    pub because: Vec<String>,
    /// What the user can do, if there is something.
    pub hint: Option<String>,
    /// Whether something of what failed is still at the VM.
    pub left_behind: bool,
}

impl HypervisorError {
    /// Makes an error without causes.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            because: Vec::new(),
            hint: None,
            left_behind: false,
        }
    }

    /// Says which session broke, and how.
    pub fn session_lost(vm: &VmRef, session: SessionId, because: impl Into<String>) -> Self {
        let message = format!("cannot go on with session {session} of VM `{}`", vm.name);
        Self::new(ErrorKind::SessionLost, message).because(because)
    }

    /// Adds the next deeper cause.
    #[must_use]
    pub fn because(mut self, cause: impl Into<String>) -> Self {
        self.because.push(cause.into());
        self
    }

    /// Says what is still at the VM of what failed.
    #[must_use]
    pub fn leaving(mut self, what: impl fmt::Display) -> Self {
        self.left_behind = true;
        self.because(format!("left behind: {what}"))
    }

    /// Says what the user can do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}
