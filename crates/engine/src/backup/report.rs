//! What a backup did.

use std::time::Duration;

use highwater_hypervisor::VmRef;
use highwater_model::PointId;
use highwater_repo::Manifest;

use super::copy::DiskCopied;

/// What a backup that added a point did.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// VM name.
    pub vm: String,
    /// VM UUID.
    pub vm_uuid: Option<String>,
    /// The point.
    pub point: PointId,
    /// Whether all disks are in it.
    pub status: Status,
    /// Consistency word.
    pub consistency: String,
    /// The disks, failed ones included.
    pub disks: Vec<DiskReport>,
    /// What was tidied.
    pub healed: Vec<String>,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// Duration of the whole.
    pub elapsed: Duration,
}

/// Whether all disks are in a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// They are.
    Ok,
    /// Some could not be read; those are not in it.
    Partial,
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
    /// Root hash.
    pub root: Option<String>,
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
            root: Some(disk.image.hash.to_string()),
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
            root: None,
            failure: chain(&error),
        });
    }
    let failed = disks.iter().any(|disk| disk.root.is_none());
    Report {
        vm: vm.name.clone(),
        vm_uuid: vm.uuid.clone(),
        point: manifest.point,
        status: if failed { Status::Partial } else { Status::Ok },
        consistency: manifest.consistency.clone(),
        disks,
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
