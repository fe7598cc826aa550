//! All index files of a repository together.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use highwater_model::ObjectId;
use highwater_model::step::{Step, pass};
use highwater_store::{Listed, ObjectKey, ObjectKind, Store, StoreErrorKind};

use crate::error::{Flaw, RepoError, RepoErrorKind};
use crate::index::cache::BlockCache;
use crate::index::file::{IndexFile, LoadError, pack_key};
use crate::index::format::IndexRow;
use crate::index::merge::{self, Merge};
use crate::pack::{PackKind, RecordPlace};

const READ_INDEX: &str = "read the index";

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

/// Fails if the repository as a whole is gone, unmounted perhaps: nothing in it
/// is damaged then. To be asked where an index file is gone.
pub(crate) fn need_repository(store: &dyn Store) -> Result<(), RepoError> {
    let there = store.size(&ObjectKey::config());
    there.map_err(|error| RepoError::store(READ_INDEX, error))?;
    Ok(())
}

/// Searches all index files.
///
/// In memory are only the tables of those that were searched: 1.35 bytes per
/// object (a filter of 10 bits and a share of the block table), 49 per pack, and
/// a block cache of 16 MiB.
pub(crate) struct IndexSet {
    store: Arc<dyn Store>,
    files: RwLock<Arc<Vec<Arc<IndexFile>>>>,
    /// Held while the list of files changes, so that no change is lost.
    changing: Mutex<()>,
    damaged: Mutex<Vec<DamagedFile>>,
    cache: BlockCache,
}

/// How often a look-up lists anew because a file has gone since. Each time
/// somebody must have merged it in that very moment.
const RELISTS_MAX: usize = 16;

impl IndexSet {
    /// Takes note of what the store lists; reads nothing yet.
    pub(crate) fn open(store: Arc<dyn Store>) -> Result<Self, RepoError> {
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
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut files = self.files().as_ref().clone();
        let known: HashSet<ObjectKey> = files.iter().map(|file| file.key().clone()).collect();
        let superseded: HashSet<String> = files.iter().flat_map(|file| file.supersedes()).collect();
        let mut listed = self.list()?;
        listed.retain(|listed| {
            !known.contains(&listed.key) && !superseded.contains(listed.key.name())
        });
        let found = !listed.is_empty();
        files.extend(listed.into_iter().map(IndexFile::listed).map(Arc::new));
        // What is searched first is read first: the small ones cost little, and
        // the newest are among them.
        files.sort_by_key(|file| file.len());
        self.replace(files);
        Ok(found)
    }

    /// Returns the undamaged index files that the store lists.
    fn list(&self) -> Result<Vec<Listed>, RepoError> {
        let listed = self.store.list(ObjectKind::Index, "");
        let mut listed = listed.map_err(|error| RepoError::store(READ_INDEX, error))?;
        listed.retain(|listed| !self.is_damaged(listed.key.name()));
        Ok(listed)
    }

    /// Adds a file that this process has just written, whose packs it has
    /// written before.
    pub(crate) fn add_own(&self, listed: &Listed) -> Result<(), RepoError> {
        let what = "read back an index file";
        let file = IndexFile::of_own_packs(listed.clone());
        match file.load(self.store.as_ref()) {
            Ok(()) => {}
            Err(LoadError::Damaged(flaw)) => return Err(RepoError::damaged(what, flaw)),
            // Another process has merged it already: its rows are in that file.
            Err(LoadError::Store(error)) if error.kind() == StoreErrorKind::NotFound => {
                need_repository(self.store.as_ref())?;
                return self.refresh().map(drop);
            }
            Err(LoadError::Store(error)) => return Err(RepoError::needed(what, error)),
        }
        self.exchange(&[], Some(file));
        Ok(())
    }

    /// Merges small index files into one, if there are enough of them to make
    /// it worth while; returns how many. See [`merge`].
    pub(crate) fn merge(&self) -> Result<usize, RepoError> {
        let chosen = merge::plan(self.list()?);
        let mut merge = Merge::default();
        for listed in chosen {
            match merge.take(self.store.as_ref(), &listed) {
                // Gone: somebody else has merged it since it was listed.
                Ok(()) => {}
                Err(LoadError::Store(error)) if error.kind() == StoreErrorKind::NotFound => {}
                // It stays where it is, for whoever repairs it.
                Err(LoadError::Damaged(flaw)) => self.note_damage(&listed.key, flaw),
                Err(LoadError::Store(error)) => return Err(RepoError::store(READ_INDEX, error)),
            }
        }
        if merge.inputs() < 2 {
            return Ok(0);
        }
        let done = merge.store(self.store.as_ref())?;
        self.exchange(&done.replaced, Some(IndexFile::listed(done.listed)));
        pass(Step::MergeStored);
        // Last: until now nobody missed the new file, from now on nobody the old.
        for key in &done.replaced {
            let deleted = self.store.delete(key);
            deleted.map_err(|error| RepoError::store("delete a merged index file", error))?;
            pass(Step::MergedDeleted);
        }
        Ok(done.replaced.len())
    }

    /// Returns a place of the object whose pack exists, or `None`. Damage in an
    /// index only makes objects unknown: they are stored once more.
    pub(crate) fn find(&self, id: &ObjectId) -> Result<Option<Place>, RepoError> {
        self.places(id, 1).map(|mut places| places.pop())
    }

    /// Returns up to `max` places of an object.
    pub(crate) fn places(&self, id: &ObjectId, max: usize) -> Result<Vec<Place>, RepoError> {
        for _ in 0..RELISTS_MAX {
            let mut places = Vec::new();
            let gone = self.search(id, max, &mut places)?;
            if gone.is_empty() || places.len() >= max {
                return Ok(places);
            }
            need_repository(self.store.as_ref())?;
            // Merged into another file, which must be listed by now.
            self.exchange(&gone, None);
            self.refresh()?;
        }
        let error = RepoError::new(RepoErrorKind::Store, READ_INDEX);
        Err(error.because("its files change without end"))
    }

