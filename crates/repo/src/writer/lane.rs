//! The way of one worker's chunks into packs.

use highwater_model::ObjectId;

use crate::compress::Compressor;
use crate::error::RepoError;
use crate::pack::PackKind;
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

/// One worker's way into the repository: hashes and compresses in the caller's
/// thread, and puts the outcome into whichever open pack is free.
pub struct Lane<'a> {
    writer: &'a Writer,
    compressor: Compressor,
}

impl<'a> Lane<'a> {
    pub(crate) fn new(writer: &'a Writer) -> Result<Self, RepoError> {
        let compressor = Compressor::new(writer.session.compression)
            .map_err(|flaw| RepoError::usage("compress", flaw.to_string()))?;
        Ok(Self { writer, compressor })
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
        let (codec, text) = self.compressor.compress(chunk);
        let kind = PackKind::Chunks;
        let stored_bytes = self.writer.append(kind, id, chunk.len(), codec, text)?;
        Ok(Added {
            id: Some(id),
            stored_bytes,
        })
    }
}
