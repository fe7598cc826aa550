//! A VM with a restore point, to which something bad is about to happen, and
//! what must hold afterwards.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{DiskSpec, Vm, tool};

use crate::support::{Bed, assert_same, mode, point, reference};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

/// Fields in the order in which they have to go.
pub(crate) struct Scene {
    pub(crate) mounts: Vec<Mount>,
    watch: Watch,
    pub(crate) vm: Vm,
    pub(crate) bed: Bed,
    first: (String, PathBuf),
}

impl Scene {
    pub(crate) fn start() -> Result<Self> {
        Self::of(Bed::start()?, Vec::new())
    }

    pub(crate) fn encrypted() -> Result<Self> {
        Self::of(Bed::start_encrypted()?, Vec::new())
    }

    /// One disk with a point of it.
    pub(crate) fn of(bed: Bed, mounts: Vec<Mount>) -> Result<Self> {
        let vm = bed
            .lab
            .vm("web01")
            .disk(DiskSpec::qcow2("vda", 256 * MIB))
            .start()?;
        vm.write_all(
            "vda",
            &["write -P 1 0 3M", "write -P 2 20M 64k"].map(str::to_owned),
        )?;
        let watch = Watch::start(&bed, &vm)?;
        let report = bed.backup(&vm, &[])?;
        let raw = reference(&bed, &vm, "vda", "first.raw")?;
        // What the next backup has to find, whatever happens before it.
        vm.write("vda", "write -P 3 1M 64k")?;
        Ok(Self {
            mounts,
            watch,
            first: (point(&report), raw),
            vm,
            bed,
        })
    }

    /// Runs the program, which must end with `code` and say exactly this.
    pub(crate) fn refused(&self, args: &[&str], code: i32, lines: &[&str]) -> Result<()> {
        self.refused_by(&mut self.bed.command(args), code, lines)
    }

    pub(crate) fn refused_by(
        &self,
        command: &mut Command,
        code: i32,
        lines: &[&str],
    ) -> Result<()> {
        let output = command.output()?;
        self.told(&output, code, lines)
    }

    /// Fails unless the program ended so and said exactly this.
    pub(crate) fn told(&self, output: &Output, code: i32, lines: &[&str]) -> Result<()> {
        let told = message(&self.bed, &output.stderr);
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.code() == Some(code) && told == lines,
            "{}\ntold: {told:#?}\nnot: {lines:#?}\nall of it: {stderr}",
            output.status
        );
        let is_harmful = |letter: char| letter.is_control() && letter != '\n';
        ensure!(!stderr.contains(is_harmful), "{stderr:?}");
        Ok(())
    }

    /// Fails unless the first point is restored as the disk was.
    pub(crate) fn first_is_whole(&self) -> Result<()> {
        let out = self.bed.lab.path("again");
        let args = &["--format", "raw"];
        let dir = self.bed.restore(&self.first.0, "again", args)?;
        assert_same(&self.first.1, &dir.join("vda.raw"))?;
        Ok(fs::remove_dir_all(out)?)
    }

    /// Fails unless nothing is left at the VM but its mark, the guest runs and
    /// was never stopped, and what was there before is whole.
    pub(crate) fn tidy(&self) -> Result<()> {
        self.bed.assert_tidy(&self.vm, 1)?;
        self.first_is_whole()
    }

    /// Fails unless all is [tidy](Self::tidy), and the next backup is an
    /// increment and equals the disk.
    pub(crate) fn unharmed(&self) -> Result<()> {
        self.tidy()?;
        let report = self.bed.backup(&self.vm, &[])?;
        ensure!(mode(&report, "vda") == "incremental", "{report}");
        let raw = reference(&self.bed, &self.vm, "vda", "last.raw")?;
        let dir = self
            .bed
            .restore(&point(&report), "last", &["--format", "raw"])?;
        assert_same(&raw, &dir.join("vda.raw"))?;
        self.tidy()?;
        self.watch.never_stopped(&self.bed, &self.vm)
    }
}

/// The error as it was told, from its first line on. The lab's directory, hashes
/// and ids are put as words.
pub(crate) fn message(bed: &Bed, stderr: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(stderr);
    let text = text.replace(&bed.lab.uri(), "URI");
    let text = text.replace(bed.lab.dir().to_str().unwrap(), "LAB");
    text.lines()
        .skip_while(|line| !line.starts_with("error: "))
        .map(without_ids)
        .collect()
}

fn without_ids(line: &str) -> String {
    let is_id = |word: &str| {
        let all = |good: fn(u8) -> bool| word.bytes().all(good);
        (word.len() >= 16 && all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)))
            || (word.len() == 26 && all(|byte| byte.is_ascii_digit() || byte.is_ascii_uppercase()))
    };
    let cut = |letter: char| !letter.is_ascii_alphanumeric();
    // Packs lie in folders named after their first two digits.
    let mut words = line.split("packs/");
    let first = words.next().unwrap_or_default().to_owned();
    let line = words.fold(first, |line, rest| {
        format!("{line}packs/{}", rest.get(3..).unwrap_or(rest))
    });
    line.split_inclusive(cut)
        .map(|part| {
            let word = part.trim_end_matches(cut);
            if is_id(word) {
                part.replacen(word, "HASH", 1)
            } else {
                part.to_owned()
            }
        })
        .collect()
}

