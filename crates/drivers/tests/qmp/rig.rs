//! Drivers and facts of a VM.

use std::path::Path;
use std::sync::Arc;

use highwater_drivers::qmp::QmpDriver;
use highwater_hypervisor::{DiskFacts, Driver as _, HypervisorError, VmFacts};
use highwater_model::{MarkName, PointId, RepoId, SystemClock, Timestamp};
use highwater_testkit::BareVm;
use serde_json::json;

pub(crate) fn connect(uri: &str) -> Result<QmpDriver, HypervisorError> {
    QmpDriver::connect(uri, Arc::new(SystemClock))
}

/// A driver at the monitor that is for the program.
pub(crate) fn driver(vm: &BareVm) -> QmpDriver {
    connect(&vm.uri()).unwrap()
}

/// A driver at another monitor of the same VM.
pub(crate) fn second_driver(vm: &BareVm) -> QmpDriver {
    connect(&uri_of(&vm.second_socket())).unwrap()
}

pub(crate) fn uri_of(socket: &Path) -> String {
    format!("qmp:{}", socket.display())
}

pub(crate) fn observe(driver: &mut QmpDriver) -> VmFacts {
    let vm = driver.list().unwrap().remove(0).0;
    driver.observe(&vm).unwrap()
}

pub(crate) fn disk<'a>(facts: &'a VmFacts, target: &str) -> &'a DiskFacts {
    let mut disks = facts.disks.iter();
    disks
        .find(|disk| disk.target == target)
        .unwrap_or_else(|| panic!("no disk {target} in {facts:#?}"))
}

/// The node that a disk's marks are on.
pub(crate) fn node(facts: &VmFacts, target: &str) -> String {
    disk(facts, target).chain[0].node.clone().unwrap()
}

pub(crate) fn mark(number: u8) -> MarkName {
    let point = PointId::new(Timestamp::from_unix_ms(1_700_000_000_000));
    MarkName::new(RepoId::from_bytes([number; 16]), point)
}

pub(crate) fn add_bitmap(vm: &BareVm, node: &str, name: &str) {
    let arguments = json!({"node": node, "name": name, "persistent": true});
    vm.qmp("block-dirty-bitmap-add", &arguments).unwrap();
}
