//! What happens to the VM and its disks, and what that does to the model.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::workload::{GuestWrite, Random, WriteKind};
use highwater_testkit::{KIB, tool};

use super::Life;
use super::bytes::Bytes;
use super::draw::{DiskLife, VmLife};
use super::model::{Disk, Kind, Power, SIZE_MAX};

/// Draws one write of a guest that stays on the disk.
fn draw_write(random: &mut Random, disk: &Disk) -> GuestWrite {
    let size = disk.bytes.len();
    let len = match random.below(12) {
        // Guests write sectors; QEMU takes anything.
        0 | 1 => 1 + random.below(5000),
        2..6 => 4 * KIB,
        6..9 => 64 * KIB,
        9 | 10 => 64 * KIB * (2 + random.below(6)),
        _ => 64 * KIB * (8 + random.below(8)),
    };
    let len = len.min(size);
    let byte = u8::try_from(1 + random.below(255)).unwrap_or(1);
    // The ends of a disk are what is easily forgotten.
    let edge = random.below(12);
    if edge < 2 {
        let offset = if edge == 0 { size - len } else { 0 };
        let kind = WriteKind::Data(byte);
        return GuestWrite { kind, offset, len };
    }
    let aligned = random.below((size - len) / len + 1) * len;
    let offset = match random.below(5) {
        // Not aligned to anything.
        0 => random.below(size - len + 1),
        _ => aligned,
    };
    let kind = match random.below(16) {
        0 | 1 => WriteKind::Zeroes,
        2 => WriteKind::ZeroesUnmap,
        3 | 4 if may_discard(disk, offset, len) => WriteKind::Discard,
        5 | 6 => match disk.bytes.uniform(offset, len) {
            Some(byte) => WriteKind::Rewrite(byte),
            None => WriteKind::Data(byte),
        },
        _ => WriteKind::Data(byte),
    };
    GuestWrite { kind, offset, len }
}

/// What is no whole cluster QEMU need not discard.
fn may_discard(disk: &Disk, offset: u64, len: u64) -> bool {
    disk.may_discard() && offset.is_multiple_of(64 * KIB) && len.is_multiple_of(64 * KIB)
}

fn apply(bytes: &mut Bytes, write: GuestWrite) {
    let byte = match write.kind {
        WriteKind::Data(byte) | WriteKind::Rewrite(byte) => byte,
        WriteKind::Zeroes | WriteKind::ZeroesUnmap | WriteKind::Discard => 0,
    };
    bytes.fill(write.offset, write.len, byte);
}

impl Life {
    /// The guest writes to some disks.
    pub(super) fn write(
        &mut self,
        disks: &[usize],
        count: u64,
        flushed: bool,
        random: &mut Random,
    ) -> Result<()> {
        let mut commands = Vec::new();
        let may_discard = self.model.may_discard();
        for number in disks {
            let disk = &mut self.model.disks[*number];
            for _ in 0..count {
                let mut write = draw_write(random, disk);
                if write.kind == WriteKind::Discard && !may_discard {
                    write.kind = WriteKind::ZeroesUnmap;
                }
                apply(&mut disk.bytes, write);
                commands.push((disk.name, write.to_qemu_io()));
            }
            disk.unflushed = !flushed;
            if flushed {
                commands.push((disk.name, "flush".to_owned()));
            }
        }
        self.vm.write_each(&commands)
    }

    pub(super) fn virsh(&self, args: &[&str]) -> Result<String> {
        self.bed.lab.virsh(args)
    }

    /// The VM has been started anew: all its disks are there again.
    pub(super) fn is_on(&mut self) {
        self.model.power = Power::Running;
        self.model.dead_session = false;
        for disk in &mut self.model.disks {
            disk.attached = true;
            disk.unflushed = false;
        }
    }

    pub(super) fn while_off(&mut self, act: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.vm.destroy()?;
        for disk in &mut self.model.disks {
            disk.unflushed = false;
        }
        act(self)?;
        self.vm.start()?;
        self.is_on();
        Ok(())
    }

