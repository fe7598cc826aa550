//! What a repository holds, as it is told: counts, sizes, ratios.

use std::collections::BTreeMap;

use highwater_engine::repository::{Manifest, Storage};

use crate::times;

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

/// Returns the size of all disks of a point.
pub(crate) fn size_of(point: &Manifest) -> u64 {
    point.disks.iter().map(|disk| disk.image.size_bytes).sum()
}

/// Returns what there is of each VM, by name.
pub(crate) fn by_vm(points: &[Manifest]) -> Vec<VmStats> {
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
