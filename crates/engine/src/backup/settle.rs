//! Tidying at the VM: before the plan what others left, afterwards what we do.

use std::collections::{BTreeMap, BTreeSet};

use highwater_hypervisor::{
    BeginOrder, DiskFacts, ErrorKind, MarkOrder, Redefinition, Swept, VmFacts,
};
use highwater_model::step::{Step, pass};
use highwater_model::{MarkName, PointId, RepoId, SessionId};
use highwater_plan::{
    BitmapView, DiskPlan, FoundMark, MarkTraces, MarkUse, Parent, Record, superseded_marks,
    unfinished_marks, useless_marks_below,
};
use highwater_repo::{Manifest, MarkRecord};

use super::observe::{History, PlannedDisk, bitmap_view, record_view};
use super::{BackupError, Begin, Job};
use crate::Event;
use crate::guard::{GuardError, Outcome, one_line};

/// What is to be done about marks before a plan is made.
pub(super) struct Tidying {
    /// Marks without a manifest: to be removed.
    pub(super) unfinished: Vec<MarkName>,
    /// Marks that the hypervisor is to be told about again.
    pub(super) forgotten: Vec<Redefinition>,
}

impl Tidying {
    pub(super) fn of(repo: RepoId, facts: &VmFacts, history: &History) -> Self {
        Self {
            unfinished: unfinished_marks(
                repo,
                &found_marks(facts, &history.committed),
                &history.committed,
            ),
            forgotten: forgotten_marks(facts, history),
        }
    }
}

/// Who looks after what a failed start call left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Settler {
    /// The guard that made it.
    Same,
    /// Another one, which it takes the place of.
    Another,
}

impl Settler {
    fn of(is_guard_gone: bool, error: &GuardError) -> Option<Self> {
        if is_guard_gone {
            return Some(Self::Another);
        }
        error.left_behind.then_some(Self::Same)
    }
}

