//! Whatever store call fails, and however: every restore point that was
//! committed is whole, nothing else is visible, and the next save succeeds.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test may panic"
)]

mod support;

use std::sync::Arc;

use highwater_repo::{Manifest, RepoError, RepoErrorKind, Repository};
use highwater_store::testing::{Fault, FaultyStore, MemStore};
use highwater_store::{LocalStore, ObjectKind, Store};
use support::*;

/// What became of one backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Committed,
    Unknown,
    Failed,
}

/// The two backups of the workload, as their images should read.
struct Images {
    first: Vec<u8>,
    second: Vec<u8>,
}

impl Images {
    /// Large enough for several packs.
    fn several_packs() -> Self {
        Self::of(100)
    }

    fn of(chunks: u64) -> Self {
        let first = image(1, chunks);
        let mut second = first.clone();
        for index in [0, 7, 8, chunks - 1] {
            let at = usize::try_from(index).unwrap() * CHUNK;
            second[at..at + CHUNK].copy_from_slice(&noise(900 + index, CHUNK));
        }
        Self { first, second }
    }

    /// By time taken, which tells the backups apart.
    fn of_point(&self, point: &Manifest) -> &[u8] {
        match point.taken_at.unix_ms() {
            1 => &self.first,
            2 => &self.second,
            other => panic!("a point nobody made: {other}"),
        }
    }
}

/// Makes a repository, backs up twice, the second time an increment if there
/// is something to build on. Goes on after failures, as the next run would.
fn workload(store: Arc<dyn Store>, images: &Images) -> [Outcome; 2] {
    let mut outcomes = [Outcome::Failed; 2];
    let Ok(repo) = init(store, Some(key_file())) else {
        return outcomes;
    };
    let first = backup(&repo, 1, None, images, &mut outcomes[0]);
    backup(&repo, 2, first.as_ref(), images, &mut outcomes[1]);
    outcomes
}

fn backup(
    repo: &Repository,
    at: i64,
    parent: Option<&Manifest>,
    images: &Images,
    outcome: &mut Outcome,
) -> Option<Manifest> {
    let attempt = || -> Result<Manifest, RepoError> {
        let writer = repo.writer(options())?;
        let root = match (at, parent) {
            (1, _) => store_full(&writer, &images.first)?,
            (_, None) => store_full(&writer, &images.second)?,
            (_, Some(parent)) => store_changes(
                &writer,
                &parent.disks[0].image,
                &images.first,
                &images.second,
            )?,
        };
        commit(writer.flush()?, "a", at, root)
    };
    let result = attempt();
    *outcome = match &result {
        Ok(_) => Outcome::Committed,
        Err(error) if error.kind() == RepoErrorKind::CommitUnknown => Outcome::Unknown,
        Err(_) => Outcome::Failed,
    };
    result.ok()
}

/// The claim of this file, for one failed workload.
fn check_survivor(survivor: Arc<dyn Store>, outcomes: [Outcome; 2], images: &Images, fault: Fault) {
    let repo = match Repository::open(Arc::clone(&survivor), Some(&key_file())) {
        Ok(repo) => repo,
        Err(error) => {
            assert_eq!(
                error.kind(),
                RepoErrorKind::NoRepository,
                "{fault:?}: {error:?}"
            );
            assert_eq!(outcomes, [Outcome::Failed; 2], "{fault:?}");
            init(survivor, Some(key_file())).expect("the next init succeeds")
        }
    };
    let list = repo.points_of(&vm("a")).unwrap();
    assert!(list.damaged.is_empty(), "{fault:?}: {:?}", list.damaged);
    for (at, outcome) in (1..).zip(outcomes) {
        let found = list
            .points
            .iter()
            .filter(|point| point.taken_at.unix_ms() == at)
            .count();
        match outcome {
            Outcome::Committed => assert_eq!(found, 1, "{fault:?}: backup {at} is lost"),
            Outcome::Failed => assert_eq!(found, 0, "{fault:?}: backup {at} was not committed"),
            Outcome::Unknown => assert!(found <= 1, "{fault:?}: backup {at}"),
        }
    }
    for point in &list.points {
        let bytes = read(&repo, &point.disks[0].image);
        let bytes = bytes.unwrap_or_else(|error| panic!("{fault:?}: a point is broken: {error:?}"));
        assert!(
            bytes == images.of_point(point),
            "{fault:?}: a point reads wrong"
        );
    }
    let next = save(&repo, "a", 3, &images.second).expect("the next save succeeds");
    assert!(
        read(&repo, &next.disks[0].image).unwrap() == images.second,
        "{fault:?}"
    );
}

#[test]
fn a_save_cut_off_at_any_store_call_leaves_the_repository_whole() {
    cut_off_anywhere(MemStore::default);
}

#[test]
fn a_save_into_a_store_of_whole_objects_cut_off_at_any_call_leaves_the_repository_whole() {
    cut_off_anywhere(MemStore::of_whole_objects);
}

fn cut_off_anywhere(empty: fn() -> MemStore) {
    let images = Images::several_packs();
    let healthy = Arc::new(FaultyStore::new(empty(), Fault::Never));
    assert_eq!(workload(healthy.clone(), &images), [Outcome::Committed; 2]);
    let calls = healthy.calls();
    assert!(
        calls >= 20,
        "the workload has many calls to cut at, not {calls}"
    );
    for n in 0..calls {
        for fault in [Fault::Call(n), Fault::From(n)] {
            let memory = empty();
            let outcomes = workload(Arc::new(FaultyStore::new(memory.clone(), fault)), &images);
            assert!(
                fault == Fault::Call(n) || outcomes[1] != Outcome::Committed,
                "{fault:?}"
            );
            check_survivor(Arc::new(memory), outcomes, &images, fault);
        }
    }
}

