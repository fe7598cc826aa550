//! A tree depends on the image alone, never on the way to it.
//!
//! The oracle builds every tree from nothing, from the words of docs/format.md,
//! and shares no code with the crate.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test may panic"
)]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;

use highwater_model::{ChunkSize, ObjectId};
use highwater_repo::{ImageRoot, RepoErrorKind, Repository};
use highwater_store::testing::MemStore;
use proptest::collection::vec;
use proptest::prelude::*;
use support::*;

/// A sparse image: the bytes of the chunks that are not zero.
#[derive(Debug, Clone, Default)]
struct Model {
    size: u64,
    chunks: BTreeMap<u64, Vec<u8>>,
}

impl Model {
    fn chunk_len(&self, index: u64) -> usize {
        usize::try_from((self.size - index * CHUNK as u64).min(CHUNK as u64)).unwrap()
    }

    fn count(&self) -> u64 {
        self.size.div_ceil(CHUNK as u64)
    }

    fn grow(&mut self, size: u64) {
        self.size = size;
        let len: Vec<_> = self.chunks.keys().map(|at| self.chunk_len(*at)).collect();
        self.chunks
            .values_mut()
            .zip(len)
            .for_each(|(chunk, len)| chunk.resize(len, 0));
    }
}

/// What one backup changes: the new size, and chunks (0 makes one zero).
#[derive(Debug, Clone)]
struct Step {
    grow_bytes: u64,
    changes: BTreeMap<u64, u8>,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Sizes around the places where a tree gets another level, and odd ones.
    let levels = prop_oneof![
        0..3 * CHUNK as u64,
        (60..70_u64).prop_map(|chunks| chunks * CHUNK as u64),
        (60..70_u64).prop_map(|chunks| chunks * CHUNK as u64 + 512),
        (4090..4100_u64).prop_map(|chunks| chunks * CHUNK as u64 + 1),
        Just(262_145 * CHUNK as u64),
    ];
    let place = prop_oneof![0..4_u64, 60..70_u64, 4090..4100_u64, any::<u64>()];
    let changes = proptest::collection::btree_map(place, 0..4_u8, 0..12);
    let step = (prop_oneof![Just(0), levels], changes).prop_map(|(grow_bytes, changes)| Step {
        grow_bytes,
        changes,
    });
    vec(step, 1..5)
}

fn apply(
    model: &mut Model,
    repo: &Repository,
    parent: Option<&ImageRoot>,
    step: &Step,
) -> ImageRoot {
    model.grow(model.size + step.grow_bytes);
    let writer = repo.writer(options()).unwrap();
    let mut tree = writer.tree(parent, model.size).unwrap();
    let changes: BTreeMap<u64, u8> = match model.count() {
        0 => BTreeMap::new(),
        count => step
            .changes
            .iter()
            .map(|(at, value)| (at % count, *value))
            .collect(),
    };
    let mut lane = writer.lane();
    for (index, value) in changes {
        let chunk = vec![value; model.chunk_len(index)];
        tree.set(index, lane.add(&chunk).unwrap().id).unwrap();
        if value == 0 {
            model.chunks.remove(&index)
        } else {
            model.chunks.insert(index, chunk)
        };
    }
    drop(lane);
    let root = tree.finish().unwrap();
    writer.flush().unwrap();
    root
}

/// The tree of an image from nothing: its root hash, and its chunks' ids.
fn naive(model: &Model) -> ([u8; 32], BTreeMap<u64, [u8; 32]>) {
    let key = |context| blake3::derive_key(context, &[0; 32]);
    let (chunk_key, page_key) = (key("highwater 1 chunk id"), key("highwater 1 page id"));
    let id = |chunk: &Vec<u8>| *blake3::keyed_hash(&chunk_key, chunk).as_bytes();
    let ids: BTreeMap<u64, _> = model
        .chunks
        .iter()
        .map(|(at, chunk)| (*at, id(chunk)))
        .collect();
    let mut depth = 0;
    while model.size > 0 && (depth == 0 || 64_u128.pow(depth) < u128::from(model.count())) {
        depth += 1;
    }
    let mut level = ids.clone();
    for _ in 0..depth {
        let mut pages: BTreeMap<u64, (u64, Vec<u8>)> = BTreeMap::new();
        for (at, child) in level {
            let (bitmap, children) = pages.entry(at / 64).or_default();
            *bitmap |= 1 << (at % 64);
            children.extend_from_slice(&child);
        }
        let page = |(at, (bitmap, children)): (u64, (u64, Vec<u8>))| {
            let bytes = [&bitmap.to_le_bytes()[..], &children].concat();
            (at, *blake3::keyed_hash(&page_key, &bytes).as_bytes())
        };
        level = pages.into_iter().map(page).collect();
    }
    let top = level.get(&0);
    let mut text = model.size.to_le_bytes().to_vec();
    text.extend_from_slice(&u32::try_from(CHUNK).unwrap().to_le_bytes());
    text.extend_from_slice(&[u8::try_from(depth).unwrap(), u8::from(top.is_some())]);
    text.extend_from_slice(top.unwrap_or(&[0; 32]));
    (
        *blake3::keyed_hash(&key("highwater 1 root"), &text).as_bytes(),
        ids,
    )
}

