//! The way of a backup, from top to bottom:
//!
//! ```text
//! observe  the guard reports facts, the repository reports each disk's parent
//! tidy     what dead sessions left: jobs, unfinished marks, forgotten records
//! plan     per disk: incremental, rescan, full, or refuse       (crate `plan`)
//! begin    the point in time, atomic over all disks
//! copy     read, hash, store what is new
//! commit   packs, index, manifest                          ← the commit point
//! settle   end the job, give up old marks; trouble here is a warning
//! ```

mod audit;
mod chunk_map;
mod copy;
mod disk_copy;
mod error;
mod estimate;
mod files;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod observe;
mod outlook;
mod pool;
mod record;
mod report;
mod room;
mod settle;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use highwater_hypervisor::{
    Agent, BeginOrder, Begun, DiskOrder, ErrorKind, NewMark, Quiesce, ReadMode, RootNode, RunState,
    VmFacts, VmRef, WhenStarted,
};
use highwater_model::step::{Step, pass};
use highwater_model::{Clock, MarkName, Nonce, PointId, SessionId, Timestamp};
use highwater_plan::{AuditDuty, AuditWish, DiskPlan, Level, VmGate, gate};
use highwater_repo::{Compression, Manifest, RepoErrorKind, Repository, VmIdentity, WriterOptions};

use crate::guard::{Guard, GuardError, Outcome};
use crate::{Cancel, Event, Observer};

pub use copy::{CopyError, Tuning};
pub use error::BackupError;
pub use estimate::{DiskEstimate, Estimate, estimate};
pub(crate) use outlook::{Outlook, outlook, unreadable_point};
pub use report::{DiskReport, Report, Status};
pub(crate) use settle::words;

use audit::AuditOrder;
use copy::{CopyJob, CopyWatch, DiskCopied, ReadPlan, copy_disks};
use observe::{History, PlannedDisk};

/// What the user asked for.
#[derive(Debug, Clone)]
pub struct BackupOptions {
    /// Level.
    pub level: Level,
    /// Targets to back up; empty means all.
    pub only_disks: Vec<String>,
    /// Targets to leave out.
    pub without_disks: Vec<String>,
    /// Whether to freeze the guest's file systems.
    pub quiesce: Quiesce,
    /// Which of them; empty means all.
    pub freeze_mountpoints: Vec<String>,
    /// What becomes of a VM that is off.
    pub offline: Offline,
    /// Whether a VM that is off is started, paused, while it is backed up.
    pub start_paused: bool,
    /// Directory in which a private one for scratch files is made.
    pub scratch_dir: PathBuf,
    /// Directory in which a private one for the NBD socket is made.
    pub socket_dir: PathBuf,
    /// Compression of new chunks.
    pub compression: Compression,
    /// Threads and buffers.
    pub tuning: Tuning,
    /// Make no point if less than this is dirty, bytes.
    pub threshold: Option<u64>,
    /// How much of what a bitmap calls clean is read again; `None`: a few blocks.
    pub audit: Option<AuditWish>,
    /// Tags to keep with the point.
    pub tags: Vec<String>,
    /// Group to keep with the point.
    pub group: Option<String>,
    /// Name of this host, for the manifest.
    pub host: String,
    /// Offset of local time from UTC, minutes.
    pub utc_offset_minutes: i32,
}

/// How a VM that is off is backed up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offline {
    /// From its images; whoever starts it meanwhile gets it at once, and the backup
    /// fails.
    Yield,
    /// From its images, which nobody can start it with before the backup is done.
    Hold,
    /// Not at all.
    Refuse,
}

/// What a backup works with.
pub struct BackupContext<'a> {
    /// Where the point goes.
    pub repo: &'a Repository,
    /// The guard of this backup.
    pub guard: &'a Guard,
    /// Starts another guard when the first one has died.
    pub restart_guard: &'a dyn Fn() -> Result<Guard, GuardError>,
    /// Time.
    pub clock: &'a dyn Clock,
    /// Is told what happens.
    pub observer: &'a dyn Observer,
    /// The user's wish to stop.
    pub cancel: &'a Cancel,
}

