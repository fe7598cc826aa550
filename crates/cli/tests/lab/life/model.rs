//! What must be: disks, repositories, their points, and the state of the VM.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use highwater_model::step::Step;
use highwater_testkit::workload::Random;
use highwater_testkit::{DiskSpec, KIB, MIB};

use super::bytes::Bytes;

/// Disks in the order of the VM; the last one is on the SCSI bus and can be
/// taken out while the guest looks away.
pub(super) const DISKS: [&str; 3] = ["vda", "vdb", "sda"];
pub(super) const PLUGGED: usize = 2;
/// Larger than this they do not grow: a life is long.
pub(super) const SIZE_MAX: u64 = 32 * MIB;

/// What the VM does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Power {
    Running,
    Paused,
    Off,
}

impl Power {
    /// Returns libvirt's word.
    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Off => "shut off",
        }
    }
}

/// What a disk's image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Qcow2 { cluster: u64 },
    Subclusters,
    DataFile,
    Raw,
}

impl Kind {
    fn draw(random: &mut Random, kinds: &[Self]) -> Self {
        kinds[usize::try_from(random.below(kinds.len() as u64)).unwrap_or(0)]
    }

    pub(super) fn spec(self, target: &str, size_bytes: u64) -> DiskSpec {
        match self {
            Self::Qcow2 { cluster } => DiskSpec::qcow2(target, size_bytes).cluster(cluster),
            Self::Subclusters => DiskSpec::qcow2(target, size_bytes).extended_l2(),
            Self::DataFile => DiskSpec::qcow2(target, size_bytes).data_file(),
            Self::Raw => DiskSpec::raw(target, size_bytes),
        }
    }

    pub(super) const fn format(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 { .. } | Self::Subclusters | Self::DataFile => "qcow2",
        }
    }
}

#[derive(Debug)]
pub(super) struct Disk {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) bytes: Bytes,
    /// Images, the lowest one first. The guest writes to the last one.
    pub(super) chain: Vec<PathBuf>,
    pub(super) attached: bool,
    /// QEMU's death may take back what was written and not flushed.
    pub(super) unflushed: bool,
    /// An older copy of the image, and what it holds.
    pub(super) kept: Option<(PathBuf, Bytes)>,
    /// Repositories that have not seen that it became smaller. Growing again
    /// before they have is a lie, which only the audit may find.
    pub(super) shrunk_for: BTreeSet<usize>,
}

impl Disk {
    fn new(name: &'static str, kind: Kind, size_bytes: u64) -> Self {
        Self {
            name,
            kind,
            bytes: Bytes::zeroes(size_bytes),
            chain: Vec::new(),
            attached: true,
            unflushed: false,
            kept: None,
            shrunk_for: BTreeSet::new(),
        }
    }

    pub(super) fn is_tracked(&self) -> bool {
        self.kind != Kind::Raw
    }

    pub(super) fn may_have_internal_snapshots(&self) -> bool {
        self.is_tracked() && self.kind != Kind::DataFile && self.chain.len() == 1
    }

    pub(super) fn top(&self) -> &PathBuf {
        self.chain.last().expect("a disk has an image")
    }

    /// Whether a discarded range of 64 KiB reads as zeroes.
    pub(super) const fn may_discard(&self) -> bool {
        match self.kind {
            Kind::Qcow2 { cluster } => cluster <= 64 * KIB,
            Kind::Subclusters | Kind::Raw => true,
            // QEMU may leave the bytes in the file beside it.
            Kind::DataFile => false,
        }
    }
}

/// A restore point, and what each of its disks must hold.
#[derive(Debug)]
pub(super) struct Point {
    pub(super) id: String,
    pub(super) disks: BTreeMap<&'static str, Bytes>,
}

#[derive(Debug)]
pub(super) struct Repository {
    /// What every command that uses it is told.
    pub(super) options: Vec<String>,
    /// In the order in which they were found.
    pub(super) points: Vec<Point>,
    /// The newest point that left a mark on each disk.
    pub(super) needed: BTreeMap<&'static str, String>,
    /// Disks to whose marks nothing has happened since: the next backup of
    /// these is an increment, whoever died.
    pub(super) unbroken: BTreeSet<&'static str>,
    /// How the names of its marks begin.
    pub(super) prefix: Option<String>,
}

