//! One file per command.

mod backup;
mod init;
mod list;
mod restore;
mod show;
mod verify;

use highwater_engine::repository::{Manifest, PointList, Repository};
use highwater_engine::{PointRef, resolve};

use crate::advice::CliError;
use crate::args::{Args, Command};
use crate::{output, times};

/// Runs what was typed; returns the exit code.
pub(crate) fn run(args: Args) -> Result<u8, CliError> {
    let global = args.global;
    match args.command {
        Command::Init(args) => init::run(&global, &args),
        Command::Backup(args) => backup::run(&global, &args),
        Command::List(args) => list::run(&global, &args),
        Command::Show(args) => show::run(&global, &args),
        Command::Restore(args) => restore::run(&global, &args),
        Command::Verify(args) => verify::run(&global, &args),
    }
}

/// Reads all points; damaged ones are told about, never passed over in silence.
fn all_points(repo: &Repository) -> Result<PointList, CliError> {
    let list = repo.points()?;
    for damaged in &list.damaged {
        output::talk(&format!("warning: {}", damage_line(damaged)));
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

/// Finds the point that `text` means.
fn find_point<'a>(points: &'a [Manifest], text: &str) -> Result<&'a Manifest, CliError> {
    let wanted = PointRef::parse(text, &times::parse)?;
    Ok(resolve(points, &wanted, text)?)
}

/// The first characters of an id that people type; ids of one repository that
/// share them differ in the same millisecond.
fn short(id: &str) -> &str {
    id.get(..13).unwrap_or(id)
}
