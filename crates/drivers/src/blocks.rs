//! QEMU's view of a VM's disks: nodes, their bitmaps, and what the guest's
//! devices are attached to.
//!
//! libvirt does not report bitmaps, so QEMU is asked through libvirt's monitor
//! pass-through (ADR 0011). Only queries that every QEMU since 6.2 answers are
//! used; the graph (an `x-` command) is asked for only where a filter sits on
//! top of a disk, and its absence is a fact, not an error.

use std::collections::BTreeMap;

use highwater_hypervisor::{BitmapFacts, RootNode};
use serde::Deserialize;
use serde_json::Value;

/// Drivers of nodes that pass everything on to their one child: the guest's
/// content below and above them is the same.
const FILTERS: [&str; 7] = [
    "blkdebug",
    "blklogwrites",
    "compress",
    "copy-before-write",
    "copy-on-read",
    "preallocate",
    "throttle",
];

/// No sane stack of filters is higher.
pub(crate) const FILTERS_MAX: usize = 32;

/// The queries, as sent.
pub(crate) const QUERY_NODES: &str =
    r#"{"execute":"query-named-block-nodes","arguments":{"flat":true}}"#;
pub(crate) const QUERY_DEVICES: &str = r#"{"execute":"query-block"}"#;
pub(crate) const QUERY_GRAPH: &str = r#"{"execute":"x-debug-query-block-graph"}"#;
pub(crate) const QUERY_EXPORTS: &str = r#"{"execute":"query-block-exports"}"#;
pub(crate) const QUERY_VERSION: &str = r#"{"execute":"query-version"}"#;

/// Why a reply of QEMU cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ReplyError {
    #[error("QEMU answered: {0}")]
    Refused(String),
    #[error("QEMU's answer is not understood: {0}")]
    Malformed(String),
}

/// Everything QEMU says about its block layer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Blocks {
    pub(crate) nodes: BTreeMap<String, BlockNode>,
    pub(crate) devices: Vec<Device>,
    /// The child that a filter passes everything on to, by the filter's name;
    /// `None` if QEMU did not tell.
    pub(crate) below: Option<BTreeMap<String, String>>,
}

/// One node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BlockNode {
    pub(crate) driver: String,
    pub(crate) size_bytes: u64,
    /// qcow2: `1.1` (version 3) or `0.10` (version 2).
    pub(crate) compat: Option<String>,
    /// Whether QEMU may write to it; it tells since 10.0.
    pub(crate) is_active: Option<bool>,
    pub(crate) bitmaps: Vec<BitmapFacts>,
}

/// One guest device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Device {
    /// QOM path or id.
    pub(crate) qdev: String,
    /// Its root node; none without a medium.
    pub(crate) node: Option<String>,
}

impl Blocks {
    /// Puts the replies to the two queries together.
    pub(crate) fn parse(nodes: &str, devices: &str) -> Result<Self, ReplyError> {
        Ok(Self::of(reply(nodes)?, reply(devices)?))
    }

    /// Puts the answers to the two queries together, where there is no reply
    /// around them.
    pub(crate) fn from_values(nodes: Value, devices: Value) -> Result<Self, ReplyError> {
        Ok(Self::of(answer(nodes)?, answer(devices)?))
    }

    fn of(nodes: Vec<WireNode>, devices: Vec<WireDevice>) -> Self {
        Self {
            nodes: nodes
                .into_iter()
                .filter_map(|node| Some((node.node_name.clone()?, node.into_facts()?)))
                .collect(),
            devices: devices
                .into_iter()
                .filter_map(|device| {
                    let node = device.inserted.and_then(|inserted| inserted.node_name);
                    Some(Device {
                        qdev: device.qdev?,
                        node,
                    })
                })
                .collect(),
            below: None,
        }
    }

    /// Returns whether some device has a filter on top, so that the graph is
    /// needed to see what is below it.
    pub(crate) fn needs_graph(&self) -> bool {
        self.devices
            .iter()
            .filter_map(|device| device.node.as_deref())
            .any(|node| self.is_filter(node))
    }

