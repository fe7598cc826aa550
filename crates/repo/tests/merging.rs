//! Small index files become few: without a lost row, whatever is cut off, and
//! whoever else reads or merges meanwhile.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test may panic"
)]

mod support;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use highwater_repo::{ImageRoot, Manifest, RepoErrorKind, Repository};
use highwater_store::testing::{Fault, FaultyStore, MemStore};
use highwater_store::{Listed, ObjectKey, ObjectKind, Store, StoreError};
use support::*;

/// Backups that make just enough index files for a merge.
const SAVES: i64 = 8;

fn bytes_of(save: i64) -> Vec<u8> {
    noise(u64::try_from(save).unwrap(), 2 * CHUNK)
}

fn save_some(repo: &Repository, saves: std::ops::Range<i64>) {
    saves.for_each(|at| drop(save(repo, "a", at, &bytes_of(at)).unwrap()));
}

/// A repository with enough small index files to merge.
fn many_files() -> MemStore {
    let store = MemStore::default();
    let repo = init(Arc::new(store.clone()), None).unwrap();
    save_some(&repo, 0..SAVES);
    store
}

fn open(store: &MemStore) -> Repository {
    Repository::open(Arc::new(store.clone()), None).unwrap()
}

fn index_files(store: &MemStore) -> Vec<ObjectKey> {
    let mut keys = store.keys();
    keys.retain(|key| key.kind() == ObjectKind::Index);
    keys
}

/// Fails unless every point reads as it was saved, by a reader who knows nothing.
fn check_all(store: &MemStore, saves: i64, context: &str) {
    let repo = open(store);
    let points = repo.points().unwrap().points;
    assert_eq!(i64::try_from(points.len()).unwrap(), saves, "{context}");
    for point in &points {
        check_point(&repo, point, context);
    }
    assert!(repo.damaged_indexes().is_empty(), "{context}");
}

fn check_point(repo: &Repository, point: &Manifest, context: &str) {
    let found = read(repo, &point.disks[0].image);
    let found = found.unwrap_or_else(|error| panic!("{context}: {error:?}"));
    assert!(found == bytes_of(point.taken_at.unix_ms()), "{context}");
}

#[test]
fn many_small_index_files_become_one_that_shows_the_same() {
    let store = many_files();
    assert_eq!(open(&store).merge_index().unwrap(), 8);
    assert_eq!(index_files(&store).len(), 1);
    check_all(&store, SAVES, "merged");
    assert_eq!(
        open(&store).merge_index().unwrap(),
        0,
        "there is nothing left to do"
    );
    let again = open(&store);
    let writer = again.writer(options()).unwrap();
    store_full(&writer, &bytes_of(3)).unwrap();
    assert_eq!(writer.flush().unwrap().stats().new_chunks, 0);
}

#[test]
fn a_merge_cut_off_at_any_store_call_loses_no_row() {
    let before = many_files();
    let healthy = Arc::new(FaultyStore::new(before.fork(), Fault::Never));
    let repo = Repository::open(healthy.clone(), None).unwrap();
    let opened = healthy.calls();
    assert_eq!(repo.merge_index().unwrap(), 8);
    assert!(
        healthy.calls() - opened >= 18,
        "a list, 8 reads, a put, 8 deletes"
    );
    let calls = opened..healthy.calls();
    let faults = calls.flat_map(|n| [Fault::Call(n), Fault::From(n)]);
    for fault in faults.chain([Fault::PutDoneButFailed(0), Fault::PutLostButUnknown(0)]) {
        let memory = before.fork();
        let store = Arc::new(FaultyStore::new(memory.clone(), fault));
        let repo = Repository::open(store, None).unwrap();
        assert!(repo.merge_index().is_err(), "{fault:?} was not noticed");
        check_all(&memory, SAVES, &format!("{fault:?}"));
        // The next one ends what this one began.
        save_some(&open(&memory), SAVES..2 * SAVES);
        open(&memory).merge_index().unwrap();
        assert_eq!(index_files(&memory).len(), 1, "{fault:?}");
        check_all(&memory, 2 * SAVES, &format!("{fault:?}, merged again"));
    }
}

/// Lets something else happen before one of its calls.
struct Hooked {
    inner: MemStore,
    calls: AtomicU64,
    at: u64,
    hook: Box<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for Hooked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hooked")
    }
}

