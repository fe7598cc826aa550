//! What is known about each part of a disk: sorted, merged, without gaps.

use crate::ByteRange;

/// An extent did not begin where the one before it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an extent begins at {found} where {expected} is due")]
pub struct OutOfOrder {
    /// Where the next extent had to begin.
    pub expected: u64,
    /// Where it began.
    pub found: u64,
}

/// A map from ranges to values of `V`, covering `start ..` [`ExtentMap::covered_to`]
/// without gap or overlap.
///
/// Neighbours with equal values are merged as they arrive, so that a map of an
/// 8 TiB disk costs memory by its changes of state, not by its size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtentMap<V> {
    start: u64,
    /// End of each extent and its value; each begins where the one before ends.
    extents: Vec<(u64, V)>,
}

impl<V: Copy + PartialEq> ExtentMap<V> {
    /// Returns a map that covers nothing yet and will begin at `start`.
    pub const fn starting_at(start: u64) -> Self {
        Self {
            start,
            extents: Vec::new(),
        }
    }

    /// Returns how far the map reaches.
    pub fn covered_to(&self) -> u64 {
        self.extents.last().map_or(self.start, |(end, _)| *end)
    }

    /// Adds the next extent, which must begin at [`ExtentMap::covered_to`].
    ///
    /// An empty extent adds nothing.
    pub fn push(&mut self, range: ByteRange, value: V) -> Result<(), OutOfOrder> {
        let expected = self.covered_to();
        if range.start() != expected {
            return Err(OutOfOrder {
                expected,
                found: range.start(),
            });
        }
        if range.is_empty() {
            return Ok(());
        }
        match self.extents.last_mut() {
            Some((end, last)) if *last == value => *end = range.end(),
            _ => self.extents.push((range.end(), value)),
        }
        Ok(())
    }

    /// Returns the extents in order.
    pub fn iter(&self) -> impl Iterator<Item = (ByteRange, V)> + '_ {
        let starts = std::iter::once(self.start).chain(self.extents.iter().map(|(end, _)| *end));
        starts
            .zip(&self.extents)
            .filter_map(|(start, (end, value))| {
                ByteRange::between(start, *end).map(|range| (range, *value))
            })
    }

    /// Returns how many extents there are.
    pub fn len(&self) -> usize {
        self.extents.len()
    }

    /// Returns whether the map covers nothing.
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// Returns the part of the map inside `range`, clipped to it.
    pub fn within(&self, range: ByteRange) -> impl Iterator<Item = (ByteRange, V)> + '_ {
        let first = self
            .extents
            .partition_point(|(end, _)| *end <= range.start());
        let start = match first
            .checked_sub(1)
            .and_then(|before| self.extents.get(before))
        {
            Some((end, _)) => *end,
            None => self.start,
        };
        let rest = self.extents.get(first..).unwrap_or_default();
        std::iter::once(start)
            .chain(rest.iter().map(|(end, _)| *end))
            .zip(rest)
            .map_while(move |(start, (end, value))| {
                let extent = ByteRange::between(start, *end)?;
                if extent.start() >= range.end() {
                    return None;
                }
                Some((extent.intersection(range), *value))
            })
            .filter_map(|(part, value)| part.map(|part| (part, value)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::between(start, end).unwrap()
    }

    #[test]
    fn neighbours_with_equal_values_are_one_extent() {
        let mut map = ExtentMap::starting_at(0);
        map.push(range(0, 10), true).unwrap();
        map.push(range(10, 20), true).unwrap();
        map.push(range(20, 20), false).unwrap();
        map.push(range(20, 30), false).unwrap();
        assert_eq!(
            map.iter().collect::<Vec<_>>(),
            [(range(0, 20), true), (range(20, 30), false)]
        );
        assert_eq!(map.covered_to(), 30);
    }

    #[test]
    fn a_gap_or_an_overlap_is_refused() {
        let mut map = ExtentMap::starting_at(4);
        map.push(range(4, 10), 1).unwrap();
        assert_eq!(
            map.push(range(11, 12), 1),
            Err(OutOfOrder {
                expected: 10,
                found: 11
            })
        );
        assert_eq!(
            map.push(range(9, 12), 1),
            Err(OutOfOrder {
                expected: 10,
                found: 9
            })
        );
    }

    #[test]
    fn a_part_is_clipped_to_the_asked_range() {
        let mut map = ExtentMap::starting_at(0);
        map.push(range(0, 10), 1).unwrap();
        map.push(range(10, 20), 2).unwrap();
        map.push(range(20, 30), 3).unwrap();
        let part: Vec<_> = map.within(range(5, 25)).collect();
        assert_eq!(
            part,
            [(range(5, 10), 1), (range(10, 20), 2), (range(20, 25), 3)]
        );
        assert_eq!(
            map.within(range(10, 20)).collect::<Vec<_>>(),
            [(range(10, 20), 2)]
        );
        assert_eq!(map.within(range(30, 40)).count(), 0);
    }
}
