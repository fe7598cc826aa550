//! The bytes of the protocol: encoding and decoding without any I/O.
//!
//! Decoders take what has arrived so far and answer with [`Step::Need`] until
//! there is enough. Each length the peer names is held against a limit here,
//! before anybody allocates or waits for it. Nothing here panics on any input.

mod constants;
mod fields;
mod handshake;
mod transmission;

pub use constants::*;
pub use handshake::{
    ExportReply, Greeting, InfoReply, MetaContextReply, OptionReplyHeader, ServerReply,
    encode_client_flags, encode_go, encode_meta_context, encode_option,
};
pub use transmission::{
    Chunk, Command, Descriptor, HeaderStyle, HoleChunk, ReplyHeader, Request, StatusHead,
    decode_error, read_data_offset, read_descriptor,
};

pub(crate) use fields::displayable;

/// How far a decoder came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step<T> {
    /// This many bytes, counted from the start, are needed before it can go on.
    Need(usize),
    /// The value, and how many bytes it took.
    Done(T, usize),
}
