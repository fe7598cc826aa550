//! Messages of the transmission phase ("Transmission").

use super::fields::{Fields, displayable};
use super::{
    ERROR_CHUNK_MAX, NBD_EXTENDED_REPLY_MAGIC, NBD_EXTENDED_REQUEST_MAGIC, NBD_MAX_STRING,
    NBD_REPLY_FLAG_DONE, NBD_REPLY_FLAG_ERROR, NBD_REPLY_TYPE_BLOCK_STATUS,
    NBD_REPLY_TYPE_BLOCK_STATUS_EXT, NBD_REPLY_TYPE_ERROR_OFFSET, NBD_REPLY_TYPE_NONE,
    NBD_REPLY_TYPE_OFFSET_DATA, NBD_REPLY_TYPE_OFFSET_HOLE, NBD_REQUEST_MAGIC,
    NBD_SIMPLE_REPLY_MAGIC, NBD_STRUCTURED_REPLY_MAGIC, PAYLOAD_MAX, STATUS_EXTENTS_MAX, Step,
};
use crate::error::{Errno, ProtocolError, RequestError};

/// Which headers both sides agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeaderStyle {
    /// Simple replies only; no metadata.
    Simple,
    /// Structured replies ("Structured reply chunk message").
    Structured,
    /// Extended headers ("Extended reply chunk message").
    Extended,
}

/// What is asked of the server ("Request types").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// `NBD_CMD_READ`
    Read = 0,
    /// `NBD_CMD_WRITE`
    Write = 1,
    /// `NBD_CMD_DISC`
    Disconnect = 2,
    /// `NBD_CMD_FLUSH`
    Flush = 3,
    /// `NBD_CMD_TRIM`
    Trim = 4,
    /// `NBD_CMD_WRITE_ZEROES`
    WriteZeroes = 6,
    /// `NBD_CMD_BLOCK_STATUS`
    BlockStatus = 7,
}

/// One request ("Request message").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// `NBD_CMD_FLAG_*`.
    pub flags: u16,
    /// What to do.
    pub command: Command,
    /// Comes back with the reply.
    pub cookie: u64,
    /// Where in the export.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
}

impl Request {
    /// Encodes the request; `None` if its length does not fit into a compact header.
    pub fn encode(&self, style: HeaderStyle, out: &mut Vec<u8>) -> Option<()> {
        let magic = match style {
            HeaderStyle::Simple | HeaderStyle::Structured => NBD_REQUEST_MAGIC,
            HeaderStyle::Extended => NBD_EXTENDED_REQUEST_MAGIC,
        };
        let short = u32::try_from(self.len).ok();
        if style != HeaderStyle::Extended && short.is_none() {
            return None;
        }
        out.extend_from_slice(&magic.to_be_bytes());
        out.extend_from_slice(&self.flags.to_be_bytes());
        out.extend_from_slice(&(self.command as u16).to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        out.extend_from_slice(&self.offset.to_be_bytes());
        match (style, short) {
            (HeaderStyle::Simple | HeaderStyle::Structured, Some(len)) => {
                out.extend_from_slice(&len.to_be_bytes());
            }
            _ => out.extend_from_slice(&self.len.to_be_bytes()),
        }
        Some(())
    }
}

/// The head of a reply or of a chunk of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHeader {
    /// "Simple reply message"
    Simple {
        /// The request's cookie.
        cookie: u64,
        /// 0 or an error value.
        error: u32,
    },
    /// "Structured reply chunk message", "Extended reply chunk message"
    Chunk {
        /// The request's cookie.
        cookie: u64,
        /// Whether this is the last chunk of the reply.
        last: bool,
        /// `NBD_REPLY_TYPE_*`.
        kind: u16,
        /// The request's offset; extended headers only.
        offset: Option<u64>,
        /// Length of the payload that follows.
        len: u64,
    },
}