/// All that a life's tests know.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) disks: Vec<Disk>,
    pub(super) repositories: Vec<Repository>,
    pub(super) power: Power,
    /// A session without processes may hold the VM: libvirt lets nobody do
    /// much to it, until the next backup has ended it.
    pub(super) dead_session: bool,
    /// A backup waits.
    pub(super) held: bool,
    /// libvirtd died while a backup was under way. If that was within the
    /// start call, the VM has to be started anew first.
    pub(super) libvirtd_died: bool,
    /// Names of another tool's checkpoints.
    pub(super) theirs: Vec<String>,
}

impl Model {
    /// Draws the disks; images are filled in when they are there.
    pub(super) fn draw(random: &mut Random, repositories: [Vec<String>; 2]) -> Self {
        let qcow2 = |cluster| Kind::Qcow2 { cluster };
        let first = [
            qcow2(64 * KIB),
            qcow2(64 * KIB),
            qcow2(4 * KIB),
            qcow2(2 * MIB),
            Kind::Subclusters,
        ];
        let second = [qcow2(64 * KIB), qcow2(128 * KIB), Kind::DataFile, Kind::Raw];
        let kinds = [
            Kind::draw(random, &first),
            Kind::draw(random, &second),
            qcow2(64 * KIB),
        ];
        let sizes = [8 * MIB, 4 * MIB, 2 * MIB];
        let disks = DISKS.iter().zip(kinds).zip(sizes);
        let disks = disks.map(|((name, kind), least)| {
            // No multiple of anything but a sector.
            let size = least + random.below(8) * MIB + random.below(2) * 512 * random.below(200);
            Disk::new(name, kind, size)
        });
        Self {
            disks: disks.collect(),
            repositories: repositories
                .into_iter()
                .map(|options| Repository {
                    options,
                    points: Vec::new(),
                    needed: BTreeMap::new(),
                    unbroken: BTreeSet::new(),
                    prefix: None,
                })
                .collect(),
            power: Power::Running,
            dead_session: false,
            held: false,
            libvirtd_died: false,
            theirs: Vec::new(),
        }
    }

    /// Whether a discarded range reads as zeroes. QEMU passes no discard on to an
    /// image as long as a backup job looks at what is written.
    pub(super) const fn may_discard(&self) -> bool {
        !self.held && !self.dead_session
    }

    /// Something may have happened to every mark on a disk.
    pub(super) fn breaks(&mut self, disk: usize) {
        let name = self.disks[disk].name;
        for repository in &mut self.repositories {
            repository.unbroken.remove(name);
        }
    }

    /// Something may have happened to all marks.
    pub(super) fn breaks_all(&mut self) {
        for repository in &mut self.repositories {
            repository.unbroken.clear();
        }
    }

    pub(super) fn attached(&self) -> Vec<&'static str> {
        let attached = self.disks.iter().filter(|disk| disk.attached);
        attached.map(|disk| disk.name).collect()
    }

    /// Returns what these disks hold now.
    pub(super) fn content(&self, of: &[&str]) -> BTreeMap<&'static str, Bytes> {
        let disks = self.disks.iter().filter(|disk| of.contains(&disk.name));
        disks.map(|disk| (disk.name, disk.bytes.clone())).collect()
    }

    /// Takes note of a point that left its mark on these disks.
    pub(super) fn marked(&mut self, repository: usize, id: &str, disks: &[&str]) {
        for disk in &mut self.disks {
            if !disks.contains(&disk.name) {
                continue;
            }
            disk.shrunk_for.remove(&repository);
            let repository = &mut self.repositories[repository];
            if !disk.is_tracked() {
                continue;
            }
            repository.needed.insert(disk.name, id.to_lowercase());
            // Over a backing file, what marks of others need may make that
            // file another one; then the disk is read as a whole once more.
            if disk.chain.len() == 1 {
                repository.unbroken.insert(disk.name);
            } else {
                repository.unbroken.remove(disk.name);
            }
        }
    }
}

/// Says whether what the guest writes while a backup waits there belongs to
/// its point.
pub(super) fn is_before_the_point(step: Step) -> bool {
    let place = |step| Step::ALL.iter().position(|it| *it == step);
    place(step) < place(Step::Started)
}
