//! The crash matrix over QEMU's own monitor: every step of a backup, and every
//! death that can come there. The next plain backup succeeds, reads no more than
//! it has to, and every point is what the disks were.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use highwater_model::step::Step;

use crate::bare::two_disks;
use crate::processes::{guard_of, mover_of, signal};
use crate::tale::{BareBed, Tale};
use crate::waiting::{Waiting, wait_until};

/// Who dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Death {
    Mover,
    Guard,
    All,
    Qemu,
}

/// Returns the steps that a plain increment of a running VM passes. The others
/// are of libvirt, of VMs that are off, or take something wrong before.
fn steps() -> Vec<Step> {
    let common = [
        Step::ClaimSet,
        Step::Locked,
        Step::Observed,
        Step::Planned,
        Step::Started,
        Step::Begun,
        Step::PackStored,
        Step::Copied,
        Step::CommitTold,
        Step::Committing,
        Step::ManifestWritten,
        Step::Committed,
        Step::JobSeen,
        Step::JobEnded,
        Step::FilesRemoved,
        Step::SessionEnded,
        Step::MarkGivenUp,
    ];
    let of_qmp = Step::ALL
        .iter()
        .filter(|step| step.word().starts_with("qmp-"));
    // A key is for encrypted disks.
    let of_qmp = of_qmp.filter(|step| **step != Step::QmpKeyAdded);
    common.into_iter().chain(of_qmp.copied()).collect()
}

fn dies(tale: &Tale, waiting: &mut Waiting, death: Death) -> Result<()> {
    match death {
        Death::Mover => signal("-KILL", mover_of(&waiting.run)?),
        Death::Guard => signal("-KILL", guard_of(&waiting.run)?),
        Death::All => waiting.kill_all(),
        Death::Qemu => tale.vm.kill(),
    }
}

fn lives_through(tale: &mut Tale, step: Step, death: Death, round: u8) -> Result<()> {
    tale.writes(round)?;
    let before = tale.points()?;
    let command = tale.bed.command(&tale.vm.uri(), &["backup", "kvm0"]);
    let mut waiting = Waiting::at(command, &tale.bed.lab.dir(), step, "wait")?;
    // While the guest is stopped it writes nothing.
    if tale.vm.state()? == "running" {
        tale.writes(round + 1)?;
    }
    dies(tale, &mut waiting, death)?;
    waiting.go()?;
    let ended = waiting.end(Ok(()))?;
    if death == Death::Qemu {
        tale.vm.start()?;
    } else {
        let runs = || Ok(tale.vm.state()? == "running");
        if death != Death::All {
            wait_until(runs).with_context(|| ended.said.clone())?;
        }
    }
    let made = tale.points()? > before;
    ensure!(made || !ended.status.success(), "no point: {}", ended.said);
    // Whoever is left may still settle; the next run waits for that.
    let report = tale.backs_up_as(|mode| match death {
        Death::Qemu => mode.starts_with("rescan: bitmap-") || mode == "incremental",
        Death::Mover | Death::Guard | Death::All => mode == "incremental",
    })?;
    ensure!(tale.vm.state()? == "running", "{report}");
    tale.writes(round + 2)?;
    tale.backs_up(&["incremental"])?;
    tale.one_mark_each()?;
    tale.no_files()
}

fn row(death: Death) -> Result<()> {
    let bed = BareBed::start()?;
    let mut tale = two_disks(&bed)?;
    tale.backs_up(&["full: first-backup"])?;
    let graph = tale.vm.graph()?;
    for (number, step) in (0_u8..).zip(steps()) {
        let since = Instant::now();
        let lived = lives_through(&mut tale, step, death, number * 3);
        lived.with_context(|| format!("{} x {death:?}", step.word()))?;
        if death != Death::Qemu {
            let tidy = tale.is_tidy(&graph);
            tidy.with_context(|| format!("{} x {death:?}", step.word()))?;
        }
        eprintln!("{} x {death:?}: {:.1?}", step.word(), since.elapsed());
    }
    tale.ends_well()
}

#[test]
fn a_mover_killed_at_any_step_over_qmp_loses_nothing() -> Result<()> {
    row(Death::Mover)
}

#[test]
fn a_guard_killed_at_any_step_over_qmp_loses_nothing() -> Result<()> {
    row(Death::Guard)
}

#[test]
fn all_of_ours_killed_at_any_step_over_qmp_lose_nothing() -> Result<()> {
    row(Death::All)
}

#[test]
fn a_qemu_killed_at_any_step_over_qmp_costs_no_more_than_a_rescan() -> Result<()> {
    row(Death::Qemu)
}
