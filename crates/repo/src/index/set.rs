//! All index files of a repository together.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use highwater_model::ObjectId;
use highwater_store::{Listed, ObjectKey, ObjectKind, Store, StoreErrorKind};

use crate::error::{Flaw, RepoError, RepoErrorKind};
use crate::index::cache::BlockCache;
use crate::index::file::{IndexFile, LoadError, pack_key};
use crate::pack::{PackKind, RecordPlace};

/// Where an object lies.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) pack_id: [u8; 32],
    pub(crate) pack_len: u64,
    pub(crate) kind: PackKind,
    pub(crate) record: RecordPlace,
}

impl Place {
    pub(crate) fn pack(&self) -> ObjectKey {
        pack_key(&self.pack_id)
    }
}

/// An index file that is not what was written.
#[derive(Debug, Clone)]
pub(crate) struct DamagedFile {
    pub(crate) name: String,
    pub(crate) flaw: Flaw,
}

/// Searches all index files.
///
/// In memory are only their tables: 1.35 bytes per object (a filter of 10 bits and
/// a share of the block table), 49 per pack, and a block cache of 16 MiB.
pub(crate) struct IndexSet {
    store: Arc<dyn Store>,
    files: RwLock<Arc<Vec<Arc<IndexFile>>>>,
    /// Held while the list of files changes, so that no change is lost.
    changing: Mutex<()>,
    damaged: Mutex<Vec<DamagedFile>>,
    cache: BlockCache,
}

impl IndexSet {
    /// Loads what the store lists.
    pub(crate) fn load(store: Arc<dyn Store>) -> Result<Self, RepoError> {
        let set = Self {
            store,
            files: RwLock::default(),
            changing: Mutex::default(),
            damaged: Mutex::default(),
            cache: BlockCache::new(),
        };
        set.refresh()?;
        Ok(set)
    }

    /// Looks for index files that have come since; returns whether there were.
    pub(crate) fn refresh(&self) -> Result<bool, RepoError> {
        let what = "read the index";
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut files = self.files().as_ref().clone();
        let known: HashSet<ObjectKey> = files.iter().map(|file| file.key().clone()).collect();
        let listed = self.store.list(ObjectKind::Index, "");
        let mut found = false;
        for listed in listed.map_err(|error| RepoError::store(what, error))? {
            if known.contains(&listed.key) || self.is_damaged(listed.key.name()) {
                continue;
            }
            match IndexFile::load(self.store.as_ref(), &listed) {
                Ok(file) => {
                    found = true;
                    files.push(Arc::new(file));
                }
                Err(LoadError::Damaged(flaw)) => self.note_damage(&listed.key, flaw),
                // Merged into another one and deleted since it was listed.
                Err(LoadError::Store(error)) if error.kind() == StoreErrorKind::NotFound => {}
                Err(LoadError::Store(error)) => return Err(RepoError::store(what, error)),
            }
        }
        // Only files that could be read replace others.
        let superseded: HashSet<String> = files.iter().flat_map(|file| file.supersedes()).collect();
        files.retain(|file| !superseded.contains(file.key().name()));
        self.replace(files);
        Ok(found)
    }

    /// Adds a file that this process has just written, whose packs it has
    /// written before.
    pub(crate) fn add_own(&self, listed: &Listed) -> Result<(), RepoError> {
        let what = "read back an index file";
        let file = match IndexFile::load(self.store.as_ref(), listed) {
            Ok(file) => file,
            Err(LoadError::Damaged(flaw)) => return Err(RepoError::damaged(what, flaw)),
            Err(LoadError::Store(error)) => return Err(RepoError::needed(what, error)),
        };
        file.trust_packs();
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut files = self.files().as_ref().clone();
        files.push(Arc::new(file));
        self.replace(files);
        Ok(())
    }

    /// Returns a place of the object whose pack exists, or `None`. Damage in an
    /// index only makes objects unknown: they are stored once more.
    pub(crate) fn find(&self, id: &ObjectId) -> Result<Option<Place>, RepoError> {
        self.places(id, 1).map(|mut places| places.pop())
    }