    /// Adds the reply to [`QUERY_GRAPH`].
    pub(crate) fn add_graph(&mut self, graph: &str) -> Result<(), ReplyError> {
        self.below = Some(below(reply(graph)?));
        Ok(())
    }

    /// Returns the node that libvirt made for the image with this number: the
    /// one that it would export and put bitmaps on.
    pub(crate) fn libvirt_node(&self, index: u32) -> Option<&str> {
        // Newer versions of libvirt leave the format layer of a raw image out.
        ["format", "slice-sto", "storage"]
            .into_iter()
            .map(|layer| format!("libvirt-{index}-{layer}"))
            .find_map(|name| self.nodes.get_key_value(&name))
            .map(|(name, _)| name.as_str())
    }

    /// Returns the granularity of a new mark's bitmap, or what is wrong with it.
    /// Only on the node that libvirt exports does it record what the guest does.
    pub(crate) fn new_bitmap(&self, index: Option<u32>, name: &str) -> Result<u32, &'static str> {
        let bitmap = index
            .and_then(|index| self.libvirt_node(index))
            .and_then(|node| self.nodes.get(node))
            .and_then(|node| node.bitmaps.iter().find(|bitmap| bitmap.name == name));
        match bitmap {
            None => Err("is not there"),
            Some(bitmap) if !bitmap.recording || bitmap.inconsistent => Err("does not record"),
            Some(bitmap) if !bitmap.persistent => Err("is not persistent"),
            Some(bitmap) => Ok(bitmap.granularity),
        }
    }

    /// Returns all nodes that libvirt made for the image with this number.
    pub(crate) fn libvirt_nodes(&self, index: u32) -> impl Iterator<Item = &str> {
        let prefix = format!("libvirt-{index}-");
        self.nodes
            .keys()
            .filter(move |name| name.starts_with(&prefix))
            .map(String::as_str)
    }

    /// Returns whether QEMU has taken over the images that the guest's devices
    /// use; `None` if it does not tell.
    pub(crate) fn are_active(&self) -> Option<bool> {
        let roots = self.devices.iter().filter_map(|it| it.node.as_ref());
        let told = roots.filter_map(|root| self.nodes.get(root)?.is_active);
        told.reduce(|all, one| all && one)
    }

    /// Returns the root node of the guest device that libvirt calls `alias`.
    pub(crate) fn root_of(&self, alias: &str) -> Option<&str> {
        self.devices
            .iter()
            .find(|device| device.qdev.split('/').any(|part| part == alias))
            .and_then(|device| device.node.as_deref())
    }

    /// Compares what the guest writes to with what would be exported.
    pub(crate) fn root_node(&self, alias: Option<&str>, exported: Option<&str>) -> RootNode {
        let Some(guest) = alias.and_then(|alias| self.root_of(alias)) else {
            return RootNode::Unknown("QEMU has no such device".to_owned());
        };
        let Some(exported) = exported else {
            return RootNode::Unknown("QEMU has no node that libvirt made for it".to_owned());
        };
        let mut node = guest;
        for _ in 0..FILTERS_MAX {
            if node == exported {
                return RootNode::Same;
            }
            if !self.is_filter(node) {
                break;
            }
            let Some(below) = &self.below else {
                return RootNode::Unknown(format!(
                    "QEMU does not tell what is below the filter `{node}`"
                ));
            };
            let Some(next) = below.get(node) else { break };
            node = next;
        }
        RootNode::Differs {
            guest: node.to_owned(),
            exported: exported.to_owned(),
        }
    }

    /// Returns every node that holds a bitmap of this name.
    pub(crate) fn holders(&self, bitmap: &str) -> Vec<String> {
        self.nodes
            .iter()
            .filter(|(_, node)| node.bitmaps.iter().any(|one| one.name == bitmap))
            .map(|(name, _)| name.clone())
            .collect()
    }

    fn is_filter(&self, node: &str) -> bool {
        self.nodes
            .get(node)
            .is_some_and(|node| is_filter(&node.driver))
    }
}

