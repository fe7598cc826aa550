//! Turns what guard and repository report into what the planner asks for.

use std::collections::{BTreeMap, BTreeSet};

use highwater_hypervisor::{
    BitmapFacts, DiskFacts, JobFacts, MarkSupport, NoMarks, Place, RootNode, RunState, VmFacts,
    WriteErrorPolicy,
};
use highwater_model::{MarkName, PointId};
use highwater_plan::{
    self as plan, BitmapView, Counted, DiskPlan, DiskView, HOT_MAX, HotChunk, Identity, ImageLink,
    JobView, Level, Origin, ParentView, Record, Refusal, RootView, Unfit, VmState, Why,
    WritesSince, plan_disk,
};
use highwater_repo::{
    DiskRecord, EvidenceLink, ImageRoot, Manifest, MarkRecord, RepoError, RepoErrorKind,
    Repository, VmIdentity,
};

use super::{BackupOptions, Offline, record};

/// What the repository holds of this VM, as far as this backup needs it.
#[derive(Debug, Default)]
pub(super) struct History {
    /// All points that exist.
    pub(super) committed: BTreeSet<PointId>,
    /// The newest readable one, and its number.
    pub(super) newest: Option<(PointId, u64)>,
    /// Disks that the VM had then, backed up or not.
    pub(super) newest_disks: BTreeSet<String>,
    /// The parent of each disk: the newest readable point whose mark is on it.
    pub(super) parents: BTreeMap<String, ParentRecord>,
    /// Smallest size each disk was ever seen with, bytes.
    pub(super) smallest: BTreeMap<String, u64>,
    /// Disks whose parent's mark a later backup found lying.
    pub(super) lied: BTreeSet<String>,
    /// Disks that are in some point.
    seen: BTreeSet<String>,
    /// Points whose manifest cannot be read, and why.
    pub(super) unreadable: Vec<(PointId, RepoError)>,
}

/// A disk's parent as the manifest tells it.
#[derive(Debug, Clone)]
pub(super) struct ParentRecord {
    pub(super) point: PointId,
    pub(super) mark: MarkRecord,
    pub(super) disk: DiskRecord,
}

impl History {
    /// Reads manifests from the newest on until the parent of every disk that
    /// needs one is known, so that the cost does not grow with the number of points.
    pub(super) fn load(
        repo: &Repository,
        vm: &VmIdentity,
        facts: &VmFacts,
        is_wanted: &dyn Fn(&str) -> bool,
    ) -> Result<Self, RepoError> {
        let mut history = Self::default();
        let points = repo.point_ids(vm)?;
        history.committed = points.iter().copied().collect();
        // A disk that is left out needs a parent only as long as it has a mark
        // to be kept; without this, one that was never backed up would have
        // every manifest read, each time.
        let needs_parent = |disk: &&DiskFacts| is_wanted(&disk.target) || has_mark_of(disk, repo);
        let disks: Vec<&DiskFacts> = facts.disks.iter().filter(needs_parent).collect();
        for point in points.into_iter().rev() {
            if history.newest.is_some() && disks.iter().all(|disk| history.settles(disk)) {
                break;
            }
            // A manifest that cannot be read proves nothing, so it is nobody's
            // parent.
            match repo.manifest(vm, point) {
                Ok(manifest) => history.take(point, &manifest),
                Err(error)
                    if matches!(
                        error.kind(),
                        RepoErrorKind::Damaged | RepoErrorKind::NewerFormat
                    ) =>
                {
                    history.unreadable.push((point, error));
                }
                // A store that does not answer says nothing about the
                // manifest: going on would give up marks that are needed.
                Err(error) => return Err(error),
            }
        }
        Ok(history)
    }

    fn settles(&self, disk: &DiskFacts) -> bool {
        let seen = self.seen.contains(&disk.target);
        self.parents.contains_key(&disk.target) || (seen && !can_be_marked(disk))
    }

