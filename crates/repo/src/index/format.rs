//! The bytes of an index file.
//!
//! ```text
//! header (64)  magic "HWINDX" | version 2 | 0 | supersedes S u32 | packs P u32
//!              | rows R u64 | hash (32) | 8 zero
//! supersedes   S * name of an index file (32)
//! packs        P * (pack id (32) | length u64 | kind | 7 zero)
//! prefixes     B * first 8 bytes of the first id of each block
//! filter       W * u64: which ids may be there, see [`Filter`]
//! blocks       B * (up to 84 rows of 48 bytes, zero-filled to 4064 | hash (32))
//! row          id (32) | pack number u32 | offset u32 | record length u32 | plain length u32
//! ```
//!
//! B is R / 84 and W is 10 R / 64, rounded up; rows ascend by id, then by pack
//! number and offset. An id has a row for each of its copies: which of them is
//! gone or damaged is only known when it is looked for. In version 1, which is
//! read too, an id occurs once in a file. The hash of the header covers its first 24 bytes and the four tables, the hash of a block
//! its first 4064 bytes, so that a lookup reads and proves one block only.

use highwater_model::ObjectId;

use crate::error::Flaw;
use crate::pack::{PackKind, RecordPlace};
use crate::wire::{Reader, narrow, wide};

const MAGIC: &[u8; 6] = b"HWINDX";
const VERSION: u8 = 2;
/// Each id occurs once.
const VERSION_UNMERGED: u8 = 1;
pub(crate) const HEADER_LEN: usize = 64;
const HASHED_HEADER_LEN: usize = 24;
const PACK_LEN: u64 = 48;
const ROW_LEN: usize = 48;
pub(crate) const ROWS_PER_BLOCK: usize = 84;
const HASHED_BLOCK_LEN: usize = 4064;
pub(crate) const BLOCK_LEN: usize = 4096;

/// A pack as an index file lists it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct IndexPack {
    pub(crate) id: [u8; 32],
    pub(crate) len: u64,
    pub(crate) kind: PackKind,
}

/// One object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct IndexRow {
    pub(crate) pack_no: u32,
    pub(crate) place: RecordPlace,
}

/// The counts of an index file, and what they mean for its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) supersedes: u32,
    pub(crate) packs: u32,
    pub(crate) rows: u64,
}

impl Counts {
    pub(crate) fn blocks(&self) -> u64 {
        self.rows.div_ceil(wide(ROWS_PER_BLOCK))
    }

    fn filter_words(&self) -> u64 {
        self.rows.saturating_mul(FILTER_BITS_PER_ROW).div_ceil(64)
    }

    /// Returns the length of the four tables, if it can exist.
    pub(crate) fn tables_len(&self) -> Option<u64> {
        let supersedes = u64::from(self.supersedes).checked_mul(32)?;
        let packs = u64::from(self.packs).checked_mul(PACK_LEN)?;
        let prefixes = self.blocks().checked_mul(8)?;
        let filter = self.filter_words().checked_mul(8)?;
        supersedes
            .checked_add(packs)?
            .checked_add(prefixes)?
            .checked_add(filter)
    }

    /// Returns the length of the whole file, if it can exist.
    pub(crate) fn file_len(&self) -> Option<u64> {
        let blocks = self.blocks().checked_mul(wide(BLOCK_LEN))?;
        wide(HEADER_LEN)
            .checked_add(self.tables_len()?)?
            .checked_add(blocks)
    }
}

/// The header, split in what it says and what it promises.
pub(crate) struct Header {
    pub(crate) counts: Counts,
    hashed: [u8; HASHED_HEADER_LEN],
    hash: [u8; 32],
}

impl Header {
    pub(crate) fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, Flaw> {
        let mut reader = Reader::new(bytes);
        let hashed = Reader::new(bytes).array()?;
        reader.expect(MAGIC, "it is not an index")?;
        let [version] = reader.array()?;
        if !matches!(version, VERSION_UNMERGED | VERSION) {
            return Err(Flaw("it has an unknown version"));
        }
        reader.zeroes(1)?;
        let counts = Counts {
            supersedes: reader.u32()?,
            packs: reader.u32()?,
            rows: reader.u64()?,
        };
        let hash = reader.array()?;
        reader.zeroes(8)?;
        Ok(Self {
            counts,
            hashed,
            hash,
        })
    }
}

