//! Random blocks, spread evenly and the same each time.

/// A random block of each of `count` equal parts of a range, in ascending order.
///
/// The chance of meeting one of k blocks among n is at least
/// `1 - (1 - k/n)^count`, that of as many free draws: the parts miss with the
/// product of their `1 - k_i/w`, which is largest where the k are evenly spread.
/// A damaged stretch longer than two parts is met for certain.
#[derive(Debug, Clone)]
pub struct Strata {
    random: u64,
    from: u64,
    len: u64,
    count: u64,
    at: u64,
}

impl Strata {
    pub(crate) fn new(seed: u64, from: u64, end: u64, count: u64) -> Self {
        let len = end.saturating_sub(from);
        Self {
            random: seed,
            from,
            len,
            count: count.min(len),
            at: 0,
        }
    }

    /// Returns how many blocks there are in all.
    pub const fn draws(&self) -> u64 {
        self.count
    }
}

impl Iterator for Strata {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        if self.at >= self.count {
            return None;
        }
        let bound = |part: u64| scaled(part, self.len, self.count);
        let (start, end) = (bound(self.at), bound(self.at.saturating_add(1)));
        self.at = self.at.saturating_add(1);
        self.random = mixed(self.random);
        let inside = scaled_by_word(self.random, end.saturating_sub(start));
        Some(self.from.saturating_add(start).saturating_add(inside))
    }
}

/// `part * whole / parts`, without overflow.
pub(crate) fn scaled(part: u64, whole: u64, parts: u64) -> u64 {
    let value = u128::from(part) * u128::from(whole) / u128::from(parts.max(1));
    u64::try_from(value).unwrap_or(u64::MAX)
}

/// Maps a random word to `0 .. below` (0 if that is empty).
fn scaled_by_word(word: u64, below: u64) -> u64 {
    let value = (u128::from(word) * u128::from(below)) >> 64;
    u64::try_from(value).unwrap_or_default()
}

/// The next word of `SplitMix64`: well mixed, and the same on every machine. It
/// need not be unguessable: who could aim between the samples could as well
/// write to the repository's host.
pub(crate) const fn mixed(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}