impl Hooked {
    fn new(inner: &MemStore, at: u64, hook: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            inner: inner.clone(),
            calls: AtomicU64::new(0),
            at,
            hook: Box::new(hook),
        })
    }

    fn count(&self) {
        if self.calls.fetch_add(1, Ordering::SeqCst) == self.at {
            (self.hook)();
        }
    }
}

impl Store for Hooked {
    fn prepare(&self) -> Result<(), StoreError> {
        self.inner.prepare()
    }
    fn put(&self, key: &ObjectKey, parts: &[&[u8]]) -> Result<(), StoreError> {
        self.count();
        self.inner.put(key, parts)
    }
    fn get(&self, key: &ObjectKey, max_bytes: u64) -> Result<Vec<u8>, StoreError> {
        self.count();
        self.inner.get(key, max_bytes)
    }
    fn get_range(&self, key: &ObjectKey, offset: u64, into: &mut [u8]) -> Result<(), StoreError> {
        self.count();
        self.inner.get_range(key, offset, into)
    }
    fn list(&self, kind: ObjectKind, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        self.count();
        self.inner.list(kind, prefix)
    }
    fn size(&self, key: &ObjectKey) -> Result<u64, StoreError> {
        self.count();
        self.inner.size(key)
    }
    fn delete(&self, key: &ObjectKey) -> Result<(), StoreError> {
        self.count();
        self.inner.delete(key)
    }
    fn location(&self) -> String {
        self.inner.location()
    }
}

#[test]
fn two_hosts_that_merge_at_the_same_time_lose_no_row() {
    let before = many_files();
    for at in 0_u64.. {
        let memory = before.fork();
        let other = memory.clone();
        // The other host backs up first, so that it merges more than we have seen.
        let hook = move || {
            let repo = open(&other);
            save_some(&repo, SAVES..SAVES + 1);
            repo.merge_index().unwrap();
        };
        let store = Hooked::new(&memory, at, hook);
        let repo = Repository::open(store.clone(), None).unwrap();
        repo.merge_index().unwrap();
        let was_reached = store.calls.load(Ordering::SeqCst) > at;
        check_all(
            &memory,
            SAVES + i64::from(was_reached),
            &format!("call {at}"),
        );
        if !was_reached {
            assert!(at >= 18, "only {at} calls");
            return;
        }
    }
}

#[test]
fn a_reader_whose_index_files_are_merged_away_meanwhile_reads_on() {
    let before = many_files();
    let point = open(&before).points().unwrap().points.remove(5);
    let root: ImageRoot = point.disks[0].image;
    for at in 0_u64.. {
        let memory = before.fork();
        let other = memory.clone();
        let store = Hooked::new(&memory, at, move || {
            assert_eq!(open(&other).merge_index().unwrap(), 8);
        });
        let repo = Repository::open(store.clone(), None).unwrap();
        let found = read(&repo, &root).unwrap_or_else(|error| panic!("call {at}: {error:?}"));
        assert!(found == bytes_of(5), "call {at}");
        if store.calls.load(Ordering::SeqCst) <= at {
            assert!(at >= 6, "only {at} calls");
            return;
        }
    }
}

#[test]
fn a_writer_whose_index_file_is_merged_away_at_once_commits_its_point() {
    let before = many_files();
    let mut merged_own = 0;
    for at in 0..60 {
        let memory = before.fork();
        let other = memory.clone();
        let store = Hooked::new(&memory, at, move || {
            open(&other).merge_index().unwrap();
        });
        let repo = Repository::open(store, None).unwrap();
        save(&repo, "a", SAVES, &bytes_of(SAVES)).unwrap_or_else(|error| panic!("{at}: {error:?}"));
        // Merged before it was written, or with it, or never.
        merged_own += usize::from(index_files(&memory).len() == 1);
        check_all(&memory, SAVES + 1, &format!("merged at call {at}"));
    }
    assert!(merged_own > 0, "the writer's own file was never merged");
}

#[test]
fn a_repository_that_has_gone_is_not_called_damaged() {
    let store = many_files();
    let repo = open(&store);
    let points = repo.points().unwrap().points;
    for key in store.keys() {
        store.delete(&key).unwrap();
    }
    let error = read(&repo, &points[0].disks[0].image).unwrap_err();
    assert_eq!(error.kind(), RepoErrorKind::Store, "{error:?}");
}

