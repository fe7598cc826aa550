//! What reading and writing share: the store, the keys, the index, and the way
//! from an id to proven bytes.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use highwater_model::ObjectId;
use highwater_store::Store;

use crate::compress::Decompressor;
use crate::config::Config;
use crate::error::{Flaw, RepoError, RepoErrorKind};
use crate::hash::IdKeys;
use crate::index::{IndexSet, Place};
use crate::pack::{HEADER_LEN, PackHeader, PackKind, open_record, record_len_max};
use crate::page::{PAGE_LEN_MAX, Page};
use crate::seal::{SealKey, Sealer};
use crate::wire::{narrow, wide};

/// Copies of one object that are tried before it counts as damaged.
const PLACES_MAX: usize = 8;

/// An open repository, as its parts see it.
pub(crate) struct Objects {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) config: Config,
    pub(crate) ids: IdKeys,
    pub(crate) seal: Option<SealKey>,
    pub(crate) index: IndexSet,
    windows: Mutex<Windows>,
    sealers: Mutex<HashMap<[u8; 32], Arc<Sealer>>>,
}

impl Objects {
    pub(crate) fn new(
        store: Arc<dyn Store>,
        config: Config,
        ids: IdKeys,
        seal: Option<SealKey>,
    ) -> Result<Self, RepoError> {
        let index = IndexSet::open(Arc::clone(&store))?;
        let (windows, sealers) = (Mutex::default(), Mutex::default());
        Ok(Self {
            store,
            config,
            ids,
            seal,
            index,
            windows,
            sealers,
        })
    }

    /// Returns a tree page, proven by its id.
    pub(crate) fn page(&self, id: &ObjectId) -> Result<Page, RepoError> {
        let bytes = self.read(PackKind::Pages, id, |place| self.windowed(place))?;
        Page::decode(&bytes).map_err(|flaw| RepoError::damaged(format!("read page {id}"), flaw))
    }

    /// Returns any object, proven by its id, from whichever of its copies is
    /// whole.
    pub(crate) fn object(&self, kind: PackKind, id: &ObjectId) -> Result<Vec<u8>, RepoError> {
        self.read(kind, id, |place| self.record(place))
    }

    fn read(
        &self,
        kind: PackKind,
        id: &ObjectId,
        fetch: impl Fn(&Place) -> Result<Vec<u8>, RepoError>,
    ) -> Result<Vec<u8>, RepoError> {
        let first = self.index.need(id)?;
        let error = match self.read_at(&first, kind, id, &fetch) {
            Err(error) if error.kind() == RepoErrorKind::Damaged => error,
            outcome => return outcome,
        };
        let others = self.index.places(id, PLACES_MAX)?.into_iter().skip(1);
        for place in others {
            match self.read_at(&place, kind, id, &fetch) {
                Err(error) if error.kind() == RepoErrorKind::Damaged => {}
                outcome => return outcome,
            }
        }
        Err(error)
    }

    fn read_at(
        &self,
        place: &Place,
        kind: PackKind,
        id: &ObjectId,
        fetch: impl Fn(&Place) -> Result<Vec<u8>, RepoError>,
    ) -> Result<Vec<u8>, RepoError> {
        let damaged =
            |flaw| RepoError::damaged(format!("read object {id} in `{}`", place.pack()), flaw);
        let sealer = self.sealer(place)?;
        let mut record = fetch(place)?;
        let mut plain = Vec::new();
        let mut decompressor = Decompressor::default();
        self.open(
            &sealer,
            kind,
            place,
            &mut record,
            &mut decompressor,
            &mut plain,
        )
        .map_err(damaged)?;
        Ok(plain)
    }

    /// Takes a record apart and proves that it is the object asked for.
    pub(crate) fn open(
        &self,
        sealer: &Sealer,
        kind: PackKind,
        place: &Place,
        record: &mut [u8],
        decompressor: &mut Decompressor,
        plain: &mut Vec<u8>,
    ) -> Result<(), Flaw> {
        if place.kind != kind {
            return Err(Flaw("it lies in a pack of the other kind"));
        }
        let named = open_record(
            sealer,
            kind,
            place.record.offset,
            record,
            decompressor,
            plain,
        )?;
        if named != place.record.id {
            return Err(Flaw("another object lies there"));
        }
        let id = match kind {
            PackKind::Chunks => self.ids.chunk_id(plain),
            PackKind::Pages => self.ids.page_id(plain),
        };
        if id == place.record.id {
            Ok(())
        } else {
            Err(Flaw("its content is not that of its id"))
        }
    }

