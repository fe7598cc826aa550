//! Entry points of the fuzz targets, which tests replay; no part of the interface.
//!
//! Both take any bytes at all. They panic if the crate panics, allocates what
//! nobody sent, or breaks one of the promises checked here.

use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::time::Instant;

use highwater_model::ByteRange;

use crate::wire::{self, HeaderStyle, Step};
use crate::{
    ConnectOptions, Connection, ContextExtents, Fragments, Holes, NbdError, Sent, Transport,
};

/// Feeds the bytes to each decoder.
///
/// A decoder that wants more must want more than there is, and one that is
/// done must not have used more.
pub fn wire(bytes: &[u8]) {
    honest(bytes, &wire::Greeting::decode(bytes));
    honest(bytes, &wire::OptionReplyHeader::decode(bytes));
    for with_zeroes in [false, true] {
        honest(bytes, &wire::ExportReply::decode(bytes, with_zeroes));
    }
    drop(wire::InfoReply::decode(bytes));
    drop(wire::MetaContextReply::decode(bytes));
    drop(wire::ServerReply::decode(bytes));
    for style in [
        HeaderStyle::Simple,
        HeaderStyle::Structured,
        HeaderStyle::Extended,
    ] {
        let header = wire::ReplyHeader::decode(style, bytes);
        honest(bytes, &header);
        if let Ok(Step::Done(
            wire::ReplyHeader::Chunk {
                last, kind, len, ..
            },
            used,
        )) = header
        {
            let payload = bytes.get(used..).unwrap_or_default();
            payload_of(style, kind, last, len, payload);
        }
    }
}

fn honest<T>(bytes: &[u8], step: &Result<Step<T>, crate::ProtocolError>) {
    match step {
        Ok(Step::Need(needed)) => assert!(*needed > bytes.len(), "wants what it has"),
        Ok(Step::Done(_, used)) => assert!(*used <= bytes.len(), "used what is not there"),
        Err(_) => {}
    }
}

fn payload_of(style: HeaderStyle, kind: u16, last: bool, len: u64, payload: &[u8]) {
    let Ok(chunk) = wire::Chunk::classify(style, kind, last, len) else {
        return;
    };
    match chunk {
        wire::Chunk::None => assert_eq!(len, 0),
        wire::Chunk::Data(data) => {
            assert!(data > 0 && data <= wire::PAYLOAD_MAX);
            drop(wire::read_data_offset(payload));
        }
        wire::Chunk::Hole => {
            let hole = wire::HoleChunk::decode(payload);
            assert!(hole.is_err() || hole.is_ok_and(|hole| hole.len > 0));
        }
        wire::Chunk::Status { descriptors, wide } => {
            assert!(u64::from(descriptors) <= wire::STATUS_EXTENTS_MAX);
            drop(wire::StatusHead::decode(payload, descriptors, wide));
            let rest = payload
                .get(wire::StatusHead::len_of(wide)..)
                .unwrap_or_default();
            for bytes in rest.chunks(wire::Descriptor::len_of(wide)) {
                let descriptor = wire::read_descriptor(bytes, wide);
                assert!(descriptor.is_err() || descriptor.is_ok_and(|one| one.len > 0));
            }
        }
        wire::Chunk::Error { kind, len } => {
            assert!(len as u64 <= wire::ERROR_CHUNK_MAX);
            if let Ok(error) = wire::decode_error(kind, payload) {
                assert!(!error.message.chars().any(char::is_control));
            }
        }
    }
}

/// Drives a whole client against the bytes of a peer.
///
/// The first byte chooses options, the second counts the steps that follow,
/// the rest is what the peer sends. The session is played twice, with buffers
/// that held other bytes before: a read that is called good must not show any
/// of them.
pub fn client(bytes: &[u8]) {
    let Some((script, peer)) = Script::split(bytes) else {
        return;
    };
    let played = |leftover: u8| {
        let peer = Peer {
            bytes: peer.to_vec(),
            at: 0,
            impatient: script.impatient(),
            asked: false,
        };
        play(script, Box::new(peer), leftover)
    };
    assert_eq!(
        played(0x00),
        played(0xff),
        "a read shows bytes that no chunk carried"
    );
}

/// What the client does in a fuzzed session.
#[derive(Debug, Clone, Copy)]
pub struct Script<'a> {
    options: u8,
    steps: &'a [u8],
}

impl<'a> Script<'a> {
    /// Returns a script: option bits 1 (extended headers) and 2 (two metadata
    /// contexts), and one byte for each step.
    pub const fn new(options: u8, steps: &'a [u8]) -> Self {
        Self { options, steps }
    }

    /// Returns the input of [`client`] for this script and a peer's bytes.
    pub fn with_peer(self, peer: &[u8]) -> Vec<u8> {
        let count = u8::try_from(self.steps.len().min(63)).unwrap_or(63);
        let steps = self.steps.iter().take(usize::from(count));
        [self.options, count]
            .into_iter()
            .chain(steps.copied())
            .chain(peer.iter().copied())
            .collect()
    }

    fn split(bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let ([options, count], rest) = bytes.split_first_chunk::<2>()?;
        let (steps, peer) = rest.split_at_checked(usize::from(count & 63))?;
        Some((
            Self {
                options: *options,
                steps,
            },
            peer,
        ))
    }

