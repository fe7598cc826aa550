//! A qcow2 image whose layout is fixed before its first byte is written.
//!
//! The set of chunks with data is known from the tree, so every cluster's
//! place follows by counting: header, refcount table, refcount blocks, L1
//! table, L2 tables, then the data in the order of the disk. Numbers and names
//! are those of QEMU's `docs/interop/qcow2.rst` (version 3).

use std::io;

use highwater_model::ChunkSize;

use crate::ChunkSet;

/// 64 KiB: QEMU's default, and never larger than a chunk.
const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// 8-byte entries in one cluster of an L1, L2 or refcount table.
const ENTRIES: u64 = CLUSTER / 8;
/// 16-bit refcounts (`refcount_order` 4) in one refcount block.
const REFCOUNTS: u64 = CLUSTER / 2;
/// Bit 63 of L1 and L2 entries: the refcount is exactly one.
const COPIED: u64 = 1 << 63;
/// Bytes of the version 3 header with the compression type field.
const HEADER_BYTES: u32 = 112;

/// Where everything lies in a qcow2 image of a known set of chunks.
#[derive(Debug)]
pub struct Qcow2Layout {
    size_bytes: u64,
    clusters_per_chunk: u64,
    chunks: ChunkSet,
    refcount_table_clusters: u64,
    refcount_blocks: u64,
    l1_clusters: u64,
    /// For each L1 entry the number of L2 tables before it, and whether it has one.
    l2: ChunkSet,
    l1_entries: u64,
}

impl Qcow2Layout {
    /// Lays out an image of `size_bytes` with data at `chunks`.
    pub fn new(size_bytes: u64, chunk_size: ChunkSize, chunks: ChunkSet) -> Self {
        let clusters_per_chunk = chunk_size.bytes() / CLUSTER;
        let chunks_per_l2 = ENTRIES / clusters_per_chunk;
        let l1_entries = chunk_size.count(size_bytes).div_ceil(chunks_per_l2);
        let mut l2 = crate::ChunkSetBuilder::new(l1_entries.max(1));
        for entry in 0..l1_entries {
            if chunks.rank((entry + 1) * chunks_per_l2) > chunks.rank(entry * chunks_per_l2) {
                l2.insert(entry);
            }
        }
        let mut layout = Self {
            size_bytes,
            clusters_per_chunk,
            chunks,
            refcount_table_clusters: 0,
            refcount_blocks: 0,
            l1_clusters: (l1_entries * 8).div_ceil(CLUSTER),
            l2: l2.build(),
            l1_entries,
        };
        // The refcount blocks count themselves, so their number is a fixed
        // point; it grows at most a few times.
        loop {
            let blocks = layout.total_clusters().div_ceil(REFCOUNTS);
            let tables = (blocks * 8).div_ceil(CLUSTER);
            if (blocks, tables) == (layout.refcount_blocks, layout.refcount_table_clusters) {
                return layout;
            }
            layout.refcount_blocks = blocks;
            layout.refcount_table_clusters = tables;
        }
    }

    /// Returns the length of the whole file, bytes.
    pub fn file_bytes(&self) -> u64 {
        self.total_clusters() * CLUSTER
    }

    /// Returns where a chunk's data belongs in the file, or `None` if the
    /// image has no data there.
    pub fn data_offset(&self, chunk: u64) -> Option<u64> {
        self.chunks.contains(chunk).then(|| {
            let place = self.chunks.rank(chunk) * self.clusters_per_chunk;
            (self.data_start() + place) * CLUSTER
        })
    }

