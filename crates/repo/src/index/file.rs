//! One index file: its tables in memory, its rows in the store.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use highwater_model::ObjectId;
use highwater_store::{Listed, ObjectKey, ObjectKind, Store, StoreError, StoreErrorKind};

use crate::error::{Flaw, RepoError};
use crate::index::cache::BlockCache;
use crate::index::format::{
    BLOCK_LEN, Counts, HEADER_LEN, Header, IndexPack, IndexRow, Tables, find_in_block, prefix_of,
    prove_block, rows_in, rows_in_block,
};
use crate::wire::{narrow, to_hex, wide};

/// Why a file cannot be used.
pub(crate) enum LoadError {
    /// It is not what was written; the others go on without it.
    Damaged(Flaw),
    /// The store failed.
    Store(StoreError),
}

impl From<Flaw> for LoadError {
    fn from(flaw: Flaw) -> Self {
        Self::Damaged(flaw)
    }
}

impl From<StoreError> for LoadError {
    fn from(error: StoreError) -> Self {
        match error.kind() {
            StoreErrorKind::Corrupt => Self::Damaged(Flaw("it ends too early")),
            _ => Self::Store(error),
        }
    }
}

/// Tables of 700 million objects. A file with holes can claim any length, and
/// its tables are read into memory.
const TABLES_LEN_MAX: u64 = 1 << 30;

/// Whether a pack was looked for, and found with its exact length.
const UNKNOWN: u8 = 0;
const THERE: u8 = 1;
const MISSING: u8 = 2;

/// An index file that can be searched.
pub(crate) struct IndexFile {
    /// Distinguishes files in the block cache.
    number: u64,
    key: ObjectKey,
    counts: Counts,
    tables: Tables,
    blocks_at: u64,
    pack_states: Vec<AtomicU8>,
}

impl IndexFile {
    /// Reads header and tables; rows are read as they are needed.
    pub(crate) fn load(store: &dyn Store, listed: &Listed) -> Result<Self, LoadError> {
        let mut bytes = [0; HEADER_LEN];
        store.get_range(&listed.key, 0, &mut bytes)?;
        let header = Header::decode(&bytes)?;
        // Before anything is allocated by its word: the counts must fit the
        // file as it lies there.
        let counts = header.counts;
        if counts.file_len() != Some(listed.len) {
            return Err(Flaw("its length does not fit its counts").into());
        }
        let tables_len = counts
            .tables_len()
            .filter(|len| *len <= TABLES_LEN_MAX)
            .ok_or(Flaw("its counts are impossible"))?;
        let mut bytes = vec![0; narrow(tables_len)?];
        store.get_range(&listed.key, wide(HEADER_LEN), &mut bytes)?;
        let tables = Tables::decode(&header, &bytes)?;
        Ok(Self::assemble(
            listed.key.clone(),
            counts,
            tables,
            tables_len,
        ))
    }

    fn assemble(key: ObjectKey, counts: Counts, tables: Tables, tables_len: u64) -> Self {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        let pack_states = tables
            .packs
            .iter()
            .map(|_| AtomicU8::new(UNKNOWN))
            .collect();
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        let blocks_at = wide(HEADER_LEN).saturating_add(tables_len);
        Self {
            number,
            key,
            counts,
            tables,
            blocks_at,
            pack_states,
        }
    }

    pub(crate) fn key(&self) -> &ObjectKey {
        &self.key
    }

    /// Returns the names of the files that this one replaces.
    pub(crate) fn supersedes(&self) -> impl Iterator<Item = String> {
        self.tables.supersedes.iter().map(|name| to_hex(name))
    }

    /// Notes that this process has just made all packs of this file durable.
    pub(crate) fn trust_packs(&self) {
        self.pack_states
            .iter()
            .for_each(|state| state.store(THERE, Ordering::Relaxed));
    }

    /// Looks an object up.
    pub(crate) fn find(
        &self,
        store: &dyn Store,
        cache: &BlockCache,
        id: &ObjectId,
    ) -> Result<Option<IndexRow>, LoadError> {
        if !self.tables.filter.may_hold(id) {
            return Ok(None);
        }
        let prefix = prefix_of(id);
        let after = self
            .tables
            .prefixes
            .partition_point(|first| *first <= prefix);
        let Some(last) = after.checked_sub(1) else {
            return Ok(None);
        };
        if let Some(row) = self.find_in(store, cache, wide(last), id)? {
            return Ok(Some(row));
        }
        // Ids that share their first eight bytes may lie on both sides of a
        // block's start. More than two blocks of such do not exist by chance.
        let starts_with_it = self.tables.prefixes.get(last) == Some(&prefix);
        match last.checked_sub(1).filter(|_| starts_with_it) {
            Some(before) => self.find_in(store, cache, wide(before), id),
            None => Ok(None),
        }
    }

    fn find_in(
        &self,
        store: &dyn Store,
        cache: &BlockCache,
        block: u64,
        id: &ObjectId,
    ) -> Result<Option<IndexRow>, LoadError> {
        let rows = rows_in_block(&self.counts, block)?;
        if let Some(bytes) = cache.get(self.number, block) {
            return Ok(find_in_block(bytes.as_slice(), rows, id)?);
        }
        let mut bytes = [0; BLOCK_LEN];
        let offset = self
            .blocks_at
            .saturating_add(block.saturating_mul(wide(BLOCK_LEN)));
        store.get_range(&self.key, offset, &mut bytes)?;
        prove_block(&bytes)?;
        cache.insert(self.number, block, std::sync::Arc::new(bytes));
        Ok(find_in_block(&bytes, rows, id)?)
    }

    /// Returns the number of its blocks of rows.
    pub(crate) fn blocks(&self) -> u64 {
        self.counts.blocks()
    }

    /// Returns the packs it tells of.
    pub(crate) fn packs(&self) -> &[IndexPack] {
        &self.tables.packs
    }

    /// Reads a block for its rows, past the cache: nobody looks them up again.
    pub(crate) fn rows(&self, store: &dyn Store, block: u64) -> Result<Vec<IndexRow>, LoadError> {
        let mut bytes = [0; BLOCK_LEN];
        let offset = block.saturating_mul(wide(BLOCK_LEN));
        store.get_range(&self.key, self.blocks_at.saturating_add(offset), &mut bytes)?;
        prove_block(&bytes)?;
        let rows = rows_in(&bytes, rows_in_block(&self.counts, block)?);
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Returns the pack of a row if it exists with its exact length.
    pub(crate) fn pack_there(
        &self,
        store: &dyn Store,
        pack_no: u32,
    ) -> Result<Option<&IndexPack>, RepoError> {
        let at = usize::try_from(pack_no).unwrap_or(usize::MAX);
        let (Some(pack), Some(state)) = (self.tables.packs.get(at), self.pack_states.get(at))
        else {
            return Ok(None);
        };
        if state.load(Ordering::Relaxed) == UNKNOWN {
            let there = match store.size(&pack_key(&pack.id)) {
                Ok(len) => len == pack.len,
                Err(error) if error.kind() == StoreErrorKind::NotFound => false,
                Err(error) => return Err(RepoError::store("look for a pack", error)),
            };
            state.store(if there { THERE } else { MISSING }, Ordering::Relaxed);
        }
        Ok((state.load(Ordering::Relaxed) == THERE).then_some(pack))
    }
}

/// Returns the name of a pack's object.
pub(crate) fn pack_key(id: &[u8; 32]) -> ObjectKey {
    ObjectKey::new(ObjectKind::Pack, to_hex(id)).expect("hexadecimal is a good name")
}
