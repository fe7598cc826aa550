//! Objects that are well formed and mean harm: lengths, counts and offsets from
//! somebody who can write to the repository and make every hash that needs no
//! key. A clear error, little memory, little time, and never a wrong byte.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test may panic"
)]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use highwater_model::{ChunkSize, ObjectId};
use highwater_repo::{ImageRoot, RepoError, RepoErrorKind, Repository, Secret};
use highwater_store::testing::MemStore;
use highwater_store::{ObjectKey, ObjectKind, Store};
use serde_json::{Value, json};
use support::*;

const MIB: u64 = 1 << 20;

/// Runs `work`, which must neither take long nor much memory. Each test is a
/// process of its own, so the peak is that of this test.
fn bounded<T>(memory_max: u64, work: impl FnOnce() -> T) -> T {
    let begin = Instant::now();
    let before = peak();
    let outcome = work();
    let (took, grown) = (begin.elapsed(), peak() - before);
    assert!(took < Duration::from_mins(1), "it took {took:?}");
    assert!(grown <= memory_max, "it took {} MiB", grown / MIB);
    outcome
}

/// Returns the most memory this process ever had, bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.unwrap().split_whitespace().nth(1).unwrap();
    kib.parse::<u64>().unwrap() << 10
}

fn find(store: &MemStore, kind: ObjectKind) -> ObjectKey {
    let mut keys = store.keys().into_iter().filter(|key| key.kind() == kind);
    keys.next().unwrap()
}

fn open(store: &MemStore) -> Result<Repository, RepoError> {
    Repository::open(Arc::new(store.clone()), None)
}

/// The key of a use in a repository that is not encrypted (docs/format.md).
fn plain_key(usage: &str) -> [u8; 32] {
    blake3::derive_key(&format!("highwater 1 {usage}"), &[0; 32])
}

#[test]
fn a_configuration_with_impossible_values_is_refused() {
    let store = MemStore::default();
    init(Arc::new(store.clone()), None).unwrap();
    let good = String::from_utf8(store.bytes(&ObjectKey::config()).unwrap()).unwrap();
    let line = good.lines().next().unwrap();
    let deep = format!("{{\"format\":\"highwater\",\"x\":{}", "[".repeat(60_000));
    for (bad, kind) in [
        (line.replace("65536", "0"), RepoErrorKind::Damaged),
        (line.replace("65536", "-1"), RepoErrorKind::Damaged),
        (line.replace("65536", "65537"), RepoErrorKind::Damaged),
        (line.replace("65536", "4294967295"), RepoErrorKind::Damaged),
        (
            line.replace("65536", "18446744073709551616"),
            RepoErrorKind::Damaged,
        ),
        (line.replace("65536", "1e400"), RepoErrorKind::Damaged),
        (
            line.replace("\"none\"", "\"rot13\""),
            RepoErrorKind::Damaged,
        ),
        (
            line.replace("\"version\":1", "\"version\":4294967295"),
            RepoErrorKind::NewerFormat,
        ),
        (
            line.replace("\"features_incompat\":[]", "\"features_incompat\":[\"x\"]"),
            RepoErrorKind::NewerFormat,
        ),
        (deep, RepoErrorKind::Damaged),
        (
            format!("{line}{}", " ".repeat(100_000)),
            RepoErrorKind::Damaged,
        ),
        (
            "[repository]\nversion = 1".to_owned(),
            RepoErrorKind::NoRepository,
        ),
        (String::new(), RepoErrorKind::NoRepository),
    ] {
        let bad = format!("{bad}\n{}\n", blake3::hash(bad.as_bytes()).to_hex());
        store.damage(&ObjectKey::config(), bad.as_bytes());
        let error = bounded(16 * MIB, || open(&store)).unwrap_err();
        assert_eq!(
            error.kind(),
            kind,
            "{}: {error:?}",
            &bad[..bad.len().min(200)]
        );
    }
    // A feature that only writers have to know hinders no reader.
    store.damage(&ObjectKey::config(), good.as_bytes());
    open(&store).unwrap();
}

/// Adds a key object like the one that is there, with some fields changed.
fn forge_key(store: &MemStore, changes: &Value) {
    let good = store.bytes(&find(store, ObjectKind::Key)).unwrap();
    let mut key: Value = serde_json::from_slice(&good).unwrap();
    for (field, value) in changes.as_object().unwrap() {
        key[field] = value.clone();
    }
    let body = serde_json::to_vec(&key).unwrap();
    let name = blake3::hash(&body).to_hex();
    let name = ObjectKey::new(ObjectKind::Key, name.as_str()).unwrap();
    store.damage(&name, &body);
}

