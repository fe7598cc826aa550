//! What a driver reports about a VM. Facts only: no fact here is a decision.

use std::path::PathBuf;

use highwater_model::{MarkName, Nonce, SessionId};
use serde::{Deserialize, Serialize};

/// How a VM is found and named.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct VmRef {
    /// The name people use.
    pub name: String,
    /// The hypervisor's UUID, lower case with dashes; `None` if it has none
    /// (an all-zero UUID counts as none).
    pub uuid: Option<String>,
}

/// Everything observed about one VM at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmFacts {
    /// Its name and UUID.
    pub vm: VmRef,
    /// Whether and how it runs.
    pub run_state: RunState,
    /// Whether its definition outlives a shutdown (libvirt: persistent).
    pub persistent: bool,
    /// The definition as text: libvirt's inactive XML with secrets.
    pub definition: String,
    /// What a restore needs beside the disks.
    pub firmware: Vec<FirmwareFile>,
    /// Directory of the emulated TPM's state (swtpm), if there is one.
    pub tpm_state: Option<PathBuf>,
    /// Disks that can be backed up.
    pub disks: Vec<DiskFacts>,
    /// Disks that cannot, each with the reason.
    pub skipped: Vec<SkippedDisk>,
    /// All of the hypervisor's checkpoint records, foreign ones included.
    pub checkpoints: Vec<CheckpointFacts>,
    /// Whether a mark without a record is one that the hypervisor has forgotten
    /// and can be told about again. Not where nobody keeps records (QEMU by
    /// itself, images), nor while a VM is off, when libvirt makes none.
    pub expects_records: bool,
    /// A running job that keeps us from starting (backup, migration, …).
    pub job: Option<JobFacts>,
    /// Whether the guest agent could be asked.
    pub agent: Agent,
    /// The hypervisor process, if it runs and can be identified.
    pub process: Option<ProcessIdentity>,
    /// Versions for the report, e.g. `("libvirt", "11.3.0")`.
    pub versions: Vec<(String, String)>,
}

impl VmFacts {
    /// Returns whether the bitmaps of a disk are all that there are. Nobody can
    /// tell while the images of a process are another one's, nor of an image
    /// that could not be read.
    pub fn tells_bitmaps_of(&self, disk: &DiskFacts) -> bool {
        match self.run_state {
            RunState::NotResumed => false,
            RunState::Off => disk.root_node == RootNode::Same,
            RunState::Running | RunState::Paused | RunState::PausedOnError | RunState::Other => {
                true
            }
        }
    }
}

/// Whether a guest agent can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Agent {
    /// The definition has no channel for one.
    Missing,
    /// There is a channel, and nobody at its other end.
    Silent,
    /// Connected.
    Connected,
}

/// Whether and how a VM runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RunState {
    /// vCPUs run.
    Running,
    /// Paused by somebody's wish.
    Paused,
    /// Paused by QEMU because a write failed.
    PausedOnError,
    /// Loaded from a saved state or a migration, and paused since. Its images are
    /// not yet the process's own: nothing may be written to them, and it tells of
    /// no bitmap that is in them.
    NotResumed,
    /// Not running. What is known of its disks is what their images tell.
    Off,
    /// Anything else (crashed, shutting down, suspended by the guest).
    Other,
}

/// One disk of a VM that can be read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DiskFacts {
    /// Target name inside the VM (`vda`).
    pub target: String,
    /// Serial number given in the definition.
    pub serial: Option<String>,
    /// The device's own name (libvirt: alias, `virtio-disk0`).
    pub device: Option<String>,
    /// Whether serial number and device name are what they are said to be; an
    /// image by itself tells of neither.
    pub device_known: bool,
    /// Where its bytes are.
    pub source: DiskSource,
    /// Driver format (`qcow2`, `raw`).
    pub format: String,
    /// Size the guest sees, bytes.
    pub size_bytes: u64,
    /// Length of the image file itself where it is one, bytes.
    pub file_bytes: Option<u64>,
    /// Whether a mark can live on it.
    pub marks: MarkSupport,
    /// The image and its backing files, topmost first; the raw data file of a
    /// qcow2 follows it under the format [`highwater_model::DATA_FILE_FORMAT`].
    pub chain: Vec<ChainLink>,
    /// All bitmaps found on any node of the disk's chain.
    pub bitmaps: Vec<BitmapFacts>,
    /// The guest device's root node against the node a backup would export.
    pub root_node: RootNode,
    /// What happens to the guest when a write fails.
    pub write_errors: WriteErrorPolicy,
    /// Whether the image is encrypted at rest (LUKS).
    pub encrypted: bool,
    /// What the guest has written since its process began.
    pub counters: Option<WriteCounters>,
}

/// Where a disk's bytes are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskSource {
    /// An image file.
    File(PathBuf),
    /// A block device.
    Block(PathBuf),
    /// A volume of a storage pool, and the path it resolves to if there is one.
    Volume {
        /// Pool name.
        pool: String,
        /// Volume name.
        volume: String,
        /// Resolved path.
        path: Option<PathBuf>,
    },
    /// A network disk; the text names protocol and source (`nbd://host:port/export`).
    Network(String),
}