/// Returns whether nodes of this driver pass everything on to their one child.
pub(crate) fn is_filter(driver: &str) -> bool {
    FILTERS.contains(&driver)
}

/// Returns the child that each node passes everything on to, if it is a filter.
fn below(graph: WireGraph) -> BTreeMap<String, String> {
    let names: BTreeMap<u64, String> = graph
        .nodes
        .into_iter()
        .map(|node| (node.id, node.name))
        .collect();
    graph
        .edges
        .into_iter()
        .filter(|edge| edge.name == "file")
        .filter_map(|edge| {
            Some((
                names.get(&edge.parent)?.clone(),
                names.get(&edge.child)?.clone(),
            ))
        })
        .collect()
}

/// Understands what a command returned.
pub(crate) fn answer<T: for<'de> Deserialize<'de>>(value: Value) -> Result<T, ReplyError> {
    serde_json::from_value(value).map_err(|error| ReplyError::Malformed(error.to_string()))
}

/// Returns what a command returned.
pub(crate) fn reply<T: for<'de> Deserialize<'de>>(text: &str) -> Result<T, ReplyError> {
    let reply: WireReply<T> =
        serde_json::from_str(text).map_err(|error| ReplyError::Malformed(error.to_string()))?;
    match (reply.outcome, reply.error) {
        (Some(outcome), None) => Ok(outcome),
        (_, Some(error)) => Err(ReplyError::Refused(error.desc)),
        (None, None) => Err(ReplyError::Malformed(
            "neither an answer nor an error".to_owned(),
        )),
    }
}

/// QEMU's version, for the report.
pub(crate) fn version(text: &str) -> Result<String, ReplyError> {
    let version: WireVersion = reply(text)?;
    let WireTriple {
        major,
        minor,
        micro,
    } = version.qemu;
    Ok(format!("{major}.{minor}.{micro}"))
}

/// Returns the jobs that use one of these nodes, from the reply to
/// [`QUERY_GRAPH`].
pub(crate) fn jobs_on(graph: &str, nodes: &[String]) -> Result<Vec<String>, ReplyError> {
    let graph: WireGraph = reply(graph)?;
    let is_named = |node: &&WireGraphNode| nodes.contains(&node.name);
    let ids: Vec<u64> = graph
        .nodes
        .iter()
        .filter(is_named)
        .map(|it| it.id)
        .collect();
    let is_user = |job: &WireGraphNode| {
        let mut edges = graph.edges.iter();
        edges.any(|edge| edge.parent == job.id && ids.contains(&edge.child))
    };
    let jobs = graph.nodes.iter().filter(|node| node.kind == "block-job");
    Ok(jobs
        .filter(|job| is_user(job))
        .map(|job| job.name.clone())
        .collect())
}

/// Writes the command that removes a bitmap from a node.
pub(crate) fn remove_bitmap(node: &str, bitmap: &str) -> String {
    serde_json::json!({
        "execute": "block-dirty-bitmap-remove",
        "arguments": { "node": node, "name": bitmap },
    })
    .to_string()
}

#[derive(Deserialize)]
struct WireReply<T> {
    #[serde(rename = "return")]
    outcome: Option<T>,
    error: Option<WireError>,
}

#[derive(Deserialize)]
struct WireError {
    #[serde(default)]
    desc: String,
}

#[derive(Deserialize)]
struct WireVersion {
    qemu: WireTriple,
}

