//! Remembers which tree pages were visited, in memory of a fixed size.
//!
//! It may forget, which costs a second visit; it never claims to have seen a
//! page that it has not: slots hold half an id, and no two ids share that.

use highwater_model::ObjectId;

/// Slots that one id may use; the more, the less is forgotten early.
const WAYS: usize = 4;
/// 64 MiB: the leaves of 16 TiB of 64 KiB chunks. The system gives this memory
/// only as it is used.
const LEAF_SETS: usize = 1 << 20;
/// 8 MiB: there are 64 times fewer of these, and to forget one costs more.
const UPPER_SETS: usize = 1 << 17;

/// The pages that were visited.
pub(super) struct Seen {
    leaves: Vec<[u128; WAYS]>,
    upper: Vec<[u128; WAYS]>,
}

impl Seen {
    pub(super) fn new() -> Self {
        Self::with_sets(LEAF_SETS, UPPER_SETS)
    }

    fn with_sets(leaves: usize, upper: usize) -> Self {
        Self {
            leaves: vec![[0; WAYS]; leaves],
            upper: vec![[0; WAYS]; upper],
        }
    }

    /// Notes a page in its role; returns whether it was noted before.
    pub(super) fn insert(&mut self, level: usize, id: &ObjectId) -> bool {
        self.touch(level, id, true)
    }

    /// Returns whether a page in its role was noted.
    pub(super) fn contains(&mut self, level: usize, id: &ObjectId) -> bool {
        self.touch(level, id, false)
    }

    fn touch(&mut self, level: usize, id: &ObjectId, insert: bool) -> bool {
        let (half, rest) = halves(id);
        // In another role the same page has other children.
        let role = u128::try_from(level).unwrap_or_default();
        let tag = half.wrapping_add(role.wrapping_mul(1 << 120)).max(1);
        let sets = if level == 0 {
            &mut self.leaves
        } else {
            &mut self.upper
        };
        let len = u64::try_from(sets.len()).unwrap_or(1).max(1);
        let at = usize::try_from(rest.checked_rem(len).unwrap_or_default()).unwrap_or_default();
        let Some(set) = sets.get_mut(at) else {
            return false;
        };
        if set.contains(&tag) {
            return true;
        }
        if insert {
            // The newest comes first and the oldest falls out.
            set.rotate_right(1);
            if let Some(first) = set.first_mut() {
                *first = tag;
            }
        }
        false
    }
}

/// The half that names a page, and a number that chooses its set.
fn halves(id: &ObjectId) -> (u128, u64) {
    let (first, rest) = id.as_bytes().split_at(16);
    let tag = first.first_chunk().copied().map_or(0, u128::from_le_bytes);
    let choice = rest.first_chunk().copied().map_or(0, u64::from_le_bytes);
    (tag, choice)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u64) -> ObjectId {
        ObjectId::from_bytes(blake3::hash(&n.to_le_bytes()).into())
    }

    #[test]
    fn a_page_that_was_not_visited_is_never_called_seen_however_many_were() {
        let mut seen = Seen::with_sets(64, 8);
        for n in 0..10_000 {
            assert!(!seen.insert(0, &id(n)), "{n}");
            assert!(seen.contains(0, &id(n)), "{n} is remembered at first");
            assert!(!seen.contains(1, &id(n)), "{n} in another role");
        }
        let kept = (0..10_000).filter(|n| seen.contains(0, &id(*n))).count();
        assert_eq!(kept, 64 * WAYS, "memory does not grow");
    }
}
