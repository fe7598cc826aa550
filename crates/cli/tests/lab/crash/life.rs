//! A VM with two disks whose bytes are known at any time, and its points.

use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::workload::{GuestWrite, WriteKind};
use highwater_testkit::{DiskSpec, Leftovers, MIB, Vm, Workload, tool};
use serde_json::Value;

use super::blows::{Blow, Waiting, wait_until};
use super::cells::{Cell, Point, expected, takes_the_point_later};
use crate::support::{Bed, mode, point};

const TARGETS: [&str; 2] = ["vda", "vdb"];
const SIZES: [u64; 2] = [16 * MIB, 17 * MIB + 3 * 512];
/// Writes to each disk whenever the guest writes.
const WRITES: usize = 5;

/// What the disks hold at one time.
pub(super) type Moment = Vec<Vec<u8>>;

/// A point and what its disks were, as a hash.
struct Known {
    point: String,
    hash: u64,
}

/// A VM that is backed up, with a blow now and then.
pub(super) struct Life {
    pub(super) bed: Bed,
    pub(super) vm: Vm,
    disks: Vec<Workload>,
    points: Vec<Known>,
    /// Keys that libvirt knows and that are not ours.
    keys: usize,
}

impl Life {
    /// Begins with a point of two disks.
    pub(super) fn start() -> Result<Self> {
        Self::with(Bed::start()?, DiskSpec::qcow2(TARGETS[1], SIZES[1]), 0)
    }

    /// Likewise, and one of the disks is encrypted.
    pub(super) fn start_encrypted() -> Result<Self> {
        let bed = Bed::start()?;
        let disk = encrypted_disk(&bed)?;
        Self::with(bed, disk, 1)
    }

    fn with(bed: Bed, second: DiskSpec, keys: usize) -> Result<Self> {
        let first = DiskSpec::qcow2(TARGETS[0], SIZES[0]);
        let vm = bed.lab.vm("web01").disk(first).disk(second).start()?;
        let disks = (1..)
            .zip(SIZES)
            .map(|(seed, size)| Ok(Workload::new(seed, usize::try_from(size)?)))
            .collect::<Result<_>>()?;
        let points = Vec::new();
        let mut life = Self {
            bed,
            vm,
            disks,
            points,
            keys,
        };
        life.write()?;
        life.heals(|mode| mode.starts_with("full"))?;
        Ok(life)
    }

    /// Lets the guest write to both disks: data, zeroes, discards. All of it
    /// survives the death of QEMU.
    pub(super) fn write(&mut self) -> Result<()> {
        self.write_often(WRITES)
    }

    /// Like [`write`](Self::write), so many writes to each disk.
    pub(super) fn write_often(&mut self, writes: usize) -> Result<()> {
        let mut commands = Vec::new();
        for (target, disk) in TARGETS.iter().zip(&mut self.disks) {
            for _ in 0..writes {
                let write = disk.step();
                commands.push((*target, write.to_qemu_io()));
                // While a job runs QEMU passes discards over.
                if write.kind == WriteKind::Discard {
                    let kind = WriteKind::ZeroesUnmap;
                    commands.push((target, GuestWrite { kind, ..write }.to_qemu_io()));
                }
            }
            commands.push((target, "flush".to_owned()));
        }
        self.vm.write_each(&commands)
    }

    fn moment(&self) -> Moment {
        self.disks
            .iter()
            .map(|disk| disk.model().to_vec())
            .collect()
    }

