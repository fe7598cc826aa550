//! `highwater backup`

use highwater_engine::repository::Repository;
use highwater_engine::{
    self as engine, BackupContext, BackupOptions, Cancel, Report, Status, Tuning,
};
use highwater_hypervisor::{Quiesce, RunState};
use highwater_model::{Clock as _, SystemClock, format_size};

use crate::advice::{self, CliError};
use crate::args::{self, Backup, Global};
use crate::progress::Progress;
use crate::{guard_process, json, output, settings, signals, times};

pub(crate) fn run(global: &Global, args: &Backup) -> Result<u8, CliError> {
    let cancel = signals::cancel_on_signals();
    // First what needs no VM: a wrong passphrase must not freeze a guest.
    let repo = settings::open_repository(global)?;
    let uri = settings::connection(global);
    let vms = if args.all {
        running_vms(&guard_process::start(&uri)?)?
    } else {
        args.vms.clone()
    };
    let options = options(args);
    let one = |name: &str| back_up(global, &repo, &uri, name, &options, &cancel);
    if let [name] = vms.as_slice() {
        let report = one(name)?;
        if global.json {
            output::document(&json::Backup::new(&report))?;
        }
        return Ok(code_of(&report));
    }
    several(global, &vms, &cancel, one)
}

/// Backs several VMs up; one that fails keeps none of the others from it.
fn several(
    global: &Global,
    vms: &[String],
    cancel: &Cancel,
    one: impl Fn(&str) -> Result<Report, CliError>,
) -> Result<u8, CliError> {
    let mut results = Vec::new();
    let mut codes = Vec::new();
    for name in vms {
        match one(name) {
            Ok(report) => {
                codes.push(code_of(&report));
                results.push(json::OneOfSeveral::Done(json::Backup::new(&report)));
            }
            Err(error) => {
                let advice = advice::advise(&error);
                output::print_error(&error, &advice, false);
                codes.push(advice.code);
                let failure = json::Failure::new(Some(name), &error.chain(), &advice);
                results.push(json::OneOfSeveral::Failed(failure));
            }
        }
        if cancel.is_raised() {
            codes.push(advice::INTERRUPTED);
            break;
        }
    }
    if global.json {
        output::document(&json::Backups::new(results))?;
    }
    if codes.contains(&advice::INTERRUPTED) {
        return Ok(advice::INTERRUPTED);
    }
    Ok(
        match (
            codes.contains(&advice::DONE),
            codes.iter().all(|code| *code == advice::DONE),
        ) {
            (_, true) => advice::DONE,
            (true, false) => advice::SOME_FAILED,
            (false, false) if codes.contains(&advice::SOME_FAILED) => advice::SOME_FAILED,
            (false, false) => advice::FAILED,
        },
    )
}

fn back_up(
    global: &Global,
    repo: &Repository,
    uri: &str,
    name: &str,
    options: &BackupOptions,
    cancel: &Cancel,
) -> Result<Report, CliError> {
    // One for each VM: what broke one session, or the guard itself, says
    // nothing about the next VM, and a session that its mover gave up on is
    // settled by a guard that has nothing else to do.
    let guard = guard_process::start(uri)?;
    let progress = Progress::new(global);
    let context = BackupContext {
        repo,
        guard: &guard,
        restart_guard: &|| guard_process::start(uri),
        clock: &SystemClock,
        observer: &progress,
        cancel,
    };
    let report = engine::backup(&context, name, options);
    progress.end();
    let report = report?;
    if !global.quiet && !global.json {
        summarize(&report);
    }
    Ok(report)
}

fn running_vms(guard: &engine::Guard) -> Result<Vec<String>, CliError> {
    let vms = guard.list()?.into_iter();
    let running = vms.filter(|(_, state)| !matches!(state, RunState::Off | RunState::Other));
    let names: Vec<String> = running.map(|(vm, _)| vm.uuid.unwrap_or(vm.name)).collect();
    if names.is_empty() {
        return Err(CliError::Usage {
            message: "cannot back up all running VMs: none runs".to_owned(),
            hint: "check the connection with -c".to_owned(),
        });
    }
    Ok(names)
}

fn options(args: &Backup) -> BackupOptions {
    let mut tuning = Tuning::default();
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
            args::Quiesce::Off => Quiesce::Off,
            args::Quiesce::Try => Quiesce::Try,
            args::Quiesce::Require => Quiesce::Require,
        },
        freeze_mountpoints: args.freeze_mountpoints.clone(),
        scratch_dir: args
            .scratch_dir
            .clone()
            .unwrap_or_else(settings::scratch_dir),
        socket_dir: settings::runtime_dir(),
        compression: args.compression,
        tuning,
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
        Status::Ok => advice::DONE,
        Status::Partial => advice::SOME_FAILED,
    }
}

/// The few lines a person wants to see in the morning.
fn summarize(report: &Report) {
    for disk in &report.disks {
        if disk.root.is_none() {
            output::talk(&format!("  {}: NOT in this restore point", disk.disk));
            continue;
        }
        let knows_what_changed = matches!(disk.mode.as_str(), "incremental" | "differential");
        let amount = if knows_what_changed {
            disk.dirty_bytes
        } else {
            disk.read_bytes
        };
        output::talk(&format!(
            "  {}: {}: {} of {} {}, read {}, stored {}",
            disk.disk,
            disk.mode,
            format_size(amount),
            format_size(disk.size_bytes),
            if knows_what_changed {
                "dirty"
            } else {
                "not zero"
            },
            format_size(disk.read_bytes),
            format_size(disk.stored_bytes),
        ));
    }
    output::talk(&format!(
        "  restore point {} ({}) in {:.1} s",
        report.point,
        report.consistency,
        report.elapsed.as_secs_f64()
    ));
}
