//! Which VM is behind a monitor, and what if it is somebody else's, or gone.

use std::io::Read as _;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use highwater_hypervisor::{Driver as _, ErrorKind, RunState};
use highwater_testkit::{BareLab, DiskSpec, MIB};

use crate::rig::{connect, driver, observe, second_driver, uri_of};

const UUID: &str = "6f0ab0f5-1111-2222-3333-444444444444";

#[test]
fn a_vm_is_called_what_qemu_calls_it_or_what_the_uri_does() {
    let lab = BareLab::start().unwrap();
    let vm = lab.vm("web01").uuid(UUID).prelaunch().start().unwrap();
    let mut own = driver(&vm);
    let found = own.find("web01").unwrap();
    assert_eq!(found.uuid.as_deref(), Some(UUID));
    assert_eq!(own.find(&UUID.to_uppercase()).unwrap(), found);
    assert_eq!(own.list().unwrap(), [(found, RunState::Paused)]);
    assert_eq!(own.find("web02").unwrap_err().kind, ErrorKind::NoSuchVm);
    drop(own);
    let mut named = connect(&format!("{}?name=other", uri_of(&vm.qmp_socket()))).unwrap();
    assert!(named.find("other").is_ok());
    assert!(named.find("web01").is_err());
}

#[test]
fn a_vm_without_name_and_uuid_has_to_be_named() {
    let lab = BareLab::start().unwrap();
    let vm = lab.vm("nameless").nameless().prelaunch().start().unwrap();
    let error = connect(&uri_of(&vm.qmp_socket())).unwrap().list();
    let error = error.unwrap_err();
    assert!(error.hint.unwrap().contains("--name"));
    let mut named = connect(&format!("{}?name=web01", uri_of(&vm.qmp_socket()))).unwrap();
    assert_eq!(named.find("web01").unwrap().uuid, None);
}

#[test]
fn a_monitor_that_somebody_holds_is_busy_and_it_is_said_who() {
    let lab = BareLab::start().unwrap();
    let vm = lab.vm("web01").prelaunch().start().unwrap();
    let _holder = driver(&vm);
    let error = connect(&vm.uri()).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Busy, "{error:?}");
    let holder = format!("process {}", std::process::id());
    assert!(error.because[0].contains(&holder), "{error:?}");
    assert!(connect(&uri_of(&vm.second_socket())).is_ok());
}

#[test]
fn the_process_is_known_whichever_way_its_monitor_is_reached() {
    let lab = BareLab::start().unwrap();
    let vm = lab.vm("web01").tcp().prelaunch().start().unwrap();
    for uri in [vm.uri(), vm.tcp_uri().unwrap()] {
        let facts = observe(&mut connect(&uri).unwrap());
        let process = facts.process.unwrap_or_else(|| panic!("unknown at {uri}"));
        assert_eq!(process.pid, vm.pid().unwrap(), "{uri}");
        assert!(facts.definition.contains("-name web01"), "{uri}");
    }
}

#[test]
fn a_qemu_that_was_restarted_is_found_again_and_is_another_one() {
    let lab = BareLab::start().unwrap();
    let disk = DiskSpec::qcow2("vda", 16 * MIB);
    let vm = lab.vm("web01").disk(disk).prelaunch().start().unwrap();
    let mut own = driver(&vm);
    let before = observe(&mut own);
    vm.kill().unwrap();
    let gone = own.observe(&before.vm).unwrap_err();
    assert_eq!(gone.kind, ErrorKind::Unreachable, "{gone:?}");
    vm.start().unwrap();
    let after = observe(&mut own);
    assert_ne!(before.process, after.process);
    assert_eq!(before.disks[0].chain[0].name, after.disks[0].chain[0].name);
    drop(second_driver(&vm));
}

#[test]
fn another_vm_at_the_same_socket_is_not_taken_for_the_one_that_was_there() {
    let lab = BareLab::start().unwrap();
    let vm = lab.vm("web01").uuid(UUID).prelaunch().start().unwrap();
    let mut own = driver(&vm);
    let mut other = own.find("web01").unwrap();
    assert!(own.observe(&other).is_ok());
    other.uuid = Some(UUID.replace('6', "7"));
    let error = own.observe(&other).unwrap_err();
    assert_eq!(error.kind, ErrorKind::NoSuchVm);
}

/// A guard that tidies up after a backup that was killed needs a moment.
#[test]
fn a_guard_of_ours_is_waited_for_until_it_lets_go_of_the_monitor() {
    let lab = BareLab::start().unwrap();
    let vm = lab.vm("web01").prelaunch().start().unwrap();
    let mut monitor = UnixStream::connect(vm.qmp_socket()).unwrap();
    // Greeted: it is served, and not only waiting.
    assert_ne!(monitor.read(&mut [0; 4096]).unwrap(), 0);
    let mut guard = Command::new("sleep")
        .arg0("/usr/bin/highwater-guard")
        .arg("10")
        .stdin(OwnedFd::from(monitor))
        .spawn()
        .unwrap();
    let since = Instant::now();
    let connected = connect(&vm.uri());
    guard.wait().unwrap();
    assert!(connected.is_ok(), "{connected:?}");
    assert!(since.elapsed() > Duration::from_secs(8), "nobody held it");
}

/// Its peer's command line would be kept as the VM's, and its end be taken for
/// the VM's.
#[test]
fn a_proxy_before_the_monitor_is_not_taken_for_the_vm() {
    let lab = BareLab::start().unwrap();
    let disk = DiskSpec::qcow2("vda", 16 * MIB);
    let vm = lab.vm("web01").disk(disk).prelaunch().start().unwrap();
    let door = lab.path("proxy.sock");
    let listener = UnixListener::bind(&door).unwrap();
    let monitor = vm.qmp_socket();
    std::thread::spawn(move || {
        let (near, _) = listener.accept().unwrap();
        let far = UnixStream::connect(monitor).unwrap();
        let (mut from, mut to) = (near.try_clone().unwrap(), far.try_clone().unwrap());
        std::thread::spawn(move || {
            let _ended = std::io::copy(&mut from, &mut to);
            let _gone = to.shutdown(Shutdown::Both);
        });
        let _ended = std::io::copy(&mut &far, &mut &near);
        let _gone = near.shutdown(Shutdown::Both);
    });
    let facts = observe(&mut connect(&uri_of(&door)).unwrap());
    assert_eq!(facts.process, None);
    let kept = &facts.definition;
    assert!(kept.contains("could not be read"), "{kept}");
    assert_eq!(facts.disks.len(), 1);
}
