//! What a backup would do: the same facts and the same plan, and nothing is
//! touched: no lock, no job, no mark, nothing tidied, nothing stored.

use std::os::unix::fs::MetadataExt as _;

use highwater_hypervisor::{ChainLink, CheckpointFacts, VmFacts};
use highwater_model::PointId;
use highwater_plan::{DiskPlan, VmGate, gate};

use super::observe::{self, PlannedDisk};
use super::outlook::without_our_session;
use super::settle::{Tidying, words};
use super::{BackupContext, BackupError, BackupOptions, Job, record};
use crate::Event;

/// What a backup of one VM would do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Estimate {
    /// VM name.
    pub vm: String,
    /// VM UUID.
    pub vm_uuid: Option<String>,
    /// The disks.
    pub disks: Vec<DiskEstimate>,
    /// Whether less is dirty than the threshold, so that no point would be made.
    pub below_threshold: bool,
    /// What would be tidied first.
    pub would_heal: Vec<String>,
}

/// What a backup would read of one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskEstimate {
    /// Target name.
    pub disk: String,
    /// Mode word.
    pub mode: &'static str,
    /// Named reason.
    pub reason: Option<&'static str>,
    /// The same as a sentence.
    pub sentence: Option<&'static str>,
    /// Size, bytes.
    pub size_bytes: u64,
    /// Bytes to look at: what the bitmap calls dirty, or all of the disk.
    pub dirty_bytes: u64,
    /// Bytes to read, at most: holes that are known are left out.
    pub read_bytes: u64,
}

/// Tells what [`backup`](super::backup) would do now.
///
/// Fails where it would fail. A session of ours that holds the VM at the
/// moment is taken for ended, because a backup waits for it or ends it.
pub fn estimate(
    context: &BackupContext<'_>,
    vm_name: &str,
    options: &BackupOptions,
) -> Result<Estimate, BackupError> {
    let vm = context
        .guard
        .find(vm_name)
        .map_err(|source| BackupError::observe(vm_name, source))?;
    context.observer.event(&Event::Started { vm: &vm.name });
    let now = context.clock.now();
    let mut job = Job {
        context,
        options,
        vm: &vm,
        point: PointId::new(now),
        healed: Vec::new(),
        warnings: Vec::new(),
        observed_at: now,
        started_vm: false,
    };
    let mut facts = job.observe()?;
    let mut would_heal = Vec::new();
    match gate(
        observe::vm_state(&facts, options),
        observe::job_view(&facts),
    ) {
        VmGate::Open => {}
        VmGate::EndLeftoverFirst(session) => {
            would_heal.push(format!("wait for session {session}, or end what it left"));
            without_our_session(&mut facts);
        }
        VmGate::Busy => return Err(job.busy(&facts)),
        VmGate::WrongState => return Err(job.wrong_state(&facts)),
    }
    // The gate again: without our job the VM may be stuck for another reason.
    if let VmGate::WrongState = gate(
        observe::vm_state(&facts, options),
        observe::job_view(&facts),
    ) {
        return Err(job.wrong_state(&facts));
    }
    would_heal.extend(job.left_directories()?);
    let history = job.history(&facts)?;
    let tidying = Tidying::of(context.repo.id(), &facts, &history);
    foresee(tidying, &mut facts, &mut would_heal);
    job.check_wanted_disks(&facts)?;
    let planned = observe::plan_disks(context.repo, options, &facts, &history);
    job.tell_plan(&facts, &planned)?;
    Ok(Estimate {
        vm: vm.name.clone(),
        vm_uuid: vm.uuid.clone(),
        below_threshold: is_below(&planned, options.threshold),
        disks: planned.iter().map(disk_estimate).collect(),
        would_heal,
    })
}

/// Shows the facts as they would be after the tidying.
pub(super) fn foresee(tidying: Tidying, facts: &mut VmFacts, would_heal: &mut Vec<String>) {
    for mark in tidying.unfinished {
        would_heal.push(words::remove_unfinished(&mark));
    }
    for mark in tidying.forgotten {
        would_heal.push(words::tell_again(&mark.name));
        facts.checkpoints.push(CheckpointFacts {
            name: mark.name.to_string(),
            mark: Some(mark.name),
            nonce: Some(mark.nonce),
            created_s: Some(mark.created_s),
            disks: mark.disks,
        });
    }
}

pub(super) fn disk_estimate(disk: &PlannedDisk) -> DiskEstimate {
    let dirty_bytes = dirty_bytes(disk);
    DiskEstimate {
        disk: disk.facts.target.clone(),
        mode: record::mode_word(&disk.plan),
        reason: record::reason_word(&disk.plan),
        sentence: record::reason_sentence(&disk.plan),
        size_bytes: disk.facts.size_bytes,
        dirty_bytes,
        read_bytes: allocated_bytes(&disk.facts.chain)
            .map_or(dirty_bytes, |allocated| allocated.min(dirty_bytes)),
    }
}

/// Returns whether less is dirty than the threshold, on all disks together.
/// Where a disk has to be read as a whole nobody knows how much changed.
pub(super) fn is_below(planned: &[PlannedDisk], threshold: Option<u64>) -> bool {
    let knows = |disk: &PlannedDisk| {
        matches!(
            disk.plan,
            DiskPlan::Incremental { .. } | DiskPlan::Differential { .. }
        )
    };
    let dirty = planned.iter().map(dirty_bytes).fold(0, u64::saturating_add);
    threshold.is_some_and(|threshold| planned.iter().all(knows) && dirty < threshold)
}

/// Returns the bytes a backup has to look at. With bitmaps on several images
/// of a chain it is their sum, which may count a range twice, never too little.
pub(super) fn dirty_bytes(disk: &PlannedDisk) -> u64 {
    let size = disk.facts.size_bytes;
    let (DiskPlan::Incremental {
        since, tail_from, ..
    }
    | DiskPlan::Differential {
        since, tail_from, ..
    }) = &disk.plan
    else {
        return size;
    };
    let name = since.to_string();
    let bitmaps = disk.facts.bitmaps.iter().filter(|it| it.name == name);
    let dirty = bitmaps
        .map(|bitmap| bitmap.dirty_bytes)
        .fold(0, u64::saturating_add);
    let tail = tail_from.map_or(0, |from| size.saturating_sub(from));
    dirty.saturating_add(tail).min(size)
}

/// Returns the bytes that the image files of a chain occupy, if they are all
/// local files. An encrypted or preallocated image occupies all it can.
fn allocated_bytes(chain: &[ChainLink]) -> Option<u64> {
    let sizes = chain.iter().map(|link| {
        link.inode?;
        let about = std::fs::metadata(&link.name).ok()?;
        about.is_file().then(|| about.blocks().saturating_mul(512))
    });
    let all: Vec<u64> = sizes.collect::<Option<_>>()?;
    (!all.is_empty()).then(|| all.into_iter().fold(0, u64::saturating_add))
}
