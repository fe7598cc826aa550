//! What can go wrong with an NBD server, and what is still usable afterwards.

use std::fmt;
use std::io;
use std::time::Duration;

use highwater_model::ByteRange;

/// Why a connection, or a call on it, failed.
///
/// After [`NbdError::Request`] and [`NbdError::Usage`] the connection is as
/// good as before; after any other the connection is at an end and each
/// further call returns [`NbdError::Broken`].
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// There is no connection to that address.
    #[error("cannot connect to the NBD server at {endpoint}")]
    Connect {
        /// The address, as people write it.
        endpoint: String,
        /// What the system said.
        source: io::Error,
    },
    /// The deadline passed.
    #[error("cannot {doing}: the NBD server did not answer within {limit:?}")]
    Timeout {
        /// What was waited for.
        doing: &'static str,
        /// The whole time allowed for it.
        limit: Duration,
    },
    /// The server closed the connection.
    #[error("cannot {doing}: the NBD server closed the connection")]
    HungUp {
        /// What was being done.
        doing: &'static str,
    },
    /// The socket failed.
    #[error("cannot {doing}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A [`Canceller`](crate::Canceller) ended the connection.
    #[error("cannot {doing}: the connection was cancelled")]
    Cancelled {
        /// What was being done.
        doing: &'static str,
    },
    /// The server speaks the oldstyle negotiation, which cannot name exports
    /// or report errors, or newstyle without "fixed".
    #[error(
        "cannot negotiate with the NBD server: it speaks only the {found} negotiation, fixed newstyle is needed"
    )]
    Oldstyle {
        /// What it speaks.
        found: &'static str,
    },
    /// The server wants TLS first.
    #[error("cannot use the NBD server without TLS: it requires TLS{}", told(.message))]
    TlsRequired {
        /// What the server said.
        message: String,
    },
    /// TLS was asked for and the server does not do it.
    #[error("cannot start TLS: the NBD server refused{}", told(.message))]
    TlsRefused {
        /// What the server said.
        message: String,
    },
    /// The TLS handshake failed.
    #[error("cannot start TLS with the NBD server")]
    Tls {
        /// What the TLS implementation said.
        source: io::Error,
    },
    /// The server has no such export.
    #[error("cannot open NBD export `{export}`: the server has no such export{}", told(.message))]
    NoSuchExport {
        /// The name asked for.
        export: String,
        /// What the server said.
        message: String,
    },
    /// The server refused an option of the handshake.
    #[error("cannot negotiate {option} with the NBD server: it answered {reply}{}", told(.message))]
    Refused {
        /// The option by its name in the protocol.
        option: &'static str,
        /// The kind of refusal by its name in the protocol.
        reply: &'static str,
        /// What the server said.
        message: String,
    },
    /// The server did what the protocol forbids.
    #[error("cannot go on with the NBD server: it broke the protocol")]
    Protocol(#[from] ProtocolError),
    /// The server failed one request.
    #[error("cannot {doing} bytes {range:?} of the NBD export")]
    Request {
        /// What was asked for.
        doing: &'static str,
        /// Where.
        range: ByteRange,
        /// What the server said.
        source: RequestError,
    },
    /// The call itself was wrong; nothing was sent.
    #[error("cannot send an NBD request")]
    Usage(#[from] UsageError),
    /// An earlier error ended the connection.
    #[error("cannot use the NBD connection: an earlier error ended it")]
    Broken,
}

fn told(message: &str) -> String {
    if message.is_empty() {
        String::new()
    } else {
        format!(" (it said: {message})")
    }
}

/// What was wrong with a call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UsageError {
    /// The range is empty.
    #[error("the range is empty")]
    Empty,
    /// The range reaches beyond the export.
    #[error("bytes {range:?} reach beyond the export of {size_bytes} bytes")]
    BeyondTheEnd {
        /// What was asked for.
        range: ByteRange,
        /// The export's size.
        size_bytes: u64,
    },
    /// The range is not aligned to the server's minimum block size.
    #[error("bytes {range:?} are not aligned to the server's block size of {block} bytes")]
    Unaligned {
        /// What was asked for.
        range: ByteRange,
        /// The server's minimum block size.
        block: u32,
    },
    /// The request is longer than the server takes.
    #[error("{len} bytes are more than the {max} bytes of one request")]
    TooLong {
        /// Length asked for.
        len: u64,
        /// Longest possible.
        max: u64,
    },
    /// Length of buffer and range differ.
    #[error("the buffer holds {buffer} bytes and the range {range}")]
    WrongLength {
        /// The buffer's length.
        buffer: usize,
        /// The range's length.
        range: u64,
    },
    /// As many requests are in flight as the options allow.
    #[error("{0} requests are in flight already")]
    PipelineFull(usize),
    /// There is nothing to wait for.
    #[error("no request is in flight")]
    NothingInFlight,
    /// The context was not asked for at connect, or the server does not have it.
    #[error("metadata context `{0}` was not negotiated")]
    NoSuchContext(String),
    /// No metadata context was negotiated at all.
    #[error("no metadata context was negotiated")]
    NoContexts,
    /// The server cannot do this, by its transmission flags.
    #[error("the server does not offer {0} on this export")]
    NotOffered(&'static str),
    /// An export name, context name or the number of contexts is too long.
    #[error("{what} is longer than the protocol allows ({len} > {max})")]
    NameTooLong {
        /// Which name.
        what: &'static str,
        /// Its length.
        len: usize,
        /// Longest possible.
        max: usize,
    },
}

/// An error the server reported for one request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the NBD server reported {errno}{}{}", at(.offset.as_ref()), told(.message))]
pub struct RequestError {
    /// The error.
    pub errno: Errno,
    /// What the server said in words; empty if it said nothing.
    pub message: String,
    /// Where in the export, if the server said so.
    pub offset: Option<u64>,
}

fn at(offset: Option<&u64>) -> String {
    offset
        .map(|offset| format!(" at offset {offset}"))
        .unwrap_or_default()
}

/// An error value of the protocol ("Error values").
///
/// QEMU maps nearly every `errno` to [`Errno::Inval`], so that this says that
/// a request failed and seldom why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Errno {
    /// `NBD_EPERM`
    Perm,
    /// `NBD_EIO`
    Io,
    /// `NBD_ENOMEM`
    NoMem,
    /// `NBD_EINVAL`
    Inval,
    /// `NBD_ENOSPC`
    NoSpc,
    /// `NBD_EOVERFLOW`
    Overflow,
    /// `NBD_ENOTSUP`
    NotSup,
    /// `NBD_ESHUTDOWN`
    Shutdown,
    /// A value the protocol does not know, to be treated as `NBD_EINVAL`.
    Other(u32),
}