/// Whether a mark's bitmap can live on a disk, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MarkSupport {
    /// Yes (qcow2 version 3, also with a raw data file).
    Yes,
    /// Only in the memory of the process that runs the VM: the image cannot hold
    /// it.
    WhileRunning(NoMarks),
    /// No, and why.
    No(NoMarks),
}

/// Why no persistent bitmap can live on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum NoMarks {
    /// The image is raw (or any format but qcow2).
    NotQcow2,
    /// The image is qcow2 version 2 (`compat=0.10`), which cannot hold bitmaps.
    Qcow2Version2,
}

/// One image of a disk's chain, with what identifies it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChainLink {
    /// Path or URI.
    pub name: String,
    /// Format.
    pub format: String,
    /// Where it is.
    pub place: Place,
    /// QEMU's name of the node, if known.
    pub node: Option<String>,
    /// Device and inode number, where it is a local file.
    pub inode: Option<(u64, u64)>,
    /// Length of the file, bytes.
    pub file_bytes: Option<u64>,
    /// Last modification, nanoseconds since the epoch.
    pub modified_ns: Option<i64>,
    /// Last status change, nanoseconds since the epoch.
    pub changed_ns: Option<i64>,
}

/// Where an image is: here, or behind a server that tells nothing about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// A file or a device of this host.
    Host,
    /// Behind a server.
    Network,
}

impl ChainLink {
    /// Returns length, modification and change time, if all are known.
    pub fn stamp(&self) -> Option<(u64, i64, i64)> {
        Some((self.file_bytes?, self.modified_ns?, self.changed_ns?))
    }
}

/// One dirty bitmap as QEMU reports it (`query-named-block-nodes`, QEMU 10.0).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BitmapFacts {
    /// Its name; unnamed ones are not reported.
    pub name: String,
    /// The node it is attached to.
    pub node: String,
    /// Bytes that one bit stands for.
    pub granularity: u32,
    /// Whether it records writes now.
    pub recording: bool,
    /// Whether it is kept in the image.
    pub persistent: bool,
    /// Whether the image holds one of this name: then it was read from there
    /// when the image was opened, and not made since.
    pub in_image: bool,
    /// Whether a job or an export uses it.
    pub busy: bool,
    /// Whether it was not closed properly and is worthless.
    pub inconsistent: bool,
    /// Bytes it calls dirty.
    pub dirty_bytes: u64,
}

/// Whether the node the guest writes to is the node a backup would export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RootNode {
    /// They are the same, or only filters lie between.
    Same,
    /// They differ: somebody changed the graph behind the hypervisor's back.
    Differs {
        /// The node the guest writes to.
        guest: String,
        /// The node the hypervisor would export.
        exported: String,
    },
    /// Could not be learned; the text says why.
    Unknown(String),
}

/// What happens when a guest write fails (libvirt: `error_policy`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum WriteErrorPolicy {
    /// The guest is paused (QEMU's default for a full file system).
    Pause,
    /// The guest sees the error.
    Report,
    /// The write is dropped silently.
    Ignore,
}

/// What the guest has written since its process began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteCounters {
    /// Bytes written.
    pub bytes: u64,
    /// Write operations.
    pub operations: u64,
}

/// A disk that is not backed up, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SkippedDisk {
    /// Target name.
    pub target: String,
    /// Why.
    pub reason: SkipReason,
}

/// Why a disk is never part of a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SkipReason {
    /// A CD-ROM drive.
    Cdrom,
    /// A floppy drive.
    Floppy,
    /// A drive without a medium.
    Empty,
    /// Shared with other VMs while it is written: no single point in time.
    Shareable,
    /// Its content is thrown away at shutdown.
    Transient,
    /// Read-only for the guest.
    ReadOnly,
    /// A device QEMU passes through without a block layer (lun, vhost-user, NVMe).
    PassedThrough,
}

/// A checkpoint record of the hypervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointFacts {
    /// Its name as found.
    pub name: String,
    /// The mark it belongs to, if its name is one of Highwater's.
    pub mark: Option<MarkName>,
    /// The nonce in its description, if there is one.
    pub nonce: Option<Nonce>,
    /// Creation time, seconds since the epoch.
    pub created_s: Option<i64>,
    /// Targets of the disks that have a bitmap in it.
    pub disks: Vec<String>,
}

/// A job that runs on the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum JobFacts {
    /// A backup job that a Highwater session began.
    Ours(SessionId),
    /// A backup job that somebody else began, and where its data go: nothing
    /// else tells whose it is.
    ForeignBackup(Option<String>),
    /// A backup job that the hypervisor lost when it died, and believes in as
    /// long as this process runs: nobody can end it.
    Forgotten,
    /// Another kind of job (the hypervisor's word for it).
    Other(String),
}

/// Which process runs the VM: two observations with equal identities saw the
/// same QEMU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since boot (`/proc/PID/stat`, field 22).
    pub start_ticks: u64,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
}

/// A file a restore needs beside the disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirmwareFile {
    /// What it is for.
    pub role: FirmwareRole,
    /// Where it lies on the host.
    pub path: PathBuf,
}

/// What a firmware file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FirmwareRole {
    /// UEFI code.
    Loader,
    /// UEFI variables.
    Nvram,
    /// Kernel for direct boot.
    Kernel,
    /// Initial RAM disk for direct boot.
    Initrd,
}
