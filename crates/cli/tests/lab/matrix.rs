//! What all tests of the matrix share: disks that a guest writes to, and the
//! points at which somebody looked at them.
//!
//! The reference is always read by QEMU's own tools from the image itself, so
//! that a mistake of ours in reading cannot be made twice.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::workload::Workload;
use highwater_testkit::{Vm, tool};
use serde_json::Value;

use crate::support::{Bed, mode, point};

/// How QEMU's tools read a disk's image.
pub(crate) enum Reading {
    /// The file as it stands, its own length included.
    RawFile(PathBuf),
    /// A file or device in a format.
    Image(PathBuf, &'static str),
    /// Arguments of `qemu-img convert` that name source and secrets.
    Options(Vec<String>),
}

impl Reading {
    /// Writes what the guest sees now to `to`.
    fn copy(&self, to: &Path) -> Result<()> {
        let convert = tool("qemu-img").args(["convert", "-U", "-O", "raw"]);
        match self {
            Self::RawFile(path) => {
                tool("cp").arg("--sparse=always").arg(path).arg(to).run()?;
            }
            Self::Image(path, format) => {
                convert.args(["-f", format]).arg(path).arg(to).run()?;
            }
            Self::Options(options) => {
                convert.args(options).arg(to).run()?;
            }
        }
        Ok(())
    }
}

/// One disk under test.
pub(crate) struct Subject {
    pub(crate) target: String,
    pub(crate) reading: Reading,
    pub(crate) writes: Workload,
    /// Mode and reason of every backup but the first.
    pub(crate) expected: &'static str,
}

impl Subject {
    /// A disk of the size that the guest sees.
    pub(crate) fn new(
        target: &str,
        size_bytes: u64,
        reading: Reading,
        expected: &'static str,
    ) -> Result<Self> {
        let seed = target.bytes().fold(0, |seed: u64, byte| {
            seed.wrapping_mul(31).wrapping_add(u64::from(byte))
        });
        Ok(Self {
            target: target.to_owned(),
            reading,
            writes: Workload::new(seed, usize::try_from(size_bytes)?),
            expected,
        })
    }

    /// Lets the guest write, and flushes.
    pub(crate) fn write(&mut self, vm: &Vm, count: usize) -> Result<()> {
        write_to(vm, [self], count)
    }

    /// Keeps what the guest sees now in a file with that name and the disk's.
    pub(crate) fn copy(&self, bed: &Bed, name: &str) -> Result<(String, PathBuf)> {
        let to = bed.lab.path(&format!("{name}-{}.raw", self.target));
        self.reading.copy(&to)?;
        Ok((self.target.clone(), to))
    }
}

/// Lets the guest write to several disks, and flushes them.
pub(crate) fn write_to<'a>(
    vm: &Vm,
    subjects: impl IntoIterator<Item = &'a mut Subject>,
    count: usize,
) -> Result<()> {
    let mut commands = Vec::new();
    for subject in subjects {
        for _ in 0..count {
            let write = subject.writes.step().to_qemu_io();
            commands.push((subject.target.as_str(), write));
        }
        commands.push((subject.target.as_str(), "flush".to_owned()));
    }
    if commands.is_empty() {
        return Ok(());
    }
    vm.write_each(&commands)
}

/// A restore point, and the disks as they were.
pub(crate) struct Taken {
    pub(crate) point: String,
    pub(crate) references: Vec<(String, PathBuf)>,
}

/// Backs up and looks at the disks that are in the point.
pub(crate) fn take(
    bed: &Bed,
    vm: &Vm,
    args: &[&str],
    subjects: &[Subject],
) -> Result<(Taken, Value)> {
    let report = bed.backup(vm, args)?;
    let taken = look(bed, &report, subjects)?;
    Ok((taken, report))
}

