//! VMs that are off: bare images, and VMs of libvirt's.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{Attach, DiskSpec, MIB, Vm, tool};
use serde_json::json;

use crate::bare::two_disks;
use crate::processes::{guard_of, kill_all, mover_of};
use crate::support::{Bed, assert_same, disk, mode, point, reference};
use crate::tale::{BareBed, Tale};
use crate::waiting::wait_until;

#[test]
fn off_on_off_crash_on_loses_nothing() -> Result<()> {
    let bed = BareBed::start()?;
    let mut tale = two_disks(&bed)?;
    let vm = tale.vm.clone();
    let written = |tale: &Tale, round: u8| -> Result<()> {
        tale.vm.start()?;
        tale.writes(round)
    };
    vm.quit()?;
    let report = tale.backs_up(&["full: first-backup"])?;
    ensure!(report["consistency"] == "offline", "{report}");
    ensure!(report["warnings"] == json!([]), "{report}");
    tale.one_mark_each()?;
    tale.no_files()?;
    // The mark made while it was off counts for the one that runs.
    written(&tale, 2)?;
    let report = tale.backs_up(&["incremental"])?;
    ensure!(report["consistency"] == "crash", "{report}");
    tale.writes(3)?;
    vm.quit()?;
    // And the other way round.
    tale.backs_up(&["incremental"])?;
    let report = tale.backs_up(&["incremental"])?;
    ensure!(disk(&report, "vda")["dirty_bytes"] == 0, "{report}");
    written(&tale, 4)?;
    vm.kill()?;
    tale.backs_up(&["rescan: bitmap-inconsistent"])?;
    tale.one_mark_each()?;
    written(&tale, 5)?;
    tale.backs_up(&["incremental"])?;
    tale.writes(6)?;
    vm.kill()?;
    // This QEMU had made the mark itself, and stored it nowhere.
    tale.backs_up(&["rescan: bitmap-missing"])?;
    written(&tale, 7)?;
    tale.writes(8)?;
    vm.terminate()?;
    tale.backs_up(&["incremental"])?;
    tale.one_mark_each()?;
    tale.no_files()?;
    tale.ends_well()
}

/// A VM of libvirt's with a disk on each of three buses, and its points.
struct Shut {
    bed: Bed,
    vm: Vm,
    points: Vec<(String, [std::path::PathBuf; 3])>,
}

const DISKS: [&str; 3] = ["vda", "sda", "hda"];

impl Shut {
    fn define() -> Result<Self> {
        let bed = Bed::start()?;
        let mut vm = bed.lab.vm("web01");
        for name in DISKS {
            vm = vm.disk(DiskSpec::qcow2(name, 32 * MIB).serial(&format!("S-{name}")));
        }
        let vm = vm.define()?;
        let points = Vec::new();
        Ok(Self { bed, vm, points })
    }

    fn writes(&self, round: u64) -> Result<()> {
        for name in DISKS {
            self.vm
                .write(name, &format!("write -P {round} {round}M 192k"))?;
            self.vm.flush(name)?;
        }
        Ok(())
    }

    fn backs_up(&mut self, expected: &str) -> Result<serde_json::Value> {
        let report = self.bed.backup(&self.vm, &[])?;
        for name in DISKS {
            ensure!(mode(&report, name) == expected, "{expected}: {report:#}");
        }
        let number = self.points.len();
        let copy = |name| reference(&self.bed, &self.vm, name, &format!("{name}-{number}.raw"));
        let copies = [copy("vda")?, copy("sda")?, copy("hda")?];
        self.points.push((point(&report), copies));
        Ok(report)
    }

    fn ends_well(&self) -> Result<()> {
        for (number, (point, copies)) in self.points.iter().enumerate() {
            let raw = &["--format", "raw"];
            let dir = self.bed.restore(point, &format!("out-{number}"), raw)?;
            for (name, copy) in DISKS.iter().zip(copies) {
                assert_same(copy, &dir.join(format!("{name}.raw")))?;
            }
            std::fs::remove_dir_all(dir)?;
        }
        self.bed.run(&["verify", "--read-data"]).map(drop)
    }
}

