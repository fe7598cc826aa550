//! What falls on a backup, and how it is made to.

use std::ops::Deref;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use highwater_model::step::Step;
use highwater_testkit::Vm;

use super::cells::End;
use crate::processes::{guard_of, mover_of, signal};
use crate::support::Bed;
use crate::waiting::{self, Ended};

pub(super) use crate::waiting::wait_until;

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
    ended: Ended,
    /// From the blow to the end.
    pub(super) took: Duration,
}

impl Deref for Struck {
    type Target = Ended;

    fn deref(&self) -> &Ended {
        &self.ended
    }
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
pub(super) struct Waiting(waiting::Waiting);

impl Waiting {
    /// Starts a backup that is to be struck, and waits until it has come to the
    /// step.
    pub(super) fn at(bed: &Bed, vm: &Vm, step: Step, blow: Blow) -> Result<Self> {
        let mut command = bed.command(&["backup", vm.name()]);
        command.envs(
            blow.patience()
                .map(|seconds| ("HIGHWATER_FAULT_PATIENCE", seconds)),
        );
        waiting::Waiting::at(command, &bed.lab.dir(), step, blow.action()).map(Self)
    }

    /// Lets the blow fall, and waits for the end.
    pub(super) fn strike(mut self, bed: &Bed, vm: &Vm, blow: Blow) -> Result<Struck> {
        let since = Instant::now();
        let fallen = self.fall(bed, vm, blow);
        self.0.go()?;
        let back = match blow {
            Blow::MissLibvirtd => fallen.and_then(|()| bed.lab.start_libvirtd()),
            _ => fallen,
        };
        let ended = self.0.end(back)?;
        let took = since.elapsed();
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
        Ok(Struck { ended, took })
    }

    fn fall(&mut self, bed: &Bed, vm: &Vm, blow: Blow) -> Result<()> {
        let run = &self.0.run;
        match blow {
            Blow::KillMover => signal("-KILL", mover_of(run)?),
            Blow::KillGuard => signal("-KILL", guard_of(run)?),
            Blow::KillAll => self.0.kill_all(),
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
