//! A store in a directory, also on NFS and CIFS mounts.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, IoSlice, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use highwater_model::step::{Step, pass};

use crate::durable::{self, DurableError, Stage};
use crate::error::kind_of;
use crate::{Listed, ObjectKey, ObjectKind, Store, StoreError, StoreErrorKind, Unfinished};

const FILE_MODE: u32 = 0o600;
const FOLDER_MODE: u32 = 0o700;
const TEMP_FOLDER: &str = "tmp";

/// Keeps objects as files under one directory.
///
/// Unfinished files lie in `tmp/` and are named nowhere; those of dead writers
/// are harmless. After a failed sync nothing the kernel says about the disk can
/// be trusted, so the store refuses every further change.
#[derive(Debug, Clone)]
pub struct LocalStore {
    root: Arc<Path>,
    /// Shared with all that is being written, as one disk is.
    poisoned: Arc<AtomicBool>,
    /// Folders whose own entry this process has seen durable.
    durable_folders: Arc<Mutex<HashSet<PathBuf>>>,
}

impl LocalStore {
    /// Names the directory; touches nothing yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into().into(),
            poisoned: Arc::default(),
            durable_folders: Arc::default(),
        }
    }

    /// Returns the directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn error(&self, verb: &'static str, object: String, cause: io::Error) -> StoreError {
        StoreError::new(kind_of(&cause), verb, object, self.location()).because(cause)
    }

    fn read_error(&self, key: &ObjectKey) -> impl FnOnce(io::Error) -> StoreError {
        move |cause| self.error("read", key.path(), cause).not_done()
    }

    /// Translates how far a durable change came, and stops the store where
    /// the disk did not take what it was given.
    fn change_error(&self, verb: &'static str, object: String, cause: DurableError) -> StoreError {
        if matches!(cause.stage, Stage::SyncFile | Stage::SyncDirectory) {
            self.poisoned.store(true, Ordering::SeqCst);
        }
        let error = self.error(verb, object, cause.error);
        match cause.stage {
            Stage::Prepare | Stage::SyncFile | Stage::Exists => error.not_done(),
            Stage::SyncDirectory => error.perhaps_done(),
        }
    }

    fn refuse_if_poisoned(
        &self,
        verb: &'static str,
        object: impl FnOnce() -> String,
    ) -> Result<(), StoreError> {
        if !self.poisoned.load(Ordering::SeqCst) {
            return Ok(());
        }
        let why = "an earlier write could not be synced to the disk";
        Err(
            StoreError::new(StoreErrorKind::Poisoned, verb, object(), self.location())
                .because(why)
                .not_done(),
        )
    }

    /// Makes sure that the folder of `path` exists and that its own entry is
    /// durable, once per process and folder.
    fn ensure_folder(&self, path: &Path) -> Result<(), DurableError> {
        let Some(folder) = path.parent().filter(|folder| **folder != *self.root) else {
            return Ok(());
        };
        let known = |set: &HashSet<PathBuf>| set.contains(folder);
        if known(
            &self
                .durable_folders
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        ) {
            return Ok(());
        }
        // The one above it was made by `prepare`. Where that is gone, the whole
        // repository was removed or unmounted since the file was started, and
        // nothing may be made in its place.
        durable::create_directory(folder, FOLDER_MODE)?;
        self.durable_folders
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(folder.to_owned());
        Ok(())
    }

    /// Starts a file that nobody can see.
    fn start(&self, object: impl FnOnce() -> String) -> Result<LocalUnfinished, StoreError> {
        // Created before any folder, and only where `prepare` made its folder:
        // below a mount point without its mount this must fail.
        let (temp, file) = durable::create_temporary(&self.root.join(TEMP_FOLDER), FILE_MODE)
            .map_err(|cause| self.error("write", object(), cause).not_done())?;
        Ok(LocalUnfinished {
            store: self.clone(),
            file,
            temp,
            is_published: false,
        })
    }

    /// Gives a complete file its name.
    fn publish(&self, unfinished: &mut LocalUnfinished, key: &ObjectKey) -> Result<(), StoreError> {
        let path = self.root.join(key.path());
        let published = self
            .ensure_folder(&path)
            .and_then(|()| durable::publish(&unfinished.file, &unfinished.temp, &path));
        let Err(cause) = published else {
            unfinished.is_published = true;
            return Ok(());
        };
        if cause.stage == Stage::Exists {
            // Whoever made it may not have synced its folder yet, but our
            // caller will rely on it.
            let folder = path.parent().unwrap_or(&self.root);
            durable::sync_directory(folder).map_err(|error| {
                let stage = Stage::SyncDirectory;
                self.change_error("write", key.path(), DurableError { stage, error })
            })?;
        }
        Err(self.change_error("write", key.path(), cause))
    }

    fn list_folder(
        &self,
        kind: ObjectKind,
        folder: &Path,
        name_prefix: &str,
        prefix: &str,
        listing: &mut Listing<'_>,
    ) -> io::Result<()> {
        for entry in entries(folder)? {
            let entry = entry?;
            (listing.on_entry)();
            let Some(name) = entry
                .file_name()
                .to_str()
                .map(|name| format!("{name_prefix}{name}"))
            else {
                continue;
            };
            let Ok(key) = ObjectKey::new(kind, name) else {
                continue;
            };
            if !key.name().starts_with(prefix) || self.root.join(key.path()) != entry.path() {
                continue;
            }
            match entry.metadata() {
                Ok(meta) if meta.is_file() => listing.found.push(Listed {
                    key,
                    len: meta.len(),
                }),
                Ok(_) => {}
                // Deleted since the folder was read.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn list_kind(
        &self,
        kind: ObjectKind,
        prefix: &str,
        on_entry: &dyn Fn(),
    ) -> io::Result<Vec<Listed>> {
        let mut listing = Listing {
            found: Vec::new(),
            on_entry,
        };
        // Tells an empty repository from one that is not there.
        fs::metadata(&self.root)?;
        match kind {
            ObjectKind::Config => self.list_folder(kind, &self.root, "", prefix, &mut listing)?,
            ObjectKind::Pack | ObjectKind::Point => {
                let top = self.root.join(kind.folder());
                for entry in entries(&top)? {
                    let entry = entry?;
                    let Ok(name) = entry.file_name().into_string() else {
                        continue;
                    };
                    if !entry.file_type()?.is_dir() {
                        continue;
                    }
                    let above = if kind == ObjectKind::Point {
                        format!("{name}/")
                    } else {
                        String::new()
                    };
                    // The points of other VMs may be many.
                    if above.starts_with(prefix) || prefix.starts_with(&above) {
                        self.list_folder(kind, &entry.path(), &above, prefix, &mut listing)?;
                    }
                }
            }
            _ => {
                let folder = self.root.join(kind.folder());
                self.list_folder(kind, &folder, "", prefix, &mut listing)?;
            }
        }
        listing.found.sort_unstable();
        Ok(listing.found)
    }
}

impl Store for LocalStore {
    fn prepare(&self) -> Result<(), StoreError> {
        let failed =
            |cause: DurableError| self.error("prepare", "repository".to_owned(), cause.error);
        durable::create_directories(&self.root, FOLDER_MODE).map_err(failed)?;
        let folder = |name: &str| durable::create_directories(&self.root.join(name), FOLDER_MODE);
        folder(TEMP_FOLDER).map_err(failed)?;
        ObjectKind::FOLDERS
            .iter()
            .try_for_each(|kind| folder(kind.folder()))
            .map_err(failed)
    }

    fn put(&self, key: &ObjectKey, parts: &[&[u8]]) -> Result<(), StoreError> {
        self.refuse_if_poisoned("write", || key.path())?;
        let mut unfinished = self.start(|| key.path())?;
        write_all_parts(&mut unfinished.file, parts)
            .map_err(|cause| self.error("write", key.path(), cause).not_done())?;
        if key.kind() == ObjectKind::Point {
            pass(Step::ManifestWritten);
        }
        self.publish(&mut unfinished, key)
    }

    fn begin(&self) -> Result<Option<Box<dyn Unfinished>>, StoreError> {
        self.refuse_if_poisoned("write", unnamed)?;
        Ok(Some(Box::new(self.start(unnamed)?)))
    }

    fn get(&self, key: &ObjectKey, max_bytes: u64) -> Result<Vec<u8>, StoreError> {
        let file = File::open(self.root.join(key.path())).map_err(self.read_error(key))?;
        let len = file.metadata().map_err(self.read_error(key))?.len();
        let too_large = || {
            StoreError::new(
                StoreErrorKind::TooLarge,
                "read",
                key.path(),
                self.location(),
            )
        };
        if len > max_bytes {
            return Err(too_large().because(format!("{len} bytes are more than {max_bytes}")));
        }
        let mut bytes = Vec::with_capacity(usize::try_from(len).map_err(|_| too_large())?);
        file.take(max_bytes)
            .read_to_end(&mut bytes)
            .map_err(self.read_error(key))?;
        Ok(bytes)
    }

    fn get_range(&self, key: &ObjectKey, offset: u64, into: &mut [u8]) -> Result<(), StoreError> {
        let file = File::open(self.root.join(key.path())).map_err(self.read_error(key))?;
        file.read_exact_at(into, offset)
            .map_err(self.read_error(key))
    }

    fn list(&self, kind: ObjectKind, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        self.list_telling(kind, prefix, &|| {})
    }

    fn list_telling(
        &self,
        kind: ObjectKind,
        prefix: &str,
        on_entry: &dyn Fn(),
    ) -> Result<Vec<Listed>, StoreError> {
        self.list_kind(kind, prefix, on_entry).map_err(|cause| {
            self.error("list", kind.folder().to_owned(), cause)
                .not_done()
        })
    }

    fn size(&self, key: &ObjectKey) -> Result<u64, StoreError> {
        let meta = fs::metadata(self.root.join(key.path())).map_err(self.read_error(key))?;
        Ok(meta.len())
    }

    fn delete(&self, key: &ObjectKey) -> Result<(), StoreError> {
        self.refuse_if_poisoned("delete", || key.path())?;
        durable::remove(&self.root.join(key.path()))
            .map_err(|cause| self.change_error("delete", key.path(), cause))
    }

    fn location(&self) -> String {
        self.root.display().to_string()
    }
}

/// A listing under way.
struct Listing<'a> {
    found: Vec<Listed>,
    on_entry: &'a dyn Fn(),
}

