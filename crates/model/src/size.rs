//! Sizes in bytes: as people write them, as they read them, and chunk sizes.

use serde::{Deserialize, Serialize};

/// The size of a chunk in bytes: a power of two from 64 KiB to 4 MiB.
///
/// 64 KiB is the default because it is the granularity of QEMU's bitmaps and
/// qcow2's clusters: an increment then stores exactly what changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct ChunkSize(u32);

/// A chunk size that is no power of two between 64 KiB and 4 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a chunk size of {0} bytes is not a power of two from 64 KiB to 4 MiB")]
pub struct ChunkSizeError(pub u64);

impl ChunkSize {
    /// 64 KiB.
    pub const DEFAULT: Self = Self(64 << 10);
    /// 4 MiB.
    pub const MAX: Self = Self(4 << 20);

    /// Checks and wraps a size in bytes.
    pub fn new(bytes: u64) -> Result<Self, ChunkSizeError> {
        let small = u32::try_from(bytes).map_err(|_| ChunkSizeError(bytes))?;
        let fits = small.is_power_of_two() && (Self::DEFAULT.0..=Self::MAX.0).contains(&small);
        fits.then_some(Self(small)).ok_or(ChunkSizeError(bytes))
    }

    /// Returns the size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0 as u64
    }

    /// Returns the size in bytes as a length in memory.
    #[expect(clippy::len_without_is_empty, reason = "a chunk is never empty")]
    pub const fn len(self) -> usize {
        self.0 as usize
    }

    /// Returns how many chunks a disk of `size_bytes` has; the last may be short.
    pub const fn count(self, size_bytes: u64) -> u64 {
        size_bytes.div_ceil(self.bytes())
    }
}

impl TryFrom<u32> for ChunkSize {
    type Error = ChunkSizeError;
    fn try_from(bytes: u32) -> Result<Self, ChunkSizeError> {
        Self::new(u64::from(bytes))
    }
}

impl From<ChunkSize> for u32 {
    fn from(size: ChunkSize) -> Self {
        size.0
    }
}

const UNITS: [(&str, u64); 5] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("B", 1),
];

/// Returns a size for people: binary units, three significant digits at most.
pub fn format_size(bytes: u64) -> String {
    let (unit, factor) = UNITS
        .into_iter()
        .find(|(_, factor)| bytes >= *factor)
        .unwrap_or(("B", 1));
    let whole = bytes / factor;
    let tenths = (bytes % factor).saturating_mul(10) / factor;
    if factor == 1 || whole >= 100 || tenths == 0 {
        return format!("{whole} {unit}");
    }
    format!("{whole}.{tenths} {unit}")
}

/// Reads a size as people write it: `65536`, `64K`, `64KiB`, `1.5GiB`; units
/// are binary whatever their spelling.
pub fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1_u64,
        "k" | "kib" | "kb" => 1 << 10,
        "m" | "mib" | "mb" => 1 << 20,
        "g" | "gib" | "gb" => 1 << 30,
        "t" | "tib" | "tb" => 1 << 40,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole: u64 = if whole.is_empty() && !fraction.is_empty() {
        0
    } else {
        whole.parse().ok()?
    };
    let mut bytes = whole.checked_mul(factor)?;
    if !fraction.is_empty() {
        let places = u32::try_from(fraction.len())
            .ok()
            .filter(|places| *places <= 6)?;
        let parts: u64 = fraction.parse().ok()?;
        bytes = bytes.checked_add(parts.checked_mul(factor)? / 10_u64.pow(places))?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_people_write_them() {
        for (text, bytes) in [
            ("65536", 65_536),
            ("64K", 65_536),
            ("64KiB", 65_536),
            ("64 kib", 65_536),
            ("1.5GiB", 1_610_612_736),
            ("0", 0),
        ] {
            assert_eq!(parse_size(text), Some(bytes), "{text}");
        }
        for wrong in ["", "GiB", "-1", "1.2.3M", "12 parsecs", "99999999999T"] {
            assert_eq!(parse_size(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn sizes_print_as_people_read_them() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1 << 10, "1 KiB"),
            (1_610_612_736, "1.5 GiB"),
            (31 << 20, "31 MiB"),
        ] {
            assert_eq!(format_size(bytes), text);
        }
    }

    #[test]
    fn a_chunk_size_is_a_power_of_two_from_64_kib_to_4_mib() {
        assert!(ChunkSize::new(64 << 10).is_ok());
        assert!(ChunkSize::new(4 << 20).is_ok());
        for wrong in [0, 1, 32 << 10, 65_537, 96 << 10, 8 << 20, u64::MAX] {
            assert_eq!(ChunkSize::new(wrong), Err(ChunkSizeError(wrong)));
        }
        assert_eq!(ChunkSize::DEFAULT.count(65_537), 2);
    }
}
