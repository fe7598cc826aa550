//! A lab with a repository, and the program run in it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{Lab, Leftovers, Vm};
use serde_json::Value;

/// A lab, a repository, and a place for restores.
pub(crate) struct Bed {
    pub(crate) lab: Lab,
    password: Option<&'static str>,
}

impl Bed {
    /// Starts a lab with an unencrypted repository.
    pub(crate) fn start() -> Result<Self> {
        Self::with_init(&["--encryption", "none"], None)
    }

    /// Starts a lab with an encrypted repository.
    pub(crate) fn start_encrypted() -> Result<Self> {
        Self::with_init(
            &["--encryption", "passphrase"],
            Some("correct horse battery"),
        )
    }

    pub(crate) fn with_init(init: &[&str], password: Option<&'static str>) -> Result<Self> {
        let bed = Self {
            lab: Lab::start()?,
            password,
        };
        bed.run(&[&["init"], init].concat())?;
        Ok(bed)
    }

    /// Starts a lab without a repository; the passphrase is there for one.
    pub(crate) fn without_repository() -> Result<Self> {
        Ok(Self {
            lab: Lab::start()?,
            password: None,
        })
    }

    pub(crate) fn repo(&self) -> PathBuf {
        self.lab.path("repo")
    }

    pub(crate) fn runtime(&self) -> PathBuf {
        self.lab.path("highwater")
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_highwater"));
        command
            .args(args)
            .env("HIGHWATER_REPO", self.repo())
            .env("HIGHWATER_CONFIG", "")
            .env("HIGHWATER_RUNTIME_DIR", self.runtime())
            .env("TZ", "UTC")
            .args(["-c", &self.lab.uri()])
            .stdin(Stdio::null());
        if let Some(password) = self.password {
            command.env("HIGHWATER_PASSWORD", password);
        }
        command
    }

    pub(crate) fn output(&self, args: &[&str]) -> Result<Output> {
        Ok(self.command(args).output()?)
    }

    /// Runs the program; fails unless it exits 0. Returns stdout.
    pub(crate) fn run(&self, args: &[&str]) -> Result<String> {
        let output = self.output(args)?;
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "highwater {args:?}: {}\n{stdout}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(stdout)
    }

    /// Runs the program, which must fail; returns exit code and stderr.
    pub(crate) fn fail(&self, args: &[&str]) -> Result<(i32, String)> {
        let output = self.output(args)?;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            !output.status.success(),
            "highwater {args:?} succeeded: {stderr}"
        );
        Ok((output.status.code().context("it was killed")?, stderr))
    }

    /// Backs up and returns the JSON report.
    pub(crate) fn backup(&self, vm: &Vm, args: &[&str]) -> Result<Value> {
        let text = self.run(&[&["backup", vm.name(), "--json"], args].concat())?;
        serde_json::from_str(&text).with_context(|| text)
    }

    /// Starts a backup in the background.
    pub(crate) fn spawn(&self, args: &[&str]) -> Result<Child> {
        let mut command = self.command(args);
        Ok(command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?)
    }

    /// Starts a backup in the background that has work for a while: one worker
    /// at the slowest compression.
    pub(crate) fn spawn_slow(&self, args: &[&str]) -> Result<Child> {
        let slow = ["--workers", "1", "--compression", "zstd:19"];
        self.spawn(&[args, &slow].concat())
    }

    /// Restores a point to a new directory and returns it.
    pub(crate) fn restore(&self, point: &str, name: &str, args: &[&str]) -> Result<PathBuf> {
        let dir = self.lab.path(name);
        let to = dir.to_str().context("a path is text")?;
        self.run(&[&["restore", point, "--to", to], args].concat())?;
        Ok(dir)
    }

    /// Fails unless nothing of ours is at the VM but at most one checkpoint
    /// and its bitmaps, and the guest runs.
    pub(crate) fn assert_tidy(&self, vm: &Vm, marks: usize) -> Result<()> {
        let left = vm.leftovers(&self.runtime().join("scratch"))?;
        let clean = Leftovers {
            checkpoints: left.checkpoints.clone(),
            bitmaps: left.bitmaps.clone(),
            ..Leftovers::default()
        };
        ensure!(left == clean, "left at the VM: {left:?}");
        ensure!(
            left.checkpoints.len() == marks,
            "checkpoints: {:?}",
            left.checkpoints
        );
        ensure!(vm.state()? == "running", "the guest is {}", vm.state()?);
        Ok(())
    }
}

/// Returns `disks[n][field]` of a report, by target name.
pub(crate) fn disk<'a>(report: &'a Value, target: &str) -> &'a Value {
    report["disks"]
        .as_array()
        .and_then(|disks| disks.iter().find(|disk| disk["disk"] == target))
        .unwrap_or_else(|| panic!("no disk {target} in {report}"))
}

/// Returns the mode and the reason of a disk.
pub(crate) fn mode(report: &Value, target: &str) -> String {
    let disk = disk(report, target);
    let mode = disk["mode"].as_str().unwrap_or("?");
    match disk["reason"].as_str() {
        Some(reason) => format!("{mode}: {reason}"),
        None => mode.to_owned(),
    }
}

/// Returns the id of the point a report tells of, as a `POINT`.
pub(crate) fn point(report: &Value) -> String {
    format!(
        "id:{}",
        report["point"].as_str().expect("a report has a point")
    )
}

/// Returns the disk's content as the guest sees it, as a raw file.
pub(crate) fn reference(bed: &Bed, vm: &Vm, disk: &str, name: &str) -> Result<PathBuf> {
    let path = bed.lab.path(name);
    vm.raw_copy(disk, &path)?;
    Ok(path)
}

/// Fails unless both images hold the same.
pub(crate) fn assert_same(a: &Path, b: &Path) -> Result<()> {
    highwater_testkit::compare_images(a, b)
        .with_context(|| format!("{} and {}", a.display(), b.display()))
}

/// Lets the guest write that many MiB of bytes that no compressor can shrink,
/// from an offset in MiB on.
pub(crate) fn write_noise(bed: &Bed, vm: &Vm, disk: &str, from: u64, mib: u64) -> Result<()> {
    let noise = bed.lab.path("noise");
    highwater_testkit::tool("dd")
        .args(["if=/dev/urandom", "bs=1M", "status=none"])
        .arg(format!("count={mib}"))
        .arg(format!("of={}", noise.display()))
        .run()?;
    vm.write(
        disk,
        &format!("write -s {} {from}M {mib}M", noise.display()),
    )
}

/// Waits until libvirt knows of a job.
pub(crate) fn wait_for_job(vm: &Vm) -> Result<()> {
    let deadline = Instant::now() + Duration::from_mins(1);
    // libvirt cannot tell in the moment in which the job starts.
    while !vm.job_running().unwrap_or_default() {
        ensure!(Instant::now() < deadline, "no job began");
    }
    Ok(())
}