impl ReplyHeader {
    /// Decodes the head of a reply under the agreed style.
    pub fn decode(style: HeaderStyle, bytes: &[u8]) -> Result<Step<Self>, ProtocolError> {
        if bytes.len() < 16 {
            return Ok(Step::Need(16));
        }
        let mut fields = Fields::of(bytes);
        let magic = fields.u32()?;
        match (style, magic) {
            (HeaderStyle::Simple | HeaderStyle::Structured, NBD_SIMPLE_REPLY_MAGIC) => {
                let (error, cookie) = (fields.u32()?, fields.u64()?);
                Ok(Step::Done(Self::Simple { cookie, error }, 16))
            }
            (HeaderStyle::Structured, NBD_STRUCTURED_REPLY_MAGIC) => {
                if bytes.len() < 20 {
                    return Ok(Step::Need(20));
                }
                let (flags, kind, cookie) = (fields.u16()?, fields.u16()?, fields.u64()?);
                let len = u64::from(fields.u32()?);
                let last = flags & NBD_REPLY_FLAG_DONE != 0;
                Ok(Step::Done(
                    Self::Chunk {
                        cookie,
                        last,
                        kind,
                        offset: None,
                        len,
                    },
                    20,
                ))
            }
            (HeaderStyle::Extended, NBD_EXTENDED_REPLY_MAGIC) => {
                if bytes.len() < 32 {
                    return Ok(Step::Need(32));
                }
                let (flags, kind, cookie) = (fields.u16()?, fields.u16()?, fields.u64()?);
                let (offset, len) = (Some(fields.u64()?), fields.u64()?);
                let last = flags & NBD_REPLY_FLAG_DONE != 0;
                Ok(Step::Done(
                    Self::Chunk {
                        cookie,
                        last,
                        kind,
                        offset,
                        len,
                    },
                    32,
                ))
            }
            (_, found) => Err(ProtocolError::WrongMagic {
                message: "reply",
                found: u64::from(found),
            }),
        }
    }
}

/// What a chunk is, its lengths checked, before its payload is read
/// ("Structured reply types").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chunk {
    /// `NBD_REPLY_TYPE_NONE`
    None,
    /// `NBD_REPLY_TYPE_OFFSET_DATA`: an offset of 8 bytes, then this many bytes.
    Data(u32),
    /// `NBD_REPLY_TYPE_OFFSET_HOLE`: 12 bytes.
    Hole,
    /// `NBD_REPLY_TYPE_BLOCK_STATUS[_EXT]`: a head, then descriptors.
    Status {
        /// How many descriptors follow.
        descriptors: u32,
        /// Whether they are 64 bits wide.
        wide: bool,
    },
    /// Any error chunk.
    Error {
        /// `NBD_REPLY_TYPE_*`.
        kind: u16,
        /// Length of the payload, at most [`ERROR_CHUNK_MAX`].
        len: usize,
    },
}

impl Chunk {
    /// Classifies a chunk by its head, refusing what the protocol forbids.
    pub fn classify(
        style: HeaderStyle,
        kind: u16,
        last: bool,
        len: u64,
    ) -> Result<Self, ProtocolError> {
        match kind {
            NBD_REPLY_TYPE_NONE if len != 0 => wrong("NBD_REPLY_TYPE_NONE", len),
            NBD_REPLY_TYPE_NONE if !last => Err(ProtocolError::EmptyChunkNotLast),
            NBD_REPLY_TYPE_NONE => Ok(Self::None),
            NBD_REPLY_TYPE_OFFSET_DATA => Self::data(len),
            NBD_REPLY_TYPE_OFFSET_HOLE if len != 12 => wrong("NBD_REPLY_TYPE_OFFSET_HOLE", len),
            NBD_REPLY_TYPE_OFFSET_HOLE => Ok(Self::Hole),
            NBD_REPLY_TYPE_BLOCK_STATUS if style == HeaderStyle::Structured => {
                Self::status(len, 4, 8)
            }
            NBD_REPLY_TYPE_BLOCK_STATUS_EXT if style == HeaderStyle::Extended => {
                Self::status(len, 8, 16)
            }
            kind if kind & NBD_REPLY_FLAG_ERROR != 0 => Self::error(kind, len),
            kind => Err(ProtocolError::UnexpectedChunk(kind)),
        }
    }

