//! Scratch files that libvirt cannot make as they are needed: reserved, or
//! encrypted without stopping the guest.
//!
//! Where a disk's `error_policy` is `report` or `ignore`, a full scratch file
//! costs the guest its writes (tested: `ignore` lost 173 of 200 silently), so
//! such a disk gets a scratch file that cannot run full. libvirt cannot make
//! one. qcow2's own preallocation is of no use: it marks every cluster as
//! written, and QEMU would read zeroes from the scratch file where it must read
//! the disk. What is reserved is therefore the *file*: an empty qcow2 whose
//! blocks beyond its end are set aside by the file system.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use highwater_hypervisor::{ErrorKind, HypervisorError};
use highwater_model::Nonce;
use rustix::fs::FallocateFlags;

use crate::host::User;

pub(crate) const CLUSTER_BYTES: u64 = 64 << 10;
/// Bits of the cluster size, as the header wants it.
const CLUSTER_BITS: u32 = 16;
/// An entry of the L1, L2 and refcount tables has eight bytes.
const ENTRIES_PER_CLUSTER: u64 = CLUSTER_BYTES / 8;
/// A reference count has two bytes.
const REFCOUNTS_PER_CLUSTER: u64 = CLUSTER_BYTES / 2;
/// Room for the key slots of an encrypted file: 2 MiB, and some to spare.
const LUKS_HEADER_CLUSTERS: u64 = 64;
/// No VM has a larger disk; keeps every sum below within 64 bits.
const DISK_BYTES_MAX: u64 = 1 << 52;

/// How an empty qcow2 for a disk of some size is laid out: header, refcount
/// table, refcount block, L1 table, one or more clusters each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Layout {
    size_bytes: u64,
    l1_entries: u64,
    l1_clusters: u64,
}

impl Layout {
    fn of(size_bytes: u64) -> Option<Self> {
        if size_bytes > DISK_BYTES_MAX {
            return None;
        }
        let l1_entries = size_bytes
            .div_ceil(CLUSTER_BYTES)
            .div_ceil(ENTRIES_PER_CLUSTER);
        let layout = Self {
            size_bytes,
            l1_entries,
            l1_clusters: l1_entries.div_ceil(ENTRIES_PER_CLUSTER).max(1),
        };
        // All that exists at first must fit the one refcount block.
        (layout.clusters_at_first() <= REFCOUNTS_PER_CLUSTER).then_some(layout)
    }

    fn clusters_at_first(self) -> u64 {
        self.l1_clusters.saturating_add(3)
    }

    /// Length of the file when every cluster of the disk was copied into it.
    fn bytes_when_full(self) -> u64 {
        let data = self.size_bytes.div_ceil(CLUSTER_BYTES);
        let clusters = data
            .saturating_add(self.l1_entries)
            .saturating_add(self.clusters_at_first())
            .saturating_add(LUKS_HEADER_CLUSTERS);
        // Counting the counts: one more block than needed covers the blocks themselves
        // up to 2 GiB of them.
        let refcount_blocks = clusters
            .div_ceil(REFCOUNTS_PER_CLUSTER)
            .saturating_mul(2)
            .saturating_add(2);
        clusters
            .saturating_add(refcount_blocks)
            .saturating_mul(CLUSTER_BYTES)
    }
}

/// Returns how much space a reserved scratch file for a disk takes.
pub(crate) fn reserved_bytes(size_bytes: u64) -> u64 {
    Layout::of(size_bytes).map_or(u64::MAX, Layout::bytes_when_full)
}

/// A scratch file that is not reserved needs room for what the guest overwrites
/// while the backup runs. Nobody knows how much; a sixteenth of the disks, at
/// most 4 GiB, is refused to start with, since it would hardly ever do.
const ROOM_DIVISOR: u64 = 16;
const ROOM_BYTES_MAX: u64 = 4 << 30;
/// The session is given up while this part of that room is left, so that its
/// end comes before the files are full.
const RESERVE_DIVISOR: u64 = 4;