fn check(repo: &Repository, model: &Model, root: &ImageRoot) {
    let (hash, ids) = naive(model);
    assert_eq!(root.hash.as_bytes(), &hash, "the root is that of the image");
    let image = repo.image(root).unwrap();
    let ids: Vec<_> = ids
        .into_iter()
        .map(|(at, id)| (at, ObjectId::from_bytes(id)))
        .collect();
    let all = |from| image.from(from).collect::<Result<Vec<_>, _>>().unwrap();
    assert_eq!(all(0), ids);
    for from in [1, 63, 64, 65, 4096, model.count(), u64::MAX] {
        let rest: Vec<_> = ids.iter().copied().filter(|(at, _)| *at >= from).collect();
        assert_eq!(all(from), rest, "from {from}");
    }
    for at in [0, 3, 64, 4095]
        .into_iter()
        .filter(|at| *at < model.count())
    {
        let wanted = ids
            .iter()
            .find(|(index, _)| *index == at)
            .map(|(_, id)| *id);
        assert_eq!(image.chunk(at).unwrap(), wanted);
    }
    repo.fetch(&ids, 1, &|at, bytes: &[u8]| {
        assert!(model.chunks[&at] == bytes, "chunk {at}");
        Ok::<(), highwater_repo::RepoError>(())
    })
    .unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn equal_images_have_equal_roots_whatever_their_history(steps in steps()) {
        let repo = init(Arc::new(MemStore::default()), None).unwrap();
        let mut model = Model::default();
        let mut root = None;
        for step in &steps {
            let next = apply(&mut model, &repo, root.as_ref(), step);
            check(&repo, &model, &next);
            root = Some(next);
        }
    }
}

#[test]
fn an_unchanged_image_stores_nothing_at_all() {
    let store = Arc::new(MemStore::default());
    let repo = init(store.clone(), None).unwrap();
    let bytes = image(1, 200);
    let root = save(&repo, "a", 1, &bytes).unwrap().disks[0].image;
    let before = store.keys();
    let writer = repo.writer(options()).unwrap();
    let same = store_changes(&writer, &root, &bytes, &bytes).unwrap();
    // Also where every chunk was read again and found to be the same.
    let mut tree = writer.tree(Some(&root), root.size_bytes).unwrap();
    for index in 0..200 {
        let id = repo.chunk_id(&chunk(1, index));
        tree.set(index, id).unwrap();
    }
    assert_eq!((same, tree.finish().unwrap()), (root, root));
    writer.flush().unwrap();
    assert_eq!(store.keys(), before);
}

/// Around the places where a page ends, and with nothing at all before.
#[test]
fn the_last_chunk_before_a_place_is_found_wherever_it_is() {
    let repo = init(Arc::new(MemStore::default()), None).unwrap();
    let places = [3_u64, 63, 64, 127, 4095, 4096, 70_000, 262_143, 262_200];
    let size = 300_000 * CHUNK as u64;
    let writer = repo.writer(options()).unwrap();
    let mut lane = writer.lane();
    let mut tree = writer.tree(None, size).unwrap();
    for place in places {
        tree.set(place, lane.add(&vec![1; CHUNK]).unwrap().id)
            .unwrap();
    }
    let root = tree.finish().unwrap();
    drop(lane);
    writer.flush().unwrap();
    let reader = repo.image(&root).unwrap();
    let near = places
        .iter()
        .flat_map(|place| place.saturating_sub(1)..place + 3);
    for before in near.chain([0, 1, 299_999, 300_000, u64::MAX]) {
        let expected = places.iter().copied().rfind(|place| *place < before);
        assert_eq!(reader.last_before(before).unwrap(), expected, "{before}");
    }
    let empty = writer_of_nothing(&repo, size);
    assert_eq!(repo.image(&empty).unwrap().last_before(9).unwrap(), None);
}

fn writer_of_nothing(repo: &Repository, size: u64) -> ImageRoot {
    let writer = repo.writer(options()).unwrap();
    writer.tree(None, size).unwrap().finish().unwrap()
}

#[test]
fn calls_that_make_no_sense_are_refused() {
    let repo = init(Arc::new(MemStore::default()), None).unwrap();
    let writer = repo.writer(options()).unwrap();
    let size = 100 * CHUNK as u64;
    let kind = |outcome: Result<(), highwater_repo::RepoError>| outcome.unwrap_err().kind();
    let mut tree = writer.tree(None, size).unwrap();
    tree.set(5, None).unwrap();
    for wrong in [5, 4, 100, u64::MAX] {
        assert_eq!(kind(tree.set(wrong, None)), RepoErrorKind::Usage, "{wrong}");
    }
    let root = tree.finish().unwrap();
    let shrunk = writer.tree(Some(&root), size - 1).map(drop);
    assert_eq!(kind(shrunk), RepoErrorKind::Usage);
    let other = ImageRoot {
        chunk_bytes: ChunkSize::MAX,
        ..root
    };
    assert_eq!(
        kind(writer.tree(Some(&other), size).map(drop)),
        RepoErrorKind::Damaged
    );
    assert_eq!(kind(repo.image(&other).map(drop)), RepoErrorKind::Damaged);
    let mut lane = writer.lane();
    assert_eq!(kind(lane.add(&[]).map(drop)), RepoErrorKind::Usage);
    assert_eq!(
        kind(lane.add(&vec![0; CHUNK + 1]).map(drop)),
        RepoErrorKind::Usage
    );
}
