//! Reads whole packs: is each what its name says, does each record hold what
//! its id says, and does the index show exactly these records?

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use highwater_store::StoreErrorKind;

use crate::compress::Decompressor;
use crate::error::{Flaw, RepoError};
use crate::index::{Place, pack_key};
use crate::objects::Objects;
use crate::pack::{
    HEADER_LEN, PackHeader, RECORD_HEADER_LEN, RECORDS_MAX, RecordHeader, RecordPlace,
    record_len_max,
};
use crate::page::PAGE_LEN_MAX;
use crate::seal::{Cipher, Sealer};
use crate::verify::Verification;
use crate::verify::findings::{FindingNo, flaw_of};
use crate::verify::index_scan;
use crate::verify::report::{Progress, VerifyError, VerifyPhase};
use crate::verify::tables::{IndexedPack, PackState, Tables, row_sum};
use crate::wire::{narrow, wide};

/// Bytes read at once.
const READ_LEN: usize = 4 << 20;

/// Packs in which something is damaged, with whose fault it is. What exactly
/// cannot be read is asked of the index afterwards.
pub(super) type BadPacks = HashMap<[u8; 32], FindingNo>;

/// What one pack is worth.
#[derive(Default)]
struct Read {
    flaw: Option<String>,
    /// Files whose rows show something else than what lies there, and how many
    /// rows do.
    lying: Vec<(usize, u64)>,
    records: u64,
    bytes: u64,
}

/// What the threads share.
struct Job<'a> {
    verification: &'a Verification<'a>,
    tables: &'a Tables,
    packs: Vec<([u8; 32], u64)>,
    total: u64,
    next: AtomicUsize,
    done: AtomicU64,
    stop: AtomicBool,
    outcome: Mutex<Outcome>,
}

#[derive(Default)]
struct Outcome {
    found: Vec<([u8; 32], Read)>,
    failure: Option<VerifyError>,
    packs: u64,
    bytes: u64,
    records: u64,
}

impl Verification<'_> {
    /// Reads the packs that are there: all, or those in `only`.
    pub(super) fn read_data(
        &mut self,
        tables: &Tables,
        only: Option<&HashSet<[u8; 32]>>,
    ) -> Result<BadPacks, VerifyError> {
        let wanted = |id: &[u8; 32]| only.is_none_or(|only| only.contains(id));
        let packs: Vec<_> = tables
            .there
            .iter()
            .filter(|(id, _)| wanted(id))
            .copied()
            .collect();
        let total = packs
            .iter()
            .fold(0, |sum: u64, (_, len)| sum.saturating_add(*len));
        let threads = self.options.threads.clamp(1, packs.len().max(1));
        let job = Job {
            verification: self,
            tables,
            packs,
            total,
            next: AtomicUsize::new(0),
            done: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            outcome: Mutex::default(),
        };
        thread::scope(|scope| {
            (0..threads).for_each(|_| drop(scope.spawn(|| job.work())));
        });
        let outcome = job
            .outcome
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = outcome.failure {
            return Err(error);
        }
        self.checked.read_packs = outcome.packs;
        self.checked.read_bytes = outcome.bytes;
        self.checked.records = outcome.records;
        let mut bad = BadPacks::new();
        for (id, read) in outcome.found {
            if let Some(flaw) = read.flaw {
                bad.insert(id, self.findings.note(&pack_key(&id), flaw));
            }
            for (file, rows) in read.lying {
                let Some(file) = tables.files.get(file) else {
                    continue;
                };
                let what = format!("{rows} of its rows show what is not in `{}`", pack_key(&id));
                let finding = self.findings.note(&file.key, what);
                bad.entry(id).or_insert(finding);
            }
        }
        Ok(bad)
    }
}

