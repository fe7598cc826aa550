//! Reads the tree of an image: which chunk has which content.

use std::sync::Arc;

use highwater_model::ObjectId;

use crate::error::{RepoError, RepoErrorKind};
use crate::hash::{FAN_OUT, depth};
use crate::manifest::ImageRoot;
use crate::objects::Objects;
use crate::page::{Page, SLOTS, check_bounds, page_number, slot_of};
use crate::wire::{narrow, wide};

/// An image whose root was proven; its pages are proven as they are read.
pub struct ImageReader {
    objects: Arc<Objects>,
    root: ImageRoot,
}

impl ImageReader {
    pub(crate) fn new(objects: Arc<Objects>, root: &ImageRoot) -> Result<Self, RepoError> {
        if objects.ids.proves(root) {
            return Ok(Self {
                objects,
                root: *root,
            });
        }
        let error = RepoError::new(RepoErrorKind::Damaged, format!("read image {}", root.hash));
        Err(error.because("size, chunk size or top page are not those of its root hash"))
    }

    /// Returns what proves the image.
    pub fn root(&self) -> &ImageRoot {
        &self.root
    }

    /// Returns the length of a chunk; only the last may be short. A chunk with
    /// another length is damage, whatever its id says.
    pub fn chunk_len(&self, chunk_index: u64) -> usize {
        let size = self.root.chunk_bytes.bytes();
        let start = chunk_index.saturating_mul(size);
        narrow(self.root.size_bytes.saturating_sub(start).min(size)).unwrap_or_default()
    }

    /// Returns the present chunks in ascending order; absent ones are zero.
    pub fn chunks(&self) -> Chunks<'_> {
        self.from(0)
    }

    /// Returns the present chunks at or after `chunk_index`.
    pub fn from(&self, chunk_index: u64) -> Chunks<'_> {
        Chunks {
            image: self,
            path: Vec::new(),
            next: chunk_index,
            state: State::Start,
        }
    }

    /// Returns the id of one chunk; `None` is all zero.
    pub fn chunk(&self, chunk_index: u64) -> Result<Option<ObjectId>, RepoError> {
        if chunk_index >= self.count() {
            return Err(RepoError::usage(
                "read a chunk",
                "it lies beyond the end of the image",
            ));
        }
        let mut id = self.root.top;
        for level in (0..self.levels()).rev() {
            let Some(page) = id else { return Ok(None) };
            let number = page_number(chunk_index, level);
            let child = if level == 0 {
                chunk_index
            } else {
                page_number(chunk_index, level.saturating_sub(1))
            };
            id = self.page(&page, level, number)?.child(slot_of(child));
        }
        Ok(id)
    }

    /// Returns the last present chunk before `chunk_index`. Reads at most twice
    /// as many pages as the tree has levels.
    pub fn last_before(&self, chunk_index: u64) -> Result<Option<u64>, RepoError> {
        let last = chunk_index.min(self.count()).checked_sub(1);
        let (Some(last), Some(top), Some(level)) =
            (last, self.root.top, self.levels().checked_sub(1))
        else {
            return Ok(None);
        };
        self.last_in(&top, level, 0, last)
    }

    /// Returns the last present chunk of a page at or before `last`.
    fn last_in(
        &self,
        id: &ObjectId,
        level: usize,
        number: u64,
        last: u64,
    ) -> Result<Option<u64>, RepoError> {
        let page = self.page(id, level, number)?;
        let below = level.checked_sub(1);
        // Only the page on the way to `last` has slots beyond it.
        let highest = if page_number(last, level) == number {
            slot_of(below.map_or(last, |below| page_number(last, below)))
        } else {
            SLOTS.saturating_sub(1)
        };
        for slot in (0..=highest).rev() {
            let Some(child) = page.child(slot) else {
                continue;
            };
            let number = number.saturating_mul(FAN_OUT).saturating_add(wide(slot));
            let Some(below) = below else {
                return Ok(Some(number));
            };
            // A page is never empty, so at most the first child has nothing.
            if let Some(found) = self.last_in(&child, below, number, last)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    fn levels(&self) -> usize {
        usize::from(depth(self.root.size_bytes, self.root.chunk_bytes))
    }

    fn count(&self) -> u64 {
        self.root.chunk_bytes.count(self.root.size_bytes)
    }

    fn page(&self, id: &ObjectId, level: usize, number: u64) -> Result<Page, RepoError> {
        let page = self.objects.page(id)?;
        check_bounds(&page, level, number, self.count())
            .map_err(|flaw| RepoError::damaged(format!("read page {id}"), flaw))?;
        Ok(page)
    }
}

/// Walks over the present chunks with one page per level in memory. Ends after
/// the first error.
pub struct Chunks<'a> {
    image: &'a ImageReader,
    /// From the top down to the leaf: each page with its number and the slot
    /// to look at next.
    path: Vec<Step>,
    next: u64,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Start,
    Going,
    Ended,
}

struct Step {
    page: Page,
    number: u64,
    slot: usize,
}

impl Chunks<'_> {
    fn step(&mut self) -> Result<Option<(u64, ObjectId)>, RepoError> {
        if self.state == State::Start {
            self.state = State::Going;
            if let Some(top) = self
                .image
                .root
                .top
                .filter(|_| self.next < self.image.count())
            {
                self.descend(top, 0)?;
            }
        }
        while let Some(step) = self.path.last_mut() {
            let Some((slot, child)) = step.page.next_present(step.slot) else {
                self.path.pop();
                continue;
            };
            step.slot = slot.saturating_add(1);
            let number = step
                .number
                .saturating_mul(FAN_OUT)
                .saturating_add(wide(slot));
            if self.path.len() == self.image.levels() {
                return Ok(Some((number, child)));
            }
            self.descend(child, number)?;
        }
        Ok(None)
    }

    /// Enters a page at the first slot that lies at or after `next`.
    fn descend(&mut self, id: ObjectId, number: u64) -> Result<(), RepoError> {
        let level = self
            .image
            .levels()
            .saturating_sub(self.path.len())
            .saturating_sub(1);
        let page = self.image.page(&id, level, number)?;
        let is_on_the_way = page_number(self.next, level) == number;
        let wanted = match level.checked_sub(1) {
            Some(below) => page_number(self.next, below),
            None => self.next,
        };
        let slot = if is_on_the_way { slot_of(wanted) } else { 0 };
        self.path.push(Step { page, number, slot });
        Ok(())
    }
}

impl Iterator for Chunks<'_> {
    type Item = Result<(u64, ObjectId), RepoError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.state == State::Ended {
            return None;
        }
        let item = self.step().transpose();
        if !matches!(item, Some(Ok(_))) {
            self.state = State::Ended;
        }
        item
    }
}
