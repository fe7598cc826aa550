//! Which bytes of a read have arrived: each exactly once, or the reply is wrong.

use std::ops::Range;

use highwater_model::ByteRange;

use super::Fragments;
use crate::error::ProtocolError;

/// Most separate pieces kept track of. Servers send chunks in order, so that
/// one piece grows; only a hostile one scatters them.
const PIECES_MAX: usize = 4096;

/// The coverage of one read.
#[derive(Debug)]
pub(super) struct Assembly {
    range: ByteRange,
    fragments: Fragments,
    chunks: u64,
    /// Sorted, apart from each other, never empty.
    pieces: Vec<ByteRange>,
}

impl Assembly {
    pub(super) const fn new(range: ByteRange, fragments: Fragments) -> Self {
        Self {
            range,
            fragments,
            chunks: 0,
            pieces: Vec::new(),
        }
    }

    /// Claims the `len` bytes at `offset` for a content chunk and returns
    /// where in the request's buffer they belong.
    pub(super) fn claim(&mut self, offset: u64, len: u64) -> Result<Range<usize>, ProtocolError> {
        let piece = ByteRange::new(offset, len).ok_or(ProtocolError::OutsideTheRequest)?;
        if piece.is_empty() || piece.intersection(self.range) != Some(piece) {
            return Err(ProtocolError::OutsideTheRequest);
        }
        self.chunks = self.chunks.saturating_add(1);
        if self.fragments == Fragments::Forbidden && self.chunks > 1 {
            return Err(ProtocolError::Fragmented);
        }
        self.insert(piece)?;
        let index = |at: u64| {
            let within = at.saturating_sub(self.range.start());
            usize::try_from(within).map_err(|_| ProtocolError::OutsideTheRequest)
        };
        Ok(index(piece.start())?..index(piece.end())?)
    }

    /// Adds a piece, growing its neighbours where they touch.
    fn insert(&mut self, piece: ByteRange) -> Result<(), ProtocolError> {
        let at = self
            .pieces
            .partition_point(|earlier| earlier.end() <= piece.start());
        if let Some(next) = self.pieces.get(at)
            && next.start() < piece.end()
        {
            return Err(ProtocolError::Overlap(piece.start().max(next.start())));
        }
        let before = at.checked_sub(1);
        let left = before.and_then(|before| self.pieces.get(before)).copied();
        let left = left.filter(|left| left.end() == piece.start());
        let right = self
            .pieces
            .get(at)
            .copied()
            .filter(|right| right.start() == piece.end());
        let start = left.map_or(piece.start(), ByteRange::start);
        let end = right.map_or(piece.end(), ByteRange::end);
        let joined = ByteRange::between(start, end).ok_or(ProtocolError::OutsideTheRequest)?;
        let from = if left.is_some() {
            before.unwrap_or(at)
        } else {
            at
        };
        let to = at.saturating_add(usize::from(right.is_some()));
        self.pieces.splice(from..to, [joined]);
        if self.pieces.len() > PIECES_MAX {
            return Err(ProtocolError::TooManyPieces(PIECES_MAX));
        }
        Ok(())
    }

    /// Checks that each byte of the request has arrived.
    pub(super) fn check_whole(&self) -> Result<(), ProtocolError> {
        if self.pieces.as_slice() == [self.range] {
            return Ok(());
        }
        let covered = self
            .pieces
            .iter()
            .fold(0, |sum: u64, piece| sum.saturating_add(piece.len()));
        Err(ProtocolError::Gap {
            asked: self.range.len(),
            covered,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn assembly() -> Assembly {
        Assembly::new(ByteRange::between(100, 164).unwrap(), Fragments::Allowed)
    }

    proptest! {
        #[test]
        fn bytes_are_claimed_exactly_once_as_a_list_of_bytes_says(
            chunks in proptest::collection::vec((90_usize..170, 0_usize..40), 0..40),
        ) {
            let mut assembly = assembly();
            let mut claimed = [false; 64];
            for (offset, len) in chunks {
                let place = (offset >= 100 && len > 0 && offset + len <= 164)
                    .then(|| offset - 100..offset + len - 100);
                let free = place.filter(|place| !claimed[place.clone()].contains(&true));
                prop_assert_eq!(assembly.claim(offset as u64, len as u64).ok(), free.clone());
                free.into_iter().flatten().for_each(|at| claimed[at] = true);
                prop_assert_eq!(assembly.check_whole().is_ok(), !claimed.contains(&false));
            }
        }

        #[test]
        fn a_read_cut_anywhere_and_shuffled_is_whole_only_with_its_last_piece(
            order in Just((0..32_u64).collect::<Vec<_>>()).prop_shuffle(),
        ) {
            let mut assembly = assembly();
            for at in order {
                prop_assert!(assembly.check_whole().is_err());
                assembly.claim(100 + 2 * at, 2).unwrap();
            }
            prop_assert!(assembly.check_whole().is_ok());
            prop_assert_eq!(assembly.pieces.len(), 1);
        }
    }
}
