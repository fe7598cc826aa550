//! What the lanes, the trees and the uploading threads of one writer share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::Receiver;
use highwater_model::ObjectId;
use highwater_model::step::{Step, pass};
use highwater_store::{Listed, ObjectKey, ObjectKind, StoreError, StoreErrorKind};

use crate::claims::Claims;
use crate::compress::Compression;
use crate::error::{RepoError, RepoErrorKind};
use crate::index::{IndexPack, IndexRow, encode};
use crate::objects::Objects;
use crate::pack::PackKind;
use crate::wire::{to_hex, wide};
use crate::writer::WriterStats;
use crate::writer::open_pack::{Body, FinishedPack, OpenPack};
use crate::writer::shelf::{Shelf, Slot};

/// Objects after which an index file is written in mid-session: 24 MB of rows.
const SEGMENT_ROWS_MAX: usize = 500_000;

/// Packs of chunks that are open or on their way into the store: some to be
/// filled while others are being synced. In a store that takes whole objects
/// only, each of them lies in memory.
const CHUNK_PACKS_MAX: usize = 4;
/// Likewise of tree pages, a sixtieth of what there is to store.
const PAGE_PACKS_MAX: usize = 2;

/// One writer's state.
pub(crate) struct Session {
    pub(crate) objects: Arc<Objects>,
    pub(crate) compression: Compression,
    pub(crate) pack_len: usize,
    believes_stored: AtomicBool,
    chunk_packs: Shelf,
    page_packs: Shelf,
    claims: Claims,
    pending: Mutex<Segment>,
    poison: Mutex<Option<Arc<RepoError>>>,
    is_poisoned: AtomicBool,
    pub(crate) counts: Counts,
}

/// Sums for [`WriterStats`].
#[derive(Default)]
pub(crate) struct Counts {
    chunk_bytes: AtomicU64,
    page_bytes: AtomicU64,
    index_bytes: AtomicU64,
    packs: AtomicU64,
    new_chunks: AtomicU64,
    known_chunks: AtomicU64,
}

/// Durable packs that no index file shows yet.
#[derive(Default)]
struct Segment {
    packs: Vec<IndexPack>,
    rows: Vec<IndexRow>,
}

impl Session {
    pub(crate) fn new(objects: Arc<Objects>, compression: Compression, pack_len: usize) -> Self {
        Self {
            objects,
            compression,
            pack_len,
            believes_stored: AtomicBool::new(true),
            chunk_packs: Shelf::new(CHUNK_PACKS_MAX),
            page_packs: Shelf::new(PAGE_PACKS_MAX),
            claims: Claims::new(),
            pending: Mutex::default(),
            poison: Mutex::default(),
            is_poisoned: AtomicBool::new(false),
            counts: Counts::default(),
        }
    }

    pub(crate) fn disbelieve_stored(&self) {
        self.believes_stored.store(false, Ordering::SeqCst);
    }

    /// Takes an object on, unless it is stored or somebody else has taken it.
    pub(crate) fn claim(&self, id: ObjectId) -> Result<bool, RepoError> {
        if self.claims.contains(&id) {
            return Ok(false);
        }
        let believes = self.believes_stored.load(Ordering::SeqCst);
        if believes && self.objects.index.find(&id)?.is_some() {
            return Ok(false);
        }
        // Between look-up and claim another lane may have stored it and an
        // index file may have shown it: then it is stored twice, which costs
        // space and nothing else.
        Ok(self.claims.claim(id))
    }

    /// Returns an error if an upload has failed: nothing after it can be
    /// committed.
    pub(crate) fn check(&self) -> Result<(), RepoError> {
        if self.is_poisoned.load(Ordering::Acquire) {
            Err(self.poisoned())
        } else {
            Ok(())
        }
    }

    fn poisoned(&self) -> RepoError {
        let poison = self.poison.lock().unwrap_or_else(PoisonError::into_inner);
        let kind = poison
            .as_ref()
            .map_or(RepoErrorKind::Store, |cause| cause.kind());
        let error = RepoError::new(kind, "go on after a failed upload");
        match poison.clone() {
            Some(cause) => error.because(Shared(cause)),
            None => error,
        }
    }

    /// Fails everything from now on; returns what to tell the caller.
    pub(crate) fn fail(&self, error: RepoError) -> RepoError {
        self.poison
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert_with(|| Arc::new(error));
        self.is_poisoned.store(true, Ordering::Release);
        self.poisoned()
    }

    /// Returns the open packs of a kind.
    pub(crate) fn shelf(&self, kind: PackKind) -> &Shelf {
        match kind {
            PackKind::Chunks => &self.chunk_packs,
            PackKind::Pages => &self.page_packs,
        }
    }

    /// Takes an open pack, or starts one.
    pub(crate) fn open_pack(&self, kind: PackKind) -> Result<OpenPack, RepoError> {
        self.shelf(kind).take(|slot| self.start_pack(kind, slot))
    }

