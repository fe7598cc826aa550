//! What others have in QEMU stays as it is.

use highwater_hypervisor::{Driver as _, ErrorKind};
use highwater_testkit::{Attach, BareLab, DiskSpec, MIB, tool};
use serde_json::{Value, json};

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