impl Job<'_> {
    fn work(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            let Some((id, len)) = self.packs.get(self.next.fetch_add(1, Ordering::Relaxed)) else {
                return;
            };
            let read = self.read(id, *len);
            let mut outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
            match read {
                Ok(read) => {
                    outcome.packs = outcome.packs.saturating_add(1);
                    outcome.bytes = outcome.bytes.saturating_add(read.bytes);
                    outcome.records = outcome.records.saturating_add(read.records);
                    if read.flaw.is_some() || !read.lying.is_empty() {
                        outcome.found.push((*id, read));
                    }
                }
                // Deleted since it was listed.
                Err(error) => {
                    outcome.failure.get_or_insert(error);
                    self.stop.store(true, Ordering::Relaxed);
                }
            }
        }
    }

    fn read(&self, id: &[u8; 32], len: u64) -> Result<Read, VerifyError> {
        let mut pack = PackStream::new(self, id, len);
        let (key, store) = (pack_key(id), self.verification.store);
        let mut hasher = blake3::Hasher::new();
        let mut read = Read::default();
        while pack.next < len {
            let room =
                narrow(len.saturating_sub(pack.next).min(wide(READ_LEN))).unwrap_or(READ_LEN);
            let kept = pack.buffer.len();
            pack.buffer.resize(kept.saturating_add(room), 0);
            let into = pack.buffer.get_mut(kept..).unwrap_or_default();
            match store.get_range(&key, pack.next, into) {
                Ok(()) => {}
                // One that has gone since it was listed is an error, too: the
                // whole repository may have been unmounted.
                Err(error) => {
                    let Some(flaw) = flaw_of(&error) else {
                        return Err(RepoError::store(format!("read `{key}`"), error).into());
                    };
                    read.flaw = Some(flaw);
                    return Ok(read);
                }
            }
            hasher.update(into);
            pack.next = pack.next.saturating_add(wide(room));
            pack.take_records();
            read.bytes = read.bytes.saturating_add(wide(room));
            let done = self.done.fetch_add(wide(room), Ordering::Relaxed);
            let progress = Progress {
                phase: VerifyPhase::Data,
                done: done.saturating_add(wide(room)),
                total: self.total,
            };
            if !(self.verification.options.progress)(progress) {
                return Err(VerifyError::Interrupted);
            }
        }
        pack.end();
        read.records = wide(pack.records.len()).saturating_sub(pack.bad_records);
        read.flaw = pack.verdict(hasher.finalize().as_bytes() == id);
        if read.flaw.is_none() {
            for shown in self.tables.of_pack(id) {
                let lying = self.compare(shown, &pack.records)?;
                if lying > 0 {
                    read.lying.push((shown.file, lying));
                }
            }
        }
        Ok(read)
    }

    /// Returns how many rows of an index file show something that does not lie
    /// in the pack. A record without a row is none of our business: the same
    /// object may have been stored twice at once.
    fn compare(&self, shown: &IndexedPack, records: &[RecordPlace]) -> Result<u64, VerifyError> {
        let sum = records.iter().map(row_sum).fold(0, u128::wrapping_add);
        let rows_match = shown.rows == wide(records.len()) && shown.sum == sum;
        if rows_match || shown.state != PackState::There {
            return Ok(0);
        }
        let Some(file) = self.tables.files.get(shown.file) else {
            return Ok(0);
        };
        let records: HashSet<u128> = records.iter().map(row_sum).collect();
        let mut lying = 0_u64;
        let scanned = index_scan::scan(self.verification.store, file, &mut |_, pack, row| {
            if pack.id == shown.pack.id && !records.contains(&row_sum(&row.place)) {
                lying = lying.saturating_add(1);
            }
        });
        match scanned {
            Ok(_) => Ok(lying),
            Err(error) if error.kind() == StoreErrorKind::NotFound => Ok(0),
            Err(error) => Err(RepoError::store("read the index", error).into()),
        }
    }
}

/// A pack that passes by: what of it has come and was not taken apart yet.
struct PackStream<'a> {
    id: &'a [u8; 32],
    len: u64,
    objects: Option<&'a Objects>,
    cipher: Cipher,
    longest: usize,
    next: u64,
    buffer: Vec<u8>,
    header: Option<(PackHeader, Option<Sealer>)>,
    records: Vec<RecordPlace>,
    bad_records: u64,
    first_bad: Option<Flaw>,
    /// What makes the rest of the pack unreadable.
    broken: Option<Flaw>,
    decompressor: Decompressor,
    plain: Vec<u8>,
}

