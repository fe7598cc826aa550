//! Looks at what else is around a VM. Changes nothing.
//!
//! Nothing here decides how a backup is made, so a QEMU that does not answer
//! one of these questions makes the answer shorter, and is no error.

use highwater_hypervisor::{
    ExportFacts, HypervisorError, InnerJob, JobDetails, LooseNode, RunState, Surroundings, VmRef,
};
use serde::Deserialize;

use super::connection::{LibvirtDriver, query_blocks};
use super::domain_xml::DomainXml;
use super::jobs::{backup_job, run_state};
use super::observe::read_definition;
use super::remains::{self, Remains};
use super::sys::handles::DomainHandle;
use crate::blocks::{self, Blocks};

const QUERY_JOBS: &str = r#"{"execute":"query-jobs"}"#;

impl LibvirtDriver {
    pub(super) fn survey_vm(&mut self, vm: &VmRef) -> Result<Surroundings, HypervisorError> {
        let domain = self.domain(vm)?;
        if run_state(vm, &domain)? == RunState::Off {
            return Ok(Surroundings::default());
        }
        let definition = read_definition(vm, &domain, true)?;
        let blocks = query_blocks(vm, &domain)?;
        let job = job_details(vm, &domain)?;
        // libvirt's own job has exports, filters and jobs of QEMU without number.
        let (remains, mut inner_jobs, mut exports) = if job.is_some() {
            (Remains::default(), Vec::new(), Vec::new())
        } else {
            let remains = remains::look(vm, &domain).unwrap_or_default();
            (remains, inner_jobs(&domain), exports(&domain))
        };
        inner_jobs.retain(|job| !remains.jobs.contains(&job.id));
        exports.retain(|export| !remains.exports.contains(&export.id));
        // A job of ours that is left has its filter on the guest's disk.
        let has_job = job.is_some() || !remains.jobs.is_empty();
        let mut loose_nodes = loose_nodes(&domain, &definition, &blocks, has_job);
        loose_nodes.retain(|node| !remains.nodes.contains(&node.node));
        Ok(Surroundings {
            remains: remains.sessions.into_iter().collect(),
            loose_nodes,
            job,
            inner_jobs,
            exports,
        })
    }
}

fn job_details(vm: &VmRef, domain: &DomainHandle) -> Result<Option<JobDetails>, HypervisorError> {
    let stats = domain
        .job_stats()
        .ok()
        .filter(|it| matches!(it.kind, 1 | 2));
    let running_s = stats
        .as_ref()
        .and_then(|it| it.elapsed_ms)
        .map(|ms| ms / 1000);
    let details = match backup_job(vm, domain)? {
        Some(job) => Some(JobDetails {
            running_s,
            address: job.socket.map(|path| path.display().to_string()),
            files: job.disks.into_iter().filter_map(|it| it.scratch).collect(),
        }),
        None => stats.map(|_| JobDetails {
            running_s,
            address: None,
            files: Vec::new(),
        }),
    };
    Ok(details)
}

fn ask<T: for<'de> Deserialize<'de>>(domain: &DomainHandle, query: &str) -> Vec<T> {
    let reply = domain.monitor_command(query).ok();
    reply
        .and_then(|reply| blocks::reply::<Vec<T>>(&reply).ok())
        .unwrap_or_default()
}

fn inner_jobs(domain: &DomainHandle) -> Vec<InnerJob> {
    let jobs: Vec<WireJob> = ask(domain, QUERY_JOBS);
    jobs.into_iter()
        .filter(|job| job.status != "concluded" && job.status != "null")
        .map(|job| InnerJob {
            id: job.id,
            kind: job.kind,
        })
        .collect()
}

fn exports(domain: &DomainHandle) -> Vec<ExportFacts> {
    let exports: Vec<WireExport> = ask(domain, blocks::QUERY_EXPORTS);
    exports
        .into_iter()
        .map(|export| ExportFacts {
            id: export.id,
            kind: export.kind,
            node: export.node_name,
        })
        .collect()
}

/// Returns nodes that libvirt did not make: its own all carry its name.
fn loose_nodes(
    domain: &DomainHandle,
    definition: &DomainXml,
    blocks: &Blocks,
    job_runs: bool,
) -> Vec<LooseNode> {
    let root_of = |node: &str| {
        definition
            .disks
            .iter()
            .find(|disk| {
                let alias = disk.alias.as_deref();
                alias.and_then(|alias| blocks.root_of(alias)) == Some(node)
            })
            .map(|disk| disk.target.clone())
    };
    let nodes: Vec<WireNode> = ask(domain, blocks::QUERY_NODES);
    nodes
        .into_iter()
        .filter_map(|node| {
            let (name, driver) = (node.node_name?, node.drv.unwrap_or_default());
            let root_of = root_of(&name);
            // QEMU itself names nodes so that nobody named: protocol layers, and
            // the filters of its own jobs.
            let is_nameless = name.starts_with('#');
            let is_loose = !name.starts_with("libvirt-")
                && (!is_nameless
                    || (!job_runs
                        && (root_of.is_some() || FILTERS_OF_BACKUPS.contains(&driver.as_str()))));
            is_loose.then_some(LooseNode {
                node: name,
                driver,
                file: node.file.filter(|file| file.starts_with('/')),
                root_of,
            })
        })
        .collect()
}

const FILTERS_OF_BACKUPS: [&str; 2] = ["copy-before-write", "snapshot-access"];

#[derive(Deserialize)]
struct WireJob {
    id: String,
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    status: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct WireExport {
    id: String,
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    node_name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct WireNode {
    node_name: Option<String>,
    drv: Option<String>,
    file: Option<String>,
}
