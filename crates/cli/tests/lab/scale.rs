//! Huge disks and many points: memory and time stay bounded.
//!
//! `HIGHWATER_SCALE_PIECES` says how many pieces of data the disk of 8 TiB has
//! instead of 4 000; `make scale` measures with 200 000, and in release.

use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use highwater_engine::repository::{Compression, ImageRoot, Manifest, Repository, WriterOptions};
use highwater_model::{PointId, Timestamp};
use highwater_testkit::{DiskSpec, GIB, Scattered, Vm, compare_images, raw_hash};
use serde_json::Value;

use crate::support::{Bed, assert_same, mode, point, reference};

/// What mover and guard may hold of anonymous memory, KiB.
const MEMORY_KIB_MAX: u64 = 256 << 10;
const DISK_BYTES: u64 = 8192 * GIB;
/// Bytes that a guest's write changes.
const WRITE: u64 = 4096;

/// Runs the program, which must succeed; returns stdout and the peak of
/// anonymous memory, KiB, of the mover and its guard together.
#[expect(clippy::print_stderr, reason = "`make scale` is run for the numbers")]
fn measured(bed: &Bed, args: &[&str]) -> Result<(String, u64)> {
    let start = Instant::now();
    let out = bed.lab.path("stdout");
    let mut command = bed.command(args);
    command.stdout(std::fs::File::create(&out)?);
    let mut child = command.spawn()?;
    let mut peak = 0;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        peak = peak.max(anonymous_kib(child.id()));
        std::thread::sleep(Duration::from_millis(5));
    };
    ensure!(status.success(), "highwater {args:?}: {status}");
    eprintln!(
        "{}: {:.1} s, {} MiB of anonymous memory at most",
        args.join(" "),
        start.elapsed().as_secs_f64(),
        peak >> 10
    );
    ensure!(peak > 0, "nobody looked in time");
    ensure!(peak <= MEMORY_KIB_MAX, "highwater {args:?} took {peak} KiB");
    Ok((std::fs::read_to_string(out)?, peak))
}

/// Returns the anonymous memory of a process and its children.
fn anonymous_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let own = status.lines().find_map(|line| {
        let value = line.strip_prefix("RssAnon:")?;
        value.split_whitespace().next()?.parse::<u64>().ok()
    });
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let children = children.unwrap_or_default();
    let pids = children
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok());
    own.unwrap_or(0) + pids.map(anonymous_kib).sum::<u64>()
}

/// A VM with a huge disk, and what the disk must be, as a raw file.
struct Huge {
    bed: Bed,
    vm: Vm,
    expected: PathBuf,
}

impl Huge {
    fn start(disk: Scattered, bed: Bed) -> Result<Self> {
        let (image, expected) = (bed.lab.path("huge.qcow2"), bed.lab.path("expected.raw"));
        disk.write(&image)?;
        disk.write_raw(&expected)?;
        let spec = DiskSpec::existing("vda", &image, "qcow2");
        let vm = bed.lab.vm("web01").disk(spec).start()?;
        Ok(Self { bed, vm, expected })
    }

    /// Lets the guest write here and there over the whole disk.
    fn write(&self, count: u64, pattern: u8) -> Result<()> {
        let places: Vec<u64> = (0..count)
            .map(|n| n * (DISK_BYTES / count) / WRITE * WRITE + u64::from(pattern) * WRITE)
            .collect();
        let command = |at: &u64| format!("write -P {pattern} {at} {WRITE}");
        self.vm
            .write_all("vda", &places.iter().map(command).collect::<Vec<_>>())?;
        let file = std::fs::File::options().write(true).open(&self.expected)?;
        let bytes = vec![pattern; usize::try_from(WRITE)?];
        for at in places {
            file.write_all_at(&bytes, at)?;
        }
        Ok(())
    }

    /// Backs up in this mode, and compares what a restore gives back.
    fn backup(&self, wanted: &str) -> Result<String> {
        let (text, _) = measured(&self.bed, &["backup", "web01", "--json"])?;
        let report: Value = serde_json::from_str(&text)?;
        ensure!(mode(&report, "vda").starts_with(wanted), "{report}");
        Ok(point(&report))
    }

