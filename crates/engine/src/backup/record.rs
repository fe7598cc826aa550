//! Writes down what was done: the manifest, and the words in it.

use std::collections::BTreeSet;
use std::time::Duration;

use highwater_hypervisor::{Consistency, DiskFacts, DiskSource, SkipReason, VmFacts};
use highwater_plan::{DiskPlan, HotChunk, Why, next_hot};
use highwater_repo::{
    DiskRecord, Evidence, EvidenceLink, Manifest, MarkRecord, Origin, SavedFile, SkippedRecord,
};

use super::copy::{Copied, DiskCopied};
use super::observe::{History, PlannedDisk};
use super::{Begin, Job};

/// QEMU shows a raw file in whole sectors.
const SECTOR_BYTES: u64 = 512;

/// Everything a manifest is made of.
pub(super) struct Parts<'a> {
    pub(super) job: &'a Job<'a>,
    pub(super) facts: &'a VmFacts,
    pub(super) history: &'a History,
    pub(super) planned: &'a [PlannedDisk],
    pub(super) copied: &'a [DiskCopied],
    pub(super) session: &'a Begin,
    pub(super) files: Vec<SavedFile>,
    pub(super) elapsed: Duration,
}

/// Makes the manifest of the disks that were read whole.
pub(super) fn manifest(parts: &Parts<'_>) -> Manifest {
    let Parts {
        job,
        facts,
        history,
        planned,
        copied,
        session,
        ..
    } = parts;
    let now = job.context.clock.now();
    let disks: Vec<DiskRecord> = planned
        .iter()
        .filter_map(|disk| {
            let copied = copied
                .iter()
                .find(|copied| copied.target == disk.facts.target)?;
            let outcome = copied.result.as_ref().ok()?;
            let plan = &carried_out(disk, outcome);
            Some(DiskRecord {
                target: disk.facts.target.clone(),
                mode: mode_word(plan).to_owned(),
                reason: reason(plan).map(|why| why.word().to_owned()),
                parent: parent(plan),
                image: outcome.image,
                file_bytes: odd_length(&disk.facts, outcome.image.size_bytes),
                format: disk.facts.format.clone(),
                source: source_text(&disk.facts.source),
                dirty_bytes: outcome.dirty_bytes,
                read_bytes: outcome.read_bytes,
                stored_bytes: outcome.stored_bytes,
                audited_blocks: outcome.audited.blocks,
                marked: disk.takes_mark(job.options.level) && got_mark(session, disk),
                evidence: evidence(parts, disk, outcome),
            })
        })
        .collect();
    let marked: Vec<String> = disks
        .iter()
        .filter(|disk| disk.marked)
        .map(|disk| disk.target.clone())
        .collect();
    let mark = session
        .order
        .new_mark
        .as_ref()
        .filter(|_| !marked.is_empty())
        .map(|mark| MarkRecord {
            name: mark.name.clone(),
            nonce: mark.nonce,
            created_s: session.begun.mark_created_s,
            disks: marked.clone(),
        });
    Manifest {
        version: 1,
        point: job.point,
        vm: job.identity(),
        sequence: history
            .newest
            .map_or(1, |(_, sequence)| sequence.saturating_add(1)),
        prev: history.newest.map(|(point, _)| point),
        taken_at: session.begun.taken_at,
        utc_offset_minutes: job.options.utc_offset_minutes,
        committed_at: now,
        consistency: consistency_word(session.begun.consistency).to_owned(),
        level: job.options.level.word().to_owned(),
        origin: Origin {
            host: job.options.host.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            hypervisor: facts.versions.clone(),
        },
        definition: facts.definition.clone(),
        definition_at: job.observed_at,
        files: parts.files.clone(),
        disks,
        skipped: skipped(facts, history, planned, copied),
        mark,
        healed: job.healed.clone(),
        warnings: job.warnings.clone(),
        tags: job.options.tags.clone(),
        group: job.options.group.clone(),
        duration_ms: u64::try_from(parts.elapsed.as_millis()).unwrap_or(u64::MAX),
        prune_epoch: 0,
    }
}

