//! `highwater backup`

use highwater_engine::repository::{Compression, Repository};
use highwater_engine::{
    self as engine, BackupContext, BackupError, BackupOptions, Cancel, Estimate, Guard, Offline,
    Report, Status, Tuning,
};
use highwater_hypervisor::{ErrorKind, Quiesce, RunState};
use highwater_model::{Clock as _, SystemClock, format_size};

use crate::advice::{self, CliError};
use crate::args::{self, Backup, Global, JsonStyle};
use crate::commands::{each_once, names_of_vms};
use crate::progress::Progress;
use crate::{by_hand, doing, guard_process, json, output, settings, several, signals, times};

/// What came of one VM.
enum Outcome {
    Done(Report),
    Estimated(Estimate),
}

impl Outcome {
    const fn code(&self) -> u8 {
        match self {
            Self::Done(report) => code_of(report),
            Self::Estimated(_) => advice::DONE,
        }
    }

    fn document(&self) -> json::OneOfSeveral {
        match self {
            Self::Done(report) => json::OneOfSeveral::Done(json::Backup::new(report)),
            Self::Estimated(estimate) => {
                json::OneOfSeveral::Estimated(json::Estimated::new(estimate))
            }
        }
    }
}

pub(crate) fn run(global: &Global, args: &Backup) -> Result<u8, CliError> {
    let cancel = signals::cancel_on_signals();
    // First what needs no VM: a wrong passphrase must not freeze a guest.
    let repo = settings::open_repository(global)?;
    let uri = settings::connection(global, args.name.as_deref())?;
    let vms = match &args.name {
        Some(name) => vec![name.clone()],
        None if args.all => all_vms(&guard_process::start(&uri)?, &options(args))?,
        None => each_once(&args.vms),
    };
    let run = Run {
        global,
        repo: &repo,
        uri: &uri,
        options: options(args),
        estimate: args.estimate,
        cancel: &cancel,
    };
    if let [name] = vms.as_slice() {
        let outcome = run.one(name)?;
        if global.json {
            output::document(&outcome.document())?;
        } else if let Outcome::Estimated(estimate) = &outcome {
            output::data(&output::table(&estimate_rows(&[estimate])))?;
        }
        return Ok(outcome.code());
    }
    run.several(&vms)
}

struct Run<'a> {
    global: &'a Global,
    repo: &'a Repository,
    uri: &'a str,
    options: BackupOptions,
    estimate: bool,
    cancel: &'a Cancel,
}

impl Run<'_> {
    /// Backs several VMs up; one that fails keeps none of the others from it.
    fn several(&self, vms: &[String]) -> Result<u8, CliError> {
        let events = self.global.json_style == Some(JsonStyle::Events);
        let mut estimates = Vec::new();
        several::begin();
        for name in vms {
            let (code, result) = match self.one(name) {
                Ok(outcome) => {
                    let told = (outcome.code(), outcome.document());
                    if let Outcome::Estimated(estimate) = outcome {
                        estimates.push(estimate);
                    }
                    told
                }
                Err(error) => {
                    let advice = advice::advise(&error);
                    output::print_error(&error, &advice, false);
                    let failure = json::Failure::new(Some(name), &error.chain(), &advice);
                    (advice.code, json::OneOfSeveral::Failed(failure))
                }
            };
            if events {
                output::document(&result)?;
                several::note(code, None);
            } else {
                several::note(code, Some(result));
            }
            if self.cancel.is_raised() {
                several::note(advice::INTERRUPTED, None);
                break;
            }
        }
        // Whoever cuts this short has told it all.
        let so_far = several::end().unwrap_or_default();
        if self.global.json && !events {
            output::document(&json::Backups::new(so_far.results))?;
        } else if self.estimate && !events {
            let estimates: Vec<&Estimate> = estimates.iter().collect();
            output::data(&output::table(&estimate_rows(&estimates)))?;
        }
        Ok(several::code_of_all(&so_far.codes))
    }

    fn one(&self, name: &str) -> Result<Outcome, CliError> {
        // One for each VM: what broke one session, or the guard itself, says
        // nothing about the next VM, and a session that its mover gave up on is
        // settled by a guard that has nothing else to do.
        let guard = guard_process::start(self.uri)?;
        let progress = Progress::new(self.global);
        let context = BackupContext {
            repo: self.repo,
            guard: &guard,
            restart_guard: &|| guard_process::start(self.uri),
            clock: &SystemClock,
            observer: &progress,
            cancel: self.cancel,
        };
        let outcome = if self.estimate {
            engine::estimate(&context, name, &self.options).map(Outcome::Estimated)
        } else {
            engine::backup(&context, name, &self.options).map(Outcome::Done)
        };
        progress.end();
        doing::nothing();
        let outcome = outcome.map_err(|error| with_names(error, name, &guard))?;
        if !self.global.quiet && !self.global.json {
            match &outcome {
                Outcome::Done(report) => summarize(report),
                Outcome::Estimated(estimate) => foretell(estimate),
            }
        }
        Ok(outcome)
    }
}