    fn restore(&self, point: &str, name: &str) -> Result<PathBuf> {
        let path = self.bed.lab.path(name);
        let to = path.to_str().context("a path is text")?;
        measured(&self.bed, &["restore", point, "-d", "vda", "--to", to])?;
        Ok(path)
    }

    fn check_raw(&self, point: &str) -> Result<()> {
        let restored = self.restore(point, "restored.raw")?;
        ensure!(raw_hash(&restored)? == raw_hash(&self.expected)?, "{point}");
        // What was a hole is one again, not 8 TiB of zeroes.
        let blocks = |path: &Path| std::fs::metadata(path).map(|meta| meta.blocks());
        ensure!(blocks(&restored)? <= 5 * blocks(&self.expected)?);
        Ok(std::fs::remove_file(restored)?)
    }
}

#[test]
fn a_disk_of_8_tib_goes_there_and_back_in_bounded_memory() -> Result<()> {
    let pieces = match std::env::var("HIGHWATER_SCALE_PIECES") {
        Ok(text) => text.parse()?,
        Err(_) => 4_000,
    };
    let disk = Scattered {
        size_bytes: DISK_BYTES,
        pieces,
    };
    let huge = Huge::start(disk, Bed::start()?)?;
    let full = huge.backup("full")?;
    huge.check_raw(&full)?;
    huge.write(500, 0xab)?;
    huge.check_raw(&huge.backup("incremental")?)?;
    // QEMU dies and takes its bitmaps with it; the data is still there.
    huge.write(100, 0xcd)?;
    huge.vm.flush("vda")?;
    huge.vm.kill_qemu()?;
    huge.vm.start()?;
    let rescan = huge.backup("rescan")?;
    let restored = huge.restore(&rescan, "restored.qcow2")?;
    compare_images(&huge.expected, &restored)
}

#[test]
fn the_memory_of_the_passphrase_is_given_back_before_the_session() -> Result<()> {
    let disk = Scattered {
        size_bytes: GIB,
        pieces: 16,
    };
    let huge = Huge::start(disk, Bed::start_encrypted()?)?;
    let mut command = huge.bed.command(&["backup", "web01", "--quiet"]);
    let mut child = command.spawn()?;
    let (mut before, mut within) = (0, 0);
    while child.try_wait()?.is_none() {
        let now = anonymous_kib(child.id());
        // The session's socket is there from its begin to its end.
        let begun = std::fs::read_dir(huge.bed.runtime())
            .into_iter()
            .flatten()
            .flatten()
            .any(|entry| holds_socket(&entry.path()));
        let peak = if begun { &mut within } else { &mut before };
        *peak = now.max(*peak);
    }
    ensure!(child.wait()?.success());
    ensure!(before > 60 << 10, "argon2id takes 64 MiB, not {before} KiB");
    ensure!(
        within < before - (30 << 10),
        "{within} KiB in the session, {before} before it"
    );
    Ok(())
}

fn holds_socket(dir: &Path) -> bool {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    files
        .into_iter()
        .any(|file| file.path().extension().is_some_and(|end| end == "sock"))
}

/// Adds points that are older than all others, as `count` backups had made them:
/// each with a chunk of its own, each followed by what follows a backup.
fn add_old_points(repo: &Repository, like: &Manifest, count: i64) -> Result<()> {
    for n in 0..count {
        let writer = repo.writer(WriterOptions {
            compression: Compression::None,
            pack_bytes: 1 << 20,
            ..WriterOptions::default()
        })?;
        let mut bytes = vec![7; 64 << 10];
        bytes[..8].copy_from_slice(&n.to_le_bytes());
        let root: ImageRoot = writer.add_bytes(&mut bytes.as_slice(), 64 << 10)?;
        let mut manifest = like.clone();
        manifest.point = PointId::new(Timestamp::from_unix_ms(1_600_000_000_000 + n));
        manifest.mark = None;
        for disk in &mut manifest.disks {
            disk.image = root;
        }
        writer.flush()?.commit(&manifest)?;
        repo.merge_index()?;
    }
    Ok(())
}

