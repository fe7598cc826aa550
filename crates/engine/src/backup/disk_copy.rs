//! Copies one disk: walks its map, has it read, and builds its tree.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded, unbounded};
use highwater_hypervisor::ExportAddress;
use highwater_model::{ByteRange, ChunkSize};
use highwater_nbd::{ConnectOptions, Connection, Endpoint, NbdError};
use highwater_plan::DirtySample;
use highwater_repo::{ImageRoot, RepoErrorKind, TreeBuilder};

use super::audit::{Audited, Rescan};
use super::chunk_map::{ChunkMap, Run, WINDOW_CHUNKS};
use crate::guard::end_connection;

use super::copy::{
    Copied, CopyError, CopyJob, Filled, Hashed, Ids, Progress, REQUEST_BYTES, ReadPlan, Shared,
};
use super::pool::UnderWay;

const ALLOCATION: &str = "base:allocation";
/// `NBD_STATE_ZERO` of `base:allocation` (NBD protocol, "Metadata querying").
const STATE_ZERO: u64 = 1 << 1;
/// Bit 0 of `qemu:dirty-bitmap:*` (QEMU `docs/interop/nbd.rst`).
pub(super) const STATE_DIRTY: u64 = 1;
/// Items between map and tree; bounds what the collector may have to hold
/// while one slow request keeps it waiting.
const ITEMS_UNDER_WAY: usize = 512;
/// Requests in flight per connection. QEMU serves 16 and then stops reading.
pub(super) const REQUESTS_NEAR: usize = 16;
/// Bytes in flight per connection. More make a server that is near no faster,
/// and leave the processor's cache before they are used.
pub(super) const BYTES_NEAR: u64 = 4 << 20;
/// A server that takes longer than this for the first reply is far away, or
/// reads from something slow.
const FAR: Duration = Duration::from_millis(10);
/// Requests in flight per connection to a server that is far: some are on
/// their way while it serves others.
const REQUESTS_FAR: usize = 32;
/// How often a waiting thread looks whether it should stop.
const LOOK: Duration = Duration::from_millis(100);

/// One piece to read.
struct Item {
    seq: u64,
    range: ByteRange,
}

/// What the threads of one disk share.
pub(super) struct Disk<'a> {
    pub(super) shared: &'a Shared<'a>,
    pub(super) job: &'a CopyJob,
    progress: &'a Arc<Progress>,
    /// The server takes long to answer.
    far: AtomicBool,
    failed: AtomicBool,
    error: Mutex<Option<CopyError>>,
}

impl<'a> Disk<'a> {
    fn new(shared: &'a Shared<'a>, job: &'a CopyJob, progress: &'a Arc<Progress>) -> Self {
        Self {
            shared,
            job,
            progress,
            far: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            error: Mutex::new(None),
        }
    }

    /// Returns how many bytes are asked for at once, at most; one chunk at least.
    ///
    /// A server whose long answers are wrong is asked for chunks, none of which
    /// it has to put together from two places.
    pub(super) fn request_bytes(&self) -> u64 {
        match self.job.export.exact_within {
            Some(_) => self.shared.chunk_size.bytes(),
            None => REQUEST_BYTES,
        }
    }

    fn is_exact(&self) -> Result<(), CopyError> {
        let chunk_bytes = self.shared.chunk_size.bytes();
        match self.job.export.exact_within {
            Some(exact_within) if chunk_bytes > exact_within => Err(CopyError::Inexact {
                disk: self.job.target.clone(),
                chunk_bytes,
                exact_within,
            }),
            _ => Ok(()),
        }
    }

    fn fail(&self, error: CopyError) {
        let mut first = self.error.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(error);
        self.failed.store(true, Ordering::SeqCst);
    }

    pub(super) fn stopped(&self) -> bool {
        self.failed.load(Ordering::SeqCst) || self.shared.stopped()
    }

