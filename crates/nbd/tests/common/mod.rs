//! Real servers, started for one test and ended with it.
#![allow(dead_code, reason = "each test program uses its own part of this")]

pub(crate) mod peer;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use highwater_model::{ByteRange, ExtentMap};
use highwater_nbd::{ConnectOptions, Connection, Endpoint, NbdError};
use serde_json::Value;
use tempfile::TempDir;

/// A server process with its directory.
pub(crate) struct Server {
    pub(crate) directory: TempDir,
    pub(crate) endpoint: Endpoint,
    child: Child,
}

impl Drop for Server {
    fn drop(&mut self) {
        // Fails only for a server that has ended, which some tests want.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Server {
    pub(crate) fn nbdkit(arguments: &[&str]) -> Result<Self> {
        Self::nbdkit_in(TempDir::new()?, arguments)
    }

    /// Starts nbdkit on a Unix socket in `directory`.
    pub(crate) fn nbdkit_in(directory: TempDir, arguments: &[&str]) -> Result<Self> {
        let socket = directory.path().join("socket");
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--exit-with-parent"]);
        command.arg("--pidfile").arg(directory.path().join("pid"));
        command.arg("--unix").arg(&socket).args(arguments);
        Self::start(directory, command, Endpoint::Unix(socket))
    }

    /// Starts qemu-nbd read-only on a Unix socket in `directory`.
    pub(crate) fn qemu_nbd(directory: TempDir, arguments: &[&str]) -> Result<Self> {
        let socket = directory.path().join("socket");
        let mut command = qemu_nbd(&directory);
        command.arg("--socket").arg(&socket).args(arguments);
        Self::start(directory, command, Endpoint::Unix(socket))
    }

    pub(crate) fn qemu_nbd_tcp(directory: TempDir, arguments: &[&str]) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut command = qemu_nbd(&directory);
        command
            .args(["--bind", "127.0.0.1", "--port", &port.to_string()])
            .args(arguments);
        Self::start(
            directory,
            command,
            Endpoint::Tcp {
                host: String::from("127.0.0.1"),
                port,
            },
        )
    }

    /// Starts a program that writes `pid` into its directory when it is ready.
    pub(crate) fn start(
        directory: TempDir,
        mut command: Command,
        endpoint: Endpoint,
    ) -> Result<Self> {
        command
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command
            .spawn()
            .with_context(|| format!("`{program}` must be installed"))?;
        let mut server = Self {
            directory,
            endpoint,
            child,
        };
        let pid = server.directory.path().join("pid");
        let begun = Instant::now();
        while std::fs::metadata(&pid).map_or(0, |pid| pid.len()) == 0 {
            ensure!(
                server.child.try_wait()?.is_none(),
                "`{program}` ended at once"
            );
            ensure!(
                begun.elapsed() < Duration::from_secs(30),
                "`{program}` does not get ready"
            );
            std::thread::park_timeout(Duration::from_millis(2));
        }
        Ok(server)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn connect(&self, options: &ConnectOptions) -> Result<Connection, NbdError> {
        Connection::connect(&self.endpoint, options)
    }

    pub(crate) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits until the server has ended by itself.
    pub(crate) fn wait(&mut self) -> Result<()> {
        self.child.wait()?;
        Ok(())
    }
}

fn qemu_nbd(directory: &TempDir) -> Command {
    let mut command = Command::new("qemu-nbd");
    command.args(["--persistent", "--shared", "8", "--export-name", "disk"]);
    command.arg("--pid-file").arg(directory.path().join("pid"));
    command
}

/// Both ways to put headers, for tests that must pass with either.
pub(crate) const HEADERS: [bool; 2] = [false, true];

pub(crate) fn options(extended_headers: bool, contexts: &[&str]) -> ConnectOptions {
    ConnectOptions {
        extended_headers,
        meta_contexts: contexts.iter().map(|&name| name.to_owned()).collect(),
        ..ConnectOptions::for_export("disk")
    }
}

/// Runs a program to its end; it must succeed.
pub(crate) fn run(directory: &Path, program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(directory)
        .output();
    let output = output.with_context(|| format!("`{program}` must be installed"))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.status.success(),
        "{program} {arguments:?} failed: {said}"
    );
    Ok(())
}

/// Runs `qemu-io` commands on an image.
pub(crate) fn qemu_io(directory: &Path, image: &str, commands: &[&str]) -> Result<()> {
    let mut arguments = Vec::new();
    for command in commands {
        arguments.extend_from_slice(&["-c", command]);
    }
    arguments.push(image);
    run(directory, "qemu-io", &arguments)
}

pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    File::create(path)?.write_all(bytes)?;
    Ok(())
}

/// Maps a whole export by one context; neighbours of one kind are one extent.
pub(crate) fn map(
    connection: &mut Connection,
    context: &str,
) -> Result<Vec<(u64, u64, u64)>, NbdError> {
    let whole = ByteRange::new(0, connection.export().size_bytes).unwrap();
    let mut map = ExtentMap::starting_at(0);
    connection.map(context, whole, &mut |range, flags| {
        map.push(range, flags)
            .expect("a map has neither gaps nor overlaps");
        Ok::<(), NbdError>(())
    })?;
    assert_eq!(map.covered_to(), whole.end(), "a map is whole");
    Ok(map
        .iter()
        .map(|(range, flags)| (range.start(), range.end(), flags))
        .collect())
}

/// A QMP monitor.
pub(crate) struct Monitor {
    lines: BufReader<UnixStream>,
}

impl Monitor {
    pub(crate) fn open(socket: &Path) -> Result<Self> {
        let begun = Instant::now();
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if begun.elapsed() > Duration::from_secs(30) => return Err(error.into()),
                Err(_) => std::thread::park_timeout(Duration::from_millis(2)),
            }
        };
        let mut monitor = Self {
            lines: BufReader::new(stream),
        };
        monitor.lines.read_line(&mut String::new())?;
        monitor.execute("qmp_capabilities", &serde_json::json!({}))?;
        Ok(monitor)
    }

    pub(crate) fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let message = serde_json::json!({"execute": command, "arguments": arguments});
        writeln!(self.lines.get_mut(), "{message}")?;
        loop {
            let mut line = String::new();
            ensure!(self.lines.read_line(&mut line)? > 0, "QEMU ended");
            let answer: Value = serde_json::from_str(&line)?;
            ensure!(answer.get("error").is_none(), "{command} failed: {line}");
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
        }
    }
}