/// Listens to what libvirt says of the VM's life.
struct Watch {
    listener: Child,
    heard: PathBuf,
}

impl Watch {
    /// Begins to listen, and makes sure that it hears a stop.
    fn start(bed: &Bed, vm: &Vm) -> Result<Self> {
        let heard = bed.lab.path("events");
        let listener = Command::new("virsh")
            .args(["-c", &bed.lab.uri(), "event", vm.name(), "--all", "--loop"])
            .stdin(Stdio::null())
            .stdout(fs::File::create(&heard)?)
            .spawn()
            .context("virsh, which comes with libvirt's clients")?;
        let watch = Self { listener, heard };
        watch.catch_up(bed, vm, "begin")?;
        bed.lab.virsh(&["suspend", vm.name()])?;
        bed.lab.virsh(&["resume", vm.name()])?;
        watch.catch_up(bed, vm, "control")?;
        ensure!(watch.stops()? == 1, "{}", fs::read_to_string(&watch.heard)?);
        Ok(watch)
    }

    /// Fails if the guest was stopped since the beginning.
    fn never_stopped(&self, bed: &Bed, vm: &Vm) -> Result<()> {
        self.catch_up(bed, vm, "end")?;
        let heard = fs::read_to_string(&self.heard)?;
        ensure!(self.stops()? == 1, "the guest was stopped: {heard}");
        Ok(())
    }

    /// Events come in order: when a change of the VM's metadata is heard, all
    /// that was before it was heard too.
    fn catch_up(&self, bed: &Bed, vm: &Vm, word: &str) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        for number in 0.. {
            ensure!(Instant::now() < end, "no event was heard");
            let uri = format!("urn:highwater:{word}:{number}");
            let set = ["--key", "test", "--set", "<test/>", "--live"];
            bed.lab
                .virsh(&[&["metadata", vm.name(), uri.as_str()], &set[..]].concat())?;
            let soon = Instant::now() + Duration::from_secs(1);
            while Instant::now() < soon {
                if fs::read_to_string(&self.heard)?.contains(&uri) {
                    return Ok(());
                }
                std::thread::yield_now();
            }
        }
        Ok(())
    }

    fn stops(&self) -> Result<usize> {
        Ok(fs::read_to_string(&self.heard)?
            .matches("Suspended")
            .count())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.listener.kill());
        drop(self.listener.wait());
    }
}

/// A file system mounted for as long as it lives.
pub(crate) struct Mount(PathBuf);

impl Mount {
    /// Makes a file of so many bytes an ext4 file system and mounts it.
    pub(crate) fn ext4(file: &Path, bytes: u64, options: &[&str], at: &Path) -> Result<Self> {
        fs::File::create(file)?.set_len(bytes)?;
        tool("mkfs.ext4")
            .args(["-q", "-F", "-m", "0"])
            .args(options)
            .arg(file)
            .run()?;
        fs::create_dir_all(at)?;
        Self::again(file, at)
    }

    /// Mounts such a file once more.
    pub(crate) fn again(file: &Path, at: &Path) -> Result<Self> {
        tool("mount").args(["-o", "loop"]).arg(file).arg(at).run()?;
        Ok(Self(at.to_path_buf()))
    }

    /// Makes a directory read-only, for root too.
    pub(crate) fn read_only(dir: &Path) -> Result<Self> {
        tool("mount").arg("--bind").arg(dir).arg(dir).run()?;
        let mount = Self(dir.to_path_buf());
        tool("mount")
            .args(["-o", "remount,bind,ro"])
            .arg(dir)
            .run()?;
        Ok(mount)
    }

    /// Mounts memory of so many bytes.
    pub(crate) fn memory(at: &Path, bytes: u64) -> Result<Self> {
        fs::create_dir_all(at)?;
        let size = format!("size={bytes}");
        tool("mount")
            .args(["-t", "tmpfs", "-o", &size, "none"])
            .arg(at)
            .run()?;
        Ok(Self(at.to_path_buf()))
    }

    /// Takes it away though it is in use.
    pub(crate) fn detach(&self) -> Result<()> {
        tool("umount").arg("-l").arg(&self.0).run().map(drop)
    }

    /// Cuts an ext4 file system off its storage: from now on every call fails,
    /// as when a disk is unplugged (`EXT4_IOC_SHUTDOWN`, without flushing).
    pub(crate) fn unplug(&self) -> Result<()> {
        let call = "import fcntl, os, struct, sys\n\
                    fd = os.open(sys.argv[1], os.O_RDONLY)\n\
                    fcntl.ioctl(fd, 0x8004587d, struct.pack('I', 2))";
        tool("python3")
            .args(["-c", call])
            .arg(&self.0)
            .run()
            .map(drop)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        drop(tool("umount").arg("-l").arg(&self.0).run());
    }
}
