//! Gathers what is known of a VM and has it judged. Changes nothing.

use std::collections::{BTreeMap, BTreeSet};

use highwater_hypervisor::{
    DiskFacts, Foreign, HypervisorError, MarkOrder, Redefinition, RootNode, RunState, Surroundings,
    VmFacts, Wreckage, WriteErrorPolicy,
};
use highwater_model::{MarkName, PointId, SessionId};
use highwater_plan::{
    DiskPlan, Scene, Strange, Verdict, VmGate, Wrecks, diagnose, gate, judge_marks,
};

use super::{ChangedGraph, Checkup, DoctorError, MarkReport, NextBackup, Refused, Ward};
use crate::backup::{Outlook, outlook, unreadable_point, words};

/// The kind of exports of the one NBD server that QEMU has.
const NBD: &str = "nbd";

/// What was found, and what a repair needs to know beside it.
pub(super) struct Examined {
    pub(super) checkup: Checkup,
    pub(super) forgotten: BTreeMap<MarkName, Redefinition>,
    /// How the mark of each disk is taken off it.
    pub(super) distrust: BTreeMap<String, MarkOrder>,
}

impl Ward<'_> {
    /// Looks at the VM; `is_ours` says that we hold its lock ourselves.
    pub(super) fn examine(&self, is_ours: bool) -> Result<Examined, DoctorError> {
        let observe = |source: HypervisorError| DoctorError::Observe {
            vm: self.vm.name.clone(),
            source,
        };
        let guard = self.context.guard;
        let holder = || {
            if is_ours {
                return Ok(None);
            }
            guard.lock_holder(self.vm).map_err(observe)
        };
        let held_before = holder()?;
        let facts = guard.observe(self.vm).map_err(observe)?;
        let mut surroundings = guard.survey(self.vm).map_err(observe)?;
        let wreckage = guard
            .wreckage(self.vm, Foreign::Qmpbackup)
            .map_err(observe)?;
        without_wrecks(&mut surroundings, &wreckage);
        let places = self.options.backup.session_places();
        let left = guard.leftovers(self.vm, &places).map_err(observe)?;
        // A backup that began or ended meanwhile: what was seen may be half of
        // it, and none of that is a finding.
        let held_by = held_before.or(holder()?);
        let outlook =
            outlook(self.context.repo, self.options.backup, &facts).map_err(|source| {
                DoctorError::History {
                    vm: self.vm.name.clone(),
                    source: Box::new(source),
                }
            })?;
        let sessions: BTreeSet<SessionId> = left.iter().map(|dir| dir.session).collect();
        let sessions: Vec<SessionId> = sessions.into_iter().collect();
        let unreadable: BTreeSet<PointId> = outlook.unreadable.iter().map(|it| it.0).collect();
        let forgotten: BTreeSet<MarkName> = outlook.forgotten.keys().cloned().collect();
        let is_wreck = |name: &str| wreckage.wrecks.iter().any(|wreck| wreck.name == name);
        let strange = strange(&facts, &surroundings, &is_wreck);
        let wrecks = Wrecks {
            harmful: wreckage.wrecks.iter().filter(|wreck| wreck.harms).count(),
            harmless: wreckage.wrecks.iter().filter(|wreck| !wreck.harms).count(),
            is_in_use: wreckage.in_use.is_some(),
        };
        let scene = Scene {
            repo: self.context.repo.id(),
            state: outlook.state,
            job: outlook.job,
            is_held: held_by.is_some(),
            committed: &outlook.committed,
            unreadable: &unreadable,
            parents: &outlook.parents,
            forgotten: &forgotten,
            marks: &outlook.marks,
            disks: &outlook.plans,
            left: &sessions,
            remains: &surroundings.remains,
            strange: &strange,
            wrecks,
        };
        let verdicts = judge_marks(&scene);
        let findings = diagnose(&scene, &verdicts);
        let serves_others = surroundings.exports.iter().any(|it| it.kind == NBD);
        let mut next = next_backup(&outlook, held_by.is_some(), serves_others, &sessions);
        if held_by.is_none() && !surroundings.remains.is_empty() {
            let remains = surroundings.remains.iter().copied();
            next.would_heal
                .splice(..0, remains.map(words::remove_remains));
        }
        let marks = mark_reports(&outlook, verdicts);
        Ok(Examined {
            forgotten: outlook.forgotten,
            distrust: outlook.distrust,
            checkup: Checkup {
                vm: facts.vm.clone(),
                state: facts.run_state,
                tells_bitmaps: facts.disks.iter().all(|disk| facts.tells_bitmaps_of(disk)),
                held_by,
                findings,
                marks,
                changed: changed_graphs(&facts, &surroundings),
                next,
                job: facts.job,
                surroundings,
                left,
                wreckage,
                fixed: Vec::new(),
                failed: Vec::new(),
                warnings: outlook.unreadable.iter().map(unreadable_point).collect(),
            },
        })
    }
}

fn mark_reports(outlook: &Outlook, verdicts: Vec<Verdict>) -> Vec<MarkReport> {
    let marks = outlook.marks.iter().zip(verdicts);
    let mut reports: Vec<MarkReport> = marks
        .map(|(mark, verdict)| MarkReport {
            name: mark.name.clone(),
            has_record: mark.has_record,
            verdict,
            disks: mark.disks.clone(),
        })
        .collect();
    // By age, whosever they are.
    reports.sort_by_key(|mark| mark.name.point());
    reports
}