    fn connect(&self, contexts: Vec<String>) -> Result<Link, CopyError> {
        let endpoint = match &self.job.export.address {
            ExportAddress::Unix(path) => Endpoint::Unix(path.clone()),
            ExportAddress::Tcp(host, port) => Endpoint::Tcp {
                host: host.clone(),
                port: *port,
            },
        };
        let options = ConnectOptions {
            export: self.job.export.name.clone(),
            meta_contexts: contexts,
            in_flight_max: REQUESTS_FAR,
            ..ConnectOptions::default()
        };
        let connection =
            Connection::connect(&endpoint, &options).map_err(|source| CopyError::Connect {
                disk: self.job.target.clone(),
                source: Box::new(source),
            })?;
        self.shared.cut_on_stop(connection.canceller())?;
        Ok(Link(connection))
    }
}

/// A connection that ends when it is dropped, although the guard holds another
/// descriptor of its socket. Replies may be under way: a disk that failed must
/// not keep QEMU waiting while other disks are copied for hours.
struct Link(Connection);

impl Drop for Link {
    fn drop(&mut self) {
        let canceller = self.0.canceller();
        canceller.cancel();
        // Without descriptors left for another one it ends with the session.
        if let Ok(Some(socket)) = canceller.duplicate() {
            end_connection(&socket);
        }
    }
}

/// Copies one disk; returns its exported size (the planned one if it could not
/// even be asked) and what became of it.
///
/// What a bitmap says is audited first. If it cannot be believed, the disk is
/// read as a whole over the same export.
pub(super) fn run_disk(
    shared: &Shared<'_>,
    job: &CopyJob,
    progress: &Arc<Progress>,
) -> (u64, Result<Copied, CopyError>) {
    let failed = |size_bytes, error| (size_bytes, Err(error));
    let disk = Disk::new(shared, job, progress);
    if let Err(error) = disk.is_exact() {
        return failed(job.size_bytes, error);
    }
    let ReadPlan::Dirty { context, audit, .. } = &job.read else {
        return match disk.connect(vec![ALLOCATION.to_owned()]) {
            Ok(link) => copy_all(&disk, link),
            Err(error) => failed(job.size_bytes, error),
        };
    };
    let mut link = match disk.connect(vec![context.clone()]) {
        Ok(link) => link,
        Err(error) => return failed(job.size_bytes, error),
    };
    let size_bytes = link.0.export().size_bytes;
    if let Err(error) = check_size(job, size_bytes) {
        return failed(size_bytes, error);
    }
    let mut audited = match super::audit::audit(&disk, &mut link.0, context, audit) {
        Ok(audited) => audited,
        Err(error) => return failed(size_bytes, error),
    };
    if audited.rescan.as_ref().is_some_and(Rescan::is_of_a_lie) {
        (shared.lied)(&job.target);
    }
    if audited.rescan.is_none() {
        if audited.warning.is_some() {
            drop(link);
            link = match disk.connect(vec![context.clone()]) {
                Ok(link) => link,
                Err(error) => return failed(size_bytes, error),
            };
        }
        let mapper = Mapper {
            dirty: Some(link),
            allocation: None,
            sample: DirtySample::new(&audit.hot),
        };
        match copy(&disk, mapper, size_bytes) {
            // No audit reads the whole tree, and what it left out may be what
            // an increment changes.
            Err(CopyError::Store { source }) if source.kind() == RepoErrorKind::Damaged => {
                audited.rescan = Some(Rescan::of_damage(&job.target, &source));
            }
            copied => {
                return (
                    size_bytes,
                    copied.map(|copied| Copied { audited, ..copied }),
                );
            }
        }
    } else {
        drop(link);
    }
    progress.begin_anew();
    if audited.rescan.as_ref().is_some_and(Rescan::is_of_damage) {
        // What is damaged must not count as stored.
        shared.writer.disbelieve_stored();
    }
    // Without the parent: nothing of what it says is taken over unread.
    let whole = CopyJob {
        read: ReadPlan::All,
        parent: None,
        ..job.clone()
    };
    let disk = Disk::new(shared, &whole, progress);
    match disk.connect(vec![ALLOCATION.to_owned()]) {
        Ok(link) => {
            let (size_bytes, copied) = copy_all(&disk, link);
            (
                size_bytes,
                copied.map(|copied| Copied { audited, ..copied }),
            )
        }
        Err(error) => failed(size_bytes, error),
    }
}

