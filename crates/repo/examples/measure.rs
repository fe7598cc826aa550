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
            for byte in head.iter_mut() {
                *byte = b'a' + *byte % 16;
            }
            tail.chunks_mut(64)
                .for_each(|part| part.copy_from_slice(&head[..part.len()]));
        }
    }
    bytes
}

/// Prints MB (1e6) per second of wall clock, and per second that the lanes'
/// threads really had a processor, which is what counts on a busy machine.
fn throughput(threads: usize) -> Result<()> {
    let chunks = 4096 / threads;
    let all: Vec<Vec<u8>> = (0..threads).map(|n| data(chunks, n as u64)).collect();
    let total = (threads * chunks * CHUNK) as f64 / 1e6;
    println!("{threads} thread(s), {total:.0} MB");
    for encrypted in [false, true] {
        for (name, compression) in [
            ("none", Compression::None),
            ("lz4", Compression::Lz4),
            ("zstd:1", Compression::Zstd(1)),
            ("zstd:3", Compression::Zstd(3)),
        ] {
            let repo = init(Arc::new(MemStore::default()), encrypted)?;
            let options = WriterOptions {
                compression,
                ..WriterOptions::default()
            };
            let writer = repo.writer(options)?;
            // The buffers of packs are touched for the first time here.
            add(&writer, &data(600, 99))?;
            let before = writer.stats().stored_bytes_chunks;
            let (wall, cpu) = run(&all, |bytes| add(&writer, bytes))?;
            let stored = (writer.stats().stored_bytes_chunks - before) as f64 / 1e6;
            writer.flush()?;
            let wanted = |bytes: &Vec<u8>| -> Vec<_> {
                let ids = bytes.chunks(CHUNK).filter_map(|chunk| repo.chunk_id(chunk));
                ids.enumerate().map(|(at, id)| (at as u64, id)).collect()
            };
            let lists: Vec<_> = all.iter().map(wanted).collect();
            let drop_all = |list: &Vec<_>| repo.fetch(list, 1, &|_, _| Ok::<(), RepoError>(()));
            let (fetch_wall, fetch_cpu) = run(&lists, drop_all)?;
            println!(
                "{name:>7} encrypted={encrypted:<5} add {:5.0} wall {:5.0} cpu   \
                 fetch {:5.0} wall {:5.0} cpu   ratio {:.2}",
                total / wall,
                total / cpu,
                total / fetch_wall,
                total / fetch_cpu,
                total / stored
            );
        }
    }
    Ok(())
}

/// Works on each part in a thread of its own; returns seconds of wall clock and
/// of all threads' time on a processor.
fn run<T: Sync>(
    parts: &[T],
    work: impl Fn(&T) -> Result<(), RepoError> + Sync,
) -> Result<(f64, f64)> {
    let start = Instant::now();
    let timed = |part: &T| -> Result<f64> {
        let before = processor_seconds()?;
        work(part)?;
        Ok(processor_seconds()? - before)
    };
    let cpu = thread::scope(|scope| {
        let threads: Vec<_> = parts
            .iter()
            .map(|part| scope.spawn(|| timed(part)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("no panic"))
            .sum::<Result<f64>>()
    })?;
    Ok((start.elapsed().as_secs_f64(), cpu))
}

fn processor_seconds() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat")?;
    let number = text.split_whitespace().next().context("no schedstat")?;
    Ok(number.parse::<f64>()? / 1e9)
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