/// Returns how much room there must be for scratch files that grow.
pub(crate) fn room_bytes(disks_bytes: u64) -> u64 {
    (disks_bytes / ROOM_DIVISOR).min(ROOM_BYTES_MAX)
}

/// Returns with how much of that room left the session is given up.
pub(crate) fn reserve_bytes(room_bytes: u64) -> u64 {
    room_bytes / RESERVE_DIVISOR
}

/// Returns the size of a disk's scratch image: QEMU rounds the size of a raw
/// image up to whole sectors.
pub(crate) fn image_bytes(disk_bytes: u64) -> u64 {
    disk_bytes.div_ceil(512).saturating_mul(512)
}

/// Whether all space a file may ever need is set aside at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Space {
    /// It cannot run full.
    Reserved,
    /// It grows.
    AsNeeded,
}

/// Creates an empty qcow2 of `size_bytes` (a multiple of 512) for QEMU's user;
/// encrypted if there is a file with a key.
pub(crate) fn create(
    path: &Path,
    size_bytes: u64,
    space: Space,
    key: Option<&Path>,
    qemu: Option<&User>,
) -> Result<(), HypervisorError> {
    let failed = |because: String| {
        HypervisorError::new(
            ErrorKind::Scratch,
            format!("cannot create scratch file `{}`", path.display()),
        )
        .because(because)
    };
    let layout =
        Layout::of(size_bytes).ok_or_else(|| failed("the disk is too large".to_owned()))?;
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| failed(error.to_string()))?;
    match key {
        None => write_empty(&file, layout).map_err(|error| failed(error.to_string()))?,
        Some(key) => write_encrypted(path, size_bytes, key).map_err(failed)?,
    }
    // Last: writing an image anew gives reserved blocks back.
    if space == Space::Reserved {
        let length = layout.bytes_when_full();
        rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 0, length)
            .map_err(|error| failed(error.to_string()))?;
    }
    if let Some(qemu) = qemu.filter(|_| rustix::process::geteuid().is_root()) {
        std::os::unix::fs::fchown(&file, Some(qemu.uid), Some(qemu.gid))
            .map_err(|error| failed(error.to_string()))?;
    }
    Ok(())
}

/// Draws a key for the encrypted files of one session.
pub(crate) fn new_key() -> String {
    format!("{}{}", Nonce::random(), Nonce::random())
}

/// Puts the key where `qemu-img` finds it while the files are made.
pub(crate) fn write_key(path: &Path, value: &str) -> Result<(), HypervisorError> {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    file.and_then(|mut file| file.write_all(value.as_bytes()))
        .map_err(|error| key_trouble(path, &error))
}

/// Removes it again.
pub(crate) fn remove_key(path: &Path) -> Result<(), HypervisorError> {
    std::fs::remove_file(path).map_err(|error| key_trouble(path, &error))
}

fn key_trouble(path: &Path, error: &io::Error) -> HypervisorError {
    HypervisorError::new(
        ErrorKind::Scratch,
        format!("cannot keep a key in `{}` for a moment", path.display()),
    )
    .because(error.to_string())
}

/// Has `qemu-img`, which is there wherever libvirt runs QEMU, write an image
/// with LUKS into the file.
///
/// The key is random, so that deriving it slowly would protect nothing; the
/// 2 s that QEMU takes by default for that would be spent with the guest stopped
/// (measured: 4 s for each disk), and again when it opens the file.
fn write_encrypted(path: &Path, size_bytes: u64, key: &Path) -> Result<(), String> {
    // A comma would begin another option; QEMU wants it doubled.
    let key = key.display().to_string().replace(',', ",,");
    let outcome = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "--object"])
        .arg(format!("secret,id=key,file={key}"))
        .args([
            "-o",
            "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10",
        ])
        .arg(path)
        .arg(size_bytes.to_string())
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot run qemu-img: {error}"))?;
    if outcome.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&outcome.stderr).trim().to_owned())
}

