//! A repository that does not answer any more, whoever is killed meanwhile: the
//! VM is free within ten seconds, and the next backup is as if nothing had been.

use std::fs;
use std::process::{Child, Output};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use highwater_model::step::Step;
use highwater_testkit::{DiskSpec, MIB, Vm};
use tempfile::TempDir;

use crate::hung_mount::{Hang, HungMount};
use crate::processes::{front_of, guard_of, mover_of, signal, wait_for_end};
use crate::support::{Bed, assert_same, mode, point, reference, wait_for_job, write_noise};

/// What the issue promises.
const TIDY_MAX: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(90);

/// A VM with a restore point in a repository that can hang.
struct Scene {
    mount: HungMount,
    vm: Vm,
    bed: Bed,
}

impl Scene {
    fn start() -> Result<Self> {
        let bed = Bed::without_repository()?;
        let mount = HungMount::start(&bed.lab.path("behind"), &bed.repo())?;
        bed.run(&["init", "--encryption", "none"])?;
        let vm = bed
            .lab
            .vm("web01")
            .disk(DiskSpec::qcow2("vda", 64 * MIB))
            .start()?;
        bed.backup(&vm, &[])?;
        write_noise(&bed, &vm, "vda", 0, 24)?;
        Ok(Self { mount, vm, bed })
    }

    /// Begins a backup that waits at a step.
    fn begin(&self, step: Step, args: &[&str]) -> Result<Waiting> {
        let signs = tempfile::tempdir_in(self.bed.lab.dir())?;
        let fault = format!("{}:wait:{}", step.word(), signs.path().display());
        let started = self
            .bed
            .command(&[&["backup", "web01"], args].concat())
            .env("HIGHWATER_FAULT", fault)
            .stdout(fs::File::create(self.bed.lab.path("said"))?)
            .stderr(fs::File::create(self.bed.lab.path("told"))?)
            .spawn()?;
        let sign = signs.path().join(step.word());
        wait("the step", || {
            Ok(fs::metadata(&sign).is_ok_and(|it| it.len() > 0))
        })?;
        Ok(Waiting { started, signs })
    }

    /// What the backup that waited at a step has said.
    fn told(&self) -> Result<String> {
        Ok(fs::read_to_string(self.bed.lab.path("told"))?)
    }

    /// Waits until the VM is as if there had been no backup; returns since when
    /// that is so, after `since`.
    fn tidy_within(&self, since: Instant, marks: &[String]) -> Result<Duration> {
        let is_tidy = || -> Result<()> {
            self.bed.assert_tidy(&self.vm, marks.len())?;
            ensure!(self.vm.checkpoints()? == marks, "other marks");
            let sockets = fs::read_dir(self.bed.runtime())?
                .flatten()
                .filter(|entry| entry.path().join("nbd.sock").exists());
            ensure!(sockets.count() == 0, "a socket is left");
            Ok(())
        };
        while let Err(untidy) = is_tidy() {
            ensure!(since.elapsed() < PATIENCE, "{untidy:#}");
            std::thread::sleep(Duration::from_millis(50));
        }
        let took = since.elapsed();
        ensure!(took < TIDY_MAX, "it took {took:?}");
        Ok(took)
    }

    /// The VM can be saved and its guest writes, though the repository hangs.
    fn is_free(&self) -> Result<()> {
        self.vm.write("vda", "write -P 9 30M 64k")?;
        self.bed.lab.virsh(&["managedsave", "web01"])?;
        self.bed.lab.virsh(&["start", "web01"]).map(drop)
    }

    /// After the repository has come back: the next plain backup is right.
    fn heals(&mut self) -> Result<()> {
        self.mount.abort()?;
        self.mount.mount_again()?;
        self.vm.write("vda", "write -P 7 40M 64k")?;
        let report = self.bed.backup(&self.vm, &[])?;
        ensure!(mode(&report, "vda") == "incremental", "{report}");
        let now = reference(&self.bed, &self.vm, "vda", "now.raw")?;
        let dir = self.bed.restore(&point(&report), "restored", &[])?;
        assert_same(&now, &dir.join("vda.qcow2"))?;
        fs::remove_dir_all(dir)?;
        self.bed.assert_tidy(&self.vm, 1)
    }
}

