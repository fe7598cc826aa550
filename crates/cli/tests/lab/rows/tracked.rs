//! A VM with a history, to which something is about to happen, and what must
//! hold afterwards whatever it was.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use highwater_testkit::{DiskSpec, MIB, Tool, Vm, tool};
use serde_json::{Value, json};

use crate::matrix::{Reading, Subject, Taken, check, take, write_to};
use crate::support::{Bed, mode, point};

pub(super) const SIZE: u64 = 2 * MIB;
const NO_MARKS: &str = "rescan: no-marks-on-";

/// A VM, and the points taken of it so far with its disks as they were.
pub(super) struct Tracked {
    pub(super) vm: Vm,
    pub(super) disks: Vec<Subject>,
    points: Vec<Taken>,
    /// The point whose mark each disk needs, in the letters of a mark's name.
    needed: BTreeMap<String, String>,
    /// Files that QEMU knows by another name, by that name.
    pub(super) served: BTreeMap<PathBuf, PathBuf>,
    pub(super) bed: Bed,
}

impl Tracked {
    /// One disk with a restore point, written to since.
    pub(super) fn start() -> Result<Self> {
        Self::with(&[DiskSpec::qcow2("vda", SIZE)])
    }

    /// Two disks with a restore point, written to since.
    pub(super) fn two() -> Result<Self> {
        Self::with(&[DiskSpec::qcow2("vda", SIZE), DiskSpec::qcow2("vdb", SIZE)])
    }

    pub(super) fn with(disks: &[DiskSpec]) -> Result<Self> {
        let mut it = Self::unseen(disks)?;
        it.heals("full: first-backup")?;
        it.write()?;
        Ok(it)
    }

    /// Without any point, and not written to. All disks have images of the testkit.
    pub(super) fn unseen(disks: &[DiskSpec]) -> Result<Self> {
        Self::in_bed(Bed::start()?, disks)
    }

    pub(super) fn in_bed(bed: Bed, disks: &[DiskSpec]) -> Result<Self> {
        let mut vm = bed.lab.vm("web01");
        for disk in disks {
            vm = vm.disk(disk.clone());
        }
        let vm = vm.start()?;
        let mut subjects = Vec::new();
        for disk in disks {
            let image = vm.image(disk.target());
            let reading = Reading::Image(image, "qcow2");
            subjects.push(Subject::new(disk.target(), SIZE, reading, "incremental")?);
        }
        Ok(Self::of(bed, vm, subjects))
    }

    /// A VM with `vda` alone.
    pub(super) fn of_one(bed: Bed, vm: Vm) -> Result<Self> {
        let reading = Reading::Image(vm.image("vda"), "qcow2");
        let vda = Subject::new("vda", SIZE, reading, "incremental")?;
        Ok(Self::of(bed, vm, vec![vda]))
    }

    pub(super) const fn of(bed: Bed, vm: Vm, disks: Vec<Subject>) -> Self {
        Self {
            vm,
            disks,
            points: Vec::new(),
            needed: BTreeMap::new(),
            served: BTreeMap::new(),
            bed,
        }
    }

    /// The guest writes data, zeroes and discards.
    pub(super) fn write(&mut self) -> Result<()> {
        write_to(&self.vm, &mut self.disks, 10)
    }

    /// The guest writes, and the next plain backup is right: every disk is read
    /// in this mode for this reason, and no mark is left that nobody needs.
    pub(super) fn heals(&mut self, expected: &str) -> Result<Value> {
        let all: Vec<&str> = self.disks.iter().map(|_| expected).collect();
        self.heals_each(&all)
    }

    /// The same, with a mode and a reason for each disk.
    pub(super) fn heals_each(&mut self, expected: &[&str]) -> Result<Value> {
        let report = self.heals_with_warnings(expected)?;
        let warnings = report["warnings"].as_array().map(Vec::len);
        ensure!(warnings == Some(0), "warnings: {report}");
        Ok(report)
    }

    pub(super) fn heals_with_warnings(&mut self, expected: &[&str]) -> Result<Value> {
        self.write()?;
        let report = self.back_up(&[])?;
        ensure!(expected.len() == self.disks.len());
        for (disk, expected) in self.disks.iter().zip(expected) {
            let seen = mode(&report, &disk.target);
            ensure!(
                seen == *expected,
                "{}: {seen} instead of {expected}: {report}",
                disk.target
            );
        }
        self.check_marks()?;
        Ok(report)
    }

