//! A VM that is backed up, and each program that does it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use highwater_testkit::{DiskSpec, Lab, Vm, compare_images};
use serde_json::Value;

use crate::disk::Blocks;
use crate::measure::{self, Cost};

/// Commands at once: more would not be done within the patience of the lab.
const WRITES_AT_ONCE: usize = 1000;
const PASSPHRASE: &str = "high water, low water";

/// A running VM.
pub(crate) struct Bed {
    lab: Lab,
    vm: Vm,
}

/// A repository of ours.
pub(crate) struct Repository {
    path: PathBuf,
    password: Option<PathBuf>,
}

impl Repository {
    /// Returns how much lies in it.
    pub(crate) fn size_mib(&self) -> Result<f64> {
        measure::size_mib(&self.path)
    }
}

impl Bed {
    /// Starts a VM.
    pub(crate) fn start(lab: &Lab, name: &str, disk: DiskSpec) -> Result<Self> {
        Ok(Self {
            lab: lab.clone(),
            vm: lab.vm(name).disk(disk).start()?,
        })
    }

    /// Returns the VM.
    pub(crate) const fn vm(&self) -> &Vm {
        &self.vm
    }

    /// Returns its lab.
    pub(crate) const fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Makes a repository without encryption: where the others have none.
    pub(crate) fn repository(&self, path: PathBuf) -> Result<Repository> {
        self.init(path, "none", None)
    }

    /// Makes a repository with a passphrase.
    pub(crate) fn encrypted_repository(&self, path: PathBuf) -> Result<Repository> {
        let file = password_file(&self.lab)?;
        self.init(path, "passphrase", Some(file))
    }

    fn init(
        &self,
        path: PathBuf,
        encryption: &str,
        password: Option<PathBuf>,
    ) -> Result<Repository> {
        let repo = Repository { path, password };
        measure::run(
            self.command(&repo)
                .args(["init", "--encryption", encryption]),
            None,
        )?;
        Ok(repo)
    }

    fn command(&self, repo: &Repository) -> Command {
        self.command_under(repo, &[])
    }

    /// Prepares to run the program under test below another program.
    fn command_under(&self, repo: &Repository, above: &[String]) -> Command {
        let ours = env!("CARGO_BIN_EXE_highwater");
        let mut command = match above {
            [] => Command::new(ours),
            [program, args @ ..] => {
                let mut command = Command::new(program);
                command.args(args).arg(ours);
                command
            }
        };
        command
            .env("HIGHWATER_REPO", &repo.path)
            .env("HIGHWATER_RUNTIME_DIR", self.runtime_dir())
            .args(["-c", &self.lab.uri(), "--json"]);
        if let Some(file) = &repo.password {
            command.env("HIGHWATER_PASSWORD_FILE", file);
        }
        command
    }

    /// Returns where sessions have their sockets.
    pub(crate) fn runtime_dir(&self) -> PathBuf {
        self.lab.path("highwater")
    }

    /// Runs a program, and counts what QEMU does for it.
    pub(crate) fn run(&self, command: &mut Command) -> Result<(String, Cost)> {
        measure::run(command, Some(self.qemu()?))
    }

    fn qemu(&self) -> Result<u32> {
        let root = self.lab.dir().to_string_lossy().into_owned();
        measure::outer_pid(&self.vm.qemu_pid()?, &root)
    }

    /// Backs up; the backup must be of this mode. What counts as stored is by
    /// how much the repository has grown.
    pub(crate) fn backup(&self, repo: &Repository, mode: &str, args: &[&str]) -> Result<Cost> {
        self.backup_under(repo, mode, args, &[])
    }

    /// As [`Bed::backup`], with the program running below another one.
    pub(crate) fn backup_under(
        &self,
        repo: &Repository,
        mode: &str,
        args: &[&str],
        above: &[String],
    ) -> Result<Cost> {
        let before = repo.size_mib()?;
        let mut command = self.command_under(repo, above);
        let (said, cost) = self.run(command.args(["backup", self.vm.name()]).args(args))?;
        let report: Value = serde_json::from_str(&said).with_context(|| said.clone())?;
        let found = &report["disks"][0]["mode"];
        ensure!(found == mode, "this was to be {mode}: {said}");
        ensure!(
            report["warnings"] == Value::Array(Vec::new()),
            "it warns: {said}"
        );
        Ok(Cost {
            stored_mib: Some(repo.size_mib()? - before),
            ..cost
        })
    }

    /// Backs up everything into a repository made for it, which is removed.
    pub(crate) fn full(&self, path: PathBuf, compression: &str) -> Result<Cost> {
        let repo = self.repository(path)?;
        self.full_into(&repo, compression)
    }

    /// Backs up everything into an empty repository, which is removed.
    pub(crate) fn full_into(&self, repo: &Repository, compression: &str) -> Result<Cost> {
        let args = ["--level", "full", "--compression", compression];
        let cost = self.backup(repo, "full", &args)?.with_stored(&repo.path)?;
        self.remove(&repo.path)?;
        Ok(cost)
    }

