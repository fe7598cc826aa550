//! What falls on a backup, and how it is made to.

use std::fs;
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use highwater_model::step::Step;
use highwater_testkit::Vm;
use tempfile::TempDir;

use super::cells::End;
use crate::processes::{guard_of, mover_of, signal};
use crate::support::Bed;

/// How long a run may take to reach a step, and to end after a blow: libvirt is
/// waited for up to 15 s, and the machine may be busy.
pub(super) const PATIENCE: Duration = Duration::from_mins(1);

macro_rules! blows {
    ($($(#[$doc:meta])* $name:ident)*) => {
        /// What falls on a backup at a step.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) enum Blow {
            $($(#[$doc])* $name,)*
        }

        impl Blow {
            pub(super) const ALL: &[Self] = &[$(Self::$name),*];
        }
    };
}

blows! {
    /// SIGKILL to the process that touches the repository.
    KillMover
    /// SIGKILL to the process that owns the VM.
    KillGuard
    /// SIGKILL to all processes of ours, none of which sees another one die.
    KillAll
    /// SIGKILL to QEMU; the VM is started again when the run has ended.
    KillQemu
    /// SIGKILL to libvirtd, which is back before the run goes on.
    RestartLibvirtd
    /// SIGKILL to libvirtd, which is missed at first, and back soon.
    MissLibvirtd
    /// SIGKILL to libvirtd, which is back when the run has ended.
    KillLibvirtd
    /// Every call to the store fails with an I/O error.
    StoreBroken
    /// One call to the store fails with an I/O error.
    StoreHiccup
    /// The store has no space left.
    StoreFull
    /// The next object is stored, and nobody can tell.
    StoreDone
    /// The next object is not stored, and nobody can tell.
    StoreLost
}

impl Blow {
    /// Returns what the program is told to do at the step.
    const fn action(self) -> &'static str {
        match self {
            Self::KillMover
            | Self::KillGuard
            | Self::KillAll
            | Self::KillQemu
            | Self::RestartLibvirtd
            | Self::MissLibvirtd
            | Self::KillLibvirtd => "wait",
            Self::StoreBroken => "store-broken",
            Self::StoreHiccup => "store-hiccup",
            Self::StoreFull => "store-full",
            Self::StoreDone => "store-done",
            Self::StoreLost => "store-lost",
        }
    }
}

impl Blow {
    /// Returns for how many seconds the program waits for libvirtd, if not as
    /// long as usual: where it does not come back, that is a minute at each step.
    const fn patience(self) -> Option<&'static str> {
        match self {
            Self::KillLibvirtd => Some("2"),
            Self::KillMover
            | Self::KillGuard
            | Self::KillAll
            | Self::KillQemu
            | Self::RestartLibvirtd
            | Self::MissLibvirtd
            | Self::StoreBroken
            | Self::StoreHiccup
            | Self::StoreFull
            | Self::StoreDone
            | Self::StoreLost => None,
        }
    }
}

/// How a struck run ended.
pub(super) struct Struck {
    pub(super) status: ExitStatus,
    pub(super) said: String,
    /// From the blow to the end.
    pub(super) took: Duration,
    /// Whoever still waits has to see the file `go` in it.
    _signs: TempDir,
}

impl Struck {
    pub(super) fn ended_as(&self, end: End) -> Result<()> {
        let has = |start: &str| self.said.lines().any(|line| line.starts_with(start));
        let code = self.status.code();
        let failed = code == Some(1) && has("error: ") && has("state: ");
        let done = code == Some(0) && !has("error: ");
        let as_expected = match end {
            End::Killed => code != Some(0),
            End::Failed => failed,
            End::Done => done,
            End::Either => failed || done,
        };
        ensure!(as_expected, "expected {end:?}: {}", self.status);
        Ok(())
    }
}

/// A backup that waits at a step.
pub(super) struct Waiting {
    run: Child,
    signs: TempDir,
}

impl Waiting {
    /// Starts a backup that is to be struck, and waits until it has come to the
    /// step.
    pub(super) fn at(bed: &Bed, vm: &Vm, step: Step, blow: Blow) -> Result<Self> {
        let signs = tempfile::tempdir_in(bed.lab.dir())?;
        let fault = format!(
            "{}:{}:{}",
            step.word(),
            blow.action(),
            signs.path().display()
        );
        let run = bed
            .command(&["backup", vm.name()])
            .env("HIGHWATER_FAULT", fault)
            .envs(
                blow.patience()
                    .map(|seconds| ("HIGHWATER_FAULT_PATIENCE", seconds)),
            )
            .stdout(Stdio::null())
            .stderr(fs::File::create(bed.lab.path("said"))?)
            .spawn()?;
        let mut waiting = Self { run, signs };
        let sign = waiting.signs.path().join(step.word());
        let reached = wait_until(|| {
            let is_there = fs::metadata(&sign).is_ok_and(|sign| sign.len() > 0);
            ensure!(
                is_there || waiting.run.try_wait()?.is_none(),
                "nobody passed the step: {}",
                said(bed)?
            );
            Ok(is_there)
        });
        match reached {
            Ok(()) => Ok(waiting),
            Err(error) => {
                drop(waiting.run.kill());
                drop(waiting.run.wait());
                Err(error)
            }
        }
    }

    /// Lets the blow fall, and waits for the end.
    pub(super) fn strike(mut self, bed: &Bed, vm: &Vm, blow: Blow) -> Result<Struck> {
        let since = Instant::now();
        let fallen = self.fall(bed, vm, blow);
        fs::File::create(self.signs.path().join("go"))?;
        let back = match blow {
            Blow::MissLibvirtd => fallen.and_then(|()| bed.lab.start_libvirtd()),
            _ => fallen,
        };
        let ended = back.and_then(|()| wait_until(|| Ok(self.run.try_wait()?.is_some())));
        let took = since.elapsed();
        drop(self.run.kill());
        let status = self.run.wait()?;
        let said = said(bed)?;
        ended.with_context(|| format!("it did not end: {said}"))?;
        match blow {
            Blow::KillQemu => vm.start()?,
            Blow::KillLibvirtd => bed.lab.start_libvirtd()?,
            Blow::KillMover
            | Blow::KillGuard
            | Blow::KillAll
            | Blow::RestartLibvirtd
            | Blow::MissLibvirtd
            | Blow::StoreBroken
            | Blow::StoreHiccup
            | Blow::StoreFull
            | Blow::StoreDone
            | Blow::StoreLost => {}
        }
        Ok(Struck {
            status,
            said,
            took,
            _signs: self.signs,
        })
    }

    fn fall(&mut self, bed: &Bed, vm: &Vm, blow: Blow) -> Result<()> {
        match blow {
            Blow::KillMover => signal("-KILL", mover_of(&self.run)?),
            Blow::KillGuard => signal("-KILL", guard_of(&self.run)?),
            Blow::KillAll => kill_all(&mut self.run),
            Blow::KillQemu => vm.kill_qemu(),
            Blow::RestartLibvirtd => bed.lab.restart_libvirtd(),
            Blow::MissLibvirtd | Blow::KillLibvirtd => bed.lab.kill_libvirtd(),
            Blow::StoreBroken
            | Blow::StoreHiccup
            | Blow::StoreFull
            | Blow::StoreDone
            | Blow::StoreLost => Ok(()),
        }
    }
}

fn said(bed: &Bed) -> Result<String> {
    Ok(fs::read_to_string(bed.lab.path("said"))?)
}

/// Kills a run and all that it has started. Stopped first: none may see
/// another one die.
fn kill_all(run: &mut Child) -> Result<()> {
    let all = family(run.id());
    for pid in &all {
        signal("-STOP", *pid)?;
    }
    for pid in &all {
        signal("-KILL", *pid)?;
    }
    run.wait()?;
    let is_gone = |pid: &u32| !fs::exists(format!("/proc/{pid}/exe")).unwrap_or(true);
    wait_until(|| Ok(all.iter().all(is_gone)))
}

/// Returns a process and all below it.
fn family(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let children = children.unwrap_or_default();
    let below = children
        .split_whitespace()
        .filter_map(|child| child.parse().ok());
    std::iter::once(pid).chain(below.flat_map(family)).collect()
}

pub(super) fn wait_until(mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while !done()? {
        ensure!(Instant::now() < end, "waited {PATIENCE:?} in vain");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
