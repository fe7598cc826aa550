//! Which blocks does the guest write most often?
//!
//! A bitmap that lost writes calls clean what was always dirty. So the busiest
//! blocks are remembered from increment to increment, and are the first that
//! are looked at. This is a hint: a wrong one costs a read.

use std::collections::BTreeMap;

use crate::strata::mixed;

/// Blocks that are remembered.
pub const HOT_MAX: usize = 64;
/// What a block gains by being dirty in an increment; the score of one that
/// always is approaches twice as much.
const GAIN: u32 = 1000;
/// What a block begins with: it has to be dirty again to displace one that
/// was dirty twice.
const BEGINNING: u32 = GAIN / 2;

/// A block that is often written, and how often.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HotChunk {
    /// Its number.
    pub chunk: u64,
    /// Halved by each increment, and raised by those that found it dirty.
    pub score: u32,
}

/// Returns what to remember after an increment.
pub fn next_hot(before: &[HotChunk], dirty: &DirtySample) -> Vec<HotChunk> {
    let mut scores: BTreeMap<u64, u32> = BTreeMap::new();
    for hot in before.iter().take(HOT_MAX) {
        let gain = if dirty.known.get(&hot.chunk) == Some(&true) {
            GAIN
        } else {
            0
        };
        scores.insert(hot.chunk, (hot.score / 2).saturating_add(gain));
    }
    for chunk in &dirty.sample {
        scores.entry(*chunk).or_insert(BEGINNING);
    }
    let mut next: Vec<HotChunk> = scores
        .into_iter()
        .filter(|(_, score)| *score > 0)
        .map(|(chunk, score)| HotChunk { chunk, score })
        .collect();
    next.sort_by_key(|hot| (std::cmp::Reverse(hot.score), hot.chunk));
    next.truncate(HOT_MAX);
    next
}

/// What is kept of the dirty runs of an increment: which of the known blocks
/// were among them, and the beginnings of some.
#[derive(Debug, Clone, Default)]
pub struct DirtySample {
    known: BTreeMap<u64, bool>,
    sample: Vec<u64>,
    runs: u64,
    random: u64,
}

impl DirtySample {
    /// Begins with the blocks that are remembered so far.
    pub fn new(before: &[HotChunk]) -> Self {
        let known = before.iter().take(HOT_MAX).map(|hot| (hot.chunk, false));
        Self {
            known: known.collect(),
            ..Self::default()
        }
    }

    /// Takes note of a run of dirty blocks, `first .. end`.
    pub fn dirty(&mut self, first: u64, end: u64) {
        if first >= end {
            return;
        }
        for (_, was_dirty) in self.known.range_mut(first..end) {
            *was_dirty = true;
        }
        // Every run has the same chance to stay (reservoir sampling). Runs and
        // not blocks: a large file that was written once is one run, and the
        // metadata that every write touches are many.
        self.runs = self.runs.saturating_add(1);
        if self.sample.len() < HOT_MAX {
            self.sample.push(first);
            return;
        }
        self.random = mixed(self.random ^ first);
        let slot = usize::try_from(self.random % self.runs).unwrap_or(usize::MAX);
        if let Some(slot) = self.sample.get_mut(slot) {
            *slot = first;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(before: &[HotChunk], runs: &[(u64, u64)]) -> Vec<HotChunk> {
        let mut dirty = DirtySample::new(before);
        for (first, end) in runs {
            dirty.dirty(*first, *end);
        }
        next_hot(before, &dirty)
    }

    #[test]
    fn a_block_that_is_written_every_time_outlives_a_thousand_that_are_not() {
        let mut hot = Vec::new();
        for round in 0..30_u64 {
            let once = (0..1000).map(|n| 1_000_000 + round * 10_000 + 3 * n);
            let runs: Vec<_> = once.map(|first| (first, first + 1)).collect();
            hot = after(&hot, &[&[(5, 8)], &runs[..]].concat());
            if round == 0 {
                // It enters at the latest when it is a run among few.
                hot = after(&hot, &[(5, 8)]);
            }
            assert!(hot.len() <= HOT_MAX);
        }
        assert_eq!(hot[0].chunk, 5);
        assert!(hot[0].score > GAIN);
    }

    #[test]
    fn a_block_that_is_no_longer_written_is_forgotten() {
        let mut hot = after(&[], &[(7, 8)]);
        for _ in 0..12 {
            hot = after(&hot, &[]);
        }
        assert!(hot.is_empty());
    }

    #[test]
    fn however_many_runs_there_are_few_are_kept_from_all_over() {
        let runs: Vec<_> = (0..100_000_u64).map(|n| (2 * n, 2 * n + 1)).collect();
        let hot = after(&[], &runs);
        assert_eq!(hot.len(), HOT_MAX);
        assert!(hot.iter().any(|hot| hot.chunk > 100_000));
        assert!(after(&[], &[(3, 3), (9, 2)]).is_empty());
    }
}
