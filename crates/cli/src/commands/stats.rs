//! `highwater stats`

use std::collections::BTreeMap;

use highwater_engine::repository::{Manifest, Storage};
use highwater_model::format_size;

use crate::advice::{self, CliError};
use crate::args::Global;
use crate::commands::all_points;
use crate::{json, output, settings, times};

pub(crate) fn run(global: &Global) -> Result<u8, CliError> {
    let repo = settings::open_repository(global)?;
    let list = all_points(&repo)?;
    let stats = Stats {
        id: repo.id().to_string(),
        encrypted: repo.is_encrypted(),
        chunk_bytes: repo.chunk_size().bytes(),
        storage: repo.storage()?,
        points: list.points.len(),
        logical_bytes: list.points.iter().map(size_of).sum(),
        vms: by_vm(&list.points),
    };
    if global.json {
        output::document(&json::Stats::new(&stats))?;
    } else {
        output::data(&text(&stats))?;
    }
    Ok(if list.damaged.is_empty() {
        advice::DONE
    } else {
        advice::DAMAGE
    })
}

/// What a repository holds.
pub(crate) struct Stats {
    pub(crate) id: String,
    pub(crate) encrypted: bool,
    pub(crate) chunk_bytes: u64,
    pub(crate) storage: Storage,
    pub(crate) points: usize,
    /// Bytes of all disks of all points: what could be restored.
    pub(crate) logical_bytes: u64,
    pub(crate) vms: Vec<VmStats>,
}

/// What a repository holds of one VM.
pub(crate) struct VmStats {
    pub(crate) vm: String,
    pub(crate) vm_uuid: Option<String>,
    pub(crate) points: usize,
    pub(crate) first: String,
    pub(crate) latest: String,
    pub(crate) first_shown: String,
    pub(crate) latest_shown: String,
    /// Size of the latest point.
    pub(crate) size_bytes: u64,
    pub(crate) logical_bytes: u64,
    pub(crate) read_bytes: u64,
    /// What its backups added, at the time.
    pub(crate) stored_bytes: u64,
}

impl Stats {
    /// How many times smaller chunks are as stored.
    pub(crate) fn compression(&self) -> Option<f64> {
        let chunks = &self.storage.chunks;
        ratio(chunks.plain_bytes, chunks.stored_bytes)
    }

    /// How many times what could be restored is larger than the distinct data
    /// in it: zeroes, and what several points or disks share.
    pub(crate) fn dedup(&self) -> Option<f64> {
        ratio(self.logical_bytes, self.storage.chunks.plain_bytes)
    }

    /// Both together, with everything else the repository stores.
    pub(crate) fn saving(&self) -> Option<f64> {
        ratio(self.logical_bytes, self.storage.total_bytes())
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a ratio is shown with two places"
)]
fn ratio(whole: u64, part: u64) -> Option<f64> {
    (part > 0).then(|| (whole as f64 / part as f64 * 100.0).round() / 100.0)
}

fn size_of(point: &Manifest) -> u64 {
    point.disks.iter().map(|disk| disk.image.size_bytes).sum()
}

fn by_vm(points: &[Manifest]) -> Vec<VmStats> {
    // One VM is one UUID, whatever its name was; without one it is its name.
    let mut vms: BTreeMap<&str, Vec<&Manifest>> = BTreeMap::new();
    for point in points {
        let key = point.vm.uuid.as_deref().unwrap_or(&point.vm.name);
        vms.entry(key).or_default().push(point);
    }
    let mut all: Vec<VmStats> = vms
        .into_values()
        .filter_map(|points| {
            let (first, latest) = (points.first()?, points.last()?);
            let disks = || points.iter().flat_map(|point| &point.disks);
            Some(VmStats {
                vm: latest.vm.name.clone(),
                vm_uuid: latest.vm.uuid.clone(),
                points: points.len(),
                first: times::rfc3339(first.taken_at),
                latest: times::rfc3339(latest.taken_at),
                first_shown: times::show(first.taken_at),
                latest_shown: times::show(latest.taken_at),
                size_bytes: size_of(latest),
                logical_bytes: points.iter().map(|point| size_of(point)).sum(),
                read_bytes: disks().map(|disk| disk.read_bytes).sum(),
                stored_bytes: disks().map(|disk| disk.stored_bytes).sum(),
            })
        })
        .collect();
    all.sort_by(|a, b| (&a.vm, &a.vm_uuid).cmp(&(&b.vm, &b.vm_uuid)));
    all
}

fn text(stats: &Stats) -> String {
    let storage = &stats.storage;
    let told = |ratio: Option<f64>, before: &str, after: &str| {
        ratio.map_or_else(String::new, |it| format!("{before}{it:.2}{after}"))
    };
    let about = if storage.is_exact { "" } else { "about " };
    let encrypted = if stats.encrypted {
        "encrypted"
    } else {
        "not encrypted"
    };
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut row = |cells: [&str; 3]| rows.push(cells.map(str::to_owned).to_vec());
    let chunk = format_size(stats.chunk_bytes);
    row([
        "repository",
        &stats.id,
        &format!("{encrypted}, {chunk} chunks"),
    ]);
    let vms = match stats.vms.len() {
        1 => "of 1 VM".to_owned(),
        vms => format!("of {vms} VMs"),
    };
    row(["restore points", &stats.points.to_string(), &vms]);
    let logical = format_size(stats.logical_bytes);
    row([
        "their disks",
        &logical,
        "what could be restored, zeroes included",
    ]);
    let plain = format!("{about}{}", format_size(storage.chunks.plain_bytes));
    row([
        "distinct data",
        &plain,
        &told(stats.dedup(), "zeroes and sharing save ", " x"),
    ]);
    let total = format_size(storage.total_bytes());
    row([
        "stored",
        &total,
        &told(stats.saving(), "", " x smaller in all"),
    ]);
    let before = format!("compressed {about}");
    let compression = told(stats.compression(), &before, " x");
    row([
        "  chunks",
        &format_size(storage.chunks.stored_bytes),
        &compression,
    ]);
    row(["  tree pages", &format_size(storage.pages.stored_bytes), ""]);
    row(["  index", &format_size(storage.index_bytes), ""]);
    row(["  manifests", &format_size(storage.manifest_bytes), ""]);
    row(["  keys and others", &format_size(storage.other_bytes), ""]);
    if storage.unindexed_bytes > 0 {
        let why = "left by runs that were cut off, or being written now";
        row(["  in no index", &format_size(storage.unindexed_bytes), why]);
    }
    let mut text = output::table(&rows);
    if !stats.vms.is_empty() {
        let head = ["VM", "POINTS", "FIRST", "LATEST", "SIZE", "READ", "ADDED"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        for vm in &stats.vms {
            rows.push(vec![
                vm.vm.clone(),
                vm.points.to_string(),
                vm.first_shown.clone(),
                vm.latest_shown.clone(),
                format_size(vm.size_bytes),
                format_size(vm.read_bytes),
                format_size(vm.stored_bytes),
            ]);
        }
        text.push('\n');
        text.push_str(&output::table(&rows));
    }
    text
}
