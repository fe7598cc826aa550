//! A peer that says what a test tells it to, right or wrong.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use highwater_nbd::wire::{
    HeaderStyle, NBD_EXTENDED_REPLY_MAGIC, NBD_IHAVEOPT, NBD_INFO_EXPORT, NBD_MAGIC,
    NBD_OPT_EXTENDED_HEADERS, NBD_OPT_GO, NBD_OPT_SET_META_CONTEXT, NBD_OPT_STRUCTURED_REPLY,
    NBD_OPTION_REPLY_MAGIC, NBD_REP_ACK, NBD_REP_ERR_UNSUP, NBD_REP_INFO, NBD_REP_META_CONTEXT,
    NBD_SIMPLE_REPLY_MAGIC, NBD_STRUCTURED_REPLY_MAGIC,
};
use highwater_nbd::{ConnectOptions, Connection, NbdError, Transport};

/// The size of the scripted export.
pub(crate) const SIZE: u64 = 1 << 20;

/// What the peer will say, in order.
#[derive(Debug, Clone, Default)]
pub(crate) struct Speech(pub(crate) Vec<u8>);

impl Speech {
    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn greeting(self, flags: u16) -> Self {
        self.bytes(&NBD_MAGIC.to_be_bytes())
            .bytes(&NBD_IHAVEOPT.to_be_bytes())
            .bytes(&flags.to_be_bytes())
    }

    pub(crate) fn reply(self, option: u32, reply: u32, data: &[u8]) -> Self {
        self.bytes(&NBD_OPTION_REPLY_MAGIC.to_be_bytes())
            .bytes(&option.to_be_bytes())
            .bytes(&reply.to_be_bytes())
            .bytes(&u32::try_from(data.len()).unwrap().to_be_bytes())
            .bytes(data)
    }

    pub(crate) fn context(self, id: u32, name: &str) -> Self {
        let data = [&id.to_be_bytes(), name.as_bytes()].concat();
        self.reply(NBD_OPT_SET_META_CONTEXT, NBD_REP_META_CONTEXT, &data)
    }

    pub(crate) fn info(self, info: &[u8]) -> Self {
        self.reply(NBD_OPT_GO, NBD_REP_INFO, info)
    }

    pub(crate) fn export(self, size_bytes: u64, flags: u16) -> Self {
        let kind = NBD_INFO_EXPORT.to_be_bytes();
        self.info(&[&kind[..], &size_bytes.to_be_bytes(), &flags.to_be_bytes()].concat())
    }

    /// A whole handshake, up to the transmission phase.
    pub(crate) fn handshake(style: HeaderStyle, flags: u16, contexts: &[(u32, &str)]) -> Self {
        let mut speech = Self::default().greeting(3);
        speech = match style {
            HeaderStyle::Simple => speech.reply(NBD_OPT_STRUCTURED_REPLY, NBD_REP_ERR_UNSUP, b""),
            HeaderStyle::Structured => speech.reply(NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK, b""),
            HeaderStyle::Extended => speech.reply(NBD_OPT_EXTENDED_HEADERS, NBD_REP_ACK, b""),
        };
        for (id, name) in contexts {
            speech = speech.context(*id, name);
        }
        if !contexts.is_empty() {
            speech = speech.reply(NBD_OPT_SET_META_CONTEXT, NBD_REP_ACK, b"");
        }
        speech
            .export(SIZE, flags)
            .reply(NBD_OPT_GO, NBD_REP_ACK, b"")
    }

    pub(crate) fn simple(self, cookie: u64, error: u32, data: &[u8]) -> Self {
        self.bytes(&NBD_SIMPLE_REPLY_MAGIC.to_be_bytes())
            .bytes(&error.to_be_bytes())
            .bytes(&cookie.to_be_bytes())
            .bytes(data)
    }

    /// The head of a structured chunk that announces `len` bytes.
    pub(crate) fn head(self, last: bool, kind: u16, cookie: u64, len: u32) -> Self {
        self.bytes(&NBD_STRUCTURED_REPLY_MAGIC.to_be_bytes())
            .bytes(&u16::from(last).to_be_bytes())
            .bytes(&kind.to_be_bytes())
            .bytes(&cookie.to_be_bytes())
            .bytes(&len.to_be_bytes())
    }

    pub(crate) fn chunk(self, last: bool, kind: u16, cookie: u64, payload: &[u8]) -> Self {
        let len = u32::try_from(payload.len()).unwrap();
        self.head(last, kind, cookie, len).bytes(payload)
    }

    pub(crate) fn extended(
        self,
        last: bool,
        kind: u16,
        cookie: u64,
        offset: u64,
        payload: &[u8],
    ) -> Self {
        self.bytes(&NBD_EXTENDED_REPLY_MAGIC.to_be_bytes())
            .bytes(&u16::from(last).to_be_bytes())
            .bytes(&kind.to_be_bytes())
            .bytes(&cookie.to_be_bytes())
            .bytes(&offset.to_be_bytes())
            .bytes(&(payload.len() as u64).to_be_bytes())
            .bytes(payload)
    }

    pub(crate) fn data(self, last: bool, cookie: u64, offset: u64, bytes: &[u8]) -> Self {
        self.chunk(last, 1, cookie, &[&offset.to_be_bytes(), bytes].concat())
    }

    pub(crate) fn hole(self, last: bool, cookie: u64, offset: u64, len: u32) -> Self {
        let payload = [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat();
        self.chunk(last, 2, cookie, &payload)
    }

    pub(crate) fn none(self, cookie: u64) -> Self {
        self.chunk(true, 0, cookie, b"")
    }

    pub(crate) fn status(self, last: bool, cookie: u64, id: u32, extents: &[(u32, u32)]) -> Self {
        let mut payload = id.to_be_bytes().to_vec();
        for (len, flags) in extents {
            payload.extend_from_slice(&len.to_be_bytes());
            payload.extend_from_slice(&flags.to_be_bytes());
        }
        self.chunk(last, 5, cookie, &payload)
    }

    pub(crate) fn error(self, last: bool, cookie: u64, error: u32, message: &str) -> Self {
        self.chunk(last, 0x8001, cookie, &error_payload(error, message))
    }

    /// Opens a connection to this peer; also returns what the client will say.
    pub(crate) fn connect(
        self,
        options: &ConnectOptions,
    ) -> (Result<Connection, NbdError>, Arc<Mutex<Vec<u8>>>) {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let peer = Peer {
            speech: self.0,
            at: 0,
            heard: Arc::clone(&heard),
        };
        (Connection::over(Box::new(peer), options), heard)
    }
}

pub(crate) fn error_payload(error: u32, message: &str) -> Vec<u8> {
    let len = u16::try_from(message.len()).unwrap();
    [
        &error.to_be_bytes()[..],
        &len.to_be_bytes(),
        message.as_bytes(),
    ]
    .concat()
}

/// A stream that gives the speech away and then ends.
struct Peer {
    speech: Vec<u8>,
    at: usize,
    heard: Arc<Mutex<Vec<u8>>>,
}

impl Read for Peer {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // At most 1000 bytes at a time, so that messages arrive in pieces.
        let len = (self.speech.len() - self.at).min(buffer.len()).min(1000);
        buffer[..len].copy_from_slice(&self.speech[self.at..self.at + len]);
        self.at += len;
        Ok(len)
    }
}

impl Write for Peer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.heard.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Transport for Peer {
    fn set_deadline(&mut self, _: Instant) {}
}
