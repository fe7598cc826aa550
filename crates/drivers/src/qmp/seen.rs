//! What QEMU says about its block layer, as far as a session is concerned.
//!
//! What is below a filter is asked for when it is to be taken out, never
//! remembered: somebody may have taken a snapshot meanwhile, and the guest would
//! be given a stale image. `query-blockstats` tells it, which every QEMU has.
//! Images that were made on top of a filter are asked for likewise.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::client::Client;
use super::error::QmpError;
use super::graph::Graph;
use super::objects::{Ours, Role, STOP_KIND, Which};
use crate::blocks::{FILTERS_MAX, is_filter};
use crate::names::session_of_scratch;

/// What QEMU says about its block layer, as far as a session is concerned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) nodes: BTreeMap<String, Node>,
    pub(super) devices: Vec<Device>,
    /// The one child that a node passes everything on to, by its name.
    pub(super) below: BTreeMap<String, String>,
    /// What an image has as its backing, by the image's node.
    pub(super) backing: BTreeMap<String, String>,
    pub(super) exports: Vec<ExportOf>,
    /// User-made objects: names and types.
    pub(super) objects: BTreeMap<String, String>,
}

/// One node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) driver: String,
    /// As QEMU spells it: a path, or JSON.
    pub(super) file: String,
    pub(super) size_bytes: u64,
    detect_zeroes: String,
    is_direct: bool,
    is_without_flush: bool,
}

impl Node {
    /// Returns the path of its file, however QEMU spells it: with options, it is
    /// JSON.
    pub(super) fn path(&self) -> Option<PathBuf> {
        let Some(json) = self.file.strip_prefix("json:") else {
            return Some(PathBuf::from(&self.file));
        };
        let spelled: Value = serde_json::from_str(json).ok()?;
        let file = spelled.get("file")?.get("filename")?;
        file.as_str().map(PathBuf::from)
    }
}

/// One guest device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Device {
    /// Its absolute QOM path.
    pub(super) path: String,
    pub(super) root: String,
}

/// An export, and the node that it shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ExportOf {
    pub(super) id: String,
    pub(super) node: String,
    pub(super) is_ending: bool,
}

/// Where a filter is, or can be put, into a guest's path: what stands on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Seat {
    /// The guest's device itself.
    Device {
        /// Its QOM path.
        path: String,
    },
    /// A filter of the VM's owner that stays above: what it does (throttling)
    /// is not to be done to our copies.
    Below {
        /// Its name.
        node: String,
        /// With what it is opened anew, without its child.
        options: Map<String, Value>,
    },
    /// An image that was made on top of it: somebody has taken a snapshot of the
    /// guest's device. It names our filter as what its backing is.
    Backing {
        /// Its name.
        overlay: String,
    },
    /// A node that cannot be given another child.
    Fixed {
        /// Its name.
        node: String,
    },
}

impl Seen {
    pub(super) fn read(client: &Client) -> Result<Self, QmpError> {
        let nodes: Vec<WireNode> =
            ask(client, "query-named-block-nodes", &json!({ "flat": true }))?;
        let devices: Vec<WireDevice> = ask(client, "query-block", &json!({}))?;
        let stats: Vec<WireStats> =
            ask(client, "query-blockstats", &json!({ "query-nodes": true }))?;
        let exports: Vec<WireExport> = ask(client, "query-block-exports", &json!({}))?;
        let objects: Vec<WireObject> = ask(client, "qom-list", &json!({ "path": "/objects" }))?;
        Ok(Self {
            nodes: nodes.into_iter().filter_map(WireNode::named).collect(),
            devices: devices.into_iter().filter_map(WireDevice::used).collect(),
            below: stats
                .into_iter()
                .filter_map(|it| Some((it.node_name?, it.parent?.node_name?)))
                .collect(),
            backing: backing(client)?,
            exports: exports
                .into_iter()
                .map(|it| ExportOf {
                    id: it.id,
                    node: it.node_name,
                    is_ending: it.shutting_down,
                })
                .collect(),
            objects: objects.into_iter().map(|it| (it.name, it.kind)).collect(),
        })
    }

