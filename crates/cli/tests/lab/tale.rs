//! A VM without libvirt, backed up now and then: whatever happens to it, every
//! point is what its disks were.

use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{BareLab, BareVm, Graph, raw_hash};
use serde_json::Value;

use crate::support::{mode, point};

/// A repository, and a directory for VMs without libvirt.
#[derive(Clone)]
pub(crate) struct BareBed {
    pub(crate) lab: BareLab,
}

impl BareBed {
    pub(crate) fn start() -> Result<Self> {
        let lab = BareLab::start()?;
        let bed = Self { lab };
        bed.run("image:/none", &["init", "--encryption", "none"])?;
        Ok(bed)
    }

    pub(crate) fn repo(&self) -> PathBuf {
        self.lab.path("repo")
    }

    pub(crate) fn runtime(&self) -> PathBuf {
        self.lab.path("highwater")
    }

    /// The program, with the VM behind `uri`.
    pub(crate) fn command(&self, uri: &str, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_highwater"));
        command
            .args(args)
            .env("HIGHWATER_REPO", self.repo())
            .env("HIGHWATER_CONFIG", "")
            .env("HIGHWATER_RUNTIME_DIR", self.runtime())
            .env("TZ", "UTC")
            .args(["-c", uri])
            .stdin(Stdio::null());
        command
    }

    pub(crate) fn output(&self, uri: &str, args: &[&str]) -> Result<Output> {
        Ok(self.command(uri, args).output()?)
    }

    /// Runs the program; fails unless it exits 0. Returns stdout.
    pub(crate) fn run(&self, uri: &str, args: &[&str]) -> Result<String> {
        let output = self.output(uri, args)?;
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "highwater {args:?} -c {uri}: {}\n{stdout}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(stdout)
    }

    /// Runs the program, which must end with this code; returns stderr.
    pub(crate) fn fail(&self, uri: &str, args: &[&str], code: i32) -> Result<String> {
        let output = self.output(uri, args)?;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            output.status.code() == Some(code),
            "highwater {args:?} -c {uri}: {}, not {code}: {stderr}",
            output.status
        );
        Ok(stderr)
    }

    /// Backs up and returns the JSON report.
    pub(crate) fn backup(&self, uri: &str, vm: &str, args: &[&str]) -> Result<Value> {
        let text = self.run(uri, &[&["backup", vm, "--json"], args].concat())?;
        serde_json::from_str(&text).with_context(|| text)
    }

    /// Starts a backup in the background that has work for a while.
    pub(crate) fn spawn_slow(&self, uri: &str, args: &[&str]) -> Result<Child> {
        let slow = ["--limit", "4MiB"];
        let mut command = self.command(uri, &[args, &slow].concat());
        let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(command.spawn()?)
    }

    /// Restores a point as raw files to a new directory and returns it.
    pub(crate) fn restore(&self, point: &str, name: &str) -> Result<PathBuf> {
        let dir = self.lab.path(name);
        let to = dir.to_str().context("a path is text")?;
        let args = ["restore", point, "--to", to, "--format", "raw"];
        self.run("image:/none", &args)?;
        Ok(dir)
    }
}

/// Returns the URI by which a VM is backed up as it is now: over its monitor if
/// it runs, else by its images.
pub(crate) fn uri(vm: &BareVm) -> String {
    if vm.is_active() {
        vm.uri()
    } else {
        vm.image_uri()
    }
}

/// A VM and its points.
pub(crate) struct Tale {
    pub(crate) vm: BareVm,
    pub(crate) disks: Vec<&'static str>,
    points: Vec<Known>,
    pub(crate) bed: BareBed,
}

/// What disks hold at one time, as hashes.
pub(crate) struct Moment(Vec<String>);

/// A point and, as hashes, what its disks were.
struct Known {
    point: String,
    disks: Vec<String>,
}

