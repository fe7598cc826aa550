//! The row of the step in which the guest is frozen: it takes a real one.

use anyhow::{Context as _, Result, ensure};
use highwater_model::step::Step;
use highwater_testkit::{DiskSpec, Guest, MIB, Vm, guest};

use super::blows::{Blow, Struck, Waiting, wait_until};
use super::cells::{Cell, expected};
use crate::support::{Bed, mode};

/// A VM with a guest that can be frozen, and a restore point.
fn with_guest() -> Result<(Bed, Vm, Guest)> {
    let bed = Bed::start()?;
    let files = bed.lab.path("files.raw");
    guest::make_ext4(&files, 16 * MIB)?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::existing("vda", &files, "raw"))
        .disk(DiskSpec::qcow2("vdb", 16 * MIB))
        .guest()
        .start()?;
    let inside = vm.guest()?;
    inside.wait_for_agent()?;
    bed.backup(&vm, &[])?;
    Ok((bed, vm, inside))
}

/// Who thaws the guest after a blow.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Thaws {
    /// Whoever of the run is left.
    Run,
    /// The next run: nobody is left, or nobody who can speak to the VM.
    NextRun,
    /// Nobody need: it boots anew.
    Nobody,
}

const fn thaws(blow: Blow) -> Thaws {
    match blow {
        Blow::KillMover
        | Blow::KillGuard
        | Blow::RestartLibvirtd
        | Blow::MissLibvirtd
        | Blow::StoreBroken
        | Blow::StoreHiccup
        | Blow::StoreFull
        | Blow::StoreDone
        | Blow::StoreLost => Thaws::Run,
        Blow::KillAll | Blow::KillLibvirtd => Thaws::NextRun,
        Blow::KillQemu => Thaws::Nobody,
    }
}

fn strike(bed: &Bed, vm: &Vm, inside: &Guest, blow: Blow) -> Result<Struck> {
    let cell = Cell {
        step: Step::Frozen,
        blow,
    };
    let waiting = Waiting::at(bed, vm, cell.step, blow)?;
    ensure!(inside.is_frozen()?, "the guest is not frozen at all");
    let struck = waiting.strike(bed, vm, blow)?;
    struck.ended_as(expected(cell).end)?;
    Ok(struck)
}

/// Fails unless the next backup is as if nothing had been.
fn thaws_and_heals(bed: &Bed, vm: &Vm, inside: &Guest, blow: Blow) -> Result<()> {
    let report = bed.backup(vm, &[])?;
    ensure!(!inside.is_frozen()?, "nobody thawed the guest: {report}");
    ensure!(report["consistency"] == "filesystem", "{report}");
    let next = expected(Cell {
        step: Step::Frozen,
        blow,
    })
    .next;
    ensure!(next.allows(&mode(&report, "vdb")), "{report}");
    inside.run("echo one >> /data/file; sync")?;
    vm.write("vdb", "write -P 7 1M 64k")?;
    bed.assert_tidy(vm, 1)
}

#[test]
fn a_blow_while_the_guest_is_frozen_leaves_it_thawed_by_whoever_is_left() -> Result<()> {
    let (bed, vm, mut inside) = with_guest()?;
    for blow in Blow::ALL {
        let about = || format!("frozen x {blow:?}");
        let struck = strike(&bed, &vm, &inside, *blow).with_context(about)?;
        let said = || format!("frozen x {blow:?}: {}", struck.said);
        match thaws(*blow) {
            Thaws::Run => {
                let is_thawed = || Ok(!inside.is_frozen().unwrap_or(true));
                wait_until(is_thawed).with_context(said)?;
                let is_tidy = || Ok(bed.assert_tidy(&vm, vm.checkpoints()?.len()).is_ok());
                wait_until(is_tidy).with_context(said)?;
            }
            Thaws::NextRun => {}
            Thaws::Nobody => {
                inside = vm.guest()?;
                inside.wait_for_agent()?;
            }
        }
        thaws_and_heals(&bed, &vm, &inside, *blow).with_context(said)?;
        eprintln!(
            "frozen x {blow:?}: {} after {:.1?}",
            struck.status, struck.took
        );
    }
    bed.run(&["verify", "--read-data"]).map(drop)
}
