//! Disks that grow, come, go, change places, and are very many.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::workload::Random;
use highwater_testkit::{DiskSpec, KIB, MIB, Vm, tool};
use serde_json::Value;

use crate::matrix::{Reading, Subject, Taken, check, take, write_to};
use crate::support::{Bed, disk, mode};

/// Returns the subject for a disk that the testkit made.
fn subject(vm: &Vm, target: &str, size_bytes: u64) -> Result<Subject> {
    let image = vm.image(target);
    let reading = if image.extension().is_some_and(|it| it == "raw") {
        Reading::RawFile(image)
    } else {
        Reading::Image(image, "qcow2")
    };
    Subject::new(target, size_bytes, reading, "incremental")
}

/// A VM whose disks come and go, and what must be true of it.
struct Coming {
    bed: Bed,
    vm: Vm,
    random: Random,
    subjects: Vec<Subject>,
    attached: BTreeSet<String>,
    /// The point whose mark each disk needs, in the letters of a mark's name.
    needed: BTreeMap<String, String>,
    /// Disks whose last backup that moved the mark was in this process of QEMU,
    /// without a moment out of the VM since.
    unbroken: BTreeSet<String>,
    points: Vec<Taken>,
}

const COMING: [&str; 5] = ["sda", "sdb", "sdc", "sdd", "sde"];

impl Coming {
    fn start(seed: u64) -> Result<Self> {
        let bed = Bed::start()?;
        let mut vm = bed.lab.vm("web01");
        for target in COMING {
            vm = vm.disk(if target == "sde" {
                DiskSpec::raw(target, 2 * MIB)
            } else {
                DiskSpec::qcow2(target, 2 * MIB)
            });
        }
        let vm = vm.start()?;
        let subjects = COMING.map(|target| subject(&vm, target, 2 * MIB));
        Ok(Self {
            bed,
            random: Random(seed),
            subjects: subjects.into_iter().collect::<Result<_>>()?,
            attached: COMING.map(str::to_owned).into(),
            needed: BTreeMap::new(),
            unbroken: BTreeSet::new(),
            points: Vec::new(),
            vm,
        })
    }

    /// One run: disks are plugged in and out, written to, and some backed up.
    fn run(&mut self) -> Result<()> {
        for target in &COMING[1..] {
            if self.random.below(4) == 0 {
                self.toggle(target)?;
            }
        }
        let (attached, random) = (&self.attached, &mut self.random);
        let written = self
            .subjects
            .iter_mut()
            .filter(|subject| attached.contains(&subject.target) && random.below(3) > 0);
        write_to(&self.vm, written, 4)?;
        let (args, wanted) = self.draw_order();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let (taken, report) = take(&self.bed, &self.vm, &args, &self.subjects)?;
        let seen: BTreeSet<&str> = taken.references.iter().map(|(it, _)| it.as_str()).collect();
        let wanted: BTreeSet<&str> = wanted.iter().map(String::as_str).collect();
        ensure!(seen == wanted, "{args:?}: {report}");
        self.points.push(taken);
        self.check_modes(&args, &report)?;
        self.check_marks(&args)
    }

    fn toggle(&mut self, target: &str) -> Result<()> {
        if self.attached.remove(target) {
            self.unbroken.remove(target);
            return self.vm.detach(target);
        }
        self.attached.insert(target.to_owned());
        self.vm.attach(target)
    }

    /// Draws the arguments of a backup, and says which disks they mean.
    fn draw_order(&mut self) -> (Vec<String>, Vec<String>) {
        let attached: Vec<String> = self.attached.iter().cloned().collect();
        let some: Vec<String> = attached
            .iter()
            .filter(|_| self.random.below(2) == 0)
            .cloned()
            .collect();
        let kind = self.random.below(3);
        let all = some.is_empty() || some.len() == attached.len();
        let (flag, named, wanted) = match kind {
            0 => ("", Vec::new(), attached),
            _ if all => ("", Vec::new(), attached),
            1 => ("-d", some.clone(), some),
            _ => {
                let rest = attached
                    .into_iter()
                    .filter(|it| !some.contains(it))
                    .collect();
                ("-x", some, rest)
            }
        };
        let mut args: Vec<String> = named
            .iter()
            .flat_map(|target| [flag.to_owned(), target.clone()])
            .collect();
        let level = match self.random.below(8) {
            0 => "copy",
            1 => "full",
            _ => "auto",
        };
        args.extend(["-l".to_owned(), level.to_owned()]);
        (args, wanted)
    }

