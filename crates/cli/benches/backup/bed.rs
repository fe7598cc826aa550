//! The VM that is backed up, and each program run on it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use highwater_testkit::{DiskSpec, GIB, KIB, Lab, MIB, Vm, compare_images, tool};
use serde_json::Value;

use crate::measure::{self, Cost};

const VM: &str = "web01";
/// Room for the guest.
const DISK_BYTES: u64 = 8 * GIB;
/// Files on the disk; what fits in memory together with all copies.
const FILES_BYTES: u64 = 2 * GIB;
const FILES_FROM: &str = "/usr";
const WRITE_BYTES: u64 = 16 * KIB;
/// For tools that move gigabytes on a busy machine.
const PATIENCE: Duration = Duration::from_mins(10);

/// A lab with one running VM.
pub(crate) struct Bed {
    lab: Lab,
    vm: Vm,
    files_bytes: u64,
    random: Random,
}

impl Bed {
    /// Makes the disk and starts the VM.
    pub(crate) fn start() -> Result<Self> {
        let lab = Lab::start()?;
        let (image, files_bytes) = make_disk(&lab)?;
        let vm = lab
            .vm(VM)
            .disk(DiskSpec::existing("vda", &image, "qcow2"))
            .start()?;
        Ok(Self {
            lab,
            vm,
            files_bytes,
            random: Random(0x9e37_79b9_7f4a_7c15),
        })
    }

    /// Tells what is on the disk.
    pub(crate) fn disk_text(&self) -> String {
        let (size, files) = (DISK_BYTES / GIB, self.files_bytes / MIB);
        format!("{size} GiB, ext4 with {files} MiB of files of {FILES_FROM}, qcow2 on tmpfs")
    }

    /// Returns the name of the VM.
    pub(crate) fn vm_name(&self) -> &str {
        self.vm.name()
    }

    /// Returns where files may be made.
    pub(crate) fn dir(&self) -> PathBuf {
        self.lab.dir()
    }