    /// Backs up and looks at the disks. Which marks are needed then is known.
    pub(super) fn back_up(&mut self, args: &[&str]) -> Result<Value> {
        let (taken, report) = take(&self.bed, &self.vm, args, &self.disks)?;
        if !args.contains(&"copy") && !args.contains(&"differential") {
            self.moved(&report);
        }
        self.points.push(taken);
        Ok(report)
    }

    /// Takes note of a point that exists, whoever looked at its disks.
    pub(super) fn took(&mut self, taken: Taken, report: &Value) {
        self.moved(report);
        self.points.push(taken);
    }

    /// Takes note of a point that has one of the disks only.
    pub(super) fn took_only(&mut self, target: &str, report: &Value) -> Result<()> {
        let subject = self.disk(target)?;
        let id = point(report);
        let reference = subject.copy(&self.bed, &id[3..])?;
        let taken = Taken {
            point: id,
            references: vec![reference],
        };
        self.took(taken, report);
        self.check_marks()
    }

    /// A disk is no longer part of the VM, so it needs no mark.
    pub(super) fn forgets(&mut self, target: &str) {
        self.needed.remove(target);
    }

    /// The repository was harmed: its points cannot be restored any more.
    pub(super) fn loses_its_points(&mut self) {
        self.points.clear();
    }

    fn moved(&mut self, report: &Value) {
        let id = point(report)[3..].to_lowercase();
        for disk in report["disks"].as_array().into_iter().flatten() {
            let of_this = |subject: &&Subject| disk["disk"] == *subject.target;
            let subject = self.disks.iter().find(of_this);
            let is_in_the_point = !disk["root"].is_null();
            if let Some(subject) = subject.filter(|_| is_in_the_point) {
                if subject.expected.starts_with(NO_MARKS) {
                    self.needed.remove(&subject.target);
                } else {
                    self.needed.insert(subject.target.clone(), id.clone());
                }
            }
        }
    }

    /// Fails unless the marks of this repository are the needed ones: as
    /// records, and as bitmaps on any node of any chain.
    pub(super) fn check_marks(&self) -> Result<()> {
        let needed: BTreeSet<&str> = self.needed.values().map(String::as_str).collect();
        let records = self.vm.checkpoints()?;
        let of_records: BTreeSet<&str> = records.iter().filter_map(|name| id_of(name)).collect();
        ensure!(
            of_records == needed,
            "checkpoints {records:?} instead of those of {needed:?}"
        );
        let bitmaps = self.vm.bitmaps_everywhere()?;
        let mut found = BTreeSet::new();
        for place in &bitmaps {
            if let Some(id) = id_of(&place.bitmap.name) {
                ensure!(needed.contains(id), "nobody needs {place:?}");
                let served = self.served.get(&place.file);
                found.insert((served.unwrap_or(&place.file).clone(), id));
            }
        }
        let due: BTreeSet<(PathBuf, &str)> = self
            .disks
            .iter()
            .filter_map(|disk| Some((top(disk)?, self.needed.get(&disk.target)?.as_str())))
            .collect();
        // A mark is at all disks of its backup as long as one needs it.
        let is_right = if needed.len() > 1 {
            found.is_superset(&due)
        } else {
            found == due
        };
        ensure!(is_right, "bitmaps {found:?} instead of {due:?}");
        self.bed.assert_tidy(&self.vm, records.len())
    }

    /// One more increment is right, and so is every point taken so far.
    pub(super) fn ends_well(mut self) -> Result<()> {
        let usual: Vec<&str> = self.disks.iter().map(|disk| disk.expected).collect();
        self.heals_each(&usual)?;
        self.ends_right()
    }

    /// Every point taken so far is right.
    pub(super) fn ends_right(&self) -> Result<()> {
        for taken in &self.points {
            check(&self.bed, taken)?;
        }
        Ok(())
    }