    /// Returns the nodes that the device's guest writes through, from its root
    /// down to the first that is no filter.
    pub(super) fn path<'a>(&'a self, device: &'a Device) -> Vec<&'a str> {
        let mut path = vec![device.root.as_str()];
        let mut node = device.root.as_str();
        while self.is_filter(node) && path.len() < FILTERS_MAX {
            let Some(below) = self.below.get(node) else {
                break;
            };
            path.push(below);
            node = below;
        }
        path
    }

    fn is_filter(&self, node: &str) -> bool {
        self.nodes
            .get(node)
            .is_some_and(|node| is_filter(&node.driver))
    }

    /// Returns where to put a filter above `node` into the path of a device: as
    /// low as QEMU can.
    pub(super) fn seat(&self, device: &Device) -> (Seat, String) {
        let path = self.path(device);
        let pairs = path.iter().zip(path.iter().skip(1));
        let lowest = pairs.rev().find_map(|(above, below)| {
            let options = self.reopen_options(above)?;
            let node = (*above).to_owned();
            Some((Seat::Below { node, options }, (*below).to_owned()))
        });
        lowest.unwrap_or_else(|| {
            let path = device.path.clone();
            (Seat::Device { path }, device.root.clone())
        })
    }

    /// Returns everything through which a guest may write to this node of ours.
    pub(super) fn seats_of(&self, filter: &str) -> Vec<Seat> {
        let devices = self.devices.iter().filter(|it| it.root == filter);
        let mut seats: Vec<Seat> = devices
            .map(|device| Seat::Device {
                path: device.path.clone(),
            })
            .collect();
        let above = self.below.iter().filter(|(_, below)| *below == filter);
        for (node, _) in above {
            let is_reader = self.nodes.get(node).map(|it| it.driver.as_str());
            if is_reader == Some("snapshot-access") {
                continue;
            }
            let node = node.clone();
            seats.push(match self.reopen_options(&node) {
                Some(options) => Seat::Below { node, options },
                None => Seat::Fixed { node },
            });
        }
        seats.extend(self.overlays_of(filter).map(|overlay| Seat::Backing {
            overlay: overlay.to_owned(),
        }));
        seats
    }

    /// Returns the images that were made on top of this node.
    pub(super) fn overlays_of<'a>(&'a self, node: &'a str) -> impl Iterator<Item = &'a str> {
        let found = self.backing.iter().filter(move |it| it.1 == node);
        found.map(|(overlay, _)| overlay.as_str())
    }

    /// Returns with what a node can be opened anew so that it is as it was; the
    /// one filter of QEMU that can be is `throttle`.
    fn reopen_options(&self, name: &str) -> Option<Map<String, Value>> {
        let node = self.nodes.get(name)?;
        if node.driver != "throttle" {
            return None;
        }
        let spelled: Value = serde_json::from_str(node.file.strip_prefix("json:")?).ok()?;
        let group = spelled.get("throttle-group")?.as_str()?;
        let options = json!({
            "driver": "throttle",
            "node-name": name,
            "throttle-group": group,
            // QEMU does not tell whether discards were let through; what is
            // below decides for itself.
            "discard": "unmap",
            "detect-zeroes": node.detect_zeroes,
            "cache": { "direct": node.is_direct, "no-flush": node.is_without_flush },
        });
        match options {
            Value::Object(options) => Some(options),
            _ => None,
        }
    }

    /// Finds what is ours: of these sessions' disks, or all of it.
    pub(super) fn ours(&self, which: &Which) -> Ours {
        let of_role = |name: &str, wanted: Role| {
            Role::of(name).is_some_and(|(role, hash)| role == wanted && which.includes(hash))
        };
        let nodes = |role: Role| {
            let names = self.nodes.keys();
            names.filter(move |name| of_role(name, role)).cloned()
        };
        let (exports, others): (Vec<_>, Vec<_>) = self
            .exports
            .iter()
            .partition(|export| of_role(&export.id, Role::Export));
        let objects = |role: Role, kind: &str| {
            let of_kind = self.objects.iter().filter(|(name, found)| {
                found.strip_prefix("child<") == Some(&format!("{kind}>")) && of_role(name, role)
            });
            of_kind.map(|(name, _)| name.clone()).collect()
        };
        let fleeces: Vec<String> = nodes(Role::Fleece).collect();
        Ours {
            sessions: fleeces
                .iter()
                .filter_map(|name| session_of_scratch(&self.nodes.get(name)?.file))
                .collect(),
            exports: exports.into_iter().map(|it| it.id.clone()).collect(),
            is_shared: !others.is_empty(),
            snapshots: nodes(Role::Snapshot).collect(),
            filters: nodes(Role::Filter).collect(),
            fleeces,
            keys: objects(Role::Key, "secret"),
            stops: objects(Role::Stop, STOP_KIND),
        }
    }
}

