//! What must be true afterwards, whatever it was.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::Leftovers;
use serde_json::Value;

use super::Life;
use super::model::Power;

/// A bitmap or checkpoint of another tool, as it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Theirs {
    Checkpoint(String),
    Bitmap {
        file: PathBuf,
        name: String,
        recording: bool,
        inconsistent: bool,
        dirty_bytes: u64,
    },
}

fn is_ours(name: &str) -> bool {
    name.starts_with("hw-")
}

impl Life {
    /// Returns `text` and the options of a repository.
    pub(super) fn args(&self, repository: usize, text: &[&str]) -> Vec<String> {
        let options = self.model.repositories[repository].options.iter().cloned();
        text.iter()
            .map(|it| (*it).to_owned())
            .chain(options)
            .collect()
    }

    /// Runs the program, which must exit 0.
    pub(super) fn run(&self, repository: usize, text: &[&str]) -> Result<String> {
        let args = self.args(repository, text);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        self.bed.run(&args)
    }

    /// Returns the ids of all points that a repository lists.
    pub(super) fn listed(&self, repository: usize) -> Result<BTreeSet<String>> {
        let listed = self.run(repository, &["list", "--json"])?;
        let listed: Value = serde_json::from_str(&listed)?;
        let points = listed["points"].as_array().context("a list of points")?;
        let ids = points.iter().map(|point| point["point"].as_str());
        let ids: Option<BTreeSet<String>> = ids.map(|id| id.map(str::to_owned)).collect();
        ids.context("an id")
    }

    /// Returns those of them that the model does not know.
    pub(super) fn unknown(&self, repository: usize) -> Result<Vec<String>> {
        let mut listed = self.listed(repository)?;
        for point in &self.model.repositories[repository].points {
            ensure!(listed.remove(&point.id), "point {} is gone", point.id);
        }
        Ok(listed.into_iter().collect())
    }

    /// Lists the points and shows one of them.
    pub(super) fn check_list(&self, repository: usize, nth: u64) -> Result<()> {
        let unknown = self.unknown(repository)?;
        ensure!(unknown.is_empty(), "nobody made {unknown:?}");
        let points = &self.model.repositories[repository].points;
        let Some(point) = nth_of(points, nth) else {
            return Ok(());
        };
        let id = format!("id:{}", point.id);
        let shown: Value = serde_json::from_str(&self.run(repository, &["show", &id, "--json"])?)?;
        let disks = shown["disks"].as_array().context("a list of disks")?;
        ensure!(disks.len() == point.disks.len(), "{shown}");
        for disk in disks {
            let name = disk["disk"].as_str().context("a name")?;
            let bytes = point.disks.get(name).context("a disk of the point")?;
            ensure!(disk["size_bytes"] == bytes.len(), "{name}: {shown}");
        }
        Ok(())
    }

    /// Restores one of the points, or one disk of it, and compares.
    pub(super) fn check_any(
        &self,
        repository: usize,
        nth: u64,
        one_disk: bool,
        format: &str,
    ) -> Result<()> {
        let points = &self.model.repositories[repository].points;
        let Some(point) = nth_of(points, nth) else {
            return Ok(());
        };
        let disks: Vec<&str> = point.disks.keys().copied().collect();
        let only = one_disk.then(|| disks[usize::try_from(nth % disks.len() as u64).unwrap_or(0)]);
        self.check_point(repository, &point.id, only, format)
    }

    /// Restores a point, or one disk of it, and compares it with the model.
    pub(super) fn check_point(
        &self,
        repository: usize,
        id: &str,
        only: Option<&str>,
        format: &str,
    ) -> Result<()> {
        let points = &self.model.repositories[repository].points;
        let point = points.iter().find(|point| point.id == id);
        let point = point.context("a known point")?;
        let dir = self.bed.lab.path("restored");
        // One disk is restored to a file.
        let to = only.map_or_else(|| dir.clone(), |disk| dir.join(format!("{disk}.{format}")));
        if only.is_some() {
            fs::create_dir(&dir)?;
        }
        let (name, to) = (format!("id:{id}"), to.to_str().context("a path is text")?);
        let mut args = vec!["restore", name.as_str(), "--to", to, "--format", format];
        args.extend(only.iter().flat_map(|disk| ["-d", *disk]));
        self.run(repository, &args)?;
        for (disk, bytes) in &point.disks {
            if only.is_some_and(|only| only != *disk) {
                continue;
            }
            let restored = dir.join(format!("{disk}.{format}"));
            let raw = dir.join(format!("{disk}.raw"));
            if format == "qcow2" {
                let convert = highwater_testkit::tool("qemu-img").args(["convert", "-O", "raw"]);
                convert.arg(&restored).arg(&raw).run()?;
            }
            let compared = bytes.check(&raw);
            compared.with_context(|| format!("disk {disk} of point {id} is wrong"))?;
        }
        Ok(fs::remove_dir_all(dir)?)
    }

