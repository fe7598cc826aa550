//! What a backup would find and do now, for whoever wants to know without one.

use std::collections::{BTreeMap, BTreeSet};

use highwater_hypervisor::{JobFacts, MarkOrder, Redefinition, VmFacts};
use highwater_model::{MarkName, PointId};
use highwater_plan::{DiskPlan, FoundMark, JobView, MarkOnDisk, MarkView, Parent, VmState};
use highwater_repo::{RepoError, Repository, VmIdentity};

use super::estimate::{DiskEstimate, disk_estimate, foresee};
use super::observe::{self, History, bitmap_view};
use super::settle::{Tidying, distrust_order, found_marks, parents_now};
use super::{BackupOptions, report};

/// What is known of a VM and its restore points.
pub(crate) struct Outlook {
    /// Whether and how it runs.
    pub(crate) state: VmState,
    /// Whose job runs on it.
    pub(crate) job: JobView,
    /// All points.
    pub(crate) committed: BTreeSet<PointId>,
    /// Those that cannot be read, and why, as far as they were needed.
    pub(crate) unreadable: Vec<(PointId, RepoError)>,
    /// The parent of each disk that the VM has.
    pub(crate) parents: Vec<Parent>,
    /// All marks of any Highwater.
    pub(crate) marks: Vec<MarkView>,
    /// Needed marks that the hypervisor forgot.
    pub(crate) forgotten: BTreeMap<MarkName, Redefinition>,
    /// How the mark of each disk is taken off it, should it lie.
    pub(crate) distrust: BTreeMap<String, MarkOrder>,
    /// How each disk would be read, once all is tidied.
    pub(crate) plans: Vec<(String, DiskPlan)>,
    /// The same, with numbers.
    pub(crate) estimates: Vec<DiskEstimate>,
    /// What would be tidied first at the marks.
    pub(crate) would_heal: Vec<String>,
}

/// Foretells a backup of a VM with these facts. Changes nothing.
pub(crate) fn outlook(
    repo: &Repository,
    options: &BackupOptions,
    facts: &VmFacts,
) -> Result<Outlook, RepoError> {
    let vm = VmIdentity {
        name: facts.vm.name.clone(),
        uuid: facts.vm.uuid.clone(),
    };
    let is_wanted = |target: &str| observe::is_wanted(options, target);
    let history = History::load(repo, &vm, facts, &is_wanted)?;
    let mut later = facts.clone();
    without_our_session(&mut later);
    let tidying = Tidying::of(repo.id(), &later, &history);
    let forgotten = tidying.forgotten.iter();
    let forgotten = forgotten.map(|it| (it.name.clone(), it.clone())).collect();
    let mut would_heal = Vec::new();
    foresee(tidying, &mut later, &mut would_heal);
    let planned = observe::plan_disks(repo, options, &later, &history);
    Ok(Outlook {
        state: observe::vm_state(facts, options),
        job: observe::job_view(facts),
        parents: parents_now(facts, &history),
        marks: mark_views(facts, &history.committed),
        distrust: facts
            .disks
            .iter()
            .filter_map(|disk| Some((disk.target.clone(), distrust_order(disk, &history)?)))
            .collect(),
        forgotten,
        plans: planned
            .iter()
            .map(|disk| (disk.facts.target.clone(), disk.plan.clone()))
            .collect(),
        estimates: planned.iter().map(disk_estimate).collect(),
        would_heal,
        committed: history.committed,
        unreadable: history.unreadable,
    })
}

/// Shows the facts as they will be when the session of ours that holds the VM
/// has ended: a backup waits for it, or ends it.
pub(super) fn without_our_session(facts: &mut VmFacts) {
    if !matches!(facts.job, Some(JobFacts::Ours(_))) {
        return;
    }
    facts.job = None;
    for bitmap in facts.disks.iter_mut().flat_map(|disk| &mut disk.bitmaps) {
        bitmap.busy = false;
    }
}

/// Says where each mark is.
fn mark_views(facts: &VmFacts, committed: &BTreeSet<PointId>) -> Vec<MarkView> {
    let is_looked_at = facts.disks.iter().all(|disk| facts.tells_bitmaps_of(disk));
    let view = |FoundMark { name, is_of_vm }| {
        let record = facts
            .checkpoints
            .iter()
            .find(|checkpoint| checkpoint.mark.as_ref() == Some(&name));
        let text = name.to_string();
        let disks = facts.disks.iter().filter_map(|disk| {
            let bitmaps = disk.bitmaps.iter().filter(|bitmap| bitmap.name == text);
            let is_recorded = record.is_some_and(|record| record.disks.contains(&disk.target));
            let has_bitmap = bitmaps.clone().next().is_some();
            (has_bitmap || is_recorded).then(|| MarkOnDisk {
                target: disk.target.clone(),
                bitmap: (is_of_vm && is_looked_at).then(|| bitmap_view(disk, &name)),
                dirty_bytes: bitmaps.fold(0, |sum, it| sum.saturating_add(it.dirty_bytes)),
            })
        });
        MarkView {
            disks: disks.collect(),
            is_of_vm,
            has_record: record.is_some(),
            name,
        }
    };
    let found = found_marks(facts, committed).into_iter();
    found.map(view).collect()
}

/// Says why a point cannot be used.
pub(crate) fn unreadable_point((point, error): &(PointId, RepoError)) -> String {
    format!(
        "cannot use restore point {point}: {}",
        report::chain(error).join(": ")
    )
}
