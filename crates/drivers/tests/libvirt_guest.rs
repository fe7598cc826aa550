//! The libvirt driver with a real guest inside: freezing, and guests that are
//! stopped by I/O errors.
#![allow(
    clippy::disallowed_methods,
    reason = "files of a lab die with the test: nothing here must be durable"
)]
#![allow(
    clippy::unwrap_used,
    reason = "what a helper of a test cannot do fails the test, with the error and the line"
)]

#[allow(dead_code, reason = "shared with the tests that need no guest")]
mod reading;
#[allow(dead_code, reason = "shared with the tests that need no guest")]
#[path = "libvirt/rig.rs"]
mod rig;

use std::time::{Duration, Instant};

use highwater_hypervisor::{
    BeginOrder, Consistency, Driver as _, ErrorKind, JobFacts, Quiesce, RunState,
};
use highwater_testkit::guest::{self, Guest};
use highwater_testkit::{DiskSpec, MIB, Vm, compare_images, tool};

use crate::reading::{mark_name, read_export};
use crate::rig::{Rig, SmallSpace, assert_only_marks};

/// A guest with an ext4 file system on `vda` and an agent that answers.
fn start_with_files(rig: &Rig) -> (Vm, Guest) {
    let image = rig.lab.path("files.raw");
    guest::make_ext4(&image, 32 * MIB).unwrap();
    let qcow2 = rig.lab.path("files.qcow2");
    tool("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .args([&image, &qcow2])
        .run()
        .unwrap();
    let files = DiskSpec::existing("vda", &qcow2, "qcow2");
    let vm = rig.lab.vm("web01").disk(files).guest().start().unwrap();
    let guest = vm.guest().unwrap();
    guest.wait_for_agent().unwrap();
    (vm, guest)
}

fn quiesced(rig: &mut Rig, vm: &Vm, quiesce: Quiesce) -> BeginOrder {
    BeginOrder {
        quiesce,
        ..rig.order(vm, &[("vda", None)])
    }
}

/// A file system that was frozen has nothing left to recover.
fn needs_recovery(image: &std::path::Path) -> bool {
    tool("dumpe2fs")
        .arg("-h")
        .arg(image)
        .run()
        .unwrap()
        .contains("needs_recovery")
}

#[test]
fn a_guest_is_frozen_for_the_start_call_only() {
    let mut rig = Rig::start();
    let (vm, guest) = start_with_files(&rig);
    assert_eq!(
        rig.observe(&vm).agent,
        highwater_hypervisor::Agent::Connected
    );
    for (wish, consistency) in [
        (Quiesce::Require, Consistency::Filesystem),
        (Quiesce::Off, Consistency::Crash),
        (Quiesce::Try, Consistency::Filesystem),
    ] {
        guest.run("echo high > /data/water").unwrap();
        let order = quiesced(&mut rig, &vm, wish);
        let begun = rig.driver.begin(&order).unwrap();
        assert_eq!(
            (begun.consistency, begun.warnings.len()),
            (consistency, 0),
            "{begun:?}"
        );
        assert_eq!(begun.frozen_ms.is_some(), wish != Quiesce::Off);
        assert!(!guest.is_frozen().unwrap());
        guest.run("echo low > /data/water && sync").unwrap();
        let image = read_export(&begun.exports[0], &rig.lab.path("read.raw"));
        assert_eq!(
            needs_recovery(&image),
            consistency == Consistency::Crash,
            "{wish:?}"
        );
        rig.driver.end(&order).unwrap();
        rig.remove(&vm, &order.new_mark.unwrap().name);
    }
}

#[test]
fn only_the_file_systems_asked_for_are_frozen() {
    let mut rig = Rig::start();
    let (vm, guest) = start_with_files(&rig);
    let mut order = quiesced(&mut rig, &vm, Quiesce::Require);
    order.freeze_mountpoints = vec!["/data".into()];
    assert_eq!(
        rig.driver.begin(&order).unwrap().consistency,
        Consistency::Filesystem
    );
    rig.driver.end(&order).unwrap();
    let mut order = quiesced(&mut rig, &vm, Quiesce::Require);
    order.freeze_mountpoints = vec!["/nowhere".into()];
    assert_eq!(
        rig.driver.begin(&order).unwrap_err().kind,
        ErrorKind::CannotFreeze
    );
    assert!(!guest.is_frozen().unwrap());
    assert!(!order.socket_dir.exists() && rig.observe(&vm).job.is_none());
}

#[test]
fn an_agent_that_hangs_costs_seconds_and_consistency_but_no_backup() {
    let mut rig = Rig::start();
    let (vm, guest) = start_with_files(&rig);
    guest.run("kill -STOP $(pidof qemu-ga)").unwrap();
    let since = Instant::now();
    let order = quiesced(&mut rig, &vm, Quiesce::Try);
    let begun = rig.driver.begin(&order).unwrap();
    assert_eq!(
        (begun.consistency, begun.warnings.len()),
        (Consistency::Crash, 1),
        "{begun:?}"
    );
    assert_eq!(rig.observe(&vm).job, Some(JobFacts::Ours(order.session)));
    rig.driver.end(&order).unwrap();
    let order = quiesced(&mut rig, &vm, Quiesce::Require);
    assert_eq!(
        rig.driver.begin(&order).unwrap_err().kind,
        ErrorKind::CannotFreeze
    );
    assert!(
        since.elapsed() < Duration::from_secs(25),
        "{:?}",
        since.elapsed()
    );
    assert!(!order.socket_dir.exists() && rig.observe(&vm).job.is_none());
    guest
        .run("kill -CONT $(pidof qemu-ga); echo still > /data/water; sync")
        .unwrap();
}

#[test]
fn a_guest_that_somebody_else_froze_stays_frozen() {
    let mut rig = Rig::start();
    let (vm, guest) = start_with_files(&rig);
    guest
        .agent(r#"{"execute":"guest-fsfreeze-freeze"}"#)
        .unwrap();
    let order = quiesced(&mut rig, &vm, Quiesce::Require);
    assert_eq!(
        rig.driver.begin(&order).unwrap().consistency,
        Consistency::Filesystem
    );
    rig.driver.end(&order).unwrap();
    assert!(guest.is_frozen().unwrap());
    guest.agent(r#"{"execute":"guest-fsfreeze-thaw"}"#).unwrap();
}

#[test]
fn a_begin_that_fails_leaves_the_guest_thawed() {
    let mut rig = Rig::start();
    let (vm, guest) = start_with_files(&rig);
    let unknown = mark_name();
    let mut order = rig.order(&vm, &[("vda", Some(&unknown))]);
    order.quiesce = Quiesce::Require;
    assert_eq!(
        rig.driver.begin(&order).unwrap_err().kind,
        ErrorKind::UnknownMark
    );
    assert!(!guest.is_frozen().unwrap());
    assert_only_marks(&rig, &vm, &order, &[]);
}

fn wait_for_state(rig: &mut Rig, vm: &Vm, state: RunState) {
    let since = Instant::now();
    while rig.observe(vm).run_state != state {
        assert!(
            since.elapsed() < Duration::from_mins(1),
            "never became {state:?}"
        );
    }
}

#[test]
fn a_full_scratch_file_stops_the_guest_and_the_end_lets_it_go_on_without_a_lost_write() {
    let space = SmallSpace::mount("6M");
    let mut rig = Rig::start();
    let source = rig.lab.path("source.raw");
    let block = |at: u64| vec![u8::try_from(at % 251).unwrap(); 4096];
    std::fs::write(
        &source,
        (0..16 * MIB / 4096).flat_map(block).collect::<Vec<u8>>(),
    )
    .unwrap();
    let vm = rig
        .lab
        .vm("web01")
        .disk(DiskSpec::existing("vda", &source, "raw"))
        .disk(DiskSpec::qcow2("vdb", 16 * MIB))
        .guest()
        .start()
        .unwrap();
    let guest = vm.guest().unwrap();
    vm.write("vdb", "write -P 1 0 16M").unwrap();
    let mut order = rig.order(&vm, &[("vdb", None)]);
    order.scratch_dir = space.path().join("session");
    rig.driver.begin(&order).unwrap();
    guest
        .run("dd if=/dev/vda of=/dev/vdb bs=64k oflag=direct >/dev/null 2>&1 &")
        .unwrap();
    wait_for_state(&mut rig, &vm, RunState::PausedOnError);
    let error = rig.driver.check(&order.vm, order.session).unwrap_err();
    assert_eq!(error.kind, ErrorKind::SessionLost);
    assert!(error.because[0].contains("virtio-disk1"), "{error:?}");

    // The session's own process may be the one that died.
    let ended = rig
        .stranger()
        .end_leftover(&order.vm, order.session)
        .unwrap();
    assert!(ended.ended_job && ended.warnings.len() == 1, "{ended:?}");
    assert_eq!(rig.observe(&vm).run_state, RunState::Running);
    guest
        .run("while pidof dd >/dev/null; do usleep 10000; done")
        .unwrap();
    vm.flush("vdb").unwrap();
    compare_images(&source, &vm.image("vdb")).unwrap();
    let mark = order.new_mark.as_ref().unwrap().name.clone();
    assert_only_marks(&rig, &vm, &order, &[&mark]);
}

#[test]
fn a_guest_that_an_io_error_had_stopped_before_is_not_let_go_on() {
    let space = SmallSpace::mount("6M");
    let mut rig = Rig::start();
    let full = space.path().join("vdb.qcow2");
    tool("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&full)
        .arg("16M")
        .run()
        .unwrap();
    let vm = rig
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", MIB))
        .disk(DiskSpec::existing("vdb", &full, "qcow2"))
        .guest()
        .start()
        .unwrap();
    let guest = vm.guest().unwrap();
    guest
        .run("yes | dd of=/dev/vdb bs=64k count=160 iflag=fullblock oflag=direct >/dev/null 2>&1 &")
        .unwrap();
    wait_for_state(&mut rig, &vm, RunState::PausedOnError);
    let order = rig.order(&vm, &[("vda", None)]);
    assert_eq!(
        rig.driver.begin(&order).unwrap().consistency,
        Consistency::Paused
    );
    rig.driver.check(&order.vm, order.session).unwrap();
    // The driver that ends it need not be the one that began it.
    let ended = rig.stranger().end(&order).unwrap();
    assert!(ended.ended_job && ended.warnings.is_empty(), "{ended:?}");
    assert_eq!(rig.observe(&vm).run_state, RunState::PausedOnError);
}