impl Job<'_> {
    /// Ends the job of a session whose owner is dead (we hold the VM's lock).
    pub(super) fn end_leftover(&mut self, session: SessionId) -> Result<(), BackupError> {
        let ended = self
            .context
            .guard
            .end_leftover(self.vm, session)
            .map_err(|source| BackupError::Tidy {
                vm: self.vm.name.clone(),
                source,
            })?;
        if ended.ended_job {
            self.healed(words::done(&words::end_job(session)));
        }
        for warning in ended.warnings {
            self.warn(warning);
        }
        Ok(())
    }

    /// Starts a VM that is off, paused, for as long as this backup takes.
    pub(super) fn start_paused(&mut self) -> Result<(), BackupError> {
        let started = self.context.guard.start_paused(self.vm);
        // A start that fails in the middle may have started it; one that was refused
        // has not.
        let is_refused = |error: &GuardError| error.kind == ErrorKind::WrongState;
        self.started_vm = !started.as_ref().is_err_and(is_refused);
        started.map_err(|source| BackupError::Begin {
            vm: self.vm.name.clone(),
            source,
        })
    }

    /// Shuts it off again.
    pub(super) fn stop_started(&mut self) {
        if !self.started_vm {
            return;
        }
        let guard = self.context.guard;
        let stopped = if guard.is_gone() {
            let another = (self.context.restart_guard)();
            another.and_then(|guard| {
                guard.lock(self.vm)?;
                guard.stop_if_started(self.vm)
            })
        } else {
            guard.stop_if_started(self.vm)
        };
        match stopped {
            Ok(true) => {}
            Ok(false) => self.warn(
                "the VM was started paused for this backup, and is not shut off: somebody has \
                 resumed it, or ended it"
                    .to_owned(),
            ),
            Err(error) => self.warn(format!(
                "cannot shut the VM off that was started paused for this backup: {}; the next \
                 backup does",
                one_line(&error)
            )),
        }
    }

    /// Removes what sessions left of which no job tells any more: QEMU was
    /// killed too. Returns whether there was any, so that facts are stale.
    pub(super) fn sweep(&mut self) -> Result<bool, BackupError> {
        let places = self.options.session_places();
        let swept = self
            .context
            .guard
            .sweep(self.vm, &places)
            .map_err(|source| BackupError::Tidy {
                vm: self.vm.name.clone(),
                source,
            })?;
        let any = swept != Swept::default();
        for session in swept.sessions {
            self.healed(words::done(&words::remove_directories(session)));
        }
        for session in swept.in_process {
            self.healed(words::done(&words::remove_remains(session)));
        }
        for warning in swept.warnings {
            self.warn(warning);
        }
        Ok(any)
    }

    /// Foretells what [`sweep`](Self::sweep) would do, in words.
    pub(super) fn left_directories(&self) -> Result<Vec<String>, BackupError> {
        let observe = |source| BackupError::observe(&self.vm.name, source);
        let guard = self.context.guard;
        // Those of a backup that is about to begin are nobody's leftovers.
        if guard.lock_holder(self.vm).map_err(observe)?.is_some() {
            return Ok(Vec::new());
        }
        let places = self.options.session_places();
        let left = guard.leftovers(self.vm, &places).map_err(observe)?;
        let sessions: BTreeSet<SessionId> = left.iter().map(|dir| dir.session).collect();
        Ok(sessions
            .into_iter()
            .map(words::remove_directories)
            .collect())
    }

    /// Removes unfinished marks and tells the hypervisor about marks it
    /// forgot. Returns whether anything was changed, so that facts are stale.
    pub(super) fn tidy_marks(&mut self, facts: &VmFacts, history: &History) -> bool {
        let tidying = Tidying::of(self.context.repo.id(), facts, history);
        let mut changed = false;
        for mark in tidying.unfinished {
            changed = true;
            match self.remove_mark(&mark) {
                Ok(()) => {
                    pass(Step::MarkTidied);
                    self.healed(words::done(&words::remove_unfinished(&mark)));
                }
                Err(error) => self.warn(format!(
                    "cannot {}: {}",
                    words::remove_unfinished(&mark),
                    one_line(&error)
                )),
            }
        }
        for mark in tidying.forgotten {
            changed = true;
            let name = mark.name.clone();
            match self.context.guard.mark(self.vm, &MarkOrder::Redefine(mark)) {
                Ok(()) => {
                    pass(Step::MarkToldAgain);
                    self.healed(words::done(&words::tell_again(&name)));
                }
                // Not an error: the plan sees that the record is still missing
                // and rescans.
                Err(error) => self.warn(format!(
                    "cannot {}: {}",
                    words::tell_again(&name),
                    one_line(&error)
                )),
            }
        }
        changed
    }

    /// Removes marks that no disk can use from backing files. Returns whether
    /// anything was changed, so that facts are stale.
    pub(super) fn tidy_below(
        &mut self,
        facts: &VmFacts,
        history: &History,
        planned: &[PlannedDisk],
    ) -> bool {
        let marks = marks_on_disks(facts, history, planned);
        let mut useless = useless_marks_below(self.context.repo.id(), &marks);
        useless.retain(|mark| is_known(history, mark));
        for mark in &useless {
            // Not worth more than a warning: it is tried again at the end.
            if let Err(error) = self.remove_mark(mark) {
                self.warn(format!(
                    "cannot give up old mark {mark}: {}",
                    one_line(&error)
                ));
            }
        }
        !useless.is_empty()
    }

    /// Ends this run's session at the VM. If the guard is gone, another one
    /// settles what it left.
    pub(super) fn finish_session(&mut self, session: &Begin, outcome: Outcome) {
        let finished = self.context.guard.finish(outcome);
        let warnings = match finished {
            Ok(ended) => ended.warnings,
            Err(error) => match self.settle_with_another_guard(&session.order, outcome) {
                Ok(warnings) => warnings,
                Err(second) => vec![
                    format!("cannot end the session at the VM: {}", one_line(&error)),
                    format!("nor with another guard: {}", one_line(&second)),
                    "the next backup of this VM repairs it".to_owned(),
                ],
            },
        };
        self.warn_of_the_end(warnings);
    }

    fn warn_of_the_end(&mut self, warnings: Vec<String>) {
        if !warnings.is_empty() {
            self.context.observer.event(&Event::EndedWithWarnings);
        }
        for warning in warnings {
            self.warn(warning);
        }
    }

    /// Takes back a start call that failed because the guard died in it: job
    /// and mark may be there. A guard that lives has taken it back itself, or
    /// says that it could not; then it is asked once more.
    pub(super) fn undo_begin(&mut self, order: &BeginOrder, error: &GuardError) {
        let guard = self.context.guard;
        let settled = match Settler::of(guard.is_gone(), error) {
            None => return,
            Some(Settler::Same) => guard
                .settle(order, Outcome::Failed)
                .map(|ended| ended.warnings),
            Some(Settler::Another) => self.settle_with_another_guard(order, Outcome::Failed),
        };
        match settled {
            Ok(warnings) => self.warn_of_the_end(warnings),
            Err(error) => self.warn(format!(
                "cannot look after what the start call left at the VM: {}; the next backup of \
                 this VM repairs it",
                one_line(&error)
            )),
        }
    }

    fn settle_with_another_guard(
        &self,
        order: &BeginOrder,
        outcome: Outcome,
    ) -> Result<Vec<String>, GuardError> {
        (self.context.restart_guard)()?.settle_for_another(order, outcome)
    }

    /// Gives up the marks that no disk needs now that the manifest is durable.
    pub(super) fn give_up_superseded_marks(
        &mut self,
        history: &History,
        manifest: &Manifest,
        planned: &[PlannedDisk],
    ) {
        // Observed anew: an older mark that another run left would otherwise
        // stay for ever.
        let facts = match self.context.guard.observe(self.vm) {
            Ok(facts) => facts,
            Err(error) => {
                return self.warn(format!("cannot look for old marks: {}", one_line(&error)));
            }
        };
        let parents = parents_after(&facts, history, manifest, planned);
        let found = found_marks(&facts, &history.committed);
        let mut superseded = superseded_marks(self.context.repo.id(), &found, &parents);
        superseded.retain(|mark| is_known(history, mark));
        for mark in superseded {
            let removed = self.remove_mark(&mark);
            pass(Step::MarkGivenUp);
            if let Err(error) = removed {
                self.warn(format!(
                    "cannot give up old mark {mark}: {}",
                    one_line(&error)
                ));
            }
        }
    }

    /// Takes the marks off disks whose bitmaps lie. What proved a lie once may
    /// be hidden by the guest's next write; nobody may believe the bitmap again,
    /// and nobody can use it.
    pub(super) fn distrust(
        &mut self,
        liars: &BTreeSet<String>,
        history: &History,
        planned: &[PlannedDisk],
    ) {
        for disk in planned.iter().filter(|it| liars.contains(&it.facts.target)) {
            let Some(order) = distrust_order(&disk.facts, history) else {
                continue;
            };
            match self.context.guard.mark(self.vm, &order) {
                Ok(()) => pass(Step::Distrusted),
                Err(error) => self.warn(format!(
                    "cannot take the mark that lies off disk {}: {}",
                    disk.facts.target,
                    one_line(&error)
                )),
            }
        }
    }

    fn remove_mark(&self, mark: &MarkName) -> Result<(), GuardError> {
        self.context
            .guard
            .mark(self.vm, &MarkOrder::Remove(mark.clone()))
    }
}

