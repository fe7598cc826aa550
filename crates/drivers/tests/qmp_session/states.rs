//! How the guest runs is given back exactly as it was found.

use std::time::{Duration, Instant};

use highwater_hypervisor::{Consistency, Driver as _, ErrorKind};
use highwater_model::step::Step;
use highwater_testkit::{BareLab, BareVm, DiskSpec, MIB};
use serde_json::json;

use crate::hook::{at_each_step, at_no_step};
use crate::reading::read_export;
use crate::rig::Rig;

const SIZE: u64 = 8 * MIB;

/// Has the firmware boot a guest of three instructions, which asks the machine
/// to sleep: PM1a_CNT (0x604 as SeaBIOS sets it), SLP_TYP 1, SLP_EN.
fn put_to_sleep(vm: &BareVm) {
    let mut sector = vec![0_u8; 512];
    let code = [0xba, 0x04, 0x06, 0xb8, 0x00, 0x24, 0xef, 0xf4, 0xeb, 0xfd];
    sector[..code.len()].copy_from_slice(&code);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    let file = vm.lab().path("sector");
    std::fs::write(&file, sector).unwrap();
    vm.write("vda", &format!("write -s {} 0 512", file.display()))
        .unwrap();
    vm.qmp("cont", &json!({})).unwrap();
    let since = Instant::now();
    while vm.state().unwrap() != "suspended" {
        assert!(
            since.elapsed() < Duration::from_mins(1),
            "{}",
            vm.state().unwrap()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn two_disks(lab: &BareLab) -> highwater_testkit::BareBuilder {
    let builder = lab.vm("web01").disk(DiskSpec::qcow2("vda", SIZE));
    builder.disk(DiskSpec::qcow2("vdb", SIZE))
}

/// Backs the two disks up, and begins once more in vain.
fn keeps(vm: BareVm, state: &str, consistency: Consistency) {
    let mut rig = Rig::at(vm);
    assert_eq!(rig.vm.state().unwrap(), state);
    let before = rig.vm.graph().unwrap().without_bitmaps();
    let names: Vec<String> = {
        let facts = rig.driver.observe(&rig.found.clone()).unwrap();
        facts.disks.iter().map(|disk| disk.target.clone()).collect()
    };
    let disks: Vec<_> = names.iter().map(|name| (name.as_str(), None)).collect();
    let order = rig.order(&disks);
    let begun = rig.driver.begin(&order).unwrap();
    assert_eq!(begun.consistency, consistency, "{state}");
    assert_eq!(begun.stopped_us.is_some(), state == "running");
    assert_eq!(rig.vm.state().unwrap(), state);
    for export in &begun.exports {
        read_export(export, &rig.lab().path("read.raw"));
    }
    // Another one finds the server taken, after it has made all its files.
    let second = rig.order(&disks);
    let error = rig.driver.begin(&second).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Busy, "{error:?}");
    assert!(!error.left_behind, "{error:?}");
    rig.driver.check(&order.vm, order.session).unwrap();
    rig.driver.end(&order).unwrap();
    assert_eq!(rig.vm.graph().unwrap().without_bitmaps(), before);
    rig.assert_no_files();
}

#[test]
fn a_guest_is_given_back_in_the_state_it_was_found_in() {
    let lab = BareLab::start().unwrap();
    keeps(
        two_disks(&lab).start().unwrap(),
        "running",
        Consistency::Crash,
    );
    keeps(
        two_disks(&lab).prelaunch().start().unwrap(),
        "prelaunch",
        Consistency::Paused,
    );
    let paused = two_disks(&lab).start().unwrap();
    paused.qmp("stop", &json!({})).unwrap();
    keeps(paused, "paused", Consistency::Paused);
    let asleep = two_disks(&lab).prelaunch().start().unwrap();
    put_to_sleep(&asleep);
    keeps(asleep, "suspended", Consistency::Paused);
}

#[test]
fn a_vm_that_waits_for_its_migration_is_refused_and_left_as_it_is() {
    let lab = BareLab::start().unwrap();
    let mut rig = Rig::at(two_disks(&lab).incoming().start().unwrap());
    let before = rig.vm.graph().unwrap();
    assert_eq!(before.state, "inmigrate");
    let order = rig.order(&[("virtio0", None)]);
    let error = rig.driver.begin(&order).unwrap_err();
    assert_eq!(error.kind, ErrorKind::WrongState, "{error:?}");
    assert_eq!(rig.vm.graph().unwrap(), before);
    rig.assert_no_files();
}

/// Lets a guest that was found paused run, or run for a moment, at a step, and
/// returns what became of the start.
fn continued(
    builder: highwater_testkit::BareBuilder,
    at: Step,
    commands: &'static [&'static str],
) -> (Rig, Result<Consistency, ErrorKind>) {
    let mut rig = Rig::at(builder.prelaunch().start().unwrap());
    let before = rig.vm.graph().unwrap().without_bitmaps();
    let names: Vec<String> = {
        let facts = rig.driver.observe(&rig.found.clone()).unwrap();
        facts.disks.iter().map(|disk| disk.target.clone()).collect()
    };
    let disks: Vec<_> = names.iter().map(|name| (name.as_str(), None)).collect();
    let order = rig.order(&disks);
    let monitor = rig.vm.second_socket();
    let mut is_done = false;
    at_each_step(move |step| {
        if step == at && !is_done {
            is_done = true;
            for command in commands {
                say(&monitor, command);
            }
        }
    });
    let begun = rig.driver.begin(&order);
    at_no_step();
    let outcome = match begun {
        Ok(begun) => {
            rig.driver.end(&order).unwrap();
            Ok(begun.consistency)
        }
        Err(error) => {
            assert!(!error.left_behind, "{error:?}");
            Err(error.kind)
        }
    };
    let after = rig.vm.graph().unwrap().without_bitmaps();
    assert_eq!((after.nodes, after.roots), (before.nodes, before.roots));
    rig.assert_no_files();
    (rig, outcome)
}

/// Says one command at the VM's other monitor.
fn say(monitor: &std::path::Path, command: &str) {
    use std::io::{BufRead as _, BufReader, Write as _};
    let stream = std::os::unix::net::UnixStream::connect(monitor).unwrap();
    let mut lines = BufReader::new(&stream).lines();
    let mut answered = || {
        let lines = lines.by_ref();
        lines.find(|line| line.as_ref().unwrap().contains(r#""return""#))
    };
    for command in ["qmp_capabilities", command] {
        writeln!(&stream, r#"{{"execute":"{command}"}}"#).unwrap();
        answered().unwrap().unwrap();
    }
}

#[test]
fn a_guest_that_runs_before_its_disks_are_switched_was_not_paused() {
    let lab = BareLab::start().unwrap();
    let one = || lab.vm("web01").disk(DiskSpec::qcow2("vda", SIZE));
    for builder in [one(), two_disks(&lab)] {
        let (rig, outcome) = continued(builder, Step::QmpFilterAdded, &["cont"]);
        assert_eq!(outcome, Err(ErrorKind::WrongState));
        assert_eq!(rig.vm.state().unwrap(), "running");
    }
    // It ran while its disks were switched, and is as it was found again.
    let run_for_a_moment = |builder| continued(builder, Step::QmpSwitched, &["cont", "stop"]).1;
    assert_eq!(run_for_a_moment(one()), Ok(Consistency::Crash));
    let outcome = run_for_a_moment(two_disks(&lab));
    assert_eq!(outcome, Err(ErrorKind::WrongState));
}
