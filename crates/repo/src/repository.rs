//! A repository: made, opened, read.

use std::sync::Arc;

use highwater_model::{ChunkSize, ObjectId, PointId, RepoId};
use highwater_store::{ObjectKey, ObjectKind, Store, StoreErrorKind};

use crate::config::{CONFIG_LEN_MAX, Config, is_ours};
use crate::error::{Flaw, RepoError, RepoErrorKind};
use crate::fetch::{Sink, fetch};
use crate::hash::IdKeys;
use crate::image::ImageReader;
use crate::manifest::{ImageRoot, Manifest, VmIdentity};
use crate::objects::Objects;
use crate::points::{self, PointList};
use crate::seal::Cipher;
use crate::secret::{self, DataKeys, Secret, SecretKind};
use crate::stats::{self, Storage};
use crate::wire::is_zero;
use crate::writer::{Writer, WriterOptions};

/// How to make a repository.
#[derive(Debug, Clone)]
pub struct InitOptions {
    /// Size of the chunks of all images in it.
    pub chunk_size: ChunkSize,
    /// What shall open it; `None` makes it unencrypted, for ever.
    pub secret: Option<Secret>,
}

/// An open repository; clones share everything.
#[derive(Clone)]
pub struct Repository {
    pub(crate) objects: Arc<Objects>,
}

/// An index file that cannot be used. The objects it showed are stored again
/// when they are met, and an index can be made anew from packs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DamagedIndex {
    /// Name of the file.
    pub name: String,
    /// What is wrong with it.
    pub why: String,
}

impl Repository {
    /// Makes a repository where there is none.
    pub fn init(store: Arc<dyn Store>, options: &InitOptions) -> Result<Self, RepoError> {
        let what = || format!("make a repository in {}", store.location());
        let exists = || RepoError::new(RepoErrorKind::AlreadyExists, what());
        if read_config(store.as_ref())?.is_some() {
            return Err(exists().because("there is one already"));
        }
        store
            .prepare()
            .map_err(|error| RepoError::store(what(), error))?;
        let cipher = if options.secret.is_some() {
            Cipher::Aes256Gcm
        } else {
            Cipher::None
        };
        let config = Config {
            id: RepoId::random(),
            chunk_size: options.chunk_size,
            cipher,
        };
        let bytes = config.encode();
        let keys = DataKeys::draw();
        // The key before the configuration: a repository exists when its
        // configuration does, and then it can be opened.
        let add = |secret| secret::add(store.as_ref(), config.id, &bytes, &keys, secret);
        let key = options.secret.as_ref().map(add).transpose()?;
        if let Err(error) = store.put(&ObjectKey::config(), &[&bytes]) {
            if let Some(key) = key.filter(|_| !error.maybe_done()) {
                // It names this repository's id, so it opens nothing else and
                // harms nobody where it cannot be removed.
                drop(store.delete(&key));
            }
            return Err(RepoError::store(what(), error));
        }
        Self::assemble(store, config, options.secret.is_some().then_some(keys))
    }

    /// Returns which kinds of secrets open the repository; none if it is not
    /// encrypted.
    pub fn secret_kinds(store: &dyn Store) -> Result<Vec<SecretKind>, RepoError> {
        let (config, _) = need_config(store)?;
        if config.cipher == Cipher::None {
            return Ok(Vec::new());
        }
        let kinds = secret::kinds(store, config.id)?;
        if kinds.is_empty() {
            let flaw = Flaw("it is encrypted, and no usable key is there");
            return Err(RepoError::damaged("read the keys of the repository", flaw));
        }
        Ok(kinds)
    }

    /// Opens a repository. A secret for one that is not encrypted is refused:
    /// whoever gives one does not expect plain text.
    pub fn open(store: Arc<dyn Store>, secret: Option<&Secret>) -> Result<Self, RepoError> {
        let what = || format!("open the repository in {}", store.location());
        let (config, bytes) = need_config(store.as_ref())?;
        let keys = match (config.cipher, secret) {
            (Cipher::None, None) => None,
            (Cipher::None, Some(_)) => {
                let error = RepoError::new(RepoErrorKind::WrongKey, what());
                return Err(error.because("it is not encrypted, but a secret was given"));
            }
            (Cipher::Aes256Gcm, None) => {
                let error = RepoError::new(RepoErrorKind::SecretNeeded, what());
                return Err(error.because("it is encrypted"));
            }
            (Cipher::Aes256Gcm, Some(secret)) => {
                Some(secret::unlock(store.as_ref(), config.id, &bytes, secret)?)
            }
        };
        Self::assemble(store, config, keys)
    }

    fn assemble(
        store: Arc<dyn Store>,
        config: Config,
        keys: Option<DataKeys>,
    ) -> Result<Self, RepoError> {
        let ids = IdKeys::derive(keys.as_ref().map_or(&[0; 32], |keys| &*keys.id));
        let seal = keys.map(|keys| keys.seal);
        let objects = Objects::new(store, config, ids, seal)?;
        Ok(Self {
            objects: Arc::new(objects),
        })
    }

    /// Returns the repository's id.
    pub fn id(&self) -> RepoId {
        self.objects.config.id
    }

    /// Returns the size of its chunks.
    pub fn chunk_size(&self) -> ChunkSize {
        self.objects.config.chunk_size
    }

