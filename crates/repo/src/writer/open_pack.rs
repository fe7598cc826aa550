//! Packs that are being filled.
//!
//! Their bytes go into the store while they come, where the store can take them
//! piece by piece; else they wait in memory.

use highwater_model::ObjectId;
use highwater_store::{ObjectKey, Store, StoreError, Unfinished};

use crate::compress::Codec;
use crate::pack::{
    HEADER_LEN, PackHeader, PackKind, RECORD_HEADER_LEN, RECORDS_MAX, RecordHeader, RecordPlace,
    associated, record_len_max,
};
use crate::seal::{Salt, SealKey, Sealer, random};
use crate::wire::wide;
use crate::writer::shelf::Slot;

/// Bytes that are hashed and given to the store in one go, while they are still
/// in a processor's cache.
const BLOCK_LEN: usize = 256 << 10;
/// Blocks end at a multiple of this: BLAKE3 is fastest on whole subtrees, and
/// the page cache on whole pages.
const BLOCK_ALIGNMENT: usize = 64 << 10;

/// Where the bytes of an open pack go.
pub(crate) enum Body {
    /// Into the store at once.
    Piecewise(Box<dyn Unfinished>),
    /// Into memory: the store takes whole objects only.
    Whole(Vec<u8>),
}

impl Body {
    fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        match self {
            Self::Piecewise(unfinished) => unfinished.append(&[bytes]),
            Self::Whole(whole) => {
                whole.extend_from_slice(bytes);
                Ok(())
            }
        }
    }
}

/// A pack that is being filled.
pub(crate) struct OpenPack {
    header: PackHeader,
    sealer: Sealer,
    body: Body,
    /// Of what `body` has. Boxed: its two KiB would move with every append.
    hasher: Box<blake3::Hasher>,
    /// The end of the pack, which `body` does not have yet.
    block: Vec<u8>,
    /// Length of the pack, `block` included.
    len: usize,
    records: Vec<RecordPlace>,
    slot: Option<Slot>,
}

impl OpenPack {
    /// Starts a pack.
    pub(crate) fn new(
        kind: PackKind,
        seal: Option<&SealKey>,
        body: Body,
        slot: Option<Slot>,
    ) -> Self {
        Self::with_salt(kind, seal, random(), body, slot)
    }

