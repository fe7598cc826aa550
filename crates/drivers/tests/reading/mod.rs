//! Reading what a driver exports, with the tools of others.

use std::path::{Path, PathBuf};

use highwater_hypervisor::{DiskFacts, Export, ExportAddress, VmFacts};
use highwater_model::{Clock as _, MarkName, PointId, RepoId, SystemClock};
use highwater_testkit::tool;

pub(crate) fn mark_name() -> MarkName {
    MarkName::new(
        RepoId::from_bytes([0xab; 16]),
        PointId::new(SystemClock.now()),
    )
}

pub(crate) fn disk_facts<'a>(facts: &'a VmFacts, target: &str) -> &'a DiskFacts {
    facts
        .disks
        .iter()
        .find(|disk| disk.target == target)
        .unwrap_or_else(|| panic!("no disk {target} in {facts:?}"))
}

pub(crate) fn uri(export: &Export) -> String {
    let ExportAddress::Unix(socket) = &export.address else {
        panic!("{export:?}")
    };
    format!("nbd+unix:///{}?socket={}", export.name, socket.display())
}

/// Reads a whole export into a raw file.
pub(crate) fn read_export(export: &Export, to: &Path) -> PathBuf {
    if let Some(exact_within) = export.exact_within {
        let request = format!("--request-size={exact_within}");
        let copy = tool("nbdcopy").args([&request, "--no-extents", &uri(export)]);
        copy.arg(to).run().unwrap();
        return to.to_path_buf();
    }
    tool("qemu-img")
        .args(["convert", "-f", "raw", "-O", "raw", &uri(export)])
        .arg(to)
        .run()
        .unwrap();
    to.to_path_buf()
}

/// Returns the dirty ranges of an export as `(offset, length)`.
pub(crate) fn dirty_ranges(export: &Export) -> Vec<(u64, u64)> {
    let context = export
        .dirty_context
        .as_ref()
        .expect("an incremental export");
    let map = tool("nbdinfo")
        .args([&format!("--map={context}"), "--json", &uri(export)])
        .run()
        .unwrap();
    let map: Vec<serde_json::Value> = serde_json::from_str(&map).unwrap();
    map.iter()
        .filter(|extent| extent["type"] == 1)
        .map(|extent| {
            (
                extent["offset"].as_u64().unwrap(),
                extent["length"].as_u64().unwrap(),
            )
        })
        .collect()
}