impl Header {
    /// Returns whether this is the hash that the header promises.
    pub(crate) fn is_proven_by(&self, hash: &blake3::Hash) -> bool {
        hash.as_bytes() == &self.hash
    }
}

/// The tables, which stay in memory.
pub(crate) struct Tables {
    pub(crate) supersedes: Vec<[u8; 32]>,
    pub(crate) packs: Vec<IndexPack>,
    /// First eight bytes of the first id of each block, as big-endian numbers.
    pub(crate) prefixes: Vec<u64>,
    pub(crate) filter: Filter,
}

impl Tables {
    /// Reads the bytes that follow the header. The caller has checked
    /// [`Counts::tables_len`] against the file, so counts are honest here.
    pub(crate) fn decode(header: &Header, bytes: &[u8]) -> Result<Self, Flaw> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&header.hashed).update(bytes);
        if hasher.finalize().as_bytes() != &header.hash {
            return Err(Flaw("the hash of its tables does not match"));
        }
        let counts = header.counts;
        let mut reader = Reader::new(bytes);
        let supersedes = (0..counts.supersedes)
            .map(|_| reader.array())
            .collect::<Result<Vec<_>, _>>()?;
        let pack = |reader: &mut Reader<'_>| {
            let (id, len) = (reader.array()?, reader.u64()?);
            let kind = PackKind::from_code(reader.u8()?).ok_or(Flaw("a pack's kind is unknown"))?;
            reader.zeroes(7)?;
            Ok(IndexPack { id, len, kind })
        };
        let packs = (0..counts.packs)
            .map(|_| pack(&mut reader))
            .collect::<Result<Vec<_>, Flaw>>()?;
        let prefix = |reader: &mut Reader<'_>| reader.array().map(u64::from_be_bytes);
        let prefixes = (0..counts.blocks())
            .map(|_| prefix(&mut reader))
            .collect::<Result<Vec<_>, _>>()?;
        let words = (0..counts.filter_words())
            .map(|_| reader.u64())
            .collect::<Result<_, _>>()?;
        reader.end()?;
        if !prefixes.is_sorted() {
            return Err(Flaw("it is not sorted"));
        }
        Ok(Self {
            supersedes,
            packs,
            prefixes,
            filter: Filter { words },
        })
    }
}

/// More cost memory, fewer cost reads: ten let about three in a hundred absent
/// ids pass, and take 200 MB for 10 TiB of chunks.
const FILTER_BITS_PER_ROW: u64 = 10;

/// Says which ids cannot be in a file, so that a new chunk costs no read.
///
/// A Bloom filter in words: bytes 8 to 16 of an id choose its word (as a number,
/// times the number of words, divided by 2^64), and the low 24 bits of bytes 16
/// to 20 are the numbers of four bits that it sets there.
pub(crate) struct Filter {
    words: Vec<u64>,
}

impl Filter {
    fn of(rows: &[IndexRow], words: u64) -> Self {
        let len = usize::try_from(words).expect("the rows are in memory, so the filter fits");
        let mut filter = Self {
            words: vec![0; len],
        };
        for row in rows {
            let (at, bits) = filter.place_of(&row.place.id);
            if let Some(word) = filter.words.get_mut(at) {
                *word |= bits;
            }
        }
        filter
    }

    pub(crate) fn may_hold(&self, id: &ObjectId) -> bool {
        let (at, bits) = self.place_of(id);
        self.words.get(at).is_some_and(|word| word & bits == bits)
    }

    fn place_of(&self, id: &ObjectId) -> (usize, u64) {
        let mut reader = Reader::new(id.as_bytes());
        let fields = reader
            .take(8)
            .and_then(|_| Ok((reader.u64()?, reader.u32()?)));
        let (choice, bits) = fields.expect("ids have 32 bytes");
        let scaled = u128::from(choice).saturating_mul(u128::from(wide(self.words.len()))) >> 64;
        let bits = [0, 6, 12, 18]
            .into_iter()
            .fold(0, |all, from| all | 1 << (bits >> from & 63));
        (usize::try_from(scaled).unwrap_or(usize::MAX), bits)
    }
}

/// Returns the rows of `id` in a proven block.
pub(crate) fn find_in_block(
    block: &[u8],
    rows: usize,
    id: &ObjectId,
) -> Result<Vec<IndexRow>, Flaw> {
    let rows = rows_of(block, rows)?;
    let order = |row: &[u8; ROW_LEN]| row.first_chunk::<32>().cmp(&Some(id.as_bytes()));
    let first = rows.partition_point(|row| order(row).is_lt());
    let (_, rest) = rows.split_at(first);
    rest.iter()
        .take_while(|row| order(row).is_eq())
        .map(decode_row)
        .collect()
}

