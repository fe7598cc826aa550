//! The images of a disk, found from the topmost one.
//!
//! Named as libvirt names them while the VM runs: a relative name is one of the
//! directory of the image that has it. So a disk is the same disk whether its VM
//! is on or off.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use highwater_formats::{BitmapState, ImageEncryption, Qcow2Header, Qcow2Reader, StoredBitmap};
use highwater_hypervisor::{BitmapFacts, ChainLink, Place};
use highwater_model::DATA_FILE_FORMAT;
use rustix::fs::OFlags;
use serde_json::Value;

use crate::host;

/// As long as the longest chain that is read of a definition.
const CHAIN_MAX: usize = 200;
/// What the bitmaps of one image may take to be counted. An image of 64 TiB has
/// 128 MiB for each of them.
const BITMAP_BUDGET_BYTES: u64 = 2 << 30;
/// QEMU's view of a raw file ends at a whole sector.
const SECTOR_BYTES: u64 = 512;

/// Format of an image, as far as it can be exported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Format {
    Qcow2(Box<Qcow2Header>),
    Raw,
}

/// One image that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Image {
    pub(crate) path: PathBuf,
    pub(crate) format: Format,
    /// Whether it is a block device.
    pub(crate) is_device: bool,
    /// The file with its data, if that is another one, and whether it is a device.
    pub(crate) data_file: Option<(PathBuf, bool)>,
    pub(crate) bitmaps: Vec<BitmapFacts>,
}

/// All images of a disk, topmost first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) images: Vec<Image>,
    pub(crate) links: Vec<ChainLink>,
    /// Size the guest sees, bytes.
    pub(crate) size_bytes: u64,
    /// Why not all of it could be read.
    pub(crate) unreadable: Option<String>,
}

impl Chain {
    /// Looks at an image, and at those that it needs. Where nobody says the format
    /// of an image, its first bytes do.
    pub(crate) fn discover(top: &Path, format: Option<&str>) -> Self {
        let mut chain = Self {
            images: Vec::new(),
            links: Vec::new(),
            size_bytes: 0,
            unreadable: None,
        };
        if let Err(why) = chain.add(top, format) {
            chain.unreadable = Some(why);
        }
        chain
    }

    /// The image that the guest writes to.
    pub(crate) fn top(&self) -> Option<&Image> {
        self.images.first()
    }

    fn add(&mut self, top: &Path, format: Option<&str>) -> Result<(), String> {
        let mut next = Some((top.to_path_buf(), format.map(str::to_owned)));
        while let Some((path, format)) = next.take() {
            if self.images.len() >= CHAIN_MAX {
                return Err(format!("it has more than {CHAIN_MAX} images"));
            }
            if self.images.iter().any(|known| known.path == path) {
                return Err(format!("`{}` is its own backing file", path.display()));
            }
            let format = format.as_deref();
            // Known by name at least, if it cannot be read.
            self.links.push(link(&path, format.unwrap_or("raw")));
            let name = path.display().to_string();
            let (image, size_bytes) =
                look(&path, format).map_err(|why| format!("`{name}` {why}"))?;
            if self.images.is_empty() {
                self.size_bytes = size_bytes;
            }
            if let Some(link) = self.links.last_mut() {
                image.format_name().clone_into(&mut link.format);
            }
            if let Format::Qcow2(header) = &image.format {
                let leads_on = header.backing.is_some() || image.data_file.is_some();
                let matters = leads_on || self.images.is_empty();
                if matters && format.is_none() && !is_called_qcow2(&path) {
                    // A guest could have written the header of an image into its
                    // raw disk: to be given any file of the host, or because it
                    // keeps an image there.
                    return Err(format!(
                        "`{name}` begins like a qcow2, as the raw disk of a guest may, too: say \
                         which it is with `?format=qcow2` or `?format=raw`"
                    ));
                }
                if let Some((data, _)) = &image.data_file {
                    self.links.push(link(data, DATA_FILE_FORMAT));
                }
                if let Some(backing) = &header.backing {
                    let below = header.backing_format.clone();
                    match resolve(&path, backing) {
                        Ok(found) => next = Some((found, below)),
                        Err(why) => {
                            self.links.push(far_link(backing, header));
                            self.images.push(image);
                            return Err(why);
                        }
                    }
                }
            }
            self.images.push(image);
        }
        Ok(())
    }
}