fn copy_all(disk: &Disk<'_>, link: Link) -> (u64, Result<Copied, CopyError>) {
    let size_bytes = link.0.export().size_bytes;
    let mapper = Mapper {
        dirty: None,
        allocation: Some(link),
        sample: DirtySample::default(),
    };
    (size_bytes, copy(disk, mapper, size_bytes))
}

fn check_size(job: &CopyJob, exported: u64) -> Result<(), CopyError> {
    if exported == job.size_bytes {
        return Ok(());
    }
    // The plan's tail was computed for another size: somebody resized the
    // disk in the moment between. The next run sees the new size.
    Err(CopyError::SizeChanged {
        disk: job.target.clone(),
        exported,
        planned: job.size_bytes,
    })
}

/// The connections that ask about the disk. One per context: a server answers
/// for all contexts of a connection, wanted or not, and the map of allocation
/// is worth asking for around dirty chunks only.
struct Mapper {
    dirty: Option<Link>,
    allocation: Option<Link>,
    /// What the next audit looks at first.
    sample: DirtySample,
}

impl Mapper {
    /// Returns the connection for the map of allocation, made when first needed.
    fn allocation(&mut self, disk: &Disk<'_>) -> Result<&mut Connection, CopyError> {
        if self.allocation.is_none() {
            self.allocation = Some(disk.connect(vec![ALLOCATION.to_owned()])?);
        }
        Ok(&mut self.allocation.as_mut().expect("made above").0)
    }
}

fn copy(disk: &Disk<'_>, mut mapper: Mapper, size_bytes: u64) -> Result<Copied, CopyError> {
    let job = disk.job;
    check_size(job, size_bytes)?;
    let store = |source| CopyError::Store {
        source: Box::new(source),
    };
    let tree = disk
        .shared
        .writer
        .tree(job.parent.as_ref(), size_bytes)
        .map_err(store)?;
    let (items_give, items_take) = bounded::<Item>(ITEMS_UNDER_WAY);
    let (results_give, results_take) = unbounded::<Hashed>();
    let (token_give, token_take) = bounded::<()>(ITEMS_UNDER_WAY);
    for _ in 0..ITEMS_UNDER_WAY {
        token_give
            .send(())
            .expect("the channel has room for every token");
    }
    let connections = disk.shared.tuning.connections.max(1);
    let more = disk
        .shared
        .tuning
        .connections_far
        .saturating_sub(connections);
    let (more_give, more_take) = bounded::<()>(more.max(1));
    let (issued, image) = std::thread::scope(|scope| {
        let run = |link, items: &Receiver<Item>, results: &Sender<Hashed>, far: &dyn Fn()| {
            if let Err(error) = read_items(disk, link, items, results, far) {
                disk.fail(error);
            }
        };
        for _ in 0..connections {
            let (items, results) = (items_take.clone(), results_give.clone());
            let more_give = more_give.clone();
            let call_others = move || {
                // Full: they have been called.
                while more_give.try_send(()).is_ok() {}
            };
            scope.spawn(move || run(None, &items, &results, &call_others));
        }
        for _ in 0..more {
            let (items, results) = (items_take.clone(), results_give.clone());
            let more_take = more_take.clone();
            scope.spawn(move || {
                // An error: the others have done it all.
                if more_take.recv().is_err() {
                    return;
                }
                // Connected before it takes an item: where a slow server lets no
                // more clients in, those that are in do its work.
                if let Ok(link) = disk.connect(Vec::new()) {
                    run(Some(link), &items, &results, &|| {});
                }
            });
        }
        drop((items_take, more_give, more_take));
        let collector = scope.spawn(move || collect(disk, tree, &results_take, &token_give));
        let walked = walk(
            disk,
            &mut mapper,
            size_bytes,
            &token_take,
            &items_give,
            &results_give,
        );
        drop(items_give);
        drop(results_give);
        let issued = walked.unwrap_or_else(|error| {
            disk.fail(error);
            0
        });
        (
            issued,
            collector.join().expect("a collector does not panic"),
        )
    });
    if let Some(error) = disk
        .error
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take()
    {
        return Err(error);
    }
    if disk.shared.stopped() {
        return Err(CopyError::Interrupted);
    }
    let (collected, image) = image?;
    if collected != issued {
        return Err(CopyError::Incomplete {
            disk: job.target.clone(),
            missing: issued.saturating_sub(collected),
        });
    }
    let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    Ok(Copied {
        image,
        dirty_bytes: load(&disk.progress.dirty),
        read_bytes: load(&disk.progress.read),
        stored_bytes: load(&disk.progress.stored),
        sample: mapper.sample,
        audited: Audited::default(),
    })
}

