//! Verifies a repository: the repository's own check, made interruptible.

use std::sync::atomic::{AtomicU64, Ordering};

use highwater_model::PointId;
use highwater_repo::{
    Progress, Repository, VerifyDepth, VerifyError, VerifyOptions, VerifyReport, VmIdentity,
};
use highwater_store::Store;

use crate::Cancel;

/// What is verified.
#[derive(Clone, Copy)]
pub enum Subject<'a> {
    /// All of an open repository.
    Whole(&'a Repository),
    /// Some of its restore points, and what they need.
    Points(&'a Repository, &'a [(VmIdentity, PointId)]),
    /// What of an encrypted repository shows without its key.
    WithoutKey(&'a dyn Store),
}

/// How to verify.
#[derive(Clone, Copy)]
pub struct VerifyJob<'a> {
    /// How much is read.
    pub depth: VerifyDepth,
    /// Threads that read packs.
    pub workers: usize,
    /// Is told how far it is, at every hundredth of a phase at most.
    pub progress: &'a (dyn Fn(Progress) + Sync),
    /// The user's wish to stop.
    pub cancel: &'a Cancel,
}

/// Verifies; changes nothing in the repository.
pub fn verify(subject: Subject<'_>, job: &VerifyJob<'_>) -> Result<VerifyReport, VerifyError> {
    let told = AtomicU64::new(u64::MAX);
    let progress = |progress: Progress| {
        let percent = progress.done.saturating_mul(100) / progress.total.max(1);
        let now = (progress.phase as u64) << 32 | percent;
        if told.swap(now, Ordering::Relaxed) != now {
            (job.progress)(progress);
        }
        !job.cancel.is_raised()
    };
    let options = VerifyOptions {
        points: match subject {
            Subject::Points(_, points) => Some(points),
            Subject::Whole(_) | Subject::WithoutKey(_) => None,
        },
        depth: job.depth,
        threads: job.workers,
        progress: &progress,
    };
    match subject {
        Subject::Whole(repo) | Subject::Points(repo, _) => repo.verify(&options),
        Subject::WithoutKey(store) => Repository::verify_without_key(store, &options),
    }
}
