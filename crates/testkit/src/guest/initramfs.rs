//! An initial file system as the kernel reads it: a cpio archive ("newc").

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// An archive being made, in memory: it ends up in a guest's memory anyway.
#[derive(Debug, Default)]
pub(super) struct Initramfs {
    bytes: Vec<u8>,
    directories: Vec<PathBuf>,
    entries: u32,
}

const FILE: u32 = 0o100_755;
const DIRECTORY: u32 = 0o040_755;

impl Initramfs {
    /// Adds a file, and the directories above it.
    pub(super) fn add(&mut self, path: &str, content: &[u8]) -> Result<()> {
        self.add_parents(Path::new(path))?;
        self.entry(path, FILE, content)
    }

    /// Adds a file of this machine under the same or another path.
    pub(super) fn add_file(&mut self, path: &str, from: &Path) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.add(path, &content)
    }

    /// Ends the archive.
    pub(super) fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.bytes)
    }

    fn add_parents(&mut self, path: &Path) -> Result<()> {
        let mut parents: Vec<_> = path.ancestors().skip(1).map(Path::to_owned).collect();
        parents.reverse();
        for parent in parents {
            let is_root = parent.as_os_str().is_empty() || parent == Path::new("/");
            if !is_root && !self.directories.contains(&parent) {
                let name = parent.to_str().context("not a UTF-8 path")?.to_owned();
                self.entry(&name, DIRECTORY, &[])?;
                self.directories.push(parent);
            }
        }
        Ok(())
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let name = path.trim_start_matches('/');
        self.entries += 1;
        let links = 1;
        write!(
            self.bytes,
            "070701{:08x}{mode:08x}{:08x}{:08x}{links:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}",
            self.entries,
            0, // user
            0, // group
            0, // time
            u32::try_from(content.len())?,
            0, // device, major and minor
            0,
            0, // device of a special file, likewise
            0,
            name.len() + 1,
            0, // checksum, unused in this variant
        )?;
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