    fn check_modes(&mut self, args: &[&str], report: &Value) -> Result<()> {
        let leaves_a_mark = !args.contains(&"copy");
        let id = report["point"].as_str().context("a point")?.to_lowercase();
        for disk in report["disks"].as_array().into_iter().flatten() {
            let target = disk["disk"].as_str().context("a name")?;
            if args.contains(&"auto") && self.unbroken.contains(target) {
                ensure!(mode(report, target) == "incremental", "{target}: {report}");
            }
            if leaves_a_mark && target != "sde" {
                self.needed.insert(target.to_owned(), id.clone());
                self.unbroken.insert(target.to_owned());
            }
        }
        Ok(())
    }

    /// There are the marks that attached disks need, and no other.
    fn check_marks(&self, args: &[&str]) -> Result<()> {
        let needed: BTreeSet<&str> = self
            .needed
            .iter()
            .filter(|(target, _)| self.attached.contains(*target))
            .map(|(_, point)| point.as_str())
            .collect();
        let checkpoints = self.vm.checkpoints()?;
        let there: BTreeSet<&str> = checkpoints
            .iter()
            .filter_map(|name| name.rsplit('-').next())
            .collect();
        ensure!(
            there == needed && checkpoints.len() == there.len(),
            "after {args:?}: {there:?} instead of {needed:?}"
        );
        self.bed.assert_tidy(&self.vm, needed.len())
    }
}

fn disks_come_and_go(seed: u64, runs: usize) -> Result<()> {
    let mut coming = Coming::start(seed)?;
    for run in 0..runs {
        coming
            .run()
            .with_context(|| format!("run {run} of seed {seed}"))?;
    }
    for taken in &coming.points {
        check(&coming.bed, taken)?;
    }
    Ok(())
}

#[test]
fn disks_plugged_in_and_out_and_left_out_in_any_order_come_back_from_every_point() -> Result<()> {
    disks_come_and_go(1, 12)
}

#[test]
fn another_order_of_plugging_and_leaving_out_comes_back_too() -> Result<()> {
    disks_come_and_go(2, 8)
}

/// A row of the table; its test is made there.
pub(crate) fn a_disk_taken_out_is_told_of_in_the_next_point_and_in_no_other() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("sda", MIB))
        .disk(DiskSpec::qcow2("sdb", MIB))
        .start()?;
    bed.backup(&vm, &[])?;
    vm.detach("sdb")?;
    let mut told = Vec::new();
    for _ in 0..2 {
        let report = bed.backup(&vm, &[])?;
        let shown = bed.run(&["show", &crate::support::point(&report), "--json"])?;
        let shown: Value = serde_json::from_str(&shown)?;
        told.push(shown["skipped"].clone());
    }
    let gone = serde_json::json!([{"disk": "sdb", "reason": "no longer part of the VM"}]);
    assert_eq!(told, [gone, serde_json::json!([])]);
    bed.assert_tidy(&vm, 1)
}

/// Rounds up to what QEMU calls a size.
fn resize_offline(image: &Path, format: &str, bytes: u64) -> Result<()> {
    let resize = tool("qemu-img").args(["resize", "-q", "-f", format]);
    resize.arg(image).arg(bytes.to_string()).run()?;
    Ok(())
}

