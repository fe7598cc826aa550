//! Reads and writes fixed little-endian layouts without ever reaching beyond
//! the bytes at hand.

use crate::error::Flaw;

/// Takes fields off the front of a byte slice.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], Flaw> {
        let (taken, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or(Flaw("it ends too early"))?;
        self.rest = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Flaw> {
        let (taken, rest) = self
            .rest
            .split_first_chunk()
            .ok_or(Flaw("it ends too early"))?;
        self.rest = rest;
        Ok(*taken)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Flaw> {
        self.array::<1>().map(u8::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Flaw> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Flaw> {
        self.array().map(u64::from_le_bytes)
    }

    /// Takes a fixed text such as a magic number.
    pub(crate) fn expect(&mut self, wanted: &[u8], flaw: &'static str) -> Result<(), Flaw> {
        if self.take(wanted.len())? == wanted {
            Ok(())
        } else {
            Err(Flaw(flaw))
        }
    }

    /// Takes bytes that must be zero, so that each bit of a header counts.
    pub(crate) fn zeroes(&mut self, len: usize) -> Result<(), Flaw> {
        if self.take(len)?.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        Err(Flaw("a reserved field is not zero"))
    }

    pub(crate) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    pub(crate) fn end(&self) -> Result<(), Flaw> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(Flaw("it is too long"))
        }
    }
}

/// Returns a length in memory as one on disk.
pub(crate) fn wide(len: usize) -> u64 {
    // No platform has more than 64 bits of address.
    u64::try_from(len).unwrap_or(u64::MAX)
}

/// Returns a length on disk as one in memory.
pub(crate) fn narrow(len: u64) -> Result<usize, Flaw> {
    usize::try_from(len).map_err(|_| Flaw("it is larger than the memory of this machine"))
}

/// Returns whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Sixty-four bytes at a time: the compiler turns the fold into vector code.
    let mut blocks = bytes.chunks_exact(64);
    blocks.all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
        && blocks.remainder().iter().all(|byte| *byte == 0)
}

/// Returns `bytes` as lower-case hexadecimal.
pub(crate) fn to_hex(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from_digit(u32::from(value), 16).unwrap_or('0');
    bytes
        .iter()
        .flat_map(|byte| [digit(byte >> 4), digit(byte & 15)])
        .collect()
}

/// Reads lower-case hexadecimal of at most `max` bytes.
pub(crate) fn from_hex(text: &str, max: usize) -> Result<Vec<u8>, Flaw> {
    if !text.len().is_multiple_of(2) || text.len() / 2 > max {
        return Err(Flaw("a hexadecimal field has a wrong length"));
    }
    let digit = |value: u8| match value {
        b'0'..=b'9' => Ok(value.wrapping_sub(b'0')),
        b'a'..=b'f' => Ok(value.wrapping_sub(b'a').wrapping_add(10)),
        _ => Err(Flaw("a hexadecimal field has a wrong digit")),
    };
    let pair = |pair: &[u8]| match pair {
        [high, low] => Ok(digit(*high)? << 4 | digit(*low)?),
        _ => Err(Flaw("a hexadecimal field has a wrong length")),
    };
    text.as_bytes().chunks_exact(2).map(pair).collect()
}

/// Reads lower-case hexadecimal of exactly `N` bytes.
pub(crate) fn array_from_hex<const N: usize>(text: &str) -> Result<[u8; N], Flaw> {
    from_hex(text, N)?
        .try_into()
        .map_err(|_| Flaw("a hexadecimal field has a wrong length"))
}
