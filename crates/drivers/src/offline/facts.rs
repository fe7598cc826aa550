//! Facts about the disks of a VM that is off.

use std::path::PathBuf;

use highwater_hypervisor::{
    DiskFacts, DiskSource, MarkSupport, NoMarks, RootNode, WriteErrorPolicy,
};

use super::image::Chain;

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