#[test]
fn a_key_that_asks_for_terabytes_or_for_hours_is_not_tried() {
    let store = MemStore::default();
    let secret = Secret::Passphrase(b"correct horse battery".to_vec().into());
    init(Arc::new(store.clone()), Some(secret.clone())).unwrap();
    let good = find(&store, ObjectKind::Key);
    let open = |store: &MemStore| Repository::open(Arc::new(store.clone()), Some(&secret));
    for bad in [
        json!({"memory_kib": 4_294_967_295_u32}),
        json!({"memory_kib": 1_048_577}),
        json!({"passes": 4_294_967_295_u32}),
        json!({"memory_kib": 1_048_576, "passes": 64}),
        json!({"lanes": 4_294_967_295_u32}),
        json!({"memory_kib": 0}),
        json!({"passes": 0}),
        json!({"lanes": 0}),
        json!({"salt": "00".repeat(30_000)}),
        json!({"salt": ""}),
        json!({"wrapped": "ff"}),
    ] {
        let alone = store.fork();
        forge_key(&alone, &bad);
        alone.delete(&good).unwrap();
        let error = bounded(100 * MIB, || open(&alone)).unwrap_err();
        let kinds = [RepoErrorKind::Damaged, RepoErrorKind::WrongKey];
        assert!(kinds.contains(&error.kind()), "{bad}: {error:?}");
        let beside = store.fork();
        forge_key(&beside, &bad);
        bounded(100 * MIB, || open(&beside)).unwrap();
    }
    // Each of them alone would do; together they are minutes.
    let crowd = store.fork();
    for number in 0..60_u32 {
        forge_key(
            &crowd,
            &json!({"memory_kib": 1_000_000 + number, "passes": 4}),
        );
    }
    bounded(100 * MIB, || open(&crowd)).unwrap();
}

/// One image of two chunks, and the point that holds it.
fn small() -> (MemStore, ImageRoot, Vec<u8>) {
    let store = MemStore::default();
    let repo = init(Arc::new(store.clone()), None).unwrap();
    let bytes = [vec![b'x'; CHUNK], noise(1, 90)].concat();
    let saved = save(&repo, "a", 1, &bytes).unwrap();
    (store, saved.disks[0].image, bytes)
}

/// Makes the hashes of an index file fit its bytes (docs/format.md).
fn mend_index(bytes: &mut [u8]) {
    let tables = bytes.len() - 64 - (bytes.len() - 64) / 4096 * 4096;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..24]).update(&bytes[64..64 + tables]);
    bytes[24..56].copy_from_slice(hasher.finalize().as_bytes());
    for block in bytes[64 + tables..].chunks_exact_mut(4096) {
        let hash = blake3::hash(&block[..4064]);
        block[4064..].copy_from_slice(hash.as_bytes());
    }
}

#[test]
fn an_index_with_any_count_is_refused_before_anything_is_allocated_for_it() {
    let (store, root, bytes) = small();
    let key = find(&store, ObjectKind::Index);
    let good = store.bytes(&key).unwrap();
    for (at, count) in [
        (8, &u32::MAX.to_le_bytes()[..]),
        (12, &u32::MAX.to_le_bytes()),
        (16, &u64::MAX.to_le_bytes()),
        (16, &(1_u64 << 40).to_le_bytes()),
        (8, &[0xff; 16]),
        (16, &0_u64.to_le_bytes()),
    ] {
        let mut bad = good.clone();
        bad[at..at + count.len()].copy_from_slice(count);
        mend_index(&mut bad);
        store.damage(&key, &bad);
        let repo = open(&store).unwrap();
        let error = bounded(16 * MIB, || read(&repo, &root)).unwrap_err();
        assert_eq!(error.kind(), RepoErrorKind::Damaged, "{error:?}");
        assert_eq!(repo.damaged_indexes().len(), 1, "{at}: {count:?}");
    }
    store.damage(&key, &good);
    assert_eq!(read(&open(&store).unwrap(), &root).unwrap(), bytes);
}