/// Returns what images have as their backing. Statistics do not show it where it
/// is a filter; the graph does (QEMU 4.0 and later).
fn backing(client: &Client) -> Result<BTreeMap<String, String>, QmpError> {
    let graph = match client.run("x-debug-query-block-graph", json!({})) {
        Ok(answer) => Graph::parse(answer)
            .map_err(|error| QmpError::Malformed(format!("the graph of nodes: {error}")))?,
        Err(error) if error.is_refusal() => return Ok(BTreeMap::new()),
        Err(error) => return Err(error),
    };
    Ok(graph.backings())
}

/// A device with an id is told by it alone, and a bus may have the same.
fn absolute(qdev: String) -> String {
    if qdev.starts_with('/') {
        qdev
    } else {
        format!("/machine/peripheral/{qdev}")
    }
}

/// Asks, and takes the answer as what it should be.
pub(super) fn ask<T: DeserializeOwned>(
    client: &Client,
    command: &str,
    arguments: &Value,
) -> Result<T, QmpError> {
    let answer = client.run(command, arguments.clone())?;
    serde_json::from_value(answer)
        .map_err(|error| QmpError::Malformed(format!("the answer to `{command}`: {error}")))
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct WireNode {
    node_name: Option<String>,
    #[serde(default)]
    drv: String,
    #[serde(default)]
    file: String,
    /// With an underscore, alone of all.
    #[serde(default, rename = "detect_zeroes")]
    detect_zeroes: String,
    #[serde(default)]
    cache: WireCache,
    image: Option<WireImage>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct WireCache {
    #[serde(default)]
    direct: bool,
    #[serde(default)]
    no_flush: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct WireImage {
    #[serde(default)]
    virtual_size: u64,
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

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct WireStats {
    node_name: Option<String>,
    parent: Option<Box<WireBelow>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct WireBelow {
    node_name: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct WireExport {
    id: String,
    node_name: String,
    #[serde(default)]
    shutting_down: bool,
}

#[derive(Deserialize)]
struct WireObject {
    name: String,
    #[serde(rename = "type")]
    kind: String,
}

impl WireNode {
    fn named(self) -> Option<(String, Node)> {
        let node = Node {
            driver: self.drv,
            file: self.file,
            size_bytes: self.image.map(|it| it.virtual_size).unwrap_or_default(),
            detect_zeroes: self.detect_zeroes,
            is_direct: self.cache.direct,
            is_without_flush: self.cache.no_flush,
        };
        Some((self.node_name?, node))
    }
}

impl WireDevice {
    fn used(self) -> Option<Device> {
        Some(Device {
            path: absolute(self.qdev?),
            root: self.inserted?.node_name?,
        })
    }
}

#[cfg(test)]
mod tests {
    use highwater_model::SessionId;

    use super::*;

    fn session() -> SessionId {
        SessionId::from_bytes([1; 8])
    }

    fn seen(nodes: &[(&str, &str, &str)], below: &[(&str, &str)], root: &str) -> Seen {
        let node = |(name, driver, file): &(&str, &str, &str)| {
            let node = Node {
                driver: (*driver).to_owned(),
                file: (*file).to_owned(),
                ..Node::default()
            };
            ((*name).to_owned(), node)
        };
        Seen {
            nodes: nodes.iter().map(node).collect(),
            below: below
                .iter()
                .map(|(above, below)| ((*above).to_owned(), (*below).to_owned()))
                .collect(),
            devices: vec![Device {
                path: "/d".to_owned(),
                root: root.to_owned(),
            }],
            ..Seen::default()
        }
    }

    const THROTTLE: &str = r#"json:{"throttle-group": "tg", "driver": "throttle", "file": {}}"#;

    #[test]
    fn the_filter_goes_below_what_throttles_and_above_everything_else() {
        let plain = seen(&[("n", "qcow2", "/a")], &[("n", "#block1")], "n");
        assert_eq!(
            plain.seat(&plain.devices[0]),
            (Seat::Device { path: "/d".into() }, "n".into())
        );
        let nodes = [("th", "throttle", THROTTLE), ("n", "qcow2", "/a")];
        let throttled = seen(&nodes, &[("th", "n"), ("n", "#block1")], "th");
        let (seat, below) = throttled.seat(&throttled.devices[0]);
        assert!(matches!(seat, Seat::Below { node, .. } if node == "th"));
        assert_eq!(below, "n");
        // One that cannot be opened anew stays below.
        let nodes = [
            ("cor", "copy-on-read", "json:{}"),
            ("th", "throttle", THROTTLE),
            ("n", "qcow2", "/a"),
        ];
        let mixed = seen(&nodes, &[("cor", "n"), ("th", "cor")], "th");
        let (seat, below) = mixed.seat(&mixed.devices[0]);
        assert!(matches!(seat, Seat::Below { node, .. } if node == "th"));
        assert_eq!(below, "cor");
        let above = seen(&nodes, &[("th", "n"), ("cor", "th")], "cor");
        let (seat, below) = above.seat(&above.devices[0]);
        assert!(matches!(seat, Seat::Below { node, .. } if node == "th"));
        assert_eq!(below, "n");
    }

    #[test]
    fn a_filter_is_found_wherever_it_stands_and_its_reader_is_no_guest() {
        let cbw = Role::Filter.name(session(), "vda");
        let snap = Role::Snapshot.name(session(), "vda");
        let nodes = [
            (cbw.as_str(), "copy-before-write", "/a"),
            (snap.as_str(), "snapshot-access", "/a"),
            ("th", "throttle", THROTTLE),
            ("odd", "quorum", "/a"),
        ];
        let at_root = seen(&nodes, &[(&snap, &cbw), (&cbw, "n")], &cbw);
        assert_eq!(at_root.seats_of(&cbw), [Seat::Device { path: "/d".into() }]);
        let below = seen(&nodes, &[("th", &cbw), (&snap, &cbw)], "th");
        assert!(matches!(&below.seats_of(&cbw)[..], [Seat::Below { node, .. }] if node == "th"));
        let mut overlaid = seen(&nodes, &[(&cbw, "n")], "ov");
        overlaid.backing = [("ov".to_owned(), cbw.clone())].into();
        let overlay = "ov".to_owned();
        assert_eq!(overlaid.seats_of(&cbw), [Seat::Backing { overlay }]);
        let odd = seen(&nodes, &[("odd", &cbw)], "odd");
        assert!(matches!(&odd.seats_of(&cbw)[..], [Seat::Fixed { node }] if node == "odd"));
        assert!(
            seen(&nodes, &[(&snap, &cbw)], "n")
                .seats_of(&cbw)
                .is_empty()
        );
    }

    #[test]
    fn only_objects_with_our_names_are_ours_and_a_fleece_tells_whose() {
        let fleece = Role::Fleece.name(session(), "vda");
        let file = "/s/hw-0101010101010101-vda.scratch";
        let nodes = [
            (fleece.as_str(), "qcow2", file),
            ("qmpbackup-n-fleece", "qcow2", "/f"),
            ("hw-cbw-mine", "copy-before-write", "/f"),
        ];
        let mut found = seen(&nodes, &[], "n");
        let export = |id: &str| ExportOf {
            id: id.to_owned(),
            node: "n".to_owned(),
            is_ending: false,
        };
        found.exports = vec![
            export("theirs"),
            export(&Role::Export.name(session(), "vda")),
        ];
        let key = Role::Key.name(session(), "");
        for (name, kind) in [("tg", "child<throttle-group>"), (&key, "child<secret>")] {
            found.objects.insert(name.to_owned(), kind.to_owned());
        }
        let ours = found.ours(&Which::All);
        assert_eq!(ours.fleeces, [fleece]);
        assert_eq!((ours.exports.len(), ours.is_shared), (1, true));
        assert_eq!(ours.sessions.first(), Some(&session()));
        assert_eq!((ours.keys.len(), ours.stops.len()), (1, 0));
        assert!(ours.filters.is_empty());
        let other = SessionId::from_bytes([2; 8]);
        let which = Which::of_session(other, ["vda"].into_iter());
        assert!(found.ours(&which).is_nothing());
        let which = Which::of_session(session(), ["vda"].into_iter());
        assert_eq!(found.ours(&which).fleeces.len(), 1);
    }
}
