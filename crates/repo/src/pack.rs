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

use crate::compress::{Codec, Compressor, Decompressor};
use crate::error::Flaw;
use crate::seal::{Cipher, SALT_LEN, Salt, SealKey, Sealer, random};
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
    fn encode(&self) -> [u8; HEADER_LEN] {
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
    fn encode(&self) -> [u8; RECORD_HEADER_LEN] {
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

/// A pack that is being filled.
pub(crate) struct PackBuilder {
    header: PackHeader,
    sealer: Sealer,
    /// Allocated once in full; the first `used` bytes are the pack.
    buffer: Vec<u8>,
    used: usize,
    records: Vec<RecordPlace>,
}

impl PackBuilder {
    /// Starts a pack in `buffer`, whose length is the pack's greatest length.
    pub(crate) fn new(kind: PackKind, seal: Option<&SealKey>, buffer: Vec<u8>) -> Self {
        Self::with_salt(kind, seal, random(), buffer)
    }

    fn with_salt(kind: PackKind, seal: Option<&SealKey>, salt: Salt, mut buffer: Vec<u8>) -> Self {
        let sealer = Sealer::for_pack(seal, &salt);
        let header = PackHeader {
            kind,
            cipher: sealer.cipher(),
            salt,
        };
        buffer
            .get_mut(..HEADER_LEN)
            .expect("buffers are longer than the header of a pack")
            .copy_from_slice(&header.encode());
        Self {
            header,
            sealer,
            buffer,
            used: HEADER_LEN,
            records: Vec::new(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Returns whether an object of `plain_len` bytes fits even if it does not
    /// compress.
    pub(crate) fn has_room_for(&self, plain_len: usize) -> bool {
        let end = self.used.saturating_add(record_len_max(plain_len));
        self.records.len() < RECORDS_MAX && end <= self.buffer.len()
    }

    /// Adds an object that [has room](Self::has_room_for); returns its stored
    /// length, record header and tag included.
    pub(crate) fn append(
        &mut self,
        id: ObjectId,
        plain: &[u8],
        compressor: &mut Compressor,
    ) -> u64 {
        let offset = self.used;
        let rest = self
            .buffer
            .get_mut(offset..)
            .expect("`used` lies within the buffer");
        let (head, body) = rest.split_at_mut(RECORD_HEADER_LEN);
        let (codec, len) = compressor.compress(plain, body);
        let payload_len = len.saturating_add(self.header.cipher.overhead());
        let as_u32 = |len: usize| u32::try_from(len).expect("packs have less than 4 GiB");
        let (plain_len, stored) = (as_u32(plain.len()), as_u32(payload_len));
        let header = RecordHeader {
            id,
            plain_len,
            payload_len: stored,
            codec,
        };
        head.copy_from_slice(&header.encode());
        let aad = associated(self.header.kind, head);
        let (text, tag_room) = body.split_at_mut(len);
        if let Some(tag) = self.sealer.seal(wide(offset), &aad, text) {
            tag_room
                .iter_mut()
                .zip(tag)
                .for_each(|(to, from)| *to = from);
        }
        let record_len = payload_len.saturating_add(RECORD_HEADER_LEN);
        self.used = offset.saturating_add(record_len);
        let (offset, record_len) = (as_u32(offset), as_u32(record_len));
        self.records.push(RecordPlace {
            id,
            offset,
            record_len,
            plain_len,
        });
        u64::from(record_len)
    }

    /// Closes the pack.
    pub(crate) fn finish(self) -> FinishedPack {
        FinishedPack {
            kind: self.header.kind,
            buffer: self.buffer,
            used: self.used,
            records: self.records,
        }
    }
}

/// A complete pack that is not stored yet.
pub(crate) struct FinishedPack {
    pub(crate) kind: PackKind,
    pub(crate) buffer: Vec<u8>,
    used: usize,
    pub(crate) records: Vec<RecordPlace>,
}

impl FinishedPack {
    pub(crate) fn bytes(&self) -> &[u8] {
        self.buffer
            .get(..self.used)
            .expect("`used` lies within the buffer")
    }
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
fn associated(kind: PackKind, record_header: &[u8]) -> [u8; RECORD_HEADER_LEN + 1] {
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
    use zeroize::Zeroizing;

    use super::*;
    use crate::compress::Compression;

    const PLAIN: &[u8] = b"some plain bytes that are forty-two bytes.";

    fn build(seal: Option<&SealKey>, kind: PackKind) -> FinishedPack {
        let mut pack = PackBuilder::with_salt(kind, seal, [9; 32], vec![0; 4096]);
        let mut compressor = Compressor::new(Compression::Zstd(1)).unwrap();
        for id in [1, 2] {
            assert!(pack.has_room_for(PLAIN.len()));
            pack.append(ObjectId::from_bytes([id; 32]), PLAIN, &mut compressor);
        }
        pack.finish()
    }

    fn key() -> SealKey {
        SealKey(Zeroizing::new([3; 32]))
    }

    #[test]
    fn the_bytes_of_a_plain_pack_never_change() {
        let record = |id| {
            [
                &[id; 32][..],
                &[42, 0, 0, 0],
                &[42, 0, 0, 0],
                &[0, 0, 0, 0],
                PLAIN,
            ]
            .concat()
        };
        let header = [b"HWPACK".as_slice(), &[1, 1, 0], &[0; 7], &[9; 32]].concat();
        let wanted = [header, record(1), record(2)].concat();
        let pack = build(None, PackKind::Chunks);
        assert_eq!(pack.bytes(), wanted);
        let place = |id, offset| RecordPlace {
            id: ObjectId::from_bytes([id; 32]),
            offset,
            record_len: 86,
            plain_len: 42,
        };
        assert_eq!(pack.records, [place(1, 48), place(2, 134)]);
    }

    #[test]
    fn the_bytes_of_a_sealed_pack_never_change() {
        let hash = blake3::hash(build(Some(&key()), PackKind::Chunks).bytes());
        let wanted = "f9d59eb601068d4e2b7266c199d2746d3fd4269dc23a231839f8fafb0fd3ba1d";
        assert_eq!(hash.to_hex().as_str(), wanted);
    }

    /// Opens the record at `offset` as if it were of `kind` and lay at `nonce`.
    fn open(bytes: &[u8], kind: PackKind, offset: usize, nonce: u32) -> Result<Vec<u8>, Flaw> {
        let len = RECORD_HEADER_LEN + PLAIN.len() + 16;
        let mut record = bytes[offset..offset + len].to_vec();
        let sealer = Sealer::for_pack(Some(&key()), &PackHeader::decode(bytes)?.salt);
        let mut plain = Vec::new();
        let mut decompressor = Decompressor::default();
        open_record(
            &sealer,
            kind,
            nonce,
            &mut record,
            &mut decompressor,
            &mut plain,
        )?;
        Ok(plain)
    }

    #[test]
    fn a_sealed_record_opens_only_in_its_place_and_as_its_kind() {
        let pack = build(Some(&key()), PackKind::Chunks);
        let (first, second) = (HEADER_LEN, pack.records[1].offset);
        assert_eq!(
            open(pack.bytes(), PackKind::Chunks, first, 48).unwrap(),
            PLAIN
        );
        assert!(
            open(pack.bytes(), PackKind::Chunks, first, second).is_err(),
            "moved"
        );
        assert!(
            open(pack.bytes(), PackKind::Pages, first, 48).is_err(),
            "as a page"
        );
        for at in 0..RECORD_HEADER_LEN {
            let mut bad = pack.bytes().to_vec();
            bad[first + at] ^= 1;
            assert!(
                open(&bad, PackKind::Chunks, first, 48).is_err(),
                "header byte {at}"
            );
        }
        let other = PackBuilder::new(PackKind::Chunks, Some(&key()), vec![0; 4096]).finish();
        let salted = [&other.bytes()[..HEADER_LEN], &pack.bytes()[HEADER_LEN..]].concat();
        assert!(
            open(&salted, PackKind::Chunks, first, 48).is_err(),
            "into another pack"
        );
    }

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
