//! The contract of a store.

use std::fmt;

use crate::{ObjectKey, ObjectKind, StoreError};

/// One object as a listing shows it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listed {
    /// Its kind and name.
    pub key: ObjectKey,
    /// Its length in bytes.
    pub len: u64,
}

/// Keeps immutable objects under kind and name.
///
/// Objects are created once, never changed, and possibly deleted. Each sentence
/// below is a check of the contract suite. A read that follows a successful
/// `put` of the same process sees the object; a listing may lag.
pub trait Store: Send + Sync + fmt::Debug {
    /// Makes the place ready for a new repository (for a directory: creates it
    /// and its folders). May be called again. Nothing else creates the place: a
    /// `put` into one that is not there (an unmounted file system) fails.
    fn prepare(&self) -> Result<(), StoreError>;

    /// Creates an object of the concatenated `parts`.
    ///
    /// All or nothing: readers see no object or the whole object. When `put`
    /// returns `Ok` the object survives a power cut. An existing object is left
    /// as it is, is durable when the call returns, and is reported as
    /// [`StoreErrorKind::AlreadyExists`](crate::StoreErrorKind::AlreadyExists).
    /// An error says through [`StoreError::maybe_done`] whether the object may
    /// exist nevertheless.
    fn put(&self, key: &ObjectKey, parts: &[&[u8]]) -> Result<(), StoreError>;

    /// Begins an object whose bytes come piece by piece, and whose name is known
    /// only at the end. `None` where objects can only be given whole: then the
    /// caller collects the bytes and calls [`put`](Self::put).
    fn begin(&self) -> Result<Option<Box<dyn Unfinished>>, StoreError> {
        Ok(None)
    }

    /// Returns a whole object. One of more than `max_bytes` is refused as
    /// [`StoreErrorKind::TooLarge`](crate::StoreErrorKind::TooLarge) before
    /// anything is allocated for it.
    fn get(&self, key: &ObjectKey, max_bytes: u64) -> Result<Vec<u8>, StoreError>;

    /// Fills `into` with the object's bytes from `offset` on. An object that
    /// ends earlier is reported as
    /// [`StoreErrorKind::Corrupt`](crate::StoreErrorKind::Corrupt).
    fn get_range(&self, key: &ObjectKey, offset: u64, into: &mut [u8]) -> Result<(), StoreError>;

    /// Returns the objects of a kind whose name starts with `prefix`, sorted by
    /// name. Foreign files and unfinished objects are not among them.
    fn list(&self, kind: ObjectKind, prefix: &str) -> Result<Vec<Listed>, StoreError>;

    /// Returns the same as [`list`](Self::list), and calls `on_entry` whenever an
    /// entry was answered for, so that a long listing is told from one that hangs.
    /// A store that is asked once for many entries calls it never.
    fn list_telling(
        &self,
        kind: ObjectKind,
        prefix: &str,
        on_entry: &dyn Fn(),
    ) -> Result<Vec<Listed>, StoreError> {
        let _ = on_entry;
        self.list(kind, prefix)
    }

    /// Returns the length of an object in bytes.
    fn size(&self, key: &ObjectKey) -> Result<u64, StoreError>;

    /// Removes an object, durably when it returns `Ok`. One that is not there
    /// is no error.
    fn delete(&self, key: &ObjectKey) -> Result<(), StoreError>;

    /// Says for people where this store is.
    fn location(&self) -> String;
}

/// An object that is being written, and that nobody can see yet.
///
/// One that is dropped, or that had an error, never becomes an object.
pub trait Unfinished: Send + fmt::Debug {
    /// Adds the concatenated `parts` at the end. After an error the object must
    /// be given up: nobody knows how much of them was written.
    fn append(&mut self, parts: &[&[u8]]) -> Result<(), StoreError>;

    /// Makes it the object `key`, with the promises of [`Store::put`].
    fn finish(self: Box<Self>, key: &ObjectKey) -> Result<(), StoreError>;
}
