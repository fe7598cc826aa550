//! The bitmaps that are stored in a qcow2 image.

use super::{Fields, Qcow2Error, Qcow2Header, ReadAt};

/// Fields of one entry of the list before its name.
const ENTRY_BYTES: usize = 24;
/// QEMU: `BME_MAX_NAME_SIZE`, `BME_MIN_GRANULARITY_BITS`, `BME_MAX_GRANULARITY_BITS`.
const NAME_BYTES_MAX: usize = 1023;
const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// QEMU: `BME_MAX_TABLE_SIZE`, `BME_MAX_PHYS_SIZE`.
const TABLE_ENTRIES_MAX: u64 = 0x800_0000;
const BITMAP_BYTES_MAX: u64 = 0x2000_0000;
/// Types of bitmaps: only this one has ever been defined.
const DIRTY_TRACKING: u8 = 1;

const FLAG_IN_USE: u32 = 1;
const FLAG_AUTO: u32 = 1 << 1;
const FLAG_EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;

/// Bits 9 to 55 of an entry: where the cluster is; 0 if there is none.
const TABLE_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Without a cluster, whether all its bits are ones.
const TABLE_ALL_ONES: u64 = 1;

/// What can be said of a bitmap in an image that nobody has open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BitmapState {
    /// QEMU will go on recording in it.
    Recording,
    /// Whole, and switched off.
    Disabled,
    /// Whoever had the image open did not close it properly, or still has it open.
    InUse,
}

/// A bitmap that is stored in an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredBitmap {
    /// Its name.
    pub name: String,
    /// Bits of the number of bytes that one bit stands for.
    pub granularity_bits: u8,
    /// Whether it can be relied on.
    pub state: BitmapState,
    table_offset: u64,
    table_entries: u32,
}

impl StoredBitmap {
    /// Bytes that one bit stands for.
    pub const fn granularity(&self) -> u32 {
        1 << self.granularity_bits
    }
}

pub(super) fn list(
    image: &impl ReadAt,
    header: &Qcow2Header,
) -> Result<Vec<StoredBitmap>, Qcow2Error> {
    let Some(place) = header.bitmaps else {
        return Ok(Vec::new());
    };
    let mut bytes = vec![0; usize::try_from(place.bytes).unwrap_or(usize::MAX)];
    image.read_at(place.offset, &mut bytes)?;
    let mut fields = Fields(&bytes);
    let mut found = Vec::new();
    for _ in 0..place.count {
        found.push(entry(&mut fields)?);
    }
    if !fields.0.is_empty() {
        return Err(Qcow2Error::Malformed("the list of its bitmaps"));
    }
    Ok(found)
}

fn entry(fields: &mut Fields<'_>) -> Result<StoredBitmap, Qcow2Error> {
    let table_offset = fields.u64()?;
    let table_entries = fields.u32()?;
    let flags = fields.u32()?;
    let kind = fields.u8()?;
    let granularity_bits = fields.u8()?;
    let name_bytes = usize::from(fields.u16()?);
    let extra_bytes = usize::try_from(fields.u32()?).unwrap_or(usize::MAX);
    let _extra = fields.bytes(extra_bytes)?;
    let name = fields.bytes(name_bytes)?;
    let length = ENTRY_BYTES
        .saturating_add(extra_bytes)
        .saturating_add(name_bytes);
    let _padding = fields.bytes(length.wrapping_neg() % 8)?;
    if kind != DIRTY_TRACKING {
        return Err(Qcow2Error::Unknown(format!("bitmaps of type {kind}")));
    }
    if name_bytes == 0 || name_bytes > NAME_BYTES_MAX {
        return Err(Qcow2Error::Malformed("the name of a bitmap"));
    }
    if !GRANULARITY_BITS.contains(&granularity_bits) {
        return Err(Qcow2Error::Malformed("the granularity of a bitmap"));
    }
    let known = FLAG_IN_USE | FLAG_AUTO | FLAG_EXTRA_DATA_COMPATIBLE;
    // QEMU opens no image with flags or extra data that it does not know.
    if flags & !known != 0 || extra_bytes != 0 {
        return Err(Qcow2Error::Unknown("a newer kind of bitmap".to_owned()));
    }
    Ok(StoredBitmap {
        name: String::from_utf8_lossy(name).into_owned(),
        granularity_bits,
        state: if flags & FLAG_IN_USE != 0 {
            BitmapState::InUse
        } else if flags & FLAG_AUTO != 0 {
            BitmapState::Recording
        } else {
            BitmapState::Disabled
        },
        table_offset,
        table_entries,
    })
}

