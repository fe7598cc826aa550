//! Packs: about 32 MiB of records, each one chunk or one tree page.
//!
//! ```text
//! header (48)  magic "HWPACK" | version 1 | kind | cipher | 7 zero | salt (32)
//! record (44)  id (32) | plain length u32 | payload length u32 | codec | 3 zero
//!              payload, with a tag of 16 bytes if sealed
//! record ...
//! ```
//!
//! The name of a pack is the BLAKE3 hash of its bytes. Record headers are plain,
//! so that an index can be made again without the key.

use highwater_model::ObjectId;

use crate::compress::{Codec, Decompressor};
use crate::error::Flaw;
use crate::seal::{Cipher, SALT_LEN, Salt, Sealer};
use crate::wire::{Reader, narrow, wide};

const MAGIC: &[u8; 6] = b"HWPACK";
const VERSION: u8 = 1;
pub(crate) const HEADER_LEN: usize = 48;
pub(crate) const RECORD_HEADER_LEN: usize = 44;
/// No object is longer than the largest chunk.
pub(crate) const PLAIN_LEN_MAX: u32 = 4 << 20;
/// Keeps the table of a pack's records small even where everything compresses
/// to nothing.
pub(crate) const RECORDS_MAX: usize = 1 << 16;

/// What a pack holds; never both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum PackKind {
    Chunks,
    Pages,
}

impl PackKind {
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Chunks => 1,
            Self::Pages => 2,
        }
    }

    pub(crate) const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Chunks),
            2 => Some(Self::Pages),
            _ => None,
        }
    }
}

/// The first bytes of a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PackHeader {
    pub(crate) kind: PackKind,
    pub(crate) cipher: Cipher,
    pub(crate) salt: Salt,
}

impl PackHeader {
    pub(crate) fn encode(&self) -> [u8; HEADER_LEN] {
        let [m0, m1, m2, m3, m4, m5] = *MAGIC;
        let mut bytes = [0; HEADER_LEN];
        let (front, salt) = bytes.split_at_mut(HEADER_LEN - SALT_LEN);
        let fields = [
            m0,
            m1,
            m2,
            m3,
            m4,
            m5,
            VERSION,
            self.kind.code(),
            self.cipher.code(),
        ];
        front
            .iter_mut()
            .zip(fields)
            .for_each(|(to, from)| *to = from);
        salt.copy_from_slice(&self.salt);
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Flaw> {
        let mut reader = Reader::new(bytes);
        reader.expect(MAGIC, "it is not a pack")?;
        reader.expect(&[VERSION], "it has an unknown version")?;
        let kind = PackKind::from_code(reader.u8()?).ok_or(Flaw("its kind is unknown"))?;
        let cipher = Cipher::from_code(reader.u8()?).ok_or(Flaw("its cipher is unknown"))?;
        reader.zeroes(7)?;
        Ok(Self {
            kind,
            cipher,
            salt: reader.array()?,
        })
    }
}

/// What stands before each payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RecordHeader {
    pub(crate) id: ObjectId,
    pub(crate) plain_len: u32,
    pub(crate) payload_len: u32,
    pub(crate) codec: Codec,
}

impl RecordHeader {
    pub(crate) fn encode(&self) -> [u8; RECORD_HEADER_LEN] {
        let mut bytes = [0; RECORD_HEADER_LEN];
        let fields = self
            .id
            .as_bytes()
            .iter()
            .copied()
            .chain(self.plain_len.to_le_bytes())
            .chain(self.payload_len.to_le_bytes())
            .chain([self.codec.code()]);
        bytes
            .iter_mut()
            .zip(fields)
            .for_each(|(to, from)| *to = from);
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Flaw> {
        let mut reader = Reader::new(bytes);
        let id = ObjectId::from_bytes(reader.array()?);
        let (plain_len, payload_len) = (reader.u32()?, reader.u32()?);
        let codec = Codec::from_code(reader.u8()?).ok_or(Flaw("its compression is unknown"))?;
        reader.zeroes(3)?;
        let payload_len_max = plain_len.saturating_add(16);
        if plain_len > PLAIN_LEN_MAX || payload_len > payload_len_max {
            return Err(Flaw("its lengths are impossible"));
        }
        Ok(Self {
            id,
            plain_len,
            payload_len,
            codec,
        })
    }
}

/// Where a record lies in its pack: what an index row says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RecordPlace {
    pub(crate) id: ObjectId,
    pub(crate) offset: u32,
    /// Of the whole record, its header included.
    pub(crate) record_len: u32,
    pub(crate) plain_len: u32,
}

/// Returns the greatest length of a record of `plain_len` bytes.
pub(crate) const fn record_len_max(plain_len: usize) -> usize {
    plain_len.saturating_add(RECORD_HEADER_LEN + 16)
}

/// Takes one record apart, in place, and leaves its plain bytes in `plain`.
///
/// The id is *not* checked here: only the caller knows which kind of hash it is.
pub(crate) fn open_record(
    sealer: &Sealer,
    kind: PackKind,
    offset: u32,
    record: &mut [u8],
    decompressor: &mut Decompressor,
    plain: &mut Vec<u8>,
) -> Result<ObjectId, Flaw> {
    let (head, payload) = record
        .split_at_mut_checked(RECORD_HEADER_LEN)
        .ok_or(Flaw("it ends too early"))?;
    let header = RecordHeader::decode(head)?;
    if wide(payload.len()) != u64::from(header.payload_len) {
        return Err(Flaw("its length is not that of the index"));
    }
    let stored = sealer.open(offset.into(), &associated(kind, head), payload)?;
    plain.resize(narrow(header.plain_len.into())?, 0);
    decompressor.decompress(header.codec, stored, plain)?;
    Ok(header.id)
}

/// What a payload is bound to besides its place: the kind of object, its id,
/// lengths and codec.
pub(crate) fn associated(kind: PackKind, record_header: &[u8]) -> [u8; RECORD_HEADER_LEN + 1] {
    let mut bytes = [kind.code(); RECORD_HEADER_LEN + 1];
    bytes
        .iter_mut()
        .skip(1)
        .zip(record_header)
        .for_each(|(to, from)| *to = *from);
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_record_makes_the_reader_panic_or_take_more_memory_than_a_chunk(
            mut record in proptest::collection::vec(any::<u8>(), 0..200),
            codec in 0..4_u8,
            plain_len in prop_oneof![0..300_u32, any::<u32>()],
        ) {
            let stored = u32::try_from(record.len().saturating_sub(RECORD_HEADER_LEN)).unwrap();
            if let Some(head) = record.get_mut(32..44) {
                head[..4].copy_from_slice(&plain_len.to_le_bytes());
                head[4..8].copy_from_slice(&stored.to_le_bytes());
                head[8..].copy_from_slice(&[codec, 0, 0, 0]);
            }
            let sealer = Sealer::for_pack(None, &[0; 32]);
            let (mut plain, mut with) = (Vec::new(), Decompressor::default());
            let opened =
                open_record(&sealer, PackKind::Chunks, 0, &mut record, &mut with, &mut plain);
            prop_assert!(opened.is_err() || record.len() >= RECORD_HEADER_LEN);
            prop_assert!(plain.capacity() <= 2 * PLAIN_LEN_MAX as usize);
        }
    }
}
