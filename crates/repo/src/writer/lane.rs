//! The way of one worker's chunks into packs.

use std::sync::PoisonError;

use highwater_model::ObjectId;

use crate::compress::{Compression, Compressor};
use crate::error::RepoError;
use crate::pack::{PackBuilder, PackKind};
use crate::wire::is_zero;
use crate::writer::Writer;

/// What became of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Added {
    /// Its id for the tree; `None` if it is all zero, which is never stored.
    pub id: Option<ObjectId>,
    /// Bytes this added to the repository; 0 if it was known.
    pub stored_bytes: u64,
}

/// One worker's way into the repository: hashes, compresses and seals in the
/// caller's thread, into a pack of its own.
pub struct Lane<'a> {
    writer: &'a Writer,
    packs: PackLane,
}

impl<'a> Lane<'a> {
    pub(crate) fn new(writer: &'a Writer, open: Option<PackBuilder>) -> Result<Self, RepoError> {
        let packs = PackLane::new(PackKind::Chunks, writer.session.compression, open)?;
        Ok(Self { writer, packs })
    }

    /// Stores a chunk unless it is all zero or known. It is durable when
    /// [`Writer::flush`] has returned, not before.
    pub fn add(&mut self, chunk: &[u8]) -> Result<Added, RepoError> {
        let session = &self.writer.session;
        session.check()?;
        if chunk.is_empty() || chunk.len() > session.objects.config.chunk_size.len() {
            let why = format!("it has {} bytes", chunk.len());
            return Err(RepoError::usage("store a chunk", why));
        }
        if is_zero(chunk) {
            return Ok(Added {
                id: None,
                stored_bytes: 0,
            });
        }
        let id = session.objects.ids.chunk_id(chunk);
        if !session.claim(id)? {
            session.counts.known();
            return Ok(Added {
                id: Some(id),
                stored_bytes: 0,
            });
        }
        let stored_bytes = self.packs.append(self.writer, id, chunk)?;
        Ok(Added {
            id: Some(id),
            stored_bytes,
        })
    }
}

impl Drop for Lane<'_> {
    fn drop(&mut self) {
        // A half-full pack waits for the next lane, or for the flush.
        if let Some(open) = self.packs.open.take() {
            self.writer
                .parked
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(open);
        }
    }
}

/// A row of packs of one kind, filled one after the other.
pub(crate) struct PackLane {
    kind: PackKind,
    compressor: Compressor,
    open: Option<PackBuilder>,
}

impl PackLane {
    pub(crate) fn new(
        kind: PackKind,
        compression: Compression,
        open: Option<PackBuilder>,
    ) -> Result<Self, RepoError> {
        let compressor = Compressor::new(compression)
            .map_err(|flaw| RepoError::usage("compress", flaw.to_string()))?;
        Ok(Self {
            kind,
            compressor,
            open,
        })
    }

    /// Adds an object that this session has claimed.
    pub(crate) fn append(
        &mut self,
        writer: &Writer,
        id: ObjectId,
        plain: &[u8],
    ) -> Result<u64, RepoError> {
        let session = &writer.session;
        if let Some(full) = self.open.take_if(|open| !open.has_room_for(plain.len())) {
            writer.send(full)?;
        }
        let open = self
            .open
            .get_or_insert_with(|| session.start_pack(self.kind));
        let stored = open.append(id, plain, &mut self.compressor);
        session.counts.stored(self.kind, stored);
        Ok(stored)
    }

    pub(crate) fn take(&mut self) -> Option<PackBuilder> {
        self.open.take()
    }
}