#[test]
fn index_rows_that_point_anywhere_never_give_a_wrong_byte() {
    let (store, root, bytes) = small();
    let key = find(&store, ObjectKind::Index);
    let good = store.bytes(&key).unwrap();
    let block = good.len() - 4096;
    let rows = (0..84).filter(|row| good[block + row * 48..][..32] != [0; 32]);
    let rows: Vec<usize> = rows.collect();
    assert_eq!(rows.len(), 3, "two chunks and a page");
    let mut tried = 0;
    for row in rows {
        for field in 32..48 {
            for value in [0, 1, 0x2c, 0x7f, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[block + row * 48 + field] = value;
                mend_index(&mut bad);
                tried += usize::from(bad != good);
                store.damage(&key, &bad);
                let repo = open(&store).unwrap();
                match bounded(64 * MIB, || read(&repo, &root)) {
                    Ok(seen) => assert!(seen == bytes, "row {row}, byte {field} = {value}"),
                    Err(error) => assert_eq!(error.kind(), RepoErrorKind::Damaged, "{error:?}"),
                }
            }
        }
        // One that lies where another one does.
        for other in 0..3 {
            let mut bad = good.clone();
            bad.copy_within(
                block + other * 48 + 32..block + other * 48 + 48,
                block + row * 48 + 32,
            );
            mend_index(&mut bad);
            store.damage(&key, &bad);
            let seen = read(&open(&store).unwrap(), &root);
            assert_eq!(seen.is_ok(), row == other);
        }
    }
    assert!(tried > 200, "{tried}");
}

/// Puts an object into a pack and an index of their own, as somebody would who
/// knows the format.
fn plant(store: &MemStore, kind: u8, id: &[u8; 32], plain_len: u32, codec: u8, payload: &[u8]) {
    let mut pack = [&b"HWPACK\x01"[..], &[kind, 0], &[0; 7], &[7; 32]].concat();
    let offset = u32::try_from(pack.len()).unwrap();
    let payload_len = u32::try_from(payload.len()).unwrap();
    pack.extend_from_slice(id);
    pack.extend_from_slice(&plain_len.to_le_bytes());
    pack.extend_from_slice(&payload_len.to_le_bytes());
    pack.extend_from_slice(&[codec, 0, 0, 0]);
    pack.extend_from_slice(payload);
    let name = blake3::hash(&pack);
    let pack_key = ObjectKey::new(ObjectKind::Pack, name.to_hex().as_str()).unwrap();
    store.damage(&pack_key, &pack);
    let mut index = [
        &b"HWINDX\x01\0"[..],
        &0_u32.to_le_bytes(),
        &1_u32.to_le_bytes(),
    ]
    .concat();
    index.extend_from_slice(&1_u64.to_le_bytes());
    index.extend_from_slice(&[0; 40]);
    index.extend_from_slice(name.as_bytes());
    index.extend_from_slice(&(pack.len() as u64).to_le_bytes());
    index.extend_from_slice(&[kind, 0, 0, 0, 0, 0, 0, 0]);
    index.extend_from_slice(&id[..8]);
    index.extend_from_slice(&[0xff; 8]);
    let block = index.len();
    index.extend_from_slice(id);
    for field in [0, offset, 44 + payload_len, plain_len] {
        index.extend_from_slice(&field.to_le_bytes());
    }
    index.resize(block + 4096, 0);
    mend_index(&mut index);
    let index_key = ObjectKey::new(ObjectKind::Index, blake3::hash(&index).to_hex().as_str());
    store.damage(&index_key.unwrap(), &index);
}

fn id_of(usage: &str, bytes: &[u8]) -> [u8; 32] {
    *blake3::keyed_hash(&plain_key(usage), bytes).as_bytes()
}

fn root(size_bytes: u64, top: [u8; 32]) -> ImageRoot {
    let chunk = ChunkSize::DEFAULT;
    let mut pages = chunk.count(size_bytes);
    let mut depth = 0_u8;
    while pages > 1 || (pages == 1 && depth == 0) {
        pages = pages.div_ceil(64);
        depth += 1;
    }
    let mut hasher = blake3::Hasher::new_keyed(&plain_key("root"));
    hasher.update(&size_bytes.to_le_bytes());
    hasher.update(&65536_u32.to_le_bytes());
    hasher.update(&[depth, 1]).update(&top);
    serde_json::from_value(json!({
        "hash": hasher.finalize().to_hex().as_str(), "size_bytes": size_bytes,
        "chunk_bytes": 65536, "top": ObjectId::from_bytes(top),
    }))
    .unwrap()
}