    /// Restores the latest point to a new directory or file.
    pub(crate) fn restore(&self, repo: &Repository, to: &Path, args: &[&str]) -> Result<Cost> {
        let mut command = self.command(repo);
        command
            .args(["restore", self.vm.name(), "--to"])
            .arg(to)
            .args(args);
        Ok(measure::run(&mut command, None)?.1)
    }

    /// Removes files and, so that no run carries another's marks, all checkpoints.
    pub(crate) fn remove(&self, path: &Path) -> Result<()> {
        remove(path)?;
        let name = self.vm.name();
        for checkpoint in self.vm.checkpoints()? {
            let args = ["checkpoint-delete", name, &checkpoint];
            if self.lab.virsh(&args).is_err() {
                // Where the bitmap was lost, libvirt's record of it is left.
                self.lab.virsh(&[&args[..], &["--metadata"]].concat())?;
            }
        }
        Ok(())
    }

    /// Removes a repository, as [`Bed::remove`] does.
    pub(crate) fn remove_repository(&self, repo: &Repository) -> Result<()> {
        self.remove(&repo.path)
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

    /// Has virtnbdbackup make a backup.
    pub(crate) fn theirs_backup(&self, set: &Path, level: &str, args: &[&str]) -> Result<Cost> {
        fs::create_dir_all(set)?;
        let before = measure::size_mib(set)?;
        let mut command = self.among_qemu_mounts("virtnbdbackup")?;
        command
            .args(["-d", self.vm.name(), "-l", level, "-n", "-o"])
            .arg(set)
            .arg("-S")
            .arg(self.lab.dir())
            .arg("-f")
            .arg(self.lab.path("theirs.sock"))
            .args(args);
        let cost = self.run(&mut command)?.1;
        Ok(Cost {
            stored_mib: Some(measure::size_mib(set)? - before),
            ..cost
        })
    }

    /// Has virtnbdbackup back up everything; removes what it made.
    pub(crate) fn theirs_full(&self, args: &[&str]) -> Result<Cost> {
        let set = self.lab.path("theirs");
        let cost = self.theirs_backup(&set, "full", args)?;
        self.remove(&set)?;
        Ok(cost)
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

    /// Begins a backup job of libvirt's, runs a program on the URI of its
    /// export, and ends the job: what moving the bytes costs, and no more.
    pub(crate) fn on_export(&self, program: impl FnOnce(&str) -> Command) -> Result<Cost> {
        let dir = self.lab.path("export");
        fs::create_dir(&dir)?;
        let (socket, job) = (dir.join("socket"), dir.join("job.xml"));
        let xml = format!(
            "<domainbackup mode='pull'><server transport='unix' socket='{}'/><disks>\
             <disk name='vda' backup='yes' type='file'><scratch file='{}'/></disk>\
             </disks></domainbackup>",
            socket.display(),
            dir.join("scratch").display()
        );
        fs::write(&job, xml)?;
        let name = self.vm.name();
        self.lab
            .virsh(&["backup-begin", name, &job.to_string_lossy()])?;
        let uri = format!("nbd+unix:///vda?socket={}", socket.display());
        let run = self.run(&mut program(&uri));
        self.lab.virsh(&["domjobabort", name])?;
        remove(&dir)?;
        Ok(run?.1)
    }

    /// Fails unless the one image in `dir` holds what the VM's disk holds.
    pub(crate) fn compare(&self, dir: &Path) -> Result<()> {
        self.vm.flush("vda")?;
        compare_images(&largest_in(dir)?, &self.vm.image("vda"))
    }

    /// Has the guest write.
    pub(crate) fn write(&self, blocks: &Blocks) -> Result<()> {
        for some in blocks.commands().chunks(WRITES_AT_ONCE) {
            self.vm.write_all("vda", some)?;
        }
        self.vm.flush("vda")
    }

    /// Kills QEMU, which keeps its bitmaps in memory, and starts the VM again.
    pub(crate) fn lose_bitmap(&self) -> Result<()> {
        self.vm.kill_qemu()?;
        self.vm.start()
    }
}

/// Returns a file with a passphrase.
pub(crate) fn password_file(lab: &Lab) -> Result<PathBuf> {
    let file = lab.path("passphrase");
    fs::write(&file, PASSPHRASE)?;
    Ok(file)
}

/// Removes a file or a directory with all in it.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let removed = if path.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    removed.with_context(|| format!("cannot remove {}", path.display()))
}

/// Finds the image among what was restored.
pub(crate) fn largest_in(dir: &Path) -> Result<PathBuf> {
    let mut largest = None;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        largest = largest.max(Some((path.metadata()?.len(), path)));
    }
    let Some((_, image)) = largest else {
        bail!("nothing was restored")
    };
    Ok(image)
}