    fn take(&mut self, point: PointId, manifest: &Manifest) {
        if self.newest.is_none() {
            self.newest = Some((point, manifest.sequence));
            self.newest_disks = record::disks_of(manifest);
        }
        for disk in &manifest.disks {
            if self.seen.insert(disk.target.clone()) {
                self.smallest
                    .insert(disk.target.clone(), disk.evidence.smallest_size_bytes);
            }
            let Some(mark) = manifest.mark.as_ref().filter(|_| disk.marked) else {
                // It could leave no mark of its own to take the liar's place.
                let lied = disk.reason.as_deref() == Some(Why::BitmapLied.word());
                if lied && !self.parents.contains_key(&disk.target) {
                    self.lied.insert(disk.target.clone());
                }
                continue;
            };
            self.parents
                .entry(disk.target.clone())
                .or_insert_with(|| ParentRecord {
                    point,
                    mark: mark.clone(),
                    disk: disk.clone(),
                });
        }
    }

    fn of_disk(&self, target: &str) -> plan::History {
        if self.seen.contains(target) {
            plan::History::ThisDisk
        } else if self.committed.is_empty() {
            plan::History::Nothing
        } else {
            plan::History::OtherDisks
        }
    }
}

/// One disk with its plan.
#[derive(Debug)]
pub(super) struct PlannedDisk {
    pub(super) facts: DiskFacts,
    pub(super) plan: DiskPlan,
    /// The tree an increment is built on.
    pub(super) parent_image: Option<ImageRoot>,
    /// What the guest wrote most often before.
    pub(super) hot: Vec<HotChunk>,
    /// The smallest size the disk was ever seen with.
    pub(super) smallest_bytes: u64,
}

impl PlannedDisk {
    /// Returns whether the tree of the point before was found damaged.
    pub(super) fn has_damaged_parent(&self) -> bool {
        self.plan == DiskPlan::Rescan(Why::ParentDamaged)
    }

    /// Returns whether this backup leaves its mark on the disk.
    pub(super) fn takes_mark(&self, level: Level) -> bool {
        level.leaves_a_mark() && can_be_marked(&self.facts)
    }
}

/// Returns the disks whose bitmap is known to lie before anything is read.
pub(super) fn proven_liars(planned: &[PlannedDisk]) -> BTreeSet<String> {
    let lied = |disk: &&PlannedDisk| {
        matches!(
            disk.plan,
            DiskPlan::Rescan(Why::BitmapLied)
                | DiskPlan::Refuse(Refusal::NoIncrement(Why::BitmapLied))
        )
    };
    let liars = planned.iter().filter(lied);
    liars.map(|disk| disk.facts.target.clone()).collect()
}

/// Returns whether a mark can live on a disk, if only for a while.
const fn can_be_marked(disk: &DiskFacts) -> bool {
    match disk.marks {
        MarkSupport::Yes | MarkSupport::WhileRunning(_) => true,
        MarkSupport::No(_) => false,
    }
}

const fn unfit(why: NoMarks) -> Unfit {
    match why {
        NoMarks::NotQcow2 => Unfit::NotQcow2,
        NoMarks::Qcow2Version2 => Unfit::Qcow2Version2,
    }
}

fn has_mark_of(disk: &DiskFacts, repo: &Repository) -> bool {
    let name = |bitmap: &BitmapFacts| bitmap.name.parse::<MarkName>();
    let mut marks = disk.bitmaps.iter().filter_map(|bitmap| name(bitmap).ok());
    marks.any(|mark| mark.is_of(repo.id()))
}

/// Returns whether the user wants this disk.
pub(super) fn is_wanted(options: &BackupOptions, target: &str) -> bool {
    let is_in = |list: &[String]| list.iter().any(|it| it == target);
    (options.only_disks.is_empty() || is_in(&options.only_disks)) && !is_in(&options.without_disks)
}

/// Plans every disk the user wants.
pub(super) fn plan_disks(
    repo: &Repository,
    options: &BackupOptions,
    facts: &VmFacts,
    history: &History,
) -> Vec<PlannedDisk> {
    let wanted = |disk: &&DiskFacts| is_wanted(options, &disk.target);
    facts
        .disks
        .iter()
        .filter(wanted)
        .map(|disk| {
            let parent = history.parents.get(&disk.target);
            let view = disk_view(disk, facts, parent);
            let mark_lied = history.lied.contains(&disk.target);
            let parent_view = parent.map(|parent| parent_view(repo, parent, mark_lied));
            let plan = plan_disk(
                options.level,
                history.of_disk(&disk.target),
                &view,
                parent_view.as_ref(),
            );
            let parent_image = match &plan {
                DiskPlan::Incremental { .. } | DiskPlan::Differential { .. } => {
                    parent.map(|parent| parent.disk.image)
                }
                DiskPlan::Full(_) | DiskPlan::Rescan(_) | DiskPlan::Copy | DiskPlan::Refuse(_) => {
                    None
                }
            };
            PlannedDisk {
                facts: disk.clone(),
                plan,
                parent_image,
                hot: parent.map(hot_chunks).unwrap_or_default(),
                smallest_bytes: history
                    .smallest
                    .get(&disk.target)
                    .copied()
                    .unwrap_or(u64::MAX),
            }
        })
        .collect()
}

