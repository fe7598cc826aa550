//! What the tests of this crate share: small repositories, images as plain
//! bytes, saving and reading them back.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file uses its own part"
)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use highwater_model::{ChunkSize, PointId, Timestamp};
use highwater_repo::{
    Compression, DiskRecord, Evidence, Flushed, ImageRoot, InitOptions, Manifest, Origin,
    RepoError, Repository, Secret, TreeBuilder, VmIdentity, Writer, WriterOptions,
};
use highwater_store::Store;

pub const CHUNK: usize = 64 << 10;

pub fn key_file() -> Secret {
    Secret::KeyFile(vec![0x5a; 32].into())
}

pub fn init(store: Arc<dyn Store>, secret: Option<Secret>) -> Result<Repository, RepoError> {
    Repository::init(
        store,
        &InitOptions {
            chunk_size: ChunkSize::DEFAULT,
            secret,
        },
    )
}

pub fn vm(name: &str) -> VmIdentity {
    VmIdentity {
        name: name.to_owned(),
        uuid: None,
    }
}

pub fn options() -> WriterOptions {
    WriterOptions {
        compression: Compression::Zstd(1),
        pack_bytes: 1 << 20,
        upload_threads: 1,
    }
}

/// Returns `chunks` chunks of content that depends on `seed`; every third one
/// is zero, every third one compresses.
pub fn image(seed: u64, chunks: u64) -> Vec<u8> {
    (0..chunks).flat_map(|index| chunk(seed, index)).collect()
}

pub fn chunk(seed: u64, index: u64) -> Vec<u8> {
    match (seed + index) % 3 {
        0 => vec![0; CHUNK],
        1 => format!("seed {seed} chunk {index} ")
            .into_bytes()
            .into_iter()
            .cycle()
            .take(CHUNK)
            .collect(),
        _ => noise(seed.wrapping_mul(1 << 32) + index, CHUNK),
    }
}

/// Returns bytes that do not compress.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

/// Stores the whole of `bytes` on top of nothing.
pub fn store_full(writer: &Writer, bytes: &[u8]) -> Result<ImageRoot, RepoError> {
    let mut tree = writer.tree(None, bytes.len() as u64)?;
    set_chunks(writer, &mut tree, bytes, 0..bytes.len().div_ceil(CHUNK))?;
    tree.finish()
}

/// Stores the chunks in which `bytes` differs from `old`.
pub fn store_changes(
    writer: &Writer,
    parent: &ImageRoot,
    old: &[u8],
    bytes: &[u8],
) -> Result<ImageRoot, RepoError> {
    let mut tree = writer.tree(Some(parent), bytes.len() as u64)?;
    let differs = |index: &usize| piece(old, *index) != piece(bytes, *index);
    let changed = (0..bytes.len().div_ceil(CHUNK)).filter(differs);
    set_chunks(writer, &mut tree, bytes, changed)?;
    tree.finish()
}

fn set_chunks(
    writer: &Writer,
    tree: &mut TreeBuilder<'_>,
    bytes: &[u8],
    indices: impl Iterator<Item = usize>,
) -> Result<(), RepoError> {
    let mut lane = writer.lane();
    for index in indices {
        let id = lane.add(piece(bytes, index).expect("within the image"))?.id;
        tree.set(index as u64, id)?;
    }
    Ok(())
}

fn piece(bytes: &[u8], index: usize) -> Option<&[u8]> {
    bytes
        .get(index * CHUNK..)
        .map(|rest| &rest[..rest.len().min(CHUNK)])
}

pub fn manifest(vm: &VmIdentity, at: i64, disks: &[ImageRoot]) -> Manifest {
    let taken_at = Timestamp::from_unix_ms(at);
    let disk = |(number, image): (usize, &ImageRoot)| DiskRecord {
        target: format!("vd{number}"),
        mode: "full".to_owned(),
        reason: None,
        parent: None,
        image: *image,
        file_bytes: None,
        format: "raw".to_owned(),
        source: "/images/a".to_owned(),
        dirty_bytes: image.size_bytes,
        read_bytes: image.size_bytes,
        stored_bytes: 0,
        audited_blocks: 0,
        marked: false,
        evidence: Evidence::default(),
    };
    Manifest {
        version: 1,
        point: PointId::new(taken_at),
        vm: vm.clone(),
        sequence: 1,
        prev: None,
        taken_at,
        utc_offset_minutes: 0,
        committed_at: taken_at,
        consistency: "offline".to_owned(),
        level: "auto".to_owned(),
        origin: Origin {
            host: "h".to_owned(),
            version: "0".to_owned(),
            hypervisor: vec![],
        },
        definition: "<domain/>".to_owned(),
        definition_at: taken_at,
        files: vec![],
        disks: disks.iter().enumerate().map(disk).collect(),
        skipped: vec![],
        mark: None,
        healed: vec![],
        warnings: vec![],
        tags: vec![],
        group: None,
        duration_ms: 1,
        prune_epoch: 0,
    }
}

/// Stores an image as a restore point of its own.
pub fn save(repo: &Repository, name: &str, at: i64, bytes: &[u8]) -> Result<Manifest, RepoError> {
    let writer = repo.writer(options())?;
    let root = store_full(&writer, bytes)?;
    commit(writer.flush()?, name, at, root)
}

pub fn commit(
    flushed: Flushed,
    name: &str,
    at: i64,
    root: ImageRoot,
) -> Result<Manifest, RepoError> {
    let manifest = manifest(&vm(name), at, &[root]);
    flushed.commit(&manifest)?;
    Ok(manifest)
}

/// Reads a whole image back through the tree and `fetch`.
pub fn read(repo: &Repository, root: &ImageRoot) -> Result<Vec<u8>, RepoError> {
    let image = repo.image(root)?;
    let wanted = image.chunks().collect::<Result<Vec<_>, _>>()?;
    let found = Mutex::new(BTreeMap::new());
    repo.fetch(&wanted, 2, &|index, chunk: &[u8]| {
        found.lock().unwrap().insert(index, chunk.to_vec());
        Ok::<(), RepoError>(())
    })?;
    let found = found.into_inner().unwrap();
    assert_eq!(found.len(), wanted.len(), "each wanted chunk comes once");
    let mut bytes = vec![0; usize::try_from(root.size_bytes).unwrap()];
    for (index, chunk) in found {
        assert_eq!(chunk.len(), image.chunk_len(index), "chunk {index}");
        let start = usize::try_from(index).unwrap() * CHUNK;
        bytes[start..start + chunk.len()].copy_from_slice(&chunk);
    }
    Ok(bytes)
}