#[test]
fn a_shut_off_vm_of_libvirts_is_backed_up_as_one_with_the_one_that_runs() -> Result<()> {
    let mut it = Shut::define()?;
    let report = it.backs_up("full: first-backup")?;
    ensure!(report["consistency"] == "offline", "{report}");
    ensure!(report["warnings"] == json!([]), "{report}");
    ensure!(it.vm.state()? == "shut off");
    it.vm.start()?;
    it.writes(1)?;
    it.backs_up("incremental")?;
    it.bed.assert_tidy(&it.vm, 1)?;
    it.writes(2)?;
    it.vm.destroy()?;
    it.backs_up("incremental")?;
    it.vm.start()?;
    it.writes(3)?;
    it.vm.kill_qemu()?;
    it.backs_up("rescan: bitmap-inconsistent")?;
    it.vm.start()?;
    it.writes(4)?;
    it.backs_up("incremental")?;
    it.writes(5)?;
    it.backs_up("incremental")?;
    it.bed.assert_tidy(&it.vm, 1)?;
    it.ends_well()
}

#[test]
fn a_vm_that_is_off_is_left_alone_where_that_is_wanted() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed.lab.vm("web01").disk(DiskSpec::qcow2("vda", 8 * MIB));
    let vm = vm.define()?;
    let (code, told) = bed.fail(&["backup", "web01", "--offline", "refuse"])?;
    ensure!(
        code == 1 && told.contains("--offline yield"),
        "{code}: {told}"
    );
    ensure!(vm.bitmaps("vda")?.is_empty());
    Ok(())
}

#[test]
fn a_vm_that_is_off_is_started_paused_for_the_backup_where_that_is_wanted() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed.lab.vm("web01").disk(DiskSpec::qcow2("vda", 32 * MIB));
    let vm = vm.define()?;
    for (round, expected) in [(1, "full: first-backup"), (2, "incremental")] {
        vm.start()?;
        vm.write("vda", &format!("write -P {round} {round}M 1M"))?;
        vm.destroy()?;
        let report = bed.backup(&vm, &["--start-paused"])?;
        ensure!(mode(&report, "vda") == expected, "{report}");
        ensure!(report["consistency"] == "paused", "{report}");
        ensure!(vm.state()? == "shut off", "{}", vm.state()?);
        let copy = reference(&bed, &vm, "vda", "now.raw")?;
        let name = format!("out-{round}");
        let dir = bed.restore(&point(&report), &name, &["--format", "raw"])?;
        assert_same(&copy, &dir.join("vda.raw"))?;
    }
    // Nothing of it stays in the definition.
    let xml = bed.lab.virsh(&["dumpxml", "web01"])?;
    ensure!(!xml.contains("highwater"), "{xml}");
    Ok(())
}

/// Images with enough in them that a backup takes a while, and their VM, off.
fn busy_images(bed: &BareBed) -> Result<Tale> {
    let disk = DiskSpec::qcow2("vda", 256 * MIB);
    let vm = bed.lab.vm("kvm0").disk_as(disk, Attach::drive().id("vda"));
    let vm = vm.start()?;
    let tale = Tale::of(bed, &vm, &["vda"]);
    noise(&tale, 32)?;
    vm.quit()?;
    Ok(tale)
}

fn noise(tale: &Tale, mib: u64) -> Result<()> {
    let noise = tale.bed.lab.path("noise");
    tool("dd")
        .args(["if=/dev/urandom", "bs=1M", "status=none"])
        .arg(format!("count={mib}"))
        .arg(format!("of={}", noise.display()))
        .run()?;
    tale.write("vda", &format!("write -s {} 0 {mib}M", noise.display()))
}