    /// Makes an empty directory.
    pub(crate) fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.lab.path(name);
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }

    /// Makes a repository without encryption: the others have none.
    pub(crate) fn repository(&self, name: &str) -> Result<PathBuf> {
        let repo = self.lab.path(name);
        measure::run(
            self.command(&repo).args(["init", "--encryption", "none"]),
            None,
        )?;
        Ok(repo)
    }

    /// Removes files and, so that no run carries another's marks, all checkpoints.
    pub(crate) fn remove(&self, dir: &Path) -> Result<()> {
        fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        for checkpoint in self.vm.checkpoints()? {
            self.lab.virsh(&["checkpoint-delete", VM, &checkpoint])?;
        }
        Ok(())
    }

    fn command(&self, repo: &Path) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_highwater"));
        command
            .env("HIGHWATER_REPO", repo)
            .env("HIGHWATER_RUNTIME_DIR", self.lab.path("highwater"))
            .args(["-c", &self.lab.uri(), "--json"]);
        command
    }

    fn run(&self, command: &mut Command) -> Result<(String, Cost)> {
        measure::run(command, Some(self.qemu()?))
    }

    fn qemu(&self) -> Result<u32> {
        let root = self.lab.dir().to_string_lossy().into_owned();
        measure::outer_pid(&self.vm.qemu_pid()?, &root)
    }

    /// Prepares to run a program that knows libvirt at its usual place only.
    /// Not in the lab's namespace of processes: what the program leaves
    /// behind there would be adopted, and its time counted, by another.
    fn among_qemu_mounts(&self, program: &str) -> Result<Command> {
        let mut command = Command::new("nsenter");
        command
            .args(["-m", "-t", &self.qemu()?.to_string(), "--", program])
            .env("HOME", self.lab.dir());
        Ok(command)
    }

    /// Runs the program under test.
    pub(crate) fn ours(&self, repo: &Path, args: &[&str]) -> Result<Cost> {
        Ok(self.run(self.command(repo).args(args))?.1)
    }

    /// Runs a backup that must be of this mode, and counts by how much the
    /// repository has grown.
    pub(crate) fn ours_growing(&self, repo: &Path, args: &[&str], mode: &str) -> Result<Cost> {
        let before = measure::size_mib(repo)?;
        let (said, cost) = self.run(self.command(repo).args(args))?;
        let report: Value = serde_json::from_str(&said).with_context(|| said.clone())?;
        let found = &report["disks"][0]["mode"];
        ensure!(found == mode, "this was to be {mode}: {said}");
        ensure!(
            report["warnings"] == Value::Array(Vec::new()),
            "it warns: {said}"
        );
        Ok(Cost {
            stored_mib: Some(measure::size_mib(repo)? - before),
            ..cost
        })
    }

    /// Has virtnbdbackup make a full backup.
    pub(crate) fn theirs_backup(&self, set: &Path, args: &[&str]) -> Result<Cost> {
        let mut command = self.among_qemu_mounts("virtnbdbackup")?;
        command
            .args(["-d", VM, "-l", "full", "-n", "-o"])
            .arg(set)
            .arg("-S")
            .arg(self.lab.dir())
            .arg("-f")
            .arg(self.lab.path("theirs.sock"))
            .args(args);
        Ok(self.run(&mut command)?.1)
    }

    /// Has virtnbdrestore restore what virtnbdbackup made.
    pub(crate) fn theirs_restore(&self, set: &Path, out: &Path) -> Result<Cost> {
        let mut command = self.among_qemu_mounts("virtnbdrestore")?;
        command
            .args(["-a", "restore", "-n", "-i"])
            .arg(set)
            .arg("-o")
            .arg(out)
            .arg("-f")
            .arg(self.lab.path("theirs.sock"))
            .arg("-L")
            .arg(self.lab.path("theirs.log"));
        Ok(self.run(&mut command)?.1)
    }

    /// Has nbdcopy copy the export of a backup job to a raw file: what moving
    /// the bytes costs, and no more.
    pub(crate) fn nbdcopy(&self) -> Result<Cost> {
        let dir = self.directory("anchor")?;
        let socket = dir.join("socket");
        let job = dir.join("job.xml");
        let xml = format!(
            "<domainbackup mode='pull'><server transport='unix' socket='{}'/><disks>\
             <disk name='vda' backup='yes' type='file'><scratch file='{}'/></disk>\
             </disks></domainbackup>",
            socket.display(),
            dir.join("scratch").display()
        );
        fs::write(&job, xml)?;
        self.lab
            .virsh(&["backup-begin", VM, &job.to_string_lossy()])?;
        let from = format!("nbd+unix:///vda?socket={}", socket.display());
        let run = self.run(Command::new("nbdcopy").arg(from).arg(dir.join("copy.raw")));
        self.lab.virsh(&["domjobabort", VM])?;
        self.remove(&dir)?;
        Ok(run?.1)
    }

    /// Fails unless the one image in `dir` holds what the VM's disk holds.
    pub(crate) fn compare(&self, dir: &Path) -> Result<()> {
        self.vm.flush("vda")?;
        let mut largest = None;
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            largest = largest.max(Some((path.metadata()?.len(), path)));
        }
        let Some((_, image)) = largest else {
            bail!("nothing was restored")
        };
        compare_images(&image, &self.vm.image("vda"))
    }

    /// Has the guest write blocks of 16 KiB, each of bytes never seen before that
    /// cannot be compressed, at random among its files: around each, files
    /// of the disk share its chunk.
    pub(crate) fn write_randomly(&mut self, writes: usize) -> Result<()> {
        let dir = self.directory("blocks")?;
        let mut commands = Vec::with_capacity(writes);
        for number in 0..writes {
            let file = dir.join(number.to_string());
            let block: Vec<u8> = (0..WRITE_BYTES / 8)
                .flat_map(|_| self.random.next().to_le_bytes())
                .collect();
            fs::write(&file, block)?;
            let at = self.random.next() % (self.files_bytes / WRITE_BYTES) * WRITE_BYTES;
            commands.push(format!("write -s {} {at} {WRITE_BYTES}", file.display()));
        }
        self.vm.write_all("vda", &commands)?;
        self.vm.flush("vda")?;
        Ok(fs::remove_dir_all(dir)?)
    }

    /// Kills QEMU, which keeps its bitmaps in memory, and starts the VM again.
    pub(crate) fn lose_bitmap(&self) -> Result<()> {
        self.vm.kill_qemu()?;
        self.vm.start()
    }
}

/// Makes an image with a file system; returns how much is in its files.
fn make_disk(lab: &Lab) -> Result<(PathBuf, u64)> {
    let (tree, raw, image) = (
        lab.path("tree"),
        lab.path("disk.raw"),
        lab.path("disk.qcow2"),
    );
    fs::create_dir(&tree)?;
    let left = copy_files(Path::new(FILES_FROM), &tree, FILES_BYTES)?;
    tool("mke2fs")
        .args(["-q", "-t", "ext4", "-d"])
        .arg(&tree)
        .arg(&raw)
        .arg(format!("{}k", DISK_BYTES / KIB))
        .deadline(PATIENCE)
        .run()?;
    fs::remove_dir_all(&tree)?;
    tool("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .arg(&raw)
        .arg(&image)
        .deadline(PATIENCE)
        .run()?;
    fs::remove_file(raw)?;
    Ok((image, FILES_BYTES - left))
}

/// Copies files in the order of their names until `room` bytes are used up;
/// returns what is left of them.
fn copy_files(from: &Path, to: &Path, mut room: u64) -> Result<u64> {
    let mut names = Vec::new();
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        names.push((entry.file_name(), entry.file_type()?));
    }
    names.sort_by(|a, b| a.0.cmp(&b.0));
    for (name, kind) in names {
        let (from, to) = (from.join(&name), to.join(&name));
        if kind.is_dir() {
            fs::create_dir(&to)?;
            room = copy_files(&from, &to, room)?;
        } else if kind.is_file() {
            let size = from.metadata()?.len();
            if size <= room {
                fs::copy(&from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
                room -= size;
            }
        }
    }
    Ok(room)
}

/// xorshift64*: the same writes in every run, and no two blocks alike.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}
