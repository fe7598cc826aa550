//! Walks the trees of all images down to the leaves, and looks every chunk up.
//!
//! Shared subtrees are walked once, as far as a memory of fixed size remembers
//! them. Chunks are looked up in batches sorted by id, so that an index that is
//! larger than memory is read in its own order.

use std::collections::HashSet;

use highwater_model::ObjectId;

use crate::error::{Flaw, RepoError};
use crate::hash::{FAN_OUT, depth};
use crate::index::Place;
use crate::manifest::ImageRoot;
use crate::objects::Objects;
use crate::pack::{PackKind, record_len_max};
use crate::page::{Page, check_bounds};
use crate::verify::Verification;
use crate::verify::findings::{BadObjects, is_damage, last_cause};
use crate::verify::report::{VerifyError, VerifyPhase};
use crate::verify::seen::Seen;
use crate::verify::small::PointInfo;
use crate::wire::{narrow, wide};

/// Chunks looked up at a time: 36 MiB.
const BATCH_MAX: usize = 1 << 20;
/// Copies of one object that are looked at.
const PLACES_MAX: usize = 8;

/// What an image's root says about the places of its chunks.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) size: u64,
    pub(super) chunk: u64,
    pub(super) count: u64,
    pub(super) levels: usize,
}

impl Shape {
    pub(super) fn of(root: &ImageRoot) -> Self {
        Self {
            size: root.size_bytes,
            chunk: root.chunk_bytes.bytes(),
            count: root.chunk_bytes.count(root.size_bytes),
            levels: usize::from(depth(root.size_bytes, root.chunk_bytes)),
        }
    }

    pub(super) const fn of_nothing() -> Self {
        Self {
            size: 0,
            chunk: 0,
            count: 0,
            levels: 0,
        }
    }

    /// Returns how many chunks a page of `level` covers.
    fn span(level: usize) -> u64 {
        let levels = u32::try_from(level).unwrap_or(u32::MAX).saturating_add(1);
        FAN_OUT.saturating_pow(levels)
    }

    /// Returns whether a page ends before the image's last chunk: only then is
    /// what is true of it here true in every image.
    pub(super) fn is_inner(&self, level: usize, number: u64) -> bool {
        let end = number.saturating_add(1).saturating_mul(Self::span(level));
        end < self.count
    }

    /// Returns the bytes that a page covers.
    pub(super) fn range_of_page(&self, level: usize, number: u64) -> (u64, u64) {
        let first = number.saturating_mul(Self::span(level));
        let end = first.saturating_add(Self::span(level));
        (self.offset(first), self.offset(end))
    }

    /// Returns the bytes of a chunk.
    pub(super) fn range_of_chunk(&self, index: u64) -> (u64, u64) {
        (self.offset(index), self.offset(index.saturating_add(1)))
    }

    fn offset(&self, chunk: u64) -> u64 {
        chunk.saturating_mul(self.chunk).min(self.size)
    }

    pub(super) fn chunk_len(&self, index: u64) -> u32 {
        let (start, end) = self.range_of_chunk(index);
        u32::try_from(end.saturating_sub(start)).unwrap_or(u32::MAX)
    }

    /// Returns the top page's place: its level and number.
    pub(super) fn top_level(&self) -> usize {
        self.levels.saturating_sub(1)
    }
}

/// Returns the number of a child.
pub(super) fn child_number(number: u64, slot: usize) -> u64 {
    number.saturating_mul(FAN_OUT).saturating_add(wide(slot))
}

/// Returns the children of a page with their slots.
pub(super) fn children(page: &Page) -> impl Iterator<Item = (usize, ObjectId)> {
    let mut slot = 0;
    std::iter::from_fn(move || {
        let (at, child) = page.next_present(slot)?;
        slot = at.saturating_add(1);
        Some((at, child))
    })
}

/// Reads a page as a reader of the image would.
pub(super) fn read_page(
    objects: &Objects,
    shape: &Shape,
    id: &ObjectId,
    level: usize,
    number: u64,
) -> Result<Page, RepoError> {
    let page = objects.page(id)?;
    check_bounds(&page, level, number, shape.count)
        .map_err(|flaw| RepoError::damaged(format!("read page {id}"), flaw))?;
    Ok(page)
}

/// What a walk has found.
#[derive(Default)]
pub(super) struct Walked {
    pub(super) bad: BadObjects,
    /// Packs in which something lies that the points need.
    pub(super) used: HashSet<[u8; 32]>,
}

struct Walk<'v, 'a> {
    verification: &'v mut Verification<'a>,
    objects: &'a Objects,
    seen: Seen,
    batch: Vec<(ObjectId, u32)>,
    walked: Walked,
    images_done: u64,
    images: u64,
}