    /// Searches the files that are known; returns those that are gone.
    fn search(
        &self,
        id: &ObjectId,
        max: usize,
        places: &mut Vec<Place>,
    ) -> Result<Vec<ObjectKey>, RepoError> {
        let mut gone = Vec::new();
        let files = self.files();
        // First those whose tables are in memory; often the others need not be
        // read at all.
        let mut others = Vec::new();
        for file in files.iter() {
            if file.is_loaded() {
                self.search_one(file, id, max, places, &mut gone)?;
            } else {
                others.push(file);
            }
        }
        for file in others {
            self.search_one(file, id, max, places, &mut gone)?;
        }
        Ok(gone)
    }

    fn search_one(
        &self,
        file: &IndexFile,
        id: &ObjectId,
        max: usize,
        places: &mut Vec<Place>,
        gone: &mut Vec<ObjectKey>,
    ) -> Result<(), RepoError> {
        if places.len() >= max {
            return Ok(());
        }
        match file.find(self.store.as_ref(), &self.cache, id) {
            Ok(rows) => self.keep_real(file, &rows, max, places)?,
            Err(LoadError::Damaged(flaw)) => {
                self.note_damage(file.key(), flaw);
                if !file.is_loaded() {
                    // Without its tables it is of no use to any look-up.
                    self.exchange(std::slice::from_ref(file.key()), None);
                }
            }
            Err(LoadError::Store(error)) if error.kind() == StoreErrorKind::NotFound => {
                gone.push(file.key().clone());
            }
            Err(LoadError::Store(error)) => return Err(RepoError::store(READ_INDEX, error)),
        }
        Ok(())
    }

    /// A row counts only if its pack exists.
    fn keep_real(
        &self,
        file: &IndexFile,
        rows: &[IndexRow],
        max: usize,
        places: &mut Vec<Place>,
    ) -> Result<(), RepoError> {
        for row in rows {
            let Some(pack) = file.pack_there(self.store.as_ref(), row.pack_no)? else {
                continue;
            };
            let is_known =
                |place: &Place| (place.pack_id, place.record.offset) == (pack.id, row.place.offset);
            // A file and the one that replaces it may both be listed.
            if places.len() < max && !places.iter().any(is_known) {
                places.push(Place {
                    pack_id: pack.id,
                    pack_len: pack.len,
                    kind: pack.kind,
                    record: row.place,
                });
            }
        }
        Ok(())
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
    pub(crate) fn packs(&self) -> Result<Vec<([u8; 32], PackKind)>, RepoError> {
        let mut packs = Vec::new();
        for file in self.files().iter() {
            if let Some(known) = self.usable(file, file.packs(self.store.as_ref()))? {
                packs.extend(known.iter().map(|pack| (pack.id, pack.kind)));
            }
        }
        Ok(packs)
    }

    /// Shows the rows of at most about `blocks_max` blocks, evenly spread over
    /// all files that can be read. Returns whether those are all rows.
    pub(crate) fn sample(
        &self,
        blocks_max: u64,
        show: &mut dyn FnMut(PackKind, &RecordPlace),
    ) -> Result<bool, RepoError> {
        let store = self.store.as_ref();
        let files = self.files();
        let mut usable = Vec::new();
        let mut is_all = true;
        for file in files.iter() {
            let blocks = self.usable(file, file.blocks(store))?;
            is_all &= blocks.is_some();
            usable.extend(blocks.map(|blocks| (file, blocks)));
        }
        let all = usable.iter().map(|(_, blocks)| *blocks);
        let all = all.fold(0, u64::saturating_add);
        let step = all.div_ceil(blocks_max.max(1)).max(1);
        let mut at = 0_u64;
        for (file, blocks) in usable {
            for block in 0..blocks {
                let is_next = at.is_multiple_of(step);
                at = at.saturating_add(1);
                if !is_next {
                    continue;
                }
                let Some(rows) = self.usable(file, file.rows(store, block))? else {
                    is_all = false;
                    continue;
                };
                let Some(packs) = self.usable(file, file.packs(store))? else {
                    continue;
                };
                for row in rows {
                    let pack = usize::try_from(row.pack_no).unwrap_or(usize::MAX);
                    if let Some(pack) = packs.get(pack) {
                        show(pack.kind, &row.place);
                    }
                }
            }
        }
        Ok(is_all && step == 1)
    }

    /// Takes what was read of a file, or `None` where it is damaged or has been
    /// merged away since it was listed.
    fn usable<T>(
        &self,
        file: &IndexFile,
        read: Result<T, LoadError>,
    ) -> Result<Option<T>, RepoError> {
        match read {
            Ok(value) => Ok(Some(value)),
            Err(LoadError::Damaged(flaw)) => {
                self.note_damage(file.key(), flaw);
                Ok(None)
            }
            Err(LoadError::Store(error)) if error.kind() == StoreErrorKind::NotFound => Ok(None),
            Err(LoadError::Store(error)) => Err(RepoError::store(READ_INDEX, error)),
        }
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

    /// Forgets some files and adds one.
    fn exchange(&self, old: &[ObjectKey], new: Option<IndexFile>) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut files = self.files().as_ref().clone();
        files.retain(|file| !old.contains(file.key()));
        files.extend(new.map(Arc::new));
        self.replace(files);
    }

    fn replace(&self, files: Vec<Arc<IndexFile>>) {
        *self.files.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(files);
    }
}