/// Returns all rows of a proven block.
pub(crate) fn decode_block(block: &[u8], rows: usize) -> Result<Vec<IndexRow>, Flaw> {
    rows_of(block, rows)?.iter().map(decode_row).collect()
}

fn rows_of(block: &[u8], rows: usize) -> Result<&[[u8; ROW_LEN]], Flaw> {
    let rows = block.get(..rows.saturating_mul(ROW_LEN));
    Ok(rows.ok_or(Flaw("a block is too short"))?.as_chunks().0)
}

/// Checks the hash of a block.
pub(crate) fn prove_block(block: &[u8; BLOCK_LEN]) -> Result<(), Flaw> {
    let (hashed, hash) = block.split_at(HASHED_BLOCK_LEN);
    if blake3::hash(hashed).as_bytes() == hash {
        return Ok(());
    }
    Err(Flaw("the hash of a block does not match"))
}

/// Returns how many rows block `block` of `blocks` has.
pub(crate) fn rows_in_block(counts: &Counts, block: u64) -> Result<usize, Flaw> {
    let before = block.saturating_mul(wide(ROWS_PER_BLOCK));
    narrow(counts.rows.saturating_sub(before).min(wide(ROWS_PER_BLOCK)))
}

fn decode_row(row: &[u8; ROW_LEN]) -> Result<IndexRow, Flaw> {
    let mut reader = Reader::new(row);
    let id = ObjectId::from_bytes(reader.array()?);
    let pack_no = reader.u32()?;
    let (offset, record_len, plain_len) = (reader.u32()?, reader.u32()?, reader.u32()?);
    Ok(IndexRow {
        pack_no,
        place: RecordPlace {
            id,
            offset,
            record_len,
            plain_len,
        },
    })
}

/// Returns the bytes of an index file; sorts `rows`, and keeps one of several
/// that are equal.
pub(crate) fn encode(
    supersedes: &[[u8; 32]],
    packs: &[IndexPack],
    rows: &mut Vec<IndexRow>,
) -> Vec<u8> {
    rows.sort_unstable_by_key(|row| (row.place.id, row.pack_no, row.place.offset));
    rows.dedup();
    let count = |len: usize| u32::try_from(len).expect("a session has less than 2^32 packs");
    let counts = Counts {
        supersedes: count(supersedes.len()),
        packs: count(packs.len()),
        rows: wide(rows.len()),
    };
    let len = counts
        .file_len()
        .and_then(|len| usize::try_from(len).ok())
        .unwrap_or_default();
    let mut bytes = Vec::with_capacity(len);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&[VERSION, 0]);
    bytes.extend_from_slice(&counts.supersedes.to_le_bytes());
    bytes.extend_from_slice(&counts.packs.to_le_bytes());
    bytes.extend_from_slice(&counts.rows.to_le_bytes());
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes);
    let tables = encode_tables(supersedes, packs, rows, counts.filter_words());
    hasher.update(&tables);
    bytes.extend_from_slice(hasher.finalize().as_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(&tables);
    for block in rows.chunks(ROWS_PER_BLOCK) {
        encode_block(block, &mut bytes);
    }
    assert_eq!(
        bytes.len(),
        len,
        "the length of an index follows from its counts"
    );
    bytes
}

fn encode_tables(
    supersedes: &[[u8; 32]],
    packs: &[IndexPack],
    rows: &[IndexRow],
    filter_words: u64,
) -> Vec<u8> {
    let mut bytes = supersedes.concat();
    for pack in packs {
        bytes.extend_from_slice(&pack.id);
        bytes.extend_from_slice(&pack.len.to_le_bytes());
        bytes.extend_from_slice(&[pack.kind.code(), 0, 0, 0, 0, 0, 0, 0]);
    }
    for row in rows.iter().step_by(ROWS_PER_BLOCK) {
        bytes.extend(row.place.id.as_bytes().iter().take(8));
    }
    let filter = Filter::of(rows, filter_words);
    filter
        .words
        .iter()
        .for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
    bytes
}

