//! The plain calls: send one request, wait for it.
//!
//! They may be mixed with requests in flight: completions of others that
//! arrive meanwhile wait for [`Connection::next_completion`].

use highwater_model::ByteRange;

use super::{Connection, ContextExtents, Contexts, Holes};
use crate::error::{NbdError, ProtocolError, UsageError};

/// Longest piece of a plain read or write: large enough for full speed, small
/// enough not to hold 32 MiB twice.
const PIECE_MAX: u64 = 4 << 20;
/// Longest piece of an effect without payload; QEMU refuses 2 GiB and more.
const EFFECT_PIECE_MAX: u64 = 1 << 30;

/// What a request that succeeded brought.
struct Answer {
    bytes: Vec<u8>,
    extents: Vec<ContextExtents>,
}

impl Connection {
    /// Fills `buffer` from `offset`, in as many requests as that takes.
    ///
    /// On an error the buffer's content means nothing.
    pub fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), NbdError> {
        let mut spare = Vec::new();
        let mut rest = buffer;
        for piece in self.pieces(whole(offset, rest.len())?, self.payload_piece()) {
            self.submit_read(0, piece, std::mem::take(&mut spare))?;
            spare = self.wait_for_last("read", piece)?.bytes;
            let (head, tail) = rest.split_at_mut(spare.len().min(rest.len()));
            head.copy_from_slice(spare.get(..head.len()).unwrap_or_default());
            rest = tail;
        }
        Ok(())
    }

    /// Writes `bytes` at `offset`, in as many requests as that takes.
    pub fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), NbdError> {
        let mut spare = Vec::new();
        let mut rest = bytes;
        for piece in self.pieces(whole(offset, bytes.len())?, self.payload_piece()) {
            let len = usize::try_from(piece.len())
                .unwrap_or(usize::MAX)
                .min(rest.len());
            let (head, tail) = rest.split_at_checked(len).unwrap_or_default();
            spare.clear();
            spare.extend_from_slice(head);
            self.submit_write(0, piece, std::mem::take(&mut spare))?;
            spare = self.wait_for_last("write", piece)?.bytes;
            rest = tail;
        }
        Ok(())
    }

    /// Writes zeroes to `range`, in as many requests as that takes.
    pub fn write_zeroes(&mut self, range: ByteRange, holes: Holes) -> Result<(), NbdError> {
        for piece in self.pieces(range, EFFECT_PIECE_MAX) {
            self.submit_write_zeroes(0, piece, holes)?;
            self.wait_for_last("write zeroes to", piece)?;
        }
        Ok(())
    }

    /// Gives up the content of `range`, in as many requests as that takes.
    pub fn trim(&mut self, range: ByteRange) -> Result<(), NbdError> {
        for piece in self.pieces(range, EFFECT_PIECE_MAX) {
            self.submit_trim(0, piece)?;
            self.wait_for_last("trim", piece)?;
        }
        Ok(())
    }

    /// Makes all writes completed so far durable.
    pub fn flush(&mut self) -> Result<(), NbdError> {
        self.submit_flush(0)?;
        let nowhere = ByteRange::new(0, 0).ok_or(UsageError::Empty)?;
        self.wait_for_last("flush", nowhere).map(drop)
    }

    /// Asks once what each metadata context says about `range`.
    ///
    /// Each context answers for as much as it likes, at least one extent: see
    /// [`Connection::map`] for the whole range.
    pub fn block_status(&mut self, range: ByteRange) -> Result<Vec<ContextExtents>, NbdError> {
        self.submit_block_status(0, range)?;
        self.wait_for_last("ask for the block status of", range)
            .map(|done| done.extents)
    }

    /// Gives `sink` what one context says about all of `range`: in order,
    /// without gaps, cut to the range.
    ///
    /// Asks again from where *this* context's answer ended until it has
    /// answered for the whole range; what other contexts covered meanwhile
    /// does not count.
    pub fn map<E: From<NbdError>>(
        &mut self,
        context: &str,
        range: ByteRange,
        sink: &mut dyn FnMut(ByteRange, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut at = range.start();
        while at < range.end() {
            let answer = self.ask_context(context, at, range.end())?;
            let before = at;
            for extent in answer.extents {
                let todo = ByteRange::between(at, range.end());
                let Some(part) = todo.and_then(|todo| extent.range.intersection(todo)) else {
                    continue;
                };
                sink(part, extent.flags)?;
                at = part.end();
            }
            if at == before {
                return Err(self.die(ProtocolError::NoProgress(at)).into());
            }
        }
        Ok(())
    }

    /// Asks one context about `from .. to` or the first part of it.
    fn ask_context(
        &mut self,
        context: &str,
        from: u64,
        to: u64,
    ) -> Result<ContextExtents, NbdError> {
        let Some(id) = self.export.context(context).map(|context| context.id) else {
            return Err(UsageError::NoSuchContext(context.to_owned()).into());
        };
        // A server may stop anywhere, we may ask only at block boundaries.
        let block = u64::from(self.export.block_sizes.minimum);
        let odd = from.checked_rem(block).unwrap_or_default();
        let start = from.saturating_sub(odd);
        let end = to
            .checked_next_multiple_of(block)
            .unwrap_or(to)
            .min(self.export.size_bytes.max(to));
        let end = end.min(start.saturating_add(self.longest_effect()));
        let ask = ByteRange::between(start, end).ok_or(UsageError::Empty)?;
        self.submit_status(0, ask, Contexts::One(id))?;
        let done = self.wait_for_last("ask for the block status of", ask)?;
        let answer = done
            .extents
            .into_iter()
            .find(|extents| extents.context == context);
        answer.ok_or_else(|| self.die(ProtocolError::ContextMissing(id)))
    }

    fn payload_piece(&self) -> u64 {
        u64::from(self.export.block_sizes.maximum).min(PIECE_MAX)
    }

    /// Cuts a range into requests.
    fn pieces(&self, range: ByteRange, max: u64) -> impl Iterator<Item = ByteRange> + use<> {
        let block = u64::from(self.export.block_sizes.minimum);
        let odd = max.checked_rem(block).unwrap_or_default();
        let max = max.saturating_sub(odd).max(1);
        let mut at = range.start();
        std::iter::from_fn(move || {
            let piece = ByteRange::between(at, range.end().min(at.saturating_add(max)))?;
            at = piece.end();
            (!piece.is_empty()).then_some(piece)
        })
    }

    /// Waits for the request sent last, leaving others for `next_completion`.
    fn wait_for_last(&mut self, doing: &'static str, range: ByteRange) -> Result<Answer, NbdError> {
        let handle = self.next_handle.wrapping_sub(1);
        self.channel
            .begin("wait for a reply of the NBD server", self.reply_timeout);
        loop {
            let done = self.ready.iter().position(|(ready, _)| *ready == handle);
            if let Some((_, done)) = done.and_then(|index| self.ready.remove(index)) {
                let done = self.hand_over(done);
                return match done.result {
                    Ok(bytes) => Ok(Answer {
                        bytes,
                        extents: done.extents,
                    }),
                    Err(source) => Err(NbdError::Request {
                        doing,
                        range,
                        source,
                    }),
                };
            }
            self.receive()?;
        }
    }

    fn die(&mut self, error: ProtocolError) -> NbdError {
        self.broken = true;
        error.into()
    }
}

fn whole(offset: u64, len: usize) -> Result<ByteRange, UsageError> {
    ByteRange::new(offset, len as u64).ok_or(UsageError::Empty)
}
