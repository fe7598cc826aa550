//! Sessions at a VM without libvirt whose guest is a real one.
#![allow(
    clippy::disallowed_methods,
    reason = "files of a lab die with the test: nothing here must be durable"
)]
#![allow(
    clippy::unwrap_used,
    reason = "what a helper of a test cannot do fails the test, with the error and the line"
)]

#[expect(dead_code, reason = "some of it is for other tests")]
#[path = "qmp_session/hook.rs"]
mod hook;
#[expect(dead_code, reason = "some of it is for other tests")]
#[path = "reading/mod.rs"]
mod reading;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use highwater_drivers::qmp::QmpDriver;
use highwater_hypervisor::{
    BeginOrder, Begun, Consistency, DiskOrder, Driver as _, MarkOrder, NewMark, Quiesce, ReadMode,
    WhenStarted,
};
use highwater_model::step::Step;
use highwater_model::{Clock as _, MarkName, Nonce, SessionId, SystemClock};
use highwater_testkit::{
    BareBuilder, BareLab, BareVm, DiskSpec, Guest, LatencyWriter, MIB, NumberedWriter, Numbering,
    guest,
};

use hook::at_each_step;
use reading::{dirty_ranges, mark_name, read_export};

const TARGETS: [&str; 3] = ["virtio0", "virtio1", "virtio2"];
const SLOTS: u64 = 64;
const STRIDE: u64 = 64 << 10;
/// In the child: the file that says what to do.
const CHILD: &str = "HIGHWATER_TEST_DIES";

fn connect(vm: &BareVm) -> QmpDriver {
    let uri = format!("{}?agent={}", vm.uri(), vm.agent_socket().display());
    QmpDriver::connect(&uri, Arc::new(SystemClock)).unwrap()
}

fn booted(lab: &BareLab, disks: Vec<DiskSpec>) -> (BareVm, Guest) {
    let vm = lab.vm("web01").guest();
    let vm = disks.into_iter().fold(vm, BareBuilder::disk);
    let vm = vm.start().unwrap();
    let inside = vm.guest().unwrap();
    inside.wait_for_agent().unwrap();
    (vm, inside)
}

fn order(vm: &BareVm, targets: &[&str], since: Option<&MarkName>, quiesce: Quiesce) -> BeginOrder {
    let session = SessionId::random();
    let mode = || since.map_or(ReadMode::All, |mark| ReadMode::Since(mark.clone()));
    let disk = |target: &&str| DiskOrder {
        target: (*target).to_owned(),
        mode: mode(),
    };
    BeginOrder {
        vm: highwater_hypervisor::VmRef {
            name: vm.name().to_owned(),
            uuid: None,
        },
        session,
        disks: targets.iter().map(disk).collect(),
        new_mark: Some(NewMark {
            name: mark_name(),
            nonce: Nonce::random(),
            disks: targets.iter().map(|it| (*it).to_owned()).collect(),
        }),
        quiesce,
        freeze_mountpoints: Vec::new(),
        socket_dir: vm.lab().path(&format!("run/{session}")),
        scratch_dir: vm.lab().path(&format!("scratch/{session}")),
        when_started: WhenStarted::Yield,
    }
}

/// Reads a point whole, and copies what is dirty into the chain.
fn read(vm: &BareVm, begun: &Begun, chain: &mut Vec<Vec<u8>>) -> Vec<PathBuf> {
    let mut images = Vec::new();
    for (number, export) in begun.exports.iter().enumerate() {
        let to = vm.lab().path(&format!("point{number}.raw"));
        let image = read_export(export, &to);
        let whole = std::fs::read(&image).unwrap();
        match chain.get_mut(number) {
            None => chain.push(whole),
            Some(kept) => {
                for (offset, length) in dirty_ranges(export) {
                    let from = usize::try_from(offset).unwrap();
                    let range = from..from + usize::try_from(length).unwrap();
                    kept[range.clone()].copy_from_slice(&whole[range]);
                }
            }
        }
        assert!(
            chain[number] == std::fs::read(&image).unwrap(),
            "disk {number}"
        );
        images.push(image);
    }
    images
}