    pub(super) fn verify(&self, repository: usize, read_data: bool) -> Result<()> {
        let args: &[&str] = if read_data {
            &["verify", "--read-data"]
        } else {
            &["verify"]
        };
        self.run(repository, args).map(drop)
    }

    /// Returns what other tools have at the VM. While it is off, nobody of us
    /// touches it.
    pub(super) fn theirs(&self) -> Result<BTreeSet<Theirs>> {
        let mut theirs = BTreeSet::new();
        if self.model.power == Power::Off {
            return Ok(theirs);
        }
        let checkpoints = self.vm.checkpoints()?.into_iter();
        theirs.extend(
            checkpoints
                .filter(|it| !is_ours(it))
                .map(Theirs::Checkpoint),
        );
        for place in self.vm.bitmaps_everywhere()? {
            if is_ours(&place.bitmap.name) || self.is_scratch(&place.file) {
                continue;
            }
            theirs.insert(Theirs::Bitmap {
                file: place.file,
                name: place.bitmap.name,
                recording: place.bitmap.recording,
                inconsistent: place.bitmap.inconsistent,
                dirty_bytes: place.bitmap.dirty_bytes,
            });
        }
        Ok(theirs)
    }

    /// What a dead session has left is no image of the VM.
    fn is_scratch(&self, file: &std::path::Path) -> bool {
        file.starts_with(self.bed.runtime())
    }

    /// After a successful backup: nothing of a session is left at the VM, and
    /// no mark of this repository that no disk needs.
    pub(super) fn check_tidy(&self, repository: usize) -> Result<()> {
        let left = self.vm.leftovers(&self.bed.runtime().join("scratch"))?;
        let clean = Leftovers {
            checkpoints: left.checkpoints.clone(),
            bitmaps: left.bitmaps.clone(),
            ..Leftovers::default()
        };
        ensure!(left == clean, "left at the VM: {left:?}");
        self.is_in_the_expected_state()?;
        self.check_marks(repository)
    }

    fn check_marks(&self, repository: usize) -> Result<()> {
        let repository = &self.model.repositories[repository];
        let Some(prefix) = &repository.prefix else {
            return Ok(());
        };
        let needed: BTreeSet<&str> = repository.needed.values().map(String::as_str).collect();
        let checkpoints = self.vm.checkpoints()?;
        for name in checkpoints.iter().filter_map(|it| it.strip_prefix(prefix)) {
            ensure!(
                needed.contains(name),
                "nobody needs checkpoint {prefix}{name}"
            );
        }
        let bitmaps = self.vm.bitmaps_everywhere()?;
        for place in &bitmaps {
            if let Some(name) = place.bitmap.name.strip_prefix(prefix) {
                ensure!(needed.contains(name), "nobody needs {place:?}");
            }
        }
        // What must be there: the marks from which the next increments go on.
        for disk in self.model.disks.iter().filter(|disk| disk.attached) {
            if !repository.unbroken.contains(disk.name) {
                continue;
            }
            let id = repository.needed.get(disk.name).context("a needed mark")?;
            let mark = format!("{prefix}{id}");
            let is_there = bitmaps
                .iter()
                .any(|it| it.bitmap.name == mark && it.file == *disk.top());
            ensure!(is_there, "disk {} has lost its mark {mark}", disk.name);
        }
        Ok(())
    }

    /// Learns how the marks of a repository begin, from one that it has made.
    pub(super) fn learn_prefix(&mut self, repository: usize, id: &str) -> Result<()> {
        let checkpoints = self.vm.checkpoints()?;
        let id = id.to_lowercase();
        let mut prefixes = checkpoints.iter().filter_map(|it| it.strip_suffix(&id));
        if let Some(prefix) = prefixes.next() {
            self.model.repositories[repository].prefix = Some(prefix.to_owned());
        }
        Ok(())
    }

    /// Everything that was ever promised.
    pub(super) fn check_all(&self) -> Result<()> {
        for repository in 0..self.model.repositories.len() {
            self.check_list(repository, 0)?;
            for point in &self.model.repositories[repository].points {
                self.check_point(repository, &point.id, None, "raw")?;
            }
            self.verify(repository, true)?;
        }
        Ok(())
    }
}

fn nth_of<T>(of: &[T], nth: u64) -> Option<&T> {
    let len = of.len() as u64;
    let place = nth.checked_rem(len)?;
    of.get(usize::try_from(place).ok()?)
}
