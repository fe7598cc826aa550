//! A range of bytes of a disk.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The bytes `start .. end` of a disk image.
///
/// # Invariant
/// `start <= end`; both fit in 63 bits, which is what QEMU and the NBD
/// protocol can address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ByteRange {
    start: u64,
    end: u64,
}

impl ByteRange {
    /// Returns the range of `len` bytes from `start`, or `None` if it would
    /// reach beyond 63 bits.
    pub fn new(start: u64, len: u64) -> Option<Self> {
        let end = start.checked_add(len)?;
        (end <= i64::MAX.cast_unsigned()).then_some(Self { start, end })
    }

    /// Returns the range between two offsets, or `None` if they are reversed
    /// or beyond 63 bits.
    pub fn between(start: u64, end: u64) -> Option<Self> {
        Self::new(start, end.checked_sub(start)?)
    }

    /// Returns the first byte's offset.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// Returns the offset after the last byte.
    pub const fn end(self) -> u64 {
        self.end
    }

    /// Returns the number of bytes.
    pub const fn len(self) -> u64 {
        // The invariant keeps this from wrapping.
        self.end.saturating_sub(self.start)
    }

    /// Returns whether the range holds no byte.
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Returns the bytes common to both, or `None` if there are none.
    pub fn intersection(self, other: Self) -> Option<Self> {
        let start = self.start.max(other.start);
        let end = self.end.min(other.end);
        (start < end).then_some(Self { start, end })
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}