impl<'a> PackStream<'a> {
    fn new(job: &Job<'a>, id: &'a [u8; 32], len: u64) -> Self {
        let config = job.verification.config;
        Self {
            id,
            len,
            objects: job.verification.objects,
            cipher: config.cipher,
            longest: record_len_max(config.chunk_size.len().max(PAGE_LEN_MAX)),
            next: 0,
            buffer: Vec::new(),
            header: None,
            records: Vec::new(),
            bad_records: 0,
            first_bad: None,
            broken: None,
            decompressor: Decompressor::default(),
            plain: Vec::new(),
        }
    }

    /// Takes all whole records out of the buffer.
    fn take_records(&mut self) {
        let mut used = 0;
        while self.broken.is_none() {
            match self.take_one(used) {
                Ok(Some(len)) => used = used.saturating_add(len),
                Ok(None) => break,
                Err(flaw) => self.broken = Some(flaw),
            }
        }
        if self.broken.is_some() {
            self.buffer.clear();
        } else {
            self.buffer.drain(..used.min(self.buffer.len()));
        }
    }

    /// Takes what begins at `at` in the buffer, if all of it has come; returns
    /// its length.
    fn take_one(&mut self, at: usize) -> Result<Option<usize>, Flaw> {
        let rest = self.buffer.get_mut(at..).unwrap_or_default();
        let rest_len = rest.len();
        let Some((header, sealer)) = &self.header else {
            let Some(bytes) = rest.get(..HEADER_LEN) else {
                return Ok(None);
            };
            let header = PackHeader::decode(bytes)?;
            if header.cipher != self.cipher {
                return Err(Flaw("its cipher is not the repository's"));
            }
            let sealer = self
                .objects
                .map(|objects| Sealer::for_pack(objects.seal.as_ref(), &header.salt));
            self.header = Some((header, sealer));
            return Ok(Some(HEADER_LEN));
        };
        let Some(head) = rest.get(..RECORD_HEADER_LEN) else {
            return Ok(None);
        };
        let head = RecordHeader::decode(head)?;
        let payload_len = narrow(head.payload_len.into())?;
        let len = RECORD_HEADER_LEN.saturating_add(payload_len);
        if len > self.longest {
            return Err(Flaw("a record is longer than any object"));
        }
        if self.records.len() >= RECORDS_MAX {
            return Err(Flaw("it has more records than it may have"));
        }
        let Some(record) = rest.get_mut(..len) else {
            return Ok(None);
        };
        let offset = self.next.saturating_sub(wide(rest_len));
        let place = RecordPlace {
            id: head.id,
            offset: u32::try_from(offset).map_err(|_| Flaw("it is too long"))?,
            record_len: u32::try_from(len).map_err(|_| Flaw("it is too long"))?,
            plain_len: head.plain_len,
        };
        if let (Some(objects), Some(sealer)) = (self.objects, sealer) {
            let place = Place {
                pack_id: *self.id,
                pack_len: self.len,
                kind: header.kind,
                record: place,
            };
            let (with, plain) = (&mut self.decompressor, &mut self.plain);
            if let Err(flaw) = objects.open(sealer, header.kind, &place, record, with, plain) {
                self.bad_records = self.bad_records.saturating_add(1);
                self.first_bad.get_or_insert(flaw);
            }
        }
        self.records.push(place);
        Ok(Some(len))
    }

    fn end(&mut self) {
        if self.broken.is_none() && !self.buffer.is_empty() {
            self.broken = Some(Flaw("its last record is cut off"));
        }
    }

    /// Says what is wrong, if anything is.
    fn verdict(&self, name_matches: bool) -> Option<String> {
        let records = match (self.broken, self.first_bad) {
            (Some(flaw), _) => Some(format!("{flaw}")),
            (None, Some(flaw)) => Some(format!(
                "{} of its {} records cannot be read: {flaw}",
                self.bad_records,
                self.records.len()
            )),
            (None, None) => None,
        };
        match (name_matches, records) {
            (true, records) => records,
            (false, None) => Some("its hash is not its name".to_owned()),
            (false, Some(records)) => Some(format!("its hash is not its name; {records}")),
        }
    }
}
