//! Builds the tree of an image on top of its parent's.
//!
//! Chunks are set in ascending order, so one open page per level is enough: a
//! page is closed when the next chunk lies beyond it. Pages nobody visits are
//! shared with the parent by their ids. Equal images get equal roots whatever
//! their history, because a page depends on its children only.

use highwater_model::{ChunkSize, ObjectId};

use crate::error::{Flaw, RepoError};
use crate::hash::depth;
use crate::manifest::ImageRoot;
use crate::objects::Objects;
use crate::pack::PackKind;
use crate::page::{PAGE_LEN_MAX, Page, check_bounds, page_number, slot_of};
use crate::wire::narrow;
use crate::writer::Writer;

/// Builds one tree; see [`Writer::tree`].
pub struct TreeBuilder<'a> {
    writer: &'a Writer,
    size_bytes: u64,
    chunk_size: ChunkSize,
    parent: Option<ImageRoot>,
    /// The open page of each level, the leaf first. Open levels are the upper
    /// ones: a page is opened below an open page only.
    levels: Vec<Option<OpenPage>>,
    top: Option<ObjectId>,
    next: u64,
    /// The parent's last chunk, if it was short and the image has grown: its
    /// content is longer now, with zeroes at its end.
    grown_chunk: Option<u64>,
    bytes: Vec<u8>,
    /// An error left the tree half changed: it can no longer be finished.
    is_broken: bool,
}

struct OpenPage {
    number: u64,
    page: Page,
    /// The page's id as long as it is unchanged.
    unchanged: Option<ObjectId>,
}

impl<'a> TreeBuilder<'a> {
    pub(crate) fn new(
        writer: &'a Writer,
        parent: Option<&ImageRoot>,
        size_bytes: u64,
    ) -> Result<Self, RepoError> {
        let objects = &writer.session.objects;
        let chunk_size = objects.config.chunk_size;
        if let Some(parent) = parent {
            check_parent(objects, parent, size_bytes)?;
        }
        let levels = usize::from(depth(size_bytes, chunk_size));
        let parent = parent.copied();
        let mut tree = Self {
            writer,
            size_bytes,
            chunk_size,
            parent,
            levels: (0..levels).map(|_| None).collect(),
            top: None,
            next: 0,
            grown_chunk: parent.and_then(|parent| grown_chunk(&parent, size_bytes)),
            bytes: Vec::with_capacity(PAGE_LEN_MAX),
            is_broken: false,
        };
        tree.put_parent_under_new_levels();
        Ok(tree)
    }

    /// Sets the content of a chunk; `None` is all zero. Indices must ascend.
    pub fn set(&mut self, chunk_index: u64, id: Option<ObjectId>) -> Result<(), RepoError> {
        if chunk_index < self.next || chunk_index >= self.chunk_size.count(self.size_bytes) {
            let why = format!(
                "chunk {chunk_index} of {} comes after chunk {}",
                self.chunk_size.count(self.size_bytes),
                self.next.saturating_sub(1)
            );
            return Err(RepoError::usage("build a tree", why));
        }
        let outcome = self.try_set(chunk_index, id);
        self.is_broken |= outcome.is_err();
        outcome
    }

    fn try_set(&mut self, chunk_index: u64, id: Option<ObjectId>) -> Result<(), RepoError> {
        match self.grown_chunk {
            Some(grown) if grown < chunk_index => self.lengthen(grown)?,
            Some(grown) if grown == chunk_index => self.grown_chunk = None,
            _ => {}
        }
        self.replace(chunk_index, id)
    }

    /// Closes the tree; returns its root. Its pages are durable when
    /// [`Writer::flush`] has returned.
    pub fn finish(mut self) -> Result<ImageRoot, RepoError> {
        if self.is_broken {
            return Err(RepoError::usage(
                "build a tree",
                "an earlier call has failed",
            ));
        }
        if let Some(grown) = self.grown_chunk {
            self.lengthen(grown)?;
        }
        let untouched = self.levels.last().is_none_or(Option::is_none);
        let same_depth = self
            .parent
            .filter(|parent| self.depth_of(parent) == self.levels.len());
        if untouched {
            self.top = same_depth.and_then(|parent| parent.top);
        }
        for level in 0..self.levels.len() {
            self.close(level)?;
        }
        let objects = &self.writer.session.objects;
        Ok(objects.ids.root(self.size_bytes, self.chunk_size, self.top))
    }

    fn depth_of(&self, root: &ImageRoot) -> usize {
        usize::from(depth(root.size_bytes, self.chunk_size))
    }

    /// A grown image may need more levels: the parent's tree becomes the first
    /// child of the first page of each.
    fn put_parent_under_new_levels(&mut self) {
        let Some(parent) = self.parent else { return };
        let old_depth = self.depth_of(&parent);
        if parent.top.is_none() || old_depth == self.levels.len() {
            return;
        }
        for (level, slot) in self.levels.iter_mut().enumerate().skip(old_depth) {
            let mut page = Page::EMPTY;
            if level == old_depth {
                page.set(0, parent.top);
            }
            *slot = Some(OpenPage {
                number: 0,
                page,
                unchanged: None,
            });
        }
    }