/// Returns the processes that have a file open.
fn openers(file: &Path) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let opens = |process: &std::fs::DirEntry| {
        let open = std::fs::read_dir(process.path().join("fd"));
        let mut open = open.into_iter().flatten().flatten();
        open.any(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to == file))
    };
    let pid = |process: std::fs::DirEntry| process.file_name().to_str()?.parse().ok();
    processes.filter(opens).filter_map(pid).collect()
}

/// Waits until the backup has so many marks on the image and reads it.
fn wait_for_reader(tale: &Tale, marks: usize) -> Result<()> {
    let image = tale.vm.image("vda");
    // Before it there is qemu-img, which adds the mark and holds a lock for it.
    let reads = |pid: &u32| {
        let program = std::fs::read_link(format!("/proc/{pid}/exe"));
        program.is_ok_and(|it| it.ends_with("qemu-storage-daemon"))
    };
    wait_until(|| Ok(openers(&image).iter().any(reads) && tale.marks("vda")?.len() == marks))
}

#[test]
fn a_vm_started_during_the_backup_starts_at_once_and_the_next_backup_is_right() -> Result<()> {
    let bed = BareBed::start()?;
    let mut tale = busy_images(&bed)?;
    let image = tale.vm.image_uri();
    let run = bed.spawn_slow(&image, &["backup", "kvm0"])?;
    wait_for_reader(&tale, 1)?;
    let since = Instant::now();
    tale.vm.start()?;
    let took = since.elapsed();
    ensure!(took < Duration::from_secs(5), "it started after {took:?}");
    tale.writes(2)?;
    let output = run.wait_with_output()?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1), "{}: {told}", output.status);
    ensure!(
        told.contains("started") && told.contains("state: "),
        "{told}"
    );
    let listed = bed.run(&image, &["list", "kvm0", "--json"]);
    ensure!(!listed.unwrap_or_default().contains("\"point\""), "a point");
    let before = tale.vm.graph()?;
    tale.backs_up(&["full: first-backup"])?;
    tale.is_tidy(&before)?;
    tale.writes(3)?;
    tale.backs_up(&["incremental"])?;
    tale.vm.quit()?;
    tale.backs_up(&["incremental"])?;
    tale.one_mark_each()?;
    tale.ends_well()
}

#[test]
fn an_increment_that_a_start_breaks_off_keeps_the_old_mark() -> Result<()> {
    let bed = BareBed::start()?;
    let mut tale = busy_images(&bed)?;
    tale.backs_up(&["full: first-backup"])?;
    tale.vm.start()?;
    noise(&tale, 24)?;
    tale.vm.quit()?;
    let run = bed.spawn_slow(&tale.vm.image_uri(), &["backup", "kvm0"])?;
    wait_for_reader(&tale, 2)?;
    tale.vm.start()?;
    tale.writes(2)?;
    let output = run.wait_with_output()?;
    ensure!(output.status.code() == Some(1), "{}", output.status);
    tale.writes(3)?;
    tale.backs_up(&["incremental"])?;
    tale.one_mark_each()?;
    tale.ends_well()
}

#[test]
fn a_vm_that_is_held_off_does_not_start_before_the_backup_is_done() -> Result<()> {
    let bed = BareBed::start()?;
    let mut tale = busy_images(&bed)?;
    let hold = ["backup", "kvm0", "--offline", "hold"];
    let run = bed.spawn_slow(&tale.vm.image_uri(), &hold)?;
    wait_for_reader(&tale, 1)?;
    let refused = tale.vm.start().err().context("it started")?;
    ensure!(format!("{refused:#}").contains("lock"), "{refused:#}");
    let output = run.wait_with_output()?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {told}", output.status);
    tale.keeps_newest()?;
    tale.vm.start()?;
    tale.writes(2)?;
    tale.backs_up(&["incremental"])?;
    tale.ends_well()
}

