//! A run of the program that waits at a step, for something to happen there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use highwater_model::step::Step;
use tempfile::TempDir;

use crate::processes::signal;

/// How long a run may take to reach a step, and to end after a blow: libvirt is
/// waited for up to 15 s, and the machine may be busy.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// A run that waits at a step.
pub(crate) struct Waiting {
    pub(crate) run: Child,
    signs: TempDir,
    said: PathBuf,
}

/// How it ended.
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) said: String,
    /// Whoever still waits has to see the file `go` in it.
    _signs: TempDir,
}

impl Waiting {
    /// Starts the program, and waits until it has come to the step, where
    /// `action` happens (`wait`, or a fault of the store).
    pub(crate) fn at(mut command: Command, dir: &Path, step: Step, action: &str) -> Result<Self> {
        let signs = tempfile::tempdir_in(dir)?;
        let fault = format!("{}:{action}:{}", step.word(), signs.path().display());
        let said = dir.join("said");
        let run = command
            .env("HIGHWATER_FAULT", fault)
            .stdout(Stdio::null())
            .stderr(fs::File::create(&said)?)
            .spawn()?;
        let mut waiting = Self { run, signs, said };
        let sign = waiting.signs.path().join(step.word());
        let reached = wait_until(|| {
            let is_there = fs::metadata(&sign).is_ok_and(|sign| sign.len() > 0);
            ensure!(
                is_there || waiting.run.try_wait()?.is_none(),
                "nobody passed the step: {}",
                fs::read_to_string(&waiting.said)?
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

    /// Lets it go on, if it lives.
    pub(crate) fn go(&self) -> Result<()> {
        fs::File::create(self.signs.path().join("go"))?;
        Ok(())
    }

    /// Waits for its end. `before` has happened since it went on.
    pub(crate) fn end(mut self, before: Result<()>) -> Result<Ended> {
        let ended = before.and_then(|()| wait_until(|| Ok(self.run.try_wait()?.is_some())));
        drop(self.run.kill());
        let status = self.run.wait()?;
        let said = fs::read_to_string(&self.said)?;
        ended.with_context(|| format!("it did not end: {said}"))?;
        Ok(Ended {
            status,
            said,
            _signs: self.signs,
        })
    }

    /// Kills the run and all that it has started. Stopped first: none may see
    /// another one die.
    pub(crate) fn kill_all(&mut self) -> Result<()> {
        let all = family(self.run.id());
        for pid in &all {
            signal("-STOP", *pid)?;
        }
        for pid in &all {
            signal("-KILL", *pid)?;
        }
        self.run.wait()?;
        let is_gone = |pid: &u32| !fs::exists(format!("/proc/{pid}/exe")).unwrap_or(true);
        wait_until(|| Ok(all.iter().all(is_gone)))
    }
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

pub(crate) fn wait_until(mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while !done()? {
        ensure!(Instant::now() < end, "waited {PATIENCE:?} in vain");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
