//! Measures the way of chunks into a repository: throughput of `Lane::add`
//! per compression and cipher, of `fetch`, and memory under many new chunks.
//!
//! ```text
//! cargo run --release -p highwater-repo --example measure -- throughput [THREADS]
//! cargo run --release -p highwater-repo --example measure -- memory MILLIONS [FOLDER]
//! ```

#![allow(
    clippy::print_stdout,
    clippy::cast_precision_loss,
    reason = "a measurement prints"
)]

use std::sync::Arc;
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use highwater_model::ChunkSize;
use highwater_repo::{
    Compression, InitOptions, RepoError, Repository, Secret, Writer, WriterOptions,
};
use highwater_store::testing::MemStore;
use highwater_store::{
    Listed, LocalStore, ObjectKey, ObjectKind, Store, StoreError, StoreErrorKind,
};

const CHUNK: usize = 64 << 10;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["throughput"] => throughput(1),
        ["throughput", threads] => throughput(threads.parse()?),
        ["memory", millions, rest @ ..] => memory(millions.parse()?, rest.first().copied()),
        _ => bail!("say `throughput [THREADS]` or `memory MILLIONS [FOLDER]`"),
    }
}

fn init(store: Arc<dyn Store>, encrypted: bool) -> Result<Repository> {
    let secret = encrypted.then(|| Secret::KeyFile(vec![7; 32].into()));
    Ok(Repository::init(
        store,
        &InitOptions {
            chunk_size: ChunkSize::DEFAULT,
            secret,
        },
    )?)
}

/// Like the files of an operating system: half text-like, half dense; about
/// 2 to 1 under zstd.
fn data(chunks: usize, salt: u64) -> Vec<u8> {
    let mut bytes = vec![0; chunks * CHUNK];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&salt.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    for (at, block) in bytes.chunks_mut(256).enumerate() {
        // Words from a small alphabet, repeated at odd distances.
        if at % 8 < 5 {
            let (head, tail) = block.split_at_mut(64);
            head.iter_mut().for_each(|byte| *byte = b'a' + *byte % 16);
            tail.chunks_mut(64)
                .for_each(|part| part.copy_from_slice(&head[..part.len()]));
        }
    }
    bytes
}

fn throughput(threads: usize) -> Result<()> {
    let chunks = 4096 / threads;
    let all: Vec<Vec<u8>> = (0..threads).map(|n| data(chunks, n as u64)).collect();
    let total = (threads * chunks * CHUNK) as f64;
    println!(
        "{threads} thread(s), {} MiB, MB/s = 1e6",
        threads * chunks * CHUNK >> 20
    );
    for encrypted in [false, true] {
        for (name, compression) in [
            ("none", Compression::None),
            ("lz4", Compression::Lz4),
            ("zstd:1", Compression::Zstd(1)),
            ("zstd:3", Compression::Zstd(3)),
        ] {
            let store = Arc::new(MemStore::default());
            let repo = init(store, encrypted)?;
            let writer = repo.writer(WriterOptions {
                compression,
                ..WriterOptions::default()
            })?;
            // The buffers of packs are touched for the first time here.
            add(&writer, &data(600, 99))?;
            let before = writer.stats().stored_bytes_chunks;
            let start = Instant::now();
            thread::scope(|scope| {
                let writer = &writer;
                let lanes: Vec<_> = all
                    .iter()
                    .map(|bytes| scope.spawn(move || add(writer, bytes)))
                    .collect();
                lanes
                    .into_iter()
                    .try_for_each(|lane| lane.join().expect("no panic"))
            })?;
            let added = start.elapsed().as_secs_f64();
            let stored = (writer.stats().stored_bytes_chunks - before) as f64;
            writer.flush()?;
            let wanted: Vec<_> = all
                .iter()
                .flat_map(|bytes| bytes.chunks(CHUNK))
                .filter_map(|chunk| repo.chunk_id(chunk))
                .enumerate()
                .map(|(at, id)| (at as u64, id))
                .collect();
            let start = Instant::now();
            repo.fetch(&wanted, threads, &|_, _| Ok::<(), RepoError>(()))?;
            let fetched = start.elapsed().as_secs_f64();
            println!(
                "{name:>7} encrypted={encrypted:<5} add {:6.0}  fetch {:6.0}  ratio {:.2}",
                total / added / 1e6,
                total / fetched / 1e6,
                total / stored
            );
        }
    }
    Ok(())
}

fn add(writer: &Writer, bytes: &[u8]) -> Result<(), RepoError> {
    let mut lane = writer.lane();
    bytes
        .chunks(CHUNK)
        .try_for_each(|chunk| lane.add(chunk).map(drop))
}

/// Adds chunks of 64 bytes, each new: what counts here is their number.
fn memory(millions: u64, folder: Option<&str>) -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let folder = folder.map_or(temporary.path(), std::path::Path::new);
    let repo = init(Arc::new(WithoutPacks(LocalStore::new(folder))), true)?;
    let options = WriterOptions {
        compression: Compression::None,
        ..WriterOptions::default()
    };
    let writer = repo.writer(options)?;
    let start = Instant::now();
    let count = millions * 1_000_000;
    let mut lane = writer.lane();
    for number in 1..=count {
        let mut chunk = [0; 64];
        chunk[..8].copy_from_slice(&number.to_le_bytes());
        lane.add(&chunk)?;
        if number % 1_000_000 == 0 {
            let seconds = start.elapsed().as_secs_f64();
            println!(
                "{number} chunks, {seconds:.1} s, peak {} MiB",
                peak_kib()? >> 10
            );
        }
    }
    drop(lane);
    println!("{:?}", writer.flush()?.stats());
    println!("peak {} MiB", peak_kib()? >> 10);
    Ok(())
}

fn peak_kib() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line
        .and_then(|line| line.split_whitespace().next())
        .context("no VmHWM")?;
    Ok(number.parse()?)
}

/// Keeps everything but the bytes of packs, which are not what is measured.
#[derive(Debug)]
struct WithoutPacks(LocalStore);

impl Store for WithoutPacks {
    fn prepare(&self) -> Result<(), StoreError> {
        self.0.prepare()
    }

    fn put(&self, key: &ObjectKey, parts: &[&[u8]]) -> Result<(), StoreError> {
        if key.kind() == ObjectKind::Pack {
            return Ok(());
        }
        self.0.put(key, parts)
    }

    fn get(&self, key: &ObjectKey, max_bytes: u64) -> Result<Vec<u8>, StoreError> {
        self.0.get(key, max_bytes)
    }

    fn get_range(&self, key: &ObjectKey, offset: u64, into: &mut [u8]) -> Result<(), StoreError> {
        self.0.get_range(key, offset, into)
    }

    fn list(&self, kind: ObjectKind, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        self.0.list(kind, prefix)
    }

    fn size(&self, key: &ObjectKey) -> Result<u64, StoreError> {
        if key.kind() == ObjectKind::Pack {
            let error = StoreError::new(StoreErrorKind::NotFound, "find", key.path(), "memory");
            return Err(error);
        }
        self.0.size(key)
    }

    fn delete(&self, key: &ObjectKey) -> Result<(), StoreError> {
        self.0.delete(key)
    }

    fn location(&self) -> String {
        self.0.location()
    }
}
