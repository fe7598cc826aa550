//! One stream with its input buffer, its deadline, and words for its failures.

use std::io::{self, IoSliceMut};
use std::time::Duration;

use crate::error::{NbdError, ProtocolError};
use crate::transport::{Canceller, Endpoint, Sent, TlsUpgrade, Transport, after};
use crate::wire::Step;

/// Holds the largest message that is taken in one piece (an option reply of
/// 16 KiB) and lets the small ones arrive in batches.
const INPUT_BYTES: usize = 32 << 10;

/// A transport, read through a fixed buffer.
pub(crate) struct Channel {
    stream: Box<dyn Transport>,
    canceller: Canceller,
    input: Box<[u8]>,
    /// `input[start..end]` has arrived and is not used yet.
    start: usize,
    end: usize,
    doing: &'static str,
    limit: Duration,
}

impl Channel {
    pub(crate) fn new(stream: Box<dyn Transport>, canceller: Canceller) -> Self {
        let input = vec![0; INPUT_BYTES].into_boxed_slice();
        Self {
            stream,
            canceller,
            input,
            start: 0,
            end: 0,
            doing: "",
            limit: Duration::ZERO,
        }
    }

    pub(crate) fn canceller(&self) -> Canceller {
        self.canceller.clone()
    }

    /// Begins a piece of work that may take `limit` in all.
    pub(crate) fn begin(&mut self, doing: &'static str, limit: Duration) {
        self.doing = doing;
        self.limit = limit;
        self.stream.set_deadline(after(limit));
    }

    /// Hands the stream to a TLS implementation.
    ///
    /// Bytes that arrived before TLS was up may come from anybody on the way
    /// and must not be taken for protected ones ("TLS support").
    pub(crate) fn upgrade(
        self,
        tls: &dyn TlsUpgrade,
        endpoint: Option<&Endpoint>,
    ) -> Result<Self, NbdError> {
        if self.start != self.end {
            return Err(ProtocolError::BytesBeforeTls.into());
        }
        let mut stream = tls
            .upgrade(self.stream, endpoint)
            .map_err(|source| NbdError::Tls { source })?;
        stream.set_deadline(after(self.limit));
        Ok(Self { stream, ..self })
    }

    /// Takes one message, waiting for as many bytes as its decoder needs.
    pub(crate) fn message<T>(
        &mut self,
        decode: impl Fn(&[u8]) -> Result<Step<T>, ProtocolError>,
    ) -> Result<T, NbdError> {
        loop {
            let arrived = self.input.get(self.start..self.end).unwrap_or_default();
            match decode(arrived)? {
                Step::Need(needed) => self.fill(needed)?,
                Step::Done(message, used) => {
                    self.consume(used);
                    return Ok(message);
                }
            }
        }
    }

    /// Takes `len` bytes and gives them to `read`; `len` must fit the buffer.
    pub(crate) fn payload<T>(
        &mut self,
        len: usize,
        read: impl FnOnce(&[u8]) -> Result<T, ProtocolError>,
    ) -> Result<T, NbdError> {
        self.fill(len)?;
        let end = self.start.saturating_add(len);
        let value = read(self.input.get(self.start..end).unwrap_or_default())?;
        self.consume(len);
        Ok(value)
    }

    /// Takes `len` bytes and forgets them.
    pub(crate) fn skip(&mut self, len: u64) -> Result<(), NbdError> {
        let mut left = len;
        while left > 0 {
            let piece = usize::try_from(left)
                .unwrap_or(usize::MAX)
                .min(self.input.len());
            self.payload(piece, |_| Ok(()))?;
            left = left.saturating_sub(piece as u64);
        }
        Ok(())
    }

    /// Fills `target`, which may be larger than the buffer, without copying
    /// what has not arrived yet.
    pub(crate) fn read_into(&mut self, target: &mut [u8]) -> Result<(), NbdError> {
        let arrived = self.input.get(self.start..self.end).unwrap_or_default();
        let buffered = arrived.len().min(target.len());
        let (head, mut rest) = target.split_at_mut(buffered);
        head.copy_from_slice(arrived.get(..buffered).unwrap_or_default());
        self.consume(buffered);
        while !rest.is_empty() {
            // The buffer is empty now: what arrives behind the target in the
            // same system call is the next reply's head.
            let wanted = rest.len();
            let mut parts = [IoSliceMut::new(rest), IoSliceMut::new(&mut self.input)];
            let read = self.stream.read_vectored(&mut parts);
            let read = self.or_failure(read)?;
            (self.start, self.end) = (0, read.saturating_sub(wanted));
            (_, rest) = rest.split_at_mut(read.min(wanted));
        }
        Ok(())
    }

    /// Sends some bytes, see [`Transport::send`].
    pub(crate) fn send(&mut self, bytes: &[u8]) -> Result<Sent, NbdError> {
        match self.stream.send(bytes) {
            Ok(Sent::Bytes(0)) => self.or_failure(Ok(0)).map(Sent::Bytes),
            Ok(sent) => Ok(sent),
            Err(error) => Err(self.failure(error)),
        }
    }

    /// Sends all bytes while no reply is due, as during the handshake.
    pub(crate) fn send_all(&mut self, mut bytes: &[u8]) -> Result<(), NbdError> {
        while !bytes.is_empty() {
            let sent = self.stream.write(bytes);
            let sent = self.or_failure(sent)?;
            bytes = bytes.get(sent..).unwrap_or_default();
        }
        Ok(())
    }

    /// Waits until `needed` bytes lie in the buffer.
    fn fill(&mut self, needed: usize) -> Result<(), NbdError> {
        assert!(
            needed <= self.input.len(),
            "decoders limit what they ask for"
        );
        if self.start.saturating_add(needed) > self.input.len() {
            self.input.copy_within(self.start..self.end, 0);
            self.end = self.end.saturating_sub(self.start);
            self.start = 0;
        }
        while self.end.saturating_sub(self.start) < needed {
            let free = self.input.get_mut(self.end..).unwrap_or_default();
            let read = self.stream.read(free);
            let read = self.or_failure(read)?;
            self.end = self.end.saturating_add(read);
        }
        Ok(())
    }

    fn consume(&mut self, used: usize) {
        self.start = self.start.saturating_add(used).min(self.end);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Turns "no bytes" and system errors into our words.
    fn or_failure(&self, moved: io::Result<usize>) -> Result<usize, NbdError> {
        match moved {
            Ok(0) => Err(self.failure(io::ErrorKind::UnexpectedEof.into())),
            Ok(moved) => Ok(moved),
            Err(error) => Err(self.failure(error)),
        }
    }

    fn failure(&self, source: io::Error) -> NbdError {
        let doing = self.doing;
        if self.canceller.is_cancelled() {
            return NbdError::Cancelled { doing };
        }
        match source.kind() {
            io::ErrorKind::TimedOut => NbdError::Timeout {
                doing,
                limit: self.limit,
            },
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe => NbdError::HungUp { doing },
            _ => NbdError::Io { doing, source },
        }
    }
}