impl Image {
    /// Returns QEMU's name of the format.
    pub(crate) fn format_name(&self) -> &'static str {
        match self.format {
            Format::Qcow2(_) => "qcow2",
            Format::Raw => "raw",
        }
    }

    /// Returns the header, if it is a qcow2.
    pub(crate) fn header(&self) -> Option<&Qcow2Header> {
        match &self.format {
            Format::Qcow2(header) => Some(header),
            Format::Raw => None,
        }
    }

    /// Whether its data is encrypted.
    pub(crate) fn is_encrypted(&self) -> bool {
        self.header()
            .is_some_and(|header| header.encryption != ImageEncryption::None)
    }

    /// Returns the bitmap of this name that is stored in it.
    pub(crate) fn bitmap(&self, name: &str) -> Option<&BitmapFacts> {
        self.bitmaps.iter().find(|bitmap| bitmap.name == name)
    }
}

/// Whether whoever made the image has called it what it is. A guest cannot.
fn is_called_qcow2(path: &Path) -> bool {
    path.extension()
        .is_some_and(|it| it.eq_ignore_ascii_case("qcow2"))
}

/// Opens an image for reading, and nothing that could keep us waiting.
pub(crate) fn open(path: &Path) -> Result<(File, bool), String> {
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .map_err(|error| format!("cannot be opened: {error}"))?;
    let kind = file
        .metadata()
        .map_err(|error| format!("cannot be looked at: {error}"))?
        .file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok((file, kind.is_block_device()));
    }
    Err("is neither a file nor a block device".to_owned())
}

/// Reads what an image says about itself, and its size for the guest.
fn look(path: &Path, format: Option<&str>) -> Result<(Image, u64), String> {
    let (file, is_device) = open(path)?;
    match format {
        Some("raw") => return raw(path, &file, is_device),
        Some("qcow2") | None => {}
        Some(other) => return Err(format!("has the format {other}")),
    }
    let reader = Qcow2Reader::open(&file).map_err(|error| words(&error))?;
    let Some(reader) = reader else {
        return match format {
            None => raw(path, &file, is_device),
            Some(_) => Err("is no qcow2".to_owned()),
        };
    };
    let header = reader.header().clone();
    if header.is_corrupt {
        return Err("is marked as damaged".to_owned());
    }
    let mut budget = BITMAP_BUDGET_BYTES;
    let stored = reader.bitmaps().map_err(|error| words(&error))?;
    let bitmaps = stored
        .into_iter()
        .map(|bitmap| bitmap_facts(path, &reader, &bitmap, &mut budget))
        .collect();
    let data_file = match &header.data_file {
        None => None,
        Some(data) => {
            let name = data.name.as_deref().ok_or("does not name its data file")?;
            let data = resolve(path, name)?;
            let (_, is_device) =
                open(&data).map_err(|why| format!("has a data file that {why}"))?;
            Some((data, is_device))
        }
    };
    let size_bytes = header.size_bytes;
    let image = Image {
        path: path.to_path_buf(),
        format: Format::Qcow2(Box::new(header)),
        is_device,
        data_file,
        bitmaps,
    };
    Ok((image, size_bytes))
}

fn raw(path: &Path, mut file: &File, is_device: bool) -> Result<(Image, u64), String> {
    // A device tells its size in no other way.
    let end = std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0))
        .map_err(|error| format!("does not tell its size: {error}"))?;
    let image = Image {
        path: path.to_path_buf(),
        format: Format::Raw,
        is_device,
        data_file: None,
        bitmaps: Vec::new(),
    };
    let sectors = end.div_ceil(SECTOR_BYTES);
    Ok((image, sectors.saturating_mul(SECTOR_BYTES)))
}