impl<'a> Verification<'a> {
    /// Walks all images of these points.
    pub(super) fn walk(
        &mut self,
        objects: &'a Objects,
        points: &[PointInfo],
    ) -> Result<Walked, VerifyError> {
        let images = points.iter().map(|point| wide(point.images.len()));
        let images = images.fold(0, u64::saturating_add);
        let mut walk = Walk {
            verification: self,
            objects,
            seen: Seen::new(),
            batch: Vec::new(),
            walked: Walked::default(),
            images_done: 0,
            images,
        };
        for image in points.iter().flat_map(|point| &point.images) {
            let shape = Shape::of(&image.root);
            if let Some(top) = &image.root.top {
                walk.visit(&shape, top, shape.top_level(), 0)?;
            }
            walk.images_done = walk.images_done.saturating_add(1);
            walk.tell()?;
        }
        walk.look_up()?;
        Ok(walk.walked)
    }
}

impl Walk<'_, '_> {
    fn tell(&self) -> Result<(), VerifyError> {
        self.verification
            .tell(VerifyPhase::Trees, self.images_done, self.images)
    }

    /// Goes down as many levels as a tree can have, eight at most.
    fn visit(
        &mut self,
        shape: &Shape,
        id: &ObjectId,
        level: usize,
        number: u64,
    ) -> Result<(), VerifyError> {
        if shape.is_inner(level, number) && self.seen.insert(level, id) {
            return Ok(());
        }
        let page = match read_page(self.objects, shape, id, level, number) {
            Ok(page) => page,
            Err(error) if is_damage(&error) => return self.note_page(id, &error),
            Err(error) => return Err(error.into()),
        };
        if let Some(place) = self.find(id)? {
            self.walked.used.insert(place.pack_id);
        }
        let checked = &mut self.verification.checked;
        checked.pages = checked.pages.saturating_add(1);
        if checked.pages.is_multiple_of(1024) {
            self.tell()?;
        }
        for (slot, child) in children(&page) {
            let number = child_number(number, slot);
            match level.checked_sub(1) {
                Some(below) => self.visit(shape, &child, below, number)?,
                None => self.want(child, shape.chunk_len(number))?,
            }
        }
        Ok(())
    }

    fn note_page(&mut self, id: &ObjectId, error: &RepoError) -> Result<(), VerifyError> {
        let finding = self.find(id)?.map(|place| {
            let what = format!("page {id} in it cannot be read: {}", last_cause(error));
            self.verification.findings.note(&place.pack(), what)
        });
        self.walked.bad.insert(*id, finding);
        Ok(())
    }

    fn want(&mut self, id: ObjectId, expected: u32) -> Result<(), VerifyError> {
        self.batch.push((id, expected));
        if self.batch.len() < BATCH_MAX {
            return Ok(());
        }
        self.look_up()
    }

    /// Looks the chunks of the batch up.
    fn look_up(&mut self) -> Result<(), VerifyError> {
        let mut batch = std::mem::take(&mut self.batch);
        batch.sort_unstable();
        batch.dedup();
        let checked = &mut self.verification.checked;
        checked.chunks = checked.chunks.saturating_add(wide(batch.len()));
        let mut refreshed = false;
        for (at, (id, expected)) in batch.iter().enumerate() {
            if at.is_multiple_of(1 << 16) {
                self.tell()?;
            }
            let mut place = self.find(id)?;
            if place.is_none() && !refreshed {
                // Another process may have written it since, or merged index
                // files; once is enough, for the points were listed before.
                refreshed = true;
                self.objects.index.refresh()?;
                place = self.find(id)?;
            }
            match place {
                None => self.walked.bad.insert(*id, None),
                Some(place) => self.judge(place, id, *expected)?,
            }
        }
        batch.clear();
        self.batch = batch;
        Ok(())
    }

    fn judge(&mut self, first: Place, id: &ObjectId, expected: u32) -> Result<(), VerifyError> {
        let Err(flaw) = self.fits(&first, expected) else {
            self.walked.used.insert(first.pack_id);
            return Ok(());
        };
        let others = self.objects.index.places(id, PLACES_MAX)?;
        for place in others {
            if self.fits(&place, expected).is_ok() {
                self.walked.used.insert(place.pack_id);
                return Ok(());
            }
        }
        let what = format!("chunk {id} in it cannot be used: {flaw}");
        let finding = self.verification.findings.note(&first.pack(), what);
        self.walked.bad.insert_wrong_len(*id, expected, finding);
        Ok(())
    }

    /// Checks of a place what reading it would refuse.
    fn fits(&self, place: &Place, expected: u32) -> Result<(), Flaw> {
        let record = place.record;
        let end = u64::from(record.offset).saturating_add(record.record_len.into());
        let longest = record_len_max(self.objects.config.chunk_size.len());
        if place.kind != PackKind::Chunks {
            return Err(Flaw("it lies in a pack of the other kind"));
        }
        if record.plain_len != expected {
            return Err(Flaw("its length is not what its place in an image demands"));
        }
        if end > place.pack_len || narrow(record.record_len.into())? > longest {
            return Err(Flaw("the index shows an impossible place"));
        }
        Ok(())
    }

    /// Looks an object up; a bad sector under the index is no reason to end.
    fn find(&self, id: &ObjectId) -> Result<Option<Place>, VerifyError> {
        match self.objects.index.find(id) {
            Ok(place) => Ok(place),
            Err(error) if is_damage(&error) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}
