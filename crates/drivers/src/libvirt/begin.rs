//! Takes the point in time: all disks and the new mark, or nothing.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use highwater_hypervisor::{
    BeginOrder, Begun, BegunDisk, Consistency, DiskOrder, ErrorKind, Export, ExportAddress,
    HypervisorError, Quiesce, ReadMode, RunState, ScratchReserve, VmRef,
};
use highwater_model::Timestamp;
use highwater_model::step::{Step, pass, patience};

use super::backup_xml::{self, BackupDisk};
use super::connection::{LibvirtDriver, query_blocks};
use super::disks::skip_reason;
use super::domain_xml::{DiskXml, DomainXml};
use super::error::explain;
use super::jobs::{self, backup_job, run_state};
use super::observe::{checkpoints, read_definition, write_counters};
use super::quiesce::{self, Frozen, Outcome};
use super::record_xml::BackupJob;
use super::scratch;
use super::sys::events::{EventListener, EventLog};
use super::sys::handles::DomainHandle;
use crate::blocks::Blocks;
use crate::directories::{SessionPaths, free_bytes};
use crate::host::{self, User};
use crate::names::export_name;

/// `VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL`: scratch files are ours.
const REUSE_SCRATCH: u32 = 1;

/// How long a daemon may take to come back before a failed start is left to
/// others. The mover waits two minutes for a reply, and thawing may take one.
const UNDO_PATIENCE: Duration = Duration::from_secs(15);
const UNDO_INTERVAL: Duration = Duration::from_millis(200);

/// What is watched while a session runs.
pub(super) struct Watch {
    pub(super) vm: VmRef,
    /// The guest was already stopped by an I/O error when the session began.
    pub(super) was_stopped_before: bool,
    /// `None` only if a restarted daemon could not be asked.
    pub(super) listener: Option<EventListener>,
    /// What had been heard when the session was last looked at.
    pub(super) heard: EventLog,
    /// Devices whose write errors are this session's trouble.
    pub(super) aliases: Vec<String>,
    /// Where the scratch files are, and how much must stay free there; `None`
    /// if their space is reserved.
    pub(super) reserve: Option<ScratchReserve>,
}

impl Watch {
    /// Returns what was heard since the session began.
    pub(super) fn log(&self) -> EventLog {
        let listener = self.listener.as_ref();
        listener.map(EventListener::log).unwrap_or_default()
    }
}

/// One ordered disk and what is known about it.
pub(super) struct Ordered<'a> {
    pub(super) order: &'a DiskOrder,
    pub(super) disk: &'a DiskXml,
    pub(super) size_bytes: u64,
    pub(super) scratch: PathBuf,
}

impl LibvirtDriver {
    pub(super) fn begin_session(&mut self, order: &BeginOrder) -> Result<Begun, HypervisorError> {
        let domain = self.domain(&order.vm)?;
        let state = run_state(&order.vm, &domain)?;
        if state == RunState::Off {
            return self.begin_off(order, &domain);
        }
        if state == RunState::Other {
            return Err(
                HypervisorError::new(ErrorKind::WrongState, cannot_begin(&order.vm))
                    .because(format!("the VM does not run (it is {state:?})").to_lowercase()),
            );
        }
        if state != RunState::Running && order.quiesce == Quiesce::Require {
            return Err(quiesce::paused_guest(&order.vm));
        }
        jobs::expect_own_images(&order.vm, &domain, || cannot_begin(&order.vm))?;
        let definition = read_definition(&order.vm, &domain, true)?;
        // Before anything is frozen: a job in the way would hold us up for 30 s.
        if let Some(job) = jobs::running_job(&order.vm, &domain, &definition)? {
            return Err(jobs::busy(&order.vm, &job));
        }
        let paths = SessionPaths::of_order(order);
        let ordered = match_disks(order, &definition, &domain, &paths)?;
        let qemu = order.vm.uuid.as_deref().and_then(host::qemu_process);
        paths.create(&order.vm, qemu.as_ref())?;
        pass(Step::DirectoriesMade);
        let qemu = qemu.map(|found| found.user);
        let begun = self.begin_prepared(order, state, &domain, &ordered, &paths, qemu.as_ref());
        begun.map_err(|error| self.undo(order, error))
    }

