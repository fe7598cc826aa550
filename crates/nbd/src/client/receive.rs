//! Taking in one reply, or one chunk of one.

use highwater_model::ByteRange;

use super::pending::{Pending, Straggler, Work};
use super::{Connection, Extent};
use crate::channel::Channel;
use crate::error::{Errno, NbdError, ProtocolError, RequestError};
use crate::wire::{
    Chunk, Descriptor, HeaderStyle, HoleChunk, ReplyHeader, StatusHead, decode_error,
    read_data_offset, read_descriptor,
};

/// Most extents held at a time over all block status requests in flight:
/// 48 MiB. QEMU sends at most 131072 per context.
pub(super) const EXTENTS_HELD_MAX: usize = 1 << 21;
/// Most failed block status requests whose stragglers are put up with.
const STRAGGLERS_MAX: usize = 64;
/// Descriptors taken from the stream at a time.
const DESCRIPTORS_AT_ONCE: u32 = 1024;

impl Connection {
    /// Takes in one reply or chunk; on an error the connection is at an end.
    pub(super) fn receive(&mut self) -> Result<(), NbdError> {
        let received = self.receive_one();
        self.broken |= received.is_err();
        received
    }

    fn receive_one(&mut self) -> Result<(), NbdError> {
        let style = self.export.header_style;
        let header = self
            .channel
            .message(|bytes| ReplyHeader::decode(style, bytes))?;
        let (ReplyHeader::Simple { cookie, .. } | ReplyHeader::Chunk { cookie, .. }) = header;
        let known = self
            .pending
            .iter()
            .position(|pending| pending.handle == cookie);
        let Some(index) = known else {
            return self.take_straggler(header);
        };
        let pending = self
            .pending
            .get_mut(index)
            .ok_or(ProtocolError::UnknownCookie(cookie))?;
        let last = match header {
            ReplyHeader::Simple { error, .. } => {
                take_simple(&mut self.channel, pending, style, error)?;
                true
            }
            ReplyHeader::Chunk {
                last,
                kind,
                offset,
                len,
                ..
            } => {
                let asked = pending.range.start();
                if let Some(found) = offset.filter(|found| *found != asked) {
                    return Err(ProtocolError::WrongOffset { asked, found }.into());
                }
                let chunk = Chunk::classify(style, kind, last, len)?;
                let held = &mut self.extents_held;
                take_chunk(
                    &mut self.channel,
                    pending,
                    chunk,
                    self.export.size_bytes,
                    held,
                )?;
                last
            }
        };
        if last {
            let pending = self.pending.swap_remove(index);
            if let (Work::Status(status), Some(_)) = (&pending.work, &pending.error) {
                self.extents_held = self.extents_held.saturating_sub(status.len());
                self.stragglers.push_back(Straggler {
                    handle: cookie,
                    left: status.asked(),
                });
                if self.stragglers.len() > STRAGGLERS_MAX {
                    self.stragglers.pop_front();
                }
            }
            let done = pending.finish(&self.export.contexts)?;
            self.ready.push_back((cookie, done));
        }
        Ok(())
    }

    /// Takes in what QEMU says after it has failed a block status request.
    ///
    /// With several contexts it ends its reply with the error of one (flag
    /// `NBD_REPLY_FLAG_DONE`) and then goes on to the next context as if nothing
    /// had been (seen with 10.0.2). The request has failed already, so what
    /// the others say is checked and forgotten; nothing else may come late.
    fn take_straggler(&mut self, header: ReplyHeader) -> Result<(), NbdError> {
        let (ReplyHeader::Simple { cookie, .. } | ReplyHeader::Chunk { cookie, .. }) = header;
        let unknown = ProtocolError::UnknownCookie(cookie);
        let ReplyHeader::Chunk {
            last, kind, len, ..
        } = header
        else {
            return Err(unknown.into());
        };
        let straggler = self
            .stragglers
            .iter_mut()
            .find(|straggler| straggler.handle == cookie);
        let Some(left) = straggler.filter(|straggler| straggler.left > 0) else {
            return Err(unknown.into());
        };
        left.left = left.left.saturating_sub(1);
        match Chunk::classify(self.export.header_style, kind, last, len)? {
            Chunk::Status { .. } | Chunk::Error { .. } => self.channel.skip(len),
            Chunk::None | Chunk::Data(_) | Chunk::Hole => Err(unknown.into()),
        }
    }
}

