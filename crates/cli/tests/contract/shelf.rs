//! A repository with restore points, made without a hypervisor, and the
//! program run on it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result, ensure};
use highwater_engine::repository::{Manifest, Repository, Secret, WriterOptions};
use highwater_model::{PointId, Timestamp};
use serde_json::{Value, json};
use tempfile::TempDir;

/// 2026-11-20T03:00:00Z.
const FIRST_MS: i64 = 1_795_143_600_000;
const HOUR_MS: i64 = 3_600_000;

pub(crate) const UUID: &str = "6ba7b810-9dad-41d1-80b4-00c04fd430c8";

/// A repository in a directory of its own.
pub(crate) struct Shelf {
    dir: TempDir,
    password: Option<&'static str>,
}

/// What is told of a point; the rest is the same for all.
pub(crate) struct Told<'a> {
    pub(crate) vm: &'a str,
    pub(crate) hours: i64,
    pub(crate) disk: &'a str,
    pub(crate) file: &'a str,
    pub(crate) content: &'a [u8],
}

impl Shelf {
    /// Makes an empty directory, and no repository in it yet.
    pub(crate) fn without_repository() -> Result<Self> {
        Ok(Self {
            dir: TempDir::new()?,
            password: None,
        })
    }

    /// Makes a repository by means of the program.
    pub(crate) fn plain() -> Result<Self> {
        let shelf = Self::without_repository()?;
        shelf.run(&["init", "--encryption", "none"])?;
        Ok(shelf)
    }

    /// Makes an encrypted one.
    pub(crate) fn encrypted() -> Result<Self> {
        let shelf = Self {
            dir: TempDir::new()?,
            password: Some("correct horse battery"),
        };
        shelf.run(&["init", "--encryption", "passphrase"])?;
        Ok(shelf)
    }

    /// Makes one with two points of `web01` and one of `db01`.
    pub(crate) fn with_points() -> Result<Self> {
        let shelf = Self::plain()?;
        for (vm, hours) in [("web01", 0), ("web01", 1), ("db01", 2)] {
            shelf.add(&Told {
                vm,
                hours,
                disk: "vda",
                file: "/nvram/vars.fd",
                content: b"high",
            })?;
        }
        Ok(shelf)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn repo(&self) -> PathBuf {
        self.path("repo")
    }

    /// Adds a point with one disk of 1 MiB that begins with `content`, and one
    /// file of that content; returns its id.
    pub(crate) fn add(&self, told: &Told<'_>) -> Result<String> {
        let store = highwater_store::open(self.repo().to_str().context("a path is text")?)?;
        let secret = self
            .password
            .map(|it| Secret::Passphrase(it.as_bytes().to_vec().into()));
        let repo = Repository::open(store, secret.as_ref())?;
        let writer = repo.writer(WriterOptions::default())?;
        let mut bytes = told.content.to_vec();
        bytes.resize(1 << 20, 0);
        let disk = writer.add_bytes(&mut bytes.as_slice(), 1 << 20)?;
        let file = writer.add_bytes(&mut &*told.content, told.content.len() as u64)?;
        let taken_at = Timestamp::from_unix_ms(FIRST_MS + told.hours * HOUR_MS);
        let point = PointId::new(taken_at);
        let manifest: Manifest = serde_json::from_value(json!({
            "version": 1, "point": point, "vm": {"name": told.vm, "uuid": uuid_of(told.vm)},
            "sequence": told.hours + 1, "prev": null,
            "taken_at": taken_at, "utc_offset_minutes": 60, "committed_at": taken_at,
            "consistency": "filesystem", "level": "auto",
            "origin": {"host": "host1", "version": "0.1.0", "hypervisor": [["libvirt", "11.3.0"]]},
            "definition": "<domain><name>x</name></domain>", "definition_at": taken_at,
            "files": [{"role": "nvram", "path": told.file, "mode": 0o600,
                       "captured_at": taken_at, "image": file}],
            "disks": [{"target": told.disk, "mode": "rescan", "reason": "bitmap-missing",
                       "parent": null, "image": disk, "file_bytes": null, "format": "raw",
                       "source": "/images/a.raw", "dirty_bytes": 1 << 20, "read_bytes": 1 << 20,
                       "stored_bytes": 4096, "marked": false,
                       "evidence": {"serial": null, "device": null, "chain": [], "granularity": null,
                                    "process": null, "counters": null, "smallest_size_bytes": 1 << 20}}],
            "skipped": [{"target": "hda", "reason": "a CD-ROM drive"}],
            "mark": null, "healed": ["removed unfinished mark hw-x"], "warnings": ["bitmap lied"],
            "tags": ["nightly"], "group": "web", "duration_ms": 1234, "prune_epoch": 0,
        }))?;
        writer.flush()?.commit(&manifest)?;
        Ok(point.to_string())
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_highwater"));
        command
            .args(args)
            .env("HIGHWATER_REPO", self.repo())
            .env("HIGHWATER_RUNTIME_DIR", self.path("run"))
            .env("HIGHWATER_CONFIG", "")
            .env_remove("HIGHWATER_PASSWORD")
            .env("TZ", "UTC")
            .stdin(Stdio::null());
        if let Some(password) = self.password {
            command.env("HIGHWATER_PASSWORD", password);
        }
        command
    }

    /// Runs the program; fails unless it exits 0. Returns stdout.
    pub(crate) fn run(&self, args: &[&str]) -> Result<String> {
        let output = self.command(args).output()?;
        ensure!(
            output.status.success(),
            "highwater {args:?}: {}",
            Said::of(&output).stderr
        );
        Ok(Said::of(&output).stdout)
    }

    /// Runs the program with `--json`, which must exit 0.
    pub(crate) fn json(&self, args: &[&str]) -> Result<Value> {
        Ok(serde_json::from_str(
            &self.run(&[args, &["--json"]].concat())?,
        )?)
    }

    /// Runs the program and returns what it said, however it ended.
    pub(crate) fn say(&self, args: &[&str]) -> Result<Said> {
        Ok(Said::of(&self.command(args).output()?))
    }
}

/// What the program said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Said {
    pub(crate) fn of(output: &Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Fails unless it ended with `code` and said `parts` on stderr.
    #[track_caller]
    pub(crate) fn expect(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        for part in parts {
            assert!(self.stderr.contains(part), "no `{part}` in {self:?}");
        }
    }
}

fn uuid_of(vm: &str) -> Option<&'static str> {
    (vm == "web01").then_some(UUID)
}

/// Returns all that lies below a directory, relative to it.
pub(crate) fn below(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}