    /// Hands everything but the data to `write` as (offset, bytes), in
    /// ascending order and in pieces of one cluster.
    pub fn write_metadata(
        &self,
        mut write: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        write(0, &self.header())?;
        write_table(1, self.refcount_blocks, &mut write, |block| {
            (1 + self.refcount_table_clusters + block) * CLUSTER
        })?;
        let first_block = 1 + self.refcount_table_clusters;
        for block in 0..self.refcount_blocks {
            let used = self
                .total_clusters()
                .saturating_sub(block * REFCOUNTS)
                .min(REFCOUNTS);
            let used = usize::try_from(used).expect("at most 32768");
            write(
                (first_block + block) * CLUSTER,
                &1_u16.to_be_bytes().repeat(used),
            )?;
        }
        write_table(self.l1_start(), self.l1_entries, &mut write, |entry| {
            let table = (self.l2_start() + self.l2.rank(entry)) * CLUSTER;
            if self.l2.contains(entry) {
                table | COPIED
            } else {
                0
            }
        })?;
        let chunks_per_l2 = ENTRIES / self.clusters_per_chunk;
        let mut table = Vec::new();
        let present = (0..self.l1_entries).filter(|entry| self.l2.contains(*entry));
        for (number, entry) in (self.l2_start()..).zip(present) {
            table.clear();
            for chunk in entry * chunks_per_l2..(entry + 1) * chunks_per_l2 {
                let start = self.data_offset(chunk);
                for cluster in 0..self.clusters_per_chunk {
                    let entry = start.map_or(0, |start| (start + cluster * CLUSTER) | COPIED);
                    table.extend_from_slice(&entry.to_be_bytes());
                }
            }
            write(number * CLUSTER, &table)?;
        }
        Ok(())
    }

    fn header(&self) -> Vec<u8> {
        let mut header = Vec::with_capacity(128);
        let mut put = |bytes: &[u8]| header.extend_from_slice(bytes);
        put(b"QFI\xfb");
        put(&3_u32.to_be_bytes()); // version
        put(&0_u64.to_be_bytes()); // backing_file_offset
        put(&0_u32.to_be_bytes()); // backing_file_size
        put(&CLUSTER_BITS.to_be_bytes());
        put(&self.size_bytes.to_be_bytes());
        put(&0_u32.to_be_bytes()); // crypt_method
        put(&u32::try_from(self.l1_entries)
            .expect("16 EiB have 2^35 L2 tables at most, QEMU stops far earlier")
            .to_be_bytes());
        put(&(self.l1_start() * CLUSTER).to_be_bytes());
        put(&CLUSTER.to_be_bytes()); // refcount_table_offset: right after the header
        let table = u32::try_from(self.refcount_table_clusters).expect("few clusters");
        put(&table.to_be_bytes());
        put(&0_u32.to_be_bytes()); // nb_snapshots
        put(&0_u64.to_be_bytes()); // snapshots_offset
        put(&0_u64.to_be_bytes()); // incompatible_features
        put(&0_u64.to_be_bytes()); // compatible_features
        put(&0_u64.to_be_bytes()); // autoclear_features
        put(&4_u32.to_be_bytes()); // refcount_order: 16 bits
        put(&HEADER_BYTES.to_be_bytes());
        put(&[0; 8]); // compression_type deflate, padding
        put(&[0; 8]); // end of header extensions
        header
    }

    fn total_clusters(&self) -> u64 {
        self.data_start() + self.chunks.len() * self.clusters_per_chunk
    }

    fn l1_start(&self) -> u64 {
        1 + self.refcount_table_clusters + self.refcount_blocks
    }

    fn l2_start(&self) -> u64 {
        self.l1_start() + self.l1_clusters
    }

    fn data_start(&self) -> u64 {
        self.l2_start() + self.l2.len()
    }
}

fn write_table(
    first_cluster: u64,
    entries: u64,
    write: &mut impl FnMut(u64, &[u8]) -> io::Result<()>,
    entry: impl Fn(u64) -> u64,
) -> io::Result<()> {
    for piece in 0..entries.div_ceil(ENTRIES) {
        let range = piece * ENTRIES..entries.min((piece + 1) * ENTRIES);
        let bytes: Vec<u8> = range
            .flat_map(|number| entry(number).to_be_bytes())
            .collect();
        write((first_cluster + piece) * CLUSTER, &bytes)?;
    }
    Ok(())
}