fn disk_view(disk: &DiskFacts, vm: &VmFacts, parent: Option<&ParentRecord>) -> DiskView {
    DiskView {
        size_bytes: disk.size_bytes,
        identity: identity(disk),
        place: match disk.chain.first().map(|top| top.place) {
            Some(Place::Network) => plan::Place::Network,
            Some(Place::Host) | None => plan::Place::Host,
        },
        marks: match disk.marks {
            MarkSupport::Yes => plan::MarkSupport::Yes,
            MarkSupport::WhileRunning(why) => plan::MarkSupport::WhileRunning(unfit(why)),
            MarkSupport::No(why) => plan::MarkSupport::No(unfit(why)),
        },
        bitmap: parent.map_or(BitmapView::Missing, |parent| {
            bitmap_view(disk, &parent.mark.name)
        }),
        record: parent.map_or(Record::Forgotten, |parent| {
            match record_view(vm, &parent.mark) {
                Record::Proven => match origin(disk, vm, parent) {
                    Origin::Mark => Record::Proven,
                    Origin::Unknown => Record::Unidentified,
                    Origin::Another => Record::Remade,
                },
                found => found,
            }
        }),
        root: match &disk.root_node {
            RootNode::Same => RootView::Same,
            RootNode::Differs { .. } => RootView::Differs,
            RootNode::Unknown(_) => RootView::Unknown,
        },
        writes: parent.and_then(|parent| writes_since(disk, vm, parent)),
    }
}

/// Compares what was counted when the parent was taken with what is now.
fn writes_since(disk: &DiskFacts, vm: &VmFacts, parent: &ParentRecord) -> Option<WritesSince> {
    // A write that failed in silence is counted, and may have dirtied nothing.
    if disk.write_errors == WriteErrorPolicy::Ignore {
        return None;
    }
    let evidence = &parent.disk.evidence;
    let (bytes, operations) = evidence.counters?;
    let then = Counted {
        process: evidence.process.clone()?,
        bytes,
        operations,
    };
    let process = vm.process.as_ref()?;
    let counters = disk.counters?;
    let now = Counted {
        process: (process.pid, process.start_ticks, process.boot_id.clone()),
        bytes: counters.bytes,
        operations: counters.operations,
    };
    let name = parent.mark.name.to_string();
    let bitmaps = disk.bitmaps.iter().filter(|bitmap| bitmap.name == name);
    let dirty = bitmaps.map(|bitmap| bitmap.dirty_bytes);
    WritesSince::between(&then, &now, dirty.fold(0, u64::saturating_add))
}

fn hot_chunks(parent: &ParentRecord) -> Vec<HotChunk> {
    let hot = parent.disk.evidence.hot.iter().take(HOT_MAX);
    hot.map(|(chunk, score)| HotChunk {
        chunk: *chunk,
        score: *score,
    })
    .collect()
}

fn identity(disk: &DiskFacts) -> Identity {
    Identity {
        serial: disk.serial.clone(),
        device: disk.device.clone(),
        device_unknown: !disk.device_known,
        chain: disk
            .chain
            .iter()
            .map(|link| ImageLink {
                name: link.name.clone(),
                format: link.format.clone(),
                inode: link.inode,
                stamp: link.stamp(),
            })
            .collect(),
    }
}