pub(super) fn count_dirty(
    image: &impl ReadAt,
    header: &Qcow2Header,
    bitmap: &StoredBitmap,
    budget_bytes: &mut u64,
) -> Result<u64, Qcow2Error> {
    let cluster_bytes = header.cluster_bytes();
    let bits = header.size_bytes.div_ceil(1 << bitmap.granularity_bits);
    let bytes = bits.div_ceil(8);
    let entries = u64::from(bitmap.table_entries);
    // The very size that QEMU wants, too.
    if entries != bytes.div_ceil(cluster_bytes) {
        return Err(Qcow2Error::Malformed("the size of a bitmap"));
    }
    if entries > TABLE_ENTRIES_MAX || bytes > BITMAP_BYTES_MAX {
        return Err(Qcow2Error::Malformed("a bitmap is too large"));
    }
    let mut dirty_bits = 0_u64;
    let mut cluster = vec![0; usize::try_from(cluster_bytes).unwrap_or_default()];
    let mut table = Table::new(image, bitmap.table_offset, entries);
    let mut bits_left = bits;
    while let Some(entry) = table.next(budget_bytes)? {
        let bits_here = bits_left.min(cluster_bytes.saturating_mul(8));
        bits_left = bits_left.saturating_sub(bits_here);
        let offset = entry & TABLE_OFFSET;
        if offset == 0 {
            if entry & TABLE_ALL_ONES != 0 {
                dirty_bits = dirty_bits.saturating_add(bits_here);
            }
            continue;
        }
        let bytes_here = usize::try_from(bits_here.div_ceil(8)).unwrap_or_default();
        let data = cluster.get_mut(..bytes_here).unwrap_or_default();
        spend(budget_bytes, data.len())?;
        image.read_at(offset, data)?;
        dirty_bits = dirty_bits.saturating_add(ones(data, bits_here));
    }
    Ok(dirty_bits.saturating_mul(u64::from(bitmap.granularity())))
}

/// Counts the ones among the first `bits` bits; the lowest of a byte comes first.
fn ones(bytes: &[u8], bits: u64) -> u64 {
    let all: u64 = bytes.iter().map(|byte| u64::from(byte.count_ones())).sum();
    let spare = match bits % 8 {
        0 => 0,
        used => bytes.last().map_or(0, |byte| (byte >> used).count_ones()),
    };
    all.saturating_sub(u64::from(spare))
}

fn spend(budget_bytes: &mut u64, bytes: usize) -> Result<(), Qcow2Error> {
    let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
    *budget_bytes = budget_bytes.checked_sub(bytes).ok_or(Qcow2Error::TooMuch)?;
    Ok(())
}

/// Reads the table of a bitmap in pieces.
struct Table<'a, R> {
    image: &'a R,
    offset: u64,
    left: u64,
    piece: std::vec::IntoIter<u64>,
}

impl<'a, R: ReadAt> Table<'a, R> {
    const PIECE_ENTRIES: u64 = 8192;

    fn new(image: &'a R, offset: u64, entries: u64) -> Self {
        Self {
            image,
            offset,
            left: entries,
            piece: Vec::new().into_iter(),
        }
    }

    fn next(&mut self, budget_bytes: &mut u64) -> Result<Option<u64>, Qcow2Error> {
        if let Some(entry) = self.piece.next() {
            return Ok(Some(entry));
        }
        if self.left == 0 {
            return Ok(None);
        }
        let entries = self.left.min(Self::PIECE_ENTRIES);
        let length = entries.saturating_mul(8);
        let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
        spend(budget_bytes, bytes.len())?;
        self.image.read_at(self.offset, &mut bytes)?;
        self.offset = self.offset.saturating_add(length);
        self.left = self.left.saturating_sub(entries);
        let mut fields = Fields(&bytes);
        let mut piece = Vec::new();
        while !fields.0.is_empty() {
            piece.push(fields.u64()?);
        }
        self.piece = piece.into_iter();
        Ok(self.piece.next())
    }
}
