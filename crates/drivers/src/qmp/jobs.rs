//! What runs in a QEMU that a backup cannot go beside.

use std::collections::BTreeSet;

use highwater_hypervisor::JobFacts;
use highwater_model::SessionId;
use serde_json::{Value, json};

use super::client::Client;
use super::error::QmpError;
use super::layout::Layout;
use super::observe::text_of;
use crate::names::session_of_scratch;

/// States of a migration in which something moves.
const MIGRATES: [&str; 13] = [
    "active",
    "cancelling",
    "colo",
    "device",
    "postcopy-active",
    "postcopy-device",
    "postcopy-paused",
    "postcopy-recover",
    "postcopy-recover-setup",
    "pre-switchover",
    "setup",
    "wait-unplug",
    "cancelled-wait",
];

/// Returns the job that keeps us from starting: a session of ours first, because
/// its remains are what the next run removes.
pub(super) fn running_job(client: &Client, layout: &Layout) -> Result<Option<JobFacts>, QmpError> {
    if let Some(session) = sessions(layout).first() {
        return Ok(Some(JobFacts::Ours(*session)));
    }
    if let Some(job) = running_jobs(client)?.into_iter().next() {
        let facts = match job.kind.as_str() {
            "backup" => JobFacts::ForeignBackup(Some(job.id)),
            _ => JobFacts::Other(format!("{} `{}`", job.kind, job.id)),
        };
        return Ok(Some(facts));
    }
    let migration = match client.run("query-migrate", json!({})) {
        Ok(migration) => text_of(&migration, "status").unwrap_or_default(),
        Err(error) if error.is_refusal() => String::new(),
        Err(error) => return Err(error),
    };
    let migrates = MIGRATES.contains(&migration.as_str());
    Ok(migrates.then(|| JobFacts::Other(format!("migration ({migration})"))))
}

/// Returns the sessions whose scratch files QEMU has open.
pub(super) fn sessions(layout: &Layout) -> BTreeSet<SessionId> {
    let files = layout.nodes.values().map(|node| node.file.as_str());
    files.filter_map(session_of_scratch).collect()
}

/// A job of QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Job {
    pub(super) id: String,
    pub(super) kind: String,
    pub(super) status: String,
}

/// Returns the jobs that have not ended.
pub(super) fn running_jobs(client: &Client) -> Result<Vec<Job>, QmpError> {
    let mut jobs = all_jobs(client)?;
    jobs.retain(|job| job.status != "concluded" && job.status != "null");
    Ok(jobs)
}

/// Returns all jobs.
pub(super) fn all_jobs(client: &Client) -> Result<Vec<Job>, QmpError> {
    let answer = client.run("query-jobs", json!({}))?;
    Ok(jobs_in(&answer))
}

fn jobs_in(answer: &Value) -> Vec<Job> {
    let jobs = answer.as_array().map(Vec::as_slice).unwrap_or_default();
    jobs.iter()
        .map(|job| Job {
            id: text_of(job, "id").unwrap_or_default(),
            kind: text_of(job, "type").unwrap_or_default(),
            status: text_of(job, "status").unwrap_or_default(),
        })
        .collect()
}