#[derive(Deserialize)]
struct WireTriple {
    major: u32,
    minor: u32,
    micro: u32,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct WireNode {
    node_name: Option<String>,
    drv: Option<String>,
    active: Option<bool>,
    image: Option<WireImage>,
    #[serde(default)]
    dirty_bitmaps: Vec<WireBitmap>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct WireImage {
    virtual_size: Option<u64>,
    format_specific: Option<WireFormat>,
}

#[derive(Deserialize)]
struct WireFormat {
    data: Option<WireFormatData>,
}

#[derive(Deserialize)]
struct WireFormatData {
    compat: Option<String>,
    /// What the image itself holds, as it was opened.
    #[serde(default)]
    bitmaps: Vec<WireStored>,
}

#[derive(Deserialize)]
struct WireStored {
    name: String,
}

/// Filters of a backup job hold bitmaps without a name.
#[derive(Deserialize)]
struct WireBitmap {
    name: Option<String>,
    #[serde(default)]
    granularity: u32,
    #[serde(default)]
    recording: bool,
    #[serde(default)]
    persistent: bool,
    #[serde(default)]
    busy: bool,
    #[serde(default)]
    inconsistent: bool,
    #[serde(default)]
    count: u64,
}

#[derive(Deserialize)]
struct WireDevice {
    qdev: Option<String>,
    inserted: Option<WireInserted>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct WireInserted {
    node_name: Option<String>,
}

/// The answer to [`QUERY_GRAPH`].
#[derive(Deserialize)]
pub(crate) struct WireGraph {
    pub(crate) nodes: Vec<WireGraphNode>,
    pub(crate) edges: Vec<WireGraphEdge>,
}

/// Something in the graph: a node, a job, a guest's device.
#[derive(Deserialize)]
pub(crate) struct WireGraphNode {
    pub(crate) id: u64,
    #[serde(default, rename = "type")]
    pub(crate) kind: String,
    #[serde(default)]
    pub(crate) name: String,
}

/// What stands on what, and as what.
#[derive(Deserialize)]
pub(crate) struct WireGraphEdge {
    pub(crate) parent: u64,
    pub(crate) child: u64,
    #[serde(default)]
    pub(crate) name: String,
}

impl WireNode {
    fn into_facts(self) -> Option<BlockNode> {
        let node = self.node_name?;
        let image = self.image;
        let size_bytes = image.as_ref().and_then(|image| image.virtual_size);
        let format = image
            .and_then(|image| image.format_specific)
            .and_then(|format| format.data);
        let (compat, stored) =
            format.map_or((None, Vec::new()), |data| (data.compat, data.bitmaps));
        Some(BlockNode {
            driver: self.drv.unwrap_or_default(),
            size_bytes: size_bytes.unwrap_or_default(),
            compat,
            is_active: self.active,
            bitmaps: self
                .dirty_bitmaps
                .into_iter()
                .filter_map(|bitmap| {
                    let name = bitmap.name?;
                    Some(BitmapFacts {
                        in_image: stored.iter().any(|one| one.name == name),
                        name,
                        node: node.clone(),
                        granularity: bitmap.granularity,
                        recording: bitmap.recording,
                        persistent: bitmap.persistent,
                        busy: bitmap.busy,
                        inconsistent: bitmap.inconsistent,
                        dirty_bytes: bitmap.count,
                    })
                })
                .collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(root: &str, filter: &str) -> Blocks {
        let nodes = format!(
            r##"{{"return":[
            {{"node-name":"#block7","drv":"{filter}","image":{{"virtual-size":64}},
              "dirty-bitmaps":[{{"recording":false,"persistent":false,"busy":false,"granularity":65536,"count":64}}]}},
            {{"node-name":"libvirt-1-format","drv":"qcow2","image":{{"virtual-size":64,
              "format-specific":{{"type":"qcow2","data":{{"compat":"1.1","bitmaps":[{{"name":"broken","granularity":65536,"flags":["in-use"]}}]}}}}}},
              "dirty-bitmaps":[{{"name":"m","recording":true,"persistent":true,"busy":false,"granularity":65536,"count":3}},
                {{"name":"broken","recording":false,"persistent":true,"inconsistent":true,"busy":false,"granularity":65536,"count":0}}]}},
            {{"node-name":"libvirt-1-storage","drv":"file","image":{{"virtual-size":99}}}},
            {{"node-name":"libvirt-2-storage","drv":"file","image":{{"virtual-size":99}}}}],"id":"x"}}"##
        );
        let devices = format!(
            r#"{{"return":[{{"qdev":"/machine/peripheral/virtio-disk0/virtio-backend","inserted":{{"node-name":"{root}"}}}},
            {{"qdev":"sata0-0-1"}}]}}"#
        );
        Blocks::parse(&nodes, &devices).unwrap()
    }

