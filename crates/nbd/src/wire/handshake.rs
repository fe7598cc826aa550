//! Messages of the handshake ("Handshake phase").

use super::fields::{Fields, displayable, name};
use super::{
    NBD_CLISERV_MAGIC, NBD_FLAG_C_FIXED_NEWSTYLE, NBD_FLAG_C_NO_ZEROES, NBD_FLAG_NO_ZEROES,
    NBD_IHAVEOPT, NBD_INFO_BLOCK_SIZE, NBD_INFO_DESCRIPTION, NBD_INFO_EXPORT, NBD_INFO_NAME,
    NBD_MAGIC, NBD_OPTION_REPLY_MAGIC, OPTION_REPLY_MAX, Step,
};
use crate::error::ProtocolError;

/// The first message of a server ("Newstyle negotiation", "Oldstyle negotiation").
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Greeting {
    /// Newstyle, with its handshake flags.
    Newstyle {
        /// `NBD_FLAG_FIXED_NEWSTYLE`, `NBD_FLAG_NO_ZEROES`.
        flags: u16,
    },
    /// Oldstyle; what follows does not matter, as we do not speak it.
    Oldstyle,
}

impl Greeting {
    /// Decodes the greeting.
    pub fn decode(bytes: &[u8]) -> Result<Step<Self>, ProtocolError> {
        // The first eight bytes alone tell that this is no NBD server: waiting
        // for sixteen would turn "wrong port" into a timeout.
        if bytes.len() < 8 {
            return Ok(Step::Need(8));
        }
        let mut fields = Fields::of(bytes);
        if fields.u64()? != NBD_MAGIC {
            return Err(ProtocolError::NotNbd);
        }
        if bytes.len() < 16 {
            return Ok(Step::Need(16));
        }
        match fields.u64()? {
            NBD_IHAVEOPT if bytes.len() < 18 => Ok(Step::Need(18)),
            NBD_IHAVEOPT => Ok(Step::Done(
                Self::Newstyle {
                    flags: fields.u16()?,
                },
                18,
            )),
            NBD_CLISERV_MAGIC => Ok(Step::Done(Self::Oldstyle, 16)),
            _ => Err(ProtocolError::NotNbd),
        }
    }
}

/// Encodes the client's flags: fixed newstyle, and no zeroes if the server knows them.
pub fn encode_client_flags(server_flags: u16, out: &mut Vec<u8>) {
    let mut flags = NBD_FLAG_C_FIXED_NEWSTYLE;
    if server_flags & NBD_FLAG_NO_ZEROES != 0 {
        flags |= NBD_FLAG_C_NO_ZEROES;
    }
    out.extend_from_slice(&flags.to_be_bytes());
}

/// Encodes an option and its data.
pub fn encode_option(option: u32, data: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&NBD_IHAVEOPT.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&length(data.len()).to_be_bytes());
    out.extend_from_slice(data);
}

/// Encodes the data of `NBD_OPT_GO` and `NBD_OPT_INFO`.
pub fn encode_go(export: &str, wanted: &[u16], out: &mut Vec<u8>) {
    encode_string(export, out);
    let count = u16::try_from(wanted.len()).unwrap_or(u16::MAX);
    out.extend_from_slice(&count.to_be_bytes());
    for kind in wanted.iter().take(usize::from(count)) {
        out.extend_from_slice(&kind.to_be_bytes());
    }
}

/// Encodes the data of `NBD_OPT_SET_META_CONTEXT` and `NBD_OPT_LIST_META_CONTEXT`.
pub fn encode_meta_context(export: &str, queries: &[String], out: &mut Vec<u8>) {
    encode_string(export, out);
    out.extend_from_slice(&length(queries.len()).to_be_bytes());
    for query in queries {
        encode_string(query, out);
    }
}

