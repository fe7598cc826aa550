//! Our death at every step: the next plain backup heals, and nothing is lost.
//!
//! The steps are [`Step::ALL`]; a step that a run does not pass fails its test,
//! so none of them can be forgotten here.

use std::fs;
use std::path::Path;
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use highwater_model::step::{Process, Step};
use highwater_testkit::{DiskSpec, Guest, KIB, MIB, Vm, guest};
use serde_json::Value;

use crate::processes::{guard_of, kill_all, mover_of};
use crate::support::{Bed, assert_same, mode, point, reference};

/// How long a process may take to reach a step, or to end after it.
const PATIENCE: Duration = Duration::from_secs(30);

/// Who is killed at a step.
#[derive(Clone, Copy)]
enum Death {
    /// The process that passes it; the others are left to settle.
    One,
    /// All of them: nobody is left.
    Both,
}

/// A VM that is backed up, with a death now and then.
struct Life {
    bed: Bed,
    vm: Vm,
    /// Writes so far; each is of other bytes at another place.
    writes: u64,
}

impl Life {
    fn start() -> Result<Self> {
        let bed = Bed::start()?;
        let vm = bed
            .lab
            .vm("web01")
            .disk(DiskSpec::qcow2("vda", 32 * MIB))
            .start()?;
        let mut life = Self { bed, vm, writes: 0 };
        life.write()?;
        life.bed.backup(&life.vm, &[])?;
        Ok(life)
    }

    fn write(&mut self) -> Result<()> {
        self.writes += 1;
        let place = self.writes * 7 * 64 * KIB % (30 * MIB);
        let byte = self.writes % 250 + 1;
        self.vm
            .write("vda", &format!("write -P {byte} {place} 100k"))
    }

    /// Has somebody die at a step, and checks what that leaves, and that the
    /// next backup is as if nothing had been.
    fn die(&mut self, step: Step, death: Death) -> Result<()> {
        if matches!(step, Step::LeftoverEnded | Step::MarkTidied) {
            self.write()?;
            self.kill(Step::Begun, Death::Both)?;
        }
        self.write()?;
        let before = self.newest()?;
        let written = reference(&self.bed, &self.vm, "vda", "written.raw")?;
        self.kill(step, death)?;
        if matches!(death, Death::One) {
            self.wait_until_calm()?;
        }
        let after = self.newest()?;
        if after != before {
            self.check("died", &format!("id:{after}"), &written)?;
        }
        self.write()?;
        self.heals()?;
        // And once more, from what healing has left.
        self.write()?;
        self.heals()
    }

    /// Begins a backup that waits at a step, has libvirtd restarted meanwhile,
    /// and lets it go on. Returns how it ended, and what it said.
    fn restart_libvirtd_at(&self, step: Step) -> Result<(ExitStatus, String)> {
        let signs = tempfile::tempdir_in(self.bed.lab.dir())?;
        let fault = format!("{}:wait:{}", step.word(), signs.path().display());
        let said = self.bed.lab.path("said");
        let mut mover = self
            .bed
            .command(&["backup", self.vm.name()])
            .env("HIGHWATER_FAULT", fault)
            .stdout(Stdio::null())
            .stderr(fs::File::create(&said)?)
            .spawn()?;
        let sign = signs.path().join(step.word());
        let reached = wait(|| Ok(fs::metadata(&sign).is_ok_and(|it| it.len() > 0)));
        let killed = reached.and_then(|()| self.bed.lab.kill_libvirtd());
        fs::File::create(signs.path().join("go"))?;
        // Only now, so that it is missed at first.
        let restarted = killed.and_then(|()| self.bed.lab.start_libvirtd());
        let ended = wait(|| Ok(mover.try_wait()?.is_some()));
        drop(mover.kill());
        let status = mover.wait()?;
        let said = fs::read_to_string(&said)?;
        restarted.and(ended).with_context(|| said.clone())?;
        Ok((status, said))
    }

    /// Backs up until somebody dies at a step.
    fn kill(&self, step: Step, death: Death) -> Result<()> {
        let signs = tempfile::tempdir_in(self.bed.lab.dir())?;
        let action = match death {
            Death::One => "kill",
            Death::Both => "wait",
        };
        let fault = format!("{}:{action}:{}", step.word(), signs.path().display());
        let mut mover = self
            .bed
            .command(&["backup", self.vm.name()])
            .env("HIGHWATER_FAULT", fault)
            .stdout(Stdio::null())
            .stderr(fs::File::create(self.bed.lab.path("said"))?)
            .spawn()?;
        let reached =
            wait(|| Ok(fs::metadata(signs.path().join(step.word())).is_ok_and(|it| it.len() > 0)));
        if let (Death::Both, Ok(())) = (death, &reached) {
            kill_both(&mut mover, step.process())?;
        }
        let ended = wait(|| Ok(mover.try_wait()?.is_some()));
        drop(mover.kill());
        drop(mover.wait());
        reached.with_context(|| {
            format!(
                "nobody passed the step: {}",
                fs::read_to_string(self.bed.lab.path("said")).unwrap_or_default()
            )
        })?;
        ended.context("the backup did not end")
    }

    fn newest(&self) -> Result<String> {
        let listed = self.bed.run(&["list", self.vm.name(), "--json"])?;
        let listed: Value = serde_json::from_str(&listed)?;
        let points = listed["points"].as_array().context("a list of points")?;
        let ids = points.iter().filter_map(|point| point["point"].as_str());
        Ok(ids.max().context("a point")?.to_owned())
    }

