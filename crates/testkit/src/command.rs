//! Runs a real tool with a deadline and turns its failure into one error.

use std::ffi::OsStr;
use std::io::{Read, Write as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// A tool about to be run; see [`tool`].
#[derive(Debug)]
pub struct Tool {
    command: Command,
    deadline: Duration,
    input: Option<Vec<u8>>,
}

/// Prepares to run `program`, to be stopped after 60 s.
pub fn tool(program: impl AsRef<OsStr>) -> Tool {
    let mut command = Command::new(program);
    // Messages are compared and parsed; they must not follow the user's language.
    command.env("LC_ALL", "C");
    Tool {
        command,
        deadline: Duration::from_mins(1),
        input: None,
    }
}

impl Tool {
    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.command.args(args);
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Feeds `bytes` to its standard input.
    #[must_use]
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Some(bytes.into());
        self
    }

    /// Kills it after `deadline` instead of 60 s.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Returns it as the standard library's, to be run otherwise.
    pub(crate) fn into_command(self) -> Command {
        self.command
    }

    /// Runs it and returns what it printed; fails if it fails, with its stderr.
    pub fn run(self) -> Result<String> {
        let bytes = self.run_bytes()?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Like [`Tool::run`], for output that is not text.
    pub fn run_bytes(mut self) -> Result<Vec<u8>> {
        let shown = format!("{:?}", self.command);
        self.command
            .stdin(if self.input.is_some() {
                Stdio::piped()
            } else {
                Stdio::null()
            })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = self.command.spawn().with_context(|| {
            format!("cannot start {shown}: is it installed? `scripts/setup.sh --for test` does")
        })?;
        if let (Some(bytes), Some(mut stdin)) = (self.input, child.stdin.take()) {
            // A tool that does not read all of its input has said so by its exit status.
            thread::spawn(move || drop(stdin.write_all(&bytes)));
        }
        let out = drain(child.stdout.take());
        let err = drain(child.stderr.take());

        let end = Instant::now() + self.deadline;
        let mut pause = Duration::from_millis(1);
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if Instant::now() >= end {
                child.kill()?;
                child.wait()?;
                bail!("{shown} did not end within {:?}", self.deadline);
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        };
        let stdout = out.join().unwrap_or_default();
        let stderr = err.join().unwrap_or_default();
        if !status.success() {
            bail!(
                "{shown} failed with {status}: {}{}",
                String::from_utf8_lossy(&stderr).trim(),
                String::from_utf8_lossy(&stdout).trim()
            );
        }
        Ok(stdout)
    }
}

fn drain<R: Read + Send + 'static>(pipe: Option<R>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // A broken pipe ends the output like its end does.
            drop(pipe.read_to_end(&mut bytes));
        }
        bytes
    })
}

/// Finds a program of the system, as a shell would.
pub(crate) fn which(program: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")])
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
        .with_context(|| {
            format!("{program} is not installed: `scripts/setup.sh --for test` installs it")
        })
}

/// Asks `ready` until it says yes; fails after `deadline`, naming `what`.
pub fn wait_until(
    what: &str,
    deadline: Duration,
    mut ready: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let end = Instant::now() + deadline;
    while !ready()? {
        if Instant::now() >= end {
            bail!("waited {deadline:?} in vain: {what}");
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