/// Looks at the disks that a report says are in the point; nothing may have
/// been written since.
fn look(bed: &Bed, report: &Value, subjects: &[Subject]) -> Result<Taken> {
    let id = point(report);
    let mut references = Vec::new();
    for disk in report["disks"].as_array().context("a list of disks")? {
        let target = disk["disk"].as_str().context("a name")?;
        let subject = subjects.iter().find(|subject| subject.target == target);
        let subject = subject.with_context(|| format!("nobody asked for disk {target}"))?;
        references.push(subject.copy(bed, &id[3..])?);
    }
    Ok(Taken {
        point: id,
        references,
    })
}

/// Restores a point as raw files and compares them byte by byte, lengths included.
pub(crate) fn check(bed: &Bed, taken: &Taken) -> Result<()> {
    let name = format!("out-{}", &taken.point[3..]);
    let dir = bed.restore(&taken.point, &name, &["--format", "raw"])?;
    for (target, reference) in &taken.references {
        same_bytes(reference, &dir.join(format!("{target}.raw")))
            .with_context(|| format!("disk {target} of {}", taken.point))?;
    }
    fs::remove_dir_all(dir)?;
    Ok(())
}

/// Restores a point in each disk's own format and compares.
pub(crate) fn check_own_format(bed: &Bed, taken: &Taken) -> Result<()> {
    let name = format!("own-{}", &taken.point[3..]);
    let dir = bed.restore(&taken.point, &name, &[])?;
    for (target, reference) in &taken.references {
        let qcow2 = dir.join(format!("{target}.qcow2"));
        let restored = if qcow2.exists() {
            let raw = dir.join(format!("{target}.converted"));
            let convert = tool("qemu-img").args(["convert", "-f", "qcow2", "-O", "raw"]);
            convert.arg(&qcow2).arg(&raw).run()?;
            tool("qemu-img").args(["check", "-q"]).arg(&qcow2).run()?;
            raw
        } else {
            dir.join(format!("{target}.raw"))
        };
        same_bytes(reference, &restored)
            .with_context(|| format!("disk {target} of {}", taken.point))?;
    }
    fs::remove_dir_all(dir)?;
    Ok(())
}

fn same_bytes(expected: &Path, restored: &Path) -> Result<()> {
    let (expected, restored) = (fs::read(expected)?, fs::read(restored)?);
    ensure!(
        expected.len() == restored.len(),
        "{} bytes instead of {}",
        restored.len(),
        expected.len()
    );
    let differs = expected.iter().zip(&restored).position(|(a, b)| a != b);
    ensure!(differs.is_none(), "it differs at byte {differs:?}");
    Ok(())
}

/// Several rounds of guest writes and backups; every point must equal the
/// disks as they were when it was taken.
pub(crate) fn rounds_equal_the_disks(
    bed: &Bed,
    vm: &Vm,
    subjects: &mut [Subject],
    rounds: usize,
) -> Result<()> {
    let mut points = Vec::new();
    for round in 0..rounds {
        // Now and then a disk is left alone.
        let written = subjects.iter_mut().enumerate();
        let written = written.filter(|(place, _)| (round + place) % 4 != 3);
        write_to(vm, written.map(|(_, subject)| subject), 10)?;
        let (taken, report) = take(bed, vm, &[], subjects)?;
        ensure!(taken.references.len() == subjects.len(), "{report}");
        for subject in &*subjects {
            let expected = if round == 0 {
                "full: first-backup"
            } else {
                subject.expected
            };
            let seen = mode(&report, &subject.target);
            ensure!(
                seen == expected,
                "{} in round {round}: {seen}",
                subject.target
            );
        }
        let warnings = report["warnings"].as_array().map(Vec::len);
        ensure!(warnings == Some(0), "round {round}: {report}");
        points.push(taken);
    }
    for (number, taken) in points.iter().enumerate() {
        if number % 3 == 1 {
            check_own_format(bed, taken)?;
        } else {
            check(bed, taken)?;
        }
    }
    Ok(())
}