/// "Simple reply message". Where structured replies were agreed on it may not
/// answer a read or block status, except that a refusal is believed anyway: it
/// carries no data that could be wrong.
fn take_simple(
    channel: &mut Channel,
    pending: &mut Pending,
    style: HeaderStyle,
    error: u32,
) -> Result<(), NbdError> {
    if error != 0 {
        let errno = Errno::from(error);
        pending.fail(RequestError {
            errno,
            message: String::new(),
            offset: None,
        });
        return Ok(());
    }
    match &mut pending.work {
        Work::Read { buffer, assembly } if style == HeaderStyle::Simple => {
            let place = assembly.claim(pending.range.start(), pending.range.len())?;
            channel.read_into(
                buffer
                    .get_mut(place)
                    .ok_or(ProtocolError::OutsideTheRequest)?,
            )
        }
        Work::Read { .. } | Work::Status(_) => Err(ProtocolError::SimpleReply.into()),
        Work::Write { .. } | Work::Effect => Ok(()),
    }
}

/// Takes in the payload of a chunk.
fn take_chunk(
    channel: &mut Channel,
    pending: &mut Pending,
    chunk: Chunk,
    size_bytes: u64,
    extents_held: &mut usize,
) -> Result<(), NbdError> {
    match (chunk, &mut pending.work) {
        (Chunk::None, _) => Ok(()),
        (Chunk::Error { kind, len }, _) => {
            let error = channel.payload(len, |payload| decode_error(kind, payload))?;
            let outside = |at: &u64| *at < pending.range.start() || *at >= pending.range.end();
            if error.offset.as_ref().is_some_and(outside) {
                return Err(ProtocolError::OutsideTheRequest.into());
            }
            pending.fail(error);
            Ok(())
        }
        (Chunk::Data(len), Work::Read { buffer, assembly }) => {
            let offset = channel.payload(8, read_data_offset)?;
            let place = assembly.claim(offset, u64::from(len))?;
            channel.read_into(
                buffer
                    .get_mut(place)
                    .ok_or(ProtocolError::OutsideTheRequest)?,
            )
        }
        (Chunk::Hole, Work::Read { buffer, assembly }) => {
            let hole = channel.payload(HoleChunk::LEN, HoleChunk::decode)?;
            let place = assembly.claim(hole.offset, u64::from(hole.len))?;
            let place = buffer
                .get_mut(place)
                .ok_or(ProtocolError::OutsideTheRequest)?;
            // The buffer is the caller's and holds whatever the read before left.
            place.fill(0);
            Ok(())
        }
        (Chunk::Status { descriptors, wide }, Work::Status(_)) => take_status(
            channel,
            pending,
            descriptors,
            wide,
            size_bytes,
            extents_held,
        ),
        (Chunk::Data(_), _) => Err(ProtocolError::UnexpectedChunk(1).into()),
        (Chunk::Hole, _) => Err(ProtocolError::UnexpectedChunk(2).into()),
        (Chunk::Status { .. }, _) => Err(ProtocolError::UnexpectedChunk(5).into()),
    }
}

/// Takes in the extents of one context, a kilobyte at a time: what is
/// allocated follows what has arrived, not what was announced.
fn take_status(
    channel: &mut Channel,
    pending: &mut Pending,
    descriptors: u32,
    wide: bool,
    size_bytes: u64,
    extents_held: &mut usize,
) -> Result<(), NbdError> {
    let Work::Status(status) = &mut pending.work else {
        return Err(ProtocolError::UnexpectedChunk(5).into());
    };
    let head = channel.payload(StatusHead::len_of(wide), |payload| {
        StatusHead::decode(payload, descriptors, wide)
    })?;
    let kept = status.begin(head.context)?;
    let size = Descriptor::len_of(wide);
    let (mut at, mut left) = (pending.range.start(), descriptors);
    while left > 0 {
        let batch = left.min(DESCRIPTORS_AT_ONCE);
        let bytes = size.saturating_mul(batch as usize);
        channel.payload(bytes, |payload| {
            for descriptor in payload.chunks_exact(size) {
                let Descriptor { len, flags } = read_descriptor(descriptor, wide)?;
                let range = ByteRange::new(at, len).ok_or(ProtocolError::OutsideTheRequest)?;
                at = range.end();
                if kept {
                    push_clipped(status, range, flags, size_bytes, extents_held)?;
                }
            }
            Ok(())
        })?;
        left = left.saturating_sub(batch);
    }
    Ok(())
}

/// Adds an extent, cut at the end of the export, within the limit of all.
fn push_clipped(
    status: &mut super::pending::Status,
    range: ByteRange,
    flags: u64,
    size_bytes: u64,
    extents_held: &mut usize,
) -> Result<(), ProtocolError> {
    // Servers that count in clusters may reach beyond the end.
    let Some(range) = ByteRange::between(range.start(), range.end().min(size_bytes)) else {
        return Ok(());
    };
    if range.is_empty() {
        return Ok(());
    }
    if *extents_held >= EXTENTS_HELD_MAX {
        let (len, limit) = (*extents_held as u64, EXTENTS_HELD_MAX as u64);
        return Err(ProtocolError::TooLarge {
            what: "the number of extents",
            len,
            limit,
        });
    }
    *extents_held = extents_held.saturating_add(1);
    status.push(Extent { range, flags });
    Ok(())
}
