//! What `verify` says is hurt is exactly what cannot be read: compared with a
//! slow and obviously right look at every chunk of every point.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test may panic"
)]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use highwater_model::{ByteRange, PointId};
use highwater_repo::{
    Manifest, RepoError, Repository, VerifyDepth, VerifyOptions, VerifyReport, VmIdentity,
};
use highwater_store::testing::MemStore;
use highwater_store::{ObjectKey, ObjectKind, Store};
use support::*;

/// Five leaves, two levels, the last chunk short.
const CHUNKS: u64 = 280;

/// Three points of one image, most of it shared, and a larger one that shares
/// its beginning.
fn history() -> (MemStore, Vec<Manifest>) {
    let store = MemStore::default();
    let repo = init(Arc::new(store.clone()), None).unwrap();
    let mut bytes = image(5, CHUNKS);
    bytes.truncate(bytes.len() - 1000);
    let mut points = vec![save(&repo, "a", 1, &bytes).unwrap()];
    for at in 2..5_u32 {
        let old = bytes.clone();
        for index in [at, 64 + at * 3, 200].map(u64::from) {
            let start = usize::try_from(index).unwrap() * CHUNK;
            bytes[start..start + CHUNK]
                .copy_from_slice(&noise(u64::from(at) * 1000 + index, CHUNK));
        }
        if at == 4 {
            bytes.resize(old.len() + 50 * CHUNK, 7);
        }
        let writer = repo.writer(options()).unwrap();
        let parent = points.last().unwrap().disks[0].image;
        let root = store_changes(&writer, &parent, &old, &bytes).unwrap();
        points.push(commit(writer.flush().unwrap(), "a", at.into(), root).unwrap());
    }
    (store, points)
}

/// Ranges by point.
type Hurt = BTreeMap<PointId, Vec<ByteRange>>;

fn told(report: &VerifyReport) -> Hurt {
    let mut hurt = Hurt::new();
    for point in report.damage.iter().flat_map(|damage| &damage.points) {
        for disk in &point.disks {
            assert_eq!(disk.more_ranges, 0);
            let bytes: u64 = disk.ranges.iter().map(|range| range.len()).sum();
            assert_eq!(disk.bytes, bytes);
            let all = hurt.entry(point.point.parse().unwrap()).or_default();
            all.extend(&disk.ranges);
        }
    }
    for ranges in hurt.values_mut() {
        *ranges = joined(ranges);
    }
    hurt
}

fn joined(ranges: &[ByteRange]) -> Vec<ByteRange> {
    let mut sorted = ranges.to_vec();
    sorted.sort();
    let mut joined: Vec<ByteRange> = Vec::new();
    for range in sorted {
        match joined.last_mut() {
            Some(last) if last.end() == range.start() => {
                *last = ByteRange::between(last.start(), range.end()).unwrap();
            }
            _ => joined.push(range),
        }
    }
    joined
}

/// Tries to read each chunk on its own.
fn unreadable(repo: &Repository, points: &[Manifest]) -> Hurt {
    let mut hurt = Hurt::new();
    for point in points {
        let root = point.disks[0].image;
        let image = repo.image(&root).unwrap();
        let is_bad = |index: &u64| {
            let read = image.chunk(*index).and_then(|id| {
                let wanted: Vec<_> = id.into_iter().map(|id| (0, id)).collect();
                repo.fetch(&wanted, 1, &|_, _: &[u8]| Ok::<(), RepoError>(()))
            });
            read.is_err()
        };
        let range = |index: u64| {
            let start = index * CHUNK as u64;
            ByteRange::between(start, root.size_bytes.min(start + CHUNK as u64)).unwrap()
        };
        let count = root.chunk_bytes.count(root.size_bytes);
        let ranges: Vec<_> = (0..count).filter(is_bad).map(range).collect();
        if !ranges.is_empty() {
            hurt.insert(point.point, joined(&ranges));
        }
    }
    hurt
}

fn verify(repo: &Repository, points: Option<&[(VmIdentity, PointId)]>) -> VerifyReport {
    let options = VerifyOptions {
        points,
        depth: VerifyDepth::Data,
        threads: 2,
        progress: &|_| true,
    };
    repo.verify(&options).unwrap()
}

fn keys_of(store: &MemStore, kind: ObjectKind) -> Vec<ObjectKey> {
    let mut keys = store.keys();
    keys.retain(|key| key.kind() == kind);
    keys
}

#[test]
fn the_ranges_told_are_exactly_those_that_cannot_be_read() {
    let (whole, points) = history();
    let packs = keys_of(&whole, ObjectKind::Pack);
    assert!(packs.len() >= 10, "{}", packs.len());
    let mut hurt_several = 0;
    for round in 0..60_u64 {
        let store = whole.fork();
        // One to three packs with one flipped bit, one in four of them gone.
        for harm in 0..=round % 3 {
            let draw = |what: u64| {
                let seed = round * 100 + harm * 10 + what;
                u64::from_le_bytes(noise(seed, 8).try_into().unwrap())
            };
            let key = &packs[usize::try_from(draw(0) % packs.len() as u64).unwrap()];
            if draw(1) % 4 == 0 {
                store.delete(key).unwrap();
            } else if let Some(mut bytes) = store.bytes(key) {
                let at = usize::try_from(draw(2) % bytes.len() as u64).unwrap();
                bytes[at] ^= 1 << (draw(3) % 8);
                store.damage(key, &bytes);
            }
        }
        let repo = Repository::open(Arc::new(store), None).unwrap();
        let report = verify(&repo, None);
        let expected = unreadable(&repo, &points);
        assert_eq!(told(&report), expected, "round {round}: {report:#?}");
        assert_eq!(report.checked.points_hurt, expected.len() as u64);
        hurt_several += usize::from(expected.len() > 1);
        // The same, asked for one point alone.
        let last = points.last().unwrap();
        let alone = verify(&repo, Some(&[(last.vm.clone(), last.point)]));
        let expected: Hurt = expected
            .into_iter()
            .filter(|(id, _)| *id == last.point)
            .collect();
        assert_eq!(
            told(&alone),
            expected,
            "round {round}, the last point: {alone:#?}"
        );
    }
    assert!(
        hurt_several >= 10,
        "too few damages that points share: {hurt_several}"
    );
}

#[test]
fn lost_index_files_are_told_with_what_only_they_showed() {
    let (whole, points) = history();
    for lost in keys_of(&whole, ObjectKind::Index) {
        let store = whole.fork();
        store.delete(&lost).unwrap();
        let repo = Repository::open(Arc::new(store), None).unwrap();
        let report = verify(&repo, None);
        assert_eq!(told(&report), unreadable(&repo, &points), "{report:#?}");
        assert_eq!(report.damage.len(), 1);
        assert_eq!(report.damage[0].object.path, None);
    }
}