fn next_backup(
    outlook: &Outlook,
    is_held: bool,
    serves_others: bool,
    left: &[SessionId],
) -> NextBackup {
    let refusal = || {
        outlook.plans.iter().find_map(|(disk, plan)| match plan {
            DiskPlan::Refuse(refusal) => Some(Refused::Disk {
                disk: disk.clone(),
                refusal: *refusal,
            }),
            _ => None,
        })
    };
    let mut would_heal = Vec::new();
    let by_gate = match gate(outlook.state, outlook.job) {
        _ if is_held => Some(Refused::Held),
        VmGate::Busy => Some(Refused::Job),
        VmGate::WrongState => Some(Refused::State),
        VmGate::EndLeftoverFirst(session) => {
            would_heal.push(words::end_job(session));
            None
        }
        VmGate::Open => serves_others.then_some(Refused::NbdServer),
    };
    // Whoever holds the VM tidies up himself.
    if is_held {
        would_heal.clear();
    } else {
        would_heal.extend(left.iter().copied().map(words::remove_directories));
        would_heal.extend(outlook.would_heal.iter().cloned());
    }
    let without_disks = outlook.plans.is_empty().then_some(Refused::NoDisks);
    NextBackup {
        refused: by_gate.or_else(refusal).or(without_disks),
        disks: outlook.estimates.clone(),
        would_heal,
    }
}

/// Takes out what belongs to a wreckage, which is told of as one thing.
fn without_wrecks(around: &mut Surroundings, wreckage: &Wreckage) {
    let is_wreck = |name: &str| wreckage.wrecks.iter().any(|wreck| wreck.name == name);
    around.inner_jobs.retain(|job| !is_wreck(&job.id));
    around.exports.retain(|export| !is_wreck(&export.id));
    around.loose_nodes.retain(|node| !is_wreck(&node.node));
}

fn changed_graphs(facts: &VmFacts, around: &Surroundings) -> Vec<ChangedGraph> {
    if facts.run_state == RunState::Off {
        return Vec::new();
    }
    let changed = |disk: &DiskFacts| {
        let (guest, exported, unknown) = match &disk.root_node {
            RootNode::Same => return None,
            RootNode::Differs { guest, exported } => (guest.clone(), exported.clone(), None),
            RootNode::Unknown(because) => (String::new(), String::new(), Some(because.clone())),
        };
        let node = around.loose_nodes.iter().find(|node| node.node == guest);
        Some(ChangedGraph {
            disk: disk.target.clone(),
            file: node.and_then(|node| node.file.clone()),
            guest,
            exported,
            unknown,
        })
    };
    facts.disks.iter().filter_map(changed).collect()
}

/// Collects what is not ours. What has a name of ours is a mark, whosever it
/// is; everything else here is told and left alone.
fn strange(
    facts: &VmFacts,
    around: &Surroundings,
    is_wreck: &dyn Fn(&str) -> bool,
) -> Vec<Strange> {
    let mut strange = Vec::new();
    for checkpoint in facts.checkpoints.iter().filter(|it| it.mark.is_none()) {
        strange.push(Strange::Checkpoint {
            name: checkpoint.name.clone(),
            disks: checkpoint.disks.clone(),
        });
    }
    for disk in &facts.disks {
        let mut told: BTreeSet<&str> = BTreeSet::new();
        for bitmap in &disk.bitmaps {
            let has_record = facts
                .checkpoints
                .iter()
                .any(|it| it.name == bitmap.name && it.disks.contains(&disk.target));
            let is_mark = bitmap.name.parse::<MarkName>().is_ok();
            if is_mark || has_record || is_wreck(&bitmap.name) || !told.insert(&bitmap.name) {
                continue;
            }
            strange.push(Strange::Bitmap {
                name: bitmap.name.clone(),
                disk: disk.target.clone(),
                recording: bitmap.recording,
            });
        }
    }
    strange.extend(around.inner_jobs.iter().map(|job| Strange::InnerJob {
        id: job.id.clone(),
        kind: job.kind.clone(),
    }));
    strange.extend(around.exports.iter().map(|export| Strange::Export {
        id: export.id.clone(),
        node: export.node.clone(),
        is_nbd: export.kind == NBD,
    }));
    strange.extend(around.loose_nodes.iter().map(|node| Strange::Node {
        node: node.node.clone(),
        driver: node.driver.clone(),
        root_of: node.root_of.clone(),
    }));
    for disk in &facts.disks {
        if disk.write_errors != WriteErrorPolicy::Pause {
            strange.push(Strange::WriteErrors {
                disk: disk.target.clone(),
                is_ignored: disk.write_errors == WriteErrorPolicy::Ignore,
            });
        }
    }
    strange
}

/// Returns whether anything of a mark is there: its record, or a bitmap on any
/// image of a disk, also below the topmost one, where it is of no use.
pub(super) const fn is_there(mark: &MarkReport) -> bool {
    mark.has_record || !mark.disks.is_empty()
}
