//! The VM of the demo, its guest, and the copies that restores are measured by.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::guest::{Guest, make_ext4};
use highwater_testkit::{DiskSpec, Lab, Leftovers, MIB, Vm, tool};
use rustix::process::{Pid, Signal, kill_process};

use crate::program::{Program, Running};

pub(crate) const VM: &str = "web01";
pub(crate) const DISKS: [&str; 2] = ["vda", "vdb"];
pub(crate) const FILES_BYTES: u64 = 1024 * MIB;
pub(crate) const BLOCKS_BYTES: u64 = 256 * MIB;

/// Writing or hashing all files takes a guest 3 s, and many times that where an
/// emulated processor shares its core with a build.
pub(crate) const GUEST_PATIENCE: Duration = Duration::from_mins(3);

/// A backup begins within a second; this is for machines that are busy.
const BEGIN_DEADLINE: Duration = Duration::from_secs(30);

/// A VM with two disks in a private libvirtd, and a real guest in it.
pub(crate) struct Workshop {
    pub(crate) lab: Lab,
    pub(crate) program: Program,
    pub(crate) vm: Vm,
    pub(crate) guest: Guest,
}

impl Workshop {
    /// Makes the disks and boots the guest.
    pub(crate) fn open() -> Result<Self> {
        let lab = Lab::start()?;
        let program = Program::find(&lab)?;
        let [raw, qcow2] = ["web01-vda.raw", "web01-vda.qcow2"].map(|name| lab.path(name));
        make_ext4(&raw, FILES_BYTES)?;
        tool("qemu-img")
            .args(["convert", "-f", "raw", "-O", "qcow2"])
            .args([&raw, &qcow2])
            .run()?;
        std::fs::remove_file(&raw)?;
        let vm = lab
            .vm(VM)
            .disk(DiskSpec::existing("vda", &qcow2, "qcow2"))
            .disk(DiskSpec::qcow2("vdb", BLOCKS_BYTES))
            .guest()
            .start()?;
        let guest = vm.guest()?;
        guest.wait_for_agent()?;
        Ok(Self {
            lab,
            program,
            vm,
            guest,
        })
    }

    /// Lets the guest list its files with their hashes.
    pub(crate) fn list_files(&self) -> Result<String> {
        let files = self
            .guest
            .run_within(&list_files("/data"), GUEST_PATIENCE)?;
        // Two empty lists would be equal and prove nothing.
        ensure!(files.lines().count() > 50, "the guest lists: {files}");
        Ok(files)
    }

    /// Fails if backups have left anything but one mark on each disk.
    pub(crate) fn check_tidy(&self) -> Result<()> {
        let left = self.vm.leftovers(&self.program.runtime().join("scratch"))?;
        let clean = Leftovers {
            checkpoints: left.checkpoints.clone(),
            bitmaps: left.bitmaps.clone(),
            ..Leftovers::default()
        };
        let marks = (left.checkpoints.len(), left.bitmaps.len());
        ensure!(left == clean && marks == (1, 2), "left at the VM: {left:?}");
        Ok(())
    }

    /// Starts the VM again after its QEMU has died.
    pub(crate) fn power_on(&mut self) -> Result<()> {
        self.vm.start()?;
        self.guest = self.vm.guest()?;
        self.guest.wait_for_agent()
    }

    /// Brings the disks to rest, so that a copy of them taken now is what any
    /// true copy must be. Mounted read-only, the file system writes nothing,
    /// not even when it is frozen and thawed.
    pub(crate) fn rest(&self) -> Result<()> {
        self.guest.run("sync; mount -o remount,ro /data")?;
        Ok(())
    }

    /// Lets the guest write again.
    pub(crate) fn wake(&self) -> Result<()> {
        self.guest.run("mount -o remount,rw /data")?;
        Ok(())
    }

    /// Copies the disks as QEMU sees them, without a backup job.
    pub(crate) fn copy_disks(&self, name: &str) -> Result<[PathBuf; 2]> {
        let copies = self.places(name);
        for (disk, copy) in DISKS.iter().zip(&copies) {
            self.vm.raw_copy(disk, copy)?;
        }
        Ok(copies)
    }

    /// Copies the disks as they were at a running backup's point in time, with
    /// another program than ours, and says how long ours was held for that.
    ///
    /// The guest goes on writing, so no later moment shows the same disks; and
    /// a backup this small is over before another reader is half through. So
    /// the program is stopped while QEMU goes on serving the point in time.
    pub(crate) fn copy_disks_beside(
        &self,
        backup: &Running,
        name: &str,
    ) -> Result<([PathBuf; 2], Duration)> {
        let deadline = Instant::now() + BEGIN_DEADLINE;
        while !has_socket(self.program.runtime()) {
            ensure!(Instant::now() < deadline, "the backup did not begin");
            std::thread::sleep(Duration::from_millis(1));
        }
        let process = mover_of(backup.process())?;
        kill_process(process, Signal::STOP)?;
        let since = Instant::now();
        let copies = self.read_exports(name, deadline);
        // Also when reading has failed: nothing that we stopped stays so.
        kill_process(process, Signal::CONT)?;
        Ok((copies?, since.elapsed()))
    }

    fn read_exports(&self, name: &str, deadline: Instant) -> Result<[PathBuf; 2]> {
        let xml = loop {
            match self.lab.virsh(&["backup-dumpxml", VM]) {
                Ok(xml) => break xml,
                Err(error) => ensure!(Instant::now() < deadline, "no backup runs: {error:#}"),
            }
        };
        let socket = attribute(&xml, "<server ", "socket").context("the job has no socket")?;
        let copies = self.places(name);
        for (disk, copy) in DISKS.iter().zip(&copies) {
            let export = attribute(&xml, &format!("<disk name='{disk}' "), "exportname")
                .with_context(|| format!("the job has no export of {disk}: {xml}"))?;
            tool("nbdcopy")
                .arg(format!("nbd+unix:///{export}?socket={socket}"))
                .arg(copy)
                .run()?;
        }
        Ok(copies)
    }

    fn places(&self, name: &str) -> [PathBuf; 2] {
        DISKS.map(|disk| self.lab.path(&format!("{name}-{disk}.raw")))
    }
}

/// Finds the process that reads and stores; the one that was started watches it.
fn mover_of(started: Pid) -> Result<Pid> {
    let pid = started.as_raw_nonzero();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    let mover = children.split_whitespace().next();
    let mover = mover.and_then(|mover| Pid::from_raw(mover.parse().ok()?));
    mover.context("the backup has ended")
}

/// The command that makes a guest list its settled files with their hashes.
pub(crate) fn list_files(root: &str) -> String {
    format!("cd {root} && find files -type f | sort | xargs sha256sum")
}

/// Says whether a session's socket is there: the job is begun or about to be.
fn has_socket(runtime: &Path) -> bool {
    let below = |dir: &Path| {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    // Each session has a directory of its own.
    below(runtime)
        .iter()
        .flat_map(|session| below(session))
        .any(|path| path.extension().is_some_and(|end| end == "sock"))
}

/// Returns an attribute of the first element that begins like this.
fn attribute(xml: &str, element: &str, name: &str) -> Option<String> {
    let rest = xml.split_once(element)?.1;
    let tag = rest.split_once('>')?.0;
    let value = tag.split_once(&format!("{name}='"))?.1;
    Some(value.split_once('\'')?.0.to_owned())
}
