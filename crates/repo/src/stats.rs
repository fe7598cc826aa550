//! What the objects of a repository take, by kind.

use std::collections::{HashMap, HashSet};

use highwater_store::ObjectKind;

use crate::error::RepoError;
use crate::objects::Objects;
use crate::pack::PackKind;
use crate::wire::to_hex;

/// Blocks of the index that are read at most; more are sampled. Each tells of
/// up to 84 objects, so the sample is of about 20 000.
const BLOCKS_MAX: u64 = 256;

/// What a repository stores, bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Storage {
    /// Chunks of images.
    pub chunks: KindStorage,
    /// Pages of trees.
    pub pages: KindStorage,
    /// Index files.
    pub index_bytes: u64,
    /// Manifests.
    pub manifest_bytes: u64,
    /// Keys, leases, tombstones, proofs, prune records.
    pub other_bytes: u64,
    /// Packs that no index shows: being written, or left by a run cut off.
    pub unindexed_bytes: u64,
    /// Whether every object was counted, not a sample of them.
    pub is_exact: bool,
}

/// What the packs of one kind hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KindStorage {
    /// Packs.
    pub packs: u64,
    /// Their length.
    pub stored_bytes: u64,
    /// Length of the objects in them before compression.
    pub plain_bytes: u64,
}

impl Storage {
    /// Returns the bytes of all objects.
    pub fn total_bytes(&self) -> u64 {
        [
            self.chunks.stored_bytes,
            self.pages.stored_bytes,
            self.index_bytes,
            self.manifest_bytes,
            self.other_bytes,
            self.unindexed_bytes,
        ]
        .into_iter()
        .fold(0, u64::saturating_add)
    }
}

/// What a sample of the index tells of one kind.
#[derive(Default)]
struct Sample {
    plain: u64,
    record: u64,
}

/// Lists everything once and reads a bounded part of the index: the cost grows
/// with the number of packs, not with that of objects.
pub(crate) fn storage(objects: &Objects) -> Result<Storage, RepoError> {
    objects.index.refresh()?;
    let mut storage = Storage {
        is_exact: true,
        ..Storage::default()
    };
    let mut kinds: HashMap<String, PackKind> = HashMap::new();
    for (id, kind) in objects.index.packs()? {
        kinds.insert(to_hex(&id), kind);
    }
    let bytes_of = |kind| -> Result<u64, RepoError> {
        let listed = objects.store.list(kind, "");
        let listed = listed.map_err(|error| RepoError::store("list the repository", error))?;
        Ok(listed.iter().map(|it| it.len).fold(0, u64::saturating_add))
    };
    let packs = objects.store.list(ObjectKind::Pack, "");
    for pack in packs.map_err(|error| RepoError::store("list packs", error))? {
        let kind = match kinds.get(pack.key.name()) {
            Some(PackKind::Chunks) => &mut storage.chunks,
            Some(PackKind::Pages) => &mut storage.pages,
            None => {
                storage.unindexed_bytes = storage.unindexed_bytes.saturating_add(pack.len);
                continue;
            }
        };
        kind.packs = kind.packs.saturating_add(1);
        kind.stored_bytes = kind.stored_bytes.saturating_add(pack.len);
    }
    storage.index_bytes = bytes_of(ObjectKind::Index)?;
    storage.manifest_bytes = bytes_of(ObjectKind::Point)?;
    let counted: HashSet<ObjectKind> =
        [ObjectKind::Pack, ObjectKind::Index, ObjectKind::Point].into();
    for kind in ObjectKind::FOLDERS {
        if !counted.contains(&kind) {
            storage.other_bytes = storage.other_bytes.saturating_add(bytes_of(kind)?);
        }
    }
    let (mut chunks, mut pages) = (Sample::default(), Sample::default());
    storage.is_exact = objects.index.sample(BLOCKS_MAX, &mut |kind, place| {
        let sample = match kind {
            PackKind::Chunks => &mut chunks,
            PackKind::Pages => &mut pages,
        };
        sample.plain = sample.plain.saturating_add(u64::from(place.plain_len));
        sample.record = sample.record.saturating_add(u64::from(place.record_len));
    })?;
    storage.chunks.plain_bytes = scaled(&chunks, storage.chunks.stored_bytes, storage.is_exact);
    storage.pages.plain_bytes = scaled(&pages, storage.pages.stored_bytes, storage.is_exact);
    Ok(storage)
}

/// Scales what was seen to all that is stored.
fn scaled(sample: &Sample, stored: u64, is_exact: bool) -> u64 {
    if is_exact || sample.record == 0 {
        return sample.plain;
    }
    let plain = u128::from(sample.plain).saturating_mul(u128::from(stored));
    let plain = plain.checked_div(u128::from(sample.record)).unwrap_or(0);
    u64::try_from(plain).unwrap_or(u64::MAX)
}
