//! Making, opening, saving, reading back.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test may panic"
)]

mod support;

use std::sync::Arc;

use highwater_repo::{
    Compression, RepoErrorKind, Repository, Secret, SecretKind, VmIdentity, WriterOptions,
};
use highwater_store::testing::MemStore;
use highwater_store::{LocalStore, ObjectKind, Store, StoreErrorKind};
use support::*;

fn passphrase(text: &str) -> Secret {
    Secret::Passphrase(text.as_bytes().to_vec().into())
}

#[test]
fn what_is_saved_is_read_back_however_it_was_compressed_and_sealed() {
    for secret in [None, Some(key_file())] {
        for compression in [Compression::None, Compression::Lz4, Compression::Zstd(3)] {
            let store = Arc::new(MemStore::default());
            let repo = init(store.clone(), secret.clone()).unwrap();
            let bytes = image(1, 130);
            let writer = repo
                .writer(WriterOptions {
                    compression,
                    ..options()
                })
                .unwrap();
            let root = store_full(&writer, &bytes).unwrap();
            commit(writer.flush().unwrap(), "a", 1, root).unwrap();

            let again = Repository::open(store, secret.as_ref()).unwrap();
            let points = again.points().unwrap();
            assert_eq!(points.points.len(), 1);
            assert_eq!(
                read(&again, &points.points[0].disks[0].image).unwrap(),
                bytes
            );
        }
    }
}

#[test]
fn a_directory_holds_a_repository() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("repo");
    let repo = init(Arc::new(LocalStore::new(&path)), Some(key_file())).unwrap();
    let bytes = image(7, 70);
    let saved = save(&repo, "a", 1, &bytes).unwrap();
    let again = Repository::open(Arc::new(LocalStore::new(&path)), Some(&key_file())).unwrap();
    assert!(
        again
            .points_of(&vm("a"))
            .unwrap()
            .points
            .iter()
            .eq([&saved])
    );
    assert!(again.has_point(&vm("a"), saved.point).unwrap());
    assert!(!again.has_point(&vm("b"), saved.point).unwrap());
    assert_eq!(read(&again, &saved.disks[0].image).unwrap(), bytes);
}

#[test]
fn a_repository_opens_with_its_own_secret_only() {
    let store: Arc<dyn Store> = Arc::new(MemStore::default());
    let kind = |outcome: Result<Repository, _>| {
        outcome
            .map(|_| ())
            .map_err(|e: highwater_repo::RepoError| e.kind())
    };
    assert_eq!(
        Repository::secret_kinds(store.as_ref()).unwrap_err().kind(),
        RepoErrorKind::NoRepository
    );
    let repo = init(Arc::clone(&store), Some(passphrase("right"))).unwrap();
    assert!(repo.is_encrypted());
    let open = |secret: Option<&Secret>| kind(Repository::open(Arc::clone(&store), secret));
    assert_eq!(open(Some(&passphrase("right"))), Ok(()));
    assert_eq!(
        open(Some(&passphrase("wrong"))),
        Err(RepoErrorKind::WrongKey)
    );
    assert_eq!(open(Some(&key_file())), Err(RepoErrorKind::WrongKey));
    assert_eq!(open(None), Err(RepoErrorKind::SecretNeeded));
    assert_eq!(
        Repository::secret_kinds(store.as_ref()).unwrap(),
        [SecretKind::Passphrase]
    );
    assert_eq!(
        kind(init(Arc::clone(&store), Some(passphrase("right")))),
        Err(RepoErrorKind::AlreadyExists)
    );
}

#[test]
fn a_secret_for_a_plain_repository_is_refused() {
    let store: Arc<dyn Store> = Arc::new(MemStore::default());
    init(Arc::clone(&store), None).unwrap();
    assert_eq!(Repository::secret_kinds(store.as_ref()).unwrap(), []);
    let error = Repository::open(store, Some(&key_file())).unwrap_err();
    assert_eq!(error.kind(), RepoErrorKind::WrongKey);
}

#[test]
fn weak_secrets_are_refused() {
    for secret in [passphrase(""), Secret::KeyFile(vec![1; 31].into())] {
        let store = Arc::new(MemStore::default());
        let error = init(store.clone(), Some(secret)).unwrap_err();
        assert_eq!(error.kind(), RepoErrorKind::Usage);
        assert_eq!(store.keys(), []);
    }
}

#[test]
fn a_missing_directory_is_no_repository() {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(LocalStore::new(folder.path().join("unmounted")));
    assert_eq!(
        store
            .size(&highwater_store::ObjectKey::config())
            .unwrap_err()
            .kind(),
        StoreErrorKind::NotFound
    );
    assert_eq!(
        Repository::open(store, None).unwrap_err().kind(),
        RepoErrorKind::NoRepository
    );
}

#[test]
fn what_is_known_is_not_stored_again() {
    let repo = init(Arc::new(MemStore::default()), None).unwrap();
    let bytes = image(1, 130);
    save(&repo, "a", 1, &bytes).unwrap();
    let writer = repo.writer(options()).unwrap();
    store_full(&writer, &bytes).unwrap();
    let stats = writer.flush().unwrap().stats();
    assert_eq!(
        (stats.new_chunks, stats.packs, stats.stored_bytes_pages),
        (0, 0, 0)
    );
    assert_eq!(stats.stored_bytes_index, 0);
    assert!(stats.known_chunks > 80);
}

