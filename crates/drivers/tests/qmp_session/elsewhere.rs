//! A QEMU of which nothing is seen but its monitor and its files.

use std::sync::Arc;

use highwater_drivers::qmp::QmpDriver;
use highwater_hypervisor::Driver as _;
use highwater_model::SystemClock;
use highwater_testkit::{BareLab, DiskSpec, MIB, tool};

use crate::reading::read_export;
use crate::rig::Rig;

/// Set where this program runs in namespaces of its own: where QEMU is.
const MONITOR: &str = "HIGHWATER_TEST_MONITOR";

#[test]
fn the_server_of_a_qemu_that_cannot_be_seen_is_stopped_all_the_same() {
    let lab = BareLab::start().unwrap();
    let vm = lab.vm("web01").disk(DiskSpec::qcow2("vda", 8 * MIB));
    if let Ok(monitor) = std::env::var(MONITOR) {
        let mut driver = QmpDriver::connect(&monitor, Arc::new(SystemClock)).unwrap();
        let found = driver.find("web01").unwrap();
        let vm = vm.create().unwrap();
        return back_up_again_and_again(&mut Rig { driver, vm, found });
    }
    let vm = vm.start().unwrap();
    let name = std::thread::current().name().unwrap().to_owned();
    tool("unshare")
        .args(["--pid", "--net", "--fork", "--mount-proc", "--kill-child"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &name, "--nocapture"])
        .env(MONITOR, vm.uri())
        .run()
        .unwrap();
}

fn back_up_again_and_again(rig: &mut Rig) {
    let facts = rig.driver.observe(&rig.found.clone()).unwrap();
    assert_eq!(facts.process, None, "it can be seen");
    let target = facts.disks[0].target.clone();
    let disks = [(target.as_str(), None)];
    let order = rig.order(&disks);
    let begun = rig.driver.begin(&order).unwrap();
    read_export(&begun.exports[0], &rig.lab().path("read.raw"));
    let ended = rig.driver.end(&order).unwrap();
    assert_eq!(ended.warnings, Vec::<String>::new());
    let order = rig.order(&disks);
    rig.driver.begin(&order).unwrap();
    rig.driver.sweep(&order.vm, &rig.places()).unwrap();
    let order = rig.order(&disks);
    rig.driver.begin(&order).unwrap();
    rig.driver.end_leftover(&order.vm, order.session).unwrap();
    let order = rig.order(&disks);
    rig.driver.begin(&order).unwrap();
    rig.driver.end(&order).unwrap();
    rig.assert_no_files();
}