    /// Everything after the directories were made; what fails here is undone by
    /// the caller.
    fn begin_prepared(
        &mut self,
        order: &BeginOrder,
        state: RunState,
        domain: &DomainHandle,
        ordered: &[Ordered<'_>],
        paths: &SessionPaths,
        qemu: Option<&User>,
    ) -> Result<Begun, HypervisorError> {
        if state == RunState::PausedOnError {
            paths.note_stopped_before()?;
        }
        let scratch = scratch::prepare(order.session, domain, ordered, paths, qemu)?;
        pass(Step::ScratchMade);
        // Before the job: nothing that happens to it may go unheard.
        let listener = EventListener::open(domain)
            .map_err(|error| explain(format!("cannot watch VM `{}`", order.vm.name), &error))?;
        let backup_xml = backup_xml::domain_backup(
            order.session,
            &paths.socket(),
            &ordered
                .iter()
                .map(|one| BackupDisk {
                    order: one.order,
                    scratch: &one.scratch,
                    secret: scratch.secret.as_deref().filter(|_| one.disk.encrypted),
                })
                .collect::<Vec<_>>(),
        );
        let checkpoint_xml = order.new_mark.as_ref().map(backup_xml::new_checkpoint);
        let flags = if scratch.is_ours { REUSE_SCRATCH } else { 0 };
        let mut warnings = Vec::new();
        let frozen = if state == RunState::Running {
            match quiesce::freeze(
                &order.vm,
                domain,
                &self.dialer,
                order.quiesce,
                &order.freeze_mountpoints,
                &|| paths.note_freezing(),
            )? {
                Outcome::Frozen(frozen) => {
                    pass(Step::Frozen);
                    Some(frozen)
                }
                Outcome::Not(because) => {
                    warnings.extend(
                        because.map(|because| format!("the guest was not frozen: {because}")),
                    );
                    None
                }
            }
        } else {
            None
        };
        let taken_at = self.clock.now();
        let started = domain.backup_begin(&backup_xml, checkpoint_xml.as_deref(), flags);
        pass(Step::Started);
        let (consistency, frozen_ms) =
            settle_freeze(frozen, started.is_ok(), state, &mut warnings)?;
        paths.note_thawed();
        started.map_err(|error| explain(cannot_begin(&order.vm), &error))?;
        if order.quiesce == Quiesce::Require && consistency != Consistency::Filesystem {
            return Err(
                HypervisorError::new(ErrorKind::CannotFreeze, cannot_begin(&order.vm))
                    .because("the guest did not stay frozen until the point in time was taken"),
            );
        }
        let consistency = confirm_paused(&order.vm, domain, state, consistency)?;
        let job = expect_our_job(order, domain, paths)?;
        if let Some(reserve) = &scratch.reserve {
            warnings.extend(arm_thresholds(domain, &job, reserve));
        }
        self.watches.insert(
            order.session,
            Watch {
                vm: order.vm.clone(),
                was_stopped_before: state == RunState::PausedOnError,
                listener: Some(listener),
                heard: EventLog::default(),
                aliases: ordered
                    .iter()
                    .filter_map(|one| one.disk.alias.clone())
                    .collect(),
                reserve: scratch.reserve.clone(),
            },
        );
        let mut begun = report(
            order,
            domain,
            paths,
            taken_at,
            consistency,
            frozen_ms,
            warnings,
        )?;
        begun.reserve = scratch.reserve;
        Ok(begun)
    }

    /// Takes back what a failed start has done so far.
    fn undo(&mut self, order: &BeginOrder, error: HypervisorError) -> HypervisorError {
        let since = Instant::now();
        let left = loop {
            match self.take_back(order, &error) {
                Ok(left) => break left,
                // The daemon was restarted, and needs a moment to come back.
                Err(lost)
                    if lost.kind == ErrorKind::Unreachable
                        && since.elapsed() < patience(UNDO_PATIENCE) =>
                {
                    std::thread::sleep(UNDO_INTERVAL);
                }
                Err(other) => break vec![other.to_string()],
            }
        };
        left.into_iter().fold(error, HypervisorError::leaving)
    }

    /// Ends the job, over a connection that stands: the one that the start call
    /// was made over may be why it failed. Returns what is left.
    fn take_back(
        &mut self,
        order: &BeginOrder,
        error: &HypervisorError,
    ) -> Result<Vec<String>, HypervisorError> {
        // The call may have failed after the job was started (a lost
        // connection, the daemon's death), so it is looked for.
        let mut left = self.end_session(order)?.warnings;
        let Some(mark) = &order.new_mark else {
            return Ok(left);
        };
        // The name is unguessable and used once: whatever has it was made here.
        let name = mark.name.to_string();
        let domain = match self.domain(&order.vm) {
            Ok(domain) => domain,
            Err(error) if error.kind == ErrorKind::NoSuchVm => return Ok(left),
            Err(error) => return Err(error),
        };
        // A daemon that died in the call may have made the bitmaps alone.
        let may_be_there = error.kind == ErrorKind::Unreachable || domain.checkpoint(&name).is_ok();
        if may_be_there && let Err(error) = self.remove_mark(&order.vm, &name) {
            if error.kind == ErrorKind::Unreachable {
                return Err(error);
            }
            left.push(error.to_string());
        }
        Ok(left)
    }
}

fn cannot_begin(vm: &VmRef) -> String {
    format!("cannot begin a backup of VM `{}`", vm.name)
}

/// Checks an order against the definition before anything is done.
fn match_disks<'a>(
    order: &'a BeginOrder,
    definition: &'a DomainXml,
    domain: &DomainHandle,
    paths: &SessionPaths,
) -> Result<Vec<Ordered<'a>>, HypervisorError> {
    let refused = |kind, because: String| {
        HypervisorError::new(kind, cannot_begin(&order.vm)).because(because)
    };
    if order.disks.is_empty() {
        return Err(refused(
            ErrorKind::NoSuchDisk,
            "no disk is ordered".to_owned(),
        ));
    }
    let mut ordered: Vec<Ordered<'a>> = Vec::with_capacity(order.disks.len());
    for wanted in &order.disks {
        let target = &wanted.target;
        if ordered.iter().any(|known| known.order.target == *target) {
            return Err(refused(
                ErrorKind::Other,
                format!("disk `{target}` is ordered twice"),
            ));
        }
        let disk = definition
            .disks
            .iter()
            .find(|disk| disk.target == *target)
            .ok_or_else(|| refused(ErrorKind::NoSuchDisk, format!("it has no disk `{target}`")))?;
        if let Some(reason) = skip_reason(disk) {
            let because = format!("disk `{target}` cannot be backed up ({reason:?})");
            return Err(refused(ErrorKind::NoSuchDisk, because));
        }
        let size_bytes = domain.capacity(target).map_err(|error| {
            explain(
                format!("cannot ask for the size of disk `{target}`"),
                &error,
            )
        })?;
        ordered.push(Ordered {
            order: wanted,
            disk,
            size_bytes,
            scratch: paths.scratch(target),
        });
    }
    let marked = order.new_mark.iter().flat_map(|mark| &mark.disks);
    for target in marked {
        if !definition.disks.iter().any(|disk| disk.target == *target) {
            return Err(refused(
                ErrorKind::NoSuchDisk,
                format!("it has no disk `{target}`"),
            ));
        }
    }
    Ok(ordered)
}