    /// Lives through one cell of the matrix. Returns what happened.
    pub(super) fn live_through(&mut self, cell: Cell) -> Result<String> {
        let expected = expected(cell);
        self.prepare(cell.step)?;
        self.write()?;
        let mut moment = self.moment();
        let waiting = Waiting::at(&self.bed, &self.vm, cell.step, cell.blow)?;
        self.write()?;
        if takes_the_point_later(cell.step) {
            moment = self.moment();
        }
        let struck = waiting.strike(&self.bed, &self.vm, cell.blow)?;
        let told = format!("{} after {:.1?}", struck.status, struck.took);
        struck
            .ended_as(expected.end)
            .with_context(|| struck.said.clone())?;
        let has_point = self.settle_point(&moment)?;
        ensure!(
            match expected.point {
                Point::Made => has_point,
                Point::None => !has_point,
                Point::Either => true,
            },
            "a point is there: {has_point}; {}: {}",
            struck.status,
            struck.said
        );
        ensure!(
            has_point || struck.status.code() != Some(0),
            "success without a point: {}",
            struck.said
        );
        if expected.is_tidy {
            self.is_tidy_soon(cell.blow)
                .with_context(|| struck.said.clone())?;
        }
        self.write()?;
        let next = self.heals(|mode| expected.next.allows(mode))?;
        self.write()?;
        self.backs_up(|mode| mode == "incremental")?;
        self.bed.run(&["verify", "--read-data"])?;
        Ok(format!("{told}, point {has_point}, next {next}"))
    }

    /// Looks whether there is a point that was not known; if so, it must be what
    /// the disks were.
    fn settle_point(&mut self, moment: &Moment) -> Result<bool> {
        let listed = self.bed.run(&["list", self.vm.name(), "--json"])?;
        let listed: Value = serde_json::from_str(&listed)?;
        let listed = listed["points"].as_array().context("a list of points")?;
        let ids = listed.iter().filter_map(|point| point["point"].as_str());
        let ids = ids.map(|id| format!("id:{id}"));
        let mut new = Vec::new();
        let mut known = 0;
        for id in ids {
            if self.points.iter().any(|known| known.point == id) {
                known += 1;
            } else {
                new.push(id);
            }
        }
        ensure!(known == self.points.len(), "a point is gone: {listed:?}");
        ensure!(new.len() <= 1, "more points than runs: {new:?}");
        let Some(id) = new.pop() else {
            return Ok(false);
        };
        self.keep(id, moment)?;
        Ok(true)
    }

    /// Fails unless a point is what the disks were, and remembers that.
    fn keep(&mut self, point: String, moment: &Moment) -> Result<()> {
        let restored = self.restored(&point)?;
        for ((target, is), due) in TARGETS.iter().zip(&restored).zip(moment) {
            ensure!(is.len() == due.len(), "{target} has {} bytes", is.len());
            let differs = is.iter().zip(due).position(|(is, due)| is != due);
            if let Some(at) = differs {
                let (is, due) = (is[at], due[at]);
                let disks = self.disks_are_right();
                anyhow::bail!(
                    "{point}: {target} differs at {at}: {is:#04x} instead of {due:#04x}; the disks \
                     now: {disks:?}"
                );
            }
        }
        let hash = hash(&restored);
        self.points.push(Known { point, hash });
        Ok(())
    }

    fn restored(&self, point: &str) -> Result<Moment> {
        let args = ["--format", "raw"];
        let dir = self.bed.restore(point, "restored", &args)?;
        let read = |target: &&str| Ok(fs::read(dir.join(format!("{target}.raw")))?);
        let moment = TARGETS.iter().map(read).collect::<Result<_>>()?;
        fs::remove_dir_all(&dir)?;
        Ok(moment)
    }

    /// Waits until whoever has outlived the blow has settled; marks are the next
    /// run's business.
    fn is_tidy_soon(&self, blow: Blow) -> Result<()> {
        let tidy = || self.is_tidy().map(drop);
        match blow {
            // The one that outlives the mover needs a moment.
            Blow::KillMover => {
                wait_until(|| Ok(tidy().is_ok())).or_else(|error| tidy().and(Err(error)))
            }
            Blow::KillGuard
            | Blow::KillAll
            | Blow::KillQemu
            | Blow::RestartLibvirtd
            | Blow::MissLibvirtd
            | Blow::KillLibvirtd
            | Blow::StoreBroken
            | Blow::StoreHiccup
            | Blow::StoreFull
            | Blow::StoreDone
            | Blow::StoreLost => tidy(),
        }
    }

    /// Backs up plainly: it must succeed, and equal the disks. Returns the first
    /// one's mode.
    pub(super) fn backs_up(&mut self, is_right: impl Fn(&str) -> bool) -> Result<String> {
        let report = self.bed.backup(&self.vm, &[])?;
        let modes = TARGETS.map(|target| mode(&report, target));
        ensure!(modes.iter().all(|mode| is_right(mode)), "{report}");
        let moment = self.moment();
        self.keep(point(&report), &moment)?;
        let [first, ..] = modes;
        Ok(first)
    }