/// A page whose 64 children are all the same.
fn page_of(child: &[u8; 32]) -> Vec<u8> {
    [&u64::MAX.to_le_bytes()[..], &child.repeat(64)].concat()
}

fn plant_page(store: &MemStore, page: &[u8]) -> [u8; 32] {
    let id = id_of("page id", page);
    plant(store, 2, &id, u32::try_from(page.len()).unwrap(), 0, page);
    id
}

#[test]
fn a_chunk_that_grows_when_it_is_read_is_bounded_and_refused() {
    let (store, _, _) = small();
    // Four mebibytes are what a record may have at most, sixty-four times what a
    // chunk here has; the id fits the content.
    let plain = vec![b'a'; 4 << 20];
    let bomb = zstd::bulk::compress(&plain, 19).unwrap();
    let id = id_of("chunk id", &plain);
    plant(&store, 1, &id, 4 << 20, 1, &bomb);
    let page = [&1_u64.to_le_bytes()[..], &id].concat();
    let top = plant_page(&store, &page);
    let repo = open(&store).unwrap();
    let image = root(65536, top);
    // The reader gives what the id proves; that it is no chunk of this image is
    // seen by its length, which every caller checks.
    let chunk_len = repo.image(&image).unwrap().chunk_len(0);
    let longest = std::sync::atomic::AtomicUsize::new(0);
    let fetched = bounded(64 * MIB, || {
        repo.fetch(&[(0, ObjectId::from_bytes(id))], 1, &|_, bytes: &[u8]| {
            longest.fetch_max(bytes.len(), std::sync::atomic::Ordering::Relaxed);
            if bytes.len() == chunk_len {
                return Ok(());
            }
            Err(RepoError::new(
                RepoErrorKind::Damaged,
                "use a chunk of a wrong length",
            ))
        })
    });
    assert_eq!(fetched.unwrap_err().kind(), RepoErrorKind::Damaged);
    // One that claims more than any record may have is not even decompressed.
    let liar = MemStore::default();
    init(Arc::new(liar.clone()), None).unwrap();
    plant(&liar, 1, &id, u32::MAX, 1, &bomb);
    let repo = open(&liar).unwrap();
    let fetched = bounded(16 * MIB, || {
        repo.fetch(&[(0, ObjectId::from_bytes(id))], 1, &|_, _: &[u8]| {
            Ok::<(), RepoError>(())
        })
    });
    assert_eq!(fetched.unwrap_err().kind(), RepoErrorKind::Damaged);
}

#[test]
fn a_tree_reaches_neither_beyond_its_image_nor_into_memory() {
    let (store, _, _) = small();
    let chunk = vec![b'z'; CHUNK];
    let id = id_of("chunk id", &chunk);
    plant(&store, 1, &id, 65536, 0, &chunk);
    let mut top = plant_page(&store, &page_of(&id));
    // 64 children where the image has room for one.
    let repo = open(&store).unwrap();
    let error = repo
        .image(&root(65536, top))
        .unwrap()
        .chunks()
        .next()
        .unwrap()
        .unwrap_err();
    assert_eq!(error.kind(), RepoErrorKind::Damaged, "{error:?}");
    // Eight pages that together are an image of sixteen exbibytes: walking it
    // takes one page a level, whatever the size.
    let mut level = 1;
    while level < 8 {
        top = plant_page(&store, &page_of(&top));
        level += 1;
    }
    let repo = open(&store).unwrap();
    let image = repo.image(&root(u64::MAX, top)).unwrap();
    let walked = bounded(32 * MIB, || image.chunks().take(100_000).flatten().count());
    assert_eq!(walked, 100_000);
    let last = image.chunk(64_u64.pow(8) - 1).unwrap();
    assert_eq!(last, Some(ObjectId::from_bytes(id)));
    assert!(image.chunk(u64::MAX).is_err());
    // A root that nobody proved is refused before anything is read.
    let mut unproven = root(65536, top);
    unproven.size_bytes = u64::MAX;
    assert!(repo.image(&unproven).is_err());
}

/// Wraps a text up as the manifest of the point that is there.
fn forge_manifest(store: &MemStore, json: &[u8], plain_len: u32) {
    let mut object = b"HWSEAL\x01\x01\x01\0\0\0".to_vec();
    object.extend_from_slice(&plain_len.to_le_bytes());
    object.extend_from_slice(&[9; 32]);
    object.extend_from_slice(&zstd::bulk::compress(json, 1).unwrap());
    let hash = blake3::hash(&object);
    object.extend_from_slice(hash.as_bytes());
    store.damage(&find(store, ObjectKind::Point), &object);
}

