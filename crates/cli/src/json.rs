//! The JSON that scripts rely on: schema 1.

#![expect(
    clippy::struct_field_names,
    reason = "the names of fields are the schema"
)]

use highwater_engine::repository::Manifest;
use highwater_engine::{DiskReport, Estimate, Report, RestoreReport, Status};
use serde::Serialize;

use crate::advice::Advice;
use crate::effective::{self, Effective};
use crate::stats;
use crate::times;

/// Version of all documents.
pub(crate) const SCHEMA: u32 = 1;

/// A document as the line of a stream of events.
#[derive(Debug, Serialize)]
pub(crate) struct Line<'a, T> {
    pub(crate) event: &'static str,
    #[serde(flatten)]
    pub(crate) body: &'a T,
}

/// The last line of a stream of events.
#[derive(Debug, Serialize)]
pub(crate) struct End {
    event: &'static str,
    schema: u32,
    exit_code: u8,
}

impl End {
    pub(crate) const fn new(exit_code: u8) -> Self {
        Self {
            event: "end",
            schema: SCHEMA,
            exit_code,
        }
    }
}

/// A backup of one VM.
#[derive(Debug, Serialize)]
pub(crate) struct Backup {
    schema: u32,
    vm: String,
    vm_uuid: Option<String>,
    point: Option<String>,
    status: &'static str,
    consistency: Option<String>,
    disks: Vec<BackupDisk>,
    healed: Vec<String>,
    warnings: Vec<String>,
    seconds: f64,
}

#[derive(Debug, Serialize)]
struct BackupDisk {
    disk: String,
    mode: String,
    reason: Option<String>,
    size_bytes: u64,
    dirty_bytes: u64,
    read_bytes: u64,
    stored_bytes: u64,
    audited_blocks: u64,
    root: Option<String>,
    seconds: f64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    because: Vec<String>,
}

impl Backup {
    pub(crate) fn new(report: &Report) -> Self {
        Self {
            schema: SCHEMA,
            vm: report.vm.clone(),
            vm_uuid: report.vm_uuid.clone(),
            point: report.point.map(|point| point.to_string()),
            status: match report.status {
                Status::Ok => "ok",
                Status::Partial => "partial",
                Status::BelowThreshold => "below-threshold",
            },
            consistency: report.consistency.clone(),
            disks: report.disks.iter().map(backup_disk).collect(),
            healed: report.healed.clone(),
            warnings: report.warnings.clone(),
            seconds: seconds(report.elapsed),
        }
    }
}

fn backup_disk(disk: &DiskReport) -> BackupDisk {
    BackupDisk {
        disk: disk.disk.clone(),
        mode: disk.mode.clone(),
        reason: disk.reason.clone(),
        size_bytes: disk.size_bytes,
        dirty_bytes: disk.dirty_bytes,
        read_bytes: disk.read_bytes,
        stored_bytes: disk.stored_bytes,
        audited_blocks: disk.audited_blocks,
        root: disk.root.clone(),
        seconds: seconds(disk.elapsed),
        because: disk.failure.clone(),
    }
}

/// What a backup of one VM would do.
#[derive(Debug, Serialize)]
pub(crate) struct Estimated {
    schema: u32,
    vm: String,
    vm_uuid: Option<String>,
    status: &'static str,
    disks: Vec<EstimatedDisk>,
    dirty_bytes: u64,
    read_bytes: u64,
    below_threshold: bool,
    would_heal: Vec<String>,
}

#[derive(Debug, Serialize)]
struct EstimatedDisk {
    disk: String,
    mode: &'static str,
    reason: Option<&'static str>,
    size_bytes: u64,
    dirty_bytes: u64,
    read_bytes: u64,
}

impl Estimated {
    pub(crate) fn new(estimate: &Estimate) -> Self {
        Self {
            schema: SCHEMA,
            vm: estimate.vm.clone(),
            vm_uuid: estimate.vm_uuid.clone(),
            status: "estimate",
            dirty_bytes: estimate.disks.iter().map(|disk| disk.dirty_bytes).sum(),
            read_bytes: estimate.disks.iter().map(|disk| disk.read_bytes).sum(),
            below_threshold: estimate.below_threshold,
            would_heal: estimate.would_heal.clone(),
            disks: estimate
                .disks
                .iter()
                .map(|disk| EstimatedDisk {
                    disk: disk.disk.clone(),
                    mode: disk.mode,
                    reason: disk.reason,
                    size_bytes: disk.size_bytes,
                    dirty_bytes: disk.dirty_bytes,
                    read_bytes: disk.read_bytes,
                })
                .collect(),
        }
    }
}

/// A command, or the backup of one of several VMs, that failed.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Failure {
    schema: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    vm: Option<String>,
    status: &'static str,
    error: String,
    because: Vec<String>,
    state: Option<String>,
    hint: Option<String>,
    exit_code: u8,
}

