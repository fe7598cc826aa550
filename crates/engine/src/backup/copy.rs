//! Copies all disks of a session: bounded, parallel, pipelined.
//!
//! ```text
//! disk runner ─ walks the map ─► items ─► readers (NBD, several requests in flight)
//!      ▲ tokens                              │ filled buffers
//!      │                                     ▼
//! collector ◄─ ids, in any order ─ workers (hash, known?, compress, pack)
//!      └─ sets them in the tree in ascending order
//! ```
//!
//! Memory: the buffer pool and the tokens (each stands for one item between map
//! and tree); nothing grows with the disk or with the number of workers.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use highwater_hypervisor::{ErrorKind, Export, HypervisorError};
use highwater_model::{ByteRange, ObjectId};
use highwater_nbd::{Canceller, NbdError};
use highwater_plan::DirtySample;
use highwater_repo::{ImageRoot, RepoError, RepoErrorKind, Repository, Writer};

use super::audit::{AuditOrder, Audited};
use super::disk_copy::run_disk;
use super::pool::Pool;
use crate::{Cancel, DiskDone, DiskProgress, Event, Limiter, Observer};

/// Bytes of one NBD request (or one chunk, if that is larger). QEMU serves up
/// to 32 MiB, but keeps a buffer per request: field measurements call
/// 256 KiB to 1 MiB plenty.
pub(super) const REQUEST_BYTES: u64 = 512 << 10;
/// Filled buffers that wait for a worker, for each of them. More would only
/// grow cold: the readers have enough under way to fill the next ones.
const FILLED_PER_WORKER: usize = 4;
/// How often progress is told and the session looked at.
const TICK: Duration = Duration::from_millis(100);
/// How long the guard's word may take to arrive after the connections it ended.
const GUARD_WORD: Duration = Duration::from_millis(200);

/// Threads and buffers of a backup.
#[derive(Debug, Clone, Copy)]
pub struct Tuning {
    /// Threads that hash, compress and pack.
    pub workers: usize,
    /// Disks read at the same time.
    pub disks: usize,
    /// NBD connections per disk.
    pub connections: usize,
    /// NBD connections per disk if the server takes long to answer: then what
    /// is under way decides how fast it goes.
    pub connections_far: usize,
    /// Bytes of read buffers in all. Most of them are needed, and take memory,
    /// only while a server that takes long to answer is read.
    pub buffer_bytes: usize,
    /// Most bytes read per second, of all disks together.
    pub read_limit: Option<u64>,
}

impl Default for Tuning {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        Self {
            workers: cores.clamp(1, 16),
            disks: 2,
            connections: 2,
            connections_far: 4,
            buffer_bytes: 64 << 20,
            read_limit: None,
        }
    }
}

/// One disk to copy.
#[derive(Debug, Clone)]
pub(super) struct CopyJob {
    pub(super) target: String,
    pub(super) export: Export,
    /// The tree an increment is built on.
    pub(super) parent: Option<ImageRoot>,
    pub(super) read: ReadPlan,
    /// Size the plan was made for, bytes.
    pub(super) size_bytes: u64,
}

/// What is read of a disk.
#[derive(Debug, Clone)]
pub(super) enum ReadPlan {
    /// Everything.
    All,
    /// What a bitmap calls dirty, and everything from `tail_from` on.
    Dirty {
        context: String,
        tail_from: Option<u64>,
        audit: AuditOrder,
    },
}

/// What became of one disk.
#[derive(Debug)]
pub(super) struct DiskCopied {
    pub(super) target: String,
    pub(super) size_bytes: u64,
    pub(super) elapsed: Duration,
    pub(super) result: Result<Copied, CopyError>,
}

/// A disk that was read whole.
#[derive(Debug, Clone)]
pub(super) struct Copied {
    pub(super) image: ImageRoot,
    pub(super) dirty_bytes: u64,
    pub(super) read_bytes: u64,
    pub(super) stored_bytes: u64,
    /// What was dirty, for the next audit.
    pub(super) sample: DirtySample,
    pub(super) audited: Audited,
}

/// Why a disk was not read whole.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "the messages say what each is; fields are what they name"
)]
pub enum CopyError {
    #[error("cannot connect to the export of disk `{disk}`")]
    Connect { disk: String, source: Box<NbdError> },
    #[error("cannot learn what changed on disk `{disk}`")]
    Map { disk: String, source: Box<NbdError> },
    #[error("cannot read bytes {start:#x} to {end:#x} of disk `{disk}`")]
    Read {
        disk: String,
        start: u64,
        end: u64,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("cannot use the export of disk `{disk}`: it has {exported} bytes, the disk {planned}")]
    SizeChanged {
        disk: String,
        exported: u64,
        planned: u64,
    },
    #[error(
        "cannot read disk `{disk}` in chunks of {chunk_bytes} bytes: this QEMU answers no request \
         of more than {exact_within} rightly while the guest writes (use QEMU 9.0 or newer, or a \
         repository with smaller chunks)"
    )]
    Inexact {
        disk: String,
        chunk_bytes: u64,
        exact_within: u64,
    },
    #[error("cannot account for all of disk `{disk}`: {missing} pieces were never read")]
    Incomplete { disk: String, missing: u64 },
    #[error("cannot go on: the session at the VM broke")]
    SessionLost { source: HypervisorError },
    #[error("cannot store what was read")]
    Store { source: Box<RepoError> },
    #[error("interrupted")]
    Interrupted,
}

