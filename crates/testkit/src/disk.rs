//! The disks of a test VM.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::command::tool;

/// The attribute that puts a disk into the VM's one I/O thread.
pub(crate) const IOTHREAD: &str = "iothread='1'";

/// One disk of a VM to be made; see [`crate::VmBuilder::disk`].
#[derive(Debug, Clone)]
pub struct DiskSpec {
    pub(crate) target: String,
    pub(crate) source: Source,
    pub(crate) error_policy: Option<ErrorPolicy>,
    pub(crate) serial: Option<String>,
    pub(crate) discard: &'static str,
    /// Further attributes of `<driver>`, such as `copy_on_read='on'`.
    pub(crate) driver: String,
    /// Further elements of `<disk>`, such as `<shareable/>` or `<transient/>`.
    pub(crate) elements: String,
}

#[derive(Debug, Clone)]
pub(crate) enum Source {
    Qcow2(Qcow2),
    Raw { size_bytes: u64 },
    Existing { path: PathBuf, format: String },
    Xml(String),
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Qcow2 {
    size_bytes: u64,
    options: Vec<String>,
    has_data_file: bool,
    backing: Option<(PathBuf, String)>,
}

/// What QEMU does when a write fails (`error_policy` of libvirt's `<driver>`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorPolicy {
    /// The VM is paused.
    Stop,
    /// The guest sees the error.
    Report,
    /// The write is lost and nobody is told.
    Ignore,
    /// Paused if the space is used up, reported otherwise; QEMU's default.
    Enospace,
}

impl DiskSpec {
    /// A new qcow2 image: version 3, 64 KiB clusters.
    pub fn qcow2(target: &str, size_bytes: u64) -> Self {
        Self::of(
            target,
            Source::Qcow2(Qcow2 {
                size_bytes,
                ..Qcow2::default()
            }),
        )
    }

    /// A new sparse raw image.
    pub fn raw(target: &str, size_bytes: u64) -> Self {
        Self::of(target, Source::Raw { size_bytes })
    }

    /// An image that is already there, `format` as QEMU calls it.
    pub fn existing(target: &str, path: &Path, format: &str) -> Self {
        Self::of(
            target,
            Source::Existing {
                path: path.to_owned(),
                format: format.to_owned(),
            },
        )
    }

    /// Any other disk: a whole `<disk>` element, or several elements, used as
    /// they stand.
    pub fn raw_xml(target: &str, xml: &str) -> Self {
        Self::of(target, Source::Xml(xml.to_owned()))
    }

    fn of(target: &str, source: Source) -> Self {
        Self {
            target: target.to_owned(),
            source,
            error_policy: None,
            serial: None,
            discard: "unmap",
            driver: String::new(),
            elements: String::new(),
        }
    }

    /// Returns the name it has in the VM.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// Sets the cluster size of a qcow2 image.
    #[must_use]
    pub fn cluster(self, bytes: u64) -> Self {
        self.option(format!("cluster_size={bytes}"))
    }

    /// Makes a qcow2 image with subclusters.
    #[must_use]
    pub fn extended_l2(self) -> Self {
        self.option("extended_l2=on".to_owned())
    }

    /// Makes a qcow2 image of version 2, which has no bitmaps.
    #[must_use]
    pub fn compat_v2(self) -> Self {
        self.option("compat=0.10".to_owned())
    }

    /// Keeps the data of a qcow2 image in a raw file beside it (`data_file_raw`).
    #[must_use]
    pub fn data_file(mut self) -> Self {
        if let Source::Qcow2(qcow2) = &mut self.source {
            qcow2.has_data_file = true;
        }
        self.option("data_file_raw=on".to_owned())
    }

    /// Puts a backing file below a qcow2 image.
    #[must_use]
    pub fn backing(mut self, path: &Path, format: &str) -> Self {
        if let Source::Qcow2(qcow2) = &mut self.source {
            qcow2.backing = Some((path.to_owned(), format.to_owned()));
        }
        self
    }

    /// Adds an option of `qemu-img create -o`.
    #[must_use]
    pub fn option(mut self, option: String) -> Self {
        if let Source::Qcow2(qcow2) = &mut self.source {
            qcow2.options.push(option);
        }
        self
    }

    /// Sets what QEMU does when a write fails.
    #[must_use]
    pub const fn error_policy(mut self, policy: ErrorPolicy) -> Self {
        self.error_policy = Some(policy);
        self
    }

    /// Sets the serial number the guest sees.
    #[must_use]
    pub fn serial(mut self, serial: &str) -> Self {
        self.serial = Some(serial.to_owned());
        self
    }

    /// Lets QEMU ignore discards (its default; a lab disk honours them).
    #[must_use]
    pub const fn discard_ignored(mut self) -> Self {
        self.discard = "ignore";
        self
    }

    /// Adds attributes to libvirt's `<driver>`, such as `copy_on_read='on'`.
    #[must_use]
    pub fn driver(mut self, attributes: &str) -> Self {
        self.driver = format!("{} {attributes}", self.driver);
        self
    }

    /// Has QEMU serve it from a thread of its own.
    #[must_use]
    pub fn iothread(self) -> Self {
        self.driver(IOTHREAD)
    }

    /// Adds an element to libvirt's `<disk>`, such as `<shareable/>`.
    #[must_use]
    pub fn element(mut self, xml: &str) -> Self {
        self.elements.push_str(xml);
        self
    }

    /// Makes the image and returns its path and format, if it has any.
    pub(crate) fn create(&self, dir: &Path, vm: &str) -> Result<Option<(PathBuf, String)>> {
        let name = format!("{vm}-{}", self.target);
        match &self.source {
            Source::Qcow2(qcow2) => {
                let path = dir.join(format!("{name}.qcow2"));
                let data = dir.join(format!("{name}.data"));
                create_qcow2(qcow2, &path, &data)?;
                Ok(Some((path, "qcow2".to_owned())))
            }
            Source::Raw { size_bytes } => {
                let path = dir.join(format!("{name}.raw"));
                fs::File::create(&path)
                    .and_then(|file| file.set_len(*size_bytes))
                    .with_context(|| format!("cannot create {}", path.display()))?;
                Ok(Some((path, "raw".to_owned())))
            }
            Source::Existing { path, format } => Ok(Some((path.clone(), format.clone()))),
            Source::Xml(_) => Ok(None),
        }
    }
}

fn create_qcow2(qcow2: &Qcow2, path: &Path, data: &Path) -> Result<()> {
    let mut create = tool("qemu-img").args(["create", "-q", "-f", "qcow2"]);
    for option in &qcow2.options {
        create = create.args(["-o", option]);
    }
    if qcow2.has_data_file {
        create = create.args(["-o", &format!("data_file={}", data.display())]);
    }
    if let Some((backing, format)) = &qcow2.backing {
        create = create.args(["-F", format, "-b"]).arg(backing);
    }
    create.arg(path).arg(qcow2.size_bytes.to_string()).run()?;
    Ok(())
}
