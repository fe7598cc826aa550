//! Which chunks of a window of the disk must be read, and which are known to
//! be zero.
//!
//! The disk is walked in windows of fixed size, so that memory depends neither
//! on the disk's size nor on how fragmented its maps are: two bits per chunk.

use highwater_model::{ByteRange, ChunkSize};

/// Bytes of the disk in one window at 64 KiB chunks: 2^20 chunks, 256 KiB of bits.
pub(super) const WINDOW_CHUNKS: u64 = 1 << 20;
/// A map of allocation is asked for around dirty chunks; two that are closer
/// than this share one question, because a question costs a round trip.
const GAP_CHUNKS: u64 = 256;

/// The state of each chunk of one window.
#[derive(Debug)]
pub(super) struct ChunkMap {
    chunk_size: ChunkSize,
    window: ByteRange,
    wanted: Bits,
    data: Bits,
}

/// What is to be done with a run of wanted chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Run {
    /// Read these bytes.
    Read(ByteRange),
    /// These bytes are zero; they are stored as such without being read.
    Zero(ByteRange),
}

impl ChunkMap {
    /// Begins the map of a window, whose start is a multiple of the chunk size.
    pub(super) fn new(window: ByteRange, chunk_size: ChunkSize) -> Self {
        let chunks = chunk_size.count(window.len());
        Self {
            chunk_size,
            window,
            wanted: Bits::new(chunks),
            data: Bits::new(chunks),
        }
    }

    /// Says that a chunk which shares a byte with `range` must be stored, as
    /// data or as zero.
    pub(super) fn want(&mut self, range: ByteRange) {
        let chunks = self.chunks_of(range);
        self.wanted.set(chunks);
    }

    /// Says that `range` may hold something else than zeroes.
    pub(super) fn may_hold_data(&mut self, range: ByteRange) {
        let chunks = self.chunks_of(range);
        self.data.set(chunks);
    }

    /// Returns ranges around the wanted chunks, few and disjoint, for which it
    /// is worth asking what is zero.
    pub(super) fn worth_asking(&self) -> Vec<ByteRange> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for (start, end, wanted) in self.wanted.runs() {
            if !wanted {
                continue;
            }
            match ranges.last_mut() {
                Some((_, last)) if start - *last < GAP_CHUNKS => *last = end,
                _ => ranges.push((start, end)),
            }
        }
        ranges
            .into_iter()
            .filter_map(|(start, end)| self.bytes_of(start, end))
            .collect()
    }

    /// Returns what is to be done, in ascending order; chunks nobody wants are
    /// left out. A `Read` run is at most `read_bytes_max` long (one chunk at least).
    pub(super) fn runs(&self, read_bytes_max: u64) -> impl Iterator<Item = Run> + '_ {
        let piece = (read_bytes_max / self.chunk_size.bytes()).max(1);
        self.wanted
            .runs()
            .filter(|(_, _, wanted)| *wanted)
            .flat_map(|(start, end, _)| self.data.runs_between(start, end))
            .flat_map(move |(start, end, data)| {
                let step = if data { piece } else { end - start };
                (start..end)
                    .step_by(usize::try_from(step).unwrap_or(usize::MAX))
                    .filter_map(move |first| {
                        let range = self.bytes_of(first, end.min(first + step))?;
                        Some(if data {
                            Run::Read(range)
                        } else {
                            Run::Zero(range)
                        })
                    })
            })
    }

    fn chunks_of(&self, range: ByteRange) -> (u64, u64) {
        let Some(inside) = range.intersection(self.window) else {
            return (0, 0);
        };
        let chunk = self.chunk_size.bytes();
        let start = (inside.start() - self.window.start()) / chunk;
        let end = (inside.end() - self.window.start()).div_ceil(chunk);
        (start, end)
    }

    fn bytes_of(&self, start: u64, end: u64) -> Option<ByteRange> {
        let chunk = self.chunk_size.bytes();
        let base = self.window.start();
        ByteRange::between(
            base + start * chunk,
            (base + end * chunk).min(self.window.end()),
        )
    }
}

/// A plain bit set with fast runs.
#[derive(Debug)]
struct Bits {
    words: Vec<u64>,
    len: u64,
}

impl Bits {
    fn new(len: u64) -> Self {
        let words = usize::try_from(len.div_ceil(64)).expect("a window has at most 2^20 chunks");
        Self {
            words: vec![0; words],
            len,
        }
    }

    fn set(&mut self, (start, end): (u64, u64)) {
        let mut at = start;
        while at < end.min(self.len) {
            let in_word = at % 64;
            let count = (64 - in_word).min(end - at);
            let ones = if count == 64 {
                u64::MAX
            } else {
                ((1 << count) - 1) << in_word
            };
            if let Some(word) = usize::try_from(at / 64)
                .ok()
                .and_then(|it| self.words.get_mut(it))
            {
                *word |= ones;
            }
            at += count;
        }
    }

