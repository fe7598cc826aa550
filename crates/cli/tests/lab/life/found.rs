//! What random lives have found, each as a small story of its own.

use anyhow::{Result, ensure};
use highwater_testkit::{DiskSpec, MIB, tool};

use crate::support::{Bed, mode};

/// libvirt removes no bitmap of a record as long as one of its disks has none.
#[test]
fn a_mark_below_an_overlay_is_given_up_though_another_disk_has_lost_it() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 2 * MIB))
        .disk(DiskSpec::qcow2("vdb", 2 * MIB))
        .start()?;
    bed.backup(&vm, &[])?;
    let mark = vm.checkpoints()?.remove(0);
    let (below, top) = (vm.image("vda"), bed.lab.path("web01-vda.top"));
    let xml = bed
        .lab
        .virsh(&["dumpxml", "--inactive", "--security-info", "web01"])?;
    vm.destroy()?;
    let create = tool("qemu-img").args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]);
    create.arg(&below).arg(&top).run()?;
    let remove = tool("qemu-img").args(["bitmap", "--remove"]);
    remove.arg(vm.image("vdb")).arg(&mark).run()?;
    let (from, to) = (below.to_string_lossy(), top.to_string_lossy());
    bed.lab.define(&xml.replace(&*from, &to))?;
    vm.start()?;
    let report = bed.backup(&vm, &[])?;
    ensure!(mode(&report, "vda") == "full: chain-changed", "{report}");
    ensure!(mode(&report, "vdb") == "rescan: bitmap-missing", "{report}");
    ensure!(report["warnings"] == serde_json::json!([]), "{report}");
    let left = vm.bitmaps_everywhere()?;
    ensure!(left.iter().all(|it| it.bitmap.name != mark), "{left:?}");
    bed.assert_tidy(&vm, 1)
}
