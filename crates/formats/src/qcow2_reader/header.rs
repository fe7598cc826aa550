//! The header of a qcow2 image and its extensions.

use super::{Fields, Qcow2Error, ReadAt};

const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Fields of version 2, and with those that version 3 adds.
const HEADER_2_BYTES: usize = 72;
const HEADER_3_BYTES: usize = 104;
/// QEMU: `MIN_CLUSTER_BITS`, `MAX_CLUSTER_BITS`.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// QEMU: `bs->auto_backing_file` holds 1023 bytes and a zero.
const NAME_BYTES_MAX: usize = 1023;
/// The largest disk QEMU can address, less one cluster.
const SIZE_BYTES_MAX: u64 = i64::MAX as u64 - (1 << 21);

mod feature {
    pub(super) const DIRTY: u64 = 1;
    pub(super) const CORRUPT: u64 = 1 << 1;
    pub(super) const DATA_FILE: u64 = 1 << 2;
    pub(super) const COMPRESSION: u64 = 1 << 3;
    pub(super) const EXTENDED_L2: u64 = 1 << 4;
    pub(super) const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
    /// Autoclear: the bitmaps were kept up to date by whoever wrote last.
    pub(super) const BITMAPS: u64 = 1;
    /// Autoclear: the data file alone is a raw image of the disk.
    pub(super) const DATA_FILE_RAW: u64 = 1 << 1;
}

mod extension {
    pub(super) const END: u32 = 0;
    pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub(super) const BITMAPS: u32 = 0x2385_2875;
    pub(super) const DATA_FILE: u32 = 0x4441_5441;
}

/// Whether and how an image is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageEncryption {
    /// It is not.
    None,
    /// The old kind, which QEMU only reads.
    Aes,
    /// LUKS.
    Luks,
}

/// The file that holds the data of an image apart from its tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataFile {
    /// Its name as the image has it; `None` if the image does not say.
    pub name: Option<String>,
    /// Whether it alone is a raw image of the disk.
    pub is_raw: bool,
}

/// What the header of an image says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qcow2Header {
    /// 2 or 3.
    pub version: u32,
    /// Size the guest sees, bytes.
    pub size_bytes: u64,
    /// Bits of the cluster size.
    pub cluster_bits: u32,
    /// Name of the backing file as the image has it.
    pub backing: Option<String>,
    /// Format of the backing file, if the image says so.
    pub backing_format: Option<String>,
    /// The file with the data, if that is another one.
    pub data_file: Option<DataFile>,
    /// Whether the data is encrypted.
    pub encryption: ImageEncryption,
    /// Whether QEMU found the image damaged, and would not write to it.
    pub is_corrupt: bool,
    /// Whether its reference counts have to be repaired before it is written.
    pub is_dirty: bool,
    /// Where the list of bitmaps is, if QEMU would believe it.
    pub(super) bitmaps: Option<BitmapsExtension>,
}

/// Where the list of bitmaps is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BitmapsExtension {
    pub(super) count: u32,
    pub(super) bytes: u64,
    pub(super) offset: u64,
}

/// The extensions that matter here.
#[derive(Debug, Default)]
struct Extensions {
    backing_format: Option<String>,
    data_file: Option<String>,
    bitmaps: Option<BitmapsExtension>,
}

impl Qcow2Header {
    /// Forgets where the bitmaps are, and whether the image has to be repaired: what
    /// changes when QEMU adds one.
    pub const fn forget_bitmaps(&mut self) {
        self.bitmaps = None;
        self.is_dirty = false;
    }

    /// Returns the size of a cluster, bytes.
    pub const fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub(super) fn read(image: &impl ReadAt) -> Result<Option<Self>, Qcow2Error> {
        let mut fixed = [0_u8; HEADER_3_BYTES];
        let there = image.read_up_to(0, &mut fixed)?;
        let fixed = fixed.get(..there).unwrap_or_default();
        if !fixed.starts_with(&MAGIC) {
            return Ok(None);
        }
        Self::parse(image, fixed).map(Some)
    }

