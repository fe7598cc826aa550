//! What the lanes, the trees and the uploading threads of one writer share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::Receiver;
use highwater_model::ObjectId;
use highwater_store::{Listed, ObjectKey, ObjectKind, StoreError, StoreErrorKind};

use crate::claims::Claims;
use crate::compress::Compression;
use crate::error::{RepoError, RepoErrorKind};
use crate::index::{IndexPack, IndexRow, encode};
use crate::objects::Objects;
use crate::pack::{FinishedPack, PackBuilder, PackKind};
use crate::wire::{to_hex, wide};
use crate::writer::WriterStats;

/// Objects after which an index file is written in mid-session: 24 MB of rows.
const SEGMENT_ROWS_MAX: usize = 500_000;

/// One writer's state.
pub(crate) struct Session {
    pub(crate) objects: Arc<Objects>,
    pub(crate) compression: Compression,
    pack_len: usize,
    claims: Claims,
    pending: Mutex<Segment>,
    buffers: Mutex<Vec<Vec<u8>>>,
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
            claims: Claims::new(),
            pending: Mutex::default(),
            buffers: Mutex::default(),
            poison: Mutex::default(),
            is_poisoned: AtomicBool::new(false),
            counts: Counts::default(),
        }
    }

    /// Takes an object on, unless it is stored or somebody else has taken it.
    pub(crate) fn claim(&self, id: ObjectId) -> Result<bool, RepoError> {
        if self.claims.contains(&id) || self.objects.index.find(&id)?.is_some() {
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
        if !self.is_poisoned.load(Ordering::Acquire) {
            return Ok(());
        }
        let poison = self
            .poison
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let kind = poison
            .as_ref()
            .map_or(RepoErrorKind::Store, |cause| cause.kind());
        let error = RepoError::new(kind, "go on after a failed upload");
        Err(match poison {
            Some(cause) => error.because(Shared(cause)),
            None => error,
        })
    }

    pub(crate) fn fail(&self, error: RepoError) {
        self.poison
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert_with(|| Arc::new(error));
        self.is_poisoned.store(true, Ordering::Release);
    }

    /// Starts a pack, in a used buffer if there is one.
    pub(crate) fn start_pack(&self, kind: PackKind) -> PackBuilder {
        let used = self
            .buffers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        let buffer = used.unwrap_or_else(|| vec![0; self.pack_len]);
        PackBuilder::new(kind, self.objects.seal.as_ref(), buffer)
    }

    /// Stores packs until there are no more; the body of an uploading thread.
    pub(crate) fn upload(&self, packs: &Receiver<FinishedPack>) {
        for pack in packs {
            // Takes the rest out of the queue, so that no lane waits for ever.
            if self.is_poisoned.load(Ordering::Acquire) {
                continue;
            }
            if let Err(error) = self.store_pack(pack) {
                self.fail(error);
            }
        }
    }

    fn store_pack(&self, pack: FinishedPack) -> Result<(), RepoError> {
        let bytes = pack.bytes();
        let id: [u8; 32] = blake3::hash(bytes).into();
        let len = wide(bytes.len());
        self.create(ObjectKind::Pack, &id, bytes)?;
        self.counts.packs.fetch_add(1, Ordering::Relaxed);
        let FinishedPack {
            kind,
            buffer,
            records,
            ..
        } = pack;
        self.buffers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(buffer);
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
        let key = self.create(ObjectKind::Index, &name, &bytes)?;
        let len = wide(bytes.len());
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

    fn create(
        &self,
        kind: ObjectKind,
        hash: &[u8; 32],
        bytes: &[u8],
    ) -> Result<ObjectKey, RepoError> {
        let key = ObjectKey::new(kind, to_hex(hash)).expect("hexadecimal is a good name");
        let put = self.objects.store.put(&key, &[bytes]);
        put.or_else(|error| self.accept_existing(&key, bytes, error))
            .map_err(|error| RepoError::store(format!("store `{key}`"), error))?;
        Ok(key)
    }

    /// The name is the hash of the bytes, so that an object of this name and
    /// length is ours.
    fn accept_existing(
        &self,
        key: &ObjectKey,
        bytes: &[u8],
        error: StoreError,
    ) -> Result<(), StoreError> {
        let exists = error.kind() == StoreErrorKind::AlreadyExists
            && self.objects.store.size(key)? == wide(bytes.len());
        if exists { Ok(()) } else { Err(error) }
    }
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
