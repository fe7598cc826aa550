//! What libvirt leaves of a session of ours in QEMU.
//!
//! libvirt tidies up after a job in several steps, and forgets those that are
//! left when it dies in between: an NBD server (QEMU has one, and the next
//! backup needs it), exports, and scratch nodes, which hold their files open.
//! They are known by the names of our scratch files, so nobody else's are
//! touched. Whoever holds the VM's lock and claim and sees that no job runs
//! knows that no session is alive.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use highwater_hypervisor::{ErrorKind, HypervisorError, RunState, VmRef};
use highwater_model::{ClaimId, SessionId};
use serde::Deserialize;
use serde_json::{Value, json};

use super::claims;
use super::error::explain;
use super::jobs::{backup_job, run_state};
use super::sys::handles::DomainHandle;
use crate::blocks::{QUERY_EXPORTS, QUERY_GRAPH, QUERY_NODES, ReplyError, jobs_on, reply};
use crate::names::session_of_scratch;

/// An export lets go of its node when its connections are closed.
const TRIES: usize = 50;
const TRY_INTERVAL: Duration = Duration::from_millis(20);

/// What of ours is in a QEMU without a job.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Remains {
    pub(super) sessions: BTreeSet<SessionId>,
    /// Nodes of our scratch files.
    pub(super) nodes: Vec<String>,
    /// Jobs that use these nodes.
    pub(super) jobs: Vec<String>,
    /// Exports of these nodes.
    pub(super) exports: Vec<String>,
    /// Whether there are exports of others.
    is_shared: bool,
}

/// What was removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Cleared {
    pub(super) sessions: BTreeSet<SessionId>,
    /// What could not be.
    pub(super) warnings: Vec<String>,
}

/// Removes what dead sessions have left in a QEMU in which no job runs; nothing
/// is removed while one does.
///
/// Jobs in QEMU are named after the guest's disks, and there is one NBD server,
/// so a successor's would be hit as well: see [`claims::act`]. Scratch nodes and
/// their exports have names that QEMU's process uses once.
pub(super) fn clear_unless_job(
    vm: &VmRef,
    domain: &DomainHandle,
    claim: Option<ClaimId>,
) -> Result<Cleared, HypervisorError> {
    let has_job =
        || Ok(run_state(vm, domain)? == RunState::Off || backup_job(vm, domain)?.is_some());
    if has_job()? || look(vm, domain)?.nodes.is_empty() {
        return Ok(Cleared::default());
    }
    claims::act(vm, domain, claim, || {
        if has_job()? {
            return Ok(Cleared::default());
        }
        clear(vm, domain)
    })
}

fn clear(vm: &VmRef, domain: &DomainHandle) -> Result<Cleared, HypervisorError> {
    let remains = look(vm, domain)?;
    let mut warnings = Vec::new();
    for job in &remains.jobs {
        let arguments = json!({"device": job, "force": true});
        let cancel = json!({"execute": "block-job-cancel", "arguments": arguments});
        warnings.extend(run(domain, &cancel).err());
    }
    for command in server_commands(&remains) {
        warnings.extend(run(domain, &command).err());
    }
    warnings.extend(remove_nodes(vm, domain, remains.nodes));
    let in_vm = |warning| {
        format!(
            "cannot remove remains of a backup in VM `{}`: {warning}",
            vm.name
        )
    };
    Ok(Cleared {
        sessions: remains.sessions,
        warnings: warnings.into_iter().map(in_vm).collect(),
    })
}

/// Returns a session of which a job is left in QEMU that libvirt has forgotten.
pub(super) fn forgotten_session(
    vm: &VmRef,
    domain: &DomainHandle,
) -> Result<Option<SessionId>, HypervisorError> {
    Ok(look(vm, domain)?.sessions.first().copied())
}

/// Finds what is left. Changes nothing.
pub(super) fn look(vm: &VmRef, domain: &DomainHandle) -> Result<Remains, HypervisorError> {
    let message = || format!("cannot look for remains of backups in VM `{}`", vm.name);
    let ask = |query: &str| {
        let answer = domain.monitor_command(query);
        answer.map_err(|error| explain(message(), &error))
    };
    let malformed = |error: ReplyError| {
        HypervisorError::new(ErrorKind::Other, message()).because(error.to_string())
    };
    let (nodes, exports) = (ask(QUERY_NODES)?, ask(QUERY_EXPORTS)?);
    let mut remains = find(&nodes, &exports).map_err(malformed)?;
    if !remains.nodes.is_empty() {
        let graph = ask(QUERY_GRAPH)?;
        remains.jobs = jobs_on(&graph, &remains.nodes).map_err(malformed)?;
    }
    Ok(remains)
}

/// Ends the server if it serves nothing but ours: libvirt started it then.
fn server_commands(remains: &Remains) -> Vec<Value> {
    if remains.exports.is_empty() {
        return Vec::new();
    }
    if !remains.is_shared {
        return vec![json!({"execute": "nbd-server-stop"})];
    }
    let delete = |id: &String| {
        let arguments = json!({"id": id, "mode": "hard"});
        json!({"execute": "block-export-del", "arguments": arguments})
    };
    remains.exports.iter().map(delete).collect()
}