/// What is done to tidy up, in the words of everybody who does or foretells it.
pub(crate) mod words {
    use highwater_model::{MarkName, SessionId};

    pub(crate) fn end_job(session: SessionId) -> String {
        format!("end the backup job of dead session {session}")
    }

    pub(crate) fn remove_directories(session: SessionId) -> String {
        format!("remove the directories of dead session {session}")
    }

    pub(crate) fn remove_remains(session: SessionId) -> String {
        format!("remove what dead session {session} had left in the hypervisor")
    }

    pub(crate) fn remove_unfinished(mark: &MarkName) -> String {
        format!("remove unfinished mark {mark}")
    }

    pub(crate) fn tell_again(mark: &MarkName) -> String {
        format!("tell the hypervisor again about mark {mark}")
    }

    /// Turns `remove ...` into `removed ...`.
    pub(crate) fn done(what: &str) -> String {
        let (verb, rest) = what.split_once(' ').unwrap_or((what, ""));
        let past = match verb {
            "end" => "ended",
            "remove" => "removed",
            "tell" => "told",
            other => other,
        };
        format!("{past} {rest}")
    }
}

/// Whether the point of a mark can be read: else nobody knows what the mark is
/// good for.
fn is_known(history: &History, mark: &MarkName) -> bool {
    let mut unreadable = history.unreadable.iter();
    unreadable.all(|(point, _)| *point != mark.point())
}

