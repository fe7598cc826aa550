//! What lies around a VM beside what a backup has to know. Facts only.

use std::path::PathBuf;

use highwater_model::SessionId;
use serde::{Deserialize, Serialize};

/// What is seen around one VM at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Surroundings {
    /// More about the job that [`VmFacts`](crate::VmFacts) tells of.
    pub job: Option<JobDetails>,
    /// Sessions of ours that the hypervisor's process still holds something of
    /// (nodes, exports, jobs), though it knows of no backup job. None of that
    /// is in the lists below.
    pub remains: Vec<SessionId>,
    /// Jobs inside the hypervisor's process that belong to none of the
    /// hypervisor's own (libvirt: begun over QMP).
    pub inner_jobs: Vec<InnerJob>,
    /// Names of exports, and the nodes they show.
    pub exports: Vec<ExportFacts>,
    /// Block nodes that were made by another hand than the hypervisor's.
    pub loose_nodes: Vec<LooseNode>,
}

/// More about a running job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobDetails {
    /// Since when it runs, seconds, if that is told.
    pub running_s: Option<u64>,
    /// The unix socket or address that its data is read from.
    pub address: Option<String>,
    /// The files it writes to.
    pub files: Vec<PathBuf>,
}

/// A job of the hypervisor's process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InnerJob {
    /// Its name.
    pub id: String,
    /// Its kind (`backup`, `mirror`, `commit`).
    pub kind: String,
}

/// An NBD or other export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportFacts {
    /// Its name.
    pub id: String,
    /// Its kind (`nbd`, `vhost-user-blk`).
    pub kind: String,
    /// The node that it shows.
    pub node: String,
}

/// A block node that the hypervisor did not make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LooseNode {
    /// Its name.
    pub node: String,
    /// Its driver.
    pub driver: String,
    /// The file it stands on, if it is one.
    pub file: Option<String>,
    /// Target of the disk whose guest device writes to it.
    pub root_of: Option<String>,
}

/// A private directory that a session left behind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftDirectory {
    /// The session.
    pub session: SessionId,
    /// The directory.
    pub dir: PathBuf,
    /// What its files occupy, bytes.
    pub bytes: u64,
}

/// What a sweep did.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Swept {
    /// The sessions of which nothing is left, or less than there was.
    pub sessions: Vec<SessionId>,
    /// Sessions that the hypervisor's process held something of, and does no
    /// more: nodes, exports, a server.
    pub in_process: Vec<SessionId>,
    /// What could not be removed, and what else was done for the guest.
    pub warnings: Vec<String>,
}
