//! No damaged byte ever leads to a wrong byte of an image.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test may panic"
)]

mod support;

use std::sync::Arc;

use highwater_repo::{RepoError, RepoErrorKind, Repository, Secret};
use highwater_store::testing::MemStore;
use highwater_store::{ObjectKey, ObjectKind, Store};
use support::*;

/// A repository so small that every byte of it can be damaged in turn.
struct Small {
    store: MemStore,
    secret: Option<Secret>,
    bytes: Vec<u8>,
}

/// What somebody sees who reads the repository.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Right,
    Damage,
}

impl Small {
    fn new(secret: Option<Secret>) -> Self {
        let store = MemStore::default();
        let repo = init(Arc::new(store.clone()), secret.clone()).unwrap();
        // Two chunks, the last short; the first compresses to almost nothing.
        let bytes = [vec![b'x'; CHUNK], noise(1, 90)].concat();
        save(&repo, "a", 1, &bytes).unwrap();
        Self {
            store,
            secret,
            bytes,
        }
    }

    /// Reads everything; panics if wrong bytes come out or a point is silently
    /// missing.
    fn look(&self, store: MemStore) -> Seen {
        match self.try_look(store) {
            Ok(seen) => seen,
            Err(error) => {
                let kind = error.kind();
                let honest = matches!(
                    kind,
                    RepoErrorKind::Damaged
                        | RepoErrorKind::NewerFormat
                        | RepoErrorKind::WrongKey
                        | RepoErrorKind::NoRepository
                );
                assert!(honest, "{error:?}");
                Seen::Damage
            }
        }
    }

    fn try_look(&self, store: MemStore) -> Result<Seen, RepoError> {
        let repo = Repository::open(Arc::new(store), self.secret.as_ref())?;
        let list = repo.points()?;
        if !list.damaged.is_empty() {
            return Ok(Seen::Damage);
        }
        let [point] = list.points.as_slice() else {
            panic!("the point is gone without a word")
        };
        assert!(
            read(&repo, &point.disks[0].image)? == self.bytes,
            "wrong bytes came out"
        );
        Ok(Seen::Right)
    }

    /// Damages each byte of the objects of a kind, in `ways` ways; returns how
    /// many damages went unnoticed because they did no harm.
    fn damage_each_byte(&self, kind: ObjectKind) -> usize {
        let mut harmless = 0;
        for key in self
            .store
            .keys()
            .into_iter()
            .filter(|key| key.kind() == kind)
        {
            let good = self.store.bytes(&key).unwrap();
            for at in 0..good.len() {
                for flip in [1_u8 << (at % 8), 0x80 >> (at % 8), 0xff] {
                    let mut bad = good.clone();
                    bad[at] ^= flip;
                    harmless += usize::from(self.look_with(&key, &bad) == Seen::Right);
                }
            }
            for len in (0..good.len()).step_by(1 + good.len() / 300) {
                assert_eq!(
                    self.look_with(&key, &good[..len]),
                    Seen::Damage,
                    "{key} cut to {len}"
                );
            }
        }
        harmless
    }

    fn look_with(&self, key: &ObjectKey, bytes: &[u8]) -> Seen {
        let store = self.store.fork();
        store.damage(key, bytes);
        self.look(store)
    }
}

fn check(kind: ObjectKind, harmless_max: usize) {
    for secret in [None, Some(key_file())] {
        let encrypted = secret.is_some();
        let small = Small::new(secret);
        assert_eq!(small.look(small.store.fork()), Seen::Right);
        let harmless = small.damage_each_byte(kind);
        assert!(
            harmless <= harmless_max,
            "{kind:?}, encrypted {encrypted}: {harmless} unnoticed"
        );
    }
}

#[test]
fn a_damaged_config_is_always_noticed() {
    check(ObjectKind::Config, 0);
}

#[test]
fn a_damaged_key_is_always_noticed() {
    check(ObjectKind::Key, 0);
}

#[test]
fn a_damaged_manifest_is_always_noticed() {
    check(ObjectKind::Point, 0);
}

#[test]
fn a_damaged_pack_never_gives_a_wrong_byte() {
    // Without encryption nothing reads the salt, and it matters to nobody.
    check(ObjectKind::Pack, 2 * 3 * 32);
}

#[test]
fn a_damaged_index_is_always_noticed() {
    // The filter, the tables and every block in use are hashed; only a block
    // nobody reads could hide something, and here all are read.
    check(ObjectKind::Index, 0);
}