    /// Gives the parent's short last chunk its new length.
    fn lengthen(&mut self, index: u64) -> Result<(), RepoError> {
        self.grown_chunk = None;
        let Some(id) = self.open_leaf(index)?.page.child(slot_of(index)) else {
            return Ok(());
        };
        let start = index.saturating_mul(self.chunk_size.bytes());
        let len = self
            .size_bytes
            .saturating_sub(start)
            .min(self.chunk_size.bytes());
        let objects = &self.writer.session.objects;
        let mut chunk = objects.object(PackKind::Chunks, &id)?;
        chunk.resize(narrow(len).unwrap_or_default(), 0);
        let added = self.writer.lane().add(&chunk)?;
        self.replace(index, added.id)
    }

    fn replace(&mut self, index: u64, id: Option<ObjectId>) -> Result<(), RepoError> {
        self.next = index.saturating_add(1);
        let leaf = self.open_leaf(index)?;
        leaf.set(slot_of(index), id);
        Ok(())
    }

    /// Opens the leaf of a chunk and closes what lies before it.
    fn open_leaf(&mut self, index: u64) -> Result<&mut OpenPage, RepoError> {
        for level in 0..self.levels.len() {
            let wanted = page_number(index, level);
            let open = self.levels.get(level).and_then(Option::as_ref);
            if open.is_some_and(|open| open.number != wanted) {
                self.close(level)?;
            }
        }
        for level in (0..self.levels.len()).rev() {
            if self.levels.get(level).is_some_and(Option::is_none) {
                let page = self.load(level, page_number(index, level))?;
                if let Some(slot) = self.levels.get_mut(level) {
                    *slot = Some(page);
                }
            }
        }
        let leaf = self.levels.first_mut().and_then(Option::as_mut);
        Ok(leaf.expect("an image with a chunk has a leaf, and all levels are open"))
    }

    /// Reads a page of the parent, or starts an empty one.
    fn load(&self, level: usize, number: u64) -> Result<OpenPage, RepoError> {
        let above = self.levels.get(level.saturating_add(1));
        let id = match above {
            Some(above) => above
                .as_ref()
                .and_then(|above| above.page.child(slot_of(number))),
            // The top: shared with a parent of the same depth.
            None => self
                .parent
                .filter(|parent| self.depth_of(parent) == self.levels.len())
                .and_then(|parent| parent.top),
        };
        let Some(id) = id else {
            return Ok(OpenPage {
                number,
                page: Page::EMPTY,
                unchanged: None,
            });
        };
        let page = self.writer.session.objects.page(&id)?;
        let chunks = self
            .parent
            .map_or(0, |parent| self.chunk_size.count(parent.size_bytes));
        check_bounds(&page, level, number, chunks)
            .map_err(|flaw| RepoError::damaged(format!("read page {id}"), flaw))?;
        Ok(OpenPage {
            number,
            page,
            unchanged: Some(id),
        })
    }

    /// Stores the open page of a level if it has changed, and enters its id in
    /// the page above.
    fn close(&mut self, level: usize) -> Result<(), RepoError> {
        let Some(open) = self.levels.get_mut(level).and_then(Option::take) else {
            return Ok(());
        };
        let id = match open.unchanged {
            Some(id) => Some(id),
            None if open.page.is_empty() => None,
            None => {
                open.page.encode(&mut self.bytes);
                Some(self.writer.add_page(&self.bytes)?)
            }
        };
        match self.levels.get_mut(level.saturating_add(1)) {
            Some(above) => above
                .as_mut()
                .expect("a page is open below an open page only")
                .set(slot_of(open.number), id),
            None => self.top = id,
        }
        Ok(())
    }
}

impl OpenPage {
    fn set(&mut self, slot: usize, child: Option<ObjectId>) {
        if self.page.child(slot) != child {
            self.page.set(slot, child);
            self.unchanged = None;
        }
    }
}

fn check_parent(objects: &Objects, parent: &ImageRoot, size_bytes: u64) -> Result<(), RepoError> {
    let what = "build a tree on its parent";
    if !objects.ids.proves(parent) {
        return Err(RepoError::damaged(
            what,
            Flaw("the parent's root hash does not match"),
        ));
    }
    if parent.chunk_bytes != objects.config.chunk_size {
        return Err(RepoError::usage(what, "the parent has another chunk size"));
    }
    if parent.size_bytes > size_bytes {
        return Err(RepoError::usage(what, "the parent is larger"));
    }
    Ok(())
}

fn grown_chunk(parent: &ImageRoot, size_bytes: u64) -> Option<u64> {
    let chunk = parent.chunk_bytes.bytes();
    let is_short = !parent.size_bytes.is_multiple_of(chunk);
    let last = parent
        .chunk_bytes
        .count(parent.size_bytes)
        .saturating_sub(1);
    (is_short && size_bytes > parent.size_bytes).then_some(last)
}
