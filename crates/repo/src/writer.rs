//! Writing: from chunks to the restore point.

mod lane;
mod open_pack;
mod session;
mod shelf;
mod tree;

use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use crossbeam_channel::Sender;

use highwater_model::{ChunkSize, ObjectId};

use crate::compress::{Codec, Compression};
use crate::error::{RepoError, RepoErrorKind};
use crate::manifest::{ImageRoot, Manifest};
use crate::objects::Objects;
use crate::pack::{HEADER_LEN, PackKind, record_len_max};
use crate::page::PAGE_LEN_MAX;
use crate::points;
use crate::wire::narrow;

pub use lane::{Added, Lane};
pub use tree::TreeBuilder;

use open_pack::{FinishedPack, OpenPack};
use session::Session;

/// How to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriterOptions {
    /// How chunks are compressed; pages never are, hashes do not compress.
    pub compression: Compression,
    /// Length of a pack, 1 MiB to 1 GiB.
    pub pack_bytes: u64,
    /// Threads that make complete packs durable. They wait more than they work:
    /// for a disk, or for an answer.
    pub upload_threads: usize,
}

impl Default for WriterOptions {
    fn default() -> Self {
        Self {
            compression: Compression::default(),
            pack_bytes: 32 << 20,
            upload_threads: 3,
        }
    }
}

const PACK_BYTES_MIN: u64 = 1 << 20;
const PACK_BYTES_MAX: u64 = 1 << 30;

/// What a writer has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriterStats {
    /// Bytes of new chunks as stored.
    pub stored_bytes_chunks: u64,
    /// Bytes of new tree pages as stored.
    pub stored_bytes_pages: u64,
    /// Bytes of index files.
    pub stored_bytes_index: u64,
    /// Packs stored.
    pub packs: u64,
    /// Chunks that were new.
    pub new_chunks: u64,
    /// Chunks that were known.
    pub known_chunks: u64,
}

/// Writes into a repository. Used by many threads at once, each with its own
/// [`Lane`] or [`TreeBuilder`].
///
/// In memory are the ids of half a million objects and of each open pack some
/// hundred KiB, or the whole of six packs if the store takes whole objects only;
/// nothing of it follows the number of lanes. The first failed write fails
/// everything after it: a session that lost a pack cannot be committed.
pub struct Writer {
    pub(crate) session: Arc<Session>,
    uploads: Sender<FinishedPack>,
    threads: Vec<JoinHandle<()>>,
    /// Pages go into one pack at a time: there are few.
    pages: Mutex<()>,
}

