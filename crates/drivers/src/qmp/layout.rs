//! Which disks the guest has, and what they stand on.
//!
//! ```text
//! guest's device -> filter (throttle, copy-before-write ...) -> node -> file
//!                                                                |
//!                                  marks are on it, it is exported
//! ```

use std::collections::{BTreeMap, BTreeSet};

use highwater_hypervisor::{SkipReason, SkippedDisk, WriteErrorPolicy};
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::Client;
use super::error::QmpError;
use super::graph::Graph;
use crate::blocks::{Blocks, FILTERS_MAX, ReplyError, answer, is_filter};

/// Drivers of nodes that are an image, or where one is kept. Below anything else
/// that is no filter may be another thing than what the guest sees (`quorum`,
/// `replication`), or it is there for as long as a job only (`mirror_top`).
const IMAGES: [&str; 35] = [
    "bochs",
    "cloop",
    "dmg",
    "file",
    "ftp",
    "ftps",
    "gluster",
    "host_cdrom",
    "host_device",
    "http",
    "https",
    "io_uring",
    "iscsi",
    "iser",
    "luks",
    "nbd",
    "nfs",
    "null-aio",
    "null-co",
    "nvme",
    "nvme-io_uring",
    "parallels",
    "qcow",
    "qcow2",
    "qed",
    "raw",
    "rbd",
    "ssh",
    "vdi",
    "vhdx",
    "virtio-blk-vfio-pci",
    "virtio-blk-vhost-user",
    "virtio-blk-vhost-vdpa",
    "vmdk",
    "vpc",
];
/// Devices that are asked about.
const DEVICES_MAX: usize = 1024;
/// A file name has 255 bytes, and a target is part of one.
const TARGET_BYTES_MAX: usize = 64;

/// The guest's disks, and all of QEMU's nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) disks: Vec<GuestDisk>,
    pub(super) skipped: Vec<SkippedDisk>,
    /// Flash memory of the machine: the file's node, and whether it is
    /// read-only.
    pub(super) flash: Vec<(String, bool)>,
    pub(super) nodes: BTreeMap<String, Node>,
    pub(super) blocks: Blocks,
    pub(super) graph: Graph,
}

/// One disk of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct GuestDisk {
    /// What it is called here.
    pub(super) target: String,
    /// The device's name where somebody gave it one, else its path.
    pub(super) device: String,
    /// Its path among QEMU's objects, for `qom-get` and `qom-set`.
    pub(super) path: String,
    pub(super) serial: Option<String>,
    pub(super) write_errors: WriteErrorPolicy,
    /// The name of its block backend; none for one that was made for it.
    pub(super) backend: Option<String>,
    /// The node that the device is attached to.
    pub(super) root: String,
    /// Filters from there down, topmost first; the first one is `root` itself.
    pub(super) filters: Vec<String>,
    /// The node below them, which carries the marks and is exported; or why it
    /// cannot be told.
    pub(super) node: Result<String, String>,
}

/// What is said of a node beside what [`Blocks`] keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) driver: String,
    pub(super) file: String,
    pub(super) is_read_only: bool,
    pub(super) is_encrypted: bool,
    pub(super) has_data_file: bool,
}

/// What is asked of a device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct About {
    /// Its type among QEMU's objects.
    pub(super) kind: String,
    pub(super) serial: Option<String>,
    pub(super) write_errors: Option<String>,
    pub(super) is_shared: bool,
}

/// Asks QEMU for everything.
pub(super) fn look(client: &Client) -> Result<Layout, QmpError> {
    let nodes = client.run("query-named-block-nodes", json!({"flat": true}))?;
    let devices = client.run("query-block", json!({}))?;
    let malformed = |error: ReplyError| QmpError::Malformed(error.to_string());
    let graph = match client.run("x-debug-query-block-graph", json!({})) {
        Ok(graph) => Graph::parse(graph),
        Err(error) if error.is_refusal() => {
            Graph::from_stats(client.run("query-blockstats", json!({"query-nodes": true}))?)
        }
        Err(error) => return Err(error),
    };
    let graph = graph.map_err(malformed)?;
    let about = |path: &str| about(client, path);
    Layout::put_together(nodes, devices, graph, &about).map_err(malformed)
}

