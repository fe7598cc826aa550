//! Asks the bitmap about blocks, reads the clean ones, compares them.

use std::time::Instant;

use highwater_model::{ByteRange, ObjectId};
use highwater_nbd::{Completion, Connection, NbdError};
use highwater_plan::{AuditView, MOUNTED_BYTES, Strata, choose_audit, mounted_places};
use highwater_repo::{ImageReader, RepoError};

use super::AuditOrder;
use crate::backup::copy::CopyError;
use crate::backup::disk_copy::{BYTES_NEAR, Disk, REQUESTS_NEAR, STATE_DIRTY, read_error};

/// Blocks between two looks at the clock.
const BATCH_TIMED: usize = 32;
/// Blocks asked about together where time does not matter.
const BATCH: usize = 1024;
/// Two blocks that are closer than this share one question about the bitmap.
const GAP_CHUNKS: u64 = 64;
/// Questions to find the highest clean block of data.
const QUESTIONS_MAX: u64 = 16;
/// Blocks that the first of those questions is about; each later one is about
/// eight times as many, up to the most.
const SPAN_FIRST: u64 = 64;
const SPAN_MAX: u64 = 1 << 16;

/// What ends an audit early.
pub(super) enum End {
    /// Its time or its number of reads is used up.
    Budget,
    /// This block is another than the one stored.
    Lie(u64),
    /// A block could not be read. The connection must not be used any more:
    /// QEMU hangs up where it cannot read, and replies may be under way.
    Unreadable(CopyError),
    Failed(CopyError),
}

impl From<RepoError> for End {
    fn from(source: RepoError) -> Self {
        Self::Failed(CopyError::Store {
            source: Box::new(source),
        })
    }
}

/// The blocks of one disk, the questions about them, and the reads.
pub(super) struct Auditor<'a> {
    pub(super) disk: &'a Disk<'a>,
    pub(super) connection: &'a mut Connection,
    pub(super) context: &'a str,
    pub(super) image: ImageReader,
    pub(super) size_bytes: u64,
    /// Blocks that can be compared.
    pub(super) chunks: u64,
    pub(super) reads_left: Option<u64>,
    pub(super) deadline: Option<Instant>,
    pub(super) blocks: &'a mut u64,
}