/// Walks the disk window by window and issues what is to be done; returns the
/// number of items.
fn walk(
    disk: &Disk<'_>,
    mapper: &mut Mapper,
    size_bytes: u64,
    tokens: &Receiver<()>,
    items: &Sender<Item>,
    results: &Sender<Hashed>,
) -> Result<u64, CopyError> {
    let chunk_size = disk.shared.chunk_size;
    let window_bytes = WINDOW_CHUNKS.saturating_mul(chunk_size.bytes());
    let mut issued = 0_u64;
    let mut start = 0_u64;
    while start < size_bytes && !disk.stopped() {
        let end = start.saturating_add(window_bytes).min(size_bytes);
        let Some(window) = ByteRange::between(start, end) else {
            break;
        };
        let map = map_window(disk, mapper, window)?;
        let mut wanted = 0_u64;
        for run in map.runs(disk.request_bytes()) {
            if !take_token(disk, tokens) {
                return Ok(issued);
            }
            let sent = match run {
                Run::Read(range) => {
                    wanted += range.len();
                    items.send(Item { seq: issued, range }).is_ok()
                }
                Run::Zero(range) => {
                    wanted += range.len();
                    disk.progress.done.fetch_add(range.len(), Ordering::Relaxed);
                    results.send(zero(issued, range, chunk_size)).is_ok()
                }
            };
            if !sent {
                return Ok(issued);
            }
            issued += 1;
        }
        disk.progress
            .done
            .fetch_add(window.len().saturating_sub(wanted), Ordering::Relaxed);
        start = end;
    }
    Ok(issued)
}

fn zero(seq: u64, range: ByteRange, chunk_size: ChunkSize) -> Hashed {
    Hashed {
        seq,
        first_chunk: range.start() / chunk_size.bytes(),
        ids: Ids::Zero(chunk_size.count(range.len())),
    }
}

fn take_token(disk: &Disk<'_>, tokens: &Receiver<()>) -> bool {
    loop {
        match tokens.recv_timeout(LOOK) {
            Ok(()) => return true,
            Err(crossbeam_channel::RecvTimeoutError::Timeout) if !disk.stopped() => {}
            Err(_) => return false,
        }
    }
}

