//! A store in memory.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{Listed, ObjectKey, ObjectKind, Store, StoreError, StoreErrorKind, Unfinished};

type Objects = BTreeMap<ObjectKey, Arc<[u8]>>;

/// Keeps objects in memory; clones share them.
#[derive(Debug, Clone, Default)]
pub struct MemStore {
    objects: Arc<Mutex<Objects>>,
    takes_whole_only: bool,
}

impl MemStore {
    /// Returns an empty store that takes objects only whole.
    #[must_use]
    pub fn of_whole_objects() -> Self {
        Self {
            takes_whole_only: true,
            ..Self::default()
        }
    }

    /// Returns a store with a copy of the objects that no longer follows this
    /// one.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self {
            objects: Arc::new(Mutex::new(self.objects().clone())),
            takes_whole_only: self.takes_whole_only,
        }
    }

    /// Returns all keys.
    pub fn keys(&self) -> Vec<ObjectKey> {
        self.objects().keys().cloned().collect()
    }

    /// Returns the bytes of an object.
    pub fn bytes(&self, key: &ObjectKey) -> Option<Vec<u8>> {
        self.objects().get(key).map(|bytes| bytes.to_vec())
    }

    /// Replaces an object, as damage does.
    pub fn damage(&self, key: &ObjectKey, bytes: &[u8]) {
        self.objects().insert(key.clone(), Arc::from(bytes));
    }

    fn objects(&self) -> MutexGuard<'_, Objects> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, key: &ObjectKey) -> Result<Arc<[u8]>, StoreError> {
        let missing = || self.error(StoreErrorKind::NotFound, "read", key);
        self.objects().get(key).cloned().ok_or_else(missing)
    }

    fn error(&self, kind: StoreErrorKind, verb: &'static str, key: &ObjectKey) -> StoreError {
        StoreError::new(kind, verb, key.path(), self.location())
    }
}

impl Store for MemStore {
    fn prepare(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn put(&self, key: &ObjectKey, parts: &[&[u8]]) -> Result<(), StoreError> {
        let mut objects = self.objects();
        if objects.contains_key(key) {
            return Err(self.error(StoreErrorKind::AlreadyExists, "write", key));
        }
        objects.insert(key.clone(), Arc::from(parts.concat()));
        Ok(())
    }

    fn begin(&self) -> Result<Option<Box<dyn Unfinished>>, StoreError> {
        let unfinished = MemUnfinished {
            store: self.clone(),
            bytes: Vec::new(),
        };
        Ok((!self.takes_whole_only).then(|| Box::new(unfinished) as Box<dyn Unfinished>))
    }

    fn get(&self, key: &ObjectKey, max_bytes: u64) -> Result<Vec<u8>, StoreError> {
        let bytes = self.find(key)?;
        if u64::try_from(bytes.len()).is_ok_and(|len| len <= max_bytes) {
            return Ok(bytes.to_vec());
        }
        Err(self.error(StoreErrorKind::TooLarge, "read", key))
    }

    fn get_range(&self, key: &ObjectKey, offset: u64, into: &mut [u8]) -> Result<(), StoreError> {
        let bytes = self.find(key)?;
        let part = usize::try_from(offset)
            .ok()
            .and_then(|start| bytes.get(start..start.checked_add(into.len())?))
            .ok_or_else(|| self.error(StoreErrorKind::Corrupt, "read", key))?;
        into.copy_from_slice(part);
        Ok(())
    }

    fn list(&self, kind: ObjectKind, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        let listed = |(key, bytes): (&ObjectKey, &Arc<[u8]>)| {
            Some(Listed {
                key: key.clone(),
                len: u64::try_from(bytes.len()).ok()?,
            })
        };
        let wanted = |key: &ObjectKey| key.kind() == kind && key.name().starts_with(prefix);
        Ok(self
            .objects()
            .iter()
            .filter(|(key, _)| wanted(key))
            .filter_map(listed)
            .collect())
    }

    fn size(&self, key: &ObjectKey) -> Result<u64, StoreError> {
        Ok(u64::try_from(self.find(key)?.len()).unwrap_or(u64::MAX))
    }

    fn delete(&self, key: &ObjectKey) -> Result<(), StoreError> {
        self.objects().remove(key);
        Ok(())
    }

    fn location(&self) -> String {
        "memory".to_owned()
    }
}

#[derive(Debug)]
struct MemUnfinished {
    store: MemStore,
    bytes: Vec<u8>,
}

impl Unfinished for MemUnfinished {
    fn append(&mut self, parts: &[&[u8]]) -> Result<(), StoreError> {
        for part in parts {
            self.bytes.extend_from_slice(part);
        }
        Ok(())
    }

    fn finish(self: Box<Self>, key: &ObjectKey) -> Result<(), StoreError> {
        self.store.put(key, &[&self.bytes])
    }
}
