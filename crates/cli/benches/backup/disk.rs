//! Disks to back up, and what is written to them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use highwater_testkit::{KIB, Lab, MIB, tool};

/// For tools that move gigabytes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_mins(10);
/// So little may be left: looking for files small enough takes long.
const ROOM_LEFT: u64 = MIB;
/// Fixed, so that the same files make the same file system.
const UUID: &str = "11a7ac1e-5ea0-4b1e-9a7e-0123456789ab";

/// Makes a raw image of `size_bytes` with an ext4 file system that holds
/// `files_bytes` of the machine's own files; returns how much it holds.
pub(crate) fn raw_with_files(image: &Path, size_bytes: u64, files_bytes: u64) -> Result<u64> {
    // Hard links, where that goes: then the files are not copied twice.
    let tree = tempfile::Builder::new()
        .prefix("files-")
        .tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let mut left = files_bytes;
    for (number, from) in sources().iter().enumerate() {
        let to = tree.path().join(number.to_string());
        fs::create_dir(&to)?;
        left = take_files(from, &to, left)?;
    }
    tool("mke2fs")
        .args(["-q", "-t", "ext4", "-U", UUID, "-E"])
        .arg(format!("hash_seed={UUID}"))
        .arg("-d")
        .arg(tree.path())
        .arg(image)
        .arg(format!("{}k", size_bytes / KIB))
        .deadline(PATIENCE)
        .run()?;
    Ok(files_bytes - left)
}

/// As [`raw_with_files`], but a qcow2 image without gaps between its clusters.
pub(crate) fn qcow2_with_files(
    lab: &Lab,
    image: &Path,
    size_bytes: u64,
    files_bytes: u64,
) -> Result<u64> {
    let raw = lab.path("draft.raw");
    let held = raw_with_files(&raw, size_bytes, files_bytes)?;
    tool("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .arg(&raw)
        .arg(image)
        .deadline(PATIENCE)
        .run()?;
    fs::remove_file(raw)?;
    Ok(held)
}

/// Where files are taken from, in this order, until there are enough: the
/// operating system's, then those of a Rust toolchain, which built this.
fn sources() -> Vec<PathBuf> {
    let mut sources = vec![PathBuf::from("/usr"), PathBuf::from("/opt")];
    let home = std::env::var_os("HOME").map(PathBuf::from);
    sources.extend(home.map(|home| home.join(".rustup")));
    sources.retain(|dir| dir.is_dir());
    sources
}

/// Takes files in the order of their names until `room` bytes are used up;
/// returns what is left of them.
fn take_files(from: &Path, to: &Path, mut room: u64) -> Result<u64> {
    if room < ROOM_LEFT {
        return Ok(room);
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        names.push((entry.file_name(), entry.file_type()?));
    }
    names.sort_by(|a, b| a.0.cmp(&b.0));
    for (name, kind) in names {
        let (from, to) = (from.join(&name), to.join(&name));
        if kind.is_dir() {
            fs::create_dir(&to)?;
            room = take_files(&from, &to, room)?;
        } else if kind.is_file() {
            let size = from.metadata()?.len();
            if size <= room {
                if fs::hard_link(&from, &to).is_err() {
                    fs::copy(&from, &to)
                        .with_context(|| format!("cannot copy {}", from.display()))?;
                }
                room -= size;
            }
        }
    }
    Ok(room)
}

/// Blocks for guests to write, each of bytes that no other block has and that
/// cannot be compressed.
pub(crate) struct Blocks {
    dir: PathBuf,
    commands: Vec<String>,
}

impl Blocks {
    /// Makes a block for each place.
    pub(crate) fn make(
        lab: &Lab,
        bytes: u64,
        places: impl Iterator<Item = u64>,
        random: &mut Random,
    ) -> Result<Self> {
        let dir = lab.path("blocks");
        fs::create_dir(&dir)?;
        let mut commands = Vec::new();
        for (number, at) in places.enumerate() {
            let file = dir.join(number.to_string());
            let block: Vec<u8> = (0..bytes / 8)
                .flat_map(|_| random.next().to_le_bytes())
                .collect();
            fs::write(&file, block)?;
            commands.push(format!("write -s {} {at} {bytes}", file.display()));
        }
        Ok(Self { dir, commands })
    }

    /// Returns the commands of `qemu-io` that write them.
    pub(crate) fn commands(&self) -> &[String] {
        &self.commands
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        // The lab takes them with it otherwise.
        fs::remove_dir_all(&self.dir).unwrap_or_default();
    }
}

/// xorshift64*: the same writes in every run, and no two blocks alike.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Returns `count` places among the first `within` bytes, aligned to `bytes`.
    pub(crate) fn places(&mut self, count: u64, bytes: u64, within: u64) -> Vec<u64> {
        (0..count)
            .map(|_| self.next() % (within / bytes) * bytes)
            .collect()
    }
}