    fn start_pack(&self, kind: PackKind, slot: Slot) -> Result<OpenPack, RepoError> {
        let begun = self.objects.store.begin();
        let begun = begun.map_err(|error| RepoError::store("begin a pack", error))?;
        let body = begun.map_or_else(|| Body::Whole(Vec::new()), Body::Piecewise);
        let seal = self.objects.seal.as_ref();
        Ok(OpenPack::new(kind, seal, body, Some(slot)))
    }

    /// Stores packs until there are no more; the body of an uploading thread.
    pub(crate) fn upload(&self, packs: &Receiver<FinishedPack>) {
        for pack in packs {
            // Takes the rest out of the queue, so that no lane waits for ever.
            if self.is_poisoned.load(Ordering::Acquire) {
                continue;
            }
            if let Err(error) = self.store_pack(pack) {
                drop(self.fail(error));
            }
        }
    }

    fn store_pack(&self, pack: FinishedPack) -> Result<(), RepoError> {
        let (id, len, kind) = (pack.hash, pack.len, pack.kind);
        let key = key_of(ObjectKind::Pack, &id);
        pass(Step::PackWritten);
        let (records, stored) = pack.store(self.objects.store.as_ref(), &key);
        self.settle_create(&key, len, stored)?;
        pass(Step::PackStored);
        self.counts.packs.fetch_add(1, Ordering::Relaxed);
        let full = {
            let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
            let pack_no = u32::try_from(pending.packs.len()).unwrap_or(u32::MAX);
            pending.packs.push(IndexPack { id, len, kind });
            let row = |place| IndexRow { pack_no, place };
            pending.rows.extend(records.into_iter().map(row));
            (pending.rows.len() >= SEGMENT_ROWS_MAX).then(|| std::mem::take(&mut *pending))
        };
        full.map_or(Ok(()), |segment| self.store_segment(segment))
    }

    /// Writes the index of all packs that none shows yet. Every pack it speaks
    /// of is durable.
    pub(crate) fn store_rest_of_index(&self) -> Result<(), RepoError> {
        let rest =
            std::mem::take(&mut *self.pending.lock().unwrap_or_else(PoisonError::into_inner));
        if rest.packs.is_empty() {
            Ok(())
        } else {
            self.store_segment(rest)
        }
    }

    fn store_segment(&self, mut segment: Segment) -> Result<(), RepoError> {
        let bytes = encode(&[], &segment.packs, &mut segment.rows);
        let name: [u8; 32] = blake3::hash(&bytes).into();
        let (key, len) = (key_of(ObjectKind::Index, &name), wide(bytes.len()));
        let stored = self.objects.store.put(&key, &[&bytes]);
        self.settle_create(&key, len, stored)?;
        pass(Step::IndexStored);
        self.counts.index_bytes.fetch_add(len, Ordering::Relaxed);
        drop(bytes);
        self.objects.index.add_own(&Listed { key, len })?;
        // Only now: an object is always either claimed or shown.
        segment
            .rows
            .iter()
            .for_each(|row| self.claims.release(&row.place.id));
        Ok(())
    }

    /// The name is the hash of the bytes, so that an object of this name and
    /// length is ours.
    fn settle_create(
        &self,
        key: &ObjectKey,
        len: u64,
        outcome: Result<(), StoreError>,
    ) -> Result<(), RepoError> {
        let settled = match outcome {
            Err(error) if error.kind() == StoreErrorKind::AlreadyExists => {
                match self.objects.store.size(key) {
                    Ok(found) if found == len => Ok(()),
                    Ok(_) => Err(error),
                    Err(unknown) => Err(unknown),
                }
            }
            outcome => outcome,
        };
        settled.map_err(|error| RepoError::store(format!("store `{key}`"), error))
    }
}

fn key_of(kind: ObjectKind, hash: &[u8; 32]) -> ObjectKey {
    ObjectKey::new(kind, to_hex(hash)).expect("hexadecimal is a good name")
}

impl Counts {
    pub(crate) fn stored(&self, kind: PackKind, bytes: u64) {
        match kind {
            PackKind::Chunks => {
                self.new_chunks.fetch_add(1, Ordering::Relaxed);
                self.chunk_bytes.fetch_add(bytes, Ordering::Relaxed);
            }
            PackKind::Pages => {
                self.page_bytes.fetch_add(bytes, Ordering::Relaxed);
            }
        }
    }

    pub(crate) fn known(&self) {
        self.known_chunks.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> WriterStats {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        WriterStats {
            stored_bytes_chunks: get(&self.chunk_bytes),
            stored_bytes_pages: get(&self.page_bytes),
            stored_bytes_index: get(&self.index_bytes),
            packs: get(&self.packs),
            new_chunks: get(&self.new_chunks),
            known_chunks: get(&self.known_chunks),
        }
    }
}

/// One error that several callers are told of.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Shared(#[source] Arc<RepoError>);
