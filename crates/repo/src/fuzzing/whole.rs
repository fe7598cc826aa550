//! A whole repository, changed anywhere: never a wrong byte.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use highwater_model::{ChunkSize, PointId, RootHash, Timestamp};
use highwater_store::testing::MemStore;
use highwater_store::{ObjectKey, ObjectKind, Store as _};

use super::mend::{mend_config, mend_index, mend_tail};
use crate::compress::Compression;
use crate::container::{self, ContainerKind};
use crate::error::RepoError;
use crate::manifest::{
    DiskRecord, Evidence, EvidenceLink, ImageRoot, Manifest, MarkRecord, Origin, VmIdentity,
};
use crate::repository::{InitOptions, Repository};
use crate::secret::Secret;
use crate::wire::{is_zero, wide};
use crate::writer::WriterOptions;

const CHUNK: usize = 64 << 10;

/// The chunks of an image that are not all zero.
type Content = BTreeMap<u64, Vec<u8>>;

/// A small repository, and what its images hold.
pub(super) struct Base {
    pub(super) shelf: MemStore,
    secret: Option<Secret>,
    images: BTreeMap<RootHash, Content>,
}

/// The one without encryption.
pub(super) fn plain() -> &'static Base {
    static BASE: OnceLock<Base> = OnceLock::new();
    BASE.get_or_init(|| Base::make(None).expect("a store in memory does not fail"))
}

fn sealed() -> &'static Base {
    static BASE: OnceLock<Base> = OnceLock::new();
    let secret = || Secret::KeyFile(vec![0x5a; 32].into());
    BASE.get_or_init(|| Base::make(Some(secret())).expect("a store in memory does not fail"))
}

impl Base {
    /// Two points of one VM with two disks: short last chunks, zeroes, chunks
    /// that compress and some that do not, shared ones, more than one level.
    fn make(secret: Option<Secret>) -> Result<Self, RepoError> {
        let shelf = Arc::new(MemStore::of_whole_objects());
        let options = InitOptions {
            chunk_size: ChunkSize::DEFAULT,
            secret: secret.clone(),
        };
        let repo = Repository::init(shelf.clone(), &options)?;
        let mut images = BTreeMap::new();
        for at in [1, 2] {
            let writer = repo.writer(WriterOptions {
                compression: Compression::Zstd(1),
                pack_bytes: 1 << 20,
                upload_threads: 1,
            })?;
            let mut saved = Vec::new();
            for bytes in [small_image(at), tall_image(at)] {
                let mut tree = writer.tree(None, wide(bytes.len()))?;
                let mut lane = writer.lane();
                for (index, chunk) in bytes.chunks(CHUNK).enumerate() {
                    tree.set(wide(index), lane.add(chunk)?.id)?;
                }
                drop(lane);
                let root = tree.finish()?;
                images.insert(root.hash, content_of(&bytes));
                saved.push(root);
            }
            let manifest = manifest_of(at, &saved);
            writer.flush()?.commit(&manifest)?;
        }
        drop(repo);
        let shelf = shelf.fork();
        Ok(Self {
            shelf,
            secret,
            images,
        })
    }

    /// Reads all that is listed. Errors are good; other bytes than those that
    /// were stored under a root are not.
    fn look(&self, changed: MemStore) -> Result<(), RepoError> {
        drop(Repository::secret_kinds(&changed)?);
        let repo = Repository::open(Arc::new(changed), self.secret.as_ref())?;
        let list = repo.points()?;
        for disk in list.points.iter().flat_map(|point| &point.disks).take(8) {
            let Ok(bytes) = read(&repo, &disk.image) else {
                continue;
            };
            let wanted = self.images.get(&disk.image.hash);
            assert!(
                wanted.is_some_and(|wanted| *wanted == bytes),
                "wrong bytes came out of an image"
            );
        }
        Ok(())
    }
}

