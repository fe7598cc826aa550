//! The disks of a point are the guest's disks at one moment, though the guest
//! never stops writing.
//!
//! The engine runs in the test's own process, so that the moment is known
//! within the one call that takes it. Restores go through the program.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use highwater_drivers::libvirt::{LibvirtDriver, LibvirtOptions};
use highwater_engine::repository::{Compression, Repository};
use highwater_engine::{
    BackupContext, BackupOptions, Cancel, Event, Guard, GuardError, Level, Observer, Report,
    Tuning, backup, serve,
};
use highwater_hypervisor::{Driver, ErrorKind, HypervisorError, Quiesce};
use highwater_model::SystemClock;
use highwater_testkit::{DiskSpec, Guest, NumberedWriter, Numbering};

use crate::support::Bed;

const DISKS: [&str; 3] = ["vda", "vdb", "vdc"];
const POINTS: u64 = 7;
/// Under emulation the guest writes about a hundred blocks in a second.
const OVERWRITE_DEADLINE: Duration = Duration::from_mins(1);

/// Notes what is certain about the moment, then holds the copying up until the
/// guest has overwritten what is to be copied.
struct Moment<'a> {
    writer: &'a NumberedWriter,
    overwrite: u64,
    /// Acknowledged before the call, granted after it, acknowledged when the
    /// copying began.
    seen: Mutex<(u64, u64, u64)>,
}

impl Observer for Moment<'_> {
    fn event(&self, event: &Event<'_>) {
        let mut seen = self.seen.lock().unwrap();
        match event {
            Event::Beginning => seen.0 = self.writer.acknowledged(),
            Event::Begun { .. } => {
                seen.1 = self.writer.granted();
                let end = Instant::now() + OVERWRITE_DEADLINE;
                while self.writer.acknowledged() < seen.1 + self.overwrite && Instant::now() < end {
                    std::thread::yield_now();
                }
                seen.2 = self.writer.acknowledged();
            }
            _ => {}
        }
    }
}

/// A guard on a thread instead of in a process.
fn guard(bed: &Bed) -> Result<Guard> {
    let (ours, theirs) = UnixStream::pair()?;
    let (lifeline, cutter) = UnixStream::pair()?;
    std::thread::spawn(move || serve(theirs, cutter, &connect));
    Ok(Guard::connect(
        ours,
        lifeline,
        &bed.lab.uri(),
        &bed.runtime(),
    )?)
}

fn connect(uri: &str) -> Result<Box<dyn Driver>, HypervisorError> {
    Ok(Box::new(LibvirtDriver::connect(
        uri,
        &LibvirtOptions::default(),
    )?))
}

fn no_other_guard() -> Result<Guard, GuardError> {
    Err(HypervisorError::new(
        ErrorKind::Other,
        "cannot start another guard in this test",
    ))
}

fn options(bed: &Bed) -> BackupOptions {
    BackupOptions {
        level: Level::Auto,
        only_disks: Vec::new(),
        without_disks: Vec::new(),
        quiesce: Quiesce::Off,
        freeze_mountpoints: Vec::new(),
        offline: highwater_engine::Offline::Yield,
        start_paused: false,
        scratch_dir: bed.runtime().join("scratch"),
        socket_dir: bed.runtime(),
        compression: Compression::Zstd(1),
        tuning: Tuning::default(),
        threshold: None,
        audit: None,
        tags: Vec::new(),
        group: None,
        host: "test".to_owned(),
        utc_offset_minutes: 0,
    }
}

fn take(bed: &Bed, observer: &dyn Observer) -> Result<Report> {
    let store = highwater_store::open(bed.repo().to_str().unwrap())?;
    let repo = Repository::open(store, None)?;
    let context = BackupContext {
        repo: &repo,
        guard: &guard(bed)?,
        restart_guard: &no_other_guard,
        clock: &SystemClock,
        observer,
        cancel: &Cancel::default(),
    };
    Ok(backup(&context, "web01", &options(bed))?)
}

/// Fails unless an increment was one, and the raw disk was read as a whole.
fn assert_modes(report: &Report, number: u64) {
    let modes: Vec<&str> = report.disks.iter().map(|disk| disk.mode.as_str()).collect();
    let expected = if number == 0 {
        ["full"; 3]
    } else {
        ["incremental", "incremental", "rescan"]
    };
    assert_eq!(modes, expected, "point {number}");
    assert!(report.warnings.is_empty(), "{:?}", report.warnings);
}

#[test]
fn every_point_is_one_moment_of_all_disks_while_the_guest_overwrites_them() -> Result<()> {
    let bed = Bed::start()?;
    let numbering = Numbering {
        slots: 200,
        stride_bytes: 64 << 10,
        disks: DISKS.map(|disk| format!("/dev/{disk}")).to_vec(),
    };
    let round = numbering.slots * DISKS.len() as u64;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", numbering.disk_bytes()))
        .disk(DiskSpec::qcow2("vdb", numbering.disk_bytes()))
        .disk(DiskSpec::raw("vdc", numbering.disk_bytes()))
        .guest()
        .start()?;
    let guest = vm.guest()?;
    let writer = NumberedWriter::start(&guest, &numbering, 16)?;
    let mut points = Vec::new();
    for number in 0..POINTS {
        // Every slot is overwritten while the copy of a full and of an increment
        // waits. Between the others most slots are not, so that an increment
        // which forgets a block is not saved by a later write to it.
        let overwrite = if matches!(number, 0 | 3) { round } else { 16 };
        let moment = Moment {
            writer: &writer,
            overwrite,
            seen: Mutex::default(),
        };
        let report = take(&bed, &moment)?;
        let (acked, granted, at_copy) = moment.seen.into_inner().unwrap();
        ensure!(
            at_copy >= granted + overwrite,
            "the guest wrote too little to prove anything"
        );
        assert_modes(&report, number);
        points.push((report.point.context("a point was made")?, acked, granted));
    }
    writer.stop()?;
    bed.assert_tidy(&vm, 1)?;
    let mut newest = 0;
    for (number, (point, acked, granted)) in points.into_iter().enumerate() {
        let dir = bed.restore(
            &format!("id:{point}"),
            &format!("out-{number}"),
            &["--format", "raw"],
        )?;
        let images: Vec<PathBuf> = DISKS.map(|disk| dir.join(format!("{disk}.raw"))).to_vec();
        let images: Vec<_> = images.iter().map(PathBuf::as_path).collect();
        let last = numbering.check_prefix(&images, acked, granted)?;
        ensure!(
            last > newest,
            "point {number} holds block {last}, the one before {newest}"
        );
        newest = last;
    }
    Ok(())
}

/// Has the guest write once, after the VM was looked at and before the point.
struct LateWrite<'a>(&'a Guest);

impl Observer for LateWrite<'_> {
    fn event(&self, event: &Event<'_>) {
        if *event == Event::Beginning {
            let write = "dd if=/dev/urandom of=/dev/vda bs=4096 count=1 && sync";
            self.0.run(write).unwrap();
        }
    }
}

/// The write is in the point, and not in what the new mark recorded. Counted as
/// a write since the point it would make a liar of a bitmap that is right.
#[test]
fn a_write_just_before_the_point_makes_no_bitmap_a_liar() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 64 << 20))
        .guest()
        .start()?;
    let guest = vm.guest()?;
    for expected in ["full", "incremental", "incremental"] {
        let report = take(&bed, &LateWrite(&guest))?;
        assert_eq!(report.disks[0].mode, expected, "{:?}", report.warnings);
        assert!(report.warnings.is_empty(), "{:?}", report.warnings);
    }
    bed.assert_tidy(&vm, 1)
}
