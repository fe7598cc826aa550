//! One index file: its tables in memory, its rows in the store.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use highwater_model::ObjectId;
use highwater_store::{Listed, ObjectKey, ObjectKind, Store, StoreError, StoreErrorKind};

use crate::error::{Flaw, RepoError};
use crate::index::cache::BlockCache;
use crate::index::format::{
    BLOCK_LEN, Counts, HEADER_LEN, Header, IndexPack, IndexRow, Tables, decode_block,
    find_in_block, prefix_of, prove_block, rows_in_block,
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

/// Blocks that one look-up reads of one file: more copies of one object do not
/// exist, and a file that says so must not cost more.
const BLOCKS_MAX: usize = 8;

/// Whether a pack was looked for, and found with its exact length.
const UNKNOWN: u8 = 0;
const THERE: u8 = 1;
const MISSING: u8 = 2;

/// An index file that can be searched.
///
/// Header and tables are read when it is first searched: a repository is opened
/// by the names of its index files alone.
pub(crate) struct IndexFile {
    /// Distinguishes files in the block cache.
    number: u64,
    listed: Listed,
    trusts_packs: bool,
    loading: Mutex<()>,
    loaded: OnceLock<Loaded>,
}

/// What stays in memory of a file.
struct Loaded {
    counts: Counts,
    tables: Tables,
    blocks_at: u64,
    pack_states: Vec<AtomicU8>,
}

impl IndexFile {
    /// Takes note of a file that the store lists.
    pub(crate) fn listed(listed: Listed) -> Self {
        Self::new(listed, false)
    }

    /// Takes note of a file whose packs this process has just made durable.
    pub(crate) fn of_own_packs(listed: Listed) -> Self {
        Self::new(listed, true)
    }

    fn new(listed: Listed, trusts_packs: bool) -> Self {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        Self {
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            listed,
            trusts_packs,
            loading: Mutex::default(),
            loaded: OnceLock::new(),
        }
    }

    pub(crate) fn key(&self) -> &ObjectKey {
        &self.listed.key
    }

    pub(crate) fn len(&self) -> u64 {
        self.listed.len
    }

    pub(crate) fn is_loaded(&self) -> bool {
        self.loaded.get().is_some()
    }

    /// Reads header and tables if they are not in memory yet.
    pub(crate) fn load(&self, store: &dyn Store) -> Result<(), LoadError> {
        self.loaded(store).map(drop)
    }

    fn loaded(&self, store: &dyn Store) -> Result<&Loaded, LoadError> {
        if let Some(loaded) = self.loaded.get() {
            return Ok(loaded);
        }
        let _loading = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have been quicker.
        if let Some(loaded) = self.loaded.get() {
            return Ok(loaded);
        }
        let loaded = Loaded::read(store, &self.listed, self.trusts_packs)?;
        Ok(self.loaded.get_or_init(|| loaded))
    }

    /// Returns the names of the files that this one replaces; none as long as
    /// it was not searched.
    pub(crate) fn supersedes(&self) -> impl Iterator<Item = String> {
        let tables = self.loaded.get().map(|loaded| &loaded.tables);
        let names = tables.into_iter().flat_map(|tables| &tables.supersedes);
        names.map(|name| to_hex(name))
    }

    /// Looks an object up; returns a row for each of its copies.
    pub(crate) fn find(
        &self,
        store: &dyn Store,
        cache: &BlockCache,
        id: &ObjectId,
    ) -> Result<Vec<IndexRow>, LoadError> {
        let loaded = self.loaded(store)?;
        if !loaded.tables.filter.may_hold(id) {
            return Ok(Vec::new());
        }
        // Rows of one id, and ids that share their first eight bytes, may lie on
        // both sides of a block's start.
        let prefixes = &loaded.tables.prefixes;
        let prefix = prefix_of(id);
        let from = prefixes.partition_point(|first| *first < prefix);
        let to = prefixes.partition_point(|first| *first <= prefix);
        let mut rows = Vec::new();
        for block in (from.saturating_sub(1)..to).take(BLOCKS_MAX) {
            rows.extend(self.find_in(loaded, store, cache, wide(block), id)?);
        }
        Ok(rows)
    }

    fn find_in(
        &self,
        loaded: &Loaded,
        store: &dyn Store,
        cache: &BlockCache,
        block: u64,
        id: &ObjectId,
    ) -> Result<Vec<IndexRow>, LoadError> {
        let rows = rows_in_block(&loaded.counts, block)?;
        if let Some(bytes) = cache.get(self.number, block) {
            return Ok(find_in_block(bytes.as_slice(), rows, id)?);
        }
        let mut bytes = [0; BLOCK_LEN];
        let offset = loaded
            .blocks_at
            .saturating_add(block.saturating_mul(wide(BLOCK_LEN)));
        store.get_range(self.key(), offset, &mut bytes)?;
        prove_block(&bytes)?;
        cache.insert(self.number, block, std::sync::Arc::new(bytes));
        Ok(find_in_block(&bytes, rows, id)?)
    }

    /// Returns the number of its blocks of rows.
    pub(crate) fn blocks(&self, store: &dyn Store) -> Result<u64, LoadError> {
        Ok(self.loaded(store)?.counts.blocks())
    }

    /// Returns the packs it tells of.
    pub(crate) fn packs(&self, store: &dyn Store) -> Result<&[IndexPack], LoadError> {
        Ok(&self.loaded(store)?.tables.packs)
    }

    /// Reads a block for its rows, past the cache: nobody looks them up again.
    pub(crate) fn rows(&self, store: &dyn Store, block: u64) -> Result<Vec<IndexRow>, LoadError> {
        let loaded = self.loaded(store)?;
        let mut bytes = [0; BLOCK_LEN];
        let offset = block.saturating_mul(wide(BLOCK_LEN));
        store.get_range(
            self.key(),
            loaded.blocks_at.saturating_add(offset),
            &mut bytes,
        )?;
        prove_block(&bytes)?;
        Ok(decode_block(&bytes, rows_in_block(&loaded.counts, block)?)?)
    }

    /// Returns the pack of a row if it exists with its exact length.
    pub(crate) fn pack_there(
        &self,
        store: &dyn Store,
        pack_no: u32,
    ) -> Result<Option<&IndexPack>, RepoError> {
        let Some(loaded) = self.loaded.get() else {
            return Ok(None);
        };
        let at = usize::try_from(pack_no).unwrap_or(usize::MAX);
        let (Some(pack), Some(state)) = (loaded.tables.packs.get(at), loaded.pack_states.get(at))
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

impl Loaded {
    fn read(store: &dyn Store, listed: &Listed, trusts_packs: bool) -> Result<Self, LoadError> {
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
        let state = if trusts_packs { THERE } else { UNKNOWN };
        let pack_states = tables.packs.iter().map(|_| AtomicU8::new(state)).collect();
        Ok(Self {
            counts,
            tables,
            blocks_at: wide(HEADER_LEN).saturating_add(tables_len),
            pack_states,
        })
    }
}

/// Returns the name of a pack's object.
pub(crate) fn pack_key(id: &[u8; 32]) -> ObjectKey {
    ObjectKey::new(ObjectKind::Pack, to_hex(id)).expect("hexadecimal is a good name")
}