fn encode_block(rows: &[IndexRow], bytes: &mut Vec<u8>) {
    let start = bytes.len();
    for IndexRow { pack_no, place } in rows {
        bytes.extend_from_slice(place.id.as_bytes());
        for field in [*pack_no, place.offset, place.record_len, place.plain_len] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
    }
    bytes.resize(start.saturating_add(HASHED_BLOCK_LEN), 0);
    let hash = blake3::hash(bytes.get(start..).unwrap_or_default());
    bytes.extend_from_slice(hash.as_bytes());
}

/// Returns the part of an id that the block table shows.
pub(crate) fn prefix_of(id: &ObjectId) -> u64 {
    id.as_bytes()
        .first_chunk()
        .copied()
        .map_or(0, u64::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn row(id: u8, pack_no: u32) -> IndexRow {
        let id = ObjectId::from_bytes([id; 32]);
        IndexRow {
            pack_no,
            place: RecordPlace {
                id,
                offset: 48,
                record_len: 86,
                plain_len: 42,
            },
        }
    }

    #[test]
    fn the_bytes_of_an_index_never_change() {
        let pack = IndexPack {
            id: [7; 32],
            len: 1000,
            kind: PackKind::Pages,
        };
        let bytes = encode(
            &[[5; 32]],
            &[pack],
            &mut vec![row(9, 0), row(2, 1), row(2, 0), row(9, 0)],
        );
        let front = [
            b"HWINDX".as_slice(),
            &[2, 0],
            &[1, 0, 0, 0],
            &[1, 0, 0, 0],
            &[3, 0, 0, 0, 0, 0, 0, 0],
        ]
        .concat();
        // Ids of equal bytes set one bit each: 0x02020202 & 63 and so on.
        let bits = |m: u64| {
            [0, 6, 12, 18]
                .iter()
                .fold(0, |all, by| all | 1_u64 << (m >> by & 63))
        };
        let filter = bits(0x0202_0202) | bits(0x0909_0909);
        let tables = [
            &[5; 32][..],
            &[7; 32],
            &1000_u64.to_le_bytes(),
            &[2, 0, 0, 0, 0, 0, 0, 0],
            &[2; 8],
            &filter.to_le_bytes(),
        ]
        .concat();
        let hash = blake3::hash(&[front.clone(), tables.clone()].concat());
        let row = |id: u8, pack_no: u8| {
            [
                &[id; 32][..],
                &[pack_no, 0, 0, 0],
                &[48, 0, 0, 0],
                &[86, 0, 0, 0],
                &[42, 0, 0, 0],
            ]
            .concat()
        };
        let mut block = [row(2, 0), row(2, 1), row(9, 0)].concat();
        block.resize(4064, 0);
        let block_hash = blake3::hash(&block);
        let wanted = [
            front,
            hash.as_bytes().to_vec(),
            vec![0; 8],
            tables,
            block,
            block_hash.as_bytes().to_vec(),
        ]
        .concat();
        assert!(bytes == wanted);
    }

    #[test]
    fn the_filter_passes_all_that_is_there_and_little_else() {
        let id = |n: u64| ObjectId::from_bytes(blake3::hash(&n.to_le_bytes()).into());
        let place = |n| RecordPlace {
            id: id(n),
            offset: 0,
            record_len: 0,
            plain_len: 0,
        };
        let rows: Vec<_> = (0..20_000)
            .map(|n| IndexRow {
                pack_no: 0,
                place: place(n),
            })
            .collect();
        let filter = Filter::of(&rows, 20_000 * FILTER_BITS_PER_ROW / 64);
        assert!((0..20_000).all(|n| filter.may_hold(&id(n))));
        let passed = (20_000..120_000)
            .filter(|n| filter.may_hold(&id(*n)))
            .count();
        assert!(passed < 4_000, "{passed} of 100000 absent ids pass");
    }

    proptest! {
        #[test]
        fn no_header_makes_the_reader_panic_or_expect_more_than_the_file_has(
            counts in any::<(u32, u32, u64)>(),
            rest in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let mut bytes = [0; HEADER_LEN];
            bytes[..7].copy_from_slice(b"HWINDX\x02");
            bytes[8..12].copy_from_slice(&counts.0.to_le_bytes());
            bytes[12..16].copy_from_slice(&counts.1.to_le_bytes());
            bytes[16..24].copy_from_slice(&counts.2.to_le_bytes());
            let header = Header::decode(&bytes).unwrap();
            let len = header.counts.file_len();
            prop_assert!(len.is_none_or(|len| len >= counts.2.saturating_mul(48)));
            prop_assert!(Tables::decode(&header, &rest).is_err());
        }
    }
}
