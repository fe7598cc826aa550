//! A tree page: up to 64 children, the absent ones all zero.
//!
//! ```text
//! presence bitmap u64 | id of each present child (32), in order
//! ```

use highwater_model::ObjectId;

use crate::error::Flaw;
use crate::hash::FAN_OUT;
use crate::wire::{Reader, narrow};

/// Slots of a page; [`FAN_OUT`](crate::hash::FAN_OUT) as a length.
pub(crate) const SLOTS: usize = 64;
/// A page with all children.
pub(crate) const PAGE_LEN_MAX: usize = 8 + SLOTS * 32;

/// The children of one page.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Page {
    slots: [Option<ObjectId>; SLOTS],
}

impl Page {
    pub(crate) const EMPTY: Self = Self {
        slots: [None; SLOTS],
    };

    pub(crate) fn child(&self, slot: usize) -> Option<ObjectId> {
        self.slots.get(slot).copied().flatten()
    }

    pub(crate) fn set(&mut self, slot: usize, child: Option<ObjectId>) {
        *self
            .slots
            .get_mut(slot)
            .expect("slots are numbered below 64") = child;
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.slots.iter().all(Option::is_none)
    }

    /// Returns the first present slot at or after `slot`.
    pub(crate) fn next_present(&self, slot: usize) -> Option<(usize, ObjectId)> {
        self.slots
            .iter()
            .enumerate()
            .skip(slot)
            .find_map(|(at, child)| Some((at, (*child)?)))
    }

    /// Writes the page to `into`, replacing what is there.
    pub(crate) fn encode(&self, into: &mut Vec<u8>) {
        let bit = |(slot, child): (usize, &Option<ObjectId>)| {
            u64::from(child.is_some()) << (slot % SLOTS)
        };
        let bitmap: u64 = self
            .slots
            .iter()
            .enumerate()
            .map(bit)
            .fold(0, |all, bit| all | bit);
        into.clear();
        into.extend_from_slice(&bitmap.to_le_bytes());
        self.slots
            .iter()
            .flatten()
            .for_each(|id| into.extend_from_slice(id.as_bytes()));
    }

    /// Reads a page; one without children is refused, since it is never stored.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Flaw> {
        let mut reader = Reader::new(bytes);
        let bitmap = reader.u64()?;
        if bitmap == 0 {
            return Err(Flaw("it has no children"));
        }
        let mut page = Self::EMPTY;
        for (slot, child) in page.slots.iter_mut().enumerate() {
            if bitmap >> (slot % SLOTS) & 1 == 1 {
                *child = Some(ObjectId::from_bytes(reader.array()?));
            }
        }
        reader.end()?;
        Ok(page)
    }
}

/// Returns the number, in its level, of the page that covers a chunk.
pub(crate) fn page_number(chunk_index: u64, level: usize) -> u64 {
    (0..=level).fold(chunk_index, |number, _| number / FAN_OUT)
}

/// Returns the slot that a child has in its page.
pub(crate) fn slot_of(number: u64) -> usize {
    narrow(number % FAN_OUT).unwrap_or_default()
}

/// Refuses a page with children beyond the image's end.
pub(crate) fn check_bounds(
    page: &Page,
    level: usize,
    number: u64,
    chunks: u64,
) -> Result<(), Flaw> {
    let children = (0..level).fold(chunks, |count, _| count.div_ceil(FAN_OUT));
    let allowed = children.saturating_sub(number.saturating_mul(FAN_OUT));
    let first_beyond = narrow(allowed.min(FAN_OUT))?;
    match page.next_present(first_beyond) {
        None => Ok(()),
        Some(_) => Err(Flaw("it has children beyond the end of the image")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_of_a_page_never_change() {
        let mut page = Page::EMPTY;
        page.set(0, Some(ObjectId::from_bytes([1; 32])));
        page.set(63, Some(ObjectId::from_bytes([2; 32])));
        let mut bytes = Vec::new();
        page.encode(&mut bytes);
        let wanted = [&[1, 0, 0, 0, 0, 0, 0, 0x80][..], &[1; 32], &[2; 32]].concat();
        assert_eq!(bytes, wanted);
        assert!(Page::decode(&bytes).unwrap() == page);
    }

    #[test]
    fn a_page_of_the_wrong_length_or_without_children_is_refused() {
        let mut page = Page::EMPTY;
        page.set(5, Some(ObjectId::from_bytes([1; 32])));
        let mut bytes = Vec::new();
        page.encode(&mut bytes);
        assert!(Page::decode(&bytes[..39]).is_err());
        assert!(Page::decode(&[&bytes[..], &[0]].concat()).is_err());
        assert!(Page::decode(&[0; 8]).is_err());
        assert!(Page::decode(&[]).is_err());
    }
}