/// Whether the disk got the new mark: an image that others read cannot take one.
fn got_mark(session: &Begin, disk: &PlannedDisk) -> bool {
    let mut begun = session.begun.disks.iter();
    begun.any(|it| it.target == disk.facts.target && it.granularity.is_some())
}

/// The length of a raw file that is no multiple of QEMU's sector. Any other
/// difference (a slice of a file, a file that somebody cut) is none that a
/// restore may cut the disk by.
fn odd_length(disk: &DiskFacts, size_bytes: u64) -> Option<u64> {
    let is_padded = |bytes: &u64| (1..SECTOR_BYTES).contains(&size_bytes.saturating_sub(*bytes));
    disk.file_bytes
        .filter(|_| disk.format == "raw")
        .filter(is_padded)
}

/// Why a disk of the point before is not in this one: it was taken out of the VM.
const GONE: &str = "no longer part of the VM";

/// Returns the disks that the VM had when this point was taken.
pub(super) fn disks_of(manifest: &Manifest) -> BTreeSet<String> {
    let backed_up = manifest.disks.iter().map(|disk| &disk.target);
    let skipped = manifest.skipped.iter();
    let skipped = skipped.filter(|disk| disk.reason != GONE);
    backed_up
        .chain(skipped.map(|disk| &disk.target))
        .cloned()
        .collect()
}

fn skipped(
    facts: &VmFacts,
    history: &History,
    planned: &[PlannedDisk],
    copied: &[DiskCopied],
) -> Vec<SkippedRecord> {
    let record = |target: &str, reason: &str| SkippedRecord {
        target: target.to_owned(),
        reason: reason.to_owned(),
    };
    let unfit = facts
        .skipped
        .iter()
        .map(|disk| record(&disk.target, skip_word(disk.reason)));
    let unwanted = facts
        .disks
        .iter()
        .filter(|disk| {
            planned
                .iter()
                .all(|planned| planned.facts.target != disk.target)
        })
        .map(|disk| record(&disk.target, "left out by the user"));
    let failed = copied
        .iter()
        .filter(|disk| disk.result.is_err())
        .map(|disk| record(&disk.target, "could not be read"));
    let gone = history
        .newest_disks
        .iter()
        .filter(|target| {
            facts.disks.iter().all(|disk| disk.target != **target)
                && facts.skipped.iter().all(|disk| disk.target != **target)
        })
        .map(|target| record(target, GONE));
    unfit.chain(unwanted).chain(failed).chain(gone).collect()
}

/// The plan as it was carried out: an audit may have turned it into a rescan.
fn carried_out(disk: &PlannedDisk, copied: &Copied) -> DiskPlan {
    let rescan = copied.audited.rescan.as_ref();
    rescan.map_or_else(|| disk.plan.clone(), |rescan| DiskPlan::Rescan(rescan.why))
}

fn evidence(parts: &Parts<'_>, planned: &PlannedDisk, copied: &Copied) -> Evidence {
    let disk = &planned.facts;
    let size_bytes = copied.image.size_bytes;
    let mut begun = parts.session.begun.disks.iter();
    let begun = begun.find(|it| it.target == disk.target);
    Evidence {
        serial: disk.serial.clone(),
        device: disk.device.clone(),
        device_unknown: !disk.device_known,
        chain: disk
            .chain
            .iter()
            .map(|link| EvidenceLink {
                name: link.name.clone(),
                format: link.format.clone(),
                inode: link.inode,
                stamp: link.stamp(),
            })
            .collect(),
        granularity: begun.and_then(|begun| begun.granularity),
        process: parts
            .facts
            .process
            .as_ref()
            .map(|process| (process.pid, process.start_ticks, process.boot_id.clone())),
        // Those of after the point: the observed ones of before lack writes
        // that are in this point, and not in its mark's bitmap.
        counters: begun
            .and_then(|begun| begun.counters)
            .map(|counters| (counters.bytes, counters.operations)),
        smallest_size_bytes: parts
            .history
            .smallest
            .get(&disk.target)
            .map_or(size_bytes, |smallest| size_bytes.min(*smallest)),
        hot: hot(planned, copied),
    }
}