    const fn impatient(self) -> bool {
        self.options & 4 != 0
    }

    fn connect_options(self) -> ConnectOptions {
        let contexts = ["base:allocation", "qemu:allocation-depth"];
        let contexts = if self.options & 2 == 0 {
            &[]
        } else {
            &contexts[..]
        };
        ConnectOptions {
            extended_headers: self.options & 1 != 0,
            meta_contexts: contexts.iter().map(|&name| name.to_owned()).collect(),
            in_flight_max: 4,
            ..ConnectOptions::default()
        }
    }
}

/// Plays a script over a stream and returns what the caller saw, line by line.
/// Read buffers are handed in full of `leftover`.
pub fn play(script: Script<'_>, stream: Box<dyn Transport>, leftover: u8) -> Vec<String> {
    let options = script.connect_options();
    let mut connection = match Connection::over(stream, &options) {
        Ok(connection) => connection,
        Err(error) => return vec![format!("{error:?}")],
    };
    let mut seen = vec![format!("{:?}", connection.export())];
    for (cookie, byte) in (0..).zip(script.steps) {
        let outcome = step(&mut connection, cookie, *byte, leftover);
        seen.push(outcome.unwrap_or_else(|error| format!("{error:?}")));
    }
    while connection.in_flight() > 0 && !connection.is_broken() {
        let outcome = completion(&mut connection);
        seen.push(outcome.unwrap_or_else(|error| format!("{error:?}")));
    }
    seen
}

/// One step: the low three bits say what, the others where.
fn step(
    connection: &mut Connection,
    cookie: u64,
    byte: u8,
    leftover: u8,
) -> Result<String, NbdError> {
    let block = connection.export().block_sizes.minimum.max(4096);
    let start = u64::from(byte >> 3 & 7).saturating_mul(u64::from(block));
    let len = u64::from(byte >> 6)
        .saturating_add(1)
        .saturating_mul(u64::from(block));
    let Some(range) = ByteRange::new(start, len) else {
        return Ok(String::new());
    };
    let len = usize::try_from(len).unwrap_or_default();
    match byte & 7 {
        0 => connection.submit_read(cookie, range, vec![leftover; len])?,
        1 => {
            let (buffer, fragments) = (vec![leftover; len], Fragments::Forbidden);
            connection.submit_read_with(cookie, range, buffer, fragments)?;
        }
        2 => connection.submit_block_status(cookie, range)?,
        3 => return completion(connection),
        4 => connection.submit_write(cookie, range, vec![7; len])?,
        5 => connection.write_zeroes(range, Holes::Allowed)?,
        6 => return map(connection, range),
        _ => {
            let mut buffer = vec![0; len];
            connection.read_at(start, &mut buffer)?;
            return Ok(format!("{buffer:?}"));
        }
    }
    Ok(String::from("sent"))
}

fn completion(connection: &mut Connection) -> Result<String, NbdError> {
    let size_bytes = connection.export().size_bytes;
    let done = connection.next_completion()?;
    assert!(
        done.spare.is_empty(),
        "the bytes of a failed read are shown"
    );
    if let Ok(bytes) = &done.result {
        assert!(bytes.is_empty() || bytes.len() as u64 == done.range.len());
    }
    for context in &done.extents {
        check_extents(context, done.range, size_bytes);
    }
    Ok(format!("{done:?}"))
}

fn check_extents(context: &ContextExtents, asked: ByteRange, size_bytes: u64) {
    let mut at = asked.start();
    for extent in &context.extents {
        assert_eq!(extent.range.start(), at, "extents have gaps");
        assert!(!extent.range.is_empty() && extent.range.end() <= size_bytes);
        at = extent.range.end();
    }
    assert!(at > asked.start(), "a context answered nothing");
}

fn map(connection: &mut Connection, range: ByteRange) -> Result<String, NbdError> {
    let mut at = range.start();
    let mut seen = String::new();
    connection.map::<NbdError>("base:allocation", range, &mut |part, flags| {
        assert_eq!(part.start(), at, "a map has gaps");
        at = part.end();
        write!(seen, "{part:?}={flags} ").map_err(|_| NbdError::Broken)
    })?;
    assert_eq!(at, range.end(), "a map is not whole");
    Ok(seen)
}

/// A peer that has said everything beforehand.
struct Peer {
    bytes: Vec<u8>,
    at: usize,
    /// Makes the client read before each thing it sends.
    impatient: bool,
    asked: bool,
}

impl Read for Peer {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let len = rest.len().min(buffer.len());
        let (Some(target), Some(source)) = (buffer.get_mut(..len), rest.get(..len)) else {
            return Ok(0);
        };
        target.copy_from_slice(source);
        self.at = self.at.saturating_add(len);
        Ok(len)
    }
}

impl Write for Peer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Transport for Peer {
    fn set_deadline(&mut self, _: Instant) {}

    fn send(&mut self, bytes: &[u8]) -> io::Result<Sent> {
        self.asked = !self.asked;
        if self.impatient && self.asked && self.at < self.bytes.len() {
            return Ok(Sent::ReplyWaiting);
        }
        Ok(Sent::Bytes(bytes.len()))
    }
}