impl Failure {
    pub(crate) fn new(vm: Option<&str>, chain: &[String], advice: &Advice) -> Self {
        Self {
            schema: SCHEMA,
            vm: vm.map(str::to_owned),
            status: "failed",
            error: chain.first().cloned().unwrap_or_default(),
            because: chain.iter().skip(1).cloned().collect(),
            state: advice.state.clone(),
            hint: advice.hint.clone(),
            exit_code: advice.code,
        }
    }
}

/// The backup of one of several VMs.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum OneOfSeveral {
    Done(Backup),
    Estimated(Estimated),
    Failed(Failure),
}

/// Backups of several VMs.
#[derive(Debug, Serialize)]
pub(crate) struct Backups {
    schema: u32,
    results: Vec<OneOfSeveral>,
}

impl Backups {
    pub(crate) const fn new(results: Vec<OneOfSeveral>) -> Self {
        Self {
            schema: SCHEMA,
            results,
        }
    }
}

/// A new repository.
#[derive(Debug, Serialize)]
pub(crate) struct Created {
    schema: u32,
    repository: String,
    encrypted: bool,
    chunk_bytes: u64,
}

impl Created {
    pub(crate) const fn new(repository: String, encrypted: bool, chunk_bytes: u64) -> Self {
        Self {
            schema: SCHEMA,
            repository,
            encrypted,
            chunk_bytes,
        }
    }
}

/// What a repository holds.
#[derive(Debug, Serialize)]
pub(crate) struct Stats {
    schema: u32,
    repository: String,
    encrypted: bool,
    chunk_bytes: u64,
    points: usize,
    logical_bytes: u64,
    unique_bytes: u64,
    unique_is_exact: bool,
    stored_bytes: u64,
    stored: StoredBytes,
    compression_ratio: Option<f64>,
    dedup_ratio: Option<f64>,
    saving_ratio: Option<f64>,
    vms: Vec<StatsOfVm>,
}

#[derive(Debug, Serialize)]
struct StoredBytes {
    chunks: u64,
    pages: u64,
    index: u64,
    manifests: u64,
    other: u64,
    unindexed: u64,
}

#[derive(Debug, Serialize)]
struct StatsOfVm {
    vm: String,
    vm_uuid: Option<String>,
    points: usize,
    first_taken_at: String,
    latest_taken_at: String,
    size_bytes: u64,
    logical_bytes: u64,
    read_bytes: u64,
    stored_bytes: u64,
}

impl Stats {
    pub(crate) fn new(stats: &stats::Stats) -> Self {
        let storage = &stats.storage;
        Self {
            schema: SCHEMA,
            repository: stats.id.clone(),
            encrypted: stats.encrypted,
            chunk_bytes: stats.chunk_bytes,
            points: stats.points,
            logical_bytes: stats.logical_bytes,
            unique_bytes: storage.chunks.plain_bytes,
            unique_is_exact: storage.is_exact,
            stored_bytes: storage.total_bytes(),
            stored: StoredBytes {
                chunks: storage.chunks.stored_bytes,
                pages: storage.pages.stored_bytes,
                index: storage.index_bytes,
                manifests: storage.manifest_bytes,
                other: storage.other_bytes,
                unindexed: storage.unindexed_bytes,
            },
            compression_ratio: stats.compression(),
            dedup_ratio: stats.dedup(),
            saving_ratio: stats.saving(),
            vms: stats
                .vms
                .iter()
                .map(|vm| StatsOfVm {
                    vm: vm.vm.clone(),
                    vm_uuid: vm.vm_uuid.clone(),
                    points: vm.points,
                    first_taken_at: vm.first.clone(),
                    latest_taken_at: vm.latest.clone(),
                    size_bytes: vm.size_bytes,
                    logical_bytes: vm.logical_bytes,
                    read_bytes: vm.read_bytes,
                    stored_bytes: vm.stored_bytes,
                })
                .collect(),
        }
    }
}

/// The effective settings.
#[derive(Debug, Serialize)]
pub(crate) struct Settings<'a> {
    schema: u32,
    files: Vec<String>,
    settings: &'a [effective::Shown],
}

impl<'a> Settings<'a> {
    pub(crate) fn new(effective: &'a Effective) -> Self {
        let files = effective.files.iter();
        Self {
            schema: SCHEMA,
            files: files.map(|path| path.display().to_string()).collect(),
            settings: &effective.settings,
        }
    }
}

/// Restore points.
#[derive(Debug, Serialize)]
pub(crate) struct Points {
    schema: u32,
    points: Vec<Point>,
    damaged: Vec<String>,
}

impl Points {
    pub(crate) fn new<'a>(
        points: impl Iterator<Item = &'a Manifest>,
        damaged: Vec<String>,
    ) -> Self {
        Self {
            schema: SCHEMA,
            points: points.map(Point::new).collect(),
            damaged,
        }
    }
}

/// One restore point of a list.
#[derive(Debug, Serialize)]
struct Point {
    point: String,
    vm: String,
    vm_uuid: Option<String>,
    taken_at: String,
    utc_offset_minutes: i32,
    sequence: u64,
    level: String,
    consistency: String,
    size_bytes: u64,
    stored_bytes: u64,
    tags: Vec<String>,
    group: Option<String>,
    disks: Vec<PointDisk>,
}