    /// The next plain backup is refused in these words, and leaves all as it was.
    pub(super) fn is_refused(&mut self, code: i32, words: &[&str]) -> Result<()> {
        self.write()?;
        let marks = self.vm.bitmaps_everywhere()?;
        let (seen, said) = self.bed.fail(&["backup", "web01"])?;
        ensure!(seen == code, "exit code {seen}: {said}");
        for word in words {
            ensure!(said.contains(word), "no {word:?} in: {said}");
        }
        ensure!(said.contains("state: no restore point was added"), "{said}");
        let left = self.vm.bitmaps_everywhere()?;
        let names = |places: &[highwater_testkit::BitmapPlace]| -> Vec<_> {
            let name =
                |it: &highwater_testkit::BitmapPlace| (it.node.clone(), it.bitmap.name.clone());
            places.iter().map(name).collect()
        };
        ensure!(
            names(&left) == names(&marks),
            "{left:?} instead of {marks:?}"
        );
        Ok(())
    }

    /// Returns the name of the one mark of ours.
    pub(super) fn mark(&self) -> Result<String> {
        let mut marks = self.vm.checkpoints()?;
        marks.retain(|name| id_of(name).is_some());
        ensure!(marks.len() == 1, "{marks:?}");
        Ok(marks.remove(0))
    }

    /// Returns QEMU's node for the topmost image of a disk.
    pub(super) fn node(&self, target: &str) -> Result<String> {
        let top = top(self.disk(target)?).context("no image")?;
        let places = self.vm.bitmaps_everywhere()?;
        let place = places.into_iter().find(|place| place.file == top);
        Ok(place.context("a tracked disk has a bitmap")?.node)
    }

    fn disk(&self, target: &str) -> Result<&Subject> {
        let mut disks = self.disks.iter();
        disks
            .find(|disk| disk.target == target)
            .with_context(|| format!("no disk {target}"))
    }

    pub(super) fn qmp(&self, command: &str, arguments: &Value) -> Result<Value> {
        self.vm
            .monitor(&json!({"execute": command, "arguments": arguments}))
    }

    pub(super) fn virsh(&self, args: &[&str]) -> Result<String> {
        self.bed.lab.virsh(args)
    }

    /// Does something while the VM is off.
    pub(super) fn while_off(&self, act: impl FnOnce() -> Result<()>) -> Result<()> {
        self.vm.destroy()?;
        act()?;
        self.vm.start()
    }

    /// Changes words of the definition; the VM is off.
    pub(super) fn redefine(&self, changes: &[(&str, &str)]) -> Result<()> {
        let mut xml = self.virsh(&["dumpxml", "--inactive", "--security-info", "web01"])?;
        for (from, to) in changes {
            ensure!(xml.contains(from), "no {from:?} in {xml}");
            xml = xml.replace(from, to);
        }
        self.bed.lab.define(&xml)
    }

    /// The guest sees another image in this place from now on.
    pub(super) fn reads(&mut self, target: &str, image: &Path, format: &'static str) -> Result<()> {
        let place = self.disks.iter_mut().find(|disk| disk.target == target);
        let Some(disk) = place else {
            bail!("no disk {target}")
        };
        disk.reading = Reading::Image(image.to_owned(), format);
        Ok(())
    }
}

/// Returns the topmost image of a disk that can carry a mark.
fn top(disk: &Subject) -> Option<PathBuf> {
    match &disk.reading {
        Reading::Image(path, "qcow2") if !disk.expected.starts_with(NO_MARKS) => Some(path.clone()),
        _ => None,
    }
}

/// Returns the point in a mark's name, if it is one of ours.
fn id_of(name: &str) -> Option<&str> {
    name.strip_prefix("hw-")?.split_once('-').map(|(_, id)| id)
}

/// Fails unless a list of the report has a line with these words.
pub(super) fn says(report: &Value, list: &str, words: &str) -> Result<()> {
    let lines = report[list].as_array().into_iter().flatten();
    let mut lines = lines.filter_map(Value::as_str);
    ensure!(
        lines.any(|line| line.contains(words)),
        "no {words:?} in {list}: {report}"
    );
    Ok(())
}

pub(super) fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path is text")
}

/// `qemu-img` with a command and arguments, quietly.
pub(super) fn qemu_img(args: &[&str]) -> Result<()> {
    tool("qemu-img").args(args).run().map(drop)
}

/// Lets somebody write to an image that no VM has open.
pub(super) fn write_outside(image: &Path, command: &str) -> Result<()> {
    let io: Tool = tool("qemu-io").args(["-f", "qcow2", "-c", command]);
    io.arg(image).run().map(drop)
}