/// The guest writes all the time, block after block, on one disk after the
/// other. Between two disks it is given time to write more, if it can.
#[test]
fn disks_have_one_point_in_time_while_a_guest_writes_to_all_of_them() {
    let lab = BareLab::start().unwrap();
    let disks = ["vda", "vdb", "vdc"].map(|disk| DiskSpec::qcow2(disk, SLOTS * STRIDE));
    let (vm, inside) = booted(&lab, disks.into());
    let numbering = Numbering {
        slots: SLOTS,
        stride_bytes: STRIDE,
        disks: ["/dev/vda", "/dev/vdb", "/dev/vdc"]
            .map(str::to_owned)
            .into(),
    };
    let mut driver = connect(&vm);
    let writer = NumberedWriter::start(&inside, &numbering, 4).unwrap();
    at_each_step(|step| {
        if step == Step::QmpSwitched {
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    let mut parent: Option<MarkName> = None;
    let mut chain = Vec::new();
    let mut last = 0;
    for _ in 0..6 {
        let order = order(&vm, &TARGETS, parent.as_ref(), Quiesce::Off);
        let before = writer.acknowledged();
        let begun = driver.begin(&order).unwrap();
        let after = writer.granted();
        let images = read(&vm, &begun, &mut chain);
        let images: Vec<_> = images.iter().map(PathBuf::as_path).collect();
        let point = numbering.check_prefix(&images, before, after).unwrap();
        assert!(point > last, "the guest wrote nothing");
        last = point;
        driver.end(&order).unwrap();
        let mark = order.new_mark.unwrap().name;
        if let Some(old) = parent.replace(mark) {
            driver.mark(&order.vm, &MarkOrder::Remove(old)).unwrap();
        }
    }
    let written = writer.stop().unwrap();
    assert!(written > last);
    assert_eq!(vm.state().unwrap(), "running");
}

#[test]
fn a_guest_waits_no_longer_for_a_write_than_the_disks_take_to_be_switched() {
    let lab = BareLab::start().unwrap();
    let disks = ["vda", "vdb", "vdc"].map(|disk| DiskSpec::qcow2(disk, 64 * MIB));
    let (vm, inside) = booted(&lab, disks.into());
    let mut driver = connect(&vm);
    let quiet = LatencyWriter::start(&inside, 1, "/dev/vda", 64 * MIB).unwrap();
    std::thread::sleep(Duration::from_secs(2));
    let quiet = quiet.stop(&inside).unwrap();
    let busy = LatencyWriter::start(&inside, 2, "/dev/vda", 64 * MIB).unwrap();
    let mut stopped_us = Vec::new();
    for _ in 0..8 {
        let order = order(&vm, &TARGETS, None, Quiesce::Off);
        let begun = driver.begin(&order).unwrap();
        stopped_us.extend(begun.stopped_us);
        driver.end(&order).unwrap();
        let mark = order.new_mark.unwrap().name;
        driver.mark(&order.vm, &MarkOrder::Remove(mark)).unwrap();
    }
    let busy = busy.stop(&inside).unwrap();
    let told = format!("quiet: {quiet}; with 8 sessions: {busy}; stopped for {stopped_us:?} us");
    assert_eq!(stopped_us.len(), 8);
    assert!(busy.longest < Duration::from_secs(1), "{told}");
    assert!(stopped_us.iter().all(|it| *it < 500_000), "{told}");
}

#[test]
fn a_guest_that_a_killed_session_left_frozen_and_stopped_runs_and_is_thawed() {
    if let Some(file) = std::env::var_os(CHILD) {
        let (uri, order, word): (String, BeginOrder, String) =
            serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        at_each_step(move |step| {
            if step.word() == word {
                let me = rustix::process::getpid();
                rustix::process::kill_process(me, rustix::process::Signal::KILL).unwrap();
            }
        });
        let mut driver = QmpDriver::connect(&uri, Arc::new(SystemClock)).unwrap();
        driver.begin(&order).unwrap();
        return;
    }
    let lab = BareLab::start().unwrap();
    guest::make_ext4(&lab.path("files.raw"), 16 * MIB).unwrap();
    let files = DiskSpec::existing("vda", &lab.path("files.raw"), "raw");
    let (vm, inside) = booted(&lab, vec![files, DiskSpec::qcow2("vdb", 16 * MIB)]);
    let tidy = vm.graph().unwrap();
    let uri = format!("{}?agent={}", vm.uri(), vm.agent_socket().display());
    for word in ["frozen", "qmp-stopped", "qmp-switched", "qmp-resumed"] {
        let order = order(&vm, &TARGETS[..2], None, Quiesce::Require);
        let file = lab.path("errand.json");
        std::fs::write(&file, serde_json::to_vec(&(&uri, &order, word)).unwrap()).unwrap();
        let died = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", std::thread::current().name().unwrap()])
            .env(CHILD, file)
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(!died.success(), "{word} was not passed");
        let stopped = vm.state().unwrap() != "running";
        assert_eq!(stopped, word == "qmp-stopped" || word == "qmp-switched");
        let mut driver = connect(&vm);
        let places = ["run", "scratch"].map(|place| lab.path(place));
        let swept = driver.sweep(&order.vm, &places).unwrap();
        let told = |what: &str| swept.warnings.iter().any(|it| it.contains(what));
        assert!(told("left frozen"), "{word}: {swept:?}");
        assert_eq!(told("left stopped"), stopped, "{word}: {swept:?}");
        assert!(!inside.is_frozen().unwrap(), "{word}");
        let mark = order.new_mark.unwrap().name;
        driver.mark(&order.vm, &MarkOrder::Remove(mark)).unwrap();
        assert_eq!(vm.graph().unwrap(), tidy, "{word}");
    }
    let mut driver = connect(&vm);
    let order = order(&vm, &TARGETS[..2], None, Quiesce::Require);
    let since = SystemClock.now();
    let begun = driver.begin(&order).unwrap();
    assert_eq!(begun.consistency, Consistency::Filesystem);
    assert!(begun.taken_at >= since);
    assert!(begun.frozen_ms.is_some_and(|ms| ms < 5000), "{begun:?}");
    assert!(!inside.is_frozen().unwrap());
    driver.end(&order).unwrap();
}
