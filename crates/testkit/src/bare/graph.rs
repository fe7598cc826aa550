//! What a QEMU is made of at one moment, to be compared with another moment.

use anyhow::Result;
use serde_json::{Value, json};

use super::BareVm;
use crate::vm::bitmaps_of_node;

/// What a QEMU is made of. Two that are equal are equally tidy; printed, a
/// difference is seen at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Graph {
    /// `name driver file` of each node.
    pub nodes: Vec<String>,
    /// `device -> node` of each device of the guest.
    pub roots: Vec<String>,
    /// Names of exports.
    pub exports: Vec<String>,
    /// Names of jobs.
    pub jobs: Vec<String>,
    /// `node/name` of each named bitmap.
    pub bitmaps: Vec<String>,
    /// Names of user-made objects, such as throttle groups.
    pub objects: Vec<String>,
    /// QEMU's word for the run state.
    pub state: String,
}

impl Graph {
    /// Leaves bitmaps out: what a backup is meant to change.
    #[must_use]
    pub fn without_bitmaps(mut self) -> Self {
        self.bitmaps.clear();
        self
    }
}

impl BareVm {
    /// Reports what QEMU is made of now.
    pub fn graph(&self) -> Result<Graph> {
        let mut nodes = Vec::new();
        let mut bitmaps = Vec::new();
        for node in list(&self.nodes()?) {
            let name = text(node, "node-name");
            let (driver, file) = (text(node, "drv"), text(node, "file"));
            nodes.push(format!("{name} {driver} {file}"));
            bitmaps.extend(bitmaps_of_node(node).map(|it| format!("{name}/{}", it.name)));
        }
        let mut roots = Vec::new();
        for drive in list(&self.qmp("query-block", &json!({}))?) {
            if let Some(device) = drive["qdev"].as_str() {
                roots.push(format!(
                    "{device} -> {}",
                    text(&drive["inserted"], "node-name")
                ));
            }
        }
        let exports = self.qmp("query-block-exports", &json!({}))?;
        let jobs = self.qmp("query-jobs", &json!({}))?;
        let objects = self.qmp("qom-list", &json!({"path": "/objects"}))?;
        let sorted = |mut list: Vec<String>| {
            list.sort();
            list
        };
        Ok(Graph {
            nodes: sorted(nodes),
            roots: sorted(roots),
            exports: sorted(names(&exports, "id")),
            jobs: sorted(names(&jobs, "id")),
            bitmaps: sorted(bitmaps),
            objects: sorted(names(&objects, "name")),
            state: self.state()?,
        })
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or("-")
}

fn names(value: &Value, field: &str) -> Vec<String> {
    list(value)
        .map(|item| text(item, field).to_owned())
        .collect()
}
