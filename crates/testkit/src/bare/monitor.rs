//! The test's own line to a QEMU: one command, one answer.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

/// A QEMU under a busy machine's load answers late, but it does.
const PATIENCE: Duration = Duration::from_mins(1);

/// A monitor that talks QMP.
#[derive(Debug)]
pub(super) struct Monitor {
    to: UnixStream,
    from: BufReader<UnixStream>,
}

impl Monitor {
    /// Connects and greets.
    pub(super) fn connect(socket: &Path) -> Result<Self> {
        let to = UnixStream::connect(socket)?;
        to.set_read_timeout(Some(PATIENCE))?;
        let from = BufReader::new(to.try_clone()?);
        let mut monitor = Self { to, from };
        monitor.line().context("QEMU does not greet")?;
        monitor.run(&json!({"execute": "qmp_capabilities"}))?;
        Ok(monitor)
    }

    /// Runs one command; returns what stands under `return`.
    pub(super) fn run(&mut self, command: &Value) -> Result<Value> {
        self.to.write_all(format!("{command}\n").as_bytes())?;
        loop {
            let mut answer = self.line().with_context(|| format!("after {command}"))?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refused {command}: {error}");
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
            // An event.
        }
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.from.read_line(&mut line)? == 0 {
            bail!("QEMU has closed its monitor");
        }
        serde_json::from_str(&line).with_context(|| format!("no JSON: {line}"))
    }
}
