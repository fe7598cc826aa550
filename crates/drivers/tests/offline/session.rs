//! Sessions of a VM that stays off.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use highwater_hypervisor::{Consistency, Driver as _, ErrorKind, MarkOrder, Quiesce, RunState};
use highwater_testkit::{DiskSpec, MIB, compare_images, tool, wait_until};

use crate::reading::{dirty_ranges, mark_name, read_export};
use crate::rig::{Rig, assert_lost, assert_no_directories, new_mark};

fn write(image: &Path, format: &str, command: &str) {
    tool("qemu-io")
        .args(["-f", format, "-c", command])
        .arg(image)
        .run()
        .unwrap();
}

fn digest(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap()
}

#[test]
fn a_point_is_read_from_images_of_all_kinds_and_only_the_new_mark_is_added() {
    let mut rig = Rig::with(vec![
        DiskSpec::qcow2("vda", 16 * MIB),
        DiskSpec::raw("vdb", MIB),
    ]);
    write(&rig.machine.image("vda"), "qcow2", "write -P 1 3M 1M");
    write(&rig.machine.image("vdb"), "raw", "write -P 2 0 4k");
    let mut order = rig.order(&[("vda", None), ("vdb", None)]);
    order.new_mark.as_mut().unwrap().disks = vec!["vda".to_owned()];
    let raw_before = digest(&rig.machine.image("vdb"));
    let begun = rig.driver.begin(&order).unwrap();
    assert_eq!(begun.consistency, Consistency::Offline);
    assert_eq!(begun.disks[0].granularity, Some(65536));
    assert_eq!(begun.disks[1].granularity, None);
    assert!(begun.mark_created_s.is_some());
    assert!(begun.warnings.is_empty(), "{begun:?}");
    for export in &begun.exports {
        let copy = rig.lab.path("copy.raw");
        rig.machine.raw_copy(&export.target, &copy).unwrap();
        let read = read_export(export, &rig.lab.path("read.raw"));
        compare_images(&copy, &read).unwrap();
    }
    rig.check(&order).unwrap();
    rig.end(&order);
    let bitmap = rig.bitmap("vda", &new_mark(&order)).unwrap();
    assert!(bitmap.recording && !bitmap.inconsistent && bitmap.dirty_bytes == 0);
    assert_eq!(digest(&rig.machine.image("vdb")), raw_before);
}

#[test]
fn what_was_written_since_a_mark_is_dirty_and_nothing_else() {
    let mut rig = Rig::new(&["vda", "vdb"]);
    let mark = rig.leave_mark(&["vda", "vdb"]);
    write(&rig.machine.image("vda"), "qcow2", "write -P 1 1M 64k");
    let order = rig.order(&[("vda", Some(&mark)), ("vdb", Some(&mark))]);
    let begun = rig.driver.begin(&order).unwrap();
    assert_eq!(dirty_ranges(&begun.exports[0]), [(1 << 20, 64 << 10)]);
    assert_eq!(dirty_ranges(&begun.exports[1]), []);
    rig.end(&order);
    assert_eq!(rig.bitmap("vda", &mark).unwrap().dirty_bytes, 64 << 10);
}

#[test]
fn a_mark_of_several_images_of_a_chain_shows_what_any_of_them_recorded() {
    let mut rig = Rig::new(&["vda"]);
    let mark = rig.leave_mark(&["vda"]);
    let (image, base) = (rig.machine.image("vda"), rig.lab.path("base.qcow2"));
    write(&image, "qcow2", "write -P 1 1M 64k");
    fs::rename(&image, &base).unwrap();
    let backing = "backing_file=base.qcow2,backing_fmt=qcow2";
    tool("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", backing])
        .arg(&image)
        .run()
        .unwrap();
    // As libvirt does when it takes a snapshot.
    tool("qemu-img")
        .args(["bitmap", "--add"])
        .arg(&image)
        .arg(mark.to_string())
        .run()
        .unwrap();
    write(&image, "qcow2", "write -P 1 5M 64k");
    let order = rig.order(&[("vda", Some(&mark))]);
    let begun = rig.driver.begin(&order).unwrap();
    let dirty = dirty_ranges(&begun.exports[0]);
    assert_eq!(dirty, [(1 << 20, 64 << 10), (5 << 20, 64 << 10)]);
    rig.end(&order);
}

