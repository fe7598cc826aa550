//! Looks at what else is around a VM. Changes nothing.

use highwater_hypervisor::{
    ExportFacts, HypervisorError, InnerJob, JobDetails, LooseNode, Surroundings, VmRef,
};
use serde_json::{Value, json};

use super::QmpDriver;
use super::client::Client;
use super::error::{QmpError, explain};
use super::files::{Files, Location};
use super::jobs::{running_jobs, sessions};
use super::layout::{self, Layout};
use super::observe::text_of;
use crate::names::session_of_scratch;

/// Filters that a backup puts into the guest's path, or beside it.
const FILTERS_OF_BACKUPS: [&str; 2] = ["copy-before-write", "snapshot-access"];

impl QmpDriver {
    pub(super) fn survey_vm(&mut self, vm: &VmRef) -> Result<Surroundings, HypervisorError> {
        let client = self.expect_vm(vm)?;
        let files = Files::of(self.process().as_ref());
        surroundings(&client, &files).map_err(|error| {
            explain(
                format!("cannot look at the surroundings of VM `{}`", vm.name),
                &error,
            )
        })
    }
}

fn surroundings(client: &Client, files: &Files) -> Result<Surroundings, QmpError> {
    let layout = layout::look(client)?;
    let ours = sessions(&layout);
    let jobs = running_jobs(client)?;
    // The session that counts as the running job; others are what is left.
    let job = (!ours.is_empty()).then(|| JobDetails {
        running_s: None,
        address: None,
        files: scratch_files(&layout, files),
    });
    let exports = client.run("query-block-exports", json!({}))?;
    Ok(Surroundings {
        job,
        remains: ours.into_iter().skip(1).collect(),
        inner_jobs: jobs
            .into_iter()
            .map(|job| InnerJob {
                id: job.id,
                kind: job.kind,
            })
            .collect(),
        exports: exports_in(&exports),
        loose_nodes: loose_nodes(&layout),
    })
}

fn scratch_files(layout: &Layout, files: &Files) -> Vec<std::path::PathBuf> {
    let ours = layout.nodes.values().filter(|node| {
        // A protocol's node only: the format's above it has the same file.
        node.driver == "file" && session_of_scratch(&node.file).is_some()
    });
    ours.filter_map(|node| match files.location(&node.driver, &node.file) {
        Location::File(path) => Some(path),
        Location::Block(_) | Location::Other(_) => None,
    })
    .collect()
}

fn exports_in(answer: &Value) -> Vec<ExportFacts> {
    let exports = answer.as_array().map(Vec::as_slice).unwrap_or_default();
    let exports = exports.iter().map(|export| ExportFacts {
        id: text_of(export, "id").unwrap_or_default(),
        kind: text_of(export, "type").unwrap_or_default(),
        node: text_of(export, "node-name").unwrap_or_default(),
    });
    exports.filter(|export| !is_ours(&export.id)).collect()
}

/// Who started QEMU made all its nodes by hand, so only those are told that a
/// backup uses.
fn loose_nodes(layout: &Layout) -> Vec<LooseNode> {
    let root_of = |name: &str| {
        let disk = layout.disks.iter().find(|disk| disk.root == name);
        disk.map(|disk| disk.target.clone())
    };
    let of_backups = layout.nodes.iter().filter(|(name, node)| {
        FILTERS_OF_BACKUPS.contains(&node.driver.as_str()) && !is_ours(name)
    });
    of_backups
        .map(|(name, node)| LooseNode {
            node: name.clone(),
            driver: node.driver.clone(),
            file: Some(node.file.clone()).filter(|file| file.starts_with('/')),
            root_of: root_of(name),
        })
        .collect()
}

/// Returns whether an object has a name that a session gives.
fn is_ours(name: &str) -> bool {
    let of_roles = ["fleece", "ffile", "cbw", "snap", "exp"];
    name.strip_prefix("hw-")
        .and_then(|rest| rest.split_once('-'))
        .is_some_and(|(role, hash)| of_roles.contains(&role) && hash.len() == 12)
}