#[test]
fn images_that_a_running_vm_writes_to_are_refused() -> Result<()> {
    let bed = BareBed::start()?;
    let mut tale = two_disks(&bed)?;
    tale.backs_up(&["full: first-backup"])?;
    let before = (tale.vm.graph()?, tale.marks("vda")?);
    let image = tale.vm.image_uri();
    for offline in ["yield", "hold"] {
        let output = bed.output(&image, &["backup", "kvm0", "--offline", offline])?;
        let told = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success(), "{told}");
        ensure!(
            told.contains("error: ") && told.contains("state: "),
            "{told}"
        );
    }
    ensure!((tale.vm.graph()?, tale.marks("vda")?) == before);
    tale.writes(2)?;
    tale.backs_up(&["incremental"])?;
    tale.ends_well()
}

#[test]
fn an_exporter_dies_with_us_and_keeps_no_vm_from_starting() -> Result<()> {
    let bed = BareBed::start()?;
    let mut tale = busy_images(&bed)?;
    let image = tale.vm.image("vda");
    let mut expected = "full: first-backup";
    for (round, offline) in ["yield", "hold"].iter().enumerate() {
        let args = ["backup", "kvm0", "--offline", offline];
        let mut run = bed.spawn_slow(&tale.vm.image_uri(), &args)?;
        wait_for_reader(&tale, round + 1)?;
        let (mover, guard) = (mover_of(&run)?, guard_of(&run)?);
        kill_all(&mut run, guard, mover)?;
        wait_until(|| Ok(openers(&image).is_empty()))?;
        tale.vm.start()?;
        noise(&tale, 24)?;
        tale.vm.quit()?;
        if round == 0 {
            tale.backs_up(&[expected])?;
            tale.vm.start()?;
            noise(&tale, 24)?;
            tale.vm.quit()?;
            expected = "incremental";
        }
    }
    tale.backs_up(&[expected])?;
    tale.one_mark_each()?;
    tale.no_files()?;
    tale.ends_well()
}

#[test]
fn raw_images_are_read_whole_each_time_and_stored_once() -> Result<()> {
    let bed = BareBed::start()?;
    let disk = DiskSpec::raw("vda", 32 * MIB + 512);
    let vm = bed.lab.vm("kvm0").disk_as(disk, Attach::drive().id("vda"));
    let vm = vm.start()?;
    let mut tale = Tale::of(&bed, &vm, &["vda"]);
    noise(&tale, 16)?;
    vm.quit()?;
    tale.backs_up(&["full: first-backup"])?;
    vm.start()?;
    tale.write("vda", "write -P 5 20M 64k")?;
    vm.quit()?;
    let report = tale.backs_up(&["rescan: no-marks-on-raw"])?;
    let stored = crate::support::disk(&report, "vda")["stored_bytes"].as_u64();
    ensure!(stored < Some(128 << 10), "{report}");
    tale.ends_well()
}

#[test]
fn two_backups_of_the_same_images_do_not_meet() -> Result<()> {
    let bed = BareBed::start()?;
    let mut tale = busy_images(&bed)?;
    let uri = tale.vm.image_uri();
    let first = bed.spawn_slow(&uri, &["backup", "kvm0"])?;
    wait_for_reader(&tale, 1)?;
    // Another host's or user's: it shares no lock file with the first.
    let mut other = bed.command(&uri, &["backup", "kvm0"]);
    other.env("HIGHWATER_RUNTIME_DIR", bed.lab.path("elsewhere"));
    let other = other.output()?;
    let told = String::from_utf8_lossy(&other.stderr);
    ensure!(other.status.code() == Some(11), "{}: {told}", other.status);
    let first = first.wait_with_output()?;
    let told = String::from_utf8_lossy(&first.stderr);
    ensure!(first.status.success(), "{}: {told}", first.status);
    tale.keeps_newest()?;
    tale.backs_up(&["incremental"])?;
    tale.one_mark_each()?;
    tale.ends_well()
}