#[test]
fn a_merge_keeps_every_copy_of_an_object() {
    // One object in two packs: whichever of them gets lost, the other must be found.
    for lost in 0..2 {
        let store = MemStore::default();
        let first = init(Arc::new(store.clone()), None).unwrap();
        let second = open(&store);
        // Both before the other's index is seen, as two hosts do.
        let writers = [&first, &second].map(|repo| repo.writer(options()).unwrap());
        let bytes = bytes_of(0);
        let flushed = writers.map(|writer| {
            let root = store_full(&writer, &bytes).unwrap();
            (root, writer)
        });
        let mut packs: Vec<BTreeSet<ObjectKey>> = Vec::new();
        for ((root, writer), at) in flushed.into_iter().zip([0, 0]) {
            let before: BTreeSet<ObjectKey> = store.keys().into_iter().collect();
            commit(writer.flush().unwrap(), "a", at, root).unwrap();
            let new = store.keys().into_iter().filter(|key| !before.contains(key));
            packs.push(new.filter(|key| key.kind() == ObjectKind::Pack).collect());
        }
        assert!(packs.iter().all(|packs| packs.len() == 2), "each stored it");
        save_some(&first, 2..SAVES);
        assert_eq!(open(&store).merge_index().unwrap(), 8);
        packs[lost]
            .iter()
            .for_each(|key| store.delete(key).unwrap());
        check_all(&store, SAVES, &format!("the packs of save {lost} are lost"));
    }
}

#[test]
fn a_damaged_index_file_is_not_merged_away() {
    let store = many_files();
    save_some(&open(&store), SAVES..SAVES + 1);
    let damaged = index_files(&store).remove(3);
    let mut bytes = store.bytes(&damaged).unwrap();
    let last = bytes.len() - 50;
    bytes[last] ^= 1;
    store.damage(&damaged, &bytes);
    let repo = open(&store);
    assert_eq!(repo.merge_index().unwrap(), 8);
    assert_eq!(repo.damaged_indexes().len(), 1);
    assert!(
        index_files(&store).contains(&damaged),
        "it is what repair starts from"
    );
}

#[test]
fn nothing_is_deleted_for_a_merged_file_that_is_damaged() {
    let store = many_files();
    let elsewhere = store.fork();
    open(&elsewhere).merge_index().unwrap();
    let merged = index_files(&elsewhere).remove(0);
    let len = elsewhere.bytes(&merged).unwrap().len();
    // As if we had died after the put, and the file had been damaged since.
    store.damage(&merged, &vec![0; len]);
    let error = open(&store).merge_index().unwrap_err();
    assert_eq!(error.kind(), RepoErrorKind::Damaged);
    assert_eq!(index_files(&store).len(), 9);
}

#[test]
fn opening_and_finding_the_parent_cost_the_same_after_a_thousand_backups() {
    let store = MemStore::default();
    let repo = init(Arc::new(store.clone()), None).unwrap();
    let cost = || {
        let counted = Arc::new(FaultyStore::new(store.clone(), Fault::Never));
        let repo = Repository::open(counted.clone(), None).unwrap();
        let ids = repo.point_ids(&vm("a")).unwrap();
        let newest = repo.manifest(&vm("a"), *ids.last().unwrap()).unwrap();
        let image = repo.image(&newest.disks[0].image).unwrap();
        image.chunks().next().unwrap().unwrap();
        counted.calls()
    };
    let mut costs = Vec::new();
    for at in 1..=1000 {
        save_some(&repo, at..at + 1);
        repo.merge_index().unwrap();
        costs.push(cost());
    }
    let small = costs[..50].iter().max().unwrap();
    let large = costs[950..].iter().max().unwrap();
    println!("calls: {small} at most among the first 50, {large} among the last");
    assert!(
        index_files(&store).len() <= 30,
        "{}",
        index_files(&store).len()
    );
    // An index file that is looked into costs two calls.
    assert!(*large <= small + 2 * 14, "{large} calls instead of {small}");
}

#[test]
fn an_index_file_of_an_unknown_version_is_not_used() {
    let store = many_files();
    for key in index_files(&store) {
        let mut bytes = store.bytes(&key).unwrap();
        bytes[6] = 3;
        store.damage(&key, &bytes);
    }
    let repo = open(&store);
    let point = repo.points().unwrap().points.remove(0);
    let error = read(&repo, &point.disks[0].image).unwrap_err();
    assert_eq!(error.kind(), RepoErrorKind::Damaged);
    assert!(
        repo.damaged_indexes()
            .iter()
            .all(|file| file.why.contains("version"))
    );
}
