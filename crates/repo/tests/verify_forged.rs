//! Objects whose every hash is right and that are wrong nevertheless: bytes that
//! changed in memory before they were hashed, or a writer with a bug.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test may panic"
)]

mod support;

use std::sync::Arc;

use highwater_repo::{Repository, VerifyDepth, VerifyOptions, VerifyReport};
use highwater_store::testing::MemStore;
use highwater_store::{ObjectKey, ObjectKind, Store};
use support::*;

/// One point of a short image: one pack of chunks, one of pages, one index file.
fn small() -> MemStore {
    let store = MemStore::default();
    let repo = init(Arc::new(store.clone()), None).unwrap();
    save(
        &repo,
        "a",
        1,
        &[noise(1, CHUNK), noise(2, CHUNK), noise(3, 90)].concat(),
    )
    .unwrap();
    store
}

fn keys_of(store: &MemStore, kind: ObjectKind) -> Vec<ObjectKey> {
    let mut keys = store.keys();
    keys.retain(|key| key.kind() == kind);
    keys
}

/// Puts an object under the name that its new content has.
fn rename(store: &MemStore, old: &ObjectKey, bytes: &[u8]) -> ObjectKey {
    store.delete(old).unwrap();
    let name = blake3::hash(bytes).to_hex().to_string();
    let key = ObjectKey::new(old.kind(), name).unwrap();
    store.put(&key, &[bytes]).unwrap();
    key
}

/// Changes the only index file, and makes its hashes right again.
fn forge_index(store: &MemStore, change: impl FnOnce(&mut Vec<u8>)) -> ObjectKey {
    let key = keys_of(store, ObjectKind::Index).remove(0);
    let mut bytes = store.bytes(&key).unwrap();
    change(&mut bytes);
    // One block at the end, as few objects are there.
    let block = bytes.len() - 4096;
    let hash = blake3::hash(&bytes[block..block + 4064]);
    bytes[block + 4064..].copy_from_slice(hash.as_bytes());
    let tables = [&bytes[..24], &bytes[64..block]].concat();
    bytes[24..56].copy_from_slice(blake3::hash(&tables).as_bytes());
    rename(store, &key, &bytes)
}

fn verify(store: &MemStore, depth: VerifyDepth) -> VerifyReport {
    let options = VerifyOptions {
        points: None,
        depth,
        threads: 1,
        progress: &|_| true,
    };
    let repo = Repository::open(Arc::new(store.clone()), None).unwrap();
    repo.verify(&options).unwrap()
}

fn named(report: &VerifyReport) -> Vec<String> {
    let objects = report
        .damage
        .iter()
        .map(|damage| damage.object.path.clone());
    objects.map(Option::unwrap_or_default).collect()
}

#[test]
fn a_record_that_was_wrong_before_its_pack_was_hashed_is_found_by_opening_it() {
    let store = small();
    let is_chunks = |key: &ObjectKey| store.bytes(key).unwrap()[7] == 1;
    let pack = keys_of(&store, ObjectKind::Pack)
        .into_iter()
        .find(is_chunks)
        .unwrap();
    let mut bytes = store.bytes(&pack).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    let forged = rename(&store, &pack, &bytes);
    let id = |key: &ObjectKey| blake3::Hash::from_hex(key.name()).unwrap();
    forge_index(&store, |index| {
        let old = *id(&pack).as_bytes();
        let at = index.windows(32).position(|bytes| bytes == old).unwrap();
        index[at..at + 32].copy_from_slice(id(&forged).as_bytes());
    });
    assert!(
        verify(&store, VerifyDepth::Structure).is_clean(),
        "no hash is wrong"
    );
    let report = verify(&store, VerifyDepth::Data);
    assert_eq!(named(&report), [forged.path()]);
    assert!(
        report.damage[0].what.starts_with("1 of its 3 records"),
        "{report:?}"
    );
    assert_eq!(report.damage[0].points[0].disks[0].bytes, 90);
}

#[test]
fn rows_that_show_each_others_places_are_found_by_reading_and_blamed_on_the_index() {
    let store = small();
    // Exchanges offset and lengths of the first two rows of full chunks.
    let index = forge_index(&store, |index| {
        let block = index.len() - 4096;
        let rows = index[block..block + 4064].chunks_exact(48);
        let is_full = |row: &[u8]| row[44..48] == 65536_u32.to_le_bytes();
        let full: Vec<usize> = rows
            .enumerate()
            .filter(|(_, row)| is_full(row))
            .map(|(at, _)| at)
            .collect();
        let (one, two) = (block + full[0] * 48, block + full[1] * 48);
        for at in 36..48 {
            index.swap(one + at, two + at);
        }
    });
    let report = verify(&store, VerifyDepth::Data);
    assert_eq!(named(&report), [index.path()]);
    assert_eq!(report.damage[0].points[0].disks[0].bytes, 2 * CHUNK as u64);
}

#[test]
fn a_row_that_leads_out_of_its_pack_is_found_without_reading_data() {
    let store = small();
    let index = forge_index(&store, |index| {
        let block = index.len() - 4096;
        index[block + 36..block + 40].copy_from_slice(&u32::MAX.to_le_bytes());
    });
    let report = verify(&store, VerifyDepth::Structure);
    assert!(named(&report).contains(&index.path()), "{report:?}");
    assert!(
        report.damage.iter().any(|damage| !damage.points.is_empty()),
        "{report:?}"
    );
}

#[test]
fn a_short_chunk_is_not_taken_for_whole_where_the_disk_has_grown() {
    let store = MemStore::default();
    let repo = init(Arc::new(store.clone()), None).unwrap();
    let (full, short) = (noise(1, CHUNK), noise(2, 90));
    save(&repo, "a", 1, &[full.as_slice(), &short].concat()).unwrap();
    // The same leaf in a larger image, where its second chunk is not the last.
    let writer = repo.writer(options()).unwrap();
    let mut tree = writer.tree(None, 200 * CHUNK as u64).unwrap();
    let mut lane = writer.lane();
    for (index, chunk) in [(0, &full), (1, &short), (150, &full)] {
        tree.set(index, lane.add(chunk).unwrap().id).unwrap();
    }
    drop(lane);
    let root = tree.finish().unwrap();
    let grown = commit(writer.flush().unwrap(), "a", 2, root).unwrap();
    let report = verify(&store, VerifyDepth::Structure);
    let [damage] = report.damage.as_slice() else {
        panic!("{report:?}")
    };
    let [point] = damage.points.as_slice() else {
        panic!("{report:?}")
    };
    assert_eq!(point.point, grown.point.to_string());
    let chunk = CHUNK as u64;
    assert_eq!(
        (point.disks[0].ranges[0].start(), point.disks[0].bytes),
        (chunk, chunk)
    );
}