    const GRAPH: &str = r##"{"return":{"nodes":[{"id":1,"type":"block-driver","name":"#block7"},
        {"id":2,"type":"block-driver","name":"libvirt-1-format"},{"id":3,"type":"block-driver","name":"t"}],
        "edges":[{"parent":1,"child":2,"name":"file"},{"parent":1,"child":3,"name":"target"}]}}"##;

    #[test]
    fn bitmaps_keep_their_state_and_nameless_ones_are_left_out() {
        let blocks = blocks("libvirt-1-format", "copy-before-write");
        let node = &blocks.nodes["libvirt-1-format"];
        assert_eq!(node.bitmaps.len(), 2);
        assert!(node.bitmaps[0].recording && !node.bitmaps[0].inconsistent);
        assert!(!node.bitmaps[1].recording && node.bitmaps[1].inconsistent);
        assert!(!node.bitmaps[0].in_image && node.bitmaps[1].in_image);
        assert!(blocks.nodes["#block7"].bitmaps.is_empty());
        assert_eq!(blocks.holders("m"), ["libvirt-1-format"]);
    }

    #[test]
    fn a_new_mark_is_there_only_if_its_bitmap_records_on_the_exported_node() {
        let mut blocks = blocks("libvirt-1-format", "throttle");
        assert_eq!(blocks.new_bitmap(Some(1), "m"), Ok(65_536));
        assert_eq!(blocks.new_bitmap(Some(1), "broken"), Err("does not record"));
        for (index, name) in [(Some(1), "n"), (Some(2), "m"), (Some(3), "m"), (None, "m")] {
            assert_eq!(blocks.new_bitmap(index, name), Err("is not there"));
        }
        let node = blocks.nodes.get_mut("libvirt-1-format").unwrap();
        node.bitmaps[0].persistent = false;
        let found = blocks.new_bitmap(Some(1), "m");
        assert_eq!(found, Err("is not persistent"));
    }

    #[test]
    fn a_raw_image_without_a_format_layer_is_known_by_its_storage_node() {
        let blocks = blocks("libvirt-1-format", "throttle");
        assert_eq!(blocks.libvirt_node(1), Some("libvirt-1-format"));
        assert_eq!(blocks.libvirt_node(2), Some("libvirt-2-storage"));
        assert_eq!(blocks.libvirt_node(3), None);
        assert_eq!(blocks.libvirt_nodes(1).count(), 2);
    }

    #[test]
    fn a_node_put_on_top_behind_libvirts_back_differs() {
        let root = |root: &str, driver: &str, graph: bool| {
            let mut blocks = blocks(root, driver);
            if graph {
                blocks.add_graph(GRAPH).unwrap();
            }
            blocks.root_node(Some("virtio-disk0"), blocks.libvirt_node(1))
        };
        assert_eq!(root("libvirt-1-format", "throttle", false), RootNode::Same);
        assert_eq!(root("#block7", "copy-before-write", true), RootNode::Same);
        assert!(matches!(
            root("#block7", "copy-before-write", false),
            RootNode::Unknown(_)
        ));
        assert!(matches!(
            root("#block7", "qcow2", true),
            RootNode::Differs { .. }
        ));
    }

    #[test]
    fn an_error_of_qemu_keeps_its_words() {
        let text =
            r#"{"id":"libvirt-6","error":{"class":"CommandNotFound","desc":"no such command"}}"#;
        assert_eq!(
            reply::<u32>(text),
            Err(ReplyError::Refused("no such command".into()))
        );
        assert!(matches!(reply::<u32>("{}"), Err(ReplyError::Malformed(_))));
        assert!(matches!(
            Blocks::parse("[", "[]"),
            Err(ReplyError::Malformed(_))
        ));
    }
}
