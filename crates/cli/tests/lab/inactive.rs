//! A VM that was saved while it was paused, and started again without a resume:
//! its images are not yet QEMU's own, and nothing may be written to them.

use anyhow::Result;
use highwater_testkit::{DiskSpec, Vm};

use crate::support::{Bed, mode};

const MIB: u64 = 1 << 20;

/// Leaves a VM loaded and not resumed.
fn load(bed: &Bed) -> Result<()> {
    bed.lab.virsh(&["suspend", "web01"])?;
    bed.lab.virsh(&["managedsave", "web01"])?;
    bed.lab.virsh(&["start", "web01", "--paused"])?;
    Ok(())
}

fn vm(bed: &Bed) -> Result<Vm> {
    let vm = bed.lab.vm("web01").disk(DiskSpec::qcow2("vda", MIB));
    vm.disk(DiskSpec::raw("vdb", MIB)).start()
}

#[test]
fn a_vm_that_was_loaded_and_not_resumed_is_refused_before_anything_is_done_to_it() -> Result<()> {
    let bed = Bed::start()?;
    let vm = vm(&bed)?;
    bed.backup(&vm, &[])?;
    let marks = vm.checkpoints()?;
    load(&bed)?;
    let pid = vm.qemu_pid()?;
    for args in [
        &["backup", "web01"][..],
        &["backup", "web01", "--level", "full"],
    ] {
        let (code, stderr) = bed.fail(args)?;
        assert_eq!(code, 1, "{stderr}");
        assert!(stderr.contains("not resumed since"), "{stderr}");
        assert!(stderr.contains("`virsh resume web01`"), "{stderr}");
    }
    assert_eq!((vm.qemu_pid()?, vm.state()?), (pid, "paused".to_owned()));
    assert_eq!(vm.checkpoints()?, marks);
    bed.lab.virsh(&["resume", "web01"])?;
    vm.write("vda", "write -P 7 0 64k")?;
    let report = bed.backup(&vm, &[])?;
    assert_eq!(mode(&report, "vda"), "incremental", "{report}");
    bed.assert_tidy(&vm, 1)
}

#[test]
fn doctor_takes_no_mark_off_a_vm_that_was_loaded_and_not_resumed() -> Result<()> {
    let bed = Bed::start()?;
    let vm = vm(&bed)?;
    bed.backup(&vm, &[])?;
    let marks = vm.checkpoints()?;
    // Without its point the mark is one that doctor would remove.
    std::fs::remove_dir_all(bed.repo().join("points"))?;
    std::fs::create_dir(bed.repo().join("points"))?;
    load(&bed)?;
    let output = bed.output(&["doctor", "web01", "--fix"])?;
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(told.contains("not resumed since"), "{told}");
    assert_eq!((vm.checkpoints()?, vm.state()?), (marks, "paused".into()));
    bed.lab.virsh(&["resume", "web01"])?;
    bed.backup(&vm, &[])?;
    bed.assert_tidy(&vm, 1)
}

#[test]
fn a_vm_that_was_saved_paused_and_resumed_since_is_backed_up_while_it_is_paused() -> Result<()> {
    let bed = Bed::start()?;
    let vm = vm(&bed)?;
    load(&bed)?;
    bed.lab.virsh(&["resume", "web01"])?;
    bed.lab.virsh(&["suspend", "web01"])?;
    bed.backup(&vm, &[])?;
    assert_eq!(vm.state()?, "paused");
    Ok(())
}