    /// Returns the end of the run of equal bits that begins at `at`, and the bit.
    fn run(&self, at: u64, limit: u64) -> (u64, bool) {
        let word = |at: u64| {
            let word = usize::try_from(at / 64)
                .ok()
                .and_then(|it| self.words.get(it));
            word.copied().unwrap_or_default()
        };
        let value = word(at) >> (at % 64) & 1 == 1;
        let mut end = at;
        while end < limit {
            let shifted = word(end) >> (end % 64);
            let equal = if value {
                shifted.trailing_ones()
            } else {
                shifted.trailing_zeros()
            };
            let left = 64 - end % 64;
            let step = u64::from(equal).min(left);
            end += step;
            if step < left {
                break;
            }
        }
        (end.min(limit), value)
    }

    fn runs(&self) -> impl Iterator<Item = (u64, u64, bool)> + '_ {
        self.runs_between(0, self.len)
    }

    fn runs_between(&self, start: u64, limit: u64) -> impl Iterator<Item = (u64, u64, bool)> + '_ {
        let mut at = start;
        std::iter::from_fn(move || {
            if at >= limit {
                return None;
            }
            let start = at;
            let (end, value) = self.run(at, limit);
            at = end;
            Some((start, end, value))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = 64 << 10;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::between(start, end).unwrap()
    }

    fn map(bytes: u64) -> ChunkMap {
        ChunkMap::new(range(0, bytes), ChunkSize::DEFAULT)
    }

    #[test]
    fn a_dirty_hole_is_stored_as_zero_and_never_dropped() {
        let mut map = map(10 * CHUNK);
        map.want(range(CHUNK, 3 * CHUNK));
        map.may_hold_data(range(2 * CHUNK, 2 * CHUNK + 1));
        let runs: Vec<Run> = map.runs(u64::MAX).collect();
        assert_eq!(
            runs,
            [
                Run::Zero(range(CHUNK, 2 * CHUNK)),
                Run::Read(range(2 * CHUNK, 3 * CHUNK))
            ]
        );
    }

    #[test]
    fn one_dirty_byte_makes_its_whole_chunk_wanted_and_nothing_else() {
        let mut map = map(10 * CHUNK);
        map.want(range(3 * CHUNK - 1, 3 * CHUNK + 1));
        map.may_hold_data(range(0, 10 * CHUNK));
        assert_eq!(
            map.runs(u64::MAX).collect::<Vec<_>>(),
            [Run::Read(range(2 * CHUNK, 4 * CHUNK))]
        );
    }

    #[test]
    fn the_last_chunk_may_be_short_and_reads_are_cut_to_size() {
        let mut map = map(5 * CHUNK + 512);
        map.want(range(0, 5 * CHUNK + 512));
        map.may_hold_data(range(0, 5 * CHUNK + 512));
        let runs: Vec<Run> = map.runs(2 * CHUNK).collect();
        assert_eq!(
            runs,
            [
                Run::Read(range(0, 2 * CHUNK)),
                Run::Read(range(2 * CHUNK, 4 * CHUNK)),
                Run::Read(range(4 * CHUNK, 5 * CHUNK + 512)),
            ]
        );
    }

    #[test]
    fn near_questions_are_asked_together_and_far_ones_apart() {
        let mut map = map(4096 * CHUNK);
        map.want(range(0, 1));
        map.want(range(100 * CHUNK, 100 * CHUNK + 1));
        map.want(range(2000 * CHUNK, 2000 * CHUNK + 1));
        assert_eq!(
            map.worth_asking(),
            [range(0, 101 * CHUNK), range(2000 * CHUNK, 2001 * CHUNK)]
        );
    }

    #[test]
    fn runs_agree_with_a_look_at_every_bit() {
        let mut seed = 7_u64;
        let mut next = move || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            seed >> 33
        };
        for _ in 0..200 {
            let len = next() % 300 + 1;
            let mut bits = Bits::new(len);
            let mut plain = vec![false; usize::try_from(len).unwrap()];
            for _ in 0..next() % 6 {
                let start = next() % len;
                let end = start + next() % (len - start + 1);
                bits.set((start, end));
                (start..end).for_each(|at| plain[usize::try_from(at).unwrap()] = true);
            }
            let mut again = Vec::new();
            for (start, end, value) in bits.runs() {
                assert!(start < end);
                again.extend((start..end).map(|_| value));
            }
            assert_eq!(again, plain);
        }
    }

    #[test]
    fn a_window_in_the_middle_keeps_its_offsets() {
        let window = range(8 * CHUNK, 16 * CHUNK);
        let mut map = ChunkMap::new(window, ChunkSize::DEFAULT);
        map.want(range(0, 9 * CHUNK));
        map.want(range(15 * CHUNK, 99 * CHUNK));
        assert_eq!(
            map.runs(u64::MAX).collect::<Vec<_>>(),
            [
                Run::Zero(range(8 * CHUNK, 9 * CHUNK)),
                Run::Zero(range(15 * CHUNK, 16 * CHUNK))
            ]
        );
    }
}
