//! What can go wrong with a monitor, and how it is told.

use highwater_hypervisor::{ErrorKind, HypervisorError};

use super::line::GUARD;

/// Why a monitor did not do what it was asked to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QmpError {
    /// Nobody listens there, or nothing is there.
    #[error("{0}")]
    Nobody(String),
    /// It cannot be asked for another reason.
    #[error("{0}")]
    Unreachable(String),
    /// It takes connections, and does not greet: somebody else has it.
    #[error("another program holds this monitor, which serves one at a time{0}")]
    Taken(String),
    /// It did not answer in time. The command may have been carried out.
    #[error("QEMU did not answer `{0}` in time")]
    TimedOut(String),
    /// It answered with an error.
    #[error("QEMU answered: {desc}")]
    Refused {
        /// QEMU's class of error; nearly always `GenericError`.
        class: String,
        /// QEMU's words.
        desc: String,
    },
    /// What it said is not understood.
    #[error("what the monitor says is not understood: {0}")]
    Malformed(String),
    /// The connection ended: QEMU did, or closed it.
    #[error("QEMU closed the connection")]
    Closed,
}

impl QmpError {
    /// Returns whether QEMU itself said no: then nothing was done.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }

    /// Returns QEMU's words if it said no.
    pub(crate) fn refusal(&self) -> Option<&str> {
        match self {
            Self::Refused { desc, .. } => Some(desc),
            _ => None,
        }
    }

    /// Returns what callers branch on.
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Nobody(_) | Self::Unreachable(_) | Self::TimedOut(_) | Self::Closed => {
                ErrorKind::Unreachable
            }
            Self::Taken(_) => ErrorKind::Busy,
            Self::Malformed(_) => ErrorKind::Other,
            Self::Refused { desc, .. } => kind_of(desc),
        }
    }
}

/// QEMU has one class for nearly all errors, so its words have to do.
fn kind_of(desc: &str) -> ErrorKind {
    const BUSY: [&str; 5] = [
        "is busy",
        "in use by another operation",
        "currently in use",
        "is in use",
        "NBD server already running",
    ];
    if BUSY.iter().any(|words| desc.contains(words)) {
        return ErrorKind::Busy;
    }
    ErrorKind::Other
}

/// Explains what an error of the monitor kept us from.
pub(crate) fn explain(message: impl Into<String>, error: &QmpError) -> HypervisorError {
    let explained = HypervisorError::new(error.kind(), message).because(error.to_string());
    match error {
        // It thaws guests and frees disks: nobody must end it.
        QmpError::Taken(holders) if holders.contains(GUARD) => explained
            .hint("another backup of this VM runs, or is tidying up: try again when it is done"),
        QmpError::Taken(_) => explained.hint(
            "end that program, or start QEMU with a second monitor \
             (`-qmp unix:/another.sock,server=on,wait=off`) for backups",
        ),
        QmpError::Nobody(_) | QmpError::Unreachable(_) => {
            explained.hint("is QEMU running, and may this user reach it?")
        }
        _ => explained,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_told_to_end_a_process_of_ours() {
        let hint = |holders: &str| {
            let error = QmpError::Taken(holders.to_owned());
            explain("cannot connect", &error).hint.unwrap()
        };
        assert!(hint(": process 1 (socat)").contains("end that program"));
        assert!(!hint(": process 1 (highwater-guard)").contains("end that"));
    }

    #[test]
    fn every_error_has_the_kind_that_callers_branch_on() {
        let refused = |desc: &str| QmpError::Refused {
            class: "GenericError".to_owned(),
            desc: desc.to_owned(),
        };
        for (error, kind) in [
            (QmpError::Taken(String::new()), ErrorKind::Busy),
            (QmpError::Closed, ErrorKind::Unreachable),
            (
                refused("Bitmap 'x' is currently in use by another operation and cannot be used"),
                ErrorKind::Busy,
            ),
            (refused("NBD server already running"), ErrorKind::Busy),
            (refused("Node 'x' not found"), ErrorKind::Other),
        ] {
            assert_eq!(error.kind(), kind, "{error}");
        }
    }
}