/// Says how the parent's mark is taken off one disk, if it is there.
pub(super) fn distrust_order(disk: &DiskFacts, history: &History) -> Option<MarkOrder> {
    let name = history.parents.get(&disk.target)?.mark.name.clone();
    let text = name.to_string();
    let there = disk.bitmaps.iter().filter(|bitmap| bitmap.name == text);
    let nodes: Vec<String> = there.map(|bitmap| bitmap.node.clone()).collect();
    (!nodes.is_empty()).then_some(MarkOrder::Distrust { name, nodes })
}

/// All marks of any Highwater at the VM, as records or as bitmaps; `committed`
/// are the points of the VM.
pub(super) fn found_marks(facts: &VmFacts, committed: &BTreeSet<PointId>) -> Vec<FoundMark> {
    let records = facts
        .checkpoints
        .iter()
        .filter_map(|checkpoint| checkpoint.mark.clone());
    let bitmaps = facts
        .disks
        .iter()
        .flat_map(|disk| &disk.bitmaps)
        .filter_map(|bitmap| bitmap.name.parse().ok());
    let names: BTreeSet<MarkName> = records.chain(bitmaps).collect();
    let found = names.into_iter().map(|name| FoundMark {
        is_of_vm: is_of_vm(facts, committed, &name),
        name,
    });
    found.collect()
}

/// Says whether a mark is this VM's, and not one that a backing file brought.
fn is_of_vm(facts: &VmFacts, committed: &BTreeSet<PointId>, mark: &MarkName) -> bool {
    let mut records = facts.checkpoints.iter();
    let traces = MarkTraces {
        has_record: records.any(|record| record.mark.as_ref() == Some(mark)),
        is_on_top: facts
            .disks
            .iter()
            .any(|disk| bitmap_view(disk, mark) != BitmapView::Missing),
        is_committed: committed.contains(&mark.point()),
    };
    traces.are_of_vm()
}

/// Every mark on every disk, and whether the disk may still need it.
fn marks_on_disks(facts: &VmFacts, history: &History, planned: &[PlannedDisk]) -> Vec<MarkUse> {
    let mut marks = Vec::new();
    for disk in &facts.disks {
        let top = disk.chain.first().and_then(|link| link.node.as_deref());
        let parent = history.parents.get(&disk.target);
        let plan = planned.iter().find(|it| it.facts.target == disk.target);
        // Whoever asks for a certain way of reading says nothing about the mark.
        let is_doubted =
            plan.is_some_and(|it| matches!(it.plan, DiskPlan::Full(Some(_)) | DiskPlan::Rescan(_)));
        for bitmap in &disk.bitmaps {
            let Ok(mark) = bitmap.name.parse::<MarkName>() else {
                continue;
            };
            let is_parent = parent.is_some_and(|parent| parent.mark.name == mark);
            marks.push(MarkUse {
                is_of_vm: is_of_vm(facts, &history.committed, &mark),
                is_below: top.is_some_and(|top| bitmap.node != top),
                is_usable: is_parent && !is_doubted,
                mark,
            });
        }
    }
    marks
}