/// What messages call an object that has no name yet.
fn unnamed() -> String {
    TEMP_FOLDER.to_owned()
}

/// A file in `tmp/`, which goes away with this unless it was published.
#[derive(Debug)]
struct LocalUnfinished {
    store: LocalStore,
    file: File,
    temp: PathBuf,
    is_published: bool,
}

impl Unfinished for LocalUnfinished {
    fn append(&mut self, parts: &[&[u8]]) -> Result<(), StoreError> {
        self.store.refuse_if_poisoned("write", unnamed)?;
        write_all_parts(&mut self.file, parts)
            .map_err(|cause| self.store.error("write", unnamed(), cause).not_done())
    }

    fn finish(mut self: Box<Self>, key: &ObjectKey) -> Result<(), StoreError> {
        let store = self.store.clone();
        store.refuse_if_poisoned("write", || key.path())?;
        store.publish(&mut self, key)
    }
}

impl Drop for LocalUnfinished {
    fn drop(&mut self) {
        if !self.is_published {
            durable::discard(&self.temp);
        }
    }
}

/// Returns the entries of a folder; a missing folder has none.
fn entries(folder: &Path) -> io::Result<impl Iterator<Item = io::Result<fs::DirEntry>>> {
    match fs::read_dir(folder) {
        Ok(entries) => Ok(Some(entries).into_iter().flatten()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None.into_iter().flatten()),
        Err(error) => Err(error),
    }
}

fn write_all_parts(file: &mut File, parts: &[&[u8]]) -> io::Result<()> {
    let mut slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
    let mut rest = slices.as_mut_slice();
    // Empty parts first, or a write of nothing would look like a full disk.
    IoSlice::advance_slices(&mut rest, 0);
    while !rest.is_empty() {
        match file.write_vectored(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut rest, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