    fn with_salt(
        kind: PackKind,
        seal: Option<&SealKey>,
        salt: Salt,
        body: Body,
        slot: Option<Slot>,
    ) -> Self {
        let sealer = Sealer::for_pack(seal, &salt);
        let header = PackHeader {
            kind,
            cipher: sealer.cipher(),
            salt,
        };
        let mut block = Vec::with_capacity(BLOCK_LEN.saturating_add(record_len_max(BLOCK_LEN / 4)));
        block.extend_from_slice(&header.encode());
        Self {
            header,
            sealer,
            body,
            hasher: Box::default(),
            block,
            len: HEADER_LEN,
            records: Vec::new(),
            slot,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Returns whether a record with `text_len` compressed bytes fits into a
    /// pack of `pack_len`.
    pub(crate) fn has_room_for(&self, text_len: usize, pack_len: usize) -> bool {
        let end = self.len.saturating_add(record_len_max(text_len));
        self.records.len() < RECORDS_MAX && end <= pack_len
    }

    /// Adds an object that [has room](Self::has_room_for), compressed as `text`;
    /// returns its stored length, record header and tag included.
    ///
    /// After an error the pack must be given up.
    pub(crate) fn append(
        &mut self,
        id: ObjectId,
        plain_len: usize,
        codec: Codec,
        text: &[u8],
    ) -> Result<u64, StoreError> {
        let offset = self.len;
        let payload_len = text.len().saturating_add(self.header.cipher.overhead());
        let as_u32 = |len: usize| u32::try_from(len).expect("packs have less than 4 GiB");
        let plain_len = as_u32(plain_len);
        let header = RecordHeader {
            id,
            plain_len,
            payload_len: as_u32(payload_len),
            codec,
        };
        let head = header.encode();
        self.block.extend_from_slice(&head);
        let start = self.block.len();
        self.block.extend_from_slice(text);
        let aad = associated(self.header.kind, &head);
        let text = self.block.get_mut(start..).unwrap_or_default();
        if let Some(tag) = self.sealer.seal(wide(offset), &aad, text) {
            self.block.extend_from_slice(&tag);
        }
        let record_len = payload_len.saturating_add(RECORD_HEADER_LEN);
        self.len = offset.saturating_add(record_len);
        self.records.push(RecordPlace {
            id,
            offset: as_u32(offset),
            record_len: as_u32(record_len),
            plain_len,
        });
        if self.block.len() >= BLOCK_LEN {
            let whole = self.block.len() / BLOCK_ALIGNMENT;
            self.pass_on(whole.saturating_mul(BLOCK_ALIGNMENT))?;
        }
        Ok(wide(record_len))
    }

    /// Hashes the first `len` bytes of the block and gives them to the store.
    fn pass_on(&mut self, len: usize) -> Result<(), StoreError> {
        let bytes = self.block.get(..len).unwrap_or_default();
        self.hasher.update(bytes);
        self.body.append(bytes)?;
        self.block.drain(..len.min(self.block.len()));
        Ok(())
    }

    /// Closes the pack.
    pub(crate) fn finish(mut self) -> Result<FinishedPack, StoreError> {
        self.pass_on(self.block.len())?;
        Ok(FinishedPack {
            kind: self.header.kind,
            hash: self.hasher.finalize().into(),
            len: wide(self.len),
            body: self.body,
            records: self.records,
            slot: self.slot,
        })
    }
}

/// A complete pack that is not stored yet.
pub(crate) struct FinishedPack {
    pub(crate) kind: PackKind,
    /// Hash of its bytes, and its name.
    pub(crate) hash: [u8; 32],
    pub(crate) len: u64,
    body: Body,
    pub(crate) records: Vec<RecordPlace>,
    slot: Option<Slot>,
}

impl FinishedPack {
    /// Stores it as `key`; then there is room for another pack.
    pub(crate) fn store(
        self,
        store: &dyn Store,
        key: &ObjectKey,
    ) -> (Vec<RecordPlace>, Result<(), StoreError>) {
        let outcome = match self.body {
            Body::Piecewise(unfinished) => unfinished.finish(key),
            Body::Whole(whole) => store.put(key, &[&whole]),
        };
        drop(self.slot);
        (self.records, outcome)
    }
}

#[cfg(test)]
mod tests {
    use zeroize::Zeroizing;

    use super::*;
    use crate::compress::{Compression, Compressor, Decompressor};
    use crate::error::Flaw;
    use crate::pack::open_record;

    const PLAIN: &[u8] = b"some plain bytes that are forty-two bytes.";

    struct Built {
        bytes: Vec<u8>,
        hash: [u8; 32],
        records: Vec<RecordPlace>,
    }

    impl Built {
        fn bytes(&self) -> &[u8] {
            &self.bytes
        }
    }

    fn close(pack: OpenPack) -> Built {
        let FinishedPack {
            hash,
            len,
            body,
            records,
            ..
        } = pack.finish().unwrap();
        let Body::Whole(bytes) = body else {
            panic!("these tests keep packs in memory")
        };
        assert_eq!(wide(bytes.len()), len);
        assert_eq!(*blake3::hash(&bytes).as_bytes(), hash);
        Built {
            bytes,
            hash,
            records,
        }
    }

    fn build(seal: Option<&SealKey>, kind: PackKind) -> Built {
        let mut pack = OpenPack::with_salt(kind, seal, [9; 32], Body::Whole(Vec::new()), None);
        let mut compressor = Compressor::new(Compression::Zstd(1)).unwrap();
        for id in [1, 2] {
            assert!(pack.has_room_for(PLAIN.len(), 4096));
            let (codec, text) = compressor.compress(PLAIN);
            pack.append(ObjectId::from_bytes([id; 32]), PLAIN.len(), codec, text)
                .unwrap();
        }
        close(pack)
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
        let hash = blake3::Hash::from(build(Some(&key()), PackKind::Chunks).hash);
        let wanted = "f9d59eb601068d4e2b7266c199d2746d3fd4269dc23a231839f8fafb0fd3ba1d";
        assert_eq!(hash.to_hex().as_str(), wanted);
    }

    #[test]
    fn a_pack_passed_on_in_blocks_is_what_its_records_are_one_behind_the_other() {
        let lens = [1, 65_536, 40_000, 4 << 20, 65_535, 262_144, 7, 300_000];
        let key = key();
        for seal in [None, Some(&key)] {
            let body = Body::Whole(Vec::new());
            let mut pack = OpenPack::with_salt(PackKind::Chunks, seal, [9; 32], body, None);
            let text = |at: usize| vec![u8::try_from(at).unwrap(); lens[at]];
            for (at, len) in lens.iter().enumerate() {
                let id = ObjectId::from_bytes([7; 32]);
                pack.append(id, *len, Codec::Raw, &text(at)).unwrap();
            }
            let built = close(pack);
            let sealer = Sealer::for_pack(seal, &[9; 32]);
            let mut with = Decompressor::default();
            let mut next = HEADER_LEN;
            for (at, place) in built.records.iter().enumerate() {
                let end = next + usize::try_from(place.record_len).unwrap();
                assert_eq!(usize::try_from(place.offset).unwrap(), next);
                let mut record = built.bytes()[next..end].to_vec();
                let mut plain = Vec::new();
                let (kind, offset) = (PackKind::Chunks, place.offset);
                open_record(&sealer, kind, offset, &mut record, &mut with, &mut plain).unwrap();
                assert!(plain == text(at), "record {at}");
                next = end;
            }
            assert_eq!(next, built.bytes().len());
        }
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
        let body = Body::Whole(Vec::new());
        let other = close(OpenPack::new(PackKind::Chunks, Some(&key()), body, None));
        let salted = [&other.bytes()[..HEADER_LEN], &pack.bytes()[HEADER_LEN..]].concat();
        assert!(
            open(&salted, PackKind::Chunks, first, 48).is_err(),
            "into another pack"
        );
    }
}
