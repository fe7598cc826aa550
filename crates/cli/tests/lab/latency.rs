//! How long the writes of a guest take while its backup is in trouble.
//!
//! The guest measures them itself. It runs under emulation on a machine that
//! does other things as well, so what counts is that no write waits for a
//! repository; the numbers are printed, and some are in docs/limits.md.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{DiskSpec, Guest, Latency, LatencyWriter, MIB, Vm, guest};

use crate::processes::{mover_of, signal};
use crate::scene::Mount;
use crate::slow_disk::SlowDisk;
use crate::support::{Bed, assert_same, mode, point, reference, wait_for_job, write_noise};

/// Longest time a write of the guest may take, whatever the repository does: a
/// tenth of what a wait for the repository would take, and far more than a busy
/// machine needs.
const LONGEST_MAX: Duration = Duration::from_millis(2500);
/// How long the guest's writes are looked at.
const WHILE: Duration = Duration::from_secs(4);
const PATIENCE: Duration = Duration::from_mins(1);

const DISK_BYTES: u64 = 192 * MIB;

struct Writing {
    vm: Vm,
    inside: Guest,
    runs: u32,
}

impl Writing {
    /// A guest with a disk full of what does not compress, and a point of it.
    fn start(bed: &Bed) -> Result<Self> {
        let files = bed.lab.path("files.raw");
        guest::make_ext4(&files, 16 * MIB)?;
        let vm = bed
            .lab
            .vm("web01")
            .disk(DiskSpec::existing("vda", &files, "raw"))
            .disk(DiskSpec::qcow2("vdb", DISK_BYTES))
            .guest()
            .start()?;
        let inside = vm.guest()?;
        inside.wait_for_agent()?;
        write_noise(bed, &vm, "vdb", 0, 64)?;
        bed.backup(&vm, &[])?;
        write_noise(bed, &vm, "vdb", 64, 96)?;
        Ok(Self {
            vm,
            inside,
            runs: 0,
        })
    }

    fn begin(&mut self) -> Result<LatencyWriter> {
        self.runs += 1;
        LatencyWriter::start(&self.inside, self.runs, "/dev/vdb", DISK_BYTES)
    }

    /// Measures while nothing else is done.
    fn quiet(&mut self) -> Result<Latency> {
        let writer = self.begin()?;
        std::thread::sleep(WHILE);
        writer.stop(&self.inside)
    }

    /// Measures during something; prints both and fails if a write took too long.
    fn measure<T>(&mut self, what: &str, work: impl FnOnce(&Vm) -> Result<T>) -> Result<T> {
        let before = self.quiet()?;
        let writer = self.begin()?;
        let done = work(&self.vm)?;
        let during = writer.stop(&self.inside)?;
        let times = during.longest.as_secs_f64() / before.longest.as_secs_f64();
        eprintln!("guest writes, quiet: {before}; {what}: {during}; longest {times:.1} times");
        ensure!(during.writes > 100, "the guest hardly wrote: {during}");
        ensure!(
            during.longest < LONGEST_MAX,
            "a guest write waited: {during}, before {before}"
        );
        Ok(done)
    }

    /// Fails unless the next backup is an increment and equals the disk.
    fn unharmed(&self, bed: &Bed) -> Result<()> {
        bed.assert_tidy(&self.vm, 1)?;
        let report = bed.backup(&self.vm, &[])?;
        ensure!(mode(&report, "vdb") == "incremental", "{report}");
        let raw = reference(bed, &self.vm, "vdb", "last.raw")?;
        let dir = bed.restore(&point(&report), "last", &["--format", "raw"])?;
        assert_same(&raw, &dir.join("vdb.raw"))
    }
}

fn spawn(bed: &Bed) -> Result<Child> {
    bed.spawn(&["backup", "web01", "--compression", "none"])
}

