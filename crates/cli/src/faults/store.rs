//! A store that begins to fail when a step was passed.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use highwater_store::{
    Listed, ObjectKey, ObjectKind, Store, StoreError, StoreErrorKind, Unfinished,
};
use rustix::io::Errno;

/// How it fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failure {
    /// `broken`: every call, with an I/O error; nothing is done.
    Broken,
    /// `hiccup`: the next call, with an I/O error; nothing is done.
    Hiccup,
    /// `full`: every call that needs space.
    Full,
    /// `done`: the next object is created, and reported as perhaps created.
    Done,
    /// `lost`: the next object is not created, and reported as perhaps created.
    Lost,
}

/// What a call wants of a store.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Need {
    /// To read, or to remove something.
    Access,
    Space,
}

impl Failure {
    pub(super) fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "broken" => Self::Broken,
            "hiccup" => Self::Hiccup,
            "full" => Self::Full,
            "done" => Self::Done,
            "lost" => Self::Lost,
            _ => return None,
        })
    }
}

/// Passes calls on to another store, except those that are to fail.
#[derive(Debug)]
pub(super) struct FailingStore {
    inner: Arc<dyn Store>,
    script: Arc<Script>,
}

#[derive(Debug)]
struct Script {
    failure: Failure,
    location: String,
    /// Is there when the step was passed, by whichever process.
    sign: PathBuf,
    is_over: AtomicBool,
}

impl FailingStore {
    pub(super) fn new(inner: Arc<dyn Store>, failure: Failure, sign: PathBuf) -> Self {
        let script = Script {
            failure,
            location: inner.location(),
            sign,
            is_over: AtomicBool::new(false),
        };
        Self {
            inner,
            script: Arc::new(script),
        }
    }
}

impl Script {
    /// Returns whether this is the one call that is to fail.
    fn is_the_one(&self) -> bool {
        self.sign.exists() && !self.is_over.swap(true, Ordering::SeqCst)
    }

    fn admit(&self, need: Need, verb: &'static str, object: &str) -> Result<(), StoreError> {
        let (fails, kind, errno) = match self.failure {
            Failure::Broken => (self.sign.exists(), StoreErrorKind::Other, Errno::IO),
            Failure::Hiccup => (self.is_the_one(), StoreErrorKind::Other, Errno::IO),
            Failure::Full => {
                let fails = need == Need::Space && self.sign.exists();
                (fails, StoreErrorKind::NoSpace, Errno::NOSPC)
            }
            Failure::Done | Failure::Lost => return Ok(()),
        };
        if fails {
            Err(self.error(kind, verb, object, errno).not_done())
        } else {
            Ok(())
        }
    }

    fn error(
        &self,
        kind: StoreErrorKind,
        verb: &'static str,
        object: &str,
        errno: Errno,
    ) -> StoreError {
        StoreError::new(kind, verb, object, self.location.clone()).because(io::Error::from(errno))
    }

    /// Creates an object, unless that is to fail.
    fn create(
        &self,
        key: &ObjectKey,
        put: impl FnOnce() -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.admit(Need::Space, "write", &key.path())?;
        let is_unknown = matches!(self.failure, Failure::Done | Failure::Lost) && self.is_the_one();
        if !is_unknown || self.failure == Failure::Done {
            put()?;
        }
        if is_unknown {
            let kind = StoreErrorKind::Unreachable;
            let error = self.error(kind, "write", &key.path(), Errno::TIMEDOUT);
            return Err(error.perhaps_done());
        }
        Ok(())
    }
}

#[derive(Debug)]
struct FailingUnfinished {
    inner: Box<dyn Unfinished>,
    script: Arc<Script>,
}

impl Unfinished for FailingUnfinished {
    fn append(&mut self, parts: &[&[u8]]) -> Result<(), StoreError> {
        self.script.admit(Need::Space, "write", "tmp")?;
        self.inner.append(parts)
    }

    fn finish(self: Box<Self>, key: &ObjectKey) -> Result<(), StoreError> {
        let Self { inner, script } = *self;
        script.create(key, || inner.finish(key))
    }
}

impl Store for FailingStore {
    fn prepare(&self) -> Result<(), StoreError> {
        self.script.admit(Need::Space, "prepare", "repository")?;
        self.inner.prepare()
    }

    fn put(&self, key: &ObjectKey, parts: &[&[u8]]) -> Result<(), StoreError> {
        self.script.create(key, || self.inner.put(key, parts))
    }

    fn begin(&self) -> Result<Option<Box<dyn Unfinished>>, StoreError> {
        self.script.admit(Need::Space, "write", "tmp")?;
        let begun = self.inner.begin()?;
        Ok(begun.map(|inner| -> Box<dyn Unfinished> {
            let script = Arc::clone(&self.script);
            Box::new(FailingUnfinished { inner, script })
        }))
    }

    fn get(&self, key: &ObjectKey, max_bytes: u64) -> Result<Vec<u8>, StoreError> {
        self.script.admit(Need::Access, "read", &key.path())?;
        self.inner.get(key, max_bytes)
    }

    fn get_range(&self, key: &ObjectKey, offset: u64, into: &mut [u8]) -> Result<(), StoreError> {
        self.script.admit(Need::Access, "read", &key.path())?;
        self.inner.get_range(key, offset, into)
    }

    fn list(&self, kind: ObjectKind, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        self.script.admit(Need::Access, "list", kind.folder())?;
        self.inner.list(kind, prefix)
    }

    fn size(&self, key: &ObjectKey) -> Result<u64, StoreError> {
        self.script.admit(Need::Access, "read", &key.path())?;
        self.inner.size(key)
    }

    fn delete(&self, key: &ObjectKey) -> Result<(), StoreError> {
        self.script.admit(Need::Access, "delete", &key.path())?;
        self.inner.delete(key)
    }

    fn location(&self) -> String {
        self.script.location.clone()
    }
}