/// Parents whose bitmaps record on some disk while the hypervisor's record is
/// gone (undefine and define, a transient VM, another host).
fn forgotten_marks(facts: &VmFacts, history: &History) -> Vec<Redefinition> {
    let mut forgotten: BTreeMap<MarkName, Redefinition> = BTreeMap::new();
    for disk in &facts.disks {
        let Some(parent) = history.parents.get(&disk.target) else {
            continue;
        };
        if !is_forgotten(facts, disk, &parent.mark) {
            continue;
        }
        // Without the original creation time a redefined record would look
        // re-made for ever.
        let Some(created_s) = parent.mark.created_s else {
            continue;
        };
        forgotten
            .entry(parent.mark.name.clone())
            .or_insert_with(|| Redefinition {
                name: parent.mark.name.clone(),
                nonce: parent.mark.nonce,
                created_s,
                disks: Vec::new(),
            })
            .disks
            .push(disk.target.clone());
    }
    forgotten.into_values().collect()
}

fn is_forgotten(facts: &VmFacts, disk: &DiskFacts, mark: &MarkRecord) -> bool {
    record_view(facts, mark) == Record::Forgotten
        && matches!(bitmap_view(disk, &mark.name), BitmapView::Recording { .. })
}

/// Each disk's parent as long as no other backup is committed.
pub(super) fn parents_now(facts: &VmFacts, history: &History) -> Vec<Parent> {
    let of_disk = |disk: &DiskFacts| {
        let parent = history.parents.get(&disk.target)?;
        Some(Parent {
            target: disk.target.clone(),
            mark: parent.mark.name.clone(),
        })
    };
    facts.disks.iter().filter_map(of_disk).collect()
}

/// Each disk's parent once this backup is committed.
fn parents_after(
    facts: &VmFacts,
    history: &History,
    manifest: &Manifest,
    planned: &[PlannedDisk],
) -> Vec<Parent> {
    let present = facts.disks.iter().map(|disk| disk.target.as_str());
    let planned = planned.iter().map(|disk| disk.facts.target.as_str());
    let targets: BTreeSet<&str> = present.chain(planned).collect();
    targets
        .into_iter()
        .filter_map(|target| {
            let new = manifest.mark.as_ref().filter(|_| {
                manifest
                    .disks
                    .iter()
                    .any(|disk| disk.target == target && disk.marked)
            });
            let old = history.parents.get(target).map(|parent| &parent.mark);
            let old = old.filter(|mark| may_hold(facts, target, &mark.name));
            let mark = new.or(old)?.name.clone();
            Some(Parent {
                target: target.to_owned(),
                mark,
            })
        })
        .collect()
}

/// Whether a disk may still use a mark. One that is not on it, or broken, will
/// never be of use again, so nobody has to keep it: the disk has moved to an
/// image that cannot carry it, or QEMU was killed.
fn may_hold(facts: &VmFacts, target: &str, mark: &MarkName) -> bool {
    let Some(disk) = facts.disks.iter().find(|disk| disk.target == target) else {
        return true;
    };
    if !facts.tells_bitmaps_of(disk) {
        return true;
    }
    let name = mark.to_string();
    let mut bitmaps = disk.bitmaps.iter().filter(|bitmap| bitmap.name == name);
    bitmaps
        .next()
        .is_some_and(|first| !first.inconsistent && bitmaps.all(|other| !other.inconsistent))
}

#[cfg(test)]
mod tests {
    use highwater_hypervisor::{ErrorKind, HypervisorError};

    use super::*;

    /// A guard that lives holds the VM's lock, so another one would wait for it
    /// in vain, and what was left would stay until the next backup.
    #[test]
    fn what_a_failed_start_left_is_settled_by_the_guard_that_lives_or_else_by_another() {
        let check = |is_gone, left: Option<&str>, kind, expected| {
            let error = HypervisorError::new(kind, "cannot begin");
            let error = left.into_iter().fold(error, HypervisorError::leaving);
            assert_eq!(Settler::of(is_gone, &error), expected);
        };
        check(false, None, ErrorKind::Busy, None);
        // libvirt cannot be reached: the guard has said so, and lives.
        check(false, None, ErrorKind::Unreachable, None);
        for kind in [ErrorKind::Unreachable, ErrorKind::CannotFreeze] {
            check(false, Some("its job"), kind, Some(Settler::Same));
            check(true, Some("its job"), kind, Some(Settler::Another));
        }
        check(true, None, ErrorKind::Unreachable, Some(Settler::Another));
    }
}
