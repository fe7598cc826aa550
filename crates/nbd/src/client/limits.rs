//! What a request must respect before it is sent.

use highwater_model::ByteRange;

use super::Connection;
use crate::error::{NbdError, UsageError};
use crate::wire::HeaderStyle;

impl Connection {
    pub(super) fn check_alive(&self) -> Result<(), NbdError> {
        if self.broken {
            return Err(NbdError::Broken);
        }
        if self.channel.canceller().is_cancelled() {
            return Err(NbdError::Cancelled {
                doing: "use the NBD connection",
            });
        }
        Ok(())
    }

    pub(super) fn check_room(&self) -> Result<(), UsageError> {
        let in_flight = self.in_flight();
        if in_flight >= self.in_flight_max {
            return Err(UsageError::PipelineFull(in_flight));
        }
        Ok(())
    }

    pub(super) fn check_writable(&self) -> Result<(), UsageError> {
        if self.export.is_read_only() {
            Err(UsageError::NotOffered("writing"))
        } else {
            Ok(())
        }
    }

    /// Checks a range whose bytes travel; returns its length.
    pub(super) fn check_payload(&self, range: ByteRange) -> Result<usize, UsageError> {
        let max = u64::from(self.export.block_sizes.maximum);
        self.check_range(range, max)?;
        usize::try_from(range.len()).map_err(|_| UsageError::TooLong {
            len: range.len(),
            max,
        })
    }

    /// Longest range of a request without a payload: what the header can say,
    /// and on compact headers a multiple of any block size.
    pub(super) fn longest_effect(&self) -> u64 {
        match self.export.header_style {
            HeaderStyle::Extended => i64::MAX.cast_unsigned(),
            HeaderStyle::Simple | HeaderStyle::Structured => 0xffff_0000,
        }
    }

    /// "Size constraints". The end of an export whose size is no multiple of
    /// its own block size is let through: whether it can be reached is for the
    /// server to say.
    pub(super) fn check_range(&self, range: ByteRange, max: u64) -> Result<(), UsageError> {
        let (len, size_bytes) = (range.len(), self.export.size_bytes);
        if range.is_empty() {
            return Err(UsageError::Empty);
        }
        if range.end() > size_bytes {
            return Err(UsageError::BeyondTheEnd { range, size_bytes });
        }
        if len > max {
            return Err(UsageError::TooLong { len, max });
        }
        let block = self.export.block_sizes.minimum;
        let aligned = |at: u64| at.checked_rem(u64::from(block)) == Some(0);
        if !aligned(range.start()) || !(aligned(range.end()) || range.end() == size_bytes) {
            return Err(UsageError::Unaligned { range, block });
        }
        Ok(())
    }
}
