//! A huge qcow2 image with little pieces of data all over it, made in seconds.
//!
//! The file is laid out here, number by number after QEMU's
//! `docs/interop/qcow2.rst`: writing the pieces through QEMU would take minutes,
//! and the code under test must not make what it is tested with.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

const CLUSTER: u64 = 64 << 10;
/// Entries of 8 bytes in one L2 table.
const ENTRIES: u64 = CLUSTER / 8;
/// Refcounts of 16 bits in one block.
const REFCOUNTS: u64 = CLUSTER / 2;
/// The refcount is exactly one.
const COPIED: u64 = 1 << 63;
/// Bytes of data in each piece; the rest of its cluster is zero.
const PIECE: usize = 4096;

/// What lies where in the image.
#[derive(Debug, Clone, Copy)]
pub struct Scattered {
    /// Size of the disk, a multiple of 64 KiB.
    pub size_bytes: u64,
    /// How many clusters have data: one in each stretch of equal length, at a
    /// place within it that looks random.
    pub pieces: u64,
}

impl Scattered {
    /// Returns where a piece lies on the disk.
    pub fn place(&self, piece: u64) -> u64 {
        let stretch = self.size_bytes / CLUSTER / self.pieces;
        (piece * stretch + mix(piece) % stretch) * CLUSTER + mix(!piece) % 16 * PIECE as u64
    }

    /// Writes the image.
    pub fn write(&self, path: &Path) -> Result<()> {
        ensure!(
            self.size_bytes.is_multiple_of(CLUSTER) && self.size_bytes / CLUSTER >= self.pieces,
            "{self:?} has no room for its pieces"
        );
        let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
        let tables = self.size_bytes.div_ceil(CLUSTER * ENTRIES);
        let l1_clusters = (tables * 8).div_ceil(CLUSTER);
        // Header, refcount table, L1, all L2 tables, data, refcount blocks: so
        // nothing before the blocks depends on their number.
        let (l1, l2) = (2, 2 + l1_clusters);
        let data = l2 + tables;
        let blocks = data + self.pieces;
        let count = (blocks + blocks / REFCOUNTS + 1).div_ceil(REFCOUNTS);
        ensure!(count <= ENTRIES, "{self:?} needs a longer refcount table");
        let total = blocks + count;
        file.set_len(total * CLUSTER)?;
        file.write_all_at(&self.header(tables, l1), 0)?;
        let at = |cluster: u64| cluster * CLUSTER;
        file.write_all_at(&entries((0..count).map(|n| at(blocks + n))), at(1))?;
        file.write_all_at(&entries((0..tables).map(|n| at(l2 + n) | COPIED)), at(l1))?;
        for block in 0..count {
            let used = total.saturating_sub(block * REFCOUNTS).min(REFCOUNTS);
            let ones = 1_u16.to_be_bytes().repeat(usize::try_from(used)?);
            file.write_all_at(&ones, at(blocks + block))?;
        }
        for piece in 0..self.pieces {
            let place = self.place(piece);
            let entry = at(l2) + place / CLUSTER * 8;
            file.write_all_at(&(at(data + piece) | COPIED).to_be_bytes(), entry)?;
            let bytes = content(piece);
            file.write_all_at(&bytes, at(data + piece) + place % CLUSTER)?;
        }
        Ok(())
    }

    fn header(&self, tables: u64, l1: u64) -> Vec<u8> {
        let words: [&[u8]; 15] = [
            b"QFI\xfb",
            &3_u32.to_be_bytes(),
            &[0; 12],
            &16_u32.to_be_bytes(),
            &self.size_bytes.to_be_bytes(),
            &[0; 4],
            &u32::try_from(tables).unwrap_or(u32::MAX).to_be_bytes(),
            &(l1 * CLUSTER).to_be_bytes(),
            &CLUSTER.to_be_bytes(),
            &1_u32.to_be_bytes(),
            &[0; 12],
            // No features of any kind.
            &[0; 24],
            // Refcounts of 16 bits, a header of 104 bytes, no extensions.
            &4_u32.to_be_bytes(),
            &104_u32.to_be_bytes(),
            &[0; 8],
        ];
        words.concat()
    }
}

fn entries(values: impl Iterator<Item = u64>) -> Vec<u8> {
    values.flat_map(u64::to_be_bytes).collect()
}

/// Returns bytes that no other piece has and no compressor shrinks much.
fn content(piece: u64) -> Vec<u8> {
    let mut bytes = vec![0; PIECE];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&piece.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

/// The finalizer of splitmix64: the same places in every run.
fn mix(number: u64) -> u64 {
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::tool;

    #[test]
    fn qemu_finds_nothing_wrong_with_it_and_every_piece_in_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        let disk = Scattered {
            size_bytes: 1 << 40,
            pieces: 40_000,
        };
        disk.write(&path).unwrap();
        tool("qemu-img")
            .args(["check", "-q"])
            .arg(&path)
            .run()
            .unwrap();
        let map = tool("qemu-img")
            .args(["map", "--output=json"])
            .arg(&path)
            .run()
            .unwrap();
        let map: serde_json::Value = serde_json::from_str(&map).unwrap();
        // QEMU may tell the holes within a cluster of the file, too.
        let mut found: Vec<u64> = map
            .as_array()
            .unwrap()
            .iter()
            .filter(|extent| extent["data"] == true)
            .flat_map(|extent| {
                let start = extent["start"].as_u64().unwrap();
                let end = start + extent["length"].as_u64().unwrap();
                start / CLUSTER..end.div_ceil(CLUSTER)
            })
            .collect();
        found.dedup();
        let wanted: Vec<u64> = (0..disk.pieces)
            .map(|piece| disk.place(piece) / CLUSTER)
            .collect();
        assert!(found == wanted);
    }
}