#[test]
fn a_manifest_with_any_content_is_read_or_refused_in_bounded_memory() {
    let (store, _, _) = small();
    let repo = open(&store).unwrap();
    let good = serde_json::to_value(&repo.points().unwrap().points[0]).unwrap();
    let with = |field: &str, value: Value| {
        let mut bad = good.clone();
        *bad.pointer_mut(field).unwrap() = value;
        serde_json::to_vec(&bad).unwrap()
    };
    let text = String::from_utf8(serde_json::to_vec(&good).unwrap()).unwrap();
    let insert = |more: &str| text.replacen('{', &format!("{{{more},"), 1).into_bytes();
    let many = |one: &str| {
        format!(
            "[{one}{}]",
            format!(",{one}").repeat((60 << 20) / (one.len() + 1))
        )
    };
    let list = |field: &str, one: &str| {
        let before = serde_json::to_string(field).unwrap() + ":[]";
        assert!(text.contains(&before), "{before}");
        text.replacen(&before, &format!("\"{field}\":{}", many(one)), 1)
            .into_bytes()
    };
    let disk = serde_json::to_string(&good["disks"][0]).unwrap();
    for (what, json) in [
        ("tags", list("tags", "\"\"")),
        ("hypervisor", list("hypervisor", "[\"\",\"\"]")),
        (
            "skipped",
            list("skipped", "{\"target\":\"\",\"reason\":\"\"}"),
        ),
        (
            "disks",
            text.replacen(&format!("[{disk}]"), &many(&disk), 1)
                .into_bytes(),
        ),
        ("same field twice", insert("\"tags\":[]")),
        ("negative", with("/sequence", json!(-1))),
        ("fraction", with("/sequence", json!(1.5))),
        ("size", with("/disks/0/image/size_bytes", json!(u64::MAX))),
        ("chunk", with("/disks/0/image/chunk_bytes", json!(0))),
        ("time", with("/taken_at", json!("9".repeat(100_000)))),
        ("point", with("/point", json!("../../../etc/passwd"))),
        ("nothing", b"null".to_vec()),
    ] {
        let len = u32::try_from(json.len()).unwrap();
        forge_manifest(&store, &json, len);
        drop(json);
        let list = bounded(320 * MIB, || open(&store).unwrap().points()).unwrap();
        assert_eq!((list.points.len(), list.damaged.len()), (0, 1), "{what}");
    }
    // What a later version may add is passed over, however long it is.
    let deep = format!("{}{}", "[".repeat(1 << 20), "]".repeat(1 << 20));
    for unknown in [many("[]"), deep] {
        let json = insert(&format!("\"x\":{unknown}"));
        forge_manifest(&store, &json, u32::try_from(json.len()).unwrap());
        drop((json, unknown));
        let list = bounded(320 * MIB, || open(&store).unwrap().points()).unwrap();
        assert_eq!(list.points.len(), 1);
    }
    // As long as one may be, and harmless.
    forge_manifest(&store, &with("/definition", json!("d".repeat(60 << 20))), 1);
    assert_eq!(open(&store).unwrap().points().unwrap().damaged.len(), 1);
    let long = with("/definition", json!("d".repeat(60 << 20)));
    let len = u32::try_from(long.len()).unwrap();
    forge_manifest(&store, &long, len);
    drop(long);
    let list = bounded(320 * MIB, || open(&store).unwrap().points()).unwrap();
    assert_eq!(list.points.len(), 1);
    // A length that it does not have.
    for len in [0, 1, 64 << 20, (64 << 20) + 1, u32::MAX] {
        forge_manifest(&store, text.as_bytes(), len);
        let list = bounded(160 * MIB, || open(&store).unwrap().points()).unwrap();
        assert_eq!(list.damaged.len(), 1, "{len}");
    }
}

#[test]
fn a_manifest_that_could_not_be_read_back_is_never_committed() {
    let store = MemStore::default();
    let repo = init(Arc::new(store.clone()), None).unwrap();
    let writer = repo.writer(options()).unwrap();
    let image = store_full(&writer, b"abc").unwrap();
    let mut manifest = manifest(&vm("a"), 1, &[image]);
    manifest.warnings = vec![String::new(); (1 << 16) + 1];
    assert!(writer.flush().unwrap().commit(&manifest).is_err());
    assert!(repo.points().unwrap().points.is_empty());
}
