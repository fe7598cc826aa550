//! `highwater restore`

use std::path::Path;

use highwater_engine::{self as engine, Format, Limiter, RestoreOptions, Target};
use highwater_model::format_size;

use crate::advice::{self, CliError};
use crate::args::{self, Global, Restore};
use crate::commands::{all_points, find_point};
use crate::progress::Progress;
use crate::{json, output, settings, signals};

pub(crate) fn run(global: &Global, args: &Restore) -> Result<u8, CliError> {
    let to_stdout = args.to == Path::new("-");
    refuse_what_cannot_be_meant(global, args, to_stdout)?;
    let cancel = signals::cancel_on_signals();
    let repo = settings::open_repository(global)?;
    let list = all_points(&repo)?;
    let point = find_point(&list.points, &args.point)?;
    let progress = Progress::new(global);
    let limiter = args.limit.map(Limiter::new);
    let options = RestoreOptions {
        disks: &args.disks,
        format: args.format.map(|format| match format {
            args::Format::Qcow2 => Format::Qcow2,
            args::Format::Raw => Format::Raw,
        }),
        workers: std::thread::available_parallelism().map_or(2, std::num::NonZero::get),
        limiter: limiter.as_ref(),
        observer: &progress,
        cancel: &cancel,
    };
    let mut stdout;
    let target = if to_stdout {
        stdout = std::io::stdout().lock();
        Target::Stream(&mut stdout)
    } else if is_file(args) {
        Target::File(&args.to)
    } else {
        Target::Directory(&args.to)
    };
    let report = engine::restore(&repo, point, target, &options);
    progress.end();
    let report = report.map_err(|error| match error {
        engine::RestoreError::Output { source } => CliError::Output { source },
        other => CliError::from(other),
    })?;
    if global.json && !to_stdout {
        output::document(&json::Restored::new(point, &report))?;
    } else if !global.quiet {
        for disk in &report.disks {
            let place = disk
                .path
                .as_ref()
                .map_or_else(|| "stdout".to_owned(), |path| path.display().to_string());
            output::talk(&format!(
                "  {}  {} ({}, {} with {} of data), every chunk verified",
                disk.disk,
                place,
                disk.format,
                format_size(disk.size_bytes),
                format_size(disk.data_bytes),
            ));
        }
        for path in &report.files {
            output::talk(&format!("  {}", path.display()));
        }
        if args.disks.is_empty() {
            // Who restores a whole VM must learn here what of it is missing.
            for missing in &point.skipped {
                output::talk(&format!(
                    "  {}  NOT in this restore point: {}",
                    missing.target, missing.reason
                ));
            }
        }
        let seconds = report.elapsed.as_secs_f64();
        output::talk(&format!("restored {} in {seconds:.1} s", point.point));
    }
    Ok(advice::DONE)
}

fn refuse_what_cannot_be_meant(
    global: &Global,
    args: &Restore,
    to_stdout: bool,
) -> Result<(), CliError> {
    if !to_stdout {
        return Ok(());
    }
    let usage = |message: &str, hint: &str| {
        Err(CliError::Usage {
            message: message.to_owned(),
            hint: hint.to_owned(),
        })
    };
    if args.format == Some(args::Format::Qcow2) {
        return usage(
            "cannot write qcow2 to stdout",
            "a qcow2 image is not written from first to last: use --format raw, or a file",
        );
    }
    if global.json {
        return usage("cannot write JSON and a disk to stdout", "leave --json out");
    }
    Ok(())
}

/// One disk to something that is not, and does not look like, a directory.
fn is_file(args: &Restore) -> bool {
    let looks_like_directory = args.to.as_os_str().as_encoded_bytes().ends_with(b"/");
    args.disks.len() == 1 && !looks_like_directory && !args.to.is_dir()
}
