//! What other programs lost or broke, played against this one.
//!
//! Each test names the finding it repeats: `virtnbdbackup finding N` (version
//! 2.47) or `qmpbackup VN` (version 0.67, with the wrappers that others have
//! put around such a program). The table in docs/testing.md has them all, and
//! those that stand elsewhere.

mod admin;
mod chains;
mod foreign;
mod tracking;
mod wreckage;
mod zeroes;

pub(crate) use tracking::v1_a_bitmap_re_made_after_a_crash_by_another_tool_is_not_believed;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{DiskSpec, MIB, Vm, tool};
use serde_json::{Value, json};

use crate::support::{Bed, assert_same, mode, point, reference};

const PATIENCE: Duration = Duration::from_secs(20);

/// A VM, and all restore points of it, each with the disks as they were.
struct Story {
    vm: Vm,
    bed: Bed,
    disks: Vec<&'static str>,
    points: Vec<Taken>,
}

struct Taken {
    point: String,
    disks: Vec<(&'static str, PathBuf)>,
}

impl Story {
    /// One disk with something on it, and no restore point.
    fn of_one_disk() -> Result<Self> {
        let bed = Bed::start()?;
        let vm = bed.lab.vm("web01").disk(DiskSpec::qcow2("vda", 64 * MIB));
        let vm = vm.start()?;
        vm.write("vda", "write -P 1 0 4M")?;
        Ok(Self::new(bed, vm, &["vda"]))
    }

    fn new(bed: Bed, vm: Vm, disks: &[&'static str]) -> Self {
        Self {
            vm,
            bed,
            disks: disks.to_vec(),
            points: Vec::new(),
        }
    }

    /// Backs up plainly, which must succeed, and looks at the disks; each must
    /// have been backed up in this mode.
    fn backup(&mut self, expected: &str) -> Result<Value> {
        self.backup_as(&[], expected)
    }

    fn backup_as(&mut self, args: &[&str], expected: &str) -> Result<Value> {
        let report = self.bed.backup(&self.vm, args)?;
        for disk in &self.disks {
            ensure!(mode(&report, disk) == expected, "{disk}: {report}");
        }
        let number = self.points.len();
        let mut disks = Vec::new();
        for disk in &self.disks {
            let raw = reference(&self.bed, &self.vm, disk, &format!("ref-{number}-{disk}"))?;
            disks.push((*disk, raw));
        }
        let point = point(&report);
        self.points.push(Taken { point, disks });
        Ok(report)
    }

    /// Fails unless every point is restored as the disks were.
    fn all_points_are_right(&self) -> Result<()> {
        for (number, taken) in self.points.iter().enumerate() {
            let name = format!("out-{number}");
            let args = ["--format", "raw"];
            let dir = self.bed.restore(&taken.point, &name, &args)?;
            for (disk, raw) in &taken.disks {
                assert_same(raw, &dir.join(format!("{disk}.raw")))
                    .with_context(|| format!("point {number}"))?;
            }
            std::fs::remove_dir_all(dir)?;
        }
        Ok(())
    }

    /// A plain backup is refused as busy, and says these words.
    fn busy(&self, words: &[&str]) -> Result<()> {
        let (code, told) = self.bed.fail(&["backup", self.vm.name()])?;
        ensure!(code == 11, "{code}: {told}");
        for word in words {
            ensure!(told.contains(word), "no `{word}` in: {told}");
        }
        Ok(())
    }
}

/// Returns the checkpoints and named bitmaps that are not ours.
fn foreign_marks(vm: &Vm, disks: &[&str]) -> Result<Vec<String>> {
    let mut found = vm.checkpoints()?;
    for disk in disks {
        let bitmaps = vm.bitmaps(disk)?.into_iter();
        found.extend(bitmaps.map(|bitmap| {
            let words = [
                (bitmap.recording, "recording"),
                (bitmap.inconsistent, "inconsistent"),
                (bitmap.busy, "busy"),
            ];
            let words = words.iter().filter(|(is, _)| *is).map(|(_, word)| *word);
            let words: Vec<&str> = words.collect();
            format!("{disk}/{} {}", bitmap.name, words.join(" "))
        }));
    }
    found.retain(|name| !name.contains("hw-"));
    found.sort();
    Ok(found)
}

/// Returns the node that a disk's guest device reads from and writes to.
fn root_node(vm: &Vm, disk: &str) -> Result<String> {
    let image = vm.image(disk);
    let devices = vm.monitor(&json!({"execute": "query-block"}))?;
    let inserted = devices
        .as_array()
        .into_iter()
        .flatten()
        .map(|device| &device["inserted"])
        .find(|inserted| inserted["file"].as_str() == image.to_str());
    let node = inserted.and_then(|inserted| inserted["node-name"].as_str());
    Ok(node.context("QEMU does not know the disk")?.to_owned())
}

/// Runs a QMP command that must succeed.
fn qmp(vm: &Vm, command: &str, arguments: &Value) -> Result<Value> {
    vm.monitor(&json!({"execute": command, "arguments": arguments}))
        .with_context(|| format!("{command} {arguments}"))
}

/// Adds a bitmap as another tool would.
fn add_bitmap(vm: &Vm, disk: &str, name: &str, persistent: bool) -> Result<()> {
    let node = root_node(vm, disk)?;
    let arguments = json!({"node": node, "name": name, "persistent": persistent});
    qmp(vm, "block-dirty-bitmap-add", &arguments).map(drop)
}

/// Asks until it is so.
fn wait(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !done()? {
        ensure!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn signal(signal: &str, pid: u32) -> Result<()> {
    let kill = tool("kill").args([signal, &pid.to_string()]);
    kill.run().map(drop)
}
