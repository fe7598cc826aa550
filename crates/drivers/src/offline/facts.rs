//! Facts about the disks of a VM that is off.

use std::path::{Path, PathBuf};

use highwater_hypervisor::{
    DiskFacts, DiskSource, MarkSupport, NoMarks, RootNode, WriteErrorPolicy,
};

use super::image::Chain;
use crate::host;

/// A disk of a VM that is off, as its definition or its user names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OffDisk {
    pub(crate) target: String,
    pub(crate) serial: Option<String>,
    pub(crate) device: Option<String>,
    /// Whether the two above are known.
    pub(crate) device_known: bool,
    pub(crate) source: DiskSource,
    /// The topmost image; the text says why there is none on this host.
    pub(crate) top: Result<PathBuf, String>,
    /// Format of the topmost image, if somebody says it.
    pub(crate) format: Option<String>,
    pub(crate) write_errors: WriteErrorPolicy,
    /// Whether the definition says that it is encrypted.
    pub(crate) encrypted: bool,
    /// What the definition says of its images.
    pub(crate) stated: Option<Stated>,
}

/// What a definition says of a disk's images. Where it says something it is
/// believed at the start of the VM, whatever the images themselves say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stated {
    /// Topmost first; those that are left out are found from the last one.
    pub(crate) images: Vec<StatedImage>,
    /// Whether the last one has no backing file.
    pub(crate) ends: bool,
}

/// What a definition says of one image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StatedImage {
    /// `None` if it is no file of this host.
    pub(crate) file: Option<PathBuf>,
    pub(crate) format: String,
    /// The file with its data, if one is named.
    pub(crate) data_file: StatedData,
}

/// What a definition says of an image's data file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum StatedData {
    /// Nothing: the image says it.
    Unsaid,
    /// It is this one.
    File(PathBuf),
    /// It is none of this host.
    Elsewhere,
}

impl Stated {
    /// Says what the images say otherwise, if they do.
    fn contradicted(&self, chain: &Chain) -> Option<String> {
        let differs = |image: &str| {
            Some(format!(
                "its definition names other backing or data files than `{image}` does"
            ))
        };
        let mut above = "the image".to_owned();
        for (place, stated) in self.images.iter().enumerate() {
            let Some(image) = chain.images.get(place) else {
                return differs(&above);
            };
            // The topmost one is where the definition says.
            let is_same = place == 0
                || (is_file(stated.file.as_ref(), &image.path)
                    && stated.format == image.format_name());
            let data_is_same = match (&stated.data_file, &image.data_file) {
                (StatedData::Unsaid, _) => true,
                (StatedData::File(stated), Some((found, _))) => is_file(Some(stated), found),
                (StatedData::File(_), None) | (StatedData::Elsewhere, _) => false,
            };
            if !is_same {
                return differs(&above);
            }
            above = image.path.display().to_string();
            if !data_is_same {
                return differs(&above);
            }
        }
        if self.ends && chain.images.len() > self.images.len() {
            return differs(&above);
        }
        None
    }
}

/// Whether two names are of one file.
fn is_file(stated: Option<&PathBuf>, found: &Path) -> bool {
    let inode = |path: &Path| host::file_identity(path).map(|found| found.inode);
    stated.is_some_and(|stated| {
        stated == found || inode(stated).is_some_and(|it| inode(found) == Some(it))
    })
}

impl OffDisk {
    /// Looks at its images.
    pub(crate) fn chain(&self) -> Chain {
        match &self.top {
            Ok(top) => Chain::discover(top, self.format.as_deref()),
            Err(why) => Chain {
                images: Vec::new(),
                links: Vec::new(),
                size_bytes: 0,
                unreadable: Some(why.clone()),
            },
        }
    }