    /// [Backs up](Self::backs_up), and leaves one mark and nothing else.
    pub(super) fn heals(&mut self, is_right: impl Fn(&str) -> bool) -> Result<String> {
        let mode = self.backs_up(is_right)?;
        let left = self.is_tidy()?;
        let [mark] = left.checkpoints.as_slice() else {
            anyhow::bail!("not one mark: {:?}", left.checkpoints);
        };
        // Of an encrypted image QEMU tells no name that could be compared.
        let seen = TARGETS.iter().take(TARGETS.len() - self.keys);
        let bitmaps: Vec<_> = seen.map(|target| format!("{target}/{mark}")).collect();
        ensure!(
            left.bitmaps == bitmaps,
            "not its bitmaps: {:?}",
            left.bitmaps
        );
        Ok(mode)
    }

    /// Fails if anything but marks is left, or the guest does not run.
    fn is_tidy(&self) -> Result<Leftovers> {
        let left = self.vm.leftovers(&self.bed.runtime().join("scratch"))?;
        let clean = Leftovers {
            checkpoints: left.checkpoints.clone(),
            bitmaps: left.bitmaps.clone(),
            ..Leftovers::default()
        };
        ensure!(left == clean, "left at the VM: {left:?}");
        let state = self.vm.state()?;
        ensure!(state == "running", "the guest is {state}");
        if self.keys > 0 {
            let keys = self.bed.lab.virsh(&["secret-list"])?;
            let known = keys.lines().filter(|line| !line.is_empty()).count();
            ensure!(known == self.keys, "libvirt keeps keys: {keys}");
        }
        Ok(left)
    }

    pub(super) fn points(&self) -> usize {
        self.points.len()
    }

    /// Fails unless every point is still what the disks were, and the disks are
    /// what the guest has written, by QEMU's own tools.
    pub(super) fn all_points_are_right(&self) -> Result<()> {
        for known in &self.points {
            let is = hash(&self.restored(&known.point)?);
            ensure!(is == known.hash, "{} has changed", known.point);
        }
        self.disks_are_right()
    }

    fn disks_are_right(&self) -> Result<()> {
        for (target, disk) in TARGETS.iter().zip(&self.disks) {
            if self.keys > 0 && *target == TARGETS[1] {
                // QEMU's tools would have to be told the key.
                continue;
            }
            let raw = self.bed.lab.path("now.raw");
            self.vm.raw_copy(target, &raw)?;
            disk.check(&raw)?;
        }
        Ok(())
    }
}

fn encrypted_disk(bed: &Bed) -> Result<DiskSpec> {
    let uuid = "5a2c7d10-3f52-4c0e-8a55-71c8c1f0a9e4";
    let xml = format!("<secret ephemeral='no' private='no'><uuid>{uuid}</uuid></secret>");
    let (file, key) = (bed.lab.path("secret.xml"), bed.lab.path("key"));
    fs::write(&file, xml)?;
    fs::write(&key, "open sesame")?;
    let text = |path: &Path| path.to_str().map(str::to_owned).context("a path is text");
    bed.lab.virsh(&["secret-define", &text(&file)?])?;
    let set = ["secret-set-value", uuid, "--file", &text(&key)?, "--plain"];
    bed.lab.virsh(&set)?;
    let image = bed.lab.path("encrypted.qcow2");
    let options = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10";
    tool("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", options])
        .args(["--object", "secret,id=s0,data=open sesame"])
        .arg(&image)
        .arg(SIZES[1].to_string())
        .run()?;
    let encryption =
        format!("<encryption format='luks'><secret type='passphrase' uuid='{uuid}'/></encryption>");
    Ok(DiskSpec::existing(TARGETS[1], &image, "qcow2").element(&encryption))
}

fn hash(moment: &Moment) -> u64 {
    let mut hasher = DefaultHasher::new();
    moment.hash(&mut hasher);
    hasher.finish()
}