/// Says how consistent the point is, and thaws.
fn settle_freeze(
    frozen: Option<Frozen<'_>>,
    started: bool,
    state: RunState,
    warnings: &mut Vec<String>,
) -> Result<(Consistency, Option<u64>), HypervisorError> {
    let Some(frozen) = frozen else {
        let consistency = if state == RunState::Running {
            Consistency::Crash
        } else {
            Consistency::Paused
        };
        return Ok((consistency, None));
    };
    let held = started && frozen.holds();
    let elapsed = frozen.thaw()?;
    let frozen_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
    if held {
        return Ok((Consistency::Filesystem, Some(frozen_ms)));
    }
    warnings.push("the guest did not stay frozen until the point in time was taken".to_owned());
    Ok((Consistency::Crash, Some(frozen_ms)))
}

/// A guest that was resumed meanwhile was not paused at the point in time, or
/// nobody can prove it.
fn confirm_paused(
    vm: &VmRef,
    domain: &DomainHandle,
    before: RunState,
    consistency: Consistency,
) -> Result<Consistency, HypervisorError> {
    if consistency == Consistency::Paused && run_state(vm, domain)? != before {
        return Ok(Consistency::Crash);
    }
    Ok(consistency)
}

/// Reads the job back: what counts is what libvirt made of the order.
fn expect_our_job(
    order: &BeginOrder,
    domain: &DomainHandle,
    paths: &SessionPaths,
) -> Result<BackupJob, HypervisorError> {
    let lost = |because: &str| {
        HypervisorError::new(ErrorKind::SessionLost, cannot_begin(&order.vm)).because(because)
    };
    let job = backup_job(&order.vm, domain)?.ok_or_else(|| lost("its job ended at once"))?;
    let is_ours = job.session == Some(order.session)
        && job.socket.as_deref() == Some(paths.socket().as_path())
        && job.disks.len() == order.disks.len()
        && order.disks.iter().all(|wanted| {
            let export = export_name(order.session, &wanted.target);
            job.disks
                .iter()
                .any(|disk| disk.target == wanted.target && disk.export == export)
        });
    if is_ours {
        Ok(job)
    } else {
        Err(lost("the job that runs is not the one that was ordered"))
    }
}

