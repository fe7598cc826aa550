//! What a verification is asked for, and what it says.

use std::fmt;

use highwater_model::{ByteRange, PointId, RepoId};
use highwater_store::ObjectKind;

use crate::error::RepoError;
use crate::manifest::VmIdentity;

/// How much is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VerifyDepth {
    /// Everything but the content of packs; of packs of pages what trees need.
    Structure,
    /// Every byte of every pack, too.
    Data,
}

/// What to verify.
#[derive(Clone, Copy)]
pub struct VerifyOptions<'a> {
    /// Only these restore points and what they need; `None` means everything.
    pub points: Option<&'a [(VmIdentity, PointId)]>,
    /// How much is read.
    pub depth: VerifyDepth,
    /// Threads that read packs.
    pub threads: usize,
    /// Is told how far it is, from several threads; ends the work by `false`.
    pub progress: &'a (dyn Fn(Progress) -> bool + Sync),
}

/// How far a verification is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub phase: VerifyPhase,
    /// How much of it is done.
    pub done: u64,
    /// How much there is.
    pub total: u64,
}

/// What is being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VerifyPhase {
    /// Reading manifests; counts them.
    Points,
    /// Reading index files; counts bytes.
    Index,
    /// Walking trees; counts images.
    Trees,
    /// Reading packs; counts bytes.
    Data,
    /// Finding what damage hurts; counts images.
    Ranges,
}

/// Why a verification did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The repository could not be read.
    #[error(transparent)]
    Repo(#[from] RepoError),
    /// The caller ended it.
    #[error("interrupted")]
    Interrupted,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyReport {
    /// The repository's id.
    pub repository: RepoId,
    /// Whether it is encrypted.
    pub encrypted: bool,
    /// How much was looked at.
    pub checked: Checked,
    /// Every object that is not what was written.
    pub damage: Vec<Damage>,
    /// What harms no restore point, or cannot be called damage.
    pub warnings: Vec<String>,
    /// What was not looked at although it was asked for, as sentences.
    pub unchecked: Vec<&'static str>,
    /// Whether there was more damage than is told in ranges.
    pub truncated: bool,
}

impl VerifyReport {
    /// Returns whether nothing is damaged.
    pub fn is_clean(&self) -> bool {
        self.damage.is_empty()
    }
}

/// How much was looked at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Checked {
    /// Keys.
    pub keys: u64,
    /// Restore points.
    pub points: u64,
    /// Restore points that are hurt.
    pub points_hurt: u64,
    /// Disks of them.
    pub disks: u64,
    /// Files saved with them.
    pub files: u64,
    /// Index files.
    pub index_files: u64,
    /// Bytes of index files.
    pub index_bytes: u64,
    /// Rows in them.
    pub rows: u64,
    /// Packs that were looked for.
    pub packs: u64,
    /// Bytes of those that are there.
    pub pack_bytes: u64,
    /// Tree pages read.
    pub pages: u64,
    /// Chunks looked up.
    pub chunks: u64,
    /// Packs read from first to last byte.
    pub read_packs: u64,
    /// Bytes of them.
    pub read_bytes: u64,
    /// Records opened, decompressed, and proven by their ids.
    pub records: u64,
}

/// An object that is not what was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Which.
    pub object: DamagedObject,
    /// What is wrong with it, as a sentence about it.
    pub what: String,
    /// What it hurts; empty if no restore point needs what is damaged, or if
    /// that cannot be told without the key.
    pub points: Vec<HurtPoint>,
}

/// Names an object of a repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DamagedObject {
    /// Its kind.
    pub kind: ObjectKind,
    /// Its path in the repository; `None` if all that is known is that one of
    /// this kind is missing.
    pub path: Option<String>,
}

impl DamagedObject {
    /// Returns its kind in a word.
    pub const fn kind_word(&self) -> &'static str {
        match self.kind {
            ObjectKind::Config => "config",
            ObjectKind::Key => "key",
            ObjectKind::Pack => "pack",
            ObjectKind::Index => "index",
            ObjectKind::Point => "point",
            ObjectKind::Lease => "lease",
            ObjectKind::Damage => "damage",
            ObjectKind::Proof => "proof",
            ObjectKind::Prune => "prune",
        }
    }
}

impl fmt::Display for DamagedObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.path {
            Some(path) => f.write_str(path),
            None => write!(f, "the {} files together", self.kind_word()),
        }
    }
}

/// A restore point that damage hurts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HurtPoint {
    /// Its VM's name, where that is known.
    pub vm: Option<String>,
    /// Its id, or what stands in its place.
    pub point: String,
    /// Whether its manifest itself is damaged: then nothing of it can be read.
    pub lost: bool,
    /// Its disks that are hurt.
    pub disks: Vec<HurtImage>,
    /// Its files that are hurt.
    pub files: Vec<HurtFile>,
}

/// What of a disk is hurt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HurtImage {
    /// Target name.
    pub disk: String,
    /// The hurt ranges, ascending and apart.
    pub ranges: Vec<ByteRange>,
    /// Ranges that are not listed because there are too many.
    pub more_ranges: u64,
    /// Bytes hurt, in all.
    pub bytes: u64,
}

/// A hurt file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HurtFile {
    /// Its role.
    pub role: String,
    /// Its path on the host.
    pub path: String,
}