#[test]
fn a_chunk_whose_pack_is_gone_is_stored_again() {
    let store = Arc::new(MemStore::default());
    let repo = init(store.clone(), None).unwrap();
    let bytes = image(1, 130);
    save(&repo, "a", 1, &bytes).unwrap();
    for key in store
        .keys()
        .iter()
        .filter(|key| key.kind() == ObjectKind::Pack)
    {
        store.delete(key).unwrap();
    }
    let repo = Repository::open(store, None).unwrap();
    let saved = save(&repo, "a", 2, &bytes).unwrap();
    assert_eq!(read(&repo, &saved.disks[0].image).unwrap(), bytes);
}

#[test]
fn what_lies_in_a_damaged_pack_is_stored_again_by_whom_it_is_not_believed() {
    let store = Arc::new(MemStore::default());
    let repo = init(store.clone(), None).unwrap();
    let bytes = image(1, 130);
    save(&repo, "a", 1, &bytes).unwrap();
    let packs = store.keys();
    for key in packs.iter().filter(|key| key.kind() == ObjectKind::Pack) {
        store.damage(key, &vec![0x55; store.bytes(key).unwrap().len()]);
    }
    for believe_stored in [true, false] {
        let repo = Repository::open(store.clone(), None).unwrap();
        let writer = repo.writer(options()).unwrap();
        if !believe_stored {
            writer.disbelieve_stored();
        }
        let root = store_full(&writer, &bytes).unwrap();
        commit(
            writer.flush().unwrap(),
            "a",
            2 + i64::from(believe_stored),
            root,
        )
        .unwrap();
        let now = read(&repo, &root);
        assert_eq!(now.is_ok_and(|now| now == bytes), !believe_stored);
    }
}

#[test]
fn two_lanes_that_meet_the_same_chunk_store_it_once() {
    let repo = init(Arc::new(MemStore::default()), None).unwrap();
    let writer = repo.writer(options()).unwrap();
    let stored: u64 = std::thread::scope(|scope| {
        let work = || {
            let mut lane = writer.lane();
            (0..300)
                .map(|index| lane.add(&chunk(2, index)).unwrap().stored_bytes)
                .sum::<u64>()
        };
        let lanes: Vec<_> = (0..4).map(|_| scope.spawn(work)).collect();
        lanes.into_iter().map(|lane| lane.join().unwrap()).sum()
    });
    let stats = writer.flush().unwrap().stats();
    assert_eq!((stats.new_chunks, stats.known_chunks), (200, 600));
    assert_eq!(stats.stored_bytes_chunks, stored);
}

#[test]
fn another_process_finds_what_was_stored_since_it_opened() {
    let store = Arc::new(MemStore::default());
    let early = init(store.clone(), None).unwrap();
    let bytes = image(3, 10);
    let saved = save(&Repository::open(store, None).unwrap(), "a", 1, &bytes).unwrap();
    assert_eq!(read(&early, &saved.disks[0].image).unwrap(), bytes);
}

#[test]
fn points_are_found_by_uuid_whatever_the_name() {
    let repo = init(Arc::new(MemStore::default()), Some(key_file())).unwrap();
    let writer = repo.writer(options()).unwrap();
    let root = store_full(&writer, &image(1, 2)).unwrap();
    let uuid = Some("6d1a4e9c-0000-4000-8000-000000000001".to_owned());
    let old = VmIdentity {
        name: "old".to_owned(),
        uuid: uuid.clone(),
    };
    writer
        .flush()
        .unwrap()
        .commit(&manifest(&old, 1, &[root]))
        .unwrap();
    let new = VmIdentity {
        name: "new".to_owned(),
        uuid,
    };
    assert_eq!(repo.points_of(&new).unwrap().points.len(), 1);
    assert_eq!(repo.points_of(&vm("old")).unwrap().points.len(), 0);
}

#[test]
fn a_file_is_stored_whole_or_refused() {
    let repo = init(Arc::new(MemStore::default()), None).unwrap();
    let writer = repo.writer(options()).unwrap();
    let bytes = noise(1, 3 * CHUNK + 5);
    let size = bytes.len() as u64;
    let root = writer.add_bytes(&mut bytes.as_slice(), size).unwrap();
    let same = store_full(&writer, &bytes).unwrap();
    assert_eq!(root, same);
    let empty = writer.add_bytes(&mut [].as_slice(), 0).unwrap();
    let kind = |size| {
        writer
            .add_bytes(&mut bytes.as_slice(), size)
            .unwrap_err()
            .kind()
    };
    assert_eq!(kind(size - 1), RepoErrorKind::Input);
    assert_eq!(kind(size + 1), RepoErrorKind::Input);
    writer.flush().unwrap();
    assert_eq!(read(&repo, &root).unwrap(), bytes);
    assert_eq!(read(&repo, &empty).unwrap(), b"");
}