    /// Reports the disk.
    pub(crate) fn facts(&self) -> DiskFacts {
        let chain = self.chain();
        let encrypted = self.encrypted || is_encrypted(&chain);
        let format = chain.top().map(|top| top.format_name().to_owned());
        DiskFacts {
            target: self.target.clone(),
            serial: self.serial.clone(),
            device: self.device.clone(),
            device_known: self.device_known,
            source: self.source.clone(),
            format: format
                .or_else(|| self.format.clone())
                .unwrap_or("raw".to_owned()),
            size_bytes: chain.size_bytes,
            file_bytes: chain.links.first().and_then(|link| link.file_bytes),
            marks: mark_support(&chain),
            bitmaps: chain
                .images
                .iter()
                .flat_map(|image| image.bitmaps.iter().cloned())
                .collect(),
            root_node: match why_not(self, &chain) {
                None => RootNode::Same,
                Some(why) => RootNode::Unknown(why),
            },
            write_errors: self.write_errors,
            encrypted,
            counters: None,
            chain: chain.links,
        }
    }
}

/// Says why a disk cannot be exported, if it cannot.
pub(crate) fn why_not(disk: &OffDisk, chain: &Chain) -> Option<String> {
    if let Some(why) = &chain.unreadable {
        return Some(why.clone());
    }
    let contradicted = disk.stated.as_ref().and_then(|it| it.contradicted(chain));
    if contradicted.is_some() {
        return contradicted;
    }
    // Whoever started the VM had the key; here nobody has.
    (disk.encrypted || is_encrypted(chain)).then(|| {
        "it is encrypted, and its key is used only while the VM runs; \
         start the VM, or back it up with `--start-paused`"
            .to_owned()
    })
}

fn is_encrypted(chain: &Chain) -> bool {
    chain.images.iter().any(super::image::Image::is_encrypted)
}

fn mark_support(chain: &Chain) -> MarkSupport {
    match chain.top().map(|top| top.header()) {
        Some(Some(header)) if header.version == 2 => MarkSupport::No(NoMarks::Qcow2Version2),
        Some(Some(_)) => MarkSupport::Yes,
        Some(None) | None => MarkSupport::No(NoMarks::NotQcow2),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write as _;

    use super::*;

    /// Backs `above` with `below`, without a look at either.
    fn overlay(above: &Path, below: &Path) {
        let made = std::process::Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
            .args([below, above])
            .status();
        assert!(made.unwrap().success());
    }

    #[test]
    fn a_disk_whose_definition_names_other_images_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["base.raw", "other.raw"] {
            File::create(at(name))
                .unwrap()
                .write_all(&[0; 4096])
                .unwrap();
        }
        std::os::unix::fs::symlink(at("base.raw"), at("link")).unwrap();
        overlay(&at("top.qcow2"), &at("base.raw"));
        let image = |name: &str, format: &str| StatedImage {
            file: Some(at(name)),
            format: format.to_owned(),
            data_file: StatedData::Unsaid,
        };
        let refused = |below: Option<StatedImage>, ends| {
            let images = std::iter::once(image("top.qcow2", "qcow2")).chain(below);
            let disk = OffDisk {
                target: "vda".to_owned(),
                serial: None,
                device: None,
                device_known: true,
                source: DiskSource::File(at("top.qcow2")),
                top: Ok(at("top.qcow2")),
                format: Some("qcow2".to_owned()),
                write_errors: WriteErrorPolicy::Pause,
                encrypted: false,
                stated: Some(Stated {
                    images: images.collect(),
                    ends,
                }),
            };
            matches!(disk.facts().root_node, RootNode::Unknown(why) if why.contains("definition"))
        };
        assert!(!refused(None, false));
        // An overlay that libvirt is told to use without what is below it.
        assert!(refused(None, true));
        for ends in [false, true] {
            assert!(!refused(Some(image("base.raw", "raw")), ends));
            assert!(!refused(Some(image("link", "raw")), ends));
            assert!(refused(Some(image("base.raw", "qcow2")), ends));
            assert!(refused(Some(image("other.raw", "raw")), ends));
            assert!(refused(Some(image("nowhere", "raw")), ends));
        }
        let mut data = image("base.raw", "raw");
        data.data_file = StatedData::File(at("other.raw"));
        assert!(refused(Some(data), true));
    }
}