    /// Returns up to `max` places of an object.
    pub(crate) fn places(&self, id: &ObjectId, max: usize) -> Result<Vec<Place>, RepoError> {
        let mut places = Vec::new();
        for file in self.files().iter() {
            if places.len() >= max {
                break;
            }
            let row = match file.find(self.store.as_ref(), &self.cache, id) {
                Ok(row) => row,
                Err(LoadError::Damaged(flaw)) => {
                    self.note_damage(file.key(), flaw);
                    None
                }
                Err(LoadError::Store(error)) => {
                    return Err(RepoError::store("read the index", error));
                }
            };
            let Some(row) = row else { continue };
            if let Some(pack) = file.pack_there(self.store.as_ref(), row.pack_no)? {
                places.push(Place {
                    pack_id: pack.id,
                    pack_len: pack.len,
                    kind: pack.kind,
                    record: row.place,
                });
            }
        }
        Ok(places)
    }

    /// Returns a place of an object that something refers to.
    pub(crate) fn need(&self, id: &ObjectId) -> Result<Place, RepoError> {
        if let Some(place) = self.find(id)? {
            return Ok(place);
        }
        // Another process may have stored it since.
        if self.refresh()?
            && let Some(place) = self.find(id)?
        {
            return Ok(place);
        }
        let why = match self.damaged().first() {
            Some(file) => format!("index file `{}` is damaged: {}", file.name, file.flaw),
            None => "no pack that exists holds it".to_owned(),
        };
        Err(RepoError::new(RepoErrorKind::Damaged, format!("find object {id}")).because(why))
    }

    /// Returns the packs that all files tell of; one may come several times.
    pub(crate) fn packs(&self) -> Vec<([u8; 32], PackKind)> {
        let files = self.files();
        let packs = files.iter().flat_map(|file| file.packs());
        packs.map(|pack| (pack.id, pack.kind)).collect()
    }

    /// Shows the rows of at most about `blocks_max` blocks, evenly spread over
    /// all files. Returns whether those are all rows.
    pub(crate) fn sample(
        &self,
        blocks_max: u64,
        show: &mut dyn FnMut(PackKind, &RecordPlace),
    ) -> Result<bool, RepoError> {
        let files = self.files();
        let blocks = files.iter().map(|file| file.blocks());
        let all = blocks.fold(0, u64::saturating_add);
        let step = all.div_ceil(blocks_max.max(1)).max(1);
        let mut at = 0_u64;
        for file in files.iter() {
            for block in 0..file.blocks() {
                let is_next = at.is_multiple_of(step);
                at = at.saturating_add(1);
                if !is_next {
                    continue;
                }
                let rows = match file.rows(self.store.as_ref(), block) {
                    Ok(rows) => rows,
                    Err(LoadError::Damaged(flaw)) => {
                        self.note_damage(file.key(), flaw);
                        continue;
                    }
                    Err(LoadError::Store(error)) => {
                        return Err(RepoError::store("read the index", error));
                    }
                };
                for row in rows {
                    let pack = usize::try_from(row.pack_no).unwrap_or(usize::MAX);
                    if let Some(pack) = file.packs().get(pack) {
                        show(pack.kind, &row.place);
                    }
                }
            }
        }
        Ok(step == 1)
    }

    /// Returns the files that cannot be used.
    pub(crate) fn damaged(&self) -> Vec<DamagedFile> {
        self.damaged
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn is_damaged(&self, name: &str) -> bool {
        self.damaged().iter().any(|file| file.name == name)
    }

    fn note_damage(&self, key: &ObjectKey, flaw: Flaw) {
        let mut damaged = self.damaged.lock().unwrap_or_else(PoisonError::into_inner);
        if damaged.iter().all(|file| file.name != key.name()) {
            damaged.push(DamagedFile {
                name: key.name().to_owned(),
                flaw,
            });
        }
    }

    fn files(&self) -> Arc<Vec<Arc<IndexFile>>> {
        Arc::clone(&self.files.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn replace(&self, files: Vec<Arc<IndexFile>>) {
        *self.files.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(files);
    }
}