/// Asks the server about one window: what changed, and what is zero.
fn map_window(
    disk: &Disk<'_>,
    mapper: &mut Mapper,
    window: ByteRange,
) -> Result<ChunkMap, CopyError> {
    let failed = |source: NbdError| CopyError::Map {
        disk: disk.job.target.clone(),
        source: Box::new(source),
    };
    let mut map = ChunkMap::new(window, disk.shared.chunk_size);
    match &disk.job.read {
        ReadPlan::All => {
            map.want(window);
            disk.progress
                .dirty
                .fetch_add(window.len(), Ordering::Relaxed);
        }
        ReadPlan::Dirty {
            context, tail_from, ..
        } => {
            let mut dirty = 0_u64;
            let chunk_bytes = disk.shared.chunk_size.bytes();
            let (link, sample) = (&mut mapper.dirty, &mut mapper.sample);
            let connection = &mut link.as_mut().expect("made for this plan").0;
            connection
                .map(context, window, &mut |range, state| {
                    if state & STATE_DIRTY != 0 {
                        dirty += range.len();
                        map.want(range);
                        let end = range.end().div_ceil(chunk_bytes);
                        sample.dirty(range.start() / chunk_bytes, end);
                    }
                    Ok(())
                })
                .map_err(failed)?;
            let tail = tail_from.and_then(|from| ByteRange::between(from, window.end()));
            if let Some(tail) = tail.and_then(|tail| tail.intersection(window)) {
                // The new part of a grown disk is clean in the bitmap.
                map.want(tail);
                dirty += tail.len();
            }
            disk.progress.dirty.fetch_add(dirty, Ordering::Relaxed);
        }
    }
    for range in map.worth_asking() {
        if disk.job.export.exact_within.is_some() {
            // What it says of zeroes comes from the same two places.
            map.may_hold_data(range);
            continue;
        }
        let connection = mapper.allocation(disk)?;
        if connection.export().context(ALLOCATION).is_none() {
            // A server that does not tell holes apart: everything may be data.
            map.may_hold_data(range);
            continue;
        }
        connection
            .map(ALLOCATION, range, &mut |range, state| {
                if state & STATE_ZERO == 0 {
                    map.may_hold_data(range);
                }
                Ok(())
            })
            .map_err(failed)?;
    }
    Ok(map)
}

/// Reads items over one connection, several at a time; calls `far` if the
/// server proves to be.
fn read_items(
    disk: &Disk<'_>,
    mut link: Option<Link>,
    items: &Receiver<Item>,
    results: &Sender<Hashed>,
    far: &dyn Fn(),
) -> Result<(), CopyError> {
    // Without a link it is made at the first item: QEMU drops a client that idles in the
    // handshake, and an empty increment needs no second connection.
    let mut waiting: BTreeMap<u64, ByteRange> = BTreeMap::new();
    let mut waiting_bytes = 0_u64;
    let mut under_way = UnderWay::new(&disk.shared.pool);
    let mut first_asked: Option<Instant> = None;
    let mut is_first_reply = true;
    loop {
        if disk.stopped() {
            return Ok(());
        }
        let next = if has_room(disk, waiting.len(), waiting_bytes) {
            next_item(disk, items, waiting.is_empty())
        } else {
            Next::NotNow
        };
        match next {
            Next::Item(item, buffer) => {
                under_way.add();
                let link = match &mut link {
                    Some(link) => link,
                    None => link.insert(disk.connect(Vec::new())?),
                };
                waiting.insert(item.seq, item.range);
                waiting_bytes += item.range.len();
                if let Some(limiter) = &disk.shared.limiter {
                    limiter.take(item.range.len(), &|| disk.stopped());
                }
                // Who is held up by a limit cannot tell how far the server is.
                if disk.shared.limiter.is_none() {
                    first_asked.get_or_insert_with(Instant::now);
                }
                link.0
                    .submit_read(item.seq, item.range, buffer)
                    .map_err(|source| read_error(disk, item.range, source))?;
                continue;
            }
            Next::End if waiting.is_empty() => return Ok(()),
            Next::End | Next::NotNow => {}
        }
        let Some(link) = link.as_mut().filter(|_| !waiting.is_empty()) else {
            continue;
        };
        let range = waiting.values().next().copied();
        let completion = link.0.next_completion().map_err(|source| match range {
            Some(range) => read_error(disk, range, source),
            None => CopyError::Map {
                disk: disk.job.target.clone(),
                source: Box::new(source),
            },
        })?;
        let Some(range) = waiting.remove(&completion.cookie) else {
            continue;
        };
        waiting_bytes -= range.len();
        if std::mem::take(&mut is_first_reply)
            && first_asked.is_some_and(|asked| asked.elapsed() > FAR)
        {
            disk.far.store(true, Ordering::Relaxed);
            far();
        }
        let bytes = completion
            .result
            .map_err(|source| read_error(disk, range, source))?;
        assert_eq!(
            bytes.len() as u64,
            range.len(),
            "a completed read is as long as its request"
        );
        let filled = Filled {
            seq: completion.cookie,
            range,
            bytes,
            results: results.clone(),
            progress: Arc::clone(disk.progress),
        };
        under_way.remove();
        if disk.shared.filled.send(filled).is_err() {
            return Ok(());
        }
    }
}