#[test]
fn a_write_of_unknown_outcome_never_loses_a_committed_point() {
    let images = Images::several_packs();
    let healthy = Arc::new(FaultyStore::new(MemStore::default(), Fault::Never));
    workload(healthy.clone(), &images);
    let mut unknown = 0;
    for n in 0..healthy.puts() {
        for fault in [Fault::PutDoneButFailed(n), Fault::PutLostButUnknown(n)] {
            let memory = MemStore::default();
            let outcomes = workload(Arc::new(FaultyStore::new(memory.clone(), fault)), &images);
            unknown += outcomes
                .iter()
                .filter(|outcome| **outcome == Outcome::Unknown)
                .count();
            check_survivor(Arc::new(memory), outcomes, &images, fault);
        }
    }
    assert_eq!(
        unknown, 4,
        "both manifests, done and not done, and nothing else"
    );
}

#[test]
fn a_save_into_a_directory_cut_off_at_any_call_leaves_the_repository_whole() {
    let images = Images::of(9);
    // Nobody pulls the plug here, so that a file system in memory, where syncs
    // cost nothing, does as well.
    let memory = std::path::Path::new("/dev/shm");
    let folder = || match tempfile::tempdir_in(memory) {
        Ok(folder) => folder,
        Err(_) => tempfile::tempdir().unwrap(),
    };
    let counted = folder();
    let healthy = Arc::new(FaultyStore::new(
        LocalStore::new(counted.path()),
        Fault::Never,
    ));
    assert_eq!(workload(healthy.clone(), &images), [Outcome::Committed; 2]);
    let faults = (0..healthy.calls()).flat_map(|n| [Fault::Call(n), Fault::From(n)]);
    for fault in faults.chain((0..healthy.puts()).map(Fault::PutDoneButFailed)) {
        let place = folder();
        let store = FaultyStore::new(LocalStore::new(place.path()), fault);
        let outcomes = workload(Arc::new(store), &images);
        check_survivor(
            Arc::new(LocalStore::new(place.path())),
            outcomes,
            &images,
            fault,
        );
    }
}

#[test]
fn packs_and_index_are_stored_before_the_manifest_that_needs_them() {
    let store = Arc::new(MemStore::default());
    let repo = init(store.clone(), None).unwrap();
    let kinds = |kind| store.keys().iter().filter(|key| key.kind() == kind).count();
    let writer = repo.writer(options()).unwrap();
    let root = store_full(&writer, &image(1, 100)).unwrap();
    let flushed = writer.flush().unwrap();
    assert!(kinds(ObjectKind::Pack) >= 3, "two of chunks, one of pages");
    assert_eq!((kinds(ObjectKind::Index), kinds(ObjectKind::Point)), (1, 0));
    let before = store.keys().len();
    commit(flushed, "a", 1, root).unwrap();
    assert_eq!(
        (kinds(ObjectKind::Point), store.keys().len()),
        (1, before + 1)
    );
}

#[test]
fn a_failed_upload_fails_everything_after_it() {
    let memory = MemStore::default();
    init(Arc::new(memory.clone()), None).unwrap();
    // Opening takes two calls; then packs are begun, written and stored.
    for n in 2..9 {
        let store = Arc::new(FaultyStore::new(memory.fork(), Fault::Call(n)));
        let repo = Repository::open(store, None).unwrap();
        let writer = repo.writer(options()).unwrap();
        let stored = store_full(&writer, &image(1, 100));
        let committed = stored.and_then(|root| commit(writer.flush()?, "a", 1, root));
        assert_eq!(
            committed.map(drop).unwrap_err().kind(),
            RepoErrorKind::Store,
            "call {n}"
        );
        assert_eq!(repo.points().unwrap().points, []);
    }
}

#[test]
fn a_chunk_that_could_not_be_written_is_never_taken_for_known() {
    let memory = MemStore::default();
    init(Arc::new(memory.clone()), None).unwrap();
    let mut met = 0;
    for n in 2..12 {
        let store = Arc::new(FaultyStore::new(memory.fork(), Fault::Call(n)));
        let repo = Repository::open(store, None).unwrap();
        let writer = repo.writer(options()).unwrap();
        let mut lane = writer.lane();
        let chunks = 0..30;
        let failed = |at: &u64| lane.add(&noise(*at, CHUNK)).is_err();
        let Some(at) = chunks.into_iter().find(failed) else {
            continue;
        };
        met += 1;
        // Whoever tries the same chunk again, in this lane or another one.
        assert!(lane.add(&noise(at, CHUNK)).is_err(), "call {n}");
        assert!(writer.lane().add(&noise(at, CHUNK)).is_err(), "call {n}");
        drop(lane);
        assert!(writer.flush().is_err(), "call {n}");
    }
    assert!(met >= 3, "the faults hit the packs");
}

#[test]
fn a_tree_that_met_an_error_cannot_be_finished() {
    let memory = MemStore::default();
    let bytes = image(1, 200);
    let repo = init(Arc::new(memory.clone()), None).unwrap();
    let parent = save(&repo, "a", 1, &bytes).unwrap().disks[0].image;
    let mut met = 0;
    for n in 4..12 {
        let store = Arc::new(FaultyStore::new(memory.fork(), Fault::Call(n)));
        let repo = Repository::open(store, None).unwrap();
        let writer = repo.writer(options()).unwrap();
        let mut tree = writer.tree(Some(&parent), parent.size_bytes).unwrap();
        let failed = [3, 70, 140]
            .map(|at| tree.set(at, None))
            .iter()
            .any(Result::is_err);
        assert_eq!(tree.finish().is_err(), failed, "call {n}");
        met += u32::from(failed);
    }
    assert!(met >= 3, "the faults hit the tree");
}
