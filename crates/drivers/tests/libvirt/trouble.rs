//! Sessions that break, and guests that must not suffer from it.

use highwater_hypervisor::{BeginOrder, Driver as _, ErrorKind};
use highwater_testkit::{DiskSpec, MIB, Vm};

use crate::rig::{Rig, SmallSpace, assert_only_marks};

#[test]
fn qemu_that_dies_ends_the_session_and_leaves_only_its_mark() {
    let mut rig = Rig::start();
    let vm = rig
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB))
        .start()
        .unwrap();
    let order = rig.order(&vm, &[("vda", None)]);
    rig.driver.begin(&order).unwrap();
    vm.kill_qemu().unwrap();
    assert_eq!(
        rig.driver.check(&order.vm, order.session).unwrap_err().kind,
        ErrorKind::SessionLost
    );
    vm.start().unwrap();
    assert_eq!(
        rig.driver.check(&order.vm, order.session).unwrap_err().kind,
        ErrorKind::SessionLost
    );
    rig.driver.end(&order).unwrap();
    let mark = order.new_mark.as_ref().unwrap().name.clone();
    assert_only_marks(&rig, &vm, &order, &[&mark]);
}

#[test]
fn a_transient_vm_that_ends_takes_nothing_of_ours_along() {
    let mut rig = Rig::start();
    let disk = DiskSpec::qcow2("vda", 16 * MIB);
    let vm = rig.lab.vm("web01").disk(disk).start_transient().unwrap();
    assert!(!rig.observe(&vm).persistent);
    let order = rig.order(&vm, &[("vda", None)]);
    rig.driver.begin(&order).unwrap();
    vm.destroy().unwrap();
    assert_eq!(
        rig.driver.check(&order.vm, order.session).unwrap_err().kind,
        ErrorKind::SessionLost
    );
    assert!(!rig.driver.end(&order).unwrap().ended_job);
    assert!(!order.socket_dir.exists() && !order.scratch_dir.exists());
}

#[test]
fn a_job_ended_by_an_admin_is_a_lost_session() {
    let mut rig = Rig::start();
    let vm = rig
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB))
        .start()
        .unwrap();
    let order = rig.order(&vm, &[("vda", None)]);
    rig.driver.begin(&order).unwrap();
    rig.lab.virsh(&["domjobabort", "web01"]).unwrap();
    assert_eq!(
        rig.driver.check(&order.vm, order.session).unwrap_err().kind,
        ErrorKind::SessionLost
    );
    assert!(!rig.driver.end(&order).unwrap().ended_job);
}

/// A VM with 16 MiB of data on `vda`, and a session whose scratch file has only
/// `size` to grow.
fn start_with_small_scratch(rig: &mut Rig, scratch: &SmallSpace) -> (Vm, BeginOrder) {
    let vm = rig
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 64 * MIB))
        .start()
        .unwrap();
    vm.write("vda", "write -P 1 0 16M").unwrap();
    let mut order = rig.order(&vm, &[("vda", None)]);
    order.scratch_dir = scratch.path().join("session");
    (vm, order)
}

#[test]
fn scratch_space_that_runs_low_is_noticed_before_the_guest_is() {
    let scratch = SmallSpace::mount("6M");
    let mut rig = Rig::start();
    let (vm, order) = start_with_small_scratch(&mut rig, &scratch);
    rig.driver.begin(&order).unwrap();
    rig.driver.check(&order.vm, order.session).unwrap();
    vm.write("vda", "write -P 2 0 5M").unwrap();
    let error = rig.driver.check(&order.vm, order.session).unwrap_err();
    assert_eq!(error.kind, ErrorKind::SessionLost);
    assert!(error.because[0].contains("free"), "{error:?}");
    assert_eq!(vm.state().unwrap(), "running");
    rig.driver.end(&order).unwrap();
    let mark = order.new_mark.as_ref().unwrap().name.clone();
    assert_only_marks(&rig, &vm, &order, &[&mark]);
}

#[test]
fn too_little_scratch_space_is_refused_before_the_guest_is_touched() {
    let scratch = SmallSpace::mount("2M");
    let mut rig = Rig::start();
    let (vm, order) = start_with_small_scratch(&mut rig, &scratch);
    let error = rig.driver.begin(&order).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Scratch);
    assert!(error.hint.unwrap().contains("--scratch-dir"));
    assert_only_marks(&rig, &vm, &order, &[]);
}
