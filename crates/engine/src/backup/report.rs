//! What a backup did.

use std::time::Duration;

use highwater_hypervisor::VmRef;
use highwater_model::PointId;
use highwater_repo::Manifest;

use super::copy::DiskCopied;
use super::observe::PlannedDisk;
use super::{estimate, record};

/// What a backup that did not fail did.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// VM name.
    pub vm: String,
    /// VM UUID.
    pub vm_uuid: Option<String>,
    /// The point; `None` if too little had changed for one.
    pub point: Option<PointId>,
    /// Whether all disks are in it.
    pub status: Status,
    /// Consistency word; `None` without a point.
    pub consistency: Option<String>,
    /// The disks, failed ones included.
    pub disks: Vec<DiskReport>,
    /// What was tidied.
    pub healed: Vec<String>,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// Duration of the whole.
    pub elapsed: Duration,
}

/// What came of a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// A point with all disks.
    Ok,
    /// A point without the disks that could not be read.
    Partial,
    /// No point: less was dirty than the user's threshold. All marks stay, so
    /// that the next run sees the same and more.
    BelowThreshold,
}

/// What was done to one disk.
#[derive(Debug, Clone, PartialEq)]
pub struct DiskReport {
    /// Target name.
    pub disk: String,
    /// Mode word; `failed` if the disk is not in the point.
    pub mode: String,
    /// Named reason.
    pub reason: Option<String>,
    /// Size, bytes.
    pub size_bytes: u64,
    /// Bytes called dirty.
    pub dirty_bytes: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes stored.
    pub stored_bytes: u64,
    /// Blocks the bitmap called clean that were read again and compared.
    pub audited_blocks: u64,
    /// Root hash.
    pub root: Option<String>,
    /// How long reading it took.
    pub elapsed: Duration,
    /// Why it failed, outermost first.
    pub failure: Vec<String>,
}

pub(super) fn report(
    vm: &VmRef,
    manifest: &Manifest,
    copied: Vec<DiskCopied>,
    healed: Vec<String>,
    warnings: Vec<String>,
    elapsed: Duration,
) -> Report {
    let mut disks: Vec<DiskReport> = manifest
        .disks
        .iter()
        .map(|disk| DiskReport {
            disk: disk.target.clone(),
            mode: disk.mode.clone(),
            reason: disk.reason.clone(),
            size_bytes: disk.image.size_bytes,
            dirty_bytes: disk.dirty_bytes,
            read_bytes: disk.read_bytes,
            stored_bytes: disk.stored_bytes,
            audited_blocks: disk.audited_blocks,
            root: Some(disk.image.hash.to_string()),
            elapsed: copied
                .iter()
                .find(|copied| copied.target == disk.target)
                .map(|copied| copied.elapsed)
                .unwrap_or_default(),
            failure: Vec::new(),
        })
        .collect();
    for disk in copied {
        let Err(error) = disk.result else { continue };
        disks.push(DiskReport {
            disk: disk.target,
            mode: "failed".to_owned(),
            reason: None,
            size_bytes: disk.size_bytes,
            dirty_bytes: 0,
            read_bytes: 0,
            stored_bytes: 0,
            audited_blocks: 0,
            root: None,
            elapsed: disk.elapsed,
            failure: chain(&error),
        });
    }
    let failed = disks.iter().any(|disk| disk.root.is_none());
    Report {
        vm: vm.name.clone(),
        vm_uuid: vm.uuid.clone(),
        point: Some(manifest.point),
        status: if failed { Status::Partial } else { Status::Ok },
        consistency: Some(manifest.consistency.clone()),
        disks,
        healed,
        warnings,
        elapsed,
    }
}

/// Reports a backup that made no point because too little had changed.
pub(super) fn without_point(
    vm: &VmRef,
    planned: &[PlannedDisk],
    healed: Vec<String>,
    warnings: Vec<String>,
    elapsed: Duration,
) -> Report {
    let disk = |disk: &PlannedDisk| DiskReport {
        disk: disk.facts.target.clone(),
        mode: record::mode_word(&disk.plan).to_owned(),
        reason: None,
        size_bytes: disk.facts.size_bytes,
        dirty_bytes: estimate::dirty_bytes(disk),
        read_bytes: 0,
        stored_bytes: 0,
        audited_blocks: 0,
        root: None,
        elapsed: Duration::ZERO,
        failure: Vec::new(),
    };
    Report {
        vm: vm.name.clone(),
        vm_uuid: vm.uuid.clone(),
        point: None,
        status: Status::BelowThreshold,
        consistency: None,
        disks: planned.iter().map(disk).collect(),
        healed,
        warnings,
        elapsed,
    }
}

/// Returns an error and its causes, outermost first.
pub(super) fn chain(error: &dyn std::error::Error) -> Vec<String> {
    std::iter::successors(Some(error), |error| error.source())
        .map(ToString::to_string)
        .collect()
}