    fn parse(image: &impl ReadAt, fixed: &[u8]) -> Result<Self, Qcow2Error> {
        let mut fields = Fields(fixed);
        let _magic = fields.u32()?;
        let version = fields.u32()?;
        if !matches!(version, 2 | 3) {
            return Err(Qcow2Error::Unknown(format!("qcow2 version {version}")));
        }
        let backing_offset = fields.u64()?;
        let backing_bytes = fields.u32()?;
        let cluster_bits = fields.u32()?;
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(Qcow2Error::Malformed("its cluster size"));
        }
        let size_bytes = fields.u64()?;
        if size_bytes > SIZE_BYTES_MAX {
            return Err(Qcow2Error::Malformed("its size"));
        }
        let encryption = match fields.u32()? {
            0 => ImageEncryption::None,
            1 => ImageEncryption::Aes,
            2 => ImageEncryption::Luks,
            other => return Err(Qcow2Error::Unknown(format!("encryption method {other}"))),
        };
        let _tables_and_snapshots = fields.bytes(HEADER_2_BYTES.saturating_sub(36))?;
        let (incompatible, autoclear, header_bytes) = if version == 2 {
            (0, 0, HEADER_2_BYTES)
        } else {
            let incompatible = fields.u64()?;
            let _compatible = fields.u64()?;
            let autoclear = fields.u64()?;
            let _refcount_order = fields.u32()?;
            let length = usize::try_from(fields.u32()?).unwrap_or(usize::MAX);
            if length < HEADER_3_BYTES {
                return Err(Qcow2Error::Malformed("the length of its header"));
            }
            (incompatible, autoclear, length)
        };
        let unknown = incompatible & !feature::KNOWN;
        if unknown != 0 {
            return Err(Qcow2Error::Unknown(format!("features {unknown:#x}")));
        }
        let first_cluster = first_cluster(image, cluster_bits)?;
        let backing = backing_name(&first_cluster, backing_offset, backing_bytes)?;
        // The name, where there is one, comes after the extensions.
        let end = usize::try_from(backing_offset)
            .ok()
            .filter(|offset| *offset > 0)
            .unwrap_or(first_cluster.len());
        let found = first_cluster
            .get(header_bytes..end)
            .ok_or(Qcow2Error::Malformed("the length of its header"))
            .and_then(extensions)?;
        let has_data_file = incompatible & feature::DATA_FILE != 0;
        let has_bitmaps = autoclear & feature::BITMAPS != 0;
        Ok(Self {
            version,
            size_bytes,
            cluster_bits,
            backing,
            backing_format: found.backing_format,
            data_file: has_data_file.then_some(DataFile {
                name: found.data_file,
                is_raw: autoclear & feature::DATA_FILE_RAW != 0,
            }),
            encryption,
            is_corrupt: incompatible & feature::CORRUPT != 0,
            is_dirty: incompatible & feature::DIRTY != 0,
            bitmaps: found.bitmaps.filter(|_| has_bitmaps),
        })
    }
}

/// Header, extensions and names lie in the first cluster, which may be the last.
fn first_cluster(image: &impl ReadAt, cluster_bits: u32) -> Result<Vec<u8>, Qcow2Error> {
    let mut bytes = vec![0; 1 << cluster_bits];
    let there = image.read_up_to(0, &mut bytes)?;
    bytes.truncate(there);
    Ok(bytes)
}

fn backing_name(
    first_cluster: &[u8],
    offset: u64,
    bytes: u32,
) -> Result<Option<String>, Qcow2Error> {
    let malformed = Qcow2Error::Malformed("the name of its backing file");
    if offset == 0 {
        return Ok(None);
    }
    let (Ok(start), Ok(bytes)) = (usize::try_from(offset), usize::try_from(bytes)) else {
        return Err(malformed);
    };
    if bytes > NAME_BYTES_MAX {
        return Err(malformed);
    }
    let name = start
        .checked_add(bytes)
        .and_then(|end| first_cluster.get(start..end))
        .ok_or(malformed)?;
    // QEMU reads an empty one as none.
    text(name).map(|name| (!name.is_empty()).then_some(name))
}

fn text(bytes: &[u8]) -> Result<String, Qcow2Error> {
    // QEMU takes names up to the first zero.
    let bytes = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8(bytes.to_vec()).map_err(|_| Qcow2Error::Malformed("a name is not UTF-8"))
}

fn extensions(bytes: &[u8]) -> Result<Extensions, Qcow2Error> {
    let mut found = Extensions::default();
    let mut fields = Fields(bytes);
    // Fewer bytes than that hold none, not even one that ends them.
    while fields.0.len() >= 8 {
        let kind = fields.u32()?;
        let length = usize::try_from(fields.u32()?).unwrap_or(usize::MAX);
        if kind == extension::END {
            break;
        }
        let body = fields.bytes(length)?;
        let padding = length.wrapping_neg() % 8;
        // The last one may end with the space.
        let _padding = fields.bytes(padding.min(fields.0.len()))?;
        match kind {
            extension::BACKING_FORMAT => found.backing_format = Some(name(body)?),
            extension::DATA_FILE => found.data_file = Some(name(body)?),
            extension::BITMAPS => found.bitmaps = Some(bitmaps(body)?),
            _ => {}
        }
    }
    Ok(found)
}

fn name(body: &[u8]) -> Result<String, Qcow2Error> {
    if body.len() > NAME_BYTES_MAX {
        return Err(Qcow2Error::Malformed("a name is too long"));
    }
    text(body)
}

fn bitmaps(body: &[u8]) -> Result<BitmapsExtension, Qcow2Error> {
    /// QEMU: `QCOW2_MAX_BITMAPS`, `QCOW2_MAX_BITMAP_DIRECTORY_SIZE`.
    const COUNT_MAX: u32 = 65535;
    const DIRECTORY_BYTES_MAX: u64 = 1024 * COUNT_MAX as u64;
    let malformed = Err(Qcow2Error::Malformed("the place of its bitmaps"));
    if body.len() != 24 {
        return malformed;
    }
    let mut fields = Fields(body);
    let (count, reserved) = (fields.u32()?, fields.u32()?);
    let (bytes, offset) = (fields.u64()?, fields.u64()?);
    if reserved != 0 || count == 0 || count > COUNT_MAX || bytes > DIRECTORY_BYTES_MAX {
        return malformed;
    }
    Ok(BitmapsExtension {
        count,
        bytes,
        offset,
    })
}
