//! A guest that a failed write has stopped.

use std::path::Path;
use std::time::{Duration, Instant};

use highwater_hypervisor::{Driver as _, ErrorKind};
use highwater_testkit::{BareLab, BareVm, DiskSpec, MIB, tool};
use serde_json::json;

use crate::rig::Rig;
use crate::space::SmallSpace;

const SIZE: u64 = 8 * MIB;
/// The guest writes this much of its disk, from its begin.
const WRITTEN: u64 = 3 * MIB;
/// The sectors of one of its writes.
const SECTORS: u32 = 64;

/// A boot sector that writes itself, and what follows it in memory, to the disk
/// again and again, until it has written enough; then it halts.
fn writer() -> Vec<u8> {
    let limit = u32::try_from(WRITTEN / 512).unwrap().to_le_bytes();
    let step = SECTORS.to_le_bytes();
    let mut code = vec![0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xd0, 0xbc, 0x00, 0x7c];
    // INT 13h, AH=43h: writes what the packet at 0x7c40 says.
    code.extend([0xbe, 0x40, 0x7c, 0xb8, 0x00, 0x43, 0xb2, 0x80, 0xcd, 0x13]);
    // The packet's sector grows, and is compared with the limit.
    code.extend([0x66, 0x81, 0x06, 0x48, 0x7c]);
    code.extend(step);
    code.extend([0x66, 0x81, 0x3e, 0x48, 0x7c]);
    code.extend(limit);
    code.extend([0x72, 0xe2, 0xf4, 0xeb, 0xfd]);
    code.resize(0x40, 0);
    code.extend([0x10, 0, step[0], 0, 0x00, 0x7c, 0, 0]);
    code.resize(512, 0);
    code[510..].copy_from_slice(&[0x55, 0xaa]);
    code
}

/// A guest that has not begun to run. The first 2 MiB of its image are there.
fn guest(lab: &BareLab, space: &Path) -> Rig {
    let image = space.join("disk.qcow2");
    let create = tool("qemu-img").args(["create", "-q", "-f", "qcow2"]);
    create.arg(&image).arg(SIZE.to_string()).run().unwrap();
    let disk = DiskSpec::existing("vda", &image, "qcow2");
    let vm = lab.vm("web01").disk(disk).prelaunch().start().unwrap();
    vm.write("vda", "write -P 1 0 2M").unwrap();
    let sector = lab.path("sector");
    std::fs::write(&sector, writer()).unwrap();
    let write = format!("write -s {} 0 512", sector.display());
    vm.write("vda", &write).unwrap();
    vm.flush("vda").unwrap();
    Rig::at(vm)
}

fn run_until(vm: &BareVm, is_there: impl Fn(&BareVm) -> bool) {
    let since = Instant::now();
    while !is_there(vm) {
        let waited = since.elapsed();
        assert!(waited < Duration::from_mins(1), "{}", vm.state().unwrap());
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn is_stopped(vm: &BareVm) -> bool {
    vm.state().unwrap() == "io-error"
}

/// Returns whether the guest has written all that it writes.
fn has_written(vm: &BareVm) -> bool {
    let last = WRITTEN - u64::from(SECTORS) * 512;
    let copy = vm.lab().path("seen.raw");
    vm.raw_copy("vda", &copy).unwrap();
    let seen = std::fs::read(copy).unwrap();
    let last = usize::try_from(last).unwrap();
    // What follows tells where it was to be written.
    seen[last..last + 0x40] == writer()[..0x40]
}

#[test]
fn a_guest_that_stands_because_the_scratch_file_took_its_room_runs_again() {
    let small = SmallSpace::mount("5m");
    let lab = BareLab::start().unwrap();
    let mut rig = guest(&lab, small.path());
    let target = target(&mut rig);
    let mut order = rig.order(&[(target.as_str(), None)]);
    order.scratch_dir = small.path().join(order.session.to_string());
    rig.driver.begin(&order).unwrap();
    rig.driver.check(&order.vm, order.session).unwrap();
    rig.vm.qmp("cont", &json!({})).unwrap();
    run_until(&rig.vm, is_stopped);
    let error = rig.driver.check(&order.vm, order.session).unwrap_err();
    assert_eq!(error.kind, ErrorKind::SessionLost, "{error:?}");
    let ended = rig.driver.end(&order).unwrap();
    assert!(ended.warnings.join(" ").contains("runs again"), "{ended:?}");
    run_until(&rig.vm, has_written);
    assert_eq!(rig.vm.state().unwrap(), "running");
    rig.assert_no_files();
}

#[test]
fn a_guest_that_stood_before_the_session_stands_after_it() {
    let small = SmallSpace::mount("3m");
    let lab = BareLab::start().unwrap();
    let mut rig = guest(&lab, small.path());
    let target = target(&mut rig);
    rig.vm.qmp("cont", &json!({})).unwrap();
    run_until(&rig.vm, is_stopped);
    let order = rig.order(&[(target.as_str(), None)]);
    rig.driver.begin(&order).unwrap();
    rig.driver.check(&order.vm, order.session).unwrap();
    let ended = rig.driver.end(&order).unwrap();
    assert!(ended.warnings.is_empty(), "{ended:?}");
    assert!(is_stopped(&rig.vm));
    rig.assert_no_files();
}

fn target(rig: &mut Rig) -> String {
    let facts = rig.driver.observe(&rig.found.clone()).unwrap();
    facts.disks[0].target.clone()
}
