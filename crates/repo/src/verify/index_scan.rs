//! Reads one index file from first to last byte and checks all it says.
//!
//! A stream with one buffer, whatever the file's length: its filter is hashed
//! and not kept. The filter is thus proven to be what was written; that it hides
//! no row is proven by the walk over trees, which looks everything up through it.

use highwater_store::{Listed, ObjectKey, Store, StoreError};

use crate::error::Flaw;
use crate::index::{
    BLOCK_LEN, HEADER_LEN, Header, IndexPack, IndexRow, decode_block, prefix_of, prove_block,
    rows_in_block,
};
use crate::pack::{self, PackKind, RECORD_HEADER_LEN, record_len_max};
use crate::verify::findings::flaw_of;
use crate::wire::{Reader, narrow, to_hex, wide};

/// What one index file is worth.
#[derive(Debug, Default)]
pub(super) struct Scanned {
    /// What is wrong with it, if anything is.
    pub(super) flaw: Option<String>,
    /// Names of the files it replaces; empty if it is damaged.
    pub(super) supersedes: Vec<String>,
    /// Its pack table, as far as it is proven.
    pub(super) packs: Vec<IndexPack>,
    /// Proven rows.
    pub(super) rows: u64,
}

/// Bytes read at once.
const BUFFER_LEN: usize = 1 << 20;
/// As in [`IndexFile`](crate::index): larger tables are refused there.
const TABLES_LEN_MAX: u64 = 1 << 30;

/// Scans a file; `on_row` gets the number of the pack in its table, the pack,
/// and the row, for every proven row.
///
/// Errors are those of the store alone; a bad medium is a flaw of the file.
pub(super) fn scan(
    store: &dyn Store,
    listed: &Listed,
    on_row: &mut dyn FnMut(usize, &IndexPack, &IndexRow),
) -> Result<Scanned, StoreError> {
    let mut stream = Stream::new(store, listed);
    let mut scanned = Scanned::default();
    let read = read(&mut stream, listed, &mut scanned, on_row);
    let rest = stream.finish();
    let failed = match (read, rest) {
        (Err(Stop::Flaw(flaw)), Ok(_)) => Some(flaw.to_string()),
        (Ok(()), Ok(name)) if name != listed.key.name() => {
            Some("its hash is not its name".to_owned())
        }
        (Ok(()), Ok(_)) => None,
        (Err(Stop::Store(error)), _) | (_, Err(error)) => Some(flaw_of(&error).ok_or(error)?),
    };
    if failed.is_some() {
        scanned.supersedes.clear();
    }
    scanned.flaw = failed;
    Ok(scanned)
}

/// Why reading a file ended early.
enum Stop {
    Flaw(Flaw),
    Store(StoreError),
}

impl From<Flaw> for Stop {
    fn from(flaw: Flaw) -> Self {
        Self::Flaw(flaw)
    }
}

impl From<StoreError> for Stop {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

fn read(
    stream: &mut Stream<'_>,
    listed: &Listed,
    scanned: &mut Scanned,
    on_row: &mut dyn FnMut(usize, &IndexPack, &IndexRow),
) -> Result<(), Stop> {
    let mut bytes = [0; HEADER_LEN];
    bytes.copy_from_slice(stream.take(HEADER_LEN)?);
    let header = Header::decode(&bytes)?;
    let counts = header.counts;
    if counts.file_len() != Some(listed.len) {
        return Err(Flaw("its length does not fit its counts").into());
    }
    let tables_len = counts
        .tables_len()
        .filter(|len| *len <= TABLES_LEN_MAX)
        .ok_or(Flaw("its counts are impossible"))?;
    let mut tables = Tables::new(&bytes, tables_len);
    let supersedes = tables.names(stream, counts.supersedes)?;
    let packs = tables.packs(stream, counts.packs)?;
    let prefixes = tables.prefixes(stream, counts.blocks())?;
    if !tables.prove_rest(stream, &header)? {
        return Err(Flaw("the hash of its tables does not match").into());
    }
    if !prefixes.is_sorted() {
        return Err(Flaw("it is not sorted").into());
    }
    scanned.supersedes = supersedes;
    scanned.packs = packs;
    let mut last = None;
    let mut flaw = None;
    for (block, prefix) in (0_u64..).zip(prefixes) {
        let mut bytes = [0; BLOCK_LEN];
        bytes.copy_from_slice(stream.take(BLOCK_LEN)?);
        // The blocks after a damaged one are in use, so they are looked at.
        if let Err(found) = prove_block(&bytes) {
            flaw.get_or_insert(found);
            continue;
        }
        let rows = decode_block(&bytes, rows_in_block(&counts, block)?)?;
        for (at, row) in rows.iter().enumerate() {
            let id = row.place.id;
            // One id may have several copies, each with its row.
            let order = (id, row.pack_no, row.place.offset);
            if last >= Some(order) || (at == 0 && prefix_of(&id) != prefix) {
                flaw.get_or_insert(Flaw("its rows are not in their order"));
            }
            last = Some(order);
            let pack_no = usize::try_from(row.pack_no).unwrap_or(usize::MAX);
            match scanned.packs.get(pack_no) {
                Some(pack) if is_possible(pack, row) => {
                    scanned.rows = scanned.rows.saturating_add(1);
                    on_row(pack_no, pack, row);
                }
                _ => {
                    flaw.get_or_insert(Flaw("a row shows a place that cannot be"));
                }
            }
        }
    }
    flaw.map_or(Ok(()), |flaw| Err(flaw.into()))
}

/// Returns whether a row shows a place that its pack can have.
fn is_possible(pack: &IndexPack, row: &IndexRow) -> bool {
    let place = row.place;
    let end = u64::from(place.offset).saturating_add(place.record_len.into());
    let (record_len, plain_len) = (
        narrow(place.record_len.into()),
        narrow(place.plain_len.into()),
    );
    let (Ok(record_len), Ok(plain_len)) = (record_len, plain_len) else {
        return false;
    };
    u64::from(place.offset) >= wide(pack::HEADER_LEN)
        && end <= pack.len
        && (RECORD_HEADER_LEN..=record_len_max(plain_len)).contains(&record_len)
}

/// The tables between header and blocks, hashed as they pass.
struct Tables {
    hasher: blake3::Hasher,
    left: u64,
}

impl Tables {
    fn new(header: &[u8; HEADER_LEN], len: u64) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(header.get(..24).unwrap_or_default());
        Self { hasher, left: len }
    }