/// Says whether one more request is worth having in flight on a connection.
fn has_room(disk: &Disk<'_>, requests: usize, bytes: u64) -> bool {
    if disk.far.load(Ordering::Relaxed) {
        return requests < REQUESTS_FAR;
    }
    // Two at least, however large a chunk is: one under way while one is served.
    requests < 2 || (requests < REQUESTS_NEAR && bytes < BYTES_NEAR)
}

pub(super) fn read_error(
    disk: &Disk<'_>,
    range: ByteRange,
    source: impl std::error::Error + Send + Sync + 'static,
) -> CopyError {
    CopyError::Read {
        disk: disk.job.target.clone(),
        start: range.start(),
        end: range.end(),
        source: Box::new(source),
    }
}

enum Next {
    Item(Item, Vec<u8>),
    /// Finish what is in flight first.
    NotNow,
    /// There will be no more.
    End,
}

/// Takes an item and a buffer for it. May wait only if nothing is in flight:
/// whoever waits for a buffer while it holds filled ones starves the others.
fn next_item(disk: &Disk<'_>, items: &Receiver<Item>, may_wait: bool) -> Next {
    let buffer = if may_wait {
        disk.shared.pool.take_within(LOOK)
    } else {
        disk.shared.pool.take()
    };
    let Some(buffer) = buffer else {
        return Next::NotNow;
    };
    let item = if may_wait {
        items.recv_timeout(LOOK).map_err(|error| match error {
            crossbeam_channel::RecvTimeoutError::Timeout => TryRecvError::Empty,
            crossbeam_channel::RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
        })
    } else {
        items.try_recv()
    };
    match item {
        Ok(item) => Next::Item(item, buffer),
        Err(reason) => {
            disk.shared.pool.give(buffer);
            match reason {
                TryRecvError::Empty => Next::NotNow,
                TryRecvError::Disconnected => Next::End,
            }
        }
    }
}

/// Sets ids in the tree in ascending order, whatever order they arrive in.
fn collect(
    disk: &Disk<'_>,
    mut tree: TreeBuilder<'_>,
    results: &Receiver<Hashed>,
    tokens: &Sender<()>,
) -> Result<(u64, ImageRoot), CopyError> {
    let store = |source| CopyError::Store {
        source: Box::new(source),
    };
    let mut early: BTreeMap<u64, Hashed> = BTreeMap::new();
    let mut next = 0_u64;
    while let Ok(hashed) = results.recv() {
        early.insert(hashed.seq, hashed);
        while let Some(hashed) = early.remove(&next) {
            let first = hashed.first_chunk;
            let set = match hashed.ids {
                // Without a parent what is not set is zero already.
                Ids::Zero(_) if disk.job.parent.is_none() => Ok(()),
                Ids::Zero(count) => {
                    (first..first.saturating_add(count)).try_for_each(|chunk| tree.set(chunk, None))
                }
                Ids::Each(ids) => (first..)
                    .zip(ids)
                    .try_for_each(|(chunk, id)| tree.set(chunk, id)),
            };
            if let Err(error) = set {
                disk.failed.store(true, Ordering::SeqCst);
                return Err(store(error));
            }
            next += 1;
            // Nobody waits for tokens when the walk has ended.
            let _ = tokens.try_send(());
        }
    }
    if disk.stopped() {
        return Err(CopyError::Interrupted);
    }
    let image = tree.finish().map_err(store)?;
    Ok((next, image))
}
