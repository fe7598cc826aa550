//! The images of a disk, found from the topmost one.
//!
//! Named as libvirt names them while the VM runs: a relative name is one of the
//! directory of the image that has it. So a disk is the same disk whether its VM
//! is on or off.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use highwater_formats::{
    BitmapState, ImageEncryption, Qcow2Error, Qcow2Header, Qcow2Reader, ReadAt, StoredBitmap,
};
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
/// QEMU takes such a name as one of the directory that it was started in.
const RELATIVE: &str = "is a file of a directory that nobody knows";
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

    /// Whether this is what it was, but for the new mark in the topmost image and
    /// what adding it does to that file.
    pub(crate) fn is_still(&self, then: &Self, new_mark: &str) -> bool {
        let link = |place: usize, link: &ChainLink| {
            let is_top = place == 0;
            let (name, format) = (link.name.clone(), link.format.clone());
            // Its owner may change with the start of another VM over it.
            let content = (link.file_bytes, link.modified_ns);
            (name, format, link.inode, (!is_top).then_some(content))
        };
        let links = |chain: &Self| -> Vec<_> {
            let links = chain.links.iter().enumerate();
            links.map(|(place, it)| link(place, it)).collect()
        };
        let images = |chain: &Self| -> Vec<Image> {
            let images = chain.images.iter().cloned();
            images.map(|image| image.without(new_mark)).collect()
        };
        self.unreadable == then.unreadable
            && self.size_bytes == then.size_bytes
            && links(self) == links(then)
            && images(self) == images(then)
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
                    let below = resolve(&path, backing).and_then(|(found, said)| {
                        let format = same_format(backing, header.backing_format.clone(), said)?;
                        Ok((found, format))
                    });
                    match below {
                        Ok(found) => next = Some(found),
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

    /// Returns what it is without that bitmap, and without what is written along
    /// with one.
    fn without(mut self, mark: &str) -> Self {
        self.bitmaps.retain(|bitmap| bitmap.name != mark);
        if let Format::Qcow2(header) = &mut self.format {
            header.forget_bitmaps();
        }
        self
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
        .collect::<Result<_, _>>()?;
    let data_file = match &header.data_file {
        None => None,
        Some(data) => {
            let name = data.name.as_deref().ok_or("does not name its data file")?;
            let (data, said) = resolve(path, name)?;
            same_format(name, Some("raw".to_owned()), said)?;
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

fn words(error: &Qcow2Error) -> String {
    let cause = std::error::Error::source(error).map_or_else(String::new, |it| format!(": {it}"));
    format!("is not understood: {error}{cause}")
}

fn bitmap_facts(
    path: &Path,
    reader: &Qcow2Reader<impl ReadAt>,
    bitmap: &StoredBitmap,
    budget: &mut u64,
) -> Result<BitmapFacts, String> {
    let dirty_bytes = match bitmap.state {
        // One that was not closed has no content that means anything.
        BitmapState::InUse => None,
        BitmapState::Recording | BitmapState::Disabled => {
            match reader.count_dirty(bitmap, budget) {
                Ok(bytes) => Some(bytes),
                // Not the bitmap's fault: a good mark would be given up for it.
                Err(error) if may_pass(&error) => return Err(words(&error)),
                Err(_) => None,
            }
        }
    };
    Ok(BitmapFacts {
        name: bitmap.name.clone(),
        node: path.to_string_lossy().into_owned(),
        granularity: bitmap.granularity(),
        recording: bitmap.state == BitmapState::Recording,
        persistent: true,
        in_image: true,
        busy: false,
        inconsistent: dirty_bytes.is_none(),
        dirty_bytes: dirty_bytes.unwrap_or_default(),
    })
}

/// Whether another look may succeed.
fn may_pass(error: &Qcow2Error) -> bool {
    match error {
        // The file ends where a table should be.
        Qcow2Error::Read(error) => error.kind() != ErrorKind::UnexpectedEof,
        Qcow2Error::TooMuch => true,
        Qcow2Error::Malformed(_) | Qcow2Error::Unknown(_) => false,
    }
}

/// Returns the file that an image names, and its format if the name says it, too;
/// an error if it is none of this host.
fn resolve(image: &Path, name: &str) -> Result<(PathBuf, Option<String>), String> {
    let refused = |why: &str| format!("`{}` needs `{name}`, which {why}", image.display());
    if let Some(json) = name.strip_prefix("json:") {
        return json_file(json).map_err(|why| refused(&why));
    }
    let (local, is_url) = match name.strip_prefix("file:") {
        Some(local) => (local, true),
        None => (name, false),
    };
    let below = Path::new(local);
    // A colon before any slash makes a protocol of what is before it.
    let first = local.split('/').next().unwrap_or_default();
    if first.contains(':') || local.is_empty() {
        return Err(refused("is no file of this host"));
    }
    if below.is_absolute() {
        return Ok((below.to_path_buf(), None));
    }
    if is_url {
        return Err(refused(RELATIVE));
    }
    let place = image.parent().unwrap_or(Path::new("/"));
    Ok((place.join(below), None))
}

/// Returns the format that an image says of the one below it, in two places.
fn same_format(
    name: &str,
    header: Option<String>,
    said: Option<String>,
) -> Result<Option<String>, String> {
    match (header, said) {
        (Some(header), Some(said)) if header != said => {
            Err(format!("`{name}` is said to be {header}, too"))
        }
        (header, said) => Ok(header.or(said)),
    }
}

/// Finds the file in a description of nodes, and its format. Nothing but a format
/// over a file is understood: with any other word it may be a part of that file, or
/// something else altogether, and would be read wrongly in silence.
fn json_file(json: &str) -> Result<(PathBuf, Option<String>), String> {
    let value: Value = serde_json::from_str(json).map_err(|_| "is no JSON".to_owned())?;
    let mut options = BTreeMap::new();
    flatten("", &value, &mut options)?;
    let (mut format, mut file) = (None, None);
    for (key, value) in options {
        match (key.as_str(), value) {
            ("driver", "qcow2" | "raw") => format = Some(value.to_owned()),
            ("file.driver", "file" | "host_device") => {}
            ("file.filename", path) => file = Some(PathBuf::from(path)),
            _ => {
                return Err(format!(
                    "is not a whole file of this host: `{key}` = `{value}`"
                ));
            }
        }
    }
    let file = file.ok_or("is no file of this host")?;
    if file.is_relative() {
        return Err(RELATIVE.to_owned());
    }
    Ok((file, format))
}

/// Writes all values under the names that QEMU gives them: `file.filename`.
fn flatten<'a>(
    prefix: &str,
    value: &'a Value,
    options: &mut BTreeMap<String, &'a str>,
) -> Result<(), String> {
    const STRANGE: &str = "is not a whole file of this host";
    match value {
        Value::Object(members) => members.iter().try_for_each(|(name, inner)| {
            let dot = if prefix.is_empty() { "" } else { "." };
            flatten(&format!("{prefix}{dot}{name}"), inner, options)
        }),
        // Which of two counts is QEMU's to know.
        Value::String(text) if options.insert(prefix.to_owned(), text).is_none() => Ok(()),
        Value::String(_) => Err(format!("{STRANGE}: it says `{prefix}` twice")),
        other => Err(format!("{STRANGE}: `{prefix}` = `{other}`")),
    }
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

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_description_of_nodes_is_a_whole_file_or_is_refused() {
        let whole =
            |json: &str| json_file(json).map(|(path, format)| (path, format.unwrap_or_default()));
        let base = |format: &str| Ok((PathBuf::from("/b"), format.to_owned()));
        for (json, expected) in [
            (
                r#"{"driver":"raw","file":{"driver":"file","filename":"/b"}}"#,
                base("raw"),
            ),
            (
                r#"{"driver":"qcow2","file.driver":"host_device","file.filename":"/b"}"#,
                base("qcow2"),
            ),
            (r#"{"file.filename":"/b"}"#, base("")),
        ] {
            assert_eq!(whole(json), expected, "{json}");
        }
        for json in [
            r#"{"driver":"raw","offset":1048576,"size":4096,"file.driver":"file","file.filename":"/b"}"#,
            r#"{"driver":"raw","offset":"4096","file":{"driver":"file","filename":"/b"}}"#,
            r#"{"driver":"quorum","file.filename":"/b"}"#,
            r#"{"driver":"luks","file":{"driver":"file","filename":"/b"}}"#,
            r#"{"driver":"qcow2","file":{"driver":"raw","file":{"driver":"file","filename":"/b"}}}"#,
            r#"{"driver":"qcow2","file":{"driver":"nbd","filename":"/b"}}"#,
            r#"{"driver":"qcow2","backing":null,"file.filename":"/b"}"#,
            r#"{"driver":"qcow2","data-file.filename":"/c","file.filename":"/b"}"#,
            r#"{"file.filename":"/b","file":{"filename":"/c"}}"#,
            r#"{"driver":"raw","file.filename":"b"}"#,
            r#"{"driver":"raw","file":"node0"}"#,
            r#"{"driver":"raw"}"#,
            r#"["file.filename"]"#,
            "{",
        ] {
            assert!(whole(json).is_err(), "{json}: {:?}", whole(json));
        }
    }

    #[test]
    fn a_file_is_named_by_the_image_that_needs_it() {
        let of = |name: &str| resolve(Path::new("/d/a.qcow2"), name).map(|found| found.0);
        assert_eq!(of("b"), Ok("/d/b".into()));
        assert_eq!(of("s/b:1"), Ok("/d/s/b:1".into()));
        assert_eq!(of("file:/e/b"), Ok("/e/b".into()));
        for strange in ["file:b", "nbd://h/x", "", "file:", "a:b"] {
            assert!(of(strange).is_err(), "{strange}");
        }
    }

    #[test]
    fn a_chain_is_as_it_was_but_for_the_new_mark() {
        let dir = tempfile::tempdir().unwrap();
        let (top, base) = (dir.path().join("top.qcow2"), dir.path().join("base.raw"));
        let run = |args: &[&str]| {
            let done = std::process::Command::new("qemu-img").args(args).status();
            assert!(done.unwrap().success(), "{args:?}");
        };
        let (top_name, base_name) = (top.to_str().unwrap(), base.to_str().unwrap());
        File::create(&base).unwrap().write_all(&[0; 4096]).unwrap();
        run(&[
            "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base_name, top_name,
        ]);
        let look = || Chain::discover(&top, Some("qcow2"));
        let then = look();
        run(&["bitmap", "--add", top_name, "new"]);
        assert!(look().is_still(&then, "new"));
        assert!(!look().is_still(&then, "other"));
        let then = look();
        run(&["bitmap", "--disable", top_name, "new"]);
        assert!(!look().is_still(&then, "other"));
        let then = look();
        File::create(&base).unwrap().write_all(&[0; 8192]).unwrap();
        assert!(!look().is_still(&then, ""));
        let then = look();
        run(&["rebase", "-u", "-b", "", top_name]);
        assert!(!look().is_still(&then, ""));
    }

    /// An image that cannot be read from some place on.
    struct Fails<'a>(&'a File, u64);

    impl ReadAt for Fails<'_> {
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
            if offset >= self.1 {
                return Err(std::io::Error::other("the storage fails"));
            }
            self.0.read_at(offset, buf)
        }

        fn read_up_to(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<usize> {
            self.0.read_up_to(offset, buf)
        }
    }

    #[test]
    fn a_bitmap_that_cannot_be_read_now_is_not_called_broken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        for args in [["create", "-qfqcow2"].as_slice(), &["bitmap", "--add"]] {
            let mut tool = std::process::Command::new("qemu-img");
            let last = if args[0] == "create" { "4M" } else { "mark" };
            assert!(
                tool.args(args)
                    .arg(&path)
                    .arg(last)
                    .status()
                    .unwrap()
                    .success()
            );
        }
        let file = File::open(&path).unwrap();
        let reader = Qcow2Reader::open(&file).unwrap().unwrap();
        let bitmap = reader.bitmaps().unwrap().remove(0);
        let facts = bitmap_facts(&path, &reader, &bitmap, &mut 4096).unwrap();
        assert!(facts.recording && !facts.inconsistent);
        let fails = Qcow2Reader::open(Fails(&file, 65536)).unwrap().unwrap();
        assert!(bitmap_facts(&path, &fails, &bitmap, &mut 4096).is_err());
        assert!(bitmap_facts(&path, &reader, &bitmap, &mut 0).is_err());
    }
}