impl CopyError {
    /// Returns why the session broke, if that is what it was.
    pub const fn lost_session(&self) -> Option<&HypervisorError> {
        match self {
            Self::SessionLost { source } => Some(source),
            _ => None,
        }
    }
}

/// What is watched while copying.
pub(super) struct CopyWatch<'a> {
    pub(super) cancel: &'a Cancel,
    /// Why the session broke, if it did.
    pub(super) lost: &'a (dyn Fn() -> Option<HypervisorError> + Sync),
    /// Gives the guard the means to cut a connection.
    pub(super) entrust: &'a (dyn Fn(OwnedFd) -> Result<(), HypervisorError> + Sync),
    /// Is told which disk's bitmap was found to lie, whatever comes of it.
    pub(super) lied: &'a (dyn Fn(&str) + Sync),
    /// Why nothing more may be written, if there is no room for it.
    pub(super) room: &'a (dyn Fn() -> Option<HypervisorError> + Sync),
    pub(super) observer: &'a dyn Observer,
}

/// A filled buffer on its way to a worker.
pub(super) struct Filled {
    pub(super) seq: u64,
    pub(super) range: ByteRange,
    pub(super) bytes: Vec<u8>,
    pub(super) results: Sender<Hashed>,
    pub(super) progress: std::sync::Arc<Progress>,
}

/// The ids of an item's chunks.
pub(super) struct Hashed {
    pub(super) seq: u64,
    pub(super) first_chunk: u64,
    pub(super) ids: Ids,
}

/// Ids of consecutive chunks.
pub(super) enum Ids {
    /// All of them zero.
    Zero(u64),
    /// One by one.
    Each(Vec<Option<ObjectId>>),
}

/// Counters of one disk.
#[derive(Debug, Default)]
pub(super) struct Progress {
    pub(super) done: AtomicU64,
    pub(super) dirty: AtomicU64,
    pub(super) read: AtomicU64,
    pub(super) stored: AtomicU64,
}

impl Progress {
    /// Begins anew; what was read and stored stays counted.
    pub(super) fn begin_anew(&self) {
        self.done.store(0, Ordering::Relaxed);
        self.dirty.store(0, Ordering::Relaxed);
    }
}

/// What all threads of one copy share.
pub(super) struct Shared<'a> {
    pub(super) repo: &'a Repository,
    pub(super) writer: &'a Writer,
    pub(super) tuning: Tuning,
    pub(super) chunk_size: highwater_model::ChunkSize,
    pub(super) limiter: Option<Limiter>,
    /// Everything stops: the user's wish, a lost session, a store error.
    pub(super) stop: AtomicBool,
    /// What nobody can go on after.
    failure: Mutex<Option<CopyError>>,
    room: &'a (dyn Fn() -> Option<HypervisorError> + Sync),
    entrust: &'a (dyn Fn(OwnedFd) -> Result<(), HypervisorError> + Sync),
    pub(super) lied: &'a (dyn Fn(&str) + Sync),
    cancellers: Mutex<Vec<Canceller>>,
    pub(super) filled: Sender<Filled>,
    pub(super) pool: Pool,
}

impl Shared<'_> {
    pub(super) fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Has this connection cut when everything stops: by us, or by the guard
    /// if we cannot. No request may be sent before.
    pub(super) fn cut_on_stop(&self, canceller: Canceller) -> Result<(), CopyError> {
        let lost = |source| CopyError::SessionLost { source };
        let socket = canceller.duplicate().map_err(|source| {
            lost(
                HypervisorError::new(ErrorKind::Other, "cannot duplicate an NBD connection")
                    .because(source.to_string()),
            )
        })?;
        if let Some(socket) = socket {
            (self.entrust)(socket).map_err(lost)?;
        }
        let mut all = self
            .cancellers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if self.stopped() {
            canceller.cancel();
        }
        all.push(canceller);
        Ok(())
    }

    fn stop_all(&self) {
        self.stop.store(true, Ordering::SeqCst);
        let all = self
            .cancellers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        all.iter().for_each(Canceller::cancel);
    }

    pub(super) fn store_failed(&self, error: RepoError) {
        self.fail(CopyError::Store {
            source: Box::new(error),
        });
    }

    fn fail(&self, error: CopyError) {
        let mut first = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(error);
        drop(first);
        self.stop_all();
    }
}