impl Tale {
    pub(crate) fn of(bed: &BareBed, vm: &BareVm, disks: &[&'static str]) -> Self {
        Self {
            vm: vm.clone(),
            disks: disks.to_vec(),
            points: Vec::new(),
            bed: bed.clone(),
        }
    }

    /// Backs up with the driver that fits; each disk must be read as expected
    /// (one word for all, or one for each), and be as it is now in the point.
    pub(crate) fn backs_up(&mut self, expected: &[&str]) -> Result<Value> {
        self.backs_up_with(&uri(&self.vm), expected, &[])
    }

    pub(crate) fn backs_up_with(
        &mut self,
        uri: &str,
        expected: &[&str],
        args: &[&str],
    ) -> Result<Value> {
        let report = self.bed.backup(uri, self.vm.name(), args)?;
        for (number, disk) in self.disks.iter().enumerate() {
            let expected = expected.get(number).or(expected.first());
            let expected = expected.context("an expected mode")?;
            ensure!(mode(&report, disk) == **expected, "{expected}: {report:#}");
        }
        self.keeps(&point(&report))?;
        Ok(report)
    }

    /// Backs up; each disk must be read in a way that is right, and be as it is
    /// now in the point.
    pub(crate) fn backs_up_as(&mut self, is_right: impl Fn(&str) -> bool) -> Result<Value> {
        let report = self.bed.backup(&uri(&self.vm), self.vm.name(), &[])?;
        for disk in &self.disks {
            ensure!(is_right(&mode(&report, disk)), "{report:#}");
        }
        self.keeps(&point(&report))?;
        Ok(report)
    }

    /// Returns how many points there are in the repository.
    pub(crate) fn points(&self) -> Result<usize> {
        let list = ["list", "--json"];
        let listed: Value = serde_json::from_str(&self.bed.run("image:/none", &list)?)?;
        Ok(listed["points"].as_array().map_or(0, Vec::len))
    }

    /// Remembers a point, which must hold the disks as they are.
    pub(crate) fn keeps(&mut self, point: &str) -> Result<()> {
        let moment = self.moment()?;
        self.keeps_as(point, moment)
    }

    fn keeps_as(&mut self, point: &str, Moment(disks): Moment) -> Result<()> {
        let point = point.to_owned();
        self.points.push(Known { point, disks });
        self.is_right(self.points.len() - 1)
    }

    /// Remembers the newest point, which must hold the disks as they are.
    pub(crate) fn keeps_newest(&mut self) -> Result<()> {
        let moment = self.moment()?;
        self.keeps_newest_as(moment)
    }

    /// Remembers the newest point, which must hold the disks as they were.
    pub(crate) fn keeps_newest_as(&mut self, moment: Moment) -> Result<()> {
        let list = ["list", self.vm.name(), "--json"];
        let listed: Value = serde_json::from_str(&self.bed.run("image:/none", &list)?)?;
        let ids = listed["points"].as_array().into_iter().flatten();
        let newest = ids.filter_map(|it| it["point"].as_str()).max();
        let newest = newest.context("a point")?;
        self.keeps_as(&format!("id:{newest}"), moment)
    }

    /// Returns the disks as the guest sees them now.
    pub(crate) fn moment(&self) -> Result<Moment> {
        let copy = self.bed.lab.path("now.raw");
        let hash = |disk: &&str| {
            self.vm.raw_copy(disk, &copy)?;
            raw_hash(&copy)
        };
        let hashes: Result<Vec<_>> = self.disks.iter().map(hash).collect();
        drop(std::fs::remove_file(&copy));
        hashes.map(Moment)
    }

    fn is_right(&self, number: usize) -> Result<()> {
        let known = &self.points[number];
        let dir = self.bed.restore(&known.point, "restored")?;
        for (disk, hash) in self.disks.iter().zip(&known.disks) {
            let restored = raw_hash(&dir.join(format!("{disk}.raw")))?;
            ensure!(
                restored == *hash,
                "{disk} of point {number} ({}) is wrong",
                known.point
            );
        }
        Ok(std::fs::remove_dir_all(dir)?)
    }

    /// Fails unless every point still is what the disks were, and the repository
    /// is whole.
    pub(crate) fn ends_well(&self) -> Result<()> {
        for number in 0..self.points.len() {
            self.is_right(number)?;
        }
        let verify = ["verify", "--read-data"];
        self.bed.run("image:/none", &verify).map(drop)
    }

    /// Returns the names of our marks on a disk.
    pub(crate) fn marks(&self, disk: &str) -> Result<Vec<String>> {
        let bitmaps = self.vm.bitmaps(disk)?.into_iter().map(|it| it.name);
        Ok(bitmaps.filter(|name| name.starts_with("hw-")).collect())
    }

    /// Fails unless QEMU is made of what it was before, each disk has one mark,
    /// and nothing lies in the scratch directory.
    pub(crate) fn is_tidy(&self, before: &Graph) -> Result<()> {
        let now = self.vm.graph()?.without_bitmaps();
        let before = before.clone().without_bitmaps();
        ensure!(now == before, "before: {before:#?}\nnow: {now:#?}");
        self.one_mark_each()?;
        self.no_files()
    }

    /// Fails unless each disk has one mark.
    pub(crate) fn one_mark_each(&self) -> Result<()> {
        for disk in &self.disks {
            let marks = self.marks(disk)?;
            ensure!(marks.len() == 1, "marks on {disk}: {marks:?}");
        }
        Ok(())
    }

    /// Fails if anything of a session lies in the program's directories.
    pub(crate) fn no_files(&self) -> Result<()> {
        for place in ["scratch", "run", "sessions"] {
            let place = self.bed.runtime().join(place);
            let files = std::fs::read_dir(&place).into_iter().flatten();
            let files: Vec<_> = files.flatten().map(|file| file.path()).collect();
            ensure!(files.is_empty(), "left behind: {files:?}");
        }
        Ok(())
    }

    pub(crate) fn write(&self, disk: &str, command: &str) -> Result<()> {
        self.vm.write(disk, command)
    }

    /// Writes to each disk: data, zeroes, a discard. `number` tells rounds apart.
    pub(crate) fn writes(&self, number: u8) -> Result<()> {
        for disk in &self.disks {
            let at = u64::from(number % 13);
            let commands = [
                format!("write -P {} {at}M 192k", number.max(1)),
                format!("write -z {}k 64k", at * 1024 + 512),
                format!("discard {}k 64k", at * 1024 + 640),
                "flush".to_owned(),
            ];
            self.vm.write_all(disk, &commands)?;
        }
        Ok(())
    }
}