    /// Returns whether what it holds is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.objects.config.cipher != Cipher::None
    }

    /// Returns the restore points of all VMs.
    pub fn points(&self) -> Result<PointList, RepoError> {
        points::list(&self.objects, "")
    }

    /// Returns the restore points of one VM.
    pub fn points_of(&self, vm: &VmIdentity) -> Result<PointList, RepoError> {
        points::list(&self.objects, &format!("{}/", self.objects.ids.vm_key(vm)))
    }

    /// Returns the ids of one VM's restore points, oldest first, without
    /// reading them.
    pub fn point_ids(&self, vm: &VmIdentity) -> Result<Vec<PointId>, RepoError> {
        points::ids(&self.objects, vm)
    }

    /// Reads the manifest of a restore point.
    pub fn manifest(&self, vm: &VmIdentity, id: PointId) -> Result<Manifest, RepoError> {
        points::manifest(&self.objects, vm, id)
    }

    /// Returns whether the manifest of a restore point exists.
    pub fn has_point(&self, vm: &VmIdentity, id: PointId) -> Result<bool, RepoError> {
        points::exists(&self.objects, vm, id)
    }

    /// Returns the index files that were found damaged so far.
    pub fn damaged_indexes(&self) -> Vec<DamagedIndex> {
        let damaged = self.objects.index.damaged().into_iter();
        damaged
            .map(|file| DamagedIndex {
                name: file.name,
                why: file.flaw.to_string(),
            })
            .collect()
    }

    /// Returns what the repository stores, by kind.
    pub fn storage(&self) -> Result<Storage, RepoError> {
        stats::storage(&self.objects)
    }

    /// Merges small index files into larger ones where there are many of them,
    /// so that neither opening nor looking up gets slower with the number of
    /// backups; returns how many were merged.
    ///
    /// Little work each time, and seldom any. May be cut off anywhere, and run by
    /// several processes at once, without a loss: the merged file is durable
    /// before those that it replaces are deleted. Nobody waits for it, so call it
    /// when nothing else is left to do.
    pub fn merge_index(&self) -> Result<usize, RepoError> {
        self.objects.index.merge()
    }

    /// Starts writing.
    pub fn writer(&self, options: WriterOptions) -> Result<Writer, RepoError> {
        Writer::new(Arc::clone(&self.objects), &options)
    }

    /// Opens an image for reading; its root must prove size and top page.
    pub fn image(&self, root: &ImageRoot) -> Result<ImageReader, RepoError> {
        ImageReader::new(Arc::clone(&self.objects), root)
    }

    /// Returns the id that a chunk of these bytes has in this repository's
    /// trees; `None` if it is all zero. Stores nothing.
    pub fn chunk_id(&self, chunk: &[u8]) -> Option<ObjectId> {
        (!is_zero(chunk)).then(|| self.objects.ids.chunk_id(chunk))
    }

    /// Reads chunks in the order in which they lie in packs and gives each,
    /// proven by its id, to `sink` with its tag: in any order, from `threads`
    /// threads at once. Ends at the first error.
    ///
    /// In memory are about 100 bytes per wanted chunk and a read of about 4 MiB
    /// per thread; give a large image in portions. That a chunk has the length
    /// its place in the image demands is the caller's check
    /// ([`ImageReader::chunk_len`]).
    pub fn fetch<E>(
        &self,
        wanted: &[(u64, ObjectId)],
        threads: usize,
        sink: &Sink<'_, E>,
    ) -> Result<(), E>
    where
        E: From<RepoError> + Send,
    {
        fetch(&self.objects, wanted, threads, sink)
    }
}

impl std::fmt::Debug for Repository {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Repository({} in {})",
            self.id(),
            self.objects.store.location()
        )
    }
}

fn read_config(store: &dyn Store) -> Result<Option<(Config, Vec<u8>)>, RepoError> {
    match store.get(&ObjectKey::config(), CONFIG_LEN_MAX) {
        Ok(bytes) => match Config::decode(&bytes) {
            Ok(config) => Ok(Some((config, bytes))),
            Err(error) if error.kind() == RepoErrorKind::Damaged && is_foreign(store, &bytes)? => {
                let what = "find a repository of Highwater";
                let error = RepoError::new(RepoErrorKind::NoRepository, what);
                Err(error.because("there is a `config`, but of another program"))
            }
            Err(error) => Err(error),
        },
        Err(error) if error.kind() == StoreErrorKind::NotFound => Ok(None),
        Err(error) => Err(RepoError::store("read the repository's `config`", error)),
    }
}

/// Returns whether a `config` that cannot be read is another program's: it has
/// none of our words, and nothing of ours lies beside it.
fn is_foreign(store: &dyn Store, config: &[u8]) -> Result<bool, RepoError> {
    if is_ours(config) {
        return Ok(false);
    }
    for kind in [ObjectKind::Point, ObjectKind::Pack] {
        let listed = store.list(kind, "");
        let listed = listed.map_err(|error| RepoError::store("list the repository", error))?;
        if !listed.is_empty() {
            return Ok(false);
        }
    }
    Ok(true)
}

pub(crate) fn need_config(store: &dyn Store) -> Result<(Config, Vec<u8>), RepoError> {
    read_config(store)?.ok_or_else(|| {
        let what = format!("find a repository in {}", store.location());
        RepoError::new(RepoErrorKind::NoRepository, what)
    })
}
