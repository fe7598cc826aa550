//! Why a store did not do what it was asked to.

use std::error::Error;
use std::io;

use rustix::io::Errno;

/// What kind of trouble a store met; callers branch on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StoreErrorKind {
    /// No such object, or no repository at this place.
    NotFound,
    /// An object of this name exists and was left as it is.
    AlreadyExists,
    /// The store is full, or a quota is used up.
    NoSpace,
    /// The store cannot be written to.
    ReadOnly,
    /// The store refuses us.
    Permission,
    /// May work when tried again.
    Transient,
    /// The object is shorter than it must be.
    Corrupt,
    /// The object is larger than the caller accepts.
    TooLarge,
    /// The store cannot be reached.
    Unreachable,
    /// A sync failed earlier; this store takes no more writes.
    Poisoned,
    /// The address of the store is not one we understand.
    BadLocation,
    /// Anything else.
    Other,
}

/// Why a store did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
#[error("cannot {verb} `{object}` in {location}")]
pub struct StoreError {
    kind: StoreErrorKind,
    verb: &'static str,
    object: String,
    location: String,
    maybe_done: bool,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl StoreError {
    /// Makes an error: *cannot ‹verb› ‹object› in ‹location›*.
    ///
    /// Where the kind alone does not prove that nothing was done, the error
    /// says "maybe done" until [`not_done`](Self::not_done) is called.
    pub fn new(
        kind: StoreErrorKind,
        verb: &'static str,
        object: impl Into<String>,
        location: impl Into<String>,
    ) -> Self {
        let maybe_done = matches!(
            kind,
            StoreErrorKind::Transient | StoreErrorKind::Unreachable | StoreErrorKind::Other
        );
        let (object, location) = (object.into(), location.into());
        Self {
            kind,
            verb,
            object,
            location,
            maybe_done,
            source: None,
        }
    }

    /// Adds the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// States that the object certainly was not created or removed.
    #[must_use]
    pub fn not_done(mut self) -> Self {
        self.maybe_done = false;
        self
    }

    /// States that the change may have happened in spite of the error.
    #[must_use]
    pub fn perhaps_done(mut self) -> Self {
        self.maybe_done = true;
        self
    }

    /// Returns what kind of trouble it was.
    pub fn kind(&self) -> StoreErrorKind {
        self.kind
    }

    /// Returns whether the change asked for may have happened (or may yet
    /// become visible) although the call failed.
    pub fn maybe_done(&self) -> bool {
        self.maybe_done
    }
}

/// Sorts an error of the operating system.
pub(crate) fn kind_of(error: &io::Error) -> StoreErrorKind {
    let Some(errno) = Errno::from_io_error(error) else {
        return match error.kind() {
            io::ErrorKind::UnexpectedEof => StoreErrorKind::Corrupt,
            _ => StoreErrorKind::Other,
        };
    };
    match errno {
        Errno::NOENT | Errno::NOTDIR => StoreErrorKind::NotFound,
        Errno::EXIST => StoreErrorKind::AlreadyExists,
        Errno::NOSPC | Errno::DQUOT | Errno::FBIG => StoreErrorKind::NoSpace,
        Errno::ROFS => StoreErrorKind::ReadOnly,
        Errno::ACCESS | Errno::PERM => StoreErrorKind::Permission,
        Errno::INTR
        | Errno::AGAIN
        | Errno::TIMEDOUT
        | Errno::NOMEM
        | Errno::MFILE
        | Errno::NFILE => StoreErrorKind::Transient,
        Errno::STALE
        | Errno::NOTCONN
        | Errno::HOSTDOWN
        | Errno::HOSTUNREACH
        | Errno::NETUNREACH => StoreErrorKind::Unreachable,
        _ => StoreErrorKind::Other,
    }
}