/// Writes the image (qcow2 version 3, no features).
fn write_empty(mut file: &File, layout: Layout) -> io::Result<()> {
    const REFCOUNT_TABLE: u64 = CLUSTER_BYTES;
    const REFCOUNT_BLOCK: u64 = 2 * CLUSTER_BYTES;
    const L1_TABLE: u64 = 3 * CLUSTER_BYTES;
    let mut header = Vec::with_capacity(104);
    header.extend(0x5146_49fb_u32.to_be_bytes());
    header.extend(3_u32.to_be_bytes());
    header.extend(0_u64.to_be_bytes()); // no backing file name: QEMU is told it
    header.extend(0_u32.to_be_bytes());
    header.extend(CLUSTER_BITS.to_be_bytes());
    header.extend(layout.size_bytes.to_be_bytes());
    header.extend(0_u32.to_be_bytes()); // not encrypted
    header.extend(
        u32::try_from(layout.l1_entries)
            .unwrap_or(u32::MAX)
            .to_be_bytes(),
    );
    header.extend(L1_TABLE.to_be_bytes());
    header.extend(REFCOUNT_TABLE.to_be_bytes());
    header.extend(1_u32.to_be_bytes());
    header.extend(0_u32.to_be_bytes()); // no internal snapshots
    header.extend(0_u64.to_be_bytes());
    header.extend([0_u8; 24]); // no features of any kind
    header.extend(4_u32.to_be_bytes()); // counts of 1 << 4 bits
    header.extend(104_u32.to_be_bytes()); // length of this header
    let mut image = header;
    let resize =
        |image: &mut Vec<u8>, at: u64| image.resize(usize::try_from(at).unwrap_or_default(), 0);
    resize(&mut image, REFCOUNT_TABLE);
    image.extend(REFCOUNT_BLOCK.to_be_bytes());
    resize(&mut image, REFCOUNT_BLOCK);
    for _ in 0..layout.clusters_at_first() {
        image.extend(1_u16.to_be_bytes());
    }
    resize(
        &mut image,
        layout.clusters_at_first().saturating_mul(CLUSTER_BYTES),
    );
    file.write_all(&image)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn qemu_finds_a_reserved_scratch_file_whole_empty_and_of_the_right_size() {
        let dir = tempfile::tempdir().unwrap();
        for size in [512, 64 << 20, (512 << 20) + 512, 40 << 40] {
            let path = dir.path().join("scratch");
            let layout = Layout::of(size).unwrap();
            write_empty(&File::create(&path).unwrap(), layout).unwrap();
            let tool = |arguments: &[&str]| {
                let outcome = Command::new("qemu-img")
                    .args(arguments)
                    .arg(&path)
                    .output()
                    .expect("qemu-img must be installed");
                assert!(outcome.status.success(), "{size}: {outcome:?}");
                String::from_utf8(outcome.stdout).unwrap()
            };
            tool(&["check", "-q", "-f", "qcow2"]);
            let info = tool(&["info", "-f", "qcow2", "--output=json"]);
            assert!(
                info.contains(&format!("\"virtual-size\": {size},")),
                "{info}"
            );
        }
    }

    #[test]
    fn the_space_of_the_whole_disk_is_reserved_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scratch");
        create(&path, 8 << 20, Space::Reserved, None, None).unwrap();
        let found = std::fs::metadata(&path).unwrap();
        assert!(found.blocks() * 512 >= 8 << 20);
        assert!(found.blocks() * 512 >= reserved_bytes(8 << 20));
    }

    #[test]
    fn a_size_beyond_reason_is_refused() {
        assert_eq!(Layout::of(u64::MAX), None);
        assert_eq!(reserved_bytes(u64::MAX), u64::MAX);
    }
}
