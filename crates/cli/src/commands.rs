//! One file per command.

mod backup;
mod completions;
mod config;
mod doctor;
mod init;
mod list;
mod man;
mod restore;
mod show;
mod stats;
mod verify;

use highwater_engine::repository::{Manifest, PointList, Repository};
use highwater_engine::{Guard, PointError, PointRef, resolve};

use crate::advice::CliError;
use crate::args::{Args, Command};
use crate::effective::Effective;
use crate::{by_hand, nearest, output, times};

/// Runs what was typed; returns the exit code.
pub(crate) fn run(args: Args, effective: &Effective) -> Result<u8, CliError> {
    let global = args.global;
    match args.command {
        Command::Init(args) => init::run(&global, &args),
        Command::Backup(args) => backup::run(&global, &args),
        Command::Doctor(args) => doctor::run(&global, &args),
        Command::List(args) => list::run(&global, &args),
        Command::Show(args) => show::run(&global, &args),
        Command::Restore(args) => restore::run(&global, &args),
        Command::Stats => stats::run(&global),
        Command::Config => config::run(&global, effective),
        Command::Completions(args) => completions::run(&args),
        Command::Man(args) => man::run(&args),
        Command::Verify(args) => verify::run(&global, &args),
    }
}

/// Reads all points; damaged ones are told about, never passed over in silence.
fn all_points(repo: &Repository) -> Result<PointList, CliError> {
    let list = repo.points()?;
    for damaged in &list.damaged {
        output::warn(&damage_line(damaged));
    }
    Ok(list)
}

fn damage_line(damaged: &highwater_engine::repository::DamagedPoint) -> String {
    format!(
        "cannot read restore point {}/{}: {}",
        damaged.vm_key,
        damaged.name,
        crate::advice::chain(&damaged.error).join(": ")
    )
}

/// More names than this in a hint help nobody.
const NAMES_SHOWN: usize = 8;

/// Says what the names of VMs are to somebody who typed one that is not there.
fn names_of_vms(typed: &str, guard: &Guard) -> Option<String> {
    let vms = guard.list().ok().filter(|vms| !vms.is_empty())?;
    let names = || vms.iter().map(|(vm, _)| vm.name.as_str());
    match nearest::to(typed, names()) {
        Some(near) => {
            let all = by_hand::see_all().map_or_else(String::new, |see| format!(" {see}"));
            Some(format!("did you mean `{near}`?{all}"))
        }
        None if vms.len() <= NAMES_SHOWN => {
            let all: Vec<&str> = names().collect();
            Some(format!(
                "the VMs of this connection are: {}",
                all.join(", ")
            ))
        }
        None => None,
    }
}

/// Names each VM once.
fn each_once(names: &[String]) -> Vec<String> {
    let mut once: Vec<String> = Vec::new();
    for name in names {
        if !once.contains(name) {
            once.push(name.clone());
        }
    }
    once
}

/// Finds the point that `text` means.
fn find_point<'a>(points: &'a [Manifest], text: &str) -> Result<&'a Manifest, CliError> {
    let found =
        PointRef::parse(text, &times::parse).and_then(|wanted| resolve(points, &wanted, text));
    found.map_err(|error| no_point(points, text, error))
}

/// Tells people who named a VM whose name holds `@` or `~`, or who mistyped
/// one, what to write instead.
fn no_point(points: &[Manifest], text: &str, error: PointError) -> CliError {
    let whole = points.iter().rev().find(|point| point.vm.name == text);
    match whole {
        Some(point) if text.contains(['@', '~']) => CliError::PointOrVm {
            error,
            vm: point.vm.name.clone(),
            uuid: point.vm.uuid.clone(),
        },
        _ => unknown_vm(points, error),
    }
}

/// Adds the name that was probably meant to an error about one that is not there.
fn unknown_vm(points: &[Manifest], error: PointError) -> CliError {
    let PointError::NoSuchVm(typed) = &error else {
        return CliError::Point(error);
    };
    let names = points.iter().map(|point| point.vm.name.as_str());
    match nearest::to(typed, names) {
        Some(name) => CliError::PointNear {
            name: name.to_owned(),
            error,
        },
        None => CliError::Point(error),
    }
}

/// The first characters of an id that people type; ids of one repository that
/// share them differ in the same millisecond.
fn short(id: &str) -> &str {
    id.get(..13).unwrap_or(id)
}
