//! A store in memory for fuzzing, and hashes made to fit what was changed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use highwater_store::{Listed, ObjectKey, ObjectKind, Store, StoreError, StoreErrorKind};

use crate::wire::{narrow, wide};

/// Objects by name; a clone has objects of its own.
#[derive(Debug, Default)]
pub(super) struct Shelf {
    objects: Mutex<BTreeMap<ObjectKey, Arc<[u8]>>>,
}

impl Clone for Shelf {
    fn clone(&self) -> Self {
        Self {
            objects: Mutex::new(self.objects().clone()),
        }
    }
}

impl Shelf {
    pub(super) fn keys(&self) -> Vec<ObjectKey> {
        self.objects().keys().cloned().collect()
    }

    pub(super) fn bytes(&self, key: &ObjectKey) -> Vec<u8> {
        self.objects()
            .get(key)
            .map(|bytes| bytes.to_vec())
            .unwrap_or_default()
    }

    /// Sets an object, whatever was there.
    pub(super) fn place(&self, key: &ObjectKey, bytes: &[u8]) {
        self.objects().insert(key.clone(), Arc::from(bytes));
    }

    pub(super) fn remove(&self, key: &ObjectKey) {
        self.objects().remove(key);
    }

    fn objects(&self) -> MutexGuard<'_, BTreeMap<ObjectKey, Arc<[u8]>>> {
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

impl Store for Shelf {
    fn prepare(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn put(&self, key: &ObjectKey, parts: &[&[u8]]) -> Result<(), StoreError> {
        if self.objects().contains_key(key) {
            return Err(self.error(StoreErrorKind::AlreadyExists, "write", key));
        }
        self.place(key, &parts.concat());
        Ok(())
    }

    fn get(&self, key: &ObjectKey, max_bytes: u64) -> Result<Vec<u8>, StoreError> {
        let bytes = self.find(key)?;
        if wide(bytes.len()) <= max_bytes {
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
        let objects = self.objects();
        let wanted = objects
            .iter()
            .filter(|(key, _)| key.kind() == kind && key.name().starts_with(prefix));
        let listed = wanted.map(|(key, bytes)| Listed {
            key: key.clone(),
            len: wide(bytes.len()),
        });
        Ok(listed.collect())
    }

    fn size(&self, key: &ObjectKey) -> Result<u64, StoreError> {
        Ok(wide(self.find(key)?.len()))
    }

    fn delete(&self, key: &ObjectKey) -> Result<(), StoreError> {
        self.remove(key);
        Ok(())
    }

    fn location(&self) -> String {
        "memory".to_owned()
    }
}

/// Makes the hashes of an index file fit its bytes, as far as its counts fit
/// its length (docs/format.md).
pub(super) fn mend_index(bytes: &mut [u8]) {
    const HEADER: usize = 64;
    const BLOCK: usize = 4096;
    let Some(counts) = bytes
        .get(8..24)
        .and_then(|part| part.as_chunks::<4>().0.first_chunk::<4>())
    else {
        return;
    };
    let [supersedes, packs, low, high] = counts.map(u32::from_le_bytes);
    let rows = u64::from(high) << 32 | u64::from(low);
    let blocks = rows.div_ceil(84);
    let words = rows.saturating_mul(10).div_ceil(64);
    let tables = u64::from(supersedes)
        .saturating_mul(32)
        .saturating_add(u64::from(packs).saturating_mul(48))
        .saturating_add(blocks.saturating_add(words).saturating_mul(8));
    let Ok(tables) = narrow(tables) else { return };
    let Some((head, rest)) = bytes.split_at_mut_checked(HEADER) else {
        return;
    };
    let Some((tables, rows)) = rest.split_at_mut_checked(tables) else {
        return;
    };
    let mut hasher = blake3::Hasher::new();
    hasher.update(head.get(..24).unwrap_or_default());
    hasher.update(tables);
    if let Some(hash) = head.get_mut(24..56) {
        hash.copy_from_slice(hasher.finalize().as_bytes());
    }
    for block in rows.chunks_exact_mut(BLOCK) {
        mend_tail(block);
    }
}

/// Makes the last 32 bytes the hash of those before them.
pub(super) fn mend_tail(bytes: &mut [u8]) {
    if let Some((hashed, hash)) = bytes.split_last_chunk_mut::<32>() {
        *hash = *blake3::hash(hashed).as_bytes();
    }
}

/// Returns a configuration whose second line is the hash of its first.
pub(super) fn mend_config(bytes: &[u8]) -> Vec<u8> {
    let line = bytes
        .split(|byte| *byte == b'\n')
        .next()
        .unwrap_or_default();
    let hash = blake3::hash(line).to_hex();
    [line, b"\n", hash.as_bytes(), b"\n"].concat()
}
