//! What others have in QEMU stays as it is.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use highwater_drivers::qmp::QmpDriver;
use highwater_hypervisor::{Claim, Claimer, Driver as _, ErrorKind, Sign, SignKind, Stance, VmRef};
use highwater_model::step::Step;
use highwater_model::{ClaimId, Clock as _, SystemClock};
use highwater_testkit::{Attach, BareLab, DiskSpec, MIB, tool};
use serde_json::{Value, json};

use crate::hook::{at_each_step, at_no_step};
use crate::rig::{Rig, mark_of};

/// A VM in which somebody else has nodes, bitmaps, objects, and names that look
/// like ours.
fn shared() -> Rig {
    let lab = BareLab::start().unwrap();
    let attach = Attach::blockdev("virtio-blk-pci").node("disk");
    let disk = DiskSpec::qcow2("vda", 8 * MIB);
    let vm = lab.vm("web01").disk_as(disk, attach).start().unwrap();
    let run = |command: &str, arguments: Value| vm.qmp(command, &arguments).unwrap();
    let image = lab.path("theirs.qcow2");
    let create = tool("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&image);
    create.arg("8M").run().unwrap();
    run(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "hw-fleece-theirs",
            "file": {"driver": "file", "filename": image}}),
    );
    run(
        "block-dirty-bitmap-add",
        json!({"node": "disk", "name": "theirs", "persistent": true}),
    );
    run(
        "block-dirty-bitmap-add",
        json!({"node": "disk", "name": "hw-theirs"}),
    );
    run(
        "object-add",
        json!({"qom-type": "throttle-group", "id": "hw-stop-0123456789ab"}),
    );
    Rig::at(vm)
}

fn serve(rig: &Rig) {
    let path = rig.lab().path("theirs.sock");
    let server = json!({"addr": {"type": "unix", "data": {"path": path}}});
    rig.vm.qmp("nbd-server-start", &server).unwrap();
    export(rig, "theirs");
}

fn export(rig: &Rig, id: &str) {
    let export = json!({"type": "nbd", "id": id, "node-name": "hw-fleece-theirs"});
    rig.vm.qmp("block-export-add", &export).unwrap();
}

#[test]
fn nothing_of_others_is_touched_by_a_session_its_failure_or_a_sweep() {
    let mut rig = shared();
    let before = rig.vm.graph().unwrap();
    let order = rig.order(&[("vda", None)]);
    rig.driver.begin(&order).unwrap();
    rig.driver.end(&order).unwrap();
    let marked = format!("disk/{}", mark_of(&order));
    let after = rig.vm.graph().unwrap();
    assert_eq!(
        after.clone().without_bitmaps(),
        before.clone().without_bitmaps()
    );
    let others = after.bitmaps.iter().filter(|it| **it != marked);
    assert_eq!(
        others.collect::<Vec<_>>(),
        before.bitmaps.iter().collect::<Vec<_>>()
    );

    serve(&rig);
    let before = rig.vm.graph().unwrap();
    let found = rig.found.clone();
    let swept = rig.driver.sweep(&found, &rig.places()).unwrap();
    assert_eq!(swept, highwater_hypervisor::Swept::default());
    let order = rig.order(&[("vda", None)]);
    let error = rig.driver.begin(&order).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Busy, "{error:?}");
    assert!(error.hint.unwrap().contains("nbd-server-stop"));
    assert!(!error.left_behind);
    assert_eq!(rig.vm.graph().unwrap(), before);
    rig.assert_no_files();
}

#[test]
fn a_server_that_somebody_else_has_begun_to_use_outlives_the_session() {
    let mut rig = shared();
    let before = rig.vm.graph().unwrap().without_bitmaps();
    let order = rig.order(&[("vda", None)]);
    rig.driver.begin(&order).unwrap();
    export(&rig, "theirs");
    let ended = rig.driver.end(&order).unwrap();
    assert_eq!(ended.warnings.len(), 1, "{ended:?}");
    let mut after = rig.vm.graph().unwrap().without_bitmaps();
    assert_eq!(after.exports, ["theirs"]);
    after.exports.clear();
    assert_eq!(after, before);
}

/// Claims the VM over this driver, and acts for the claim.
fn claim(driver: &mut QmpDriver, vm: &VmRef) -> ClaimId {
    let id = ClaimId::random();
    let claimer = Claimer {
        host: "kvm1".to_owned(),
        boot_id: "b".to_owned(),
        pid_namespace: None,
        process: std::process::id(),
        start_ticks: None,
        since: SystemClock.now(),
    };
    let claim = Claim {
        id,
        stance: Stance::Stands,
        claimer,
    };
    let mut claimant = driver.claimant(vm).unwrap().unwrap();
    claimant.set(&Sign::Claim(claim)).unwrap();
    driver.act_for(Some(id));
    id
}

/// The first one was kept from going on for so long that it was taken for dead.
#[test]
fn whoever_lost_the_vm_while_sweeping_touches_nothing_of_the_successor() {
    for at in [Step::JobSeen, Step::QmpExportsRemoved] {
        let mut rig = shared();
        let found = rig.found.clone();
        let first = claim(&mut rig.driver, &found);
        let dead = rig.order(&[("vda", None)]);
        rig.driver.begin(&dead).unwrap();
        let order = rig.order(&[("vda", None)]);
        let uri = format!("qmp:{}", rig.vm.second_socket().display());
        let second = QmpDriver::connect(&uri, Arc::new(SystemClock)).unwrap();
        let second = Rc::new(RefCell::new(second));
        let (successor, ordered) = (Rc::clone(&second), order.clone());
        let mut is_over = false;
        at_each_step(move |step| {
            if step != at || std::mem::replace(&mut is_over, true) {
                return;
            }
            let mut driver = successor.borrow_mut();
            claim(&mut driver, &ordered.vm);
            let mut claimant = driver.claimant(&ordered.vm).unwrap().unwrap();
            claimant.remove(first, SignKind::Claim).unwrap();
            driver.sweep(&ordered.vm, &[]).unwrap();
            driver.begin(&ordered).unwrap();
        });
        let error = rig.driver.sweep(&found, &rig.places()).unwrap_err();
        at_no_step();
        assert_eq!(error.kind, ErrorKind::Busy, "{error:?}");
        let mut second = second.borrow_mut();
        second.check(&order.vm, order.session).unwrap();
        let ended = second.end(&order).unwrap();
        assert_eq!((ended.ended_job, ended.warnings), (true, vec![]));
        // Nor does its end.
        assert!(!rig.driver.end(&dead).unwrap().ended_job);
    }
}