#[derive(Debug, Serialize)]
struct PointDisk {
    disk: String,
    mode: String,
    reason: Option<String>,
    parent: Option<String>,
    format: String,
    source: String,
    size_bytes: u64,
    dirty_bytes: u64,
    read_bytes: u64,
    stored_bytes: u64,
    root: String,
}

impl Point {
    fn new(manifest: &Manifest) -> Self {
        Self {
            point: manifest.point.to_string(),
            vm: manifest.vm.name.clone(),
            vm_uuid: manifest.vm.uuid.clone(),
            taken_at: times::rfc3339(manifest.taken_at),
            utc_offset_minutes: manifest.utc_offset_minutes,
            sequence: manifest.sequence,
            level: manifest.level.clone(),
            consistency: manifest.consistency.clone(),
            size_bytes: manifest
                .disks
                .iter()
                .map(|disk| disk.image.size_bytes)
                .sum(),
            stored_bytes: manifest.disks.iter().map(|disk| disk.stored_bytes).sum(),
            tags: manifest.tags.clone(),
            group: manifest.group.clone(),
            disks: manifest
                .disks
                .iter()
                .map(|disk| PointDisk {
                    disk: disk.target.clone(),
                    mode: disk.mode.clone(),
                    reason: disk.reason.clone(),
                    parent: disk.parent.map(|point| point.to_string()),
                    format: disk.format.clone(),
                    source: disk.source.clone(),
                    size_bytes: disk.image.size_bytes,
                    dirty_bytes: disk.dirty_bytes,
                    read_bytes: disk.read_bytes,
                    stored_bytes: disk.stored_bytes,
                    root: disk.image.hash.to_string(),
                })
                .collect(),
        }
    }
}

/// One restore point in full.
#[derive(Debug, Serialize)]
pub(crate) struct Shown {
    schema: u32,
    #[serde(flatten)]
    point: Point,
    host: String,
    highwater_version: String,
    hypervisor: Vec<(String, String)>,
    mark: Option<String>,
    definition: String,
    files: Vec<ShownFile>,
    skipped: Vec<ShownSkipped>,
    healed: Vec<String>,
    warnings: Vec<String>,
    seconds: f64,
}

#[derive(Debug, Serialize)]
struct ShownFile {
    role: String,
    path: String,
    size_bytes: u64,
    captured_at: String,
}

#[derive(Debug, Serialize)]
struct ShownSkipped {
    disk: String,
    reason: String,
}

impl Shown {
    pub(crate) fn new(manifest: &Manifest) -> Self {
        Self {
            schema: SCHEMA,
            point: Point::new(manifest),
            host: manifest.origin.host.clone(),
            highwater_version: manifest.origin.version.clone(),
            hypervisor: manifest.origin.hypervisor.clone(),
            mark: manifest.mark.as_ref().map(|mark| mark.name.to_string()),
            definition: manifest.definition.clone(),
            files: manifest
                .files
                .iter()
                .map(|file| ShownFile {
                    role: file.role.clone(),
                    path: file.path.clone(),
                    size_bytes: file.image.size_bytes,
                    captured_at: times::rfc3339(file.captured_at),
                })
                .collect(),
            skipped: manifest
                .skipped
                .iter()
                .map(|skipped| ShownSkipped {
                    disk: skipped.target.clone(),
                    reason: skipped.reason.clone(),
                })
                .collect(),
            healed: manifest.healed.clone(),
            warnings: manifest.warnings.clone(),
            seconds: seconds(std::time::Duration::from_millis(manifest.duration_ms)),
        }
    }
}

/// A restore.
#[derive(Debug, Serialize)]
pub(crate) struct Restored {
    schema: u32,
    status: &'static str,
    vm: String,
    point: String,
    disks: Vec<RestoredDisk>,
    files: Vec<String>,
    seconds: f64,
}

#[derive(Debug, Serialize)]
struct RestoredDisk {
    disk: String,
    path: Option<String>,
    format: &'static str,
    size_bytes: u64,
    data_bytes: u64,
    root: String,
}

impl Restored {
    pub(crate) fn new(manifest: &Manifest, report: &RestoreReport) -> Self {
        Self {
            schema: SCHEMA,
            status: "ok",
            vm: manifest.vm.name.clone(),
            point: manifest.point.to_string(),
            disks: report
                .disks
                .iter()
                .map(|disk| RestoredDisk {
                    disk: disk.disk.clone(),
                    path: disk.path.as_ref().map(|path| path.display().to_string()),
                    format: disk.format,
                    size_bytes: disk.size_bytes,
                    data_bytes: disk.data_bytes,
                    root: disk.root.to_string(),
                })
                .collect(),
            files: report
                .files
                .iter()
                .map(|path| path.display().to_string())
                .collect(),
            seconds: seconds(report.elapsed),
        }
    }
}

/// Whole milliseconds, so that no document ends in a tail of digits.
pub(crate) fn seconds(elapsed: std::time::Duration) -> f64 {
    let ms = u32::try_from(elapsed.as_millis()).unwrap_or(u32::MAX);
    f64::from(ms) / 1000.0
}