/// Adds the names of the VMs there are to an error about one that is not there.
fn with_names(error: BackupError, name: &str, guard: &Guard) -> CliError {
    let is_unknown = matches!(
        &error,
        BackupError::Observe { source, .. } if source.kind == ErrorKind::NoSuchVm
    );
    match names_of_vms(name, guard).filter(|_| is_unknown) {
        Some(hint) => CliError::NoSuchVm {
            error: Box::new(error),
            hint,
        },
        None => CliError::from(error),
    }
}

fn all_vms(guard: &Guard, options: &BackupOptions) -> Result<Vec<String>, CliError> {
    let vms = guard.list()?.into_iter();
    let wanted = vms.filter(|(_, state)| match state {
        RunState::Off => options.offline != Offline::Refuse,
        // An image that is in use is one that was asked for.
        RunState::Other => by_hand::are_images(),
        RunState::Running | RunState::Paused | RunState::PausedOnError | RunState::NotResumed => {
            true
        }
    });
    let names: Vec<String> = wanted.map(|(vm, _)| vm.uuid.unwrap_or(vm.name)).collect();
    if names.is_empty() {
        return Err(CliError::Usage {
            message: "cannot back up all VMs: there is none to back up".to_owned(),
            hint: "check the connection with -c".to_owned(),
        });
    }
    Ok(names)
}

pub(super) fn options(args: &Backup) -> BackupOptions {
    let mut tuning = Tuning {
        read_limit: args.limit,
        ..Tuning::default()
    };
    if let Some(workers) = args.workers {
        tuning.workers = usize::from(workers);
    }
    BackupOptions {
        level: match args.level {
            args::Level::Auto => engine::Level::Auto,
            args::Level::Full => engine::Level::Full,
            args::Level::Incremental => engine::Level::Incremental,
            args::Level::Differential => engine::Level::Differential,
            args::Level::Copy => engine::Level::Copy,
        },
        only_disks: args.disks.clone(),
        without_disks: args.exclude.clone(),
        quiesce: match args.quiesce {
            Some(args::Quiesce::Off) => Quiesce::Off,
            Some(args::Quiesce::Try) | None => Quiesce::Try,
            Some(args::Quiesce::Require) => Quiesce::Require,
        },
        freeze_mountpoints: args.freeze_mountpoints.clone(),
        offline: match args.offline {
            Some(args::Offline::Yield) | None => Offline::Yield,
            Some(args::Offline::Hold) => Offline::Hold,
            Some(args::Offline::Refuse) => Offline::Refuse,
        },
        start_paused: args.start_paused,
        scratch_dir: args
            .scratch_dir
            .clone()
            .unwrap_or_else(settings::scratch_dir),
        socket_dir: settings::runtime_dir(),
        compression: args.compression.unwrap_or(Compression::Zstd(1)),
        tuning,
        threshold: args.threshold,
        audit: args.audit.map(|audit| audit.0),
        tags: args.tags.clone(),
        group: args.group.clone(),
        host: rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned(),
        utc_offset_minutes: times::utc_offset_minutes(SystemClock.now()),
    }
}

const fn code_of(report: &Report) -> u8 {
    match report.status {
        Status::Ok | Status::BelowThreshold => advice::DONE,
        Status::Partial => advice::SOME_FAILED,
    }
}

/// Says what came of it; each disk had its line when it was done.
fn summarize(report: &Report) {
    let seconds = report.elapsed.as_secs_f64();
    let (Some(point), Some(consistency)) = (report.point, &report.consistency) else {
        let dirty = report.disks.iter().map(|disk| disk.dirty_bytes).sum();
        return output::talk(&format!(
            "  no restore point: {} dirty, less than the threshold; it stays marked for the next run",
            format_size(dirty)
        ));
    };
    output::talk(&format!(
        "  restore point {point} ({consistency}) in {seconds:.1} s"
    ));
}

/// Says what would be tidied first, and whether there would be a point at all.
fn foretell(estimate: &Estimate) {
    for what in &estimate.would_heal {
        output::talk(&format!("  would first {what}"));
    }
    if estimate.below_threshold {
        output::talk("  would make no restore point: less is dirty than the threshold");
    }
}

fn estimate_rows(estimates: &[&Estimate]) -> Vec<Vec<String>> {
    let head = ["VM", "DISK", "MODE", "DIRTY", "TO READ", "SIZE", "REASON"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for estimate in estimates {
        for disk in &estimate.disks {
            let knows = matches!(disk.mode, "incremental" | "differential");
            rows.push(vec![
                estimate.vm.clone(),
                disk.disk.clone(),
                disk.mode.to_owned(),
                if knows {
                    format_size(disk.dirty_bytes)
                } else {
                    "unknown".to_owned()
                },
                format!("<= {}", format_size(disk.read_bytes)),
                format_size(disk.size_bytes),
                disk.sentence.unwrap_or("-").to_owned(),
            ]);
        }
    }
    rows
}