/// The worst state of any bitmap of that name on the disk's chain; missing
/// unless the topmost image, where the guest writes, carries one.
pub(super) fn bitmap_view(disk: &DiskFacts, mark: &MarkName) -> BitmapView {
    let name = mark.to_string();
    let top = disk.chain.first().and_then(|link| link.node.as_deref());
    let bitmaps: Vec<&BitmapFacts> = disk.bitmaps.iter().filter(|it| it.name == name).collect();
    let on_top = bitmaps
        .iter()
        .find(|it| top.is_none_or(|top| it.node == top));
    let Some(on_top) = on_top else {
        return BitmapView::Missing;
    };
    let any = |bad: fn(&BitmapFacts) -> bool| bitmaps.iter().any(|it| bad(it));
    if any(|it| it.inconsistent) {
        BitmapView::Inconsistent
    } else if any(|it| it.busy) {
        BitmapView::Busy
    } else if any(|it| !it.recording) {
        BitmapView::NotRecording
    } else if disk.marks == MarkSupport::Yes && any(|it| !it.persistent) {
        BitmapView::NotPersistent
    } else {
        BitmapView::Recording {
            granularity: on_top.granularity,
        }
    }
}

/// Says whether the bitmaps of a mark are those that were made with it; the
/// worst of them counts.
fn origin(disk: &DiskFacts, vm: &VmFacts, parent: &ParentRecord) -> Origin {
    let name = parent.mark.name.to_string();
    let held_by = vm
        .process
        .as_ref()
        .map(|process| (process.pid, process.start_ticks, process.boot_id.clone()));
    let made_by = parent.disk.evidence.process.as_ref();
    let bitmaps = disk.bitmaps.iter().filter(|it| it.name == name);
    bitmaps
        .map(|it| plan::origin(made_by, held_by.as_ref(), it.in_image))
        .max()
        .unwrap_or(Origin::Mark)
}

/// Compares the hypervisor's record of a mark with the manifest's.
pub(super) fn record_view(vm: &VmFacts, mark: &MarkRecord) -> Record {
    let found = vm
        .checkpoints
        .iter()
        .find(|it| it.mark.as_ref() == Some(&mark.name));
    match found {
        // Then the bitmap alone is the mark, under a name that was used once.
        None if !vm.expects_records => Record::Proven,
        None => Record::Forgotten,
        Some(found) if found.nonce != Some(mark.nonce) => Record::Remade,
        Some(found) if mark.created_s.is_some() && found.created_s != mark.created_s => {
            Record::Remade
        }
        Some(_) => Record::Proven,
    }
}

fn parent_view(repo: &Repository, parent: &ParentRecord, mark_lied: bool) -> ParentView {
    let evidence = &parent.disk.evidence;
    ParentView {
        point: parent.point,
        mark: parent.mark.name.clone(),
        size_bytes: parent.disk.image.size_bytes,
        identity: Identity {
            serial: evidence.serial.clone(),
            device: evidence.device.clone(),
            device_unknown: evidence.device_unknown,
            chain: evidence.chain.iter().map(image_link).collect(),
        },
        granularity: evidence.granularity,
        same_chunk_size: parent.disk.image.chunk_bytes == repo.chunk_size(),
        mark_lied,
        tree_is_readable: tree_is_readable(repo, &parent.disk.image),
    }
}

fn image_link(link: &EvidenceLink) -> ImageLink {
    ImageLink {
        name: link.name.clone(),
        format: link.format.clone(),
        inode: link.inode,
        stamp: link.stamp,
    }
}

fn tree_is_readable(repo: &Repository, image: &ImageRoot) -> bool {
    repo.image(image)
        .is_ok_and(|reader| reader.chunks().next().is_none_or(|first| first.is_ok()))
}

/// Whether and how the VM runs, for the gate.
pub(super) fn vm_state(facts: &VmFacts, options: &BackupOptions) -> VmState {
    match facts.run_state {
        RunState::Off if options.offline != Offline::Refuse => VmState::AtRest,
        RunState::Running | RunState::Paused => VmState::Alive,
        RunState::PausedOnError => VmState::Stuck,
        RunState::Off => VmState::Off,
        RunState::NotResumed | RunState::Other => VmState::Other,
    }
}

/// Whose job runs, for the gate.
pub(super) const fn job_view(facts: &VmFacts) -> JobView {
    match &facts.job {
        None => JobView::None,
        Some(JobFacts::Ours(session)) => JobView::Ours(*session),
        Some(JobFacts::ForeignBackup(_) | JobFacts::Forgotten | JobFacts::Other(_)) => {
            JobView::Foreign
        }
    }
}