    /// QEMU is dead. What was not flushed is there or not.
    pub(super) fn qemu_is_dead(&mut self) -> Result<()> {
        let unflushed = (0..self.model.disks.len()).filter(|it| self.model.disks[*it].unflushed);
        for number in unflushed.collect::<Vec<_>>() {
            let read = self.read_image(number)?;
            let disk = &mut self.model.disks[number];
            disk.bytes = Bytes::read(&read)?;
            disk.unflushed = false;
            fs::remove_file(read)?;
        }
        self.model.breaks_all();
        Ok(())
    }

    /// Has QEMU's tools read what a guest sees.
    pub(super) fn read_image(&self, number: usize) -> Result<PathBuf> {
        let disk = &self.model.disks[number];
        let to = self.bed.lab.path(&format!("look-{}.raw", disk.name));
        let convert = tool("qemu-img").args(["convert", "-U", "-O", "raw"]);
        let convert = convert.args(["-f", disk.kind.format()]).arg(disk.top());
        convert.arg(&to).run()?;
        Ok(to)
    }

    /// Everything that was written is the same for QEMU's own tools.
    pub(super) fn look(&mut self) -> Result<()> {
        for number in 0..self.model.disks.len() {
            let disk = &mut self.model.disks[number];
            if disk.attached && self.model.power != Power::Off {
                self.vm.flush(disk.name)?;
                disk.unflushed = false;
            }
            let read = self.read_image(number)?;
            let due = &self.model.disks[number].bytes;
            due.check(&read).context("the model is wrong")?;
            fs::remove_file(read)?;
        }
        Ok(())
    }

    pub(super) fn vm_life(&mut self, what: VmLife) -> Result<()> {
        match what {
            VmLife::Start => {
                self.vm.start()?;
                self.is_on();
            }
            VmLife::Off => {
                self.vm.destroy()?;
                self.is_on();
                self.model.power = Power::Off;
            }
            VmLife::OffAndOn => self.while_off(|_| Ok(()))?,
            VmLife::Kill => {
                self.vm.kill_qemu()?;
                self.qemu_is_dead()?;
                self.vm.start()?;
                self.is_on();
            }
            VmLife::Reset => drop(self.virsh(&["reset", "web01"])?),
            VmLife::Suspend => {
                self.virsh(&["suspend", "web01"])?;
                self.model.power = Power::Paused;
            }
            VmLife::Resume => {
                self.virsh(&["resume", "web01"])?;
                self.model.power = Power::Running;
            }
            VmLife::Save => {
                let power = self.model.power;
                let plugged: Vec<bool> = self.model.disks.iter().map(|it| it.attached).collect();
                self.virsh(&["managedsave", "web01"])?;
                self.vm.start()?;
                self.is_on();
                // It goes on as it was, with the disks it had.
                self.model.power = power;
                for (disk, attached) in self.model.disks.iter_mut().zip(plugged) {
                    disk.attached = attached;
                }
            }
            VmLife::UndefineAndDefine => {
                let xml = self.virsh(&["dumpxml", "--inactive", "--security-info", "web01"])?;
                self.while_off(|it| {
                    it.virsh(&["undefine", "web01", "--checkpoints-metadata"])?;
                    it.bed.lab.define(&xml)
                })?;
                self.model.theirs.clear();
            }
            VmLife::RestartLibvirtd => self.bed.lab.restart_libvirtd()?,
            VmLife::WithoutLibvirtd { repository } => {
                self.bed.lab.kill_libvirtd()?;
                let failed = self.fails_without_libvirtd(repository);
                self.bed.lab.start_libvirtd()?;
                failed?;
            }
            VmLife::InternalSnapshot { repository } => {
                let name = "before-the-upgrade";
                let done = self.virsh(&["snapshot-create-as", "web01", name]);
                // QEMU's snapshot has flushed all disks.
                if self.unless_a_bitmap_forbids_it(done)? {
                    self.back_up(repository, &[], false)?;
                    self.virsh(&["snapshot-delete", "web01", name])?;
                }
            }
        }
        self.is_in_the_expected_state()
    }

