//! Why a repository did not do what it was asked to.

use std::error::Error;

use highwater_store::{StoreError, StoreErrorKind};

/// What kind of trouble it was; callers branch on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RepoErrorKind {
    /// There is no repository at this place.
    NoRepository,
    /// There is one already, or an object of this name.
    AlreadyExists,
    /// The passphrase or key file does not open this repository.
    WrongKey,
    /// The repository is encrypted and no secret was given.
    SecretNeeded,
    /// Something stored is not what was written.
    Damaged,
    /// The repository needs a newer version of the program.
    NewerFormat,
    /// The store is full.
    NoSpace,
    /// The store failed in another way.
    Store,
    /// Nobody can tell whether the manifest was written: the restore point may
    /// or may not exist, so its packs and both marks have to stay.
    CommitUnknown,
    /// The caller asked for something that makes no sense.
    Usage,
    /// The caller's own input could not be read.
    Input,
}

type Cause = Box<dyn Error + Send + Sync>;

/// Why a repository did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}")]
pub struct RepoError {
    kind: RepoErrorKind,
    what: String,
    source: Option<Cause>,
}

impl RepoError {
    /// Makes an error: *cannot ‹verb› ‹named thing›*.
    pub fn new(kind: RepoErrorKind, what: impl Into<String>) -> Self {
        Self {
            kind,
            what: what.into(),
            source: None,
        }
    }

    /// Adds the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Cause>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Wraps a store's error; its kind decides ours.
    pub(crate) fn store(what: impl Into<String>, source: StoreError) -> Self {
        let kind = match source.kind() {
            StoreErrorKind::NoSpace => RepoErrorKind::NoSpace,
            StoreErrorKind::Corrupt | StoreErrorKind::TooLarge => RepoErrorKind::Damaged,
            StoreErrorKind::AlreadyExists => RepoErrorKind::AlreadyExists,
            StoreErrorKind::NotFound
            | StoreErrorKind::ReadOnly
            | StoreErrorKind::Permission
            | StoreErrorKind::Transient
            | StoreErrorKind::Unreachable
            | StoreErrorKind::Poisoned
            | StoreErrorKind::BadLocation
            | StoreErrorKind::Other => RepoErrorKind::Store,
        };
        Self::new(kind, what).because(source)
    }

    /// Wraps a store's error at an object that must be there.
    pub(crate) fn needed(what: impl Into<String>, source: StoreError) -> Self {
        if source.kind() == StoreErrorKind::NotFound {
            return Self::new(RepoErrorKind::Damaged, what).because(source);
        }
        Self::store(what, source)
    }

    /// Reports something stored that is not what was written.
    pub(crate) fn damaged(what: impl Into<String>, flaw: Flaw) -> Self {
        Self::new(RepoErrorKind::Damaged, what).because(flaw)
    }

    /// Reports a wrong call.
    pub(crate) fn usage(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::new(RepoErrorKind::Usage, what).because(why.into())
    }

    /// Returns what kind of trouble it was.
    pub fn kind(&self) -> RepoErrorKind {
        self.kind
    }
}

/// What is wrong with stored bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Flaw(pub(crate) &'static str);