fn about(client: &Client, path: &str) -> About {
    let ask = |property: &str| {
        let arguments = json!({"path": path, "property": property});
        client.run("qom-get", arguments).ok()
    };
    let text = |property: &str| {
        let answer = ask(property)?;
        answer
            .as_str()
            .filter(|it| !it.is_empty())
            .map(str::to_owned)
    };
    About {
        kind: text("type").unwrap_or_default(),
        serial: text("serial"),
        write_errors: text("werror"),
        is_shared: ask("share-rw") == Some(Value::Bool(true)),
    }
}

impl Layout {
    /// Puts the answers together; `about` is asked for the guest's devices.
    pub(super) fn put_together(
        nodes: Value,
        devices: Value,
        graph: Graph,
        about: &dyn Fn(&str) -> About,
    ) -> Result<Self, ReplyError> {
        let wire_nodes: Vec<WireNode> = answer(nodes.clone())?;
        let wire_devices: Vec<WireDevice> = answer(devices.clone())?;
        let mut layout = Self {
            blocks: Blocks::from_values(nodes, devices)?,
            nodes: wire_nodes.into_iter().filter_map(WireNode::named).collect(),
            graph,
            ..Self::default()
        };
        let mut taken = BTreeSet::new();
        for device in wire_devices.into_iter().take(DEVICES_MAX) {
            layout.add(device, about, &mut taken);
        }
        Ok(layout)
    }

    fn add(
        &mut self,
        device: WireDevice,
        about: &dyn Fn(&str) -> About,
        taken: &mut BTreeSet<String>,
    ) {
        // A backend that no device uses.
        let Some(qdev) = device.qdev.filter(|it| !it.is_empty()) else {
            return;
        };
        let path = if qdev.starts_with('/') {
            qdev.clone()
        } else {
            format!("/machine/peripheral/{qdev}")
        };
        let backend = Some(device.device).filter(|it| !it.is_empty());
        let about = about(&path);
        let node = device.inserted.as_ref().and_then(|it| it.node_name.clone());
        if about.kind.starts_with("cfi.pflash") {
            let is_read_only = device.inserted.is_some_and(|it| it.ro);
            self.flash.extend(node.map(|node| (node, is_read_only)));
            return;
        }
        let own = own_name(&qdev);
        let target = backend
            .as_deref()
            .or(own.as_deref())
            .or(node.as_deref().filter(|node| !node.starts_with('#')))
            .map_or_else(|| last_parts(&qdev), str::to_owned);
        let target = unique(&harmless(&target), taken);
        let is_read_only = device.inserted.as_ref().is_some_and(|it| it.ro);
        let reason = skip_reason(&about, node.as_deref(), is_read_only).or_else(|| {
            self.is_transient(node.as_deref()?)
                .then_some(SkipReason::Transient)
        });
        // Without a node there is a reason.
        let (None, Some(root)) = (reason, node) else {
            let reason = reason.unwrap_or(SkipReason::Empty);
            self.skipped.push(SkippedDisk { target, reason });
            return;
        };
        let (filters, node) = self.descend(&root);
        self.disks.push(GuestDisk {
            target,
            device: own.unwrap_or_else(|| qdev.clone()),
            path,
            serial: about.serial.filter(|serial| !is_made_up(serial)),
            write_errors: write_errors(about.write_errors.as_deref()),
            backend,
            root,
            filters,
            node,
        });
    }

    /// Follows filters down to the node that is none.
    fn descend(&self, root: &str) -> (Vec<String>, Result<String, String>) {
        let mut filters = Vec::new();
        let mut name = root;
        for _ in 0..FILTERS_MAX {
            let driver = self.nodes.get(name).map_or("", |node| node.driver.as_str());
            if IMAGES.contains(&driver) {
                return (filters, Ok(name.to_owned()));
            }
            if !is_filter(driver) {
                let why = format!("a node `{name}` of kind `{driver}` is in the guest's path");
                return (filters, Err(why));
            }
            filters.push(name.to_owned());
            let Some(below) = self.graph.child(name, "file") else {
                let why = format!("QEMU does not tell what is below the filter `{name}`");
                return (filters, Err(why));
            };
            name = below;
        }
        (filters, Err("there is no end of filters".to_owned()))
    }

    /// Returns whether a node is the throw-away image of `snapshot=on`, which
    /// QEMU makes and removes at once.
    fn is_transient(&self, node: &str) -> bool {
        let storage = self.graph.child(node, "file");
        let file = storage
            .and_then(|storage| self.nodes.get(storage))
            .map_or("", |node| node.file.as_str());
        let name = file.rsplit('/').next().unwrap_or_default();
        let is_temporary = name.strip_prefix("vl.").is_some_and(|rest| rest.len() == 6);
        is_temporary && file.starts_with('/') && !std::path::Path::new(file).exists()
    }