/// Backs one VM up.
///
/// When it returns an error no point was added, and the session at the VM was
/// ended as far as it could be (the error's text and the next run say more).
pub fn backup(
    context: &BackupContext<'_>,
    vm_name: &str,
    options: &BackupOptions,
) -> Result<Report, BackupError> {
    let started = Instant::now();
    let vm = context
        .guard
        .find(vm_name)
        .map_err(|source| BackupError::observe(vm_name, source))?;
    context.observer.event(&Event::Started { vm: &vm.name });
    context
        .guard
        .lock(&vm)
        .map_err(|source| BackupError::observe(&vm.name, source))?;
    pass(Step::Locked);

    let mut job = Job {
        context,
        options,
        vm: &vm,
        point: PointId::new(context.clock.now()),
        healed: Vec::new(),
        warnings: Vec::new(),
        observed_at: context.clock.now(),
        started_vm: false,
    };
    let done = job.run(started);
    job.stop_started();
    let done = done?;
    if matches!(done, Done::Committed(..)) {
        job.merge_index();
        pass(Step::IndexMerged);
    }
    Ok(match done {
        Done::TooLittle(planned) => job.too_little(&planned, started),
        Done::Committed(manifest, copied) => report::report(
            &vm,
            &manifest,
            copied,
            job.healed,
            job.warnings,
            started.elapsed(),
        ),
    })
}

/// What a backup came to that did not fail.
enum Done {
    /// Less was dirty than the user's threshold.
    TooLittle(Vec<PlannedDisk>),
    /// There is a point.
    Committed(Box<Manifest>, Vec<DiskCopied>),
}

impl BackupOptions {
    /// Where directories of dead sessions are looked for.
    pub(crate) fn session_places(&self) -> [PathBuf; 2] {
        [self.socket_dir.clone(), self.scratch_dir.clone()]
    }
}

/// Disks whose bitmaps were found to lie.
type Liars = Mutex<BTreeSet<String>>;

struct Job<'a> {
    context: &'a BackupContext<'a>,
    options: &'a BackupOptions,
    vm: &'a VmRef,
    point: PointId,
    healed: Vec<String>,
    warnings: Vec<String>,
    observed_at: Timestamp,
    /// The VM was off, and was started for this backup.
    started_vm: bool,
}

/// A session at the VM that has begun.
struct Begin {
    order: BeginOrder,
    begun: Begun,
}

