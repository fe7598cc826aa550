//! What an increment costs besides the changed bytes themselves.

#![allow(
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "a test may panic and print"
)]

mod support;

use std::sync::Arc;

use highwater_model::ObjectId;
use highwater_repo::{ImageRoot, Repository, WriterStats};
use highwater_store::ObjectKind;
use highwater_store::testing::MemStore;
use support::*;

const DIRTY: u64 = 16_384;
const DIRTY_BYTES: u64 = DIRTY * CHUNK as u64;
/// A tree of three full levels, so that scattered writes pay for most pages.
const CHUNKS: u64 = 64 * DIRTY;

/// Makes an image of which every chunk is present. The chunks need not exist
/// to count what their tree costs.
fn full_tree(repo: &Repository) -> ImageRoot {
    let writer = repo.writer(options()).unwrap();
    let mut tree = writer.tree(None, CHUNKS * CHUNK as u64).unwrap();
    for index in 0..CHUNKS {
        let id = ObjectId::from_bytes(blake3::hash(&index.to_le_bytes()).into());
        tree.set(index, Some(id)).unwrap();
    }
    let root = tree.finish().unwrap();
    writer.flush().unwrap();
    root
}

/// Stores an increment; returns all bytes it added but the chunks' payloads.
fn metadata_of(dirty: impl Iterator<Item = u64>) -> u64 {
    let store = Arc::new(MemStore::default());
    let repo = init(store.clone(), Some(key_file())).unwrap();
    let parent = full_tree(&repo);
    let total = || -> u64 {
        let stored = |kind| highwater_store::Store::list(store.as_ref(), kind, "").unwrap();
        let both = [ObjectKind::Pack, ObjectKind::Index]
            .into_iter()
            .flat_map(stored);
        both.map(|object| object.len).sum()
    };
    let before = total();
    let writer = repo.writer(options()).unwrap();
    let mut tree = writer.tree(Some(&parent), parent.size_bytes).unwrap();
    let mut lane = writer.lane();
    let mut chunk = vec![7; CHUNK];
    let mut payload = 0;
    for index in dirty {
        // New, but quick to compress.
        chunk[..8].copy_from_slice(&(index + 1).to_le_bytes());
        let added = lane.add(&chunk).unwrap();
        // Record header and tag are metadata.
        payload += added.stored_bytes - 60;
        tree.set(index, added.id).unwrap();
    }
    drop(lane);
    tree.finish().unwrap();
    let stats: WriterStats = writer.flush().unwrap().stats();
    assert_eq!(stats.new_chunks, DIRTY);
    total() - before - payload
}

#[test]
fn metadata_of_scattered_writes_is_at_most_seven_percent() {
    let metadata = metadata_of((0..DIRTY).map(|n| n * 64 + n % 64));
    println!(
        "scattered: {metadata} bytes, {:.2} %",
        100.0 * metadata as f64 / DIRTY_BYTES as f64
    );
    assert!(
        metadata <= DIRTY_BYTES * 7 / 100 + (256 << 10),
        "{metadata} bytes"
    );
}

#[test]
fn metadata_of_sequential_writes_is_at_most_a_quarter_percent() {
    let metadata = metadata_of(1000..1000 + DIRTY);
    println!(
        "sequential: {metadata} bytes, {:.3} %",
        100.0 * metadata as f64 / DIRTY_BYTES as f64
    );
    assert!(metadata <= DIRTY_BYTES / 400, "{metadata} bytes");
}

#[test]
fn a_small_change_costs_little_whatever_the_size_of_the_disk() {
    let store = Arc::new(MemStore::default());
    let repo = init(store.clone(), None).unwrap();
    let parent = full_tree(&repo);
    let writer = repo.writer(options()).unwrap();
    let mut tree = writer.tree(Some(&parent), parent.size_bytes).unwrap();
    tree.set(5, writer.lane().add(&noise(1, CHUNK)).unwrap().id)
        .unwrap();
    tree.finish().unwrap();
    let stats = writer.flush().unwrap().stats();
    // Four pages on the way, one record, one block of the index.
    assert!(stats.stored_bytes_pages <= 4 * 2200, "{stats:?}");
    assert!(stats.stored_bytes_index <= 5000, "{stats:?}");
}
