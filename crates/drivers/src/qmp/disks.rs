//! Facts about one disk, put together from QEMU's answers and the host.

use std::collections::BTreeMap;

use highwater_hypervisor::{
    BitmapFacts, ChainLink, DiskFacts, DiskSource, MarkSupport, NoMarks, Place, RootNode,
    WriteCounters,
};
use highwater_model::DATA_FILE_FORMAT;
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::Client;
use super::error::QmpError;
use super::files::{Files, Location};
use super::layout::{GuestDisk, Layout};
use super::secrets::masked;
use crate::blocks::answer;

/// No sane chain has more images.
const CHAIN_MAX: usize = 256;

/// Reports one disk.
pub(super) fn facts(
    disk: &GuestDisk,
    layout: &Layout,
    files: &Files,
    counters: &BTreeMap<String, WriteCounters>,
) -> DiskFacts {
    // A node that cannot be told is still looked for by what the guest writes to.
    let node = disk.node.as_deref().unwrap_or(&disk.root);
    let about = layout.nodes.get(node);
    let chain = chain(node, layout, files);
    let block = layout.blocks.nodes.get(node);
    DiskFacts {
        target: disk.target.clone(),
        serial: disk.serial.clone(),
        device: Some(disk.device.clone()),
        device_known: true,
        source: source(node, layout, files),
        format: format_of(node, layout),
        size_bytes: block.map(|block| block.size_bytes).unwrap_or_default(),
        file_bytes: chain.first().and_then(|link| link.file_bytes),
        marks: mark_support(node, layout),
        bitmaps: bitmaps(disk, layout),
        root_node: root_node(disk, layout),
        write_errors: disk.write_errors,
        encrypted: about.is_some_and(|node| node.is_encrypted),
        counters: counters.get(&disk.path).copied(),
        chain,
    }
}

/// The node that would be exported is found from the guest's device, so it
/// cannot be another one; but it may not be found.
fn root_node(disk: &GuestDisk, layout: &Layout) -> RootNode {
    let node = match &disk.node {
        Ok(node) => node,
        Err(why) => return RootNode::Unknown(why.clone()),
    };
    let has_data_file = |node: &String| {
        let node = layout.nodes.get(node);
        node.is_some_and(|node| node.has_data_file)
    };
    if !layout.graph.is_whole && layout.graph.below(node).iter().any(has_data_file) {
        let why = format!("QEMU does not tell what `{node}` stands on");
        return RootNode::Unknown(why);
    }
    RootNode::Same
}

/// Returns the node at the bottom of a format: the one with the file.
pub(super) fn storage<'a>(node: &'a str, layout: &'a Layout) -> &'a str {
    let mut name = node;
    for _ in 0..CHAIN_MAX {
        match layout.graph.child(name, "file") {
            Some(below) => name = below,
            None => break,
        }
    }
    name
}

fn location(storage: &str, layout: &Layout, files: &Files) -> Location {
    let Some(node) = layout.nodes.get(storage) else {
        return Location::Other(String::new());
    };
    match files.location(&node.driver, &node.file) {
        Location::Other(text) => Location::Other(masked(&text)),
        here => here,
    }
}

fn source(node: &str, layout: &Layout, files: &Files) -> DiskSource {
    match location(storage(node, layout), layout, files) {
        Location::File(path) => DiskSource::File(path),
        Location::Block(path) => DiskSource::Block(path),
        Location::Other(text) => DiskSource::Network(text),
    }
}

/// A node without one below it is a protocol's: its content is what it is.
fn format_of(node: &str, layout: &Layout) -> String {
    let driver = layout.nodes.get(node).map_or("", |node| &node.driver);
    let is_protocol = layout.graph.child(node, "file").is_none();
    if is_protocol { "raw" } else { driver }.to_owned()
}

fn chain(top: &str, layout: &Layout, files: &Files) -> Vec<ChainLink> {
    let mut links = Vec::new();
    let mut next = Some(top);
    // Filters count, too: they may stand in a circle.
    for _ in 0..CHAIN_MAX {
        let Some(node) = next else { break };
        let child = |name: &str| layout.graph.child(node, name);
        if layout.is_filter(node) {
            next = child("file");
            continue;
        }
        links.push(link(node, format_of(node, layout), layout, files));
        let data = child("data-file");
        links.extend(data.map(|data| link(data, DATA_FILE_FORMAT.to_owned(), layout, files)));
        next = child("backing");
    }
    links
}