    fn check(&self, name: &str, point: &str, written: &Path) -> Result<()> {
        let dir = self.bed.restore(point, name, &[])?;
        assert_same(written, &dir.join("vda.qcow2"))?;
        Ok(fs::remove_dir_all(dir)?)
    }

    /// Waits until whoever has outlived a death has settled; marks are the
    /// next run's business.
    fn wait_until_calm(&self) -> Result<()> {
        let calm = || self.bed.assert_tidy(&self.vm, self.vm.checkpoints()?.len());
        let settled = wait(|| Ok(calm().is_ok()));
        settled.or_else(|error| calm().and(Err(error)))
    }

    fn heals(&self) -> Result<()> {
        let written = reference(&self.bed, &self.vm, "vda", "written.raw")?;
        let report = self.bed.backup(&self.vm, &[])?;
        ensure!(mode(&report, "vda") == "incremental", "{report}");
        self.check("healed", &point(&report), &written)?;
        self.bed.assert_tidy(&self.vm, 1)?;
        let bitmaps = self.vm.bitmaps("vda")?;
        ensure!(bitmaps.len() == 1, "{bitmaps:?}");
        Ok(())
    }
}

/// Kills all processes so that none sees another one die: the one that waits
/// at a step sees nothing.
fn kill_both(started: &mut Child, waiting: Process) -> Result<()> {
    let (mover, guard) = (mover_of(started)?, guard_of(started)?);
    match waiting {
        Process::Mover => kill_all(started, guard, mover),
        Process::Guard => kill_all(started, mover, guard),
    }
}

fn wait(mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while !done()? {
        ensure!(Instant::now() < end, "waited in vain");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn dies_at_each(process: Process, death: Death) -> Result<()> {
    let mut life = Life::start()?;
    let steps = Step::ALL.iter().filter(|step| step.process() == process);
    // It takes a guest of its own, see below.
    for step in steps.filter(|step| **step != Step::Frozen) {
        let died = life.die(*step, death);
        died.with_context(|| format!("at step `{}`", step.word()))?;
    }
    Ok(())
}

#[test]
fn a_mover_that_dies_at_any_step_loses_nothing() -> Result<()> {
    dies_at_each(Process::Mover, Death::One)
}

#[test]
fn a_guard_that_dies_at_any_step_loses_nothing() -> Result<()> {
    dies_at_each(Process::Guard, Death::One)
}

#[test]
fn both_dying_at_any_step_of_the_mover_lose_nothing() -> Result<()> {
    dies_at_each(Process::Mover, Death::Both)
}

#[test]
fn both_dying_at_any_step_of_the_guard_lose_nothing() -> Result<()> {
    dies_at_each(Process::Guard, Death::Both)
}

/// A VM with a guest that can be frozen, and a restore point.
fn with_guest() -> Result<(Life, Guest)> {
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
    inside.run("echo one > /data/one; sync")?;
    Ok((Life { bed, vm, writes: 0 }, inside))
}

/// Has somebody die while the guest is frozen.
fn dies_frozen(death: Death) -> Result<()> {
    let (life, inside) = with_guest()?;
    life.kill(Step::Frozen, death)?;
    match death {
        Death::One => {
            life.wait_until_calm()?;
            ensure!(!inside.is_frozen()?, "nobody thawed the guest");
        }
        Death::Both => ensure!(inside.is_frozen()?, "nobody was left to thaw it"),
    }
    thaws_and_heals(&life, &inside)
}

/// Fails unless the next backup is as if nothing had been.
fn thaws_and_heals(life: &Life, inside: &Guest) -> Result<()> {
    let report = life.bed.backup(&life.vm, &[])?;
    ensure!(!inside.is_frozen()?, "nobody thawed the guest: {report}");
    ensure!(report["consistency"] == "filesystem", "{report}");
    ensure!(mode(&report, "vdb") == "incremental", "{report}");
    inside.run("echo two > /data/two; sync")?;
    life.bed.assert_tidy(&life.vm, 1)
}

#[test]
fn a_guest_that_a_dying_guard_left_frozen_is_thawed_at_once() -> Result<()> {
    dies_frozen(Death::One)
}

#[test]
fn a_guest_that_both_left_frozen_is_thawed_by_the_next_backup() -> Result<()> {
    dies_frozen(Death::Both)
}

#[test]
fn a_libvirtd_restarted_while_the_guest_is_frozen_leaves_it_thawed_and_nothing_behind() -> Result<()>
{
    let (life, inside) = with_guest()?;
    let (status, said) = life.restart_libvirtd_at(Step::Frozen)?;
    ensure!(!inside.is_frozen()?, "nobody thawed the guest: {said}");
    ensure!(status.code() == Some(1), "{status}: {said}");
    life.bed.assert_tidy(&life.vm, 1).context(said)?;
    thaws_and_heals(&life, &inside)
}

#[test]
fn a_libvirtd_restarted_within_the_start_leaves_neither_job_nor_mark() -> Result<()> {
    let mut life = Life::start()?;
    life.write()?;
    let before = life.vm.checkpoints()?;
    let (status, said) = life.restart_libvirtd_at(Step::Started)?;
    ensure!(status.code() == Some(1), "{status}: {said}");
    life.bed.assert_tidy(&life.vm, 1).context(said)?;
    ensure!(life.vm.checkpoints()? == before, "the old mark is gone");
    life.write()?;
    life.heals()
}