    /// Returns whether a node only passes everything on.
    pub(super) fn is_filter(&self, node: &str) -> bool {
        let node = self.nodes.get(node);
        node.is_some_and(|node| is_filter(&node.driver))
    }
}

fn skip_reason(about: &About, node: Option<&str>, is_read_only: bool) -> Option<SkipReason> {
    match about.kind.as_str() {
        "ide-cd" | "scsi-cd" => return Some(SkipReason::Cdrom),
        "floppy" | "isa-fdc" | "sysbus-fdc" => return Some(SkipReason::Floppy),
        "scsi-block" | "scsi-generic" => return Some(SkipReason::PassedThrough),
        _ => {}
    }
    if node.is_none() {
        return Some(SkipReason::Empty);
    }
    if is_read_only {
        return Some(SkipReason::ReadOnly);
    }
    about.is_shared.then_some(SkipReason::Shareable)
}

fn write_errors(word: Option<&str>) -> WriteErrorPolicy {
    match word {
        Some("report") => WriteErrorPolicy::Report,
        Some("ignore") => WriteErrorPolicy::Ignore,
        _ => WriteErrorPolicy::Pause,
    }
}

/// Returns whether QEMU made a serial number up: it is no more than a count of
/// devices, and the next device may have it tomorrow.
fn is_made_up(serial: &str) -> bool {
    let digits = serial.strip_prefix("QM");
    digits.is_some_and(|it| it.len() == 5 && it.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Returns the name that somebody gave to a device.
fn own_name(qdev: &str) -> Option<String> {
    if !qdev.starts_with('/') {
        return Some(qdev.to_owned());
    }
    let name = qdev
        .strip_prefix("/machine/peripheral/")?
        .split('/')
        .next()?;
    Some(name.to_owned())
}

/// Makes a name of a path: its parts after the first two, without brackets.
fn last_parts(path: &str) -> String {
    let parts = path
        .split('/')
        .skip(3)
        .filter(|part| *part != "virtio-backend");
    parts.collect::<Vec<_>>().join("-").replace(['[', ']'], "")
}

/// Makes a name that may be part of a file's.
fn harmless(name: &str) -> String {
    let plain = |letter: char| {
        let is_plain = letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_' | '.');
        if is_plain { letter } else { '-' }
    };
    let name: String = name.chars().take(TARGET_BYTES_MAX).map(plain).collect();
    match name.chars().next() {
        None => "disk".to_owned(),
        Some('.' | '-') => format!("disk{name}"),
        Some(_) => name,
    }
}

fn unique(name: &str, taken: &mut BTreeSet<String>) -> String {
    let mut names =
        std::iter::once(name.to_owned()).chain((2_u32..).map(|number| format!("{name}-{number}")));
    // There are more numbers than devices.
    let free = names.find(|name| !taken.contains(name)).unwrap_or_default();
    taken.insert(free.clone());
    free
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct WireNode {
    node_name: Option<String>,
    drv: Option<String>,
    file: Option<String>,
    #[serde(default)]
    ro: bool,
    #[serde(default)]
    encrypted: bool,
    image: Option<WireImage>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct WireImage {
    format_specific: Option<WireFormat>,
}

#[derive(Deserialize)]
struct WireFormat {
    data: Option<WireFormatData>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct WireFormatData {
    data_file: Option<String>,
}

impl WireNode {
    fn named(self) -> Option<(String, Node)> {
        let image = self.image;
        let has_data_file = image
            .as_ref()
            .and_then(|image| image.format_specific.as_ref()?.data.as_ref())
            .is_some_and(|data| data.data_file.is_some());
        let node = Node {
            driver: self.drv.unwrap_or_default(),
            file: self.file.unwrap_or_default(),
            is_read_only: self.ro,
            is_encrypted: self.encrypted,
            has_data_file,
        };
        Some((self.node_name?, node))
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct WireDevice {
    #[serde(default)]
    device: String,
    qdev: Option<String>,
    inserted: Option<WireInserted>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct WireInserted {
    node_name: Option<String>,
    #[serde(default)]
    ro: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(devices: &Value, nodes: &[(&str, &str)], edges: &[(&str, &str)]) -> Layout {
        let node = |(name, driver): &(&str, &str)| {
            json!({"node-name": name, "drv": driver, "ro": false,
            "image": {"virtual-size": 64}})
        };
        let number = |name: &str| nodes.iter().position(|it| it.0 == name);
        let graph = json!({
            "nodes": nodes.iter().enumerate()
                .map(|(id, it)| json!({"id": id, "type": "block-driver", "name": it.0}))
                .collect::<Vec<_>>(),
            "edges": edges.iter()
                .map(|it| json!({"parent": number(it.0), "child": number(it.1), "name": "file"}))
                .collect::<Vec<_>>(),
        });
        let about = |_: &str| About::default();
        let nodes: Vec<Value> = nodes.iter().map(node).collect();
        let graph = Graph::parse(graph).unwrap();
        Layout::put_together(json!(nodes), devices.clone(), graph, &about).unwrap()
    }

    fn device(backend: &str, qdev: &str, node: &str) -> Value {
        json!({"device": backend, "qdev": qdev, "inserted": {"node-name": node, "ro": false}})
    }

    #[test]
    fn disks_are_called_alike_after_every_start_and_each_by_another_name() {
        let anonymous = "/machine/peripheral-anon/device[3]";
        let devices = json!([
            device("virtio0", &format!("{anonymous}/virtio-backend"), "#block1"),
            device("", "/machine/peripheral/data/virtio-backend", "#block2"),
            device("", "data", "n"),
            device("", anonymous, "node"),
            device("", &format!("{anonymous}/scsi.0/legacy[0]"), "#block3"),
            device("a/../b", anonymous, "#block4"),
            device(".hidden", anonymous, "#block5"),
        ]);
        let found = layout(&devices, &[], &[]);
        let names: Vec<_> = found
            .disks
            .iter()
            .map(|disk| disk.target.as_str())
            .collect();
        assert_eq!(
            names,
            [
                "virtio0",
                "data",
                "data-2",
                "node",
                "device3-scsi.0-legacy0",
                "a-..-b",
                "disk.hidden"
            ]
        );
    }

    #[test]
    fn the_node_is_below_known_filters_and_nowhere_else() {
        let nodes = [
            ("cbw", "copy-before-write"),
            ("th", "throttle"),
            ("top", "qcow2"),
            ("odd", "what-comes-later"),
            ("job", "mirror_top"),
            ("loop", "throttle"),
        ];
        let edges = [
            ("cbw", "th"),
            ("th", "top"),
            ("odd", "top"),
            ("job", "top"),
            ("loop", "loop"),
        ];
        for (root, node) in [
            ("cbw", Some("top")),
            ("top", Some("top")),
            ("odd", None),
            ("job", None),
            ("loop", None),
            ("gone", None),
        ] {
            let found = layout(&json!([device("a", "d", root)]), &nodes, &edges);
            let disk = &found.disks[0];
            assert_eq!(disk.node.as_deref().ok(), node, "{root}");
        }
    }

    #[test]
    fn statistics_tell_the_same_disks_as_the_graph_where_that_is_not_to_be_had() {
        let disks = |text: &str, parse: fn(Value) -> Result<Graph, ReplyError>| {
            let mut values = text.split('\0').map(|it| serde_json::from_str(it).unwrap());
            let mut next = || values.next().unwrap();
            let (nodes, devices, graph) = (next(), next(), parse(next()).unwrap());
            let about = |_: &str| About::default();
            let found = Layout::put_together(nodes, devices, graph, &about).unwrap();
            // Statistics tell of the data file of a qcow2 that has one, and not of
            // the image: such a disk's node counts as unknown then.
            let disks = found.disks.iter().filter(|disk| disk.target != "virtio3");
            let below = disks.map(|disk| found.graph.child(&disk.root, "file").map(str::to_owned));
            (below.collect::<Vec<_>>(), found.disks)
        };
        // Two answers of one QEMU.
        let graph = include_str!("../../fuzz/corpus/layout/real");
        let stats = include_str!("../../fuzz/corpus/layout/real-stats");
        let (told, known) = (disks(stats, Graph::from_stats), disks(graph, Graph::parse));
        assert_eq!(told, known);
        assert!(known.1.len() > 10);
    }

    #[test]
    fn a_serial_number_that_qemu_made_up_is_none() {
        assert!(is_made_up("QM00005"));
        assert!(!is_made_up("QM0005"));
        assert!(!is_made_up("SER00005"));
    }
}