fn words(error: &highwater_formats::Qcow2Error) -> String {
    let cause = std::error::Error::source(error).map_or_else(String::new, |it| format!(": {it}"));
    format!("is not understood: {error}{cause}")
}

fn bitmap_facts(
    path: &Path,
    reader: &Qcow2Reader<&File>,
    bitmap: &StoredBitmap,
    budget: &mut u64,
) -> BitmapFacts {
    // One that was not closed has no content that means anything; one that cannot
    // be read is worth as little.
    let dirty_bytes = match bitmap.state {
        BitmapState::InUse => None,
        BitmapState::Recording | BitmapState::Disabled => reader.count_dirty(bitmap, budget).ok(),
    };
    BitmapFacts {
        name: bitmap.name.clone(),
        node: path.to_string_lossy().into_owned(),
        granularity: bitmap.granularity(),
        recording: bitmap.state == BitmapState::Recording,
        persistent: true,
        in_image: true,
        busy: false,
        inconsistent: dirty_bytes.is_none(),
        dirty_bytes: dirty_bytes.unwrap_or_default(),
    }
}

/// Returns the file that an image names; an error if it is none of this host.
fn resolve(image: &Path, name: &str) -> Result<PathBuf, String> {
    let local = match name.strip_prefix("json:") {
        Some(json) => json_file(json),
        None => plain_file(name),
    };
    let Some(local) = local else {
        return Err(format!(
            "`{}` needs `{name}`, which is no file of this host",
            image.display()
        ));
    };
    let below = Path::new(&local);
    if below.is_absolute() {
        return Ok(below.to_path_buf());
    }
    Ok(image.parent().unwrap_or(Path::new("/")).join(below))
}

/// A colon before any slash makes a protocol of what is before it.
fn plain_file(name: &str) -> Option<String> {
    let name = name.strip_prefix("file:").unwrap_or(name);
    let first = name.split('/').next().unwrap_or_default();
    (!first.contains(':') && !name.is_empty()).then(|| name.to_owned())
}

/// Finds the file in a description of nodes; anything but a format over a file
/// (slices, quorums, other protocols) is none.
fn json_file(json: &str) -> Option<String> {
    const DEPTH_MAX: usize = 4;
    let value: Value = serde_json::from_str(json).ok()?;
    let mut node = &value;
    let dotted = |key: &str| value.get(key).and_then(Value::as_str);
    if let (Some(path), None | Some("file" | "host_device")) =
        (dotted("file.filename"), dotted("file.driver"))
    {
        return plain_file(path);
    }
    for _ in 0..DEPTH_MAX {
        // A part of a file is not the file.
        if node.get("offset").is_some() || node.get("size").is_some() {
            return None;
        }
        let driver = node.get("driver").and_then(Value::as_str);
        match driver {
            Some("file" | "host_device") => {
                return plain_file(node.get("filename")?.as_str()?);
            }
            Some("qcow2" | "raw") | None => node = node.get("file")?,
            Some(_) => return None,
        }
    }
    None
}

fn link(path: &Path, format: &str) -> ChainLink {
    let identity = host::file_identity(path);
    let name = path.to_string_lossy().into_owned();
    ChainLink {
        node: Some(name.clone()),
        name,
        format: format.to_owned(),
        place: Place::Host,
        inode: identity.map(|identity| identity.inode),
        file_bytes: identity.and_then(|identity| identity.bytes),
        modified_ns: identity.and_then(|identity| identity.modified_ns),
        changed_ns: identity.and_then(|identity| identity.changed_ns),
    }
}

fn far_link(name: &str, above: &Qcow2Header) -> ChainLink {
    ChainLink {
        name: name.to_owned(),
        format: above.backing_format.clone().unwrap_or("raw".to_owned()),
        place: Place::Network,
        node: None,
        inode: None,
        file_bytes: None,
        modified_ns: None,
        changed_ns: None,
    }
}