impl Auditor<'_> {
    /// Goes through all blocks that are chosen, or until something ends it.
    pub(super) fn run(&mut self, order: &AuditOrder) -> Result<(), End> {
        let began = Instant::now();
        let mounted = mounted_places(&self.head()?, self.size_bytes);
        let choice = choose_audit(&AuditView {
            chunks: self.chunks,
            chunk_bytes: self.disk.shared.chunk_size.bytes(),
            hot: &order.hot,
            mounted: &mounted,
            smallest_bytes: order.smallest_bytes,
            mark: &order.mark,
            duty: order.duty,
            wish: order.wish,
        });
        self.reads_left = choice.reads_max;
        self.deadline = choice.time_max.map(|time| began + time);
        self.check_all(choice.places.into_iter())?;
        let highest = self.highest_clean_data()?;
        self.check_all(highest.into_iter())?;
        self.check_all(choice.anywhere)?;
        self.check_data(choice.on_data)?;
        if self.deadline.is_some() {
            return self.check_all(from_all_over(choice.beyond));
        }
        self.check_all(choice.beyond)
    }

    /// Reads the beginning of the disk, where its partition tables are.
    fn head(&mut self) -> Result<Vec<u8>, End> {
        let Some(range) = ByteRange::between(0, MOUNTED_BYTES.min(self.size_bytes)) else {
            return Ok(Vec::new());
        };
        let mut head = vec![0; usize::try_from(range.len()).unwrap_or_default()];
        let request_bytes = self.disk.request_bytes();
        let step = usize::try_from(request_bytes).unwrap_or(usize::MAX);
        let pieces = head.chunks_mut(step);
        for (offset, piece) in (0_u64..).step_by(step).zip(pieces) {
            self.connection
                .read_at(offset, piece)
                .map_err(|source| End::Unreadable(read_error(self.disk, range, source)))?;
        }
        Ok(head)
    }

    /// Checks blocks, a batch at a time.
    fn check_all(&mut self, mut chunks: impl Iterator<Item = u64>) -> Result<(), End> {
        let size = if self.deadline.is_some() {
            BATCH_TIMED
        } else {
            BATCH
        };
        loop {
            let mut batch: Vec<u64> = chunks.by_ref().take(size).collect();
            if batch.is_empty() {
                return Ok(());
            }
            self.look_around()?;
            batch.sort_unstable();
            batch.dedup();
            let mut clean = self.clean(&batch)?;
            if let Some(left) = &mut self.reads_left {
                clean.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
                *left = left.saturating_sub(clean.len() as u64);
            }
            self.compare(&clean)?;
        }
    }

    /// Checks the block of data at or after each of these.
    fn check_data(&mut self, chunks: Strata) -> Result<(), End> {
        let mut found = Vec::new();
        for chunk in chunks {
            match self.image.from(chunk).next().transpose()? {
                Some((data, _)) if data < self.chunks => found.push(data),
                // They ascend: there is none after the next one either.
                _ => break,
            }
            if found.len() >= BATCH {
                self.check_all(found.drain(..))?;
            }
        }
        self.check_all(found.into_iter())
    }

    /// Ends the audit if it should end.
    fn look_around(&self) -> Result<(), End> {
        if self.disk.stopped() {
            return Err(End::Failed(CopyError::Interrupted));
        }
        let is_late = self.deadline.is_some_and(|end| Instant::now() > end);
        if is_late || self.reads_left == Some(0) {
            return Err(End::Budget);
        }
        Ok(())
    }

    /// Returns those of the ascending blocks that no dirty byte touches.
    fn clean(&mut self, chunks: &[u64]) -> Result<Vec<u64>, End> {
        let mut groups: Vec<(u64, u64)> = Vec::new();
        for chunk in chunks {
            match groups.last_mut() {
                Some((_, last)) if chunk.saturating_sub(*last) < GAP_CHUNKS => *last = *chunk,
                _ => groups.push((*chunk, *chunk)),
            }
        }
        let mut dirty: Vec<(u64, u64)> = Vec::new();
        let mut next = 0;
        let mut under_way = 0_usize;
        loop {
            while under_way < REQUESTS_NEAR
                && let Some((first, last)) = groups.get(next)
            {
                let range = self.bytes(*first, last.saturating_add(1));
                self.connection
                    .submit_block_status(next as u64, range)
                    .map_err(|source| self.map_error(source))?;
                next += 1;
                under_way += 1;
            }
            if under_way == 0 {
                break;
            }
            let done = self.connection.next_completion();
            let done = done.map_err(|source| self.map_error(source))?;
            under_way -= 1;
            self.take_status(&done, &mut dirty)?;
        }
        dirty.sort_unstable();
        let is_dirty = |chunk: u64| {
            // Runs may overlap at their ends, never in their starts' order.
            let after = dirty.partition_point(|(first, _)| *first <= chunk);
            let near = dirty.get(..after).unwrap_or_default();
            near.iter().rev().take(2).any(|(_, end)| chunk < *end)
        };
        Ok(chunks.iter().copied().filter(|it| !is_dirty(*it)).collect())
    }

    /// Takes note of the dirty runs in the reply to one question, and asks for
    /// what it left out.
    fn take_status(&mut self, done: &Completion, dirty: &mut Vec<(u64, u64)>) -> Result<(), End> {
        let mut at = done.range.start();
        let told = done.extents.iter().find(|it| it.context == self.context);
        for extent in told.into_iter().flat_map(|told| &told.extents) {
            if extent.flags & STATE_DIRTY != 0 {
                dirty.push(self.chunks_of(extent.range));
            }
            at = at.max(extent.range.end());
        }
        let Some(rest) = ByteRange::between(at, done.range.end()).filter(|rest| !rest.is_empty())
        else {
            return Ok(());
        };
        self.dirty_runs(rest, dirty)
    }

    /// Adds the dirty runs of a range, in blocks.
    fn dirty_runs(&mut self, range: ByteRange, dirty: &mut Vec<(u64, u64)>) -> Result<(), End> {
        let mut found = Vec::new();
        let chunk_bytes = self.disk.shared.chunk_size.bytes();
        let mapped =
            self.connection
                .map::<NbdError>(self.context, range, &mut |range: ByteRange, state| {
                    if state & STATE_DIRTY != 0 {
                        let first = range.start() / chunk_bytes;
                        let end = range.end().div_ceil(chunk_bytes);
                        match found.last_mut() {
                            Some((_, last)) if first <= *last => *last = end,
                            _ => found.push((first, end)),
                        }
                    }
                    Ok(())
                });
        mapped.map_err(|source| self.map_error(source))?;
        dirty.append(&mut found);
        Ok(())
    }

    /// Reads blocks, several at a time, and compares them with the tree.
    fn compare(&mut self, chunks: &[u64]) -> Result<(), End> {
        let runs = runs(
            chunks,
            self.disk.request_bytes() / self.disk.shared.chunk_size.bytes(),
        );
        let mut next = 0;
        let (mut under_way, mut bytes_under_way) = (0_usize, 0_u64);
        let mut lie = None;
        loop {
            // Two at least, however large a block is.
            while lie.is_none()
                && (under_way < 2 || (under_way < REQUESTS_NEAR && bytes_under_way < BYTES_NEAR))
                && let Some((first, end)) = runs.get(next)
            {
                let range = self.bytes(*first, *end);
                if let Some(limiter) = &self.disk.shared.limiter {
                    limiter.take(range.len(), &|| self.disk.stopped());
                }
                self.connection
                    .submit_read(next as u64, range, Vec::new())
                    .map_err(|source| End::Unreadable(read_error(self.disk, range, source)))?;
                next += 1;
                under_way += 1;
                bytes_under_way += range.len();
            }
            if under_way == 0 {
                break;
            }
            let done = self.connection.next_completion().map_err(|source| {
                let range = self.connection.unanswered().next().map(|(_, range)| range);
                match range {
                    Some(range) => End::Unreadable(read_error(self.disk, range, source)),
                    None => self.map_error(source),
                }
            })?;
            under_way -= 1;
            bytes_under_way -= done.range.len();
            let found = self.differs(done)?;
            lie = lie.or(found);
        }
        lie.map_or(Ok(()), |chunk| Err(End::Lie(chunk)))
    }

    /// Returns the first block of a read that is not the one stored.
    fn differs(&mut self, done: Completion) -> Result<Option<u64>, End> {
        let range = done.range;
        let bytes = done
            .result
            .map_err(|source| End::Unreadable(read_error(self.disk, range, source)))?;
        let (first, end) = self.chunks_of(range);
        let stored = self.stored(first, end)?;
        let pieces = bytes.chunks(self.disk.shared.chunk_size.len());
        assert_eq!(
            pieces.len(),
            stored.len(),
            "a completed read is as long as its request"
        );
        *self.blocks += stored.len() as u64;
        let mut numbered = (first..).zip(pieces).zip(stored);
        let other = numbered.find(|((_, piece), id)| self.disk.shared.repo.chunk_id(piece) != *id);
        Ok(other.map(|((chunk, _), _)| chunk))
    }

    /// Returns the ids in the parent's tree of the blocks `first .. end`.
    fn stored(&self, first: u64, end: u64) -> Result<Vec<Option<ObjectId>>, End> {
        if end.saturating_sub(first) == 1 {
            return Ok(vec![self.image.chunk(first)?]);
        }
        let mut ids = Vec::new();
        let mut present = self.image.from(first).peekable();
        for chunk in first..end {
            let id = match present.peek() {
                Some(Ok((next, _))) if *next > chunk => None,
                None => None,
                Some(_) => present.next().transpose()?.map(|(_, id)| id),
            };
            ids.push(id);
        }
        Ok(ids)
    }

    /// Returns the highest block that is stored as data and clean, if few
    /// questions find it.
    fn highest_clean_data(&mut self) -> Result<Option<u64>, End> {
        let mut below = self.chunks;
        let mut span = SPAN_FIRST;
        for _ in 0..QUESTIONS_MAX {
            self.look_around()?;
            let Some(top) = self.image.last_before(below)? else {
                return Ok(None);
            };
            let first = top.saturating_add(1).saturating_sub(span);
            let mut dirty = Vec::new();
            self.dirty_runs(self.bytes(first, top.saturating_add(1)), &mut dirty)?;
            below = top.saturating_add(1);
            // Within this window: from the top, skipping dirty runs.
            while below > first {
                let Some(data) = self.image.last_before(below)? else {
                    return Ok(None);
                };
                if data < first {
                    break;
                }
                match dirty.iter().rev().find(|(start, _)| *start <= data) {
                    Some((start, end)) if data < *end => below = *start,
                    _ => return Ok(Some(data)),
                }
            }
            span = span.saturating_mul(8).min(SPAN_MAX);
        }
        Ok(None)
    }

    fn bytes(&self, first: u64, end: u64) -> ByteRange {
        let chunk = self.disk.shared.chunk_size.bytes();
        let start = first.saturating_mul(chunk);
        ByteRange::between(start, end.saturating_mul(chunk).min(self.size_bytes))
            .expect("blocks below the end of the disk are a range")
    }

    fn chunks_of(&self, range: ByteRange) -> (u64, u64) {
        let chunk = self.disk.shared.chunk_size.bytes();
        (range.start() / chunk, range.end().div_ceil(chunk))
    }

    fn map_error(&self, source: NbdError) -> End {
        End::Failed(CopyError::Map {
            disk: self.disk.job.target.clone(),
            source: Box::new(source),
        })
    }
}

/// Joins neighbours of ascending blocks to runs `first .. end`.
fn runs(chunks: &[u64], longest: u64) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for chunk in chunks {
        match runs.last_mut() {
            Some((first, end)) if end == chunk && *end - *first < longest => *end += 1,
            _ => runs.push((*chunk, chunk.saturating_add(1))),
        }
    }
    runs
}

/// Mixes the blocks so that the first of them are from everywhere: where time
/// is short the end of the disk is no darker than the beginning.
fn from_all_over(chunks: Strata) -> impl Iterator<Item = u64> {
    let mut mixed: Vec<(u64, u64)> = (0..).zip(chunks).collect();
    mixed.sort_unstable_by_key(|(number, _): &(u64, u64)| number.reverse_bits());
    mixed.into_iter().map(|(_, chunk)| chunk)
}