/// Asks for an event before a scratch file fills its file system. Returns
/// warnings: the room is looked at in every check as well.
fn arm_thresholds(domain: &DomainHandle, job: &BackupJob, reserve: &ScratchReserve) -> Vec<String> {
    let Ok(free) = free_bytes(&reserve.dir) else {
        return Vec::new();
    };
    // The write that passes the threshold may already be large.
    let threshold = free.saturating_sub(reserve.bytes).max(1);
    job.disks
        .iter()
        .filter_map(|disk| {
            let device = format!("{}[{}]", disk.target, disk.index?);
            let error = domain.set_block_threshold(&device, threshold).err()?;
            Some(format!(
                "cannot watch the scratch file of disk `{}`: {error}",
                disk.target
            ))
        })
        .collect()
}

fn report(
    order: &BeginOrder,
    domain: &DomainHandle,
    paths: &SessionPaths,
    taken_at: Timestamp,
    consistency: Consistency,
    frozen_ms: Option<u64>,
    warnings: Vec<String>,
) -> Result<Begun, HypervisorError> {
    let mark_created_s = match &order.new_mark {
        None => None,
        Some(mark) => checkpoints(&order.vm, domain)?
            .into_iter()
            .find(|record| record.mark.as_ref() == Some(&mark.name))
            .and_then(|record| record.created_s),
    };
    let disks = begun_disks(order, domain)?;
    Ok(Begun {
        disks,
        exports: order
            .disks
            .iter()
            .map(|wanted| {
                let name = export_name(order.session, &wanted.target);
                Export {
                    target: wanted.target.clone(),
                    address: ExportAddress::Unix(paths.socket()),
                    dirty_context: match &wanted.mode {
                        ReadMode::All => None,
                        ReadMode::Since(_) => Some(format!("qemu:dirty-bitmap:{name}")),
                    },
                    name,
                    exact_within: None,
                }
            })
            .collect(),
        consistency,
        taken_at,
        frozen_ms,
        reads_images: false,
        stopped_us: None,
        mark_created_s,
        warnings,
        reserve: None,
    })
}

/// Learns what proves the new mark next time, and makes sure that it is there:
/// a mark that does not record would have the next backup read everything, and
/// one on the wrong node would have it miss what changed.
fn begun_disks(
    order: &BeginOrder,
    domain: &DomainHandle,
) -> Result<Vec<BegunDisk>, HypervisorError> {
    let definition = read_definition(&order.vm, domain, true)?;
    let counters = write_counters(domain, &definition);
    let blocks = match &order.new_mark {
        Some(_) => query_blocks(&order.vm, domain)?,
        None => Blocks::default(),
    };
    let granularity = |target: &str| {
        let Some(mark) = &order.new_mark else {
            return Ok(None);
        };
        if !mark.disks.iter().any(|marked| marked == target) {
            return Ok(None);
        }
        let disk = definition.disks.iter().find(|disk| disk.target == *target);
        let index = disk.and_then(|disk| disk.chain.first()?.index);
        let found = blocks.new_bitmap(index, &mark.name.to_string());
        found.map(Some).map_err(|what| {
            HypervisorError::new(ErrorKind::BadMark, cannot_begin(&order.vm))
                .because(format!("the new bitmap of disk `{target}` {what}"))
        })
    };
    order
        .disks
        .iter()
        .map(|disk| {
            Ok(BegunDisk {
                target: disk.target.clone(),
                granularity: granularity(&disk.target)?,
                counters: counters.get(&disk.target).copied(),
            })
        })
        .collect()
}
