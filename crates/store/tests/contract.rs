//! Every store keeps the contract.

use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use highwater_store::testing::{Fault, FaultyStore, MemStore, contract};
use highwater_store::{LocalStore, ObjectKey, ObjectKind, Store, StoreErrorKind, Watched};

#[test]
fn the_store_in_memory_keeps_the_contract() {
    contract::check(MemStore::default);
    contract::check(MemStore::of_whole_objects);
    contract::check(|| FaultyStore::new(MemStore::default(), Fault::Never));
    contract::check(|| Watched::new(Arc::new(MemStore::default())));
}

#[test]
fn the_store_in_a_directory_keeps_the_contract() {
    let folders = RefCell::new(Vec::new());
    contract::check(|| {
        let folder = tempfile::tempdir().unwrap();
        let store = LocalStore::new(folder.path().join("not/yet/there"));
        folders.borrow_mut().push(folder);
        store
    });
}

#[test]
fn a_repository_that_is_not_mounted_is_never_created_by_a_write() {
    let folder = tempfile::tempdir().unwrap();
    let store = LocalStore::new(folder.path().join("repo"));
    let key = ObjectKey::new(ObjectKind::Point, "vm/p").unwrap();
    let error = store.put(&key, &[b"x"]).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::NotFound);
    assert!(!error.maybe_done());
    let error = store.begin().unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::NotFound);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn files_and_folders_are_private_and_no_temporary_file_stays() {
    let folder = tempfile::tempdir().unwrap();
    let store = LocalStore::new(folder.path().join("repo"));
    store.prepare().unwrap();
    let key = ObjectKey::new(ObjectKind::Point, "vm/p").unwrap();
    store.put(&key, &[b"x"]).unwrap();
    store.put(&key, &[b"x"]).unwrap_err();
    let begin = || store.begin().unwrap().unwrap();
    drop(begin());
    begin().finish(&key).unwrap_err();
    begin()
        .finish(&ObjectKey::new(ObjectKind::Point, "vm/q").unwrap())
        .unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for path in ["", "points", "points/vm", "tmp"] {
        assert_eq!(mode(&store.root().join(path)), 0o700, "{path}");
    }
    assert_eq!(mode(&store.root().join("points/vm/p")), 0o600);
    assert_eq!(mode(&store.root().join("points/vm/q")), 0o600);
    assert_eq!(fs::read_dir(store.root().join("tmp")).unwrap().count(), 0);
}

#[test]
fn foreign_files_are_not_listed() {
    let folder = tempfile::tempdir().unwrap();
    let store = LocalStore::new(folder.path());
    store.prepare().unwrap();
    let foreign = [
        "index/.nfs0001",
        "index/a.tmp",
        "packs/ab/cdef",
        "packs/stray",
        "points/stray",
    ];
    for path in foreign {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::File::create(path).unwrap();
    }
    for kind in [ObjectKind::Index, ObjectKind::Pack, ObjectKind::Point] {
        assert_eq!(store.list(kind, "").unwrap(), []);
    }
}