/// Grows twice, running and off; writes before, between and after, at the old
/// ends too.
#[test]
fn disks_grown_while_the_vm_runs_and_while_it_is_off_come_back_from_every_point() -> Result<()> {
    const TARGETS: [(&str, u64); 5] = [
        ("vda", 3 * MIB + 512),
        ("vdb", 3 * MIB + 33 * KIB),
        ("vdc", 4 * MIB),
        ("vdd", 2 * MIB + 65_024),
        ("vde", 3 * MIB + 512),
    ];
    let bed = Bed::start()?;
    let base = bed.lab.path("web01-vdd.base");
    fs::write(&base, vec![0x77; 8 << 20])?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", TARGETS[0].1))
        .disk(DiskSpec::qcow2("vdb", TARGETS[1].1).cluster(4 * KIB))
        .disk(DiskSpec::qcow2("vdc", TARGETS[2].1).extended_l2())
        // Shorter than what is below it: growing must not let that show.
        .disk(DiskSpec::qcow2("vdd", TARGETS[3].1).backing(&base, "raw"))
        .disk(DiskSpec::raw("vde", TARGETS[4].1))
        .start()?;
    let subjects = TARGETS.map(|(target, size)| subject(&vm, target, size));
    let mut subjects = subjects.into_iter().collect::<Result<Vec<_>>>()?;
    let mut points = Vec::new();
    for round in 0..6_u64 {
        for (subject, (target, size)) in subjects.iter_mut().zip(TARGETS) {
            let larger = size + round * 300 * KIB;
            match round {
                2 => {
                    let bytes = format!("{larger}b");
                    bed.lab.virsh(&["blockresize", "web01", target, &bytes])?;
                    subject.writes.grow(usize::try_from(larger)?);
                }
                4 => {
                    vm.destroy()
                        .or_else(|error| if vm.is_active()? { Err(error) } else { Ok(()) })?;
                    let format = if target == "vde" { "raw" } else { "qcow2" };
                    resize_offline(&vm.image(target), format, larger)?;
                    subject.writes.grow(usize::try_from(larger)?);
                }
                _ => {}
            }
        }
        if round == 4 {
            vm.start()?;
        }
        // At first nothing is written to what was grown.
        let count = if matches!(round, 2 | 4) { 0 } else { 8 };
        write_to(&vm, &mut subjects, count)?;
        let (taken, report) = take(&bed, &vm, &[], &subjects)?;
        for (target, _) in TARGETS {
            let expected = match (round, target) {
                (0, _) => "full: first-backup",
                (_, "vde") => "rescan: no-marks-on-raw",
                _ => "incremental",
            };
            assert_eq!(mode(&report, target), expected, "round {round}: {report}");
        }
        points.push(taken);
    }
    for taken in &points {
        check(&bed, taken)?;
    }
    bed.assert_tidy(&vm, 1)
}

#[test]
fn thirty_three_disks_on_three_buses_come_back_each_to_its_own_name() -> Result<()> {
    let bed = Bed::start()?;
    let mut targets: Vec<String> = ('a'..='z').map(|letter| format!("sd{letter}")).collect();
    targets.extend(["sdaa", "sdab", "sdac", "vda", "vdb", "hda", "hdb"].map(str::to_owned));
    let sizes: Vec<u64> = (0..)
        .map(|place| MIB + place * 512)
        .take(targets.len())
        .collect();
    let mut vm = bed.lab.vm("web01");
    for (target, size) in targets.iter().zip(&sizes) {
        vm = vm.disk(DiskSpec::qcow2(target, *size));
    }
    let vm = vm.start()?;
    let mut subjects = Vec::new();
    for (target, size) in targets.iter().zip(&sizes) {
        subjects.push(subject(&vm, target, *size)?);
    }
    let mut points = Vec::new();
    for _ in 0..2 {
        write_to(&vm, &mut subjects, 3)?;
        let (taken, _) = take(&bed, &vm, &[], &subjects)?;
        assert_eq!(taken.references.len(), targets.len());
        points.push(taken);
    }
    // A name is a whole name: `sda` is not `sdaa`.
    vm.write("sdaa", "write -P 7 0 64k")?;
    vm.flush("sdaa")?;
    let (one, report) = take(&bed, &vm, &["-d", "sdaa"], &subjects)?;
    assert_eq!(one.references.len(), 1);
    assert_eq!(disk(&report, "sdaa")["dirty_bytes"], 64 << 10);
    points.push(one);
    for taken in &points {
        check(&bed, taken)?;
    }
    bed.assert_tidy(&vm, 2)
}

/// A row of the table; its test is made there.
pub(crate) fn a_disk_made_smaller_is_read_as_a_whole_and_tracked_again() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 3 * MIB))
        .disk(DiskSpec::qcow2("vdb", 3 * MIB))
        .start()?;
    let mut subjects = [
        subject(&vm, "vda", 2 * MIB + 512)?,
        subject(&vm, "vdb", 3 * MIB)?,
    ];
    let mut points = Vec::new();
    for expected in ["full: first-backup", "full: disk-shrank", "incremental"] {
        write_to(&vm, &mut subjects, 6)?;
        if expected == "full: disk-shrank" {
            vm.destroy()?;
            let resize = tool("qemu-img").args(["resize", "-q", "--shrink", "-f", "qcow2"]);
            let size = (2 * MIB + 512).to_string();
            resize.arg(vm.image("vda")).arg(size).run()?;
            vm.start()?;
        }
        let (taken, report) = take(&bed, &vm, &[], &subjects)?;
        assert_eq!(mode(&report, "vda"), expected, "{report}");
        points.push(taken);
    }
    for taken in &points {
        check(&bed, taken)?;
    }
    bed.assert_tidy(&vm, 1)
}
