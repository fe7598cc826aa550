//! A store that fails when it is told to.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Listed, ObjectKey, ObjectKind, Store, StoreError, StoreErrorKind, Unfinished};

/// When and how a [`FaultyStore`] fails; calls are counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Never.
    Never,
    /// This call alone fails, and does nothing.
    Call(u64),
    /// This call and all after it fail, and do nothing.
    From(u64),
    /// This `put` (counting only those) is done, and reported as failed.
    PutDoneButFailed(u64),
    /// This `put` (counting only those) is not done, but nobody can tell.
    PutLostButUnknown(u64),
}

/// Passes calls on to another store, except those that are to fail. Each call
/// that concerns an unfinished object is one, too, and its end counts as a `put`.
#[derive(Debug)]
pub struct FaultyStore<S> {
    inner: S,
    script: Arc<Script>,
}

/// What fails, and how many calls there were.
#[derive(Debug)]
struct Script {
    fault: Fault,
    location: String,
    calls: AtomicU64,
    puts: AtomicU64,
}

impl<S: Store> FaultyStore<S> {
    /// Wraps `inner`.
    pub fn new(inner: S, fault: Fault) -> Self {
        let script = Script {
            fault,
            location: inner.location(),
            calls: AtomicU64::new(0),
            puts: AtomicU64::new(0),
        };
        Self {
            inner,
            script: Arc::new(script),
        }
    }

    /// Returns how many calls there were.
    pub fn calls(&self) -> u64 {
        self.script.calls.load(Ordering::SeqCst)
    }

    /// Returns how many of them were `put`.
    pub fn puts(&self) -> u64 {
        self.script.puts.load(Ordering::SeqCst)
    }

    /// Returns the store below.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl Script {
    fn admit(&self, verb: &'static str, object: &str) -> Result<(), StoreError> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        let fails = match self.fault {
            Fault::Call(n) => call == n,
            Fault::From(n) => call >= n,
            Fault::Never | Fault::PutDoneButFailed(_) | Fault::PutLostButUnknown(_) => false,
        };
        if fails {
            Err(self.failure(verb, object).not_done())
        } else {
            Ok(())
        }
    }

    fn failure(&self, verb: &'static str, object: &str) -> StoreError {
        StoreError::new(
            StoreErrorKind::Other,
            verb,
            object.to_owned(),
            self.location.clone(),
        )
        .because("the test wanted it")
    }

    /// Does `put`, which creates the object `key`, unless it is to fail.
    fn create(
        &self,
        key: &ObjectKey,
        put: impl FnOnce() -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.admit("write", &key.path())?;
        let number = self.puts.fetch_add(1, Ordering::SeqCst);
        if self.fault == Fault::PutLostButUnknown(number) {
            return Err(self.failure("write", &key.path()).perhaps_done());
        }
        put()?;
        if self.fault == Fault::PutDoneButFailed(number) {
            return Err(self.failure("write", &key.path()).perhaps_done());
        }
        Ok(())
    }
}

/// An unfinished object of the store below.
#[derive(Debug)]
struct FaultyUnfinished {
    inner: Box<dyn Unfinished>,
    script: Arc<Script>,
}

impl Unfinished for FaultyUnfinished {
    fn append(&mut self, parts: &[&[u8]]) -> Result<(), StoreError> {
        self.script.admit("write", "unfinished")?;
        self.inner.append(parts)
    }

    fn finish(self: Box<Self>, key: &ObjectKey) -> Result<(), StoreError> {
        let Self { inner, script } = *self;
        script.create(key, || inner.finish(key))
    }
}

impl<S: Store> Store for FaultyStore<S> {
    fn prepare(&self) -> Result<(), StoreError> {
        self.script.admit("prepare", "repository")?;
        self.inner.prepare()
    }

    fn put(&self, key: &ObjectKey, parts: &[&[u8]]) -> Result<(), StoreError> {
        self.script.create(key, || self.inner.put(key, parts))
    }

    fn begin(&self) -> Result<Option<Box<dyn Unfinished>>, StoreError> {
        self.script.admit("begin", "unfinished")?;
        let begun = self.inner.begin()?;
        Ok(begun.map(|inner| -> Box<dyn Unfinished> {
            let script = Arc::clone(&self.script);
            Box::new(FaultyUnfinished { inner, script })
        }))
    }

    fn get(&self, key: &ObjectKey, max_bytes: u64) -> Result<Vec<u8>, StoreError> {
        self.script.admit("read", &key.path())?;
        self.inner.get(key, max_bytes)
    }

    fn get_range(&self, key: &ObjectKey, offset: u64, into: &mut [u8]) -> Result<(), StoreError> {
        self.script.admit("read", &key.path())?;
        self.inner.get_range(key, offset, into)
    }

    fn list(&self, kind: ObjectKind, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        self.script.admit("list", kind.folder())?;
        self.inner.list(kind, prefix)
    }

    fn size(&self, key: &ObjectKey) -> Result<u64, StoreError> {
        self.script.admit("read", &key.path())?;
        self.inner.size(key)
    }

    fn delete(&self, key: &ObjectKey) -> Result<(), StoreError> {
        self.script.admit("delete", &key.path())?;
        self.inner.delete(key)
    }

    fn location(&self) -> String {
        self.inner.location()
    }
}
