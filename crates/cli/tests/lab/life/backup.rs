//! Backups, and what they claim.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::Life;
use super::bytes::Bytes;
use super::model::{Point, Power};
use crate::support::mode;

/// How a backup ended.
pub(super) struct Ended {
    /// `None` if it was killed.
    pub(super) code: Option<i32>,
    pub(super) stdout: String,
    pub(super) stderr: String,
}

const LOST: &str = "libvirt died while it started a backup job";

/// The disks that options mean, of those that are attached.
fn selected(options: &[String], attached: &[&'static str]) -> Vec<&'static str> {
    let named = |flag: &str| -> Option<&String> {
        let place = options.iter().position(|it| it == flag)?;
        options.get(place + 1)
    };
    let mut disks = attached.to_vec();
    if let Some(only) = named("-d") {
        disks.retain(|it| it == only);
    }
    if let Some(not) = named("-x") {
        disks.retain(|it| it != not);
    }
    disks
}

impl Life {
    pub(super) fn back_up(
        &mut self,
        repository: usize,
        options: &[String],
        fresh_runtime: bool,
    ) -> Result<()> {
        let theirs = self.theirs()?;
        let ended = self.start_and_wait(repository, options, fresh_runtime)?;
        let ended = if self.model.libvirtd_died && ended.stderr.contains(LOST) {
            self.way_out_of_a_lost_job()?;
            self.start_and_wait(repository, options, fresh_runtime)?
        } else {
            ended
        };
        let words: Vec<&str> = options.iter().map(String::as_str).collect();
        let disks = selected(options, &self.model.attached());
        let level = words.iter().position(|it| *it == "-l");
        let level = level.map_or("auto", |place| words[place + 1]);
        let may_refuse = matches!(level, "incremental" | "differential")
            && !self.are_unbroken(repository, &disks);
        if may_refuse && ended.code == Some(1) {
            ensure!(ended.stderr.contains("is possible"), "{}", ended.stderr);
            self.note("refused: no increment is possible");
            self.added_nothing(repository)?;
        } else {
            let content = self.model.content(&disks);
            let unbroken = self.model.repositories[repository].unbroken.clone();
            self.succeeded(repository, &ended, content, level)?;
            if self.model.power != Power::Off {
                self.check_tidy(repository)?;
            }
            let report: Value = serde_json::from_str(&ended.stdout)?;
            for disk in disks.iter().filter(|it| unbroken.contains(*it)) {
                let due = match level {
                    "auto" | "incremental" => "incremental",
                    other => other,
                };
                let seen = mode(&report, disk);
                ensure!(
                    seen == due,
                    "disk {disk}: {seen} instead of {due}: {report}"
                );
            }
        }
        let left = self.theirs()?;
        ensure!(left == theirs, "others had {theirs:?}, and have {left:?}");
        Ok(())
    }

    fn are_unbroken(&self, repository: usize, disks: &[&str]) -> bool {
        let unbroken = &self.model.repositories[repository].unbroken;
        disks.iter().all(|disk| unbroken.contains(disk))
    }

    fn start_and_wait(
        &mut self,
        repository: usize,
        options: &[String],
        fresh_runtime: bool,
    ) -> Result<Ended> {
        let args = self.args(repository, &["backup", "web01", "--json"]);
        let args: Vec<&str> = args.iter().chain(options).map(String::as_str).collect();
        let mut command = self.bed.command(&args);
        if fresh_runtime {
            self.files += 1;
            let dir = self.bed.lab.path(&format!("runtime-{}", self.files));
            command.env("HIGHWATER_RUNTIME_DIR", dir);
        }
        let output = command.output()?;
        let ended = Ended {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        };
        Ok(ended)
    }

    /// The way that the message tells.
    pub(super) fn way_out_of_a_lost_job(&mut self) -> Result<()> {
        self.note("libvirt has lost the job: the way out");
        self.vm.destroy()?;
        self.bed.lab.restart_libvirtd()?;
        self.vm.start()?;
        self.is_on();
        Ok(())
    }

    /// A backup that said so: there is one point more, and it is right.
    pub(super) fn succeeded(
        &mut self,
        repository: usize,
        ended: &Ended,
        content: BTreeMap<&'static str, Bytes>,
        level: &str,
    ) -> Result<()> {
        ensure!(
            ended.code == Some(0),
            "exit code {:?}: {}{}",
            ended.code,
            ended.stdout,
            ended.stderr
        );
        let report: Value = serde_json::from_str(&ended.stdout).context(ended.stdout.clone())?;
        self.note_report(&report);
        let id = report["point"].as_str().context("a point")?.to_owned();
        let unknown = self.unknown(repository)?;
        ensure!(unknown == [id.clone()], "{unknown:?} instead of {id}");
        let reported = report["disks"].as_array().context("a list of disks")?;
        let mut names: Vec<&str> = reported
            .iter()
            .filter_map(|it| it["disk"].as_str())
            .collect();
        names.sort_unstable();
        let due: Vec<&str> = content.keys().copied().collect();
        ensure!(names == due, "disks {names:?} instead of {due:?}: {report}");
        self.exists(repository, &id, content)?;
        if !matches!(level, "copy" | "differential") {
            self.model.marked(repository, &id, &due);
        }
        self.model.dead_session = false;
        self.model.libvirtd_died = false;
        self.learn_prefix(repository, &id)
    }

    /// A point exists; it must be what its moment was.
    pub(super) fn exists(
        &mut self,
        repository: usize,
        id: &str,
        disks: BTreeMap<&'static str, Bytes>,
    ) -> Result<()> {
        let point = Point {
            id: id.to_owned(),
            disks,
        };
        self.model.repositories[repository].points.push(point);
        let right = self.check_point(repository, id, None, "raw");
        if right.is_err() {
            // Who is wrong: the point or the model?
            let look = self.look();
            return right.with_context(|| format!("QEMU's tools agree with the model: {look:?}"));
        }
        Ok(())
    }

    pub(super) fn added_nothing(&self, repository: usize) -> Result<()> {
        let unknown = self.unknown(repository)?;
        ensure!(unknown.is_empty(), "a refused backup has added {unknown:?}");
        Ok(())
    }

    pub(super) fn fails_without_libvirtd(&mut self, repository: usize) -> Result<()> {
        let ended = self.start_and_wait(repository, &[], false)?;
        ensure!(ended.code == Some(1), "{:?}: {}", ended.code, ended.stderr);
        self.added_nothing(repository)
    }

    /// A backup that somebody else's work keeps from starting.
    pub(super) fn is_refused(&mut self, repository: usize) -> Result<()> {
        let before = self.vm.checkpoints()?;
        let ended = self.start_and_wait(repository, &[], false)?;
        if ended.code != Some(11) {
            bail!("{:?} instead of 11: {}", ended.code, ended.stderr);
        }
        self.added_nothing(repository)?;
        self.has_no_new_mark(repository, &before)
    }

    /// A backup that has added no point leaves no mark of its own.
    pub(super) fn has_no_new_mark(&self, repository: usize, before: &[String]) -> Result<()> {
        let after = self.vm.checkpoints()?;
        let own = self.model.repositories[repository].prefix.clone();
        // What nobody needs may be gone, what was forgotten may be told again.
        let own = own.unwrap_or_else(|| "hw-".to_owned());
        let needed = &self.model.repositories[repository].needed;
        let is_needed = |name: &str| {
            let id = name.strip_prefix(&own);
            id.is_some_and(|id| needed.values().any(|it| it == id))
        };
        for name in before {
            let may_go = name.starts_with(&own);
            ensure!(after.contains(name) || may_go, "{name} is gone");
        }
        for name in &after {
            ensure!(before.contains(name) || is_needed(name), "{name} is new");
        }
        Ok(())
    }

    fn note_report(&mut self, report: &Value) {
        let disks = report["disks"].as_array().into_iter().flatten();
        let modes: Vec<String> = disks
            .filter_map(|disk| disk["disk"].as_str())
            .map(|name| format!("{name} {}", mode(report, name)))
            .collect();
        let healed = match report["healed"].as_array() {
            Some(healed) if !healed.is_empty() => format!("; healed {}", report["healed"]),
            _ => String::new(),
        };
        let warned = match report["warnings"].as_array() {
            Some(warned) if !warned.is_empty() => format!("; warnings {}", report["warnings"]),
            _ => String::new(),
        };
        let point = report["point"].as_str().unwrap_or("?");
        self.note(&format!(
            "point {point}: {}{healed}{warned}",
            modes.join(", ")
        ));
    }
}