/// A backup that waits at a step.
struct Waiting {
    started: Child,
    signs: TempDir,
}

impl Waiting {
    fn go_on(&self) -> Result<()> {
        fs::File::create(self.signs.path().join("go"))?;
        Ok(())
    }
}

fn wait(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while !done()? {
        ensure!(Instant::now() < end, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Waits for the end of the process that was started; returns what it said and
/// when it ended. A mover that was killed and hangs keeps its end of a pipe, so
/// there is none where one is killed.
fn ended(mut started: Child, since: Instant) -> Result<(Output, Duration)> {
    wait("the end of the front", || Ok(started.try_wait()?.is_some()))?;
    let took = since.elapsed();
    Ok((started.wait_with_output()?, took))
}

/// Who is killed, or asked to end, while the repository hangs.
#[derive(Debug, Clone, Copy)]
enum Blow {
    Nothing,
    Asked,
    AskedTwice,
    Mover,
    Front,
    Guard,
    MoverAndGuard,
    FrontAndMover,
    FrontAndGuard,
}

impl Blow {
    fn strike(self, started: &Child) -> Result<()> {
        let (front, mover) = (front_of(started), mover_of(started)?);
        let guard = guard_of(started)?;
        let (name, victims) = match self {
            Self::Nothing => ("-CONT", vec![]),
            Self::Asked => ("-TERM", vec![front]),
            Self::AskedTwice => ("-INT", vec![front, front]),
            Self::Mover => ("-KILL", vec![mover]),
            Self::Front => ("-KILL", vec![front]),
            Self::Guard => ("-KILL", vec![guard]),
            Self::MoverAndGuard => ("-KILL", vec![guard, mover]),
            Self::FrontAndMover => ("-KILL", vec![front, mover]),
            Self::FrontAndGuard => ("-KILL", vec![front, guard]),
        };
        for (nth, pid) in victims.iter().enumerate() {
            if nth > 0 && matches!(self, Self::AskedTwice) {
                // Sooner it would be the same wish.
                std::thread::sleep(Duration::from_millis(500));
            }
            signal(name, *pid)?;
        }
        Ok(())
    }

    const fn code(self) -> Option<i32> {
        match self {
            Self::Nothing | Self::Mover | Self::Guard | Self::MoverAndGuard => Some(1),
            Self::Asked | Self::AskedTwice => Some(130),
            Self::Front | Self::FrontAndMover | Self::FrontAndGuard => None,
        }
    }
}

/// Has a blow fall when the repository has just begun to hang.
fn check(step: Step, hang: Hang, blow: Blow) -> Result<()> {
    let mut scene = Scene::start()?;
    let marks = scene.vm.checkpoints()?;
    let waiting = scene.begin(step, &["--workers", "1"])?;
    let mover = mover_of(&waiting.started)?;
    scene.mount.hang(hang)?;
    let since = Instant::now();
    waiting.go_on()?;
    // It is to be within the call that hangs.
    std::thread::sleep(Duration::from_millis(500));
    blow.strike(&waiting.started)?;
    let committing = matches!(step, Step::Committing);
    let tidy = if committing {
        scene.keeps_both_marks(since, &marks)?
    } else {
        scene.tidy_within(since, &marks)?
    };
    let (output, end) = ended(waiting.started, since)?;
    let told = scene.told()?;
    eprintln!(
        "hangs {} ({hang:?}), {blow:?}: tidy after {:.1} s, exit after {:.1} s",
        step.word(),
        tidy.as_secs_f64(),
        end.as_secs_f64()
    );
    ensure!(
        output.status.code() == blow.code(),
        "{}: {told}",
        output.status
    );
    if blow.code().is_some() {
        ensure!(told.contains("error: "), "{told}");
        ensure!(
            end < TIDY_MAX + Duration::from_secs(2),
            "it ended after {end:?}"
        );
    }
    if !committing {
        scene.is_free()?;
    }
    scene.heals()?;
    wait_for_end(mover)
}

impl Scene {
    /// Whether the manifest exists is not known: both marks stay.
    fn keeps_both_marks(&self, since: Instant, old: &[String]) -> Result<Duration> {
        let calm = || -> Result<()> {
            let marks = self.vm.checkpoints()?;
            self.bed.assert_tidy(&self.vm, marks.len())
        };
        while let Err(untidy) = calm() {
            ensure!(since.elapsed() < PATIENCE, "{untidy:#}");
            std::thread::sleep(Duration::from_millis(50));
        }
        let took = since.elapsed();
        ensure!(took < TIDY_MAX, "it took {took:?}");
        let marks = self.vm.checkpoints()?;
        ensure!(marks.len() == 2 && marks.starts_with(old), "{marks:?}");
        Ok(took)
    }
}

fn all(step: Step, hang: Hang, blows: &[Blow]) -> Result<()> {
    for blow in blows {
        check(step, hang, *blow)
            .with_context(|| format!("{hang:?} at {}: {blow:?}", step.word()))?;
    }
    Ok(())
}

#[test]
fn a_repository_that_hangs_in_mid_copy_frees_the_vm_whoever_is_asked_to_end() -> Result<()> {
    let blows = [Blow::Nothing, Blow::Asked, Blow::AskedTwice];
    all(Step::Begun, Hang::Unkillable, &blows)?;
    all(
        Step::PackStored,
        Hang::Killable,
        &[Blow::Nothing, Blow::Asked],
    )
}

#[test]
fn a_repository_that_hangs_in_mid_copy_frees_the_vm_whoever_is_killed() -> Result<()> {
    let blows = [Blow::Mover, Blow::Front, Blow::Guard];
    all(Step::Begun, Hang::Unkillable, &blows)
}

#[test]
fn a_repository_that_hangs_in_mid_copy_frees_the_vm_whichever_two_are_killed() -> Result<()> {
    let blows = [
        Blow::MoverAndGuard,
        Blow::FrontAndMover,
        Blow::FrontAndGuard,
    ];
    all(Step::Begun, Hang::Unkillable, &blows)
}

/// Replies are under way then, which whoever settles must cut off.
#[test]
fn a_repository_that_hangs_with_replies_under_way_frees_the_vm_whichever_two_are_killed()
-> Result<()> {
    let blows = [Blow::FrontAndGuard, Blow::MoverAndGuard];
    all(Step::PackStored, Hang::Unkillable, &blows)
}

#[test]
fn a_repository_that_hangs_before_the_index_costs_one_backup_and_no_mark() -> Result<()> {
    all(
        Step::Copied,
        Hang::Unkillable,
        &[Blow::Nothing, Blow::MoverAndGuard],
    )
}

#[test]
fn a_repository_that_hangs_in_the_commit_keeps_both_marks() -> Result<()> {
    let blows = [Blow::Nothing, Blow::AskedTwice, Blow::MoverAndGuard];
    all(Step::Committing, Hang::Unkillable, &blows)
}

#[test]
fn a_repository_that_hangs_is_told_of_with_state_and_hint_and_as_json() -> Result<()> {
    let mut scene = Scene::start()?;
    scene.mount.hang(Hang::Unkillable)?;
    let repo = scene.bed.repo();
    // At opening: nothing is at the VM yet, and nobody but the command waits.
    let since = Instant::now();
    let mut all = Vec::new();
    for args in [&["backup", "web01"][..], &["list", "--json"], &["verify"]] {
        all.push((args, scene.bed.spawn(args)?));
    }
    for (args, started) in all {
        let (output, end) = ended(started, since)?;
        let told = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1), "{}: {told}", output.status);
        let limit = Duration::from_mins(1);
        ensure!(
            (limit..limit + TIDY_MAX).contains(&end),
            "{args:?} ended after {end:?}"
        );
        let because = format!(
            "  because: the repository at {} has not answered",
            repo.display()
        );
        ensure!(
            told.starts_with("error: cannot use the repository\n"),
            "{told}"
        );
        ensure!(told.contains(&because), "{told}");
        ensure!(told.contains("\nhint: see why"), "{told}");
        if args.contains(&"--json") {
            let document: serde_json::Value = serde_json::from_slice(&output.stdout)?;
            ensure!(document["exit_code"] == 1, "{document}");
        }
        eprintln!(
            "{args:?} with a dead repository: {:.1} s",
            end.as_secs_f64()
        );
    }
    // And asked to end it does so at once.
    let started = scene.bed.spawn(&["list"])?;
    mover_of(&started)?;
    std::thread::sleep(Duration::from_millis(300));
    let since = Instant::now();
    signal("-TERM", front_of(&started))?;
    let (output, end) = ended(started, since)?;
    ensure!(output.status.code() == Some(130), "{output:?}");
    ensure!(end < Duration::from_secs(3), "{end:?}");
    scene.heals()
}

#[test]
fn a_repository_that_hangs_at_the_second_vm_leaves_the_point_of_the_first_told() -> Result<()> {
    let mut scene = Scene::start()?;
    let disk = DiskSpec::qcow2("vda", 128 * MIB);
    let second = scene.bed.lab.vm("web02").disk(disk).start()?;
    write_noise(&scene.bed, &second, "vda", 0, 96)?;
    let args = ["backup", "--all", "--json"];
    let started = scene.bed.spawn_slow(&args)?;
    // One after the other, by name.
    wait_for_job(&second)?;
    scene.mount.hang(Hang::Unkillable)?;
    let (output, _) = ended(started, Instant::now())?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(3), "{}: {told}", output.status);
    let document: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let results = &document["results"];
    ensure!(results[0]["vm"] == "web01", "{document}");
    ensure!(results[0]["point"].is_string(), "{document}");
    ensure!(results[1]["vm"] == "web02", "{document}");
    ensure!(results[1]["status"] == "failed", "{document}");
    scene.bed.assert_tidy(&second, 0)?;
    drop(second);
    scene.heals()
}