impl From<u32> for Errno {
    fn from(value: u32) -> Self {
        match value {
            1 => Self::Perm,
            5 => Self::Io,
            12 => Self::NoMem,
            22 => Self::Inval,
            28 => Self::NoSpc,
            75 => Self::Overflow,
            95 => Self::NotSup,
            108 => Self::Shutdown,
            other => Self::Other(other),
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Perm => f.write_str("EPERM (operation not permitted)"),
            Self::Io => f.write_str("EIO (input/output error)"),
            Self::NoMem => f.write_str("ENOMEM (cannot allocate memory)"),
            Self::Inval => f.write_str("EINVAL (invalid argument)"),
            Self::NoSpc => f.write_str("ENOSPC (no space left on device)"),
            Self::Overflow => f.write_str("EOVERFLOW (value too large)"),
            Self::NotSup => f.write_str("ENOTSUP (operation not supported)"),
            Self::Shutdown => f.write_str("ESHUTDOWN (the server is shutting down)"),
            Self::Other(value) => write!(f, "error {value}"),
        }
    }
}

/// What the server did that the protocol forbids, or that exceeds a limit of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// The first bytes are not those of an NBD server.
    #[error("the greeting is not that of an NBD server")]
    NotNbd,
    /// A message begins with a wrong magic number.
    #[error("a {message} begins with {found:#x}")]
    WrongMagic {
        /// Which message.
        message: &'static str,
        /// What it began with.
        found: u64,
    },
    /// A message is shorter than its own fields.
    #[error("a message is shorter than its fields")]
    TooShort,
    /// A length is beyond what is sensible there.
    #[error("{what} of {len} exceeds the limit of {limit}")]
    TooLarge {
        /// What it is the length of.
        what: &'static str,
        /// Length sent.
        len: u64,
        /// Limit.
        limit: u64,
    },
    /// A length is not what its message needs.
    #[error("{what} has a length of {len}")]
    WrongLength {
        /// Which message.
        what: &'static str,
        /// Length sent.
        len: u64,
    },
    /// A reply to another option than the one sent.
    #[error("a reply to option {found} came where one to option {asked} was due")]
    WrongOption {
        /// Option sent.
        asked: u32,
        /// Option replied to.
        found: u32,
    },
    /// A reply type that has no place there.
    #[error("option {option} was answered with reply type {reply:#x}")]
    UnexpectedReply {
        /// Option sent.
        option: u32,
        /// Reply type received.
        reply: u32,
    },
    /// A text is not UTF-8.
    #[error("a name is not UTF-8")]
    NotText,
    /// Bytes came between the end of the plain text and the start of TLS.
    #[error("plain bytes follow the agreement on TLS")]
    BytesBeforeTls,
    /// GO was acknowledged without a description of the export.
    #[error("the export was opened without telling its size")]
    NoExportSize,
    /// The export's size does not fit in 63 bits.
    #[error("the export's size of {0} bytes is beyond 63 bits")]
    AbsurdSize(u64),
    /// The block sizes contradict the protocol.
    #[error("block sizes {minimum}/{preferred}/{maximum} are impossible")]
    BlockSizes {
        /// Minimum block size.
        minimum: u32,
        /// Preferred block size.
        preferred: u32,
        /// Maximum payload.
        maximum: u32,
    },
    /// Two contexts with one id or one name.
    #[error("metadata context id {0} was given twice")]
    ContextTwice(u32),
    /// A reply to a request that is not in flight.
    #[error("a reply came for cookie {0:#x}, which is not in flight")]
    UnknownCookie(u64),
    /// An extended reply names another offset than its request.
    #[error("a reply names offset {found:#x}, its request {asked:#x}")]
    WrongOffset {
        /// Offset of the request.
        asked: u64,
        /// Offset of the reply.
        found: u64,
    },
    /// A chunk of a type that is unknown or does not answer the request.
    #[error("a chunk of type {0:#x} does not answer the request")]
    UnexpectedChunk(u16),
    /// A chunk of type none that is not the last.
    #[error("an empty chunk is not the last of its reply")]
    EmptyChunkNotLast,
    /// An error chunk with error number 0.
    #[error("an error chunk carries error 0")]
    ErrorWithoutError,
    /// A content chunk outside its request.
    #[error("a chunk covers bytes outside its request")]
    OutsideTheRequest,
    /// Two content chunks of one reply overlap.
    #[error("two chunks of one reply overlap at {0:#x}")]
    Overlap(u64),
    /// The reply ended before all of the request was covered.
    #[error("a read of {asked} bytes was answered with {covered}")]
    Gap {
        /// Bytes asked for.
        asked: u64,
        /// Bytes covered.
        covered: u64,
    },
    /// More than one content chunk though "do not fragment" was asked for.
    #[error("a read was fragmented against its flag")]
    Fragmented,
    /// A read's chunks are scattered into more pieces than we keep track of.
    #[error("the chunks of one reply are scattered into more than {0} pieces")]
    TooManyPieces(usize),
    /// A simple reply where only chunks may come.
    #[error("a simple reply came where a chunk was due")]
    SimpleReply,
    /// A status chunk for a context that was not negotiated or asked for.
    #[error("block status came for context id {0}, which was not asked for")]
    UnknownContext(u32),
    /// Block status without one chunk for each context.
    #[error("block status lacks context id {0}")]
    ContextMissing(u32),
    /// Block status without progress.
    #[error("block status made no progress at {0:#x}")]
    NoProgress(u64),
    /// An extent of no bytes.
    #[error("an extent is empty")]
    EmptyExtent,
}
