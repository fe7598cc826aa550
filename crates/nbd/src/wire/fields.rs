//! Big-endian fields, read from a slice without indexing.

use crate::error::ProtocolError;

/// Reads fields one after the other.
pub(super) struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(super) const fn of(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ProtocolError> {
        let (head, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or(ProtocolError::TooShort)?;
        self.rest = rest;
        Ok(*head)
    }

    pub(super) fn u16(&mut self) -> Result<u16, ProtocolError> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, ProtocolError> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, ProtocolError> {
        self.array().map(u64::from_be_bytes)
    }

    pub(super) fn bytes(&mut self, len: usize) -> Result<&'a [u8], ProtocolError> {
        let (head, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or(ProtocolError::TooShort)?;
        self.rest = rest;
        Ok(head)
    }

    /// Returns what is left.
    pub(super) const fn rest(self) -> &'a [u8] {
        self.rest
    }
}

/// Returns a text of the peer's for people: at most 1000 characters, nothing
/// that could steer a terminal.
pub(crate) fn displayable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    text.chars()
        .take(1000)
        .map(plain)
        .collect::<String>()
        .trim()
        .to_owned()
}

/// Returns a name of the peer's as it is, since it may be sent back.
pub(super) fn name(bytes: &[u8], what: &'static str) -> Result<String, ProtocolError> {
    let limit = super::NBD_MAX_STRING;
    if bytes.len() > limit {
        let (len, limit) = (bytes.len() as u64, limit as u64);
        return Err(ProtocolError::TooLarge { what, len, limit });
    }
    String::from_utf8(bytes.to_vec()).map_err(|_| ProtocolError::NotText)
}