#[test]
fn a_guard_killed_while_its_mover_is_stopped_is_replaced_and_the_mover_cannot_commit() -> Result<()>
{
    let mut scene = Scene::start()?;
    let marks = scene.vm.checkpoints()?;
    let waiting = scene.begin(Step::Copied, &[])?;
    let mover = mover_of(&waiting.started)?;
    let guard = guard_of(&waiting.started)?;
    signal("-STOP", mover)?;
    waiting.go_on()?;
    let since = Instant::now();
    signal("-KILL", guard)?;
    let tidy = scene.tidy_within(since, &marks)?;
    eprintln!(
        "mover stopped, guard killed: tidy after {:.1} s",
        tidy.as_secs_f64()
    );
    scene.is_free()?;
    signal("-CONT", mover)?;
    let (output, _) = ended(waiting.started, since)?;
    let told = scene.told()?;
    ensure!(output.status.code() == Some(1), "{}: {told}", output.status);
    ensure!(scene.vm.checkpoints()? == marks, "another mark");
    scene.heals()
}

/// libvirtd is dead when the session is to be ended.
#[test]
fn a_libvirtd_that_comes_back_late_is_waited_for_by_whoever_settles() -> Result<()> {
    let mut scene = Scene::start()?;
    let marks = scene.vm.checkpoints()?;
    let waiting = scene.begin(Step::Begun, &[])?;
    let (mover, guard) = (mover_of(&waiting.started)?, guard_of(&waiting.started)?);
    scene.mount.hang(Hang::Unkillable)?;
    waiting.go_on()?;
    scene.bed.lab.kill_libvirtd()?;
    signal("-KILL", guard)?;
    signal("-KILL", mover)?;
    std::thread::sleep(Duration::from_secs(2));
    let since = Instant::now();
    scene.bed.lab.start_libvirtd()?;
    let tidy = scene.tidy_within(since, &marks)?;
    let (output, _) = ended(waiting.started, since)?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    eprintln!(
        "libvirtd dead for 2 s, mover and guard killed: tidy {:.1} s after its return",
        tidy.as_secs_f64()
    );
    scene.heals()
}
