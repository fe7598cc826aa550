//! The contract of [`Store`], sentence by sentence.
//!
//! A new store passes [`check`] or does not ship.

use std::sync::Barrier;
use std::thread;

use crate::{ObjectKey, ObjectKind, Store, StoreErrorKind};

/// Runs the whole suite; `fresh` returns an empty store, not yet prepared.
///
/// # Panics
/// At the first sentence that does not hold.
pub fn check<S: Store>(fresh: impl Fn() -> S) {
    prepared(&fresh, what_is_put_can_be_read);
    prepared(&fresh, an_existing_object_is_left_as_it_is);
    prepared(&fresh, what_comes_in_pieces_is_seen_whole_or_not_at_all);
    prepared(&fresh, absent_objects_are_not_found);
    prepared(&fresh, a_limit_holds);
    prepared(&fresh, ranges_are_exact);
    prepared(&fresh, listings_are_sorted_and_filtered);
    prepared(&fresh, deleting_twice_is_no_error);
    prepared(&fresh, of_many_writers_one_wins);
    let store = fresh();
    store.prepare().expect("prepare");
    store.prepare().expect("prepare again");
}

fn prepared<S: Store>(fresh: impl Fn() -> S, check: impl Fn(&S)) {
    let store = fresh();
    store.prepare().expect("a fresh store can be prepared");
    check(&store);
}

fn key(kind: ObjectKind, name: &str) -> ObjectKey {
    ObjectKey::new(kind, name).expect("the suite's names are good")
}

fn what_is_put_can_be_read(store: &impl Store) {
    let keys = [
        ObjectKey::config(),
        key(ObjectKind::Key, "k"),
        key(ObjectKind::Pack, "abcd"),
        key(ObjectKind::Index, "i"),
        key(ObjectKind::Point, "vm/p"),
        key(ObjectKind::Lease, "l"),
        key(ObjectKind::Damage, "d"),
        key(ObjectKind::Proof, "p"),
        key(ObjectKind::Prune, "e"),
    ];
    for key in &keys {
        store.put(key, &[b"ab", b"", b"c"]).expect("put");
        assert_eq!(store.get(key, 3).expect("get"), b"abc", "{key}");
        assert_eq!(store.size(key).expect("size"), 3, "{key}");
    }
    let empty = key(ObjectKind::Key, "empty");
    store.put(&empty, &[]).expect("an object may be empty");
    assert_eq!(store.get(&empty, 0).expect("get"), b"");
    // More parts than one system call takes.
    let many = key(ObjectKind::Key, "many");
    let parts = vec![&b"xy"[..]; 5000];
    store.put(&many, &parts).expect("put");
    assert_eq!(store.get(&many, 1 << 20).expect("get"), b"xy".repeat(5000));
}

fn an_existing_object_is_left_as_it_is(store: &impl Store) {
    let key = key(ObjectKind::Point, "vm/p");
    store.put(&key, &[b"first"]).expect("put");
    let error = store
        .put(&key, &[b"second"])
        .expect_err("the name is taken");
    assert_eq!(error.kind(), StoreErrorKind::AlreadyExists);
    assert!(!error.maybe_done());
    assert_eq!(store.get(&key, 9).expect("get"), b"first");
}

fn what_comes_in_pieces_is_seen_whole_or_not_at_all(store: &impl Store) {
    let begin = || store.begin().expect("begin");
    let nothing = || {
        let listed = store.list(ObjectKind::Pack, "").expect("list");
        assert!(listed.is_empty(), "{listed:?}");
    };
    let Some(given_up) = begin() else { return };
    drop(given_up);
    let (mut one, mut other) = (begin().expect("again"), begin().expect("again"));
    // Both under way at once, and more parts than one system call takes.
    one.append(&[b"ab", b"", b"c"]).expect("append");
    other.append(&[b"X"]).expect("append");
    one.append(&vec![&b"xy"[..]; 5000]).expect("append");
    nothing();
    drop(other);
    nothing();
    let key = key(ObjectKind::Pack, "abcd");
    one.finish(&key).expect("finish");
    let whole = [&b"abc"[..], &b"xy".repeat(5000)].concat();
    assert_eq!(store.get(&key, 1 << 20).expect("get"), whole);
    let mut second = begin().expect("again");
    second.append(&[b"second"]).expect("append");
    let error = second.finish(&key).expect_err("the name is taken");
    assert_eq!(error.kind(), StoreErrorKind::AlreadyExists);
    assert!(!error.maybe_done());
    assert_eq!(store.get(&key, 1 << 20).expect("get"), whole);
    let empty = ObjectKey::new(ObjectKind::Pack, "abce").expect("a good name");
    begin().expect("again").finish(&empty).expect("finish");
    assert_eq!(store.size(&empty).expect("size"), 0);
}