fn wait_for_packs(bed: &Bed, more_than: usize) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while packs(bed)? <= more_than {
        ensure!(Instant::now() < end, "no pack came");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn packs(bed: &Bed) -> Result<usize> {
    let folders = fs::read_dir(bed.repo().join("packs"))?;
    folders
        .map(|folder| Ok(fs::read_dir(folder?.path())?.count()))
        .sum()
}

fn ended(child: Child) -> Result<Output> {
    let output = child.wait_with_output()?;
    eprintln!("{}", String::from_utf8_lossy(&output.stderr));
    Ok(output)
}

#[test]
fn a_guest_write_is_hardly_slower_while_a_backup_runs() -> Result<()> {
    let bed = Bed::start()?;
    let mut writing = Writing::start(&bed)?;
    let output = writing.measure("a backup", |_| {
        let some_time = ["--workers", "1", "--compression", "zstd:9"];
        ended(bed.spawn(&[&["backup", "web01"], &some_time[..]].concat())?)
    })?;
    ensure!(output.status.success());
    writing.unharmed(&bed)
}

#[test]
fn a_guest_write_does_not_wait_for_a_slow_repository() -> Result<()> {
    let bed = Bed::without_repository()?;
    let _disk = SlowDisk::mount(&bed, 512 * MIB, Duration::from_millis(20))?;
    bed.run(&["init", "--encryption", "none"])?;
    let mut writing = Writing::start(&bed)?;
    let output = writing.measure("a slow repository", |_| ended(spawn(&bed)?))?;
    ensure!(output.status.success());
    writing.unharmed(&bed)
}

#[test]
fn a_guest_write_does_not_wait_for_a_full_repository() -> Result<()> {
    let bed = Bed::without_repository()?;
    let image = bed.lab.path("small.img");
    let _mount = Mount::ext4(&image, 160 * MIB, &[], &bed.repo())?;
    bed.run(&["init", "--encryption", "none"])?;
    let mut writing = Writing::start(&bed)?;
    let output = writing.measure("a full repository", |_| ended(spawn(&bed)?))?;
    ensure!(output.status.code() == Some(1));
    ensure!(String::from_utf8_lossy(&output.stderr).contains("No space left"));
    bed.assert_tidy(&writing.vm, 1)
}

#[test]
fn a_guest_write_does_not_wait_for_a_hung_repository() -> Result<()> {
    let bed = Bed::without_repository()?;
    let disk = SlowDisk::mount(&bed, 512 * MIB, Duration::from_millis(2))?;
    bed.run(&["init", "--encryption", "none"])?;
    let mut writing = Writing::start(&bed)?;
    let before = packs(&bed)?;
    let output = writing.measure("a hung repository", |vm| {
        let child = spawn(&bed)?;
        wait_for_job(vm)?;
        wait_for_packs(&bed, before)?;
        disk.hang()?;
        let since = Instant::now();
        let freed = wait_for_no_job(vm);
        eprintln!(
            "the VM was free {:.1} s after the repository hung",
            since.elapsed().as_secs_f64()
        );
        let status = freed.and_then(|()| ended(child));
        disk.wake()?;
        status
    })?;
    ensure!(output.status.code() == Some(1), "{}", output.status);
    writing.unharmed(&bed)
}

fn wait_for_no_job(vm: &Vm) -> Result<()> {
    // A disk that hangs is given up after a minute and a half.
    let end = Instant::now() + 3 * PATIENCE;
    while vm.job_running().unwrap_or(true) {
        ensure!(Instant::now() < end, "the job was not ended");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[test]
fn a_guest_write_does_not_wait_for_a_mover_that_is_stopped() -> Result<()> {
    let bed = Bed::start()?;
    let mut writing = Writing::start(&bed)?;
    writing.measure("a stopped mover", |vm| {
        let child = bed.spawn_slow(&["backup", "web01"])?;
        wait_for_job(vm)?;
        let mover = mover_of(&child)?;
        signal("-STOP", mover)?;
        let since = Instant::now();
        let freed = wait_for_no_job(vm);
        let took = since.elapsed();
        eprintln!(
            "the VM was free {:.1} s after its mover was stopped",
            took.as_secs_f64()
        );
        signal("-CONT", mover)?;
        let output = ended(child)?;
        ensure!(output.status.code() == Some(1), "{}", output.status);
        freed?;
        ensure!(took < Duration::from_secs(10), "{took:?}");
        Ok(())
    })?;
    writing.unharmed(&bed)
}

/// Room for scratch files that a busy guest fills in a second.
///
/// Mounted before libvirtd starts, which would not see it otherwise.
struct SmallScratch {
    dir: tempfile::TempDir,
    _memory: Mount,
}

impl SmallScratch {
    fn mount(bytes: u64) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("hws-")
            .tempdir_in("/dev/shm")?;
        let memory = Mount::memory(dir.path(), bytes)?;
        Ok(Self {
            dir,
            _memory: memory,
        })
    }

    fn backup(&self, bed: &Bed) -> Result<Child> {
        let dir = self.dir.path().to_str().context("a path is text")?;
        bed.spawn_slow(&["backup", "web01", "--scratch-dir", dir])
    }

    /// Fails unless the backup ended for want of room, and well.
    fn was_too_small(&self, bed: &Bed, writing: &Writing, output: &Output) -> Result<()> {
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1), "{}", output.status);
        for said in [
            "hint: choose a scratch directory with more room (`--scratch-dir`), then run `highwater backup web01` again",
            "state: no restore point was added",
        ] {
            ensure!(stderr.contains(said), "no `{said}`: {stderr}");
        }
        let ballast = self.dir.path().join("ballast");
        drop(fs::remove_file(ballast));
        let left = fs::read_dir(self.dir.path())?.count();
        ensure!(left == 0, "{left} directories left");
        writing.unharmed(bed)
    }
}