    fn take<'a>(&mut self, stream: &'a mut Stream<'_>, len: usize) -> Result<&'a [u8], Stop> {
        let bytes = stream.take(len)?;
        self.hasher.update(bytes);
        self.left = self.left.saturating_sub(wide(len));
        Ok(bytes)
    }

    fn names(&mut self, stream: &mut Stream<'_>, count: u32) -> Result<Vec<String>, Stop> {
        (0..count)
            .map(|_| Ok(to_hex(self.take(stream, 32)?)))
            .collect()
    }

    fn packs(&mut self, stream: &mut Stream<'_>, count: u32) -> Result<Vec<IndexPack>, Stop> {
        let mut packs = Vec::new();
        for _ in 0..count {
            let mut reader = Reader::new(self.take(stream, 48)?);
            let (id, len) = (reader.array()?, reader.u64()?);
            let kind = PackKind::from_code(reader.u8()?).ok_or(Flaw("a pack's kind is unknown"))?;
            reader.zeroes(7)?;
            packs.push(IndexPack { id, len, kind });
        }
        Ok(packs)
    }

    fn prefixes(&mut self, stream: &mut Stream<'_>, count: u64) -> Result<Vec<u64>, Stop> {
        (0..count)
            .map(|_| {
                Ok(Reader::new(self.take(stream, 8)?)
                    .array()
                    .map(u64::from_be_bytes)?)
            })
            .collect()
    }

    /// Takes the filter, and returns whether the header's hash proves all.
    fn prove_rest(mut self, stream: &mut Stream<'_>, header: &Header) -> Result<bool, Stop> {
        while self.left > 0 {
            let len = narrow(self.left.min(wide(BUFFER_LEN))).unwrap_or(BUFFER_LEN);
            self.take(stream, len)?;
        }
        Ok(header.is_proven_by(&self.hasher.finalize()))
    }
}

/// A file read once from front to back, and its hash.
struct Stream<'a> {
    store: &'a dyn Store,
    key: &'a ObjectKey,
    len: u64,
    /// Where the next read from the store begins.
    next: u64,
    hasher: blake3::Hasher,
    buffer: Vec<u8>,
    used: usize,
}

impl<'a> Stream<'a> {
    fn new(store: &'a dyn Store, listed: &'a Listed) -> Self {
        Self {
            store,
            key: &listed.key,
            len: listed.len,
            next: 0,
            hasher: blake3::Hasher::new(),
            buffer: Vec::new(),
            used: 0,
        }
    }

    /// Returns the next `len` bytes, at most one buffer.
    fn take(&mut self, len: usize) -> Result<&[u8], Stop> {
        if self.buffer.len().saturating_sub(self.used) < len {
            self.fill()?;
        }
        let end = self.used.saturating_add(len);
        let taken = self.buffer.get(self.used..end);
        let taken = taken.ok_or(Flaw("it ends too early"))?;
        self.used = end;
        Ok(taken)
    }

    fn fill(&mut self) -> Result<(), StoreError> {
        self.buffer.drain(..self.used.min(self.buffer.len()));
        self.used = 0;
        let kept = self.buffer.len();
        let room = BUFFER_LEN.saturating_mul(2).saturating_sub(kept);
        let left = self.len.saturating_sub(self.next);
        let len = narrow(left.min(wide(room))).unwrap_or(room);
        self.buffer.resize(kept.saturating_add(len), 0);
        let into = self.buffer.get_mut(kept..).unwrap_or_default();
        self.store.get_range(self.key, self.next, into)?;
        self.hasher.update(into);
        self.next = self.next.saturating_add(wide(len));
        Ok(())
    }

    /// Reads what is left; returns the hash of all.
    fn finish(mut self) -> Result<String, StoreError> {
        while self.next < self.len {
            self.used = self.buffer.len();
            self.fill()?;
        }
        Ok(self.hasher.finalize().to_hex().to_string())
    }
}