/// Removes nodes, each after the ones that stand on it, and returns why some
/// could not be.
fn remove_nodes(vm: &VmRef, domain: &DomainHandle, mut nodes: Vec<String>) -> Vec<String> {
    for tries_left in (0..TRIES).rev() {
        let mut why = Vec::new();
        for node in &nodes {
            let arguments = json!({"node-name": node});
            let delete = json!({"execute": "blockdev-del", "arguments": arguments});
            why.extend(run(domain, &delete).err());
        }
        if why.is_empty() || tries_left == 0 {
            return why;
        }
        std::thread::sleep(TRY_INTERVAL);
        // libvirt may remove them, too, as soon as it hears of their job's end.
        match look(vm, domain) {
            Ok(left) => nodes = left.nodes,
            Err(error) => return vec![error.to_string()],
        }
    }
    Vec::new()
}

fn run(domain: &DomainHandle, command: &Value) -> Result<(), String> {
    let answer = domain
        .monitor_command(&command.to_string())
        .map_err(|error| error.message)?;
    let outcome = reply::<Value>(&answer);
    outcome.map(drop).map_err(|error| error.to_string())
}

/// Finds what is ours in QEMU's answers.
fn find(nodes: &str, exports: &str) -> Result<Remains, ReplyError> {
    let nodes: Vec<WireNode> = reply(nodes)?;
    let exports: Vec<WireExport> = reply(exports)?;
    let ours: BTreeMap<String, SessionId> = nodes
        .into_iter()
        .filter_map(|node| Some((node.node_name?, session_of_scratch(&node.file?)?)))
        .collect();
    let (exports, others): (Vec<_>, Vec<_>) = exports
        .into_iter()
        .partition(|export| ours.contains_key(&export.node_name));
    Ok(Remains {
        sessions: ours.values().copied().collect(),
        nodes: ours.into_keys().collect(),
        jobs: Vec::new(),
        exports: exports.into_iter().map(|export| export.id).collect(),
        is_shared: !others.is_empty(),
    })
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct WireNode {
    node_name: Option<String>,
    file: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct WireExport {
    id: String,
    node_name: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCRATCH: &str = "/s/0101010101010101/hw-0101010101010101-vda.scratch";

    fn remains(nodes: &[(&str, &str)], exports: &[(&str, &str)]) -> Remains {
        let nodes: Vec<Value> = nodes
            .iter()
            .map(|(name, file)| json!({"node-name": name, "file": file, "drv": "qcow2"}))
            .collect();
        let exports: Vec<Value> = exports
            .iter()
            .map(|(id, node)| json!({"id": id, "node-name": node, "type": "nbd"}))
            .collect();
        let answer = |list: Vec<Value>| json!({"return": list, "id": "x"}).to_string();
        find(&answer(nodes), &answer(exports)).unwrap()
    }

    #[test]
    fn only_nodes_of_our_scratch_files_and_their_exports_are_remains() {
        let vda = ("libvirt-1-format", "/images/vda.qcow2");
        let left = [
            ("libvirt-9-format", SCRATCH),
            ("libvirt-9-storage", SCRATCH),
        ];
        assert_eq!(remains(&[vda], &[("user", vda.0)]).nodes, [""; 0]);
        let found = remains(&[vda, left[0], left[1]], &[("e", left[0].0)]);
        assert_eq!(found.nodes, ["libvirt-9-format", "libvirt-9-storage"]);
        assert_eq!((found.exports.len(), found.is_shared), (1, false));
        assert_eq!(found.sessions.len(), 1);
    }

    #[test]
    fn only_jobs_on_our_nodes_are_remains() {
        let node = |id: u64, kind: &str, name: &str| json!({"id": id, "type": kind, "name": name});
        let edge = |parent: u64, child: u64| json!({"parent": parent, "child": child, "name": "x"});
        let graph = json!({"return": {
            "nodes": [node(1, "block-job", "backup-vda"), node(2, "block-driver", "ours"),
                node(3, "block-job", "theirs"), node(4, "block-driver", "libvirt-1-format"),
                node(5, "block-driver", "#block1")],
            "edges": [edge(1, 2), edge(1, 4), edge(3, 4), edge(5, 2)]}});
        let jobs = jobs_on(&graph.to_string(), &["ours".to_owned()]);
        assert_eq!(jobs.unwrap(), ["backup-vda"]);
    }

    #[test]
    fn a_server_that_somebody_else_uses_is_not_stopped() {
        let vda = ("libvirt-1-format", "/images/vda.qcow2");
        let left = ("libvirt-9-format", SCRATCH);
        let commands = |exports: &[(&str, &str)]| {
            let found = server_commands(&remains(&[vda, left], exports));
            let names = found
                .iter()
                .map(|it| it["execute"].as_str().unwrap().to_owned());
            names.collect::<Vec<_>>()
        };
        assert_eq!(commands(&[("user", vda.0)]), [""; 0]);
        assert_eq!(commands(&[("e", left.0)]), ["nbd-server-stop"]);
        let both = [("user", vda.0), ("e", left.0)];
        assert_eq!(commands(&both), ["block-export-del"]);
    }
}
