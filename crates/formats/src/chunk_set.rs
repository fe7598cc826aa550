//! Which chunks of an image hold data, and the how-manieth each of them is.

/// Words of the bit set between two stored ranks: 4096 chunks.
const WORDS_PER_RANK: usize = 64;

/// Collects a [`ChunkSet`].
#[derive(Debug)]
pub struct ChunkSetBuilder {
    bits: Vec<u64>,
}

/// A set of chunk indices that answers "is it in?" and "how many before it?"
/// without a search.
///
/// Costs one bit per chunk and 8 bytes per 4096 of them: 16.3 MiB for an 8 TiB
/// disk at 64 KiB.
#[derive(Debug)]
pub struct ChunkSet {
    bits: Vec<u64>,
    ranks: Vec<u64>,
    len: u64,
}

impl ChunkSetBuilder {
    /// Returns an empty set for an image of `count` chunks.
    pub fn new(count: u64) -> Self {
        let words = usize::try_from(count.div_ceil(64)).expect("an image's bit set fits in memory");
        Self {
            bits: vec![0; words],
        }
    }

    /// Adds a chunk; one beyond the image is a mistake of the caller.
    pub fn insert(&mut self, chunk: u64) {
        let (word, bit) = place(chunk);
        let word = self
            .bits
            .get_mut(word)
            .expect("the chunk lies inside the image");
        *word |= bit;
    }

    /// Ends the collection.
    pub fn build(self) -> ChunkSet {
        let mut len = 0_u64;
        let ranks = self
            .bits
            .chunks(WORDS_PER_RANK)
            .map(|words| {
                let before = len;
                len += words
                    .iter()
                    .map(|word| u64::from(word.count_ones()))
                    .sum::<u64>();
                before
            })
            .collect();
        ChunkSet {
            bits: self.bits,
            ranks,
            len,
        }
    }
}

impl ChunkSet {
    /// Returns how many chunks are in the set.
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Returns whether no chunk is.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns whether a chunk is in.
    pub fn contains(&self, chunk: u64) -> bool {
        let (word, bit) = place(chunk);
        self.bits.get(word).is_some_and(|word| word & bit != 0)
    }

    /// Returns how many chunks before this one are in.
    pub fn rank(&self, chunk: u64) -> u64 {
        let (word, bit) = place(chunk);
        let group = word / WORDS_PER_RANK;
        let Some(before) = self.ranks.get(group) else {
            return self.len;
        };
        let start = group * WORDS_PER_RANK;
        let whole = self
            .bits
            .get(start..word.min(self.bits.len()))
            .unwrap_or_default();
        let partial = self.bits.get(word).map_or(0, |word| word & (bit - 1));
        let inside = whole.iter().chain(std::iter::once(&partial));
        before + inside.map(|word| u64::from(word.count_ones())).sum::<u64>()
    }
}

fn place(chunk: u64) -> (usize, u64) {
    let word = usize::try_from(chunk / 64).unwrap_or(usize::MAX);
    (word, 1 << (chunk % 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_is_the_number_of_earlier_members() {
        let members = [0_u64, 1, 63, 64, 65, 4095, 4096, 9000, 9999];
        let mut builder = ChunkSetBuilder::new(10_000);
        for member in members {
            builder.insert(member);
        }
        let set = builder.build();
        assert_eq!(set.len(), 9);
        for chunk in 0..10_000_u64 {
            let before = members.iter().filter(|member| **member < chunk).count();
            assert_eq!(set.rank(chunk), u64::try_from(before).unwrap(), "{chunk}");
            assert_eq!(set.contains(chunk), members.contains(&chunk), "{chunk}");
        }
        assert!(!set.contains(1 << 40));
        for beyond in [10_000, 10_050, 12_288, 1 << 40] {
            assert_eq!(set.rank(beyond), 9, "{beyond}");
        }
    }
}