#[test]
fn a_begin_that_fails_takes_the_new_mark_off_again() {
    let mut rig = Rig::new(&["vda", "vdb"]);
    let mark = rig.leave_mark(&["vda"]);
    // A bitmap that is not there, one that exists, a guest that cannot be frozen.
    let missing = rig.order(&[("vda", Some(&mark)), ("vdb", Some(&mark))]);
    let error = rig.driver.begin(&missing).unwrap_err();
    assert_eq!(error.kind, ErrorKind::BadMark, "{error:?}");
    let name = mark_name();
    tool("qemu-img")
        .args(["bitmap", "--add"])
        .arg(rig.machine.image("vdb"))
        .arg(name.to_string())
        .run()
        .unwrap();
    let mut taken = rig.order(&[("vda", None), ("vdb", None)]);
    taken.new_mark.as_mut().unwrap().name = name.clone();
    let error = rig.driver.begin(&taken).unwrap_err();
    assert!(!error.left_behind, "{error:?}");
    assert_eq!(rig.bitmap("vda", &name), None);
    let mut frozen = rig.order(&[("vda", None)]);
    frozen.quiesce = Quiesce::Require;
    let error = rig.driver.begin(&frozen).unwrap_err();
    assert_eq!(error.kind, ErrorKind::CannotFreeze);
    for order in [&missing, &taken, &frozen] {
        assert_eq!(rig.bitmap("vda", &new_mark(order)), None);
        assert_no_directories(order);
    }
}

#[test]
fn two_sessions_do_not_have_one_image_at_the_same_time() {
    let mut rig = Rig::new(&["vda"]);
    let (first, second) = (rig.order(&[("vda", None)]), rig.order(&[("vda", None)]));
    rig.driver.begin(&first).unwrap();
    let mut stranger = rig.stranger();
    let error = stranger.begin(&second).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Busy, "{error:?}");
    assert_eq!(rig.bitmap("vda", &new_mark(&second)), None);
    rig.check(&first).unwrap();
    rig.end(&first);
    stranger.begin(&second).unwrap();
    stranger.end(&second).unwrap();
}

#[test]
fn a_write_by_a_program_that_takes_no_locks_ends_the_session() {
    let mut rig = Rig::with(vec![DiskSpec::raw("vda", MIB)]);
    let mut order = rig.order(&[("vda", None)]);
    order.new_mark = None;
    rig.driver.begin(&order).unwrap();
    assert!(!rig.driver.is_alarmed(order.session));
    rig.check(&order).unwrap();
    let file = fs::OpenOptions::new()
        .write(true)
        .open(rig.machine.image("vda"))
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[1], 7).unwrap();
    assert!(rig.driver.is_alarmed(order.session));
    assert_lost(rig.check(&order), "is not as it was");
    rig.end(&order);
}

/// Returns the process of a session's exporter.
fn exporter(order: &highwater_hypervisor::BeginOrder) -> u32 {
    let note = order.socket_dir.join(format!("hw-{}.pid", order.session));
    fs::read_to_string(note).unwrap().trim().parse().unwrap()
}

fn lives(process: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"));
    stat.is_ok_and(|text| !text.contains(") Z "))
}

