//! The manifest: what one restore point is. The wire form, version 1.
//!
//! A point exists if and only if its manifest does. These structs are the JSON
//! as stored (docs/format.md); unknown fields are ignored, so that a later
//! version of the same format number may add some.

use std::fmt;
use std::marker::PhantomData;

use highwater_model::{ChunkSize, MarkName, Nonce, ObjectId, PointId, RootHash, Timestamp};
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// One restore point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Format of this manifest: 1.
    pub version: u32,
    /// Its id; equals its object's name.
    pub point: PointId,
    /// Which VM it is of.
    pub vm: VmIdentity,
    /// Counts the points of this VM in this repository, from 1.
    pub sequence: u64,
    /// The point before it, if there was one.
    pub prev: Option<PointId>,
    /// Wall clock at the point in time, UTC.
    pub taken_at: Timestamp,
    /// Offset of the host's local time from UTC then, minutes.
    pub utc_offset_minutes: i32,
    /// Wall clock when the manifest was written.
    pub committed_at: Timestamp,
    /// `filesystem`, `crash`, `offline` or `paused`.
    pub consistency: String,
    /// Level asked for: `auto`, `full`, `incremental`, `differential`, `copy`.
    pub level: String,
    /// Host name and program version that made it.
    pub origin: Origin,
    /// The VM's definition (libvirt: inactive XML with secrets).
    pub definition: String,
    /// When the definition was read.
    pub definition_at: Timestamp,
    /// Firmware, kernel and TPM files.
    #[serde(deserialize_with = "limited")]
    pub files: Vec<SavedFile>,
    /// The disks.
    #[serde(deserialize_with = "limited")]
    pub disks: Vec<DiskRecord>,
    /// Disks of the VM that are not in this point, and why.
    #[serde(deserialize_with = "limited")]
    pub skipped: Vec<SkippedRecord>,
    /// The mark this backup left at the VM, if it left one.
    pub mark: Option<MarkRecord>,
    /// What was tidied at the VM, in words.
    #[serde(deserialize_with = "limited")]
    pub healed: Vec<String>,
    /// What the user was warned about.
    #[serde(deserialize_with = "limited")]
    pub warnings: Vec<String>,
    /// Tags given by the user.
    #[serde(deserialize_with = "limited")]
    pub tags: Vec<String>,
    /// Group given by the user.
    pub group: Option<String>,
    /// Duration of the whole backup, milliseconds.
    pub duration_ms: u64,
    /// Newest prune epoch the writer knew of; 0 before there was any.
    pub prune_epoch: u64,
}

/// Which VM a point is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmIdentity {
    /// Name at the time.
    pub name: String,
    /// UUID, if it had one.
    pub uuid: Option<String>,
}

/// Who made a point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Host name.
    pub host: String,
    /// Version of Highwater.
    pub version: String,
    /// Versions of the hypervisor's parts.
    #[serde(deserialize_with = "limited")]
    pub hypervisor: Vec<(String, String)>,
}

/// One disk image or other byte string, complete: the root of its tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRoot {
    /// Proves size, chunk size and content.
    pub hash: RootHash,
    /// Size, bytes.
    pub size_bytes: u64,
    /// Chunk size, bytes.
    pub chunk_bytes: ChunkSize,
    /// The topmost page; `None` if the image is all zeroes.
    pub top: Option<ObjectId>,
}

/// One disk of a point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// Target name.
    pub target: String,
    /// `full`, `incremental`, `differential`, `copy` or `rescan`.
    pub mode: String,
    /// Named reason of a mode that is not the one hoped for.
    pub reason: Option<String>,
    /// The point whose tree this one was built on.
    pub parent: Option<PointId>,
    /// The image.
    pub image: ImageRoot,
    /// Length of the source file where it differs from the image's size.
    pub file_bytes: Option<u64>,
    /// Source format.
    pub format: String,
    /// Source (path or URI) as the hypervisor names it.
    pub source: String,
    /// Bytes the bitmap called dirty, or all of it.
    pub dirty_bytes: u64,
    /// Bytes read from the hypervisor.
    pub read_bytes: u64,
    /// Bytes added to the repository for its chunks, as stored.
    pub stored_bytes: u64,
    /// Blocks the bitmap called clean that were read again and compared.
    #[serde(default)]
    pub audited_blocks: u64,
    /// Whether the mark of this point is on this disk.
    pub marked: bool,
    /// What proves the mark, and the disk, next time.
    pub evidence: Evidence,
}

/// What proves next time that a disk and its mark are the ones recorded.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Evidence {
    /// Serial number.
    pub serial: Option<String>,
    /// Device name.
    pub device: Option<String>,
    /// Whether nobody could tell serial number and device name: only the images
    /// were seen.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub device_unknown: bool,
    /// Image chain, topmost first.
    #[serde(deserialize_with = "limited")]
    pub chain: Vec<EvidenceLink>,
    /// Granularity of the mark's bitmap, bytes.
    pub granularity: Option<u32>,
    /// Hypervisor process: pid, start ticks, boot id.
    pub process: Option<(u32, u64, String)>,
    /// Guest write counters: bytes, operations.
    pub counters: Option<(u64, u64)>,
    /// The smallest size this disk was ever seen with, bytes.
    pub smallest_size_bytes: u64,
    /// Chunks that are often dirty, each with a score: the first that an audit
    /// looks at. Manifests of before there was an audit have none.
    #[serde(
        default,
        deserialize_with = "limited",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub hot: Vec<(u64, u32)>,
}

/// One image of a disk's chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvidenceLink {
    /// Path or URI.
    pub name: String,
    /// Format.
    pub format: String,
    /// Device and inode number.
    pub inode: Option<(u64, u64)>,
    /// Length, modification and change time of the file (ns).
    pub stamp: Option<(u64, i64, i64)>,
}

/// The mark a backup left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MarkRecord {
    /// Its name.
    pub name: MarkName,
    /// Its nonce.
    pub nonce: Nonce,
    /// Creation time as the hypervisor recorded it, seconds.
    pub created_s: Option<i64>,
    /// Targets of the disks that carry it.
    #[serde(deserialize_with = "limited")]
    pub disks: Vec<String>,
}

/// A disk that is not in a point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SkippedRecord {
    /// Target name.
    pub target: String,
    /// Why.
    pub reason: String,
}

/// A file saved with the point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedFile {
    /// `loader`, `nvram`, `kernel`, `initrd` or `tpm`.
    pub role: String,
    /// Path on the host; for `tpm`, relative to the state directory.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// When it was read.
    pub captured_at: Timestamp,
    /// Its content.
    pub image: ImageRoot,
}

/// Far beyond any VM's. An empty text takes three bytes in a manifest and 24 in
/// memory, so a list without a limit would take eight times the manifest.
const LIST_LEN_MAX: usize = 1 << 16;

/// Reads a list of at most [`LIST_LEN_MAX`] entries.
fn limited<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct Limited<T>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>> Visitor<'de> for Limited<T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a list of at most {LIST_LEN_MAX} entries")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<Vec<T>, A::Error> {
            let mut list = Vec::new();
            while let Some(entry) = entries.next_element()? {
                if list.len() >= LIST_LEN_MAX {
                    return Err(A::Error::invalid_length(list.len(), &self));
                }
                list.push(entry);
            }
            Ok(list)
        }
    }

    deserializer.deserialize_seq(Limited(PhantomData))
}
