//! What stands on what in QEMU's block layer.
//!
//! One query tells it all (`x-debug-query-block-graph`, since QEMU 4.0), and it
//! is not a stable one. Where it is missing, the statistics of nodes tell what
//! stands on what, but for the raw data files of qcow2 images.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use serde_json::Value;

use crate::blocks::{ReplyError, WireGraph, WireGraphNode, answer};

/// No sane stack of nodes is higher.
const DEPTH_MAX: usize = 512;

/// The edges between nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Graph {
    /// Children by their parent's name: what each is to it, and its name.
    children: BTreeMap<String, Vec<(String, String)>>,
    /// Whether that is all there is.
    pub(super) is_whole: bool,
}

impl Graph {
    pub(super) fn parse(value: Value) -> Result<Self, ReplyError> {
        let wire: WireGraph = answer(value)?;
        let named: BTreeMap<u64, WireGraphNode> =
            wire.nodes.into_iter().map(|node| (node.id, node)).collect();
        let mut graph = Self {
            is_whole: true,
            ..Self::default()
        };
        for edge in wire.edges {
            let (Some(parent), Some(child)) = (named.get(&edge.parent), named.get(&edge.child))
            else {
                continue;
            };
            // What jobs and guests' devices hold is told elsewhere.
            if parent.kind == "block-driver" {
                let children = graph.children.entry(parent.name.clone()).or_default();
                children.push((edge.name, child.name.clone()));
            }
        }
        Ok(graph)
    }

    /// Reads it from the answer to `query-blockstats` about all nodes.
    pub(super) fn from_stats(value: Value) -> Result<Self, ReplyError> {
        let stats: Vec<WireStats> = answer(value)?;
        let mut graph = Self::default();
        for node in stats {
            let Some(name) = node.node_name else { continue };
            let below = [("file", node.parent), ("backing", node.backing)];
            let named = below.into_iter().filter_map(|(role, child)| {
                let child = child?.node_name?;
                Some((role.to_owned(), child))
            });
            graph.children.insert(name, named.collect());
        }
        Ok(graph)
    }

    /// Returns the child that a node has under this name (`file`, `backing`).
    pub(super) fn child(&self, node: &str, name: &str) -> Option<&str> {
        let children = self.children.get(node)?;
        let found = children.iter().find(|(role, _)| role == name)?;
        Some(&found.1)
    }

    /// Returns what images have as their backing, by the image.
    pub(super) fn backings(&self) -> BTreeMap<String, String> {
        let of = |(name, children): (&String, &Vec<(String, String)>)| {
            let found = children.iter().find(|(role, _)| role == "backing")?;
            Some((name.clone(), found.1.clone()))
        };
        self.children.iter().filter_map(of).collect()
    }

    /// Returns the nodes that stand on this one.
    pub(super) fn parents<'a>(&'a self, node: &'a str) -> impl Iterator<Item = &'a str> {
        let stands_on = move |(_, children): &(&String, &Vec<(String, String)>)| {
            children.iter().any(|(_, child)| child == node)
        };
        let parents = self.children.iter().filter(stands_on);
        parents.map(|(name, _)| name.as_str())
    }

    /// Returns a node and all that is below it.
    pub(super) fn below(&self, node: &str) -> BTreeSet<String> {
        let mut found = BTreeSet::from([node.to_owned()]);
        let mut next = vec![node.to_owned()];
        while let Some(node) = next.pop() {
            if found.len() >= DEPTH_MAX {
                break;
            }
            for (_, child) in self.children.get(&node).into_iter().flatten() {
                if found.insert(child.clone()) {
                    next.push(child.clone());
                }
            }
        }
        found
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct WireStats {
    node_name: Option<String>,
    parent: Option<Box<WireBelow>>,
    backing: Option<Box<WireBelow>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct WireBelow {
    node_name: Option<String>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_device_called_like_a_node_is_not_taken_for_it_and_a_circle_ends() {
        let node = |id: u64, kind: &str, name: &str| json!({"id": id, "type": kind, "name": name});
        let edge = |parent: u64, child: u64, name: &str| json!({"parent": parent, "child": child, "name": name});
        let graph = Graph::parse(json!({
            "nodes": [node(1, "block-backend", "a"), node(2, "block-driver", "a"),
                node(3, "block-driver", "b"), node(4, "block-job", "j")],
            "edges": [edge(1, 3, "root"), edge(2, 3, "file"), edge(3, 2, "backing"),
                edge(4, 3, "main node"), edge(9, 9, "x")],
        }))
        .unwrap();
        assert_eq!(graph.child("a", "file"), Some("b"));
        assert_eq!(graph.child("a", "root"), None);
        assert_eq!(graph.parents("b").collect::<Vec<_>>(), ["a"]);
        assert_eq!(graph.below("a").len(), 2);
    }
}