    pub(super) fn is_in_the_expected_state(&self) -> Result<()> {
        let (state, due) = (self.vm.state()?, self.model.power.word());
        ensure!(state == due, "the VM is {state}, not {due}");
        Ok(())
    }

    pub(super) fn disk_life(
        &mut self,
        number: usize,
        what: DiskLife,
        random: &mut Random,
    ) -> Result<()> {
        let disk = &self.model.disks[number];
        let (name, size) = (disk.name, disk.bytes.len());
        match what {
            DiskLife::Toggle => self.toggle(number)?,
            DiskLife::Grow => {
                let larger = grown(size, random);
                let done = self.virsh(&["blockresize", "web01", name, &format!("{larger}b")]);
                if self.unless_a_bitmap_forbids_it(done)? {
                    self.model.disks[number].bytes.resize(larger);
                }
            }
            DiskLife::GrowOff => {
                let larger = grown(size, random);
                self.while_off(|it| it.resize_off(number, larger))?;
            }
            DiskLife::ShrinkOff => {
                let smaller = (size / 2 + random.below(size / 2)) / 512 * 512;
                self.while_off(|it| it.resize_off(number, smaller))?;
                let is_smaller = self.model.disks[number].bytes.len() < size;
                if is_smaller {
                    self.model.disks[number].shrunk_for = [0, 1].into();
                    self.model.breaks(number);
                }
            }
            DiskLife::Snapshot => self.snapshot(number)?,
            DiskLife::Commit => self.commit(number)?,
            DiskLife::BlockCopy => self.block_copy(number)?,
            DiskLife::OverlayOff => {
                let (below, top) = (self.model.disks[number].top().clone(), self.image(name));
                self.while_off(|it| it.overlay_off(&below, &top))?;
                self.model.disks[number].chain.push(top);
                self.model.breaks(number);
            }
            DiskLife::CopyOff => {
                let (image, copy) = (self.model.disks[number].top().clone(), self.image(name));
                self.while_off(|_| {
                    copy_file(&image, &copy)?;
                    Ok(fs::rename(&copy, &image)?)
                })?;
            }
            DiskLife::KeepOff => {
                let (image, copy) = (self.model.disks[number].top().clone(), self.image(name));
                self.while_off(|_| copy_file(&image, &copy))?;
                let disk = &mut self.model.disks[number];
                disk.kept = Some((copy, disk.bytes.clone()));
            }
            DiskLife::RollBackOff { moved } => self.roll_back(number, moved)?,
        }
        self.is_in_the_expected_state()
    }

    /// Returns a path for one more image of a disk.
    fn image(&mut self, disk: &str) -> PathBuf {
        self.files += 1;
        self.bed.lab.path(&format!("web01-{disk}.{}", self.files))
    }

    fn toggle(&mut self, number: usize) -> Result<()> {
        let disk = &mut self.model.disks[number];
        disk.attached = !disk.attached;
        // It is closed in order.
        disk.unflushed = false;
        if disk.attached {
            self.vm.attach(disk.name)?;
        } else {
            self.vm.detach(disk.name)?;
        }
        self.model.breaks(number);
        Ok(())
    }

