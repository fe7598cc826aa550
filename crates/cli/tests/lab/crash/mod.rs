//! The crash matrix: every step of a backup, and every blow that can fall there.
//!
//! Steps are [`Step::ALL`], blows are [`Blow::ALL`]; what must come of each pair
//! is told by [`expected`], which knows no default. Each cell is a moment in the
//! life of a VM with two disks, and asks for the same:
//!
//! * the struck run ends by itself, with the exit code that is expected;
//! * a point of it exists as expected, and holds what the disks were;
//! * whoever is left tidies up at once, where that is expected;
//! * the next plain backup exits 0, reads the disks as expected, equals them,
//!   and leaves one mark, no job, no file, and a guest that runs;
//! * so does the one after that, as an increment;
//! * the repository is whole, byte by byte; at the end of a row every point of
//!   its life still is what the disks were.

mod blows;
mod cells;
mod frozen;
mod life;
mod prepare;

use std::fmt::Write as _;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use highwater_model::step::Step;

use blows::Blow;
use cells::{Cell, Phase, phase};
use life::Life;
use prepare::{Preparation, preparation};

/// Strikes at each step of a part of a backup. Returns the row as a table.
fn row(blow: Blow, is_in_row: fn(Phase) -> bool) -> Result<String> {
    let mut steps: Vec<Step> = Step::ALL.to_vec();
    steps.retain(|step| is_in_row(phase(*step)) && is_passed(*step));
    let is_encrypted = |step: &Step| preparation(*step) == Preparation::Encrypted;
    let (encrypted, plain) = steps.into_iter().partition(is_encrypted);
    let mut table = lives_through(blow, plain, Life::start()?)?;
    if !Vec::is_empty(&encrypted) {
        table += &lives_through(blow, encrypted, Life::start_encrypted()?)?;
    }
    let cells = table.matches(" x ").count();
    ensure!(cells > 0, "a row without cells");
    writeln!(table, "{blow:?}: {cells} cells")?;
    Ok(table)
}

/// Whether the VM of the matrix can be brought to pass a step.
fn is_passed(step: Step) -> bool {
    !matches!(
        preparation(step),
        Preparation::Guest | Preparation::OverQmp | Preparation::Off
    )
}

fn lives_through(blow: Blow, mut steps: Vec<Step>, mut life: Life) -> Result<String> {
    let mut table = String::new();
    while let Some(step) = next_step(&life, &mut steps)? {
        let cell = Cell { step, blow };
        let since = Instant::now();
        let told = life.live_through(cell);
        let told = told.with_context(|| format!("{table}{cell}"))?;
        writeln!(table, "{cell}: {told}; cell {:.1?}", since.elapsed())?;
    }
    life.all_points_are_right()?;
    writeln!(table, "{} points are right", life.points())?;
    Ok(table)
}

/// Takes the next step; one that needs index files to merge when there are some,
/// or when nothing else is left.
fn next_step(life: &Life, steps: &mut Vec<Step>) -> Result<Option<Step>> {
    let merges = |step: &Step| preparation(*step) == Preparation::Merge;
    let wanted = life.merges_next()?;
    let found = steps.iter().position(|step| merges(step) == wanted);
    let found = found.or((!steps.is_empty()).then_some(0));
    Ok(found.map(|at| steps.remove(at)))
}

macro_rules! rows {
    ($($row:ident $blow:ident)*) => {
        $(mod $row {
            use super::*;

            #[test]
            fn before_the_point_in_time() -> Result<()> {
                let is_in_row = |phase: Phase| matches!(phase, Phase::Looking | Phase::Starting);
                let table = row(Blow::$blow, is_in_row)?;
                eprintln!("{table}");
                Ok(())
            }

            #[test]
            fn before_the_commit() -> Result<()> {
                let is_in_row = |phase: Phase| matches!(phase, Phase::Running | Phase::Read | Phase::Committing);
                let table = row(Blow::$blow, is_in_row)?;
                eprintln!("{table}");
                Ok(())
            }

            #[test]
            fn after_the_commit() -> Result<()> {
                let is_in_row = |phase: Phase| matches!(phase, Phase::Committed | Phase::Done);
                let table = row(Blow::$blow, is_in_row)?;
                eprintln!("{table}");
                Ok(())
            }
        })*

        /// A blow without a row would not be in this match.
        const fn has_row(blow: Blow) -> bool {
            match blow {
                $(Blow::$blow => true,)*
            }
        }
    };
}

rows! {
    a_mover_killed_at_any_step_loses_nothing KillMover
    a_guard_killed_at_any_step_loses_nothing KillGuard
    all_of_ours_killed_at_any_step_lose_nothing KillAll
    a_qemu_killed_at_any_step_costs_no_more_than_a_rescan KillQemu
    a_libvirtd_restarted_at_any_step_loses_nothing RestartLibvirtd
    a_libvirtd_missed_after_any_step_loses_nothing MissLibvirtd
    a_libvirtd_gone_from_any_step_on_loses_nothing KillLibvirtd
    a_store_broken_from_any_step_on_loses_nothing StoreBroken
    a_store_that_fails_once_after_any_step_loses_nothing StoreHiccup
    a_store_full_from_any_step_on_loses_nothing StoreFull
    an_object_stored_and_not_acknowledged_loses_nothing StoreDone
    an_object_lost_and_perhaps_stored_loses_nothing StoreLost
}

#[test]
fn the_matrix_has_a_cell_for_every_step_and_every_blow() {
    let steps = Step::ALL.iter();
    let with_guest = steps.filter(|step| preparation(**step) == Preparation::Guest);
    // It takes a guest with an agent: `frozen.rs`.
    assert_eq!(with_guest.collect::<Vec<_>>(), [&Step::Frozen]);
    assert!(Blow::ALL.iter().all(|blow| has_row(*blow)));
    let steps = Step::ALL.iter().filter(|step| is_passed(**step)).count();
    let blows = Blow::ALL.len();
    eprintln!("{} cells: {steps} steps, {blows} blows", steps * blows);
}