    fn data(len: u64) -> Result<Self, ProtocolError> {
        let what = "NBD_REPLY_TYPE_OFFSET_DATA";
        let Some(data_len) = len.checked_sub(8).filter(|data_len| *data_len > 0) else {
            return wrong(what, len);
        };
        match u32::try_from(data_len) {
            Ok(data_len) if data_len <= PAYLOAD_MAX => Ok(Self::Data(data_len)),
            _ => Err(ProtocolError::TooLarge {
                what,
                len,
                limit: u64::from(PAYLOAD_MAX),
            }),
        }
    }

    fn status(len: u64, head: u64, descriptor: u64) -> Result<Self, ProtocolError> {
        let what = "NBD_REPLY_TYPE_BLOCK_STATUS";
        let body = len
            .checked_sub(head)
            .filter(|body| body.checked_rem(descriptor) == Some(0));
        let count = body.and_then(|body| body.checked_div(descriptor));
        let Some(count) = count.filter(|count| *count > 0) else {
            return wrong(what, len);
        };
        match u32::try_from(count) {
            Ok(descriptors) if count <= STATUS_EXTENTS_MAX => Ok(Self::Status {
                descriptors,
                wide: descriptor == 16,
            }),
            _ => Err(ProtocolError::TooLarge {
                what,
                len: count,
                limit: STATUS_EXTENTS_MAX,
            }),
        }
    }

    fn error(kind: u16, len: u64) -> Result<Self, ProtocolError> {
        if len > ERROR_CHUNK_MAX {
            let what = "an error chunk";
            return Err(ProtocolError::TooLarge {
                what,
                len,
                limit: ERROR_CHUNK_MAX,
            });
        }
        let len = usize::try_from(len).map_err(|_| ProtocolError::TooShort)?;
        Ok(Self::Error { kind, len })
    }
}

fn wrong<T>(what: &'static str, len: u64) -> Result<T, ProtocolError> {
    Err(ProtocolError::WrongLength { what, len })
}

/// Reads the offset at the start of a data chunk.
pub fn read_data_offset(payload: &[u8]) -> Result<u64, ProtocolError> {
    Fields::of(payload).u64()
}

/// The payload of a hole chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HoleChunk {
    /// Where in the export.
    pub offset: u64,
    /// How many zeroes.
    pub len: u32,
}

impl HoleChunk {
    /// Length of the payload.
    pub const LEN: usize = 12;

    /// Decodes the payload.
    pub fn decode(payload: &[u8]) -> Result<Self, ProtocolError> {
        let mut fields = Fields::of(payload);
        let (offset, len) = (fields.u64()?, fields.u32()?);
        if len == 0 {
            return wrong("a hole", 0);
        }
        Ok(Self { offset, len })
    }
}

/// The head of a status chunk's payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusHead {
    /// The metadata context's id.
    pub context: u32,
}

impl StatusHead {
    /// Returns the length of the head.
    pub const fn len_of(wide: bool) -> usize {
        if wide { 8 } else { 4 }
    }

    /// Decodes the head; a wide one repeats the number of descriptors, which must agree.
    pub fn decode(payload: &[u8], descriptors: u32, wide: bool) -> Result<Self, ProtocolError> {
        let mut fields = Fields::of(payload);
        let context = fields.u32()?;
        if wide {
            let repeated = fields.u32()?;
            if repeated != descriptors {
                return wrong("NBD_REPLY_TYPE_BLOCK_STATUS_EXT", u64::from(repeated));
            }
        }
        Ok(Self { context })
    }
}