/// Reads an image as a restore does.
fn read(repo: &Repository, root: &ImageRoot) -> Result<Content, RepoError> {
    let image = repo.image(root)?;
    // More than any image here has.
    let wanted = image.chunks().take(100).collect::<Result<Vec<_>, _>>()?;
    let found = Mutex::new(Content::new());
    repo.fetch(&wanted, 1, &|chunk, content: &[u8]| {
        if content.len() != image.chunk_len(chunk) {
            return Err(RepoError::usage("read a chunk", "it has a wrong length"));
        }
        let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
        let before = found.insert(chunk, content.to_vec());
        assert!(before.is_none(), "a chunk comes twice");
        Ok::<(), RepoError>(())
    })?;
    Ok(found.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn content_of(bytes: &[u8]) -> Content {
    let chunks = (0_u64..).zip(bytes.chunks(CHUNK).map(<[u8]>::to_vec));
    chunks.filter(|(_, chunk)| !is_zero(chunk)).collect()
}

/// Changes a small repository as the bytes say, and reads it.
///
/// The first byte chooses: bit 0 an encrypted one, bit 1 that hashes which need
/// no key are mended after a change. Eight bytes each then are one change:
/// which object, how, where (three bytes), and a value (three bytes).
pub fn repository(bytes: &[u8]) {
    let Some((choice, changes)) = bytes.split_first() else {
        return;
    };
    let base = if choice & 1 == 0 { plain() } else { sealed() };
    let shelf = base.shelf.fork();
    let keys = shelf.keys();
    let mut touched = Vec::new();
    for change in changes.as_chunks::<8>().0.iter().take(16) {
        let [object, how, at0, at1, at2, value @ ..] = *change;
        let pick = |byte: u8| keys.get(usize::from(byte).checked_rem(keys.len())?);
        let Some(key) = pick(object) else { return };
        let at = usize::from(at0) | usize::from(at1) << 8 | usize::from(at2) << 16;
        let other = pick(value[0]).map(|key| shelf.bytes(key).unwrap_or_default());
        let opened = open(&shelf, key, choice & 3 == 2);
        let is_open = opened.is_some();
        let mut content = opened.unwrap_or_else(|| shelf.bytes(key).unwrap_or_default());
        if !apply(&mut content, how, at, value, &other.unwrap_or_default()) {
            drop(shelf.delete(key));
            continue;
        }
        if is_open {
            let sealed = container::seal(ContainerKind::Manifest, key, None, &content);
            content = sealed.unwrap_or_default();
        }
        shelf.damage(key, &content);
        touched.push(key.clone());
    }
    if choice & 2 != 0 {
        for key in &touched {
            mend(&shelf, key);
        }
    }
    drop(base.look(shelf));
}

/// The JSON of a manifest that anybody may rewrite.
fn open(shelf: &MemStore, key: &ObjectKey, may_open: bool) -> Option<Vec<u8>> {
    let is_open = may_open && key.kind() == ObjectKind::Point;
    let object = is_open.then(|| shelf.bytes(key).unwrap_or_default())?;
    container::open(ContainerKind::Manifest, key, None, &object).ok()
}

/// Changes an object; returns `false` if it is to be removed.
fn apply(content: &mut Vec<u8>, how: u8, at: usize, value: [u8; 3], other: &[u8]) -> bool {
    // Long objects are packs, whose beginning matters as much as their end.
    let at = at.checked_rem(content.len().saturating_add(1)).unwrap_or(0);
    let [low, middle, high] = value;
    let len = usize::from(middle) | usize::from(high) << 8;
    let write = |content: &mut Vec<u8>, new: &[u8]| {
        let rest = content.get_mut(at..).unwrap_or_default();
        rest.iter_mut().zip(new).for_each(|(to, from)| *to = *from);
    };
    match how % 10 {
        0 => {
            if let Some(byte) = content.get_mut(at) {
                *byte ^= low.max(1);
            }
        }
        1 => write(content, &[low]),
        2 => write(
            content,
            &u32::from_le_bytes([low, middle, high, 0]).to_le_bytes(),
        ),
        3 => write(content, &u64::MAX.wrapping_sub(low.into()).to_le_bytes()),
        4 => content.truncate(at),
        5 => content.extend(std::iter::repeat_n(low, len)),
        6 => return false,
        7 => *content = other.to_vec(),
        8 => write(
            content,
            other
                .get(at..)
                .unwrap_or_default()
                .get(..len)
                .unwrap_or_default(),
        ),
        _ => {
            let from = usize::from(low).saturating_mul(usize::from(middle));
            let piece = content.get(from..).unwrap_or_default();
            let piece = piece
                .get(..48.min(piece.len()))
                .unwrap_or_default()
                .to_vec();
            write(content, &piece);
        }
    }
    true
}

fn mend(shelf: &MemStore, key: &ObjectKey) {
    let mut bytes = shelf.bytes(key).unwrap_or_default();
    match key.kind() {
        ObjectKind::Index => mend_index(&mut bytes),
        ObjectKind::Point => mend_tail(&mut bytes),
        ObjectKind::Config => bytes = mend_config(&bytes),
        ObjectKind::Key => {
            let name = blake3::hash(&bytes).to_hex();
            let key = ObjectKey::new(ObjectKind::Key, name.as_str());
            shelf.damage(&key.expect("hexadecimal is a good name"), &bytes);
            return;
        }
        ObjectKind::Pack
        | ObjectKind::Lease
        | ObjectKind::Damage
        | ObjectKind::Proof
        | ObjectKind::Prune => return,
    }
    shelf.damage(key, &bytes);
}

/// Two chunks, the last short.
fn small_image(at: i64) -> Vec<u8> {
    let text = format!("point {at} ").into_bytes();
    text.into_iter()
        .cycle()
        .take(CHUNK.saturating_add(90))
        .collect()
}

/// Two levels of pages, mostly zero; equal in both points but for one chunk.
fn tall_image(at: i64) -> Vec<u8> {
    let mut bytes = vec![0; CHUNK.saturating_mul(66)];
    let mut fill = |chunk: usize, seed: i64| {
        let start = chunk.saturating_mul(CHUNK);
        let piece = bytes.get_mut(start..).unwrap_or_default();
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        let piece = piece.get_mut(..300).unwrap_or_default();
        hasher.finalize_xof().fill(piece);
    };
    for (chunk, seed) in [(0, 7), (1, 8), (30, at), (64, 9), (65, 7)] {
        fill(chunk, seed);
    }
    bytes
}

fn manifest_of(at: i64, roots: &[ImageRoot]) -> Manifest {
    let taken_at = Timestamp::from_unix_ms(at);
    let point = PointId::new(taken_at);
    let mark: Option<MarkRecord> = "11111111111111111111111111111111"
        .parse()
        .ok()
        .map(|nonce| MarkRecord {
            name: highwater_model::MarkName::new(
                highwater_model::RepoId::from_bytes([1; 16]),
                point,
            ),
            nonce,
            created_s: Some(1_795_259_190),
            disks: vec!["vda".to_owned()],
        });
    let disk = |(number, image): (usize, &ImageRoot)| DiskRecord {
        target: ["vda", "vdb"]
            .get(number)
            .copied()
            .unwrap_or("vdc")
            .to_owned(),
        mode: "full".to_owned(),
        reason: Some("first-backup".to_owned()),
        parent: None,
        image: *image,
        file_bytes: Some(1),
        format: "qcow2".to_owned(),
        source: "/images/a".to_owned(),
        dirty_bytes: image.size_bytes,
        read_bytes: image.size_bytes,
        stored_bytes: 0,
        audited_blocks: 0,
        marked: number == 0,
        evidence: Evidence {
            serial: Some("s".to_owned()),
            device: None,
            device_unknown: false,
            chain: vec![EvidenceLink {
                name: "/images/a".to_owned(),
                format: "qcow2".to_owned(),
                inode: Some((1, 2)),
                stamp: Some((1, 2, 3)),
            }],
            granularity: Some(65536),
            process: Some((1, 2, "b".to_owned())),
            counters: Some((1, 2)),
            smallest_size_bytes: 65536,
            hot: Vec::new(),
        },
    };
    Manifest {
        version: 1,
        point,
        vm: VmIdentity {
            name: "web01".to_owned(),
            uuid: None,
        },
        sequence: 1,
        prev: None,
        taken_at,
        utc_offset_minutes: 60,
        committed_at: taken_at,
        consistency: "offline".to_owned(),
        level: "auto".to_owned(),
        origin: Origin {
            host: "h".to_owned(),
            version: "0".to_owned(),
            hypervisor: vec![("qemu".to_owned(), "10".to_owned())],
        },
        definition: "<domain/>".to_owned(),
        definition_at: taken_at,
        files: vec![],
        disks: roots.iter().enumerate().map(disk).collect(),
        skipped: vec![],
        mark,
        healed: vec!["h".to_owned()],
        warnings: vec![],
        tags: vec!["t".to_owned()],
        group: Some("g".to_owned()),
        duration_ms: 1,
        prune_epoch: 0,
    }
}

/// Returns seeds: the name of a target and an input for it.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let base = plain();
    let mut seeds = Vec::new();
    for key in base.shelf.keys() {
        let bytes = base.shelf.bytes(&key).unwrap_or_default();
        match key.kind() {
            ObjectKind::Pack => seeds.push(("pack", bytes.get(..4096).unwrap_or(&bytes).to_vec())),
            ObjectKind::Index => seeds.push(("index", bytes)),
            ObjectKind::Config => seeds.push(("key", [&[0], bytes.as_slice()].concat())),
            ObjectKind::Point => {
                let json = container::open(ContainerKind::Manifest, &key, None, &bytes);
                seeds.extend(json.ok().map(|json| ("manifest", json)));
            }
            ObjectKind::Key
            | ObjectKind::Lease
            | ObjectKind::Damage
            | ObjectKind::Proof
            | ObjectKind::Prune => {}
        }
    }
    let keys = sealed().shelf.keys();
    let keys = keys.iter().filter(|key| key.kind() == ObjectKind::Key);
    seeds.extend(keys.map(|key| {
        (
            "key",
            [
                &[1],
                sealed().shelf.bytes(key).unwrap_or_default().as_slice(),
            ]
            .concat(),
        )
    }));
    for choice in 0..4 {
        for how in 0..10 {
            for object in 0..12 {
                let change = [object, how, 70, 0, 0, 1, 2, 0];
                seeds.push(("repository", [&[choice], &change[..]].concat()));
            }
        }
    }
    seeds
}