#[test]
fn an_exporter_that_dies_ends_the_session_and_leaves_all_bitmaps_whole() {
    let mut rig = Rig::new(&["vda"]);
    let mark = rig.leave_mark(&["vda"]);
    let order = rig.order(&[("vda", Some(&mark))]);
    rig.driver.begin(&order).unwrap();
    tool("kill")
        .args(["-9", &exporter(&order).to_string()])
        .run()
        .unwrap();
    // Its threads end one by one.
    let since = Instant::now();
    while !rig.driver.is_alarmed(order.session) {
        assert!(since.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_lost(rig.check(&order), "exporter ended");
    rig.end(&order);
    for name in [&mark, &new_mark(&order)] {
        let bitmap = rig.bitmap("vda", name).unwrap();
        assert!(bitmap.recording && !bitmap.inconsistent, "{bitmap:?}");
    }
}

#[test]
fn an_exporter_ends_with_the_process_that_began_it() {
    const CHILD: &str = "HIGHWATER_TEST_OFFLINE_GUARD";
    if let Some(uri) = std::env::var_os(CHILD) {
        // Dies by its own hand, so that nothing of it is dropped.
        let uri = uri.into_string().unwrap();
        let (uri, order) = uri.split_once(' ').unwrap();
        let order: highwater_hypervisor::BeginOrder = serde_json::from_str(order).unwrap();
        let clock = std::sync::Arc::new(highwater_model::SystemClock);
        let mut driver = highwater_drivers::offline::ImageDriver::connect(uri, clock).unwrap();
        driver.begin(&order).unwrap();
        tool("kill")
            .args(["-9", &std::process::id().to_string()])
            .run()
            .unwrap();
    }
    let mut rig = Rig::new(&["vda"]);
    let order = rig.order(&[("vda", None)]);
    let text = serde_json::to_string(&order).unwrap();
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "session::an_exporter_ends_with_the_process_that_began_it",
        ])
        .env(CHILD, format!("{} {text}", rig.machine.image_uri()))
        .stdout(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(!child.success());
    let ended = || Ok(!lives(exporter(&order)));
    wait_until("the exporter ends", Duration::from_secs(10), ended).unwrap();
    let vm = rig.vm();
    let places = [rig.lab.path("run"), rig.lab.path("scratch")];
    assert_eq!(rig.driver.leftovers(&vm, &places).unwrap().len(), 2);
    let swept = rig.driver.sweep(&vm, &places).unwrap();
    assert_eq!(
        (swept.sessions, swept.warnings),
        (vec![order.session], vec![])
    );
    assert_no_directories(&order);
    let next = rig.order(&[("vda", None)]);
    rig.driver.begin(&next).unwrap();
    assert!(rig.driver.leftovers(&vm, &places).unwrap().is_empty());
    rig.end(&next);
}

#[test]
fn a_mark_on_an_image_that_cannot_be_read_is_not_said_to_be_gone() {
    let mut rig = Rig::new(&["vda", "vdb"]);
    let mark = rig.leave_mark(&["vda", "vdb"]);
    let (image, away) = (rig.machine.image("vdb"), rig.lab.path("away"));
    fs::rename(&image, &away).unwrap();
    let (vm, remove) = (rig.vm(), MarkOrder::Remove(mark.clone()));
    let error = rig.driver.mark(&vm, &remove).unwrap_err();
    assert!(error.because[0].contains("cannot be opened"), "{error:?}");
    // The others go.
    assert_eq!(rig.bitmap("vda", &mark), None);
    fs::rename(&away, &image).unwrap();
    rig.driver.mark(&vm, &remove).unwrap();
    assert_eq!(rig.bitmap("vdb", &mark), None);
}

#[test]
fn directories_of_a_session_that_lives_are_no_leftovers() {
    let mut rig = Rig::new(&["vda"]);
    let order = rig.order(&[("vda", None)]);
    rig.driver.begin(&order).unwrap();
    let vm = rig.vm();
    let places = [rig.lab.path("run"), rig.lab.path("scratch")];
    let mut stranger = rig.stranger();
    assert!(stranger.leftovers(&vm, &places).unwrap().is_empty());
    let swept = stranger.sweep(&vm, &places).unwrap();
    assert!(swept.sessions.is_empty(), "{swept:?}");
    rig.check(&order).unwrap();
    assert!(order.socket_dir.exists() && order.scratch_dir.exists());
    rig.end(&order);
}

#[test]
fn a_template_that_running_vms_are_based_on_is_read_without_a_new_mark() {
    let mut rig = Rig::new(&["vda", "vdb"]);
    let mark = rig.leave_mark(&["vda", "vdb"]);
    let (template, clone) = (rig.machine.image("vda"), rig.lab.path("clone.qcow2"));
    tool("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
        .args([&template, &clone])
        .run()
        .unwrap();
    let disk = DiskSpec::existing("vda", &clone, "qcow2");
    let other = rig.lab.vm("clone01").disk(disk).create().unwrap();
    other.start().unwrap();
    let order = rig.order(&[("vda", Some(&mark)), ("vdb", Some(&mark))]);
    let begun = rig.driver.begin(&order).unwrap();
    assert_eq!(begun.disks[0].granularity, None, "{begun:?}");
    assert!(begun.disks[1].granularity.is_some(), "{begun:?}");
    assert!(begun.warnings[0].contains("no new mark"), "{begun:?}");
    assert_eq!(dirty_ranges(&begun.exports[0]), []);
    rig.check(&order).unwrap();
    rig.end(&order);
    assert_eq!(rig.bitmap("vda", &new_mark(&order)), None);
    assert!(rig.bitmap("vda", &mark).unwrap().recording);
    other.quit().unwrap();
}

#[test]
fn a_vm_whose_qemu_died_has_disks_as_after_a_power_cut() {
    let mut rig = Rig::new(&["vda"]);
    rig.leave_mark(&["vda"]);
    rig.machine.start().unwrap();
    rig.machine.write("vda", "write -P 9 2M 64k").unwrap();
    let process = rig.machine.pid().unwrap();
    tool("kill")
        .args(["-9", &process.to_string()])
        .run()
        .unwrap();
    let vm = rig.vm();
    // Its threads end one by one.
    let ended = || Ok(rig.driver.observe(&vm).unwrap().run_state == RunState::Off);
    wait_until("QEMU ends", Duration::from_secs(10), ended).unwrap();
    let order = rig.order(&[("vda", None)]);
    let begun = rig.driver.begin(&order).unwrap();
    assert_eq!(begun.consistency, Consistency::Crash, "{begun:?}");
    rig.end(&order);
}