fn link(node: &str, format: String, layout: &Layout, files: &Files) -> ChainLink {
    let (name, place, identity) = match location(storage(node, layout), layout, files) {
        Location::File(path) | Location::Block(path) => {
            let identity = files.identity(&path);
            (path.to_string_lossy().into_owned(), Place::Host, identity)
        }
        Location::Other(text) => (text, Place::Network, None),
    };
    ChainLink {
        name,
        format,
        place,
        node: Some(node.to_owned()),
        inode: identity.map(|identity| identity.inode),
        file_bytes: identity.and_then(|identity| identity.bytes),
        modified_ns: identity.and_then(|identity| identity.modified_ns),
        changed_ns: identity.and_then(|identity| identity.changed_ns),
    }
}

/// Only an image whose version is known to hold bitmaps counts as one that does.
fn mark_support(node: &str, layout: &Layout) -> MarkSupport {
    let driver = layout.nodes.get(node).map_or("", |node| &node.driver);
    let compat = layout
        .blocks
        .nodes
        .get(node)
        .and_then(|node| node.compat.as_deref());
    match (driver, compat) {
        ("qcow2", Some("0.10")) => MarkSupport::WhileRunning(NoMarks::Qcow2Version2),
        ("qcow2", Some(_)) => MarkSupport::Yes,
        _ => MarkSupport::WhileRunning(NoMarks::NotQcow2),
    }
}

/// Collects the bitmaps of everything that the disk stands on, and of the
/// filters in the guest's path.
fn bitmaps(disk: &GuestDisk, layout: &Layout) -> Vec<BitmapFacts> {
    let graph = &layout.graph;
    let mut nodes = graph.below(&disk.root);
    // What a filter of a backup writes to is no part of the disk.
    let beside = disk.filters.iter();
    for target in beside.filter_map(|filter| graph.child(filter, "target")) {
        let of_backup = graph.below(target);
        nodes.retain(|node| !of_backup.contains(node));
    }
    nodes
        .iter()
        .filter_map(|node| layout.blocks.nodes.get(node))
        .flat_map(|node| node.bitmaps.iter().cloned())
        .collect()
}

/// Asks what the guest has written to each disk, by the device's path.
pub(super) fn write_counters(client: &Client) -> Result<BTreeMap<String, WriteCounters>, QmpError> {
    let found = client.run("query-blockstats", json!({}))?;
    counters(found)
}

fn counters(found: Value) -> Result<BTreeMap<String, WriteCounters>, QmpError> {
    let found: Vec<WireStats> =
        answer(found).map_err(|error| QmpError::Malformed(error.to_string()))?;
    let counters = found.into_iter().filter_map(|device| {
        let qdev = device.qdev?;
        let path = if qdev.starts_with('/') {
            qdev
        } else {
            format!("/machine/peripheral/{qdev}")
        };
        let counters = WriteCounters {
            bytes: device.stats.wr_bytes,
            operations: device.stats.wr_operations,
        };
        Some((path, counters))
    });
    Ok(counters.collect())
}

#[derive(Deserialize)]
struct WireStats {
    qdev: Option<String>,
    stats: WireCounters,
}

#[derive(Deserialize)]
struct WireCounters {
    wr_bytes: u64,
    wr_operations: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::graph::Graph;
    use crate::qmp::layout::About;

    #[test]
    fn filters_in_a_circle_are_followed_to_an_end() {
        let nodes = json!([{"node-name": "a", "drv": "throttle", "ro": false}]);
        let devices = json!([{"device": "vda", "qdev": "d", "inserted": {"node-name": "a"}}]);
        let graph = json!({"nodes": [{"id": 1, "type": "block-driver", "name": "a"}],
            "edges": [{"parent": 1, "child": 1, "name": "file"}]});
        let graph = Graph::parse(graph).unwrap();
        let about = |_: &str| About::default();
        let layout = Layout::put_together(nodes, devices, graph, &about).unwrap();
        let found = facts(
            &layout.disks[0],
            &layout,
            &Files::default(),
            &BTreeMap::new(),
        );
        assert_eq!(found.chain, []);
        assert!(matches!(found.root_node, RootNode::Unknown(_)));
    }
}
