//! `highwater` as a user runs it: the command is shown, and so is its answer.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::Lab;
use rustix::process::Pid;
use serde_json::Value;

use crate::screen;

/// How much of an answer is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Show {
    All,
    /// For the fifth answer of a kind.
    LastLine,
}

/// A command that was started.
pub(crate) struct Running {
    words: String,
    child: Child,
    since: Instant,
}

impl Running {
    /// Returns its process.
    pub(crate) fn process(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Waits for it, shows its answer, and fails if it failed. Returns how long
    /// it took.
    pub(crate) fn wait(self, show: Show) -> Result<Duration> {
        let output = self.child.wait_with_output()?;
        let took = self.since.elapsed();
        // A user sees both on one terminal; commands talk first and answer then.
        let text = [output.stderr, output.stdout].concat();
        let text = String::from_utf8_lossy(&text);
        let last = text.lines().next_back().unwrap_or_default();
        let cut = show == Show::LastLine && output.status.success();
        screen::output(if cut { last } else { &text });
        screen::space();
        let Self { words, .. } = self;
        ensure!(
            output.status.success(),
            "highwater {words} ended with {}",
            output.status
        );
        Ok(took)
    }
}

/// The program, with the repository and the libvirt of this demo.
pub(crate) struct Program {
    binary: PathBuf,
    /// Where it runs, so that a user's short paths do.
    dir: PathBuf,
    repo: PathBuf,
    runtime: PathBuf,
    uri: String,
}

impl Program {
    /// Finds the program where it was built together with this demo.
    pub(crate) fn find(lab: &Lab) -> Result<Self> {
        let here = std::env::current_exe()?;
        let beside = here.ancestors().nth(2).map(|dir| dir.join("highwater"));
        let named = std::env::var_os("HIGHWATER_BIN").map(PathBuf::from);
        let binary = named.or(beside).context("this demo lies nowhere")?;
        ensure!(
            binary.is_file(),
            "there is no {}: `make demo` builds it",
            binary.display()
        );
        Ok(Self {
            binary,
            dir: lab.dir(),
            repo: lab.path("repo"),
            runtime: lab.path("highwater"),
            uri: lab.uri(),
        })
    }

    /// Returns the directory of sockets and scratch files.
    pub(crate) const fn runtime(&self) -> &PathBuf {
        &self.runtime
    }

    /// Runs it, shows command and answer, and fails if it fails. Returns how
    /// long it took.
    pub(crate) fn run(&self, args: &[&str], show: Show) -> Result<Duration> {
        self.start(args)?.wait(show)
    }

    /// Shows the command and starts it.
    pub(crate) fn start(&self, args: &[&str]) -> Result<Running> {
        let words = args.join(" ");
        screen::command(&format!("highwater {words}"));
        let since = Instant::now();
        let child = self
            .command(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", self.binary.display()))?;
        Ok(Running {
            words,
            child,
            since,
        })
    }

    /// Asks for a JSON document, without showing it.
    pub(crate) fn ask(&self, args: &[&str]) -> Result<Value> {
        let output = self.command(args).arg("--json").output()?;
        ensure!(
            output.status.success(),
            "highwater {} ended with {}: {}",
            args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .args(["-c", &self.uri])
            .args(args)
            .current_dir(&self.dir)
            .env("HIGHWATER_REPO", &self.repo)
            .env("HIGHWATER_RUNTIME_DIR", &self.runtime)
            .stdin(Stdio::null());
        command
    }
}