    /// Returns what opens the records of a pack.
    pub(crate) fn sealer(&self, place: &Place) -> Result<Arc<Sealer>, RepoError> {
        // Enough for the packs that one restore goes back and forth between.
        const SEALERS_MAX: usize = 1024;
        let what = || format!("read the header of `{}`", place.pack());
        let lock = || self.sealers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sealer) = lock().get(&place.pack_id) {
            return Ok(Arc::clone(sealer));
        }
        let mut bytes = [0; HEADER_LEN];
        self.store
            .get_range(&place.pack(), 0, &mut bytes)
            .map_err(|error| RepoError::needed(what(), error))?;
        let header = PackHeader::decode(&bytes).map_err(|flaw| RepoError::damaged(what(), flaw))?;
        let sealer = Arc::new(Sealer::for_pack(self.seal.as_ref(), &header.salt));
        if header.kind != place.kind || header.cipher != sealer.cipher() {
            let flaw = Flaw("its kind or cipher is not what it must be");
            return Err(RepoError::damaged(what(), flaw));
        }
        let mut sealers = lock();
        if sealers.len() >= SEALERS_MAX {
            sealers.clear();
        }
        sealers.insert(place.pack_id, Arc::clone(&sealer));
        Ok(sealer)
    }

    /// Reads one record as it is stored.
    fn record(&self, place: &Place) -> Result<Vec<u8>, RepoError> {
        let what = || format!("read object {}", place.record.id);
        let len = narrow(place.record.record_len.into()).unwrap_or(usize::MAX);
        let plain_len = narrow(place.record.plain_len.into()).unwrap_or(usize::MAX);
        let longest = record_len_max(self.config.chunk_size.len().max(PAGE_LEN_MAX));
        if len > record_len_max(plain_len) || len > longest {
            return Err(RepoError::damaged(what(), Flaw("its length is impossible")));
        }
        let mut bytes = vec![0; len];
        self.store
            .get_range(&place.pack(), place.record.offset.into(), &mut bytes)
            .map_err(|error| RepoError::needed(what(), error))?;
        Ok(bytes)
    }

    /// Reads one record, and its neighbours with it: pages that belong together
    /// were written together.
    fn windowed(&self, place: &Place) -> Result<Vec<u8>, RepoError> {
        let offset = u64::from(place.record.offset);
        let number = offset / WINDOW_LEN;
        let start = number.saturating_mul(WINDOW_LEN);
        let end = offset.saturating_add(place.record.record_len.into());
        let window_end = start.saturating_add(WINDOW_LEN).min(place.pack_len);
        if end > window_end {
            return self.record(place);
        }
        let lock = || self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        let cached = lock().get(&(place.pack_id, number));
        let window = if let Some(window) = cached {
            window
        } else {
            let len = narrow(window_end.saturating_sub(start)).unwrap_or_default();
            let mut bytes = vec![0; len];
            self.store
                .get_range(&place.pack(), start, &mut bytes)
                .map_err(|error| {
                    RepoError::needed(format!("read pages in `{}`", place.pack()), error)
                })?;
            let window = Arc::new(bytes);
            lock().insert((place.pack_id, number), Arc::clone(&window));
            window
        };
        let from = narrow(offset.saturating_sub(start)).unwrap_or(usize::MAX);
        let to = narrow(end.saturating_sub(start)).unwrap_or(usize::MAX);
        window.get(from..to).map(<[u8]>::to_vec).ok_or_else(|| {
            RepoError::damaged(
                format!("read page {}", place.record.id),
                Flaw("it ends too early"),
            )
        })
    }
}

/// About sixty pages: one read serves a walk over an image of 240 MiB.
const WINDOW_LEN: u64 = 128 << 10;
/// 8 MiB in all.
const WINDOWS_MAX: usize = 64;

/// Parts of page packs that were read lately; the oldest leave first.
#[derive(Default)]
struct Windows {
    windows: HashMap<([u8; 32], u64), Arc<Vec<u8>>>,
    order: VecDeque<([u8; 32], u64)>,
}

impl Windows {
    fn get(&self, key: &([u8; 32], u64)) -> Option<Arc<Vec<u8>>> {
        self.windows.get(key).cloned()
    }

    fn insert(&mut self, key: ([u8; 32], u64), window: Arc<Vec<u8>>) {
        debug_assert!(
            wide(window.len()) <= WINDOW_LEN,
            "a window is not longer than it may be"
        );
        if self.windows.insert(key, window).is_none() {
            self.order.push_back(key);
        }
        if self.order.len() > WINDOWS_MAX {
            let oldest = self.order.pop_front();
            oldest.and_then(|oldest| self.windows.remove(&oldest));
        }
    }
}