fn absent_objects_are_not_found(store: &impl Store) {
    let key = key(ObjectKind::Pack, "abcd");
    let not_found = |kind| assert_eq!(kind, StoreErrorKind::NotFound);
    not_found(store.get(&key, 9).expect_err("absent").kind());
    not_found(
        store
            .get_range(&key, 0, &mut [0])
            .expect_err("absent")
            .kind(),
    );
    not_found(store.size(&key).expect_err("absent").kind());
    assert!(store.list(ObjectKind::Pack, "").expect("list").is_empty());
}

fn a_limit_holds(store: &impl Store) {
    let key = key(ObjectKind::Index, "i");
    store.put(&key, &[b"1234"]).expect("put");
    assert_eq!(
        store.get(&key, 3).expect_err("too large").kind(),
        StoreErrorKind::TooLarge
    );
    assert_eq!(store.get(&key, 4).expect("get").len(), 4);
}

fn ranges_are_exact(store: &impl Store) {
    let key = key(ObjectKind::Pack, "abcd");
    store.put(&key, &[b"0123456789"]).expect("put");
    let mut part = [0; 3];
    store.get_range(&key, 7, &mut part).expect("get_range");
    assert_eq!(&part, b"789");
    for offset in [8, 10, 11, u64::MAX] {
        let error = store
            .get_range(&key, offset, &mut part)
            .expect_err("beyond the end");
        let kind = error.kind();
        // An offset no file can have is refused in another way; never data.
        assert!(
            matches!(kind, StoreErrorKind::Corrupt | StoreErrorKind::Other),
            "{kind:?}"
        );
    }
}

fn listings_are_sorted_and_filtered(store: &impl Store) {
    for name in ["vm2/a", "vm1/b", "vm1/a"] {
        store
            .put(&key(ObjectKind::Point, name), &[name.as_bytes()])
            .expect("put");
    }
    store.put(&key(ObjectKind::Index, "vm1"), &[]).expect("put");
    let names = |prefix: &str| -> Vec<String> {
        let listed = store.list(ObjectKind::Point, prefix).expect("list");
        assert!(listed.iter().all(|object| object.len == 5));
        listed
            .iter()
            .map(|object| object.key.name().to_owned())
            .collect()
    };
    assert_eq!(names(""), ["vm1/a", "vm1/b", "vm2/a"]);
    assert_eq!(names("vm1/"), ["vm1/a", "vm1/b"]);
    assert_eq!(names("vm3/"), [""; 0]);
}

fn deleting_twice_is_no_error(store: &impl Store) {
    let key = key(ObjectKind::Key, "k");
    store.put(&key, &[b"x"]).expect("put");
    store.delete(&key).expect("delete");
    store.delete(&key).expect("delete again");
    assert_eq!(
        store.size(&key).expect_err("gone").kind(),
        StoreErrorKind::NotFound
    );
    store.put(&key, &[b"y"]).expect("the name is free again");
}

fn of_many_writers_one_wins(store: &impl Store) {
    let key = key(ObjectKind::Point, "vm/p");
    let start = Barrier::new(8);
    let write = |writer: u8| {
        let body = vec![writer; 100_000];
        start.wait();
        store.put(&key, &[&body]).is_ok()
    };
    let winners: Vec<u8> = thread::scope(|scope| {
        let writers: Vec<_> = (0..8).map(|n| (n, scope.spawn(move || write(n)))).collect();
        let won = |(n, writer): (u8, thread::ScopedJoinHandle<'_, bool>)| {
            writer.join().expect("no panic").then_some(n)
        };
        writers.into_iter().filter_map(won).collect()
    });
    let [winner] = winners.as_slice() else {
        panic!("winners: {winners:?}")
    };
    assert_eq!(
        store.get(&key, 1 << 20).expect("get"),
        vec![*winner; 100_000]
    );
}
