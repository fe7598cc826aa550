//! Remembers which tree pages were visited, in memory of a fixed size.
//!
//! It may forget, which costs a second visit; it never claims to have seen a
//! page that it has not: slots hold half an id, and no two ids share that.

use highwater_model::ObjectId;

/// Slots that one id may use; the more, the less is forgotten early.
const WAYS: usize = 4;
/// To begin with: most repositories are small.
const SETS_MIN: usize = 1 << 8;
/// 64 MiB: the leaves of 16 TiB of 64 KiB chunks.
const LEAF_SETS_MAX: usize = 1 << 20;
/// 8 MiB: there are 64 times fewer of these, and to forget one costs more.
const UPPER_SETS_MAX: usize = 1 << 17;

/// The pages that were visited.
pub(super) struct Seen {
    leaves: Table,
    upper: Table,
}

impl Seen {
    pub(super) fn new() -> Self {
        Self::with_sets_max(LEAF_SETS_MAX, UPPER_SETS_MAX)
    }

    fn with_sets_max(leaves: usize, upper: usize) -> Self {
        Self {
            leaves: Table::new(leaves),
            upper: Table::new(upper),
        }
    }

    /// Notes a page in its role; returns whether it was noted before.
    pub(super) fn insert(&mut self, level: usize, id: &ObjectId) -> bool {
        let tag = tag(level, id);
        let table = self.table(level);
        if table.contains(tag) {
            return true;
        }
        table.insert(tag);
        false
    }

    /// Returns whether a page in its role was noted.
    pub(super) fn contains(&mut self, level: usize, id: &ObjectId) -> bool {
        self.table(level).contains(tag(level, id))
    }

    fn table(&mut self, level: usize) -> &mut Table {
        if level == 0 {
            &mut self.leaves
        } else {
            &mut self.upper
        }
    }
}

/// Half an id, and the role: in another role the same page has other children.
fn tag(level: usize, id: &ObjectId) -> u128 {
    let half = id.as_bytes().first_chunk().copied();
    let role = u128::try_from(level).unwrap_or_default();
    let half = half.map_or(0, u128::from_le_bytes);
    // Zero marks an empty slot.
    half.wrapping_add(role.wrapping_mul(1 << 120)).max(1)
}

struct Table {
    sets: Vec<[u128; WAYS]>,
    sets_max: usize,
    used: usize,
}

impl Table {
    fn new(sets_max: usize) -> Self {
        Self {
            sets: vec![[0; WAYS]; SETS_MIN.min(sets_max)],
            sets_max,
            used: 0,
        }
    }

    fn contains(&mut self, tag: u128) -> bool {
        self.set(tag).is_some_and(|set| set.contains(&tag))
    }

    fn insert(&mut self, tag: u128) {
        let is_half_full = self.used >= self.sets.len().saturating_mul(WAYS / 2);
        if is_half_full && self.sets.len() < self.sets_max {
            self.grow();
        }
        if self.put(tag) {
            self.used = self.used.saturating_add(1);
        }
    }

    /// Returns whether nothing was forgotten for it.
    fn put(&mut self, tag: u128) -> bool {
        let Some(set) = self.set(tag) else {
            return false;
        };
        // The newest comes first and the oldest falls out.
        set.rotate_right(1);
        set.first_mut()
            .is_some_and(|first| std::mem::replace(first, tag) == 0)
    }

    fn grow(&mut self) {
        let sets = self.sets.len().saturating_mul(4).min(self.sets_max);
        let old = std::mem::replace(&mut self.sets, vec![[0; WAYS]; sets]);
        self.used = 0;
        for tag in old.into_iter().flatten().filter(|tag| *tag != 0) {
            self.used = self.used.saturating_add(usize::from(self.put(tag)));
        }
    }

    fn set(&mut self, tag: u128) -> Option<&mut [u128; WAYS]> {
        let sets = u128::try_from(self.sets.len()).unwrap_or(1).max(1);
        let at = tag.checked_rem(sets).unwrap_or_default();
        self.sets.get_mut(usize::try_from(at).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u64) -> ObjectId {
        ObjectId::from_bytes(blake3::hash(&n.to_le_bytes()).into())
    }

    #[test]
    fn a_page_that_was_not_visited_is_never_called_seen_however_many_were() {
        let mut seen = Seen::with_sets_max(512, 8);
        for n in 0..10_000 {
            assert!(!seen.insert(0, &id(n)), "{n}");
            assert!(seen.contains(0, &id(n)), "{n} is remembered at first");
            assert!(!seen.contains(1, &id(n)), "{n} in another role");
        }
        let kept = (0..10_000).filter(|n| seen.contains(0, &id(*n))).count();
        assert_eq!(kept, 512 * WAYS, "memory is used, and does not grow");
    }
}