/// Returns how many files below `dir` were ever read since they were made.
fn files_read(dir: &Path) -> Result<usize> {
    let mut count = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        if meta.is_dir() {
            count += files_read(&entry.path())?;
        } else {
            // `relatime`: the first read of a file is always noted.
            let times = |s, ns| (s, ns);
            let read = times(meta.atime(), meta.atime_nsec());
            count += usize::from(read > times(meta.mtime(), meta.mtime_nsec()));
        }
    }
    Ok(count)
}

#[test]
fn an_empty_increment_costs_the_same_after_a_thousand_points() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 1024 * GIB))
        .disk(DiskSpec::qcow2("vdb", GIB))
        .start()?;
    vm.write("vda", "write -P 1 500G 1M")?;
    // A disk that is never backed up has no parent to be found, either.
    let plain = ["-x", "vdb"];
    bed.backup(&vm, &plain)?;
    let seconds = || -> Result<f64> {
        let mut all = Vec::new();
        for _ in 0..3 {
            let start = Instant::now();
            let report = bed.backup(&vm, &plain)?;
            all.push(start.elapsed().as_secs_f64());
            ensure!(mode(&report, "vda") == "incremental", "{report}");
        }
        all.sort_by(f64::total_cmp);
        Ok(all[1])
    };
    let few = seconds()?;
    let store = std::sync::Arc::new(highwater_store::LocalStore::new(bed.repo()));
    let repo = Repository::open(store, None)?;
    let like = repo.points()?.points.remove(0);
    add_old_points(&repo, &like, 1000)?;
    drop(repo);
    let points = bed.repo().join("points");
    let before = files_read(&points)?;
    let many = seconds()?;
    let read = files_read(&points)? - before;
    let indexes = std::fs::read_dir(bed.repo().join("index"))?.count();
    eprintln!(
        "nothing changed: {few:.2} s with 4 points, {many:.2} s with 1004; {read} manifests read, {indexes} index files"
    );
    // Each of the three looks at the one before; the first of them at one that
    // was read already.
    ensure!(read <= 3, "{read} manifests were read");
    ensure!(indexes <= 40, "{indexes} index files");
    ensure!(many < few + 2.0, "{many} s instead of {few} s");
    Ok(())
}

#[test]
fn a_damaged_newest_manifest_costs_a_rescan_and_is_said() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", GIB))
        .start()?;
    vm.write("vda", "write -P 1 0 1M")?;
    bed.backup(&vm, &[])?;
    vm.write("vda", "write -P 2 1M 1M")?;
    let lost = bed.backup(&vm, &[])?;
    let id = lost["point"].as_str().context("a point has an id")?;
    let folder = std::fs::read_dir(bed.repo().join("points"))?
        .next()
        .context("a VM")??;
    std::fs::write(folder.path().join(id), b"damaged")?;
    vm.write("vda", "write -P 3 2M 1M")?;
    let report = bed.backup(&vm, &[])?;
    ensure!(mode(&report, "vda") == "rescan: bitmap-missing", "{report}");
    let warnings = report["warnings"].to_string();
    ensure!(
        warnings.contains(&format!("cannot use restore point {id}")),
        "{warnings}"
    );
    let dir = bed.restore(&point(&report), "restored", &[])?;
    assert_same(
        &reference(&bed, &vm, "vda", "now.raw")?,
        &dir.join("vda.qcow2"),
    )?;
    ensure!(mode(&bed.backup(&vm, &[])?, "vda") == "incremental");
    bed.assert_tidy(&vm, 1)
}

#[test]
fn the_mark_of_a_disk_that_is_left_out_is_kept_however_often_it_is_left_out() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", GIB))
        .disk(DiskSpec::qcow2("vdb", GIB))
        .start()?;
    bed.backup(&vm, &[])?;
    for pattern in 1..4 {
        vm.write("vdb", &format!("write -P {pattern} {pattern}M 1M"))?;
        let report = bed.backup(&vm, &["-d", "vda"])?;
        ensure!(mode(&report, "vda") == "incremental", "{report}");
    }
    let report = bed.backup(&vm, &[])?;
    ensure!(mode(&report, "vdb") == "incremental", "{report}");
    let dir = bed.restore(&point(&report), "restored", &[])?;
    let now = reference(&bed, &vm, "vdb", "now.raw")?;
    assert_same(&now, &dir.join("vdb.qcow2"))?;
    bed.assert_tidy(&vm, 1)
}