/// Copies all disks. An error means that nothing of this session can be kept;
/// trouble with single disks is in their results.
pub(super) fn copy_disks(
    repo: &Repository,
    writer: &Writer,
    jobs: &[CopyJob],
    tuning: &Tuning,
    watch: &CopyWatch<'_>,
) -> Result<Vec<DiskCopied>, CopyError> {
    let chunk_size = writer.chunk_size();
    let buffer_bytes = REQUEST_BYTES.max(chunk_size.bytes());
    let buffer_len = usize::try_from(buffer_bytes).expect("a request fits in memory");
    // Two for each connection that there may be: one to fill, one that is full.
    let connections = tuning.connections.max(tuning.connections_far).max(1);
    let buffers_min = 2_usize.saturating_mul(tuning.disks.max(1).saturating_mul(connections));
    let buffers = (tuning.buffer_bytes / buffer_len).max(buffers_min);
    let (filled, work) = bounded(tuning.workers.max(2).saturating_mul(FILLED_PER_WORKER));
    let shared = Shared {
        repo,
        writer,
        tuning: *tuning,
        chunk_size,
        limiter: tuning.read_limit.map(Limiter::new),
        stop: AtomicBool::new(false),
        failure: Mutex::new(None),
        room: watch.room,
        entrust: watch.entrust,
        lied: watch.lied,
        cancellers: Mutex::new(Vec::new()),
        filled,
        pool: Pool::new(buffers),
    };
    let progress: Vec<_> = jobs
        .iter()
        .map(|_| std::sync::Arc::new(Progress::default()))
        .collect();
    let (done_give, done_take) = unbounded();
    let (next_give, next_take) = unbounded();
    for at in 0..jobs.len() {
        next_give.send(at).expect("the queue of disks is open");
    }
    drop(next_give);

    let mut results: Vec<Option<DiskCopied>> = jobs.iter().map(|_| None).collect();
    let mut why_stopped = None;
    std::thread::scope(|scope| {
        let shared = &shared;
        let progress = &progress;
        // The workers end when the last sender is gone: `shared.filled` lives
        // longer, so they also look at an explicit end.
        let (end_give, end_take) = bounded::<()>(0);
        let workers: Vec<_> = (0..tuning.workers.max(1))
            .map(|_| {
                let (work, end) = (work.clone(), end_take.clone());
                scope.spawn(move || work_on(shared, &work, &end))
            })
            .collect();
        for _ in 0..tuning.disks.max(1).min(jobs.len()) {
            let (next, done) = (next_take.clone(), done_give.clone());
            scope.spawn(move || {
                while let Ok(at) = next.recv() {
                    let (Some(job), Some(progress)) = (jobs.get(at), progress.get(at)) else {
                        return;
                    };
                    let began = Instant::now();
                    let result = run_disk(shared, job, progress);
                    if done.send((at, began.elapsed(), result)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(done_give);
        loop {
            match done_take.recv_timeout(TICK) {
                Ok((at, elapsed, (size_bytes, result))) => {
                    let Some(job) = jobs.get(at) else { continue };
                    let copied = DiskCopied {
                        target: job.target.clone(),
                        size_bytes,
                        elapsed,
                        result,
                    };
                    tell_done(watch.observer, &copied);
                    if let Some(slot) = results.get_mut(at) {
                        *slot = Some(copied);
                    }
                }
                Err(crossbeam_channel::RecvTimeoutError::Timeout) => {}
                Err(crossbeam_channel::RecvTimeoutError::Disconnected) => break,
            }
            tell_progress(watch.observer, jobs, progress);
            if why_stopped.is_none() {
                why_stopped = reason_to_stop(watch);
                if why_stopped.is_some() {
                    shared.stop_all();
                }
            }
        }
        drop(end_give);
        for worker in workers {
            worker.join().expect("a worker does not panic");
        }
        tell_progress(watch.observer, jobs, progress);
    });
    let failure = shared.failure.into_inner();
    if let Some(failure) = failure.unwrap_or_else(PoisonError::into_inner) {
        return Err(failure);
    }
    // A disk may be the first to learn that a pack could not be stored, and that
    // is no fault of the disk. Damage in its parent's tree is its own trouble.
    let is_of_all = |copied: &DiskCopied| {
        matches!(&copied.result, Err(CopyError::Store { source })
            if source.kind() != RepoErrorKind::Damaged)
    };
    let mut results: Vec<DiskCopied> = results.into_iter().flatten().collect();
    if let Some(at) = results.iter().position(is_of_all)
        && let Err(error) = results.swap_remove(at).result
    {
        return Err(error);
    }
    // The guard ends a broken session at once, and then reads fail: that is no
    // fault of the disk either.
    if results.iter().any(|copied| copied.result.is_err())
        && let Some(why) = reason_to_stop_soon(watch)
    {
        return Err(why);
    }
    // The guard may have noticed a lost session in the same moment in which
    // the last byte arrived; then the bytes are good.
    if let Some(why) = why_stopped {
        return Err(why);
    }
    Ok(results)
}

fn reason_to_stop(watch: &CopyWatch<'_>) -> Option<CopyError> {
    if watch.cancel.is_raised() {
        return Some(CopyError::Interrupted);
    }
    (watch.lost)().map(|source| CopyError::SessionLost { source })
}

/// Waits a moment for the guard's word: it is under way before the connections
/// end, and a process that was stopped hears of both at once.
fn reason_to_stop_soon(watch: &CopyWatch<'_>) -> Option<CopyError> {
    let since = Instant::now();
    loop {
        let why = reason_to_stop(watch);
        if why.is_some() || since.elapsed() > GUARD_WORD {
            return why;
        }
        std::thread::sleep(GUARD_WORD / 20);
    }
}

/// Hashes, compresses and packs until the work ends.
fn work_on(shared: &Shared<'_>, work: &Receiver<Filled>, end: &Receiver<()>) {
    let mut lane = shared.writer.lane();
    loop {
        let filled = crossbeam_channel::select! {
            recv(work) -> filled => filled.ok(),
            // Disconnected: all disks are done, so nothing is under way.
            recv(end) -> _ => None,
        };
        let Some(filled) = filled else { break };
        if !shared.stopped()
            && let Some(source) = (shared.room)()
        {
            shared.fail(CopyError::SessionLost { source });
        }
        if shared.stopped() {
            // Nobody waits for the buffers that are still queued: compressing
            // them would hold up the answer to Ctrl-C. Without their ids no
            // disk counts as copied.
            shared.pool.give(filled.bytes);
            continue;
        }
        let mut ids = Vec::with_capacity(filled.bytes.len().div_ceil(shared.chunk_size.len()));
        for chunk in filled.bytes.chunks(shared.chunk_size.len()) {
            match lane.add(chunk) {
                Ok(added) => {
                    filled
                        .progress
                        .stored
                        .fetch_add(added.stored_bytes, Ordering::Relaxed);
                    ids.push(added.id);
                }
                Err(error) => {
                    shared.store_failed(error);
                    break;
                }
            }
        }
        filled
            .progress
            .read
            .fetch_add(filled.range.len(), Ordering::Relaxed);
        filled
            .progress
            .done
            .fetch_add(filled.range.len(), Ordering::Relaxed);
        let first_chunk = filled.range.start() / shared.chunk_size.bytes();
        // The collector is gone only if its disk failed already.
        drop(filled.results.send(Hashed {
            seq: filled.seq,
            first_chunk,
            ids: Ids::Each(ids),
        }));
        shared.pool.give(filled.bytes);
    }
}

fn tell_done(observer: &dyn Observer, copied: &DiskCopied) {
    let rescan = copied.result.as_ref().ok();
    if let Some(rescan) = rescan.and_then(|done| done.audited.rescan.as_ref()) {
        // The plan that was carried out in the end.
        observer.event(&Event::Planned {
            disk: &copied.target,
            mode: "rescan",
            reason: Some(rescan.why.word()),
            sentence: Some(rescan.why.sentence()),
            size_bytes: copied.size_bytes,
            dirty_bytes: copied.size_bytes,
        });
    }
    let failure = copied
        .result
        .as_ref()
        .err()
        .map(|error| super::report::chain(error).join(": "));
    observer.event(&Event::DiskDone {
        disk: &copied.target,
        failure: failure.as_deref(),
        done: copied.result.as_ref().ok().map(|done| DiskDone {
            size_bytes: copied.size_bytes,
            dirty_bytes: done.dirty_bytes,
            read_bytes: done.read_bytes,
            stored_bytes: done.stored_bytes,
            elapsed: copied.elapsed,
        }),
    });
}

fn tell_progress(observer: &dyn Observer, jobs: &[CopyJob], progress: &[std::sync::Arc<Progress>]) {
    let all: Vec<DiskProgress> = jobs
        .iter()
        .zip(progress)
        .map(|(job, progress)| DiskProgress {
            disk: job.target.clone(),
            done_bytes: progress.done.load(Ordering::Relaxed),
            size_bytes: job.size_bytes,
            read_bytes: progress.read.load(Ordering::Relaxed),
            stored_bytes: progress.stored.load(Ordering::Relaxed),
        })
        .collect();
    observer.event(&Event::Progress(&all));
}