/// One extent of a status chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// Length, never 0.
    pub len: u64,
    /// What the context says about it.
    pub flags: u64,
}

impl Descriptor {
    /// Returns the length of one descriptor on the wire.
    pub const fn len_of(wide: bool) -> usize {
        if wide { 16 } else { 8 }
    }
}

/// Reads one descriptor from the start of `payload`.
pub fn read_descriptor(payload: &[u8], wide: bool) -> Result<Descriptor, ProtocolError> {
    let mut fields = Fields::of(payload);
    let (len, flags) = if wide {
        (fields.u64()?, fields.u64()?)
    } else {
        (u64::from(fields.u32()?), u64::from(fields.u32()?))
    };
    if len == 0 {
        return Err(ProtocolError::EmptyExtent);
    }
    Ok(Descriptor { len, flags })
}

/// Decodes the payload of an error chunk of type `kind`.
///
/// An error type to come has at least the fields of `NBD_REPLY_TYPE_ERROR`.
pub fn decode_error(kind: u16, payload: &[u8]) -> Result<RequestError, ProtocolError> {
    let mut fields = Fields::of(payload);
    let error = fields.u32()?;
    if error == 0 {
        return Err(ProtocolError::ErrorWithoutError);
    }
    let len = usize::from(fields.u16()?);
    if len > NBD_MAX_STRING {
        let (len, limit) = (len as u64, NBD_MAX_STRING as u64);
        return Err(ProtocolError::TooLarge {
            what: "an error message",
            len,
            limit,
        });
    }
    let message = displayable(fields.bytes(len)?);
    let has_offset = kind == NBD_REPLY_TYPE_ERROR_OFFSET;
    let offset = if has_offset {
        Some(fields.u64()?)
    } else {
        None
    };
    Ok(RequestError {
        errno: Errno::from(error),
        message,
        offset,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_encoded_as_the_protocol_shows_them() {
        let request = Request {
            flags: 0x0102,
            command: Command::BlockStatus,
            cookie: 0x1112_1314_1516_1718,
            offset: 0x2122_2324_2526_2728,
            len: 0x3132_3334,
        };
        let mut compact = Vec::new();
        request
            .encode(HeaderStyle::Structured, &mut compact)
            .unwrap();
        let fields = b"\x01\x02\x00\x07\x11\x12\x13\x14\x15\x16\x17\x18!\"#$%&'(";
        assert_eq!(
            compact,
            [&b"\x25\x60\x95\x13"[..], fields, b"1234"].concat()
        );
        let mut extended = Vec::new();
        request
            .encode(HeaderStyle::Extended, &mut extended)
            .unwrap();
        assert_eq!(
            extended,
            [&b"\x21\xe4\x1c\x71"[..], fields, b"\0\0\0\x001234"].concat()
        );
        let long = Request {
            len: 1 << 32,
            ..request
        };
        assert!(long.encode(HeaderStyle::Structured, &mut compact).is_none());
        assert!(long.encode(HeaderStyle::Extended, &mut extended).is_some());
    }

    #[test]
    fn a_reply_header_cut_off_anywhere_asks_for_more() {
        let structured = b"\x66\x8e\x33\xef\0\x01\0\x05\0\0\0\0\0\0\0\x09\0\0\0\x0c";
        for len in 0..structured.len() {
            let step = ReplyHeader::decode(HeaderStyle::Structured, &structured[..len]);
            assert!(
                matches!(step, Ok(Step::Need(needed)) if needed > len),
                "{len} bytes"
            );
        }
        let header = ReplyHeader::Chunk {
            cookie: 9,
            last: true,
            kind: 5,
            offset: None,
            len: 12,
        };
        let step = ReplyHeader::decode(HeaderStyle::Structured, structured);
        assert_eq!(step, Ok(Step::Done(header, 20)));
    }
}