#[test]
fn the_next_save_heals_a_damaged_or_missing_index() {
    let small = Small::new(Some(key_file()));
    let is_index = |key: &ObjectKey| key.kind() == ObjectKind::Index;
    let index = small.store.keys().into_iter().find(is_index).unwrap();
    let cut = |store: &MemStore| store.damage(&index, b"HWINDX");
    let lose = |store: &MemStore| store.delete(&index).unwrap();
    for harm in [&cut as &dyn Fn(&MemStore), &lose] {
        let store = small.store.fork();
        harm(&store);
        let repo = Repository::open(Arc::new(store), small.secret.as_ref()).unwrap();
        let saved = save(&repo, "a", 2, &small.bytes).unwrap();
        assert_eq!(read(&repo, &saved.disks[0].image).unwrap(), small.bytes);
        assert_eq!(repo.points().unwrap().points.len(), 2);
    }
}

#[test]
fn a_second_copy_stands_in_for_a_damaged_one() {
    let small = Small::new(None);
    let is_pack = |key: &ObjectKey| key.kind() == ObjectKind::Pack;
    let packs: Vec<_> = small.store.keys().into_iter().filter(is_pack).collect();
    // Stored a second time by somebody who did not see the first.
    let other = small.store.fork();
    for key in other
        .keys()
        .iter()
        .filter(|key| key.kind() == ObjectKind::Index)
    {
        other.delete(key).unwrap();
    }
    save(
        &Repository::open(Arc::new(other.clone()), None).unwrap(),
        "b",
        2,
        &small.bytes,
    )
    .unwrap();
    for key in small
        .store
        .keys()
        .iter()
        .filter(|key| key.kind() == ObjectKind::Index)
    {
        other.put(key, &[&small.store.bytes(key).unwrap()]).unwrap();
    }
    for key in &packs {
        let mut bad = other.bytes(key).unwrap();
        bad[100] ^= 1;
        other.damage(key, &bad);
    }
    let repo = Repository::open(Arc::new(other), None).unwrap();
    for point in repo.points().unwrap().points {
        assert_eq!(read(&repo, &point.disks[0].image).unwrap(), small.bytes);
    }
}

#[test]
fn a_manifest_in_the_place_of_another_is_noticed() {
    for secret in [None, Some(key_file())] {
        let small = Small::new(secret);
        let repo = Repository::open(Arc::new(small.store.clone()), small.secret.as_ref()).unwrap();
        save(&repo, "b", 2, &small.bytes).unwrap();
        let is_point = |key: &ObjectKey| key.kind() == ObjectKind::Point;
        let points: Vec<_> = small.store.keys().into_iter().filter(is_point).collect();
        let [one, two] = points.as_slice() else {
            panic!("two points")
        };
        let bytes = small.store.bytes(one).unwrap();
        small.store.damage(two, &bytes);
        let list = repo.points().unwrap();
        assert_eq!((list.points.len(), list.damaged.len()), (1, 1));
        assert_eq!(list.damaged[0].error.kind(), RepoErrorKind::Damaged);
    }
}

#[test]
fn records_and_packs_cannot_change_places() {
    let small = Small::new(Some(key_file()));
    let repo = Repository::open(Arc::new(small.store.clone()), small.secret.as_ref()).unwrap();
    save(&repo, "b", 2, &noise(77, 90)).unwrap();
    let is_pack = |key: &ObjectKey| key.kind() == ObjectKind::Pack;
    let packs: Vec<_> = small.store.keys().into_iter().filter(is_pack).collect();
    assert_eq!(packs.len(), 4);
    for one in &packs {
        for two in packs.iter().filter(|two| *two != one) {
            let store = small.store.fork();
            store.damage(one, &small.store.bytes(two).unwrap());
            let repo = Repository::open(Arc::new(store), small.secret.as_ref()).unwrap();
            let points = repo.points().unwrap().points;
            let wrong = points
                .iter()
                .filter(|point| read(&repo, &point.disks[0].image).is_err());
            assert!(wrong.count() >= 1, "{one} replaced by {two}");
        }
    }
}

#[test]
fn a_config_that_was_tampered_with_opens_with_no_key() {
    let small = Small::new(Some(key_file()));
    let text = String::from_utf8(small.store.bytes(&ObjectKey::config()).unwrap()).unwrap();
    let line = text.lines().next().unwrap().replace("65536", "131072");
    let forged = format!("{line}\n{}\n", blake3::hash(line.as_bytes()).to_hex());
    let store = small.store.fork();
    store.damage(&ObjectKey::config(), forged.as_bytes());
    let error = Repository::open(Arc::new(store), small.secret.as_ref()).unwrap_err();
    assert_eq!(error.kind(), RepoErrorKind::WrongKey);
}