/// Returns the blocks that the next audit looks at first. Only an increment
/// learns what is dirty in it; the others keep what is known.
fn hot(planned: &PlannedDisk, copied: &Copied) -> Vec<(u64, u32)> {
    let plain = |hot: &HotChunk| (hot.chunk, hot.score);
    match carried_out(planned, copied) {
        DiskPlan::Incremental { .. } => next_hot(&planned.hot, &copied.sample)
            .iter()
            .map(plain)
            .collect(),
        DiskPlan::Differential { .. }
        | DiskPlan::Rescan(_)
        | DiskPlan::Full(_)
        | DiskPlan::Copy
        | DiskPlan::Refuse(_) => planned.hot.iter().map(plain).collect(),
    }
}

fn source_text(source: &DiskSource) -> String {
    match source {
        DiskSource::File(path) | DiskSource::Block(path) => path.to_string_lossy().into_owned(),
        DiskSource::Volume { pool, volume, path } => path.as_ref().map_or_else(
            || format!("{pool}/{volume}"),
            |path| path.to_string_lossy().into_owned(),
        ),
        DiskSource::Network(text) => text.clone(),
    }
}

/// Returns the mode word of JSON and manifest.
pub(super) const fn mode_word(plan: &DiskPlan) -> &'static str {
    match plan {
        DiskPlan::Incremental { .. } => "incremental",
        DiskPlan::Differential { .. } => "differential",
        DiskPlan::Full(_) => "full",
        DiskPlan::Rescan(_) => "rescan",
        DiskPlan::Copy => "copy",
        DiskPlan::Refuse(_) => "refused",
    }
}

const fn reason(plan: &DiskPlan) -> Option<Why> {
    match plan {
        DiskPlan::Full(why) => *why,
        DiskPlan::Rescan(why) => Some(*why),
        DiskPlan::Incremental { .. }
        | DiskPlan::Differential { .. }
        | DiskPlan::Copy
        | DiskPlan::Refuse(_) => None,
    }
}

/// Returns the reason of a plan as JSON and manifest tell it.
pub(super) fn reason_word(plan: &DiskPlan) -> Option<&'static str> {
    reason(plan).map(Why::word)
}

/// Returns the reason of a plan as a person reads it.
pub(super) fn reason_sentence(plan: &DiskPlan) -> Option<&'static str> {
    reason(plan).map(Why::sentence)
}

const fn parent(plan: &DiskPlan) -> Option<highwater_model::PointId> {
    match plan {
        DiskPlan::Incremental { parent, .. } | DiskPlan::Differential { parent, .. } => {
            Some(*parent)
        }
        DiskPlan::Full(_) | DiskPlan::Rescan(_) | DiskPlan::Copy | DiskPlan::Refuse(_) => None,
    }
}

const fn consistency_word(consistency: Consistency) -> &'static str {
    match consistency {
        Consistency::Filesystem => "filesystem",
        Consistency::Crash => "crash",
        Consistency::Offline => "offline",
        Consistency::Paused => "paused",
    }
}

/// Returns why a disk is never part of a backup, as a person reads it.
pub(super) const fn skip_word(reason: SkipReason) -> &'static str {
    match reason {
        SkipReason::Cdrom => "a CD-ROM drive",
        SkipReason::Floppy => "a floppy drive",
        SkipReason::Empty => "a drive without a medium",
        SkipReason::Shareable => "shared with other VMs, so it has no single point in time",
        SkipReason::Transient => "transient: its content is thrown away at shutdown",
        SkipReason::ReadOnly => "read-only for the guest",
        SkipReason::PassedThrough => "passed through to the guest without a block layer",
    }
}