fn encode_string(text: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(&length(text.len()).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// Names are limited to 4096 bytes and their number to a few dozen where the
/// options are checked, so this never saturates.
fn length(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// The head of a reply to an option ("Fixed newstyle negotiation").
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option it replies to.
    pub option: u32,
    /// `NBD_REP_*`.
    pub reply: u32,
    /// Length of the data that follows, at most [`OPTION_REPLY_MAX`].
    pub len: usize,
}

impl OptionReplyHeader {
    /// Decodes the head.
    pub fn decode(bytes: &[u8]) -> Result<Step<Self>, ProtocolError> {
        if bytes.len() < 20 {
            return Ok(Step::Need(20));
        }
        let mut fields = Fields::of(bytes);
        let magic = fields.u64()?;
        if magic != NBD_OPTION_REPLY_MAGIC {
            return Err(ProtocolError::WrongMagic {
                message: "reply to an option",
                found: magic,
            });
        }
        let (option, reply, len) = (fields.u32()?, fields.u32()?, fields.u32()?);
        if len > OPTION_REPLY_MAX {
            return Err(ProtocolError::TooLarge {
                what: "a reply to an option",
                len: u64::from(len),
                limit: u64::from(OPTION_REPLY_MAX),
            });
        }
        Ok(Step::Done(
            Self {
                option,
                reply,
                len: len as usize,
            },
            20,
        ))
    }
}

/// One fact about an export (`NBD_REP_INFO`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InfoReply {
    /// `NBD_INFO_EXPORT`
    Export(ExportReply),
    /// `NBD_INFO_NAME`
    Name(String),
    /// `NBD_INFO_DESCRIPTION`, for people
    Description(String),
    /// `NBD_INFO_BLOCK_SIZE`: minimum, preferred, maximum
    BlockSize(u32, u32, u32),
    /// A type we do not know and must ignore.
    Unknown(u16),
}

impl InfoReply {
    /// Decodes the data of the reply.
    pub fn decode(data: &[u8]) -> Result<Self, ProtocolError> {
        let mut fields = Fields::of(data);
        let kind = fields.u16()?;
        let wrong = |what| ProtocolError::WrongLength {
            what,
            len: data.len() as u64,
        };
        match kind {
            NBD_INFO_EXPORT if data.len() != 12 => Err(wrong("NBD_INFO_EXPORT")),
            NBD_INFO_EXPORT => {
                let (size_bytes, flags) = (fields.u64()?, fields.u16()?);
                Ok(Self::Export(ExportReply { size_bytes, flags }))
            }
            NBD_INFO_NAME => Ok(Self::Name(name(fields.rest(), "an export's name")?)),
            NBD_INFO_DESCRIPTION => Ok(Self::Description(displayable(fields.rest()))),
            NBD_INFO_BLOCK_SIZE if data.len() != 14 => Err(wrong("NBD_INFO_BLOCK_SIZE")),
            NBD_INFO_BLOCK_SIZE => Ok(Self::BlockSize(fields.u32()?, fields.u32()?, fields.u32()?)),
            other => Ok(Self::Unknown(other)),
        }
    }
}

/// Size and flags of an export, from `NBD_INFO_EXPORT` or `NBD_OPT_EXPORT_NAME`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportReply {
    /// Size in bytes.
    pub size_bytes: u64,
    /// Transmission flags.
    pub flags: u16,
}

impl ExportReply {
    /// Decodes the answer to `NBD_OPT_EXPORT_NAME`, which has no head.
    pub fn decode(bytes: &[u8], with_zeroes: bool) -> Result<Step<Self>, ProtocolError> {
        let needed = if with_zeroes { 134 } else { 10 };
        if bytes.len() < needed {
            return Ok(Step::Need(needed));
        }
        let mut fields = Fields::of(bytes);
        let (size_bytes, flags) = (fields.u64()?, fields.u16()?);
        Ok(Step::Done(Self { size_bytes, flags }, needed))
    }
}

/// One metadata context (`NBD_REP_META_CONTEXT`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaContextReply {
    /// Its id on this connection.
    pub id: u32,
    /// Its name.
    pub name: String,
}

impl MetaContextReply {
    /// Decodes the data of the reply.
    pub fn decode(data: &[u8]) -> Result<Self, ProtocolError> {
        let mut fields = Fields::of(data);
        let id = fields.u32()?;
        Ok(Self {
            id,
            name: name(fields.rest(), "a metadata context's name")?,
        })
    }
}

/// One export of a list (`NBD_REP_SERVER`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerReply {
    /// Its name.
    pub name: String,
    /// Its description for people; empty if there is none.
    pub description: String,
}

impl ServerReply {
    /// Decodes the data of the reply.
    pub fn decode(data: &[u8]) -> Result<Self, ProtocolError> {
        let mut fields = Fields::of(data);
        let len = fields.u32()? as usize;
        let name = name(fields.bytes(len)?, "an export's name")?;
        Ok(Self {
            name,
            description: displayable(fields.rest()),
        })
    }
}
