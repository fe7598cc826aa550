//! Reads many chunks in the order in which they lie in packs.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use highwater_model::ObjectId;

use crate::compress::Decompressor;
use crate::error::{Flaw, RepoError};
use crate::index::Place;
use crate::objects::Objects;
use crate::pack::{PackKind, RecordPlace, record_len_max};
use crate::seal::Sealer;
use crate::wire::{narrow, wide};

/// Unwanted bytes that cost less to read over than another call to the store.
const GAP_MAX: u64 = 128 << 10;
/// Bytes of one read, unless one record is longer.
const READ_LEN_MAX: u64 = 4 << 20;

/// Takes a chunk: its tag and its bytes.
pub type Sink<'a, E> = dyn Fn(u64, &[u8]) -> Result<(), E> + Sync + 'a;

/// Gets each chunk once, proven by its id, and gives it to `sink` with its tag.
///
/// In any order and from `threads` threads at once. In memory are the places of
/// all wanted chunks (about 100 bytes each) and one read of about 4 MiB per
/// thread. Ends at the first error.
pub(crate) fn fetch<E>(
    objects: &Objects,
    wanted: &[(u64, ObjectId)],
    threads: usize,
    sink: &Sink<'_, E>,
) -> Result<(), E>
where
    E: From<RepoError> + Send,
{
    let plan = Plan::make(objects, wanted)?;
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let failure: Mutex<Option<E>> = Mutex::new(None);
    let work = || {
        let mut worker = Worker::new(objects, sink);
        while !stop.load(Ordering::Relaxed) {
            let Some(read) = plan.reads.get(next.fetch_add(1, Ordering::Relaxed)) else {
                return;
            };
            let records = plan.records.get(read.clone()).unwrap_or_default();
            if let Err(error) = worker.run(&plan, records) {
                stop.store(true, Ordering::Relaxed);
                failure
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .get_or_insert(error);
            }
        }
    };
    let threads = threads.clamp(1, plan.reads.len().max(1));
    if threads == 1 {
        work();
    } else {
        thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    }
    failure
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
        .map_or(Ok(()), Err)
}

/// What to read, in pack order.
struct Plan {
    packs: Vec<Place>,
    records: Vec<Wanted>,
    /// Neighbouring records that one read gets.
    reads: Vec<Range<usize>>,
}

/// One wanted chunk and its place.
struct Wanted {
    pack: usize,
    record: RecordPlace,
    tag: u64,
}

impl Wanted {
    fn end(&self) -> u64 {
        u64::from(self.record.offset).saturating_add(self.record.record_len.into())
    }
}

impl Plan {
    fn make(objects: &Objects, wanted: &[(u64, ObjectId)]) -> Result<Self, RepoError> {
        let longest = record_len_max(objects.config.chunk_size.len());
        let mut packs = Packs::default();
        let mut records = Vec::with_capacity(wanted.len());
        // In the order of the index, so that each of its blocks is read once.
        let mut by_id: Vec<&(u64, ObjectId)> = wanted.iter().collect();
        by_id.sort_unstable_by_key(|(_, id)| id);
        for (tag, id) in by_id {
            let place = objects.index.need(id)?;
            let record = place.record;
            let record_len = narrow(record.record_len.into()).unwrap_or(usize::MAX);
            if record_len > longest || place.kind != PackKind::Chunks {
                let flaw = Flaw("the index shows an impossible place");
                return Err(RepoError::damaged(format!("find object {id}"), flaw));
            }
            records.push(Wanted {
                pack: packs.number_of(place, *tag),
                record,
                tag: *tag,
            });
        }
        let ranks = packs.ranks();
        records
            .sort_unstable_by_key(|wanted| (ranks.get(wanted.pack).copied(), wanted.record.offset));
        let reads = group(&records);
        Ok(Self {
            packs: packs.places,
            records,
            reads,
        })
    }

    fn place(&self, wanted: &Wanted) -> Place {
        let pack = self
            .packs
            .get(wanted.pack)
            .expect("records name packs of this plan");
        Place {
            record: wanted.record,
            ..*pack
        }
    }
}

/// The packs of a plan, in the order in which they were met.
#[derive(Default)]
struct Packs {
    places: Vec<Place>,
    first_tags: Vec<u64>,
    numbers: HashMap<[u8; 32], usize>,
}

