//! What a caller gets back, and the choices of a request.

use highwater_model::ByteRange;

use crate::error::RequestError;

/// A request that is done, one way or the other.
#[derive(Debug)]
pub struct Completion {
    /// The cookie given with the request.
    pub cookie: u64,
    /// The range of the request.
    pub range: ByteRange,
    /// The bytes of a read; the caller's own buffer back after a write; empty
    /// for other requests. Or why the server failed the request.
    pub result: Result<Vec<u8>, RequestError>,
    /// What each metadata context said, for block status.
    pub extents: Vec<ContextExtents>,
    /// After a failed read or write: the caller's buffer, emptied, for the
    /// next request. What a failed read put there is never shown.
    pub spare: Vec<u8>,
}

/// What one metadata context said about a range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContextExtents {
    /// The context's name.
    pub context: String,
    /// Extents in order, without gaps, from the start of the request. They may
    /// end before or beyond the end of the request, each context elsewhere.
    pub extents: Vec<Extent>,
}

impl ContextExtents {
    /// Returns the offset up to which this context has answered.
    pub fn covered_to(&self) -> Option<u64> {
        self.extents.last().map(|extent| extent.range.end())
    }
}

/// A range with what one metadata context says about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Which bytes; never empty, never beyond the export.
    pub range: ByteRange,
    /// What the context says, see `NBD_STATE_*` in [`wire`](crate::wire).
    pub flags: u64,
}

/// Whether the server may split a read's reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fragments {
    /// It may, and then tells holes apart.
    Allowed,
    /// It must send at most one content chunk (`NBD_CMD_FLAG_DF`).
    Forbidden,
}

/// Whether zeroes may be written by making a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holes {
    /// They may.
    Allowed,
    /// The space must stay allocated (`NBD_CMD_FLAG_NO_HOLE`).
    Forbidden,
}