    /// QEMU changes the size of no image with a bitmap that it has not closed.
    fn unless_a_bitmap_forbids_it(&mut self, done: Result<String>) -> Result<bool> {
        match done {
            Ok(_) => Ok(true),
            Err(error) if format!("{error:#}").to_lowercase().contains("bitmap") => {
                self.note(&format!("refused: {error:#}"));
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn resize_off(&mut self, number: usize, bytes: u64) -> Result<()> {
        let disk = &self.model.disks[number];
        let resize = tool("qemu-img").args(["resize", "-q", "--shrink", "-f", disk.kind.format()]);
        let done = resize.arg(disk.top()).arg(bytes.to_string()).run();
        if self.unless_a_bitmap_forbids_it(done)? {
            self.model.disks[number].bytes.resize(bytes);
        }
        Ok(())
    }

    fn snapshot(&mut self, number: usize) -> Result<()> {
        let name = self.model.disks[number].name;
        let overlay = self.image(name);
        let spec = format!("{name},file={}", overlay.display());
        let create = [
            "snapshot-create-as",
            "web01",
            "--disk-only",
            "--no-metadata",
        ];
        let mut args: Vec<String> = create.map(str::to_owned).to_vec();
        args.extend(["--diskspec".to_owned(), spec]);
        for other in self.model.attached() {
            if other != name {
                args.extend(["--diskspec".to_owned(), format!("{other},snapshot=no")]);
            }
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let done = self.virsh(&args);
        if self.unless_a_bitmap_forbids_it(done)? {
            self.model.disks[number].chain.push(overlay);
            self.model.breaks(number);
        }
        Ok(())
    }

    fn commit(&mut self, number: usize) -> Result<()> {
        let name = self.model.disks[number].name;
        let commit = [
            "blockcommit",
            "web01",
            name,
            "--active",
            "--pivot",
            "--wait",
        ];
        let done = self.virsh(&commit);
        if self.unless_a_bitmap_forbids_it(done)? {
            self.model.disks[number].chain.truncate(1);
        } else if let Err(error) = self.virsh(&["blockjob", "web01", name, "--abort"]) {
            self.note(&format!("no commit left: {error:#}"));
        }
        self.model.breaks(number);
        Ok(())
    }

    fn block_copy(&mut self, number: usize) -> Result<()> {
        let name = self.model.disks[number].name;
        let copy = self.image(name);
        let dest = copy.to_str().context("a path is text")?;
        let begin = [
            "blockcopy",
            "web01",
            name,
            "--dest",
            dest,
            "--format",
            "qcow2",
        ];
        let rest = ["--transient-job", "--wait", "--pivot"];
        let done = self.virsh(&[&begin[..], &rest[..]].concat());
        if self.unless_a_bitmap_forbids_it(done)? {
            let disk = &mut self.model.disks[number];
            disk.chain = vec![copy];
            // libvirt makes clusters of the same size, and nothing else alike.
            if !matches!(disk.kind, Kind::Qcow2 { .. }) {
                disk.kind = Kind::Qcow2 { cluster: 64 * KIB };
            }
        }
        self.model.breaks(number);
        Ok(())
    }

    /// The VM is off: from now on it has an overlay over the image.
    fn overlay_off(&self, below: &Path, top: &Path) -> Result<()> {
        let create = tool("qemu-img").args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]);
        create.arg(below).arg(top).run()?;
        let xml = self.virsh(&["dumpxml", "--inactive", "--security-info", "web01"])?;
        let (from, to) = (
            format!("file='{}'", below.display()),
            format!("file='{}'", top.display()),
        );
        ensure!(xml.contains(&from), "no {from} in {xml}");
        self.bed.lab.define(&xml.replacen(&from, &to, 1))
    }

    fn roll_back(&mut self, number: usize, moved: bool) -> Result<()> {
        let image = self.model.disks[number].top().clone();
        let kept = self.model.disks[number].kept.clone();
        let (copy, bytes) = kept.context("an older copy")?;
        self.while_off(|_| {
            if moved {
                fs::rename(&copy, &image)?;
                return Ok(());
            }
            copy_file(&copy, &image)?;
            Ok(fs::remove_file(&copy)?)
        })?;
        let disk = &mut self.model.disks[number];
        if bytes.len() < disk.bytes.len() {
            disk.shrunk_for = [0, 1].into();
        }
        disk.bytes = bytes;
        disk.kept = None;
        self.model.breaks(number);
        Ok(())
    }
}

/// A size that is no multiple of anything but a sector.
fn grown(size: u64, random: &mut Random) -> u64 {
    (size + 512 * (1 + random.below(6000))).min(SIZE_MAX)
}

/// Copies into a file, which stays the same file if it is there.
fn copy_file(from: &Path, to: &Path) -> Result<()> {
    let copy = tool("cp").arg("--sparse=always").arg(from).arg(to);
    copy.run().map(drop)
}