#[test]
fn a_scratch_file_that_a_busy_guest_fills_costs_one_backup_and_no_write() -> Result<()> {
    let scratch = SmallScratch::mount(24 * MIB)?;
    let bed = Bed::start()?;
    let mut writing = Writing::start(&bed)?;
    let output = writing.measure("a scratch file that fills up", |_| {
        ended(scratch.backup(&bed)?)
    })?;
    scratch.was_too_small(&bed, &writing, &output)
}

/// Writes down when the guest is stopped and runs again: its own clock stands
/// still meanwhile.
struct Stops {
    listener: Child,
    heard: PathBuf,
}

impl Stops {
    fn watch(bed: &Bed) -> Result<Self> {
        let heard = bed.lab.path("stops");
        let listener = Command::new("virsh")
            .args(["-c", &bed.lab.uri(), "event", "web01"])
            .args(["--event", "lifecycle", "--loop", "--timestamp"])
            .stdin(Stdio::null())
            .stdout(fs::File::create(&heard)?)
            .spawn()
            .context("virsh, which comes with libvirt's clients")?;
        let stops = Self { listener, heard };
        // It hears nothing of what was before it listened.
        while stops.lines()?.len() < 2 {
            bed.lab.virsh(&["suspend", "web01"])?;
            bed.lab.virsh(&["resume", "web01"])?;
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(stops)
    }

    fn lines(&self) -> Result<Vec<String>> {
        let heard = fs::read_to_string(&self.heard)?;
        let of_events = heard
            .lines()
            .filter(|line| line.contains("event 'lifecycle'"));
        Ok(of_events.map(str::to_owned).collect())
    }

    /// Returns how often an I/O error stopped the guest, and for how long at most.
    fn on_error(&self) -> Result<(usize, Duration)> {
        let lines = self.lines()?;
        let mut longest = Duration::ZERO;
        let mut times = 0;
        for (at, line) in lines.iter().enumerate() {
            if line.contains("I/O") {
                times += 1;
                let next = lines.get(at + 1).context("it did not run again")?;
                ensure!(next.contains("Resumed"), "{lines:?}");
                longest = longest.max(time_of(next)?.saturating_sub(time_of(line)?));
            }
        }
        Ok((times, longest))
    }
}

impl Drop for Stops {
    fn drop(&mut self) {
        drop(self.listener.kill());
        drop(self.listener.wait());
    }
}

/// Reads `2026-11-21 21:03:21.123+0000: event ...`; midnight is no trouble but once.
fn time_of(line: &str) -> Result<Duration> {
    let clock = line.split([' ', '+']).nth(1).context("a time")?;
    let parts = clock.split(':').map(str::parse::<f64>);
    let parts: Vec<f64> = parts
        .collect::<Result<_, _>>()
        .with_context(|| line.to_owned())?;
    let seconds = parts.iter().fold(0.0, |sum, part| sum * 60.0 + part);
    Ok(Duration::from_secs_f64(seconds))
}

/// QEMU stops the guest, and whoever would have to say so to the guard does not
/// run.
#[test]
fn a_full_scratch_file_stops_the_guest_for_a_moment_though_the_mover_does_not_run() -> Result<()> {
    let scratch = SmallScratch::mount(160 * MIB)?;
    let bed = Bed::start()?;
    let mut writing = Writing::start(&bed)?;
    let output = writing.measure("a full scratch file, mover stopped", |vm| {
        let stops = Stops::watch(&bed)?;
        let child = scratch.backup(&bed)?;
        wait_for_job(vm)?;
        let mover = mover_of(&child)?;
        signal("-STOP", mover)?;
        let ballast = fs::File::create(scratch.dir.path().join("ballast"))?;
        let room = rustix::fs::statvfs(scratch.dir.path())?;
        let whole = rustix::fs::FallocateFlags::empty();
        // All that is left; the guest may have taken some of it meanwhile.
        let all = (0..64).map(|less| (room.f_bavail - less * 16) * room.f_frsize);
        let filled = all
            .into_iter()
            .any(|len| rustix::fs::fallocate(&ballast, whole, 0, len).is_ok());
        let freed = wait_for_no_job(vm);
        signal("-CONT", mover)?;
        let output = ended(child)?;
        freed?;
        ensure!(filled, "there was no room to fill");
        let (times, longest) = stops.on_error()?;
        eprintln!("stopped by an I/O error {times} times, for {longest:?} at most");
        ensure!(longest < LONGEST_MAX, "stopped for {longest:?}");
        Ok(output)
    })?;
    scratch.was_too_small(&bed, &writing, &output)
}

/// What the repository takes is missing for the scratch files, which a guest
/// waits for.
#[test]
fn a_repository_beside_the_scratch_files_stops_before_the_guest_has_to() -> Result<()> {
    let place = tempfile::Builder::new()
        .prefix("hws-")
        .tempdir_in("/dev/shm")?;
    let memory = Mount::memory(place.path(), 112 * MIB)?;
    let bed = Bed::without_repository()?;
    let repo = place.path().join("repo");
    fs::create_dir(&repo)?;
    std::os::unix::fs::symlink(repo, bed.repo())?;
    bed.run(&["init", "--encryption", "none"])?;
    let scratch = place.path().join("scratch");
    let dir = scratch.to_str().context("a path is text")?;
    let mut writing = Writing::start(&bed)?;
    let (output, stopped) = writing.measure("a repository beside the scratch files", |_| {
        let stops = Stops::watch(&bed)?;
        let child = bed.spawn(&[
            "backup",
            "web01",
            "--compression",
            "none",
            "--scratch-dir",
            dir,
        ])?;
        Ok((ended(child)?, stops.on_error()?))
    })?;
    ensure!(stopped.0 == 0, "the guest was stopped: {stopped:?}");
    ensure!(output.status.code() == Some(1), "{}", output.status);
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(stderr.contains("scratch directory"), "{stderr}");
    ensure!(stderr.contains("(`--scratch-dir`)"), "{stderr}");
    bed.assert_tidy(&writing.vm, 1)?;
    drop((writing, memory));
    Ok(())
}