impl Packs {
    fn number_of(&mut self, place: Place, tag: u64) -> usize {
        let next = self.places.len();
        let number = *self.numbers.entry(place.pack_id).or_insert(next);
        if number == next {
            self.places.push(place);
            self.first_tags.push(tag);
        }
        if let Some(first) = self.first_tags.get_mut(number) {
            *first = tag.min(*first);
        }
        number
    }

    /// Returns, for each pack, when it is its turn: as its first chunk lies in
    /// the image, so that a fresh image is written nearly from first to last.
    fn ranks(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.places.len()).collect();
        order.sort_unstable_by_key(|number| self.first_tags.get(*number));
        let mut ranks = vec![0; order.len()];
        for (rank, number) in order.into_iter().enumerate() {
            if let Some(slot) = ranks.get_mut(number) {
                *slot = rank;
            }
        }
        ranks
    }
}

fn group(records: &[Wanted]) -> Vec<Range<usize>> {
    let mut reads: Vec<Range<usize>> = Vec::new();
    let (mut start, mut end) = (0, 0);
    for (at, record) in records.iter().enumerate() {
        let before = at.checked_sub(1).and_then(|before| records.get(before));
        let joins = before.is_some_and(|before| {
            before.pack == record.pack
                && u64::from(record.record.offset) <= GAP_MAX.saturating_add(end)
                && record.end().saturating_sub(start) <= READ_LEN_MAX
        });
        match reads.last_mut() {
            Some(read) if joins => read.end = at.saturating_add(1),
            _ => {
                reads.push(at..at.saturating_add(1));
                (start, end) = (u64::from(record.record.offset), 0);
            }
        }
        end = end.max(record.end());
    }
    reads
}

/// One thread's buffers.
struct Worker<'a, E> {
    objects: &'a Objects,
    sink: &'a Sink<'a, E>,
    decompressor: Decompressor,
    stored: Vec<u8>,
    plain: Vec<u8>,
}

impl<'a, E: From<RepoError>> Worker<'a, E> {
    fn new(objects: &'a Objects, sink: &'a Sink<'a, E>) -> Self {
        let decompressor = Decompressor::default();
        Self {
            objects,
            sink,
            decompressor,
            stored: Vec::new(),
            plain: Vec::new(),
        }
    }

    /// Reads neighbouring records of one pack.
    fn run(&mut self, plan: &Plan, records: &[Wanted]) -> Result<(), E> {
        let Some(first) = records.first() else {
            return Ok(());
        };
        let start = u64::from(first.record.offset);
        let whole = self.read(&plan.place(first), start, records);
        let mut last: Option<(u32, ObjectId)> = None;
        for wanted in records {
            let Wanted { record, tag, .. } = wanted;
            // Wanted several times: decrypting in place works only once.
            if last != Some((record.offset, record.id)) {
                let from = narrow(u64::from(record.offset).saturating_sub(start));
                let opened = match (&whole, from) {
                    (Ok(sealer), Ok(from)) => self.open(sealer, &plan.place(wanted), from),
                    _ => Err(Flaw("its pack cannot be read")),
                };
                if opened.is_err() {
                    // Slowly and on its own; there may be another copy, and if
                    // not, this gives the error that says most.
                    self.plain = self.objects.object(PackKind::Chunks, &record.id)?;
                }
                last = Some((record.offset, record.id));
            }
            (self.sink)(*tag, &self.plain)?;
        }
        Ok(())
    }

    fn read(
        &mut self,
        pack: &Place,
        start: u64,
        records: &[Wanted],
    ) -> Result<Arc<Sealer>, RepoError> {
        let end = records.iter().map(Wanted::end).max().unwrap_or(start);
        let sealer = self.objects.sealer(pack)?;
        let len = end.saturating_sub(start);
        debug_assert!(len <= READ_LEN_MAX.saturating_add(wide(record_len_max(4 << 20))));
        self.stored.resize(narrow(len).unwrap_or_default(), 0);
        self.objects
            .store
            .get_range(&pack.pack(), start, &mut self.stored)
            .map_err(|error| RepoError::needed(format!("read `{}`", pack.pack()), error))?;
        Ok(sealer)
    }

    fn open(&mut self, sealer: &Sealer, place: &Place, from: usize) -> Result<(), Flaw> {
        let len = narrow(place.record.record_len.into())?;
        let record = self
            .stored
            .get_mut(from..)
            .and_then(|rest| rest.get_mut(..len))
            .ok_or(Flaw("it ends too early"))?;
        let (decompressor, plain) = (&mut self.decompressor, &mut self.plain);
        self.objects
            .open(sealer, PackKind::Chunks, place, record, decompressor, plain)
    }
}