impl Job<'_> {
    /// Everything from the first look at the VM to the last.
    fn run(&mut self, started: Instant) -> Result<Done, BackupError> {
        let (facts, history, planned) = self.prepare()?;
        if estimate::is_below(&planned, self.options.threshold) {
            return Ok(Done::TooLittle(planned));
        }
        let session = self.begin(&facts, &planned)?;
        let liars = Liars::default();
        let done = self.copy_and_commit(&facts, &history, &planned, &session, (started, &liars));
        let liars = liars.into_inner().unwrap_or_else(PoisonError::into_inner);
        let (manifest, copied) = match done {
            Ok(done) => done,
            Err(error) => {
                let outcome = error.outcome();
                self.finish_session(&session, outcome);
                self.distrust(&liars, &history, &planned);
                return Err(error);
            }
        };
        self.finish_session(&session, Outcome::Committed);
        pass(Step::SessionEnded);
        self.distrust(&liars, &history, &planned);
        self.give_up_superseded_marks(&history, &manifest, &planned);
        Ok(Done::Committed(Box::new(manifest), copied))
    }

    /// Observes, tidies and plans; nothing of this run is at the VM yet.
    fn prepare(&mut self) -> Result<(VmFacts, History, Vec<PlannedDisk>), BackupError> {
        let mut facts = self.observe()?;
        pass(Step::Observed);
        if let VmGate::EndLeftoverFirst(session) = gate(
            observe::vm_state(&facts, self.options),
            observe::job_view(&facts),
        ) {
            self.end_leftover(session)?;
            pass(Step::LeftoverEnded);
            facts = self.observe()?;
        }
        if self.sweep()? {
            pass(Step::Swept);
            facts = self.observe()?;
        }
        if self.options.start_paused && facts.run_state == RunState::Off {
            self.start_paused()?;
            facts = self.observe()?;
        }
        match gate(
            observe::vm_state(&facts, self.options),
            observe::job_view(&facts),
        ) {
            VmGate::Open => {}
            VmGate::EndLeftoverFirst(_) | VmGate::Busy => return Err(self.busy(&facts)),
            VmGate::WrongState => return Err(self.wrong_state(&facts)),
        }
        let history = self.history(&facts)?;
        let newest = history.committed.last().copied();
        self.point = PointId::new_after(self.context.clock.now(), newest);
        if self.tidy_marks(&facts, &history) {
            facts = self.observe()?;
        }
        self.check_wanted_disks(&facts)?;
        let mut planned = observe::plan_disks(self.context.repo, self.options, &facts, &history);
        let is_refused = |disk: &PlannedDisk| matches!(disk.plan, DiskPlan::Refuse(_));
        if !planned.iter().any(is_refused) && self.tidy_below(&facts, &history, &planned) {
            facts = self.observe()?;
            planned = observe::plan_disks(self.context.repo, self.options, &facts, &history);
        }
        // Before anything can fail or be refused: the next write of the guest
        // hides what proves the lie now.
        let liars = observe::proven_liars(&planned);
        self.distrust(&liars, &history, &planned);
        self.warn_of_lies(&history, &liars);
        self.tell_plan(&facts, &planned)?;
        pass(Step::Planned);
        Ok((facts, history, planned))
    }

    fn history(&mut self, facts: &VmFacts) -> Result<History, BackupError> {
        let is_wanted = |target: &str| observe::is_wanted(self.options, target);
        let history = History::load(self.context.repo, &self.identity(), facts, &is_wanted)
            .map_err(|source| BackupError::repository(&self.vm.name, source))?;
        for unreadable in &history.unreadable {
            self.warn(unreadable_point(unreadable));
        }
        Ok(history)
    }

    fn busy(&self, facts: &VmFacts) -> BackupError {
        BackupError::Busy {
            vm: self.vm.name.clone(),
            job: facts.job.clone(),
        }
    }

    fn wrong_state(&self, facts: &VmFacts) -> BackupError {
        BackupError::WrongState {
            vm: self.vm.name.clone(),
            state: facts.run_state,
            because: facts.disks.iter().find_map(|disk| match &disk.root_node {
                RootNode::Unknown(because) if facts.run_state == RunState::Other => {
                    Some(because.clone())
                }
                _ => None,
            }),
        }
    }

    /// Ends without a point. No session was begun, and all marks stay.
    fn too_little(self, planned: &[PlannedDisk], started: Instant) -> Report {
        report::without_point(
            self.vm,
            planned,
            self.healed,
            self.warnings,
            started.elapsed(),
        )
    }

    fn observe(&self) -> Result<VmFacts, BackupError> {
        let facts = self.context.guard.observe(self.vm);
        facts.map_err(|source| BackupError::observe(&self.vm.name, source))
    }

    fn identity(&self) -> VmIdentity {
        VmIdentity {
            name: self.vm.name.clone(),
            uuid: self.vm.uuid.clone(),
        }
    }

    fn check_wanted_disks(&self, facts: &VmFacts) -> Result<(), BackupError> {
        let known: BTreeSet<&str> = facts
            .disks
            .iter()
            .map(|disk| disk.target.as_str())
            .chain(facts.skipped.iter().map(|disk| disk.target.as_str()))
            .collect();
        let wanted = self
            .options
            .only_disks
            .iter()
            .chain(&self.options.without_disks);
        for disk in wanted {
            if !known.contains(disk.as_str()) {
                return Err(BackupError::NoSuchDisk {
                    vm: self.vm.name.clone(),
                    disk: disk.clone(),
                    known: known.iter().map(|&name| name.to_owned()).collect(),
                });
            }
        }
        for disk in &self.options.only_disks {
            if let Some(skipped) = facts.skipped.iter().find(|skipped| skipped.target == *disk) {
                return Err(BackupError::DiskCannot {
                    vm: self.vm.name.clone(),
                    disk: disk.clone(),
                    reason: record::skip_word(skipped.reason),
                });
            }
        }
        Ok(())
    }

    /// Tells the plan, and stops if a disk is refused: a backup without a disk
    /// the user wants would look like a backup of the VM.
    fn tell_plan(&self, facts: &VmFacts, planned: &[PlannedDisk]) -> Result<(), BackupError> {
        for skipped in &facts.skipped {
            let reason = record::skip_word(skipped.reason);
            self.context.observer.event(&Event::Skipped {
                disk: &skipped.target,
                reason,
            });
        }
        for disk in planned {
            if let DiskPlan::Refuse(refusal) = &disk.plan {
                return Err(BackupError::Refused {
                    vm: self.vm.name.clone(),
                    disk: disk.facts.target.clone(),
                    refusal: *refusal,
                    because: match &disk.facts.root_node {
                        RootNode::Unknown(because) => Some(because.clone()),
                        RootNode::Same | RootNode::Differs { .. } => None,
                    },
                });
            }
            self.context.observer.event(&Event::Planned {
                disk: &disk.facts.target,
                mode: record::mode_word(&disk.plan),
                reason: record::reason_word(&disk.plan),
                sentence: record::reason_sentence(&disk.plan),
                size_bytes: disk.facts.size_bytes,
                dirty_bytes: estimate::dirty_bytes(disk),
            });
        }
        if planned.is_empty() {
            return Err(BackupError::NoDisks {
                vm: self.vm.name.clone(),
            });
        }
        Ok(())
    }

    fn begin(&mut self, facts: &VmFacts, planned: &[PlannedDisk]) -> Result<Begin, BackupError> {
        self.stop_if_cancelled()?;
        let session = SessionId::random();
        let marked: Vec<String> = planned
            .iter()
            .filter(|disk| disk.takes_mark(self.options.level))
            .map(|disk| disk.facts.target.clone())
            .collect();
        let new_mark = (!marked.is_empty()).then(|| NewMark {
            name: MarkName::new(self.context.repo.id(), self.point),
            nonce: Nonce::random(),
            disks: marked,
        });
        let order = BeginOrder {
            vm: self.vm.clone(),
            session,
            disks: planned
                .iter()
                .map(|disk| DiskOrder {
                    target: disk.facts.target.clone(),
                    mode: read_mode(&disk.plan),
                })
                .collect(),
            new_mark,
            quiesce: quiesce(self.options.quiesce, facts),
            freeze_mountpoints: self.options.freeze_mountpoints.clone(),
            socket_dir: self.options.socket_dir.join(session.to_string()),
            scratch_dir: self.options.scratch_dir.join(session.to_string()),
            when_started: match self.options.offline {
                Offline::Hold => WhenStarted::Hold,
                Offline::Yield | Offline::Refuse => WhenStarted::Yield,
            },
        };
        self.context.observer.event(&Event::Beginning);
        let begun = match self.context.guard.begin(&order) {
            Ok(begun) => begun,
            Err(source) => {
                self.undo_begin(&order, &source);
                return Err(BackupError::Begin {
                    vm: self.vm.name.clone(),
                    source,
                });
            }
        };
        pass(Step::Begun);
        self.context.observer.event(&Event::Begun {
            consistency: begun.consistency,
            frozen_ms: begun.frozen_ms,
            stopped_us: begun.stopped_us,
        });
        for warning in &begun.warnings {
            self.warn(warning.clone());
        }
        Ok(Begin { order, begun })
    }

    fn copy_and_commit(
        &mut self,
        facts: &VmFacts,
        history: &History,
        planned: &[PlannedDisk],
        session: &Begin,
        (started, liars): (Instant, &Liars),
    ) -> Result<(Manifest, Vec<DiskCopied>), BackupError> {
        let vm = &self.vm.name;
        let store = |source| BackupError::repository(vm, source);
        let writer = self
            .context
            .repo
            .writer(WriterOptions {
                compression: self.options.compression,
                ..WriterOptions::default()
            })
            .map_err(store)?;
        // Where a part of the tree is damaged, so may be its neighbours: to
        // count them as stored would be to build upon them.
        if planned.iter().any(PlannedDisk::has_damaged_parent) {
            writer.disbelieve_stored();
        }
        let mut unsaved = Vec::new();
        let files = files::save_files(&writer, facts, self.context.clock, &mut unsaved);
        for warning in unsaved {
            self.warn(warning);
        }
        let files = files.map_err(store)?;
        let jobs = copy_jobs(planned, session, self.options.audit)?;
        let watch = CopyWatch {
            cancel: self.context.cancel,
            lost: &|| self.context.guard.lost(),
            entrust: &|socket| self.context.guard.entrust(&socket),
            lied: &|disk| {
                let mut liars = liars.lock().unwrap_or_else(PoisonError::into_inner);
                liars.insert(disk.to_owned());
            },
            room: &|| room::shortage(session),
            observer: self.context.observer,
        };
        let copied = copy_disks(
            self.context.repo,
            &writer,
            &jobs,
            &self.options.tuning,
            &watch,
        )
        .map_err(|source| BackupError::copy(vm, source))?;
        pass(Step::Copied);
        self.tell_audits(planned, &copied);
        let (vm, store) = (&self.vm.name, |source| {
            BackupError::repository(&self.vm.name, source)
        });
        if copied.iter().all(|disk| disk.result.is_err()) {
            return Err(BackupError::AllDisksFailed {
                vm: vm.clone(),
                disk: copied
                    .first()
                    .map(|disk| disk.target.clone())
                    .unwrap_or_default(),
                source: copied
                    .into_iter()
                    .find_map(|disk| disk.result.err().map(Box::new)),
            });
        }
        let flushed = writer.flush().map_err(store)?;
        self.stop_if_cancelled()?;
        // First: once the guard has agreed nobody may be told any more that there
        // is no restore point, however soon we are cut short.
        self.context.observer.event(&Event::Committing);
        // From here on the guard leaves both marks alone if we die: only the
        // manifest says whether this backup exists.
        self.context
            .guard
            .committing()
            .map_err(|source| match source.kind {
                ErrorKind::SessionLost => BackupError::Lost {
                    vm: vm.clone(),
                    source,
                },
                _ => BackupError::GuardLost {
                    vm: vm.clone(),
                    source,
                },
            })?;
        pass(Step::Committing);
        let manifest = record::manifest(&record::Parts {
            job: self,
            facts,
            history,
            planned,
            copied: &copied,
            session,
            files,
            elapsed: started.elapsed(),
        });
        flushed.commit(&manifest).map_err(|source| {
            if source.kind() == RepoErrorKind::CommitUnknown {
                BackupError::CommitUnknown {
                    vm: vm.clone(),
                    source: Box::new(source),
                }
            } else {
                store(source)
            }
        })?;
        pass(Step::Committed);
        self.context
            .observer
            .event(&Event::Committed { point: self.point });
        Ok((manifest, copied))
    }

    /// Says of which disks the bitmap is known to lie before anything is read.
    fn warn_of_lies(&mut self, history: &History, liars: &BTreeSet<String>) {
        for target in liars {
            let how = if history.lied.contains(target) {
                "an earlier backup found blocks that it calls clean and that were written to"
            } else {
                "the guest has written since the last backup, and it calls nothing dirty"
            };
            self.warn(format!("bitmap lied: disk {target}: {how}"));
        }
    }

    /// Says what the audits found.
    fn tell_audits(&mut self, planned: &[PlannedDisk], copied: &[DiskCopied]) {
        for disk in planned {
            let target = &disk.facts.target;
            let done = copied.iter().find(|copied| copied.target == *target);
            let Some(done) = done.and_then(|copied| copied.result.as_ref().ok()) else {
                continue;
            };
            if let Some(warning) = &done.audited.warning {
                self.warn(warning.clone());
            }
            if let Some(rescan) = &done.audited.rescan {
                self.warn(rescan.warning.clone());
            } else if let Some(AuditDuty::Mandatory(_)) = disk.plan.audit() {
                self.healed(format!(
                    "believed the mark of disk {target}, whose image was moved or copied: {} blocks \
                     that it calls clean are as they were stored",
                    done.audited.blocks
                ));
            }
        }
    }

    /// Keeps the index small. Last: the point exists and the VM is free.
    fn merge_index(&mut self) {
        if let Err(error) = self.context.repo.merge_index() {
            self.warn(format!(
                "cannot merge index files: {}; nothing is lost, later backups try again",
                report::chain(&error).join(": ")
            ));
        }
    }

    fn stop_if_cancelled(&self) -> Result<(), BackupError> {
        if self.context.cancel.is_raised() {
            return Err(BackupError::Interrupted {
                vm: self.vm.name.clone(),
            });
        }
        Ok(())
    }

    fn warn(&mut self, warning: String) {
        self.context.observer.event(&Event::Warning(&warning));
        self.warnings.push(warning);
    }

    fn healed(&mut self, what: String) {
        self.context.observer.event(&Event::Healed(&what));
        self.healed.push(what);
    }
}