impl Writer {
    pub(crate) fn new(objects: Arc<Objects>, options: &WriterOptions) -> Result<Self, RepoError> {
        let what = "start writing";
        let longest = record_len_max(objects.config.chunk_size.len().max(PAGE_LEN_MAX));
        let pack_len = narrow(options.pack_bytes.clamp(PACK_BYTES_MIN, PACK_BYTES_MAX))
            .map_err(|flaw| RepoError::usage(what, flaw.to_string()))?
            .max(longest.saturating_add(HEADER_LEN));
        let session = Arc::new(Session::new(objects, options.compression, pack_len));
        let threads = options.upload_threads.max(1);
        // The shelves bound how many packs there are.
        let (uploads, packs) = crossbeam_channel::unbounded();
        let upload = |_| {
            let (session, packs) = (Arc::clone(&session), packs.clone());
            thread::Builder::new()
                .name("upload".to_owned())
                .spawn(move || session.upload(&packs))
        };
        let threads = (0..threads)
            .map(upload)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| RepoError::new(RepoErrorKind::Usage, what).because(error))?;
        let writer = Self {
            session,
            uploads,
            threads,
            pages: Mutex::default(),
        };
        // A wrong level is refused now, not at the first chunk.
        drop(Lane::new(&writer)?);
        Ok(writer)
    }

    /// Returns the repository's chunk size.
    pub fn chunk_size(&self) -> ChunkSize {
        self.session.objects.config.chunk_size
    }

    /// Opens a way for one worker thread.
    pub fn lane(&self) -> Lane<'_> {
        Lane::new(self).expect("the compression was tried when the writer was made")
    }

    /// From now on nothing counts as stored because the index shows it: for
    /// whoever has found damage, and would else build upon it. Readers find the
    /// new copy where the old one is damaged.
    pub fn disbelieve_stored(&self) {
        self.session.disbelieve_stored();
    }

    /// Starts the tree of an image of `size_bytes`, on top of the parent's.
    ///
    /// Chunks that are not visited keep the parent's content, or are zero
    /// without one; bytes beyond the parent's size are zero. A parent larger
    /// than the image or with another chunk size is refused.
    pub fn tree(
        &self,
        parent: Option<&ImageRoot>,
        size_bytes: u64,
    ) -> Result<TreeBuilder<'_>, RepoError> {
        TreeBuilder::new(self, parent, size_bytes)
    }

    /// Stores `size` bytes as an image.
    pub fn add_bytes(&self, bytes: &mut dyn Read, size: u64) -> Result<ImageRoot, RepoError> {
        let what = "store a file";
        let failed = |error| RepoError::new(RepoErrorKind::Input, what).because(error);
        let chunk_size = self.session.objects.config.chunk_size;
        let mut tree = self.tree(None, size)?;
        let mut lane = self.lane();
        let mut buffer = vec![0; chunk_size.len()];
        let mut rest = size;
        for index in 0..chunk_size.count(size) {
            let len = narrow(rest.min(chunk_size.bytes())).unwrap_or_default();
            let chunk = buffer.get_mut(..len).unwrap_or_default();
            bytes.read_exact(chunk).map_err(failed)?;
            tree.set(index, lane.add(chunk)?.id)?;
            rest = rest.saturating_sub(chunk_size.bytes());
        }
        if bytes.read(&mut [0]).map_err(failed)? != 0 {
            let why = format!("it has more than {size} bytes");
            return Err(RepoError::new(RepoErrorKind::Input, what).because(why));
        }
        tree.finish()
    }

    /// Returns what has been done so far.
    pub fn stats(&self) -> WriterStats {
        self.session.counts.read()
    }

    /// Makes all packs durable, then the index that shows them. Nothing refers
    /// to them yet.
    pub fn flush(self) -> Result<Flushed, RepoError> {
        for kind in [PackKind::Chunks, PackKind::Pages] {
            let open = self.session.shelf(kind).clear();
            open.into_iter().try_for_each(|open| self.send(open))?;
        }
        let session = Arc::clone(&self.session);
        // Waits for the uploads.
        drop(self);
        session.check()?;
        // After all packs: an index never shows a pack that a crash could take
        // away.
        session.store_rest_of_index()?;
        Ok(Flushed { session })
    }

    /// Adds an object that this session has claimed, compressed as `text`, to an
    /// open pack; returns its stored length. Waits while all packs are in use.
    pub(crate) fn append(
        &self,
        kind: PackKind,
        id: ObjectId,
        plain_len: usize,
        codec: Codec,
        text: &[u8],
    ) -> Result<u64, RepoError> {
        let session = &self.session;
        let appended = || -> Result<u64, RepoError> {
            let mut open = session.open_pack(kind)?;
            while !open.has_room_for(text.len(), session.pack_len) {
                self.send(open)?;
                open = session.open_pack(kind)?;
            }
            let stored = open
                .append(id, plain_len, codec, text)
                .map_err(|error| RepoError::store("write a pack", error))?;
            session.shelf(kind).put_back(open);
            Ok(stored)
        };
        match appended() {
            Ok(stored) => {
                session.counts.stored(kind, stored);
                Ok(stored)
            }
            // The object is claimed and nowhere stored.
            Err(error) => Err(session.fail(error)),
        }
    }

    /// Closes a pack and gives it to the uploading threads.
    fn send(&self, open: OpenPack) -> Result<(), RepoError> {
        self.session.check()?;
        if open.is_empty() {
            return Ok(());
        }
        let pack = open
            .finish()
            .map_err(|error| RepoError::store("write a pack", error))?;
        self.uploads.send(pack).map_err(|_| {
            RepoError::new(RepoErrorKind::Store, "store a pack").because("no thread uploads")
        })
    }

    /// Stores a tree page unless it is known; `bytes` is its encoding.
    pub(crate) fn add_page(&self, bytes: &[u8]) -> Result<ObjectId, RepoError> {
        self.session.check()?;
        let id = self.session.objects.ids.page_id(bytes);
        if self.session.claim(id)? {
            let _turn = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
            self.append(PackKind::Pages, id, bytes.len(), Codec::Raw, bytes)?;
        }
        Ok(id)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Closes the queue, so that the threads come to their end.
        let (closed, _) = crossbeam_channel::bounded(0);
        drop(std::mem::replace(&mut self.uploads, closed));
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                let error = RepoError::new(RepoErrorKind::Store, "store a pack");
                drop(
                    self.session
                        .fail(error.because("an uploading thread panicked")),
                );
            }
        }
    }
}

/// A session whose packs and index are durable; only the manifest is missing.
pub struct Flushed {
    session: Arc<Session>,
}

impl Flushed {
    /// Returns what the session has stored.
    pub fn stats(&self) -> WriterStats {
        self.session.counts.read()
    }

    /// Creates the restore point: one atomic create of its manifest.
    ///
    /// [`RepoErrorKind::CommitUnknown`] means that the point may or may not
    /// exist; any other error that it does not. The manifest is not read back:
    /// the store's promise is durability when `put` returns, and a read would
    /// come from the same caches and prove nothing about the disk.
    pub fn commit(self, manifest: &Manifest) -> Result<(), RepoError> {
        points::commit(&self.session.objects, manifest)
    }
}