/// A VM without an agent's channel is not warned about at every backup: its
/// points say `crash`, and there is nothing to repair. One that is off has no
/// guest to freeze, and nobody writes.
fn quiesce(wanted: Quiesce, facts: &VmFacts) -> Quiesce {
    let cannot_be = wanted == Quiesce::Try && facts.agent == Agent::Missing;
    if cannot_be || facts.run_state == RunState::Off {
        Quiesce::Off
    } else {
        wanted
    }
}

fn read_mode(plan: &DiskPlan) -> ReadMode {
    match plan {
        DiskPlan::Incremental { since, .. } | DiskPlan::Differential { since, .. } => {
            ReadMode::Since(since.clone())
        }
        DiskPlan::Full(_) | DiskPlan::Rescan(_) | DiskPlan::Copy | DiskPlan::Refuse(_) => {
            ReadMode::All
        }
    }
}

fn copy_jobs(
    planned: &[PlannedDisk],
    session: &Begin,
    wish: Option<AuditWish>,
) -> Result<Vec<CopyJob>, BackupError> {
    planned
        .iter()
        .map(|disk| {
            let target = &disk.facts.target;
            let export = session
                .begun
                .exports
                .iter()
                .find(|export| export.target == *target);
            let export = export.ok_or_else(|| BackupError::NoExport {
                vm: session.order.vm.name.clone(),
                disk: target.clone(),
            })?;
            let read = match &disk.plan {
                DiskPlan::Incremental {
                    tail_from,
                    since,
                    audit,
                    ..
                }
                | DiskPlan::Differential {
                    tail_from,
                    since,
                    audit,
                    ..
                } => {
                    let context =
                        export
                            .dirty_context
                            .clone()
                            .ok_or_else(|| BackupError::NoExport {
                                vm: session.order.vm.name.clone(),
                                disk: target.clone(),
                            })?;
                    ReadPlan::Dirty {
                        context,
                        tail_from: *tail_from,
                        audit: AuditOrder {
                            mark: since.to_string(),
                            hot: disk.hot.clone(),
                            smallest_bytes: disk.smallest_bytes,
                            duty: *audit,
                            wish,
                        },
                    }
                }
                DiskPlan::Full(_) | DiskPlan::Rescan(_) | DiskPlan::Copy | DiskPlan::Refuse(_) => {
                    ReadPlan::All
                }
            };
            Ok(CopyJob {
                target: target.clone(),
                export: export.clone(),
                parent: disk.parent_image,
                read,
                size_bytes: disk.facts.size_bytes,
            })
        })
        .collect()
}
