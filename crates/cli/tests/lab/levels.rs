//! What each level reads, and what it does to the mark.

use anyhow::Result;
use highwater_testkit::{DiskSpec, Vm};

use crate::support::{Bed, assert_same, disk, mode, point, reference};

const MIB: u64 = 1 << 20;

fn vm(bed: &Bed) -> Result<Vm> {
    bed.lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 32 * MIB))
        .start()
}

#[test]
fn a_differential_and_a_copy_leave_the_mark_where_it_is() -> Result<()> {
    let bed = Bed::start()?;
    let vm = vm(&bed)?;
    vm.write("vda", "write -P 1 0 1M")?;
    bed.backup(&vm, &[])?;
    let marks = vm.checkpoints()?;
    vm.write("vda", "write -P 2 1M 64k")?;
    let differential = bed.backup(&vm, &["-l", "differential"])?;
    assert_eq!(mode(&differential, "vda"), "differential");
    assert_eq!(disk(&differential, "vda")["dirty_bytes"], 64 << 10);
    let after_differential = reference(&bed, &vm, "vda", "ref-1")?;
    vm.write("vda", "write -P 3 2M 64k")?;
    let copy = bed.backup(&vm, &["-l", "copy"])?;
    assert_eq!(mode(&copy, "vda"), "copy");
    assert_eq!(vm.checkpoints()?, marks);
    vm.write("vda", "write -P 4 3M 64k")?;
    // Everything since the full: the two above and this one.
    let incremental = bed.backup(&vm, &["-l", "incremental"])?;
    assert_eq!(mode(&incremental, "vda"), "incremental");
    assert_eq!(disk(&incremental, "vda")["dirty_bytes"], 3 * (64 << 10));
    let now = reference(&bed, &vm, "vda", "ref-2")?;
    let first = bed.restore(&point(&differential), "out-1", &[])?;
    assert_same(&after_differential, &first.join("vda.qcow2"))?;
    let second = bed.restore(&point(&incremental), "out-2", &[])?;
    assert_same(&now, &second.join("vda.qcow2"))?;
    bed.assert_tidy(&vm, 1)
}

#[test]
fn a_full_reads_everything_stores_nothing_twice_and_moves_the_mark() -> Result<()> {
    let bed = Bed::start()?;
    let vm = vm(&bed)?;
    vm.write("vda", "write -P 1 0 8M")?;
    bed.backup(&vm, &[])?;
    let before = vm.checkpoints()?;
    let full = bed.backup(&vm, &["-l", "full"])?;
    assert_eq!(mode(&full, "vda"), "full");
    assert_eq!(disk(&full, "vda")["read_bytes"], 8 * MIB);
    assert_eq!(disk(&full, "vda")["stored_bytes"], 0);
    assert_ne!(vm.checkpoints()?, before);
    bed.assert_tidy(&vm, 1)
}

#[test]
fn an_incremental_that_is_not_possible_is_refused_and_leaves_nothing() -> Result<()> {
    let bed = Bed::start()?;
    let vm = vm(&bed)?;
    let (code, stderr) = bed.fail(&["backup", "web01", "-l", "incremental"])?;
    assert_eq!(code, 1, "{stderr}");
    assert!(
        stderr.contains("no increment is possible: first backup of this VM"),
        "{stderr}"
    );
    assert!(
        stderr.contains("state: no restore point was added"),
        "{stderr}"
    );
    bed.assert_tidy(&vm, 0)
}

#[test]
fn an_empty_increment_stores_no_chunk_and_reads_nothing() -> Result<()> {
    let bed = Bed::start()?;
    let vm = vm(&bed)?;
    vm.write("vda", "write -P 1 0 8M")?;
    let full = bed.backup(&vm, &[])?;
    let empty = bed.backup(&vm, &[])?;
    assert_eq!(mode(&empty, "vda"), "incremental");
    for field in ["dirty_bytes", "read_bytes", "stored_bytes"] {
        assert_eq!(disk(&empty, "vda")[field], 0, "{field}");
    }
    assert_eq!(disk(&empty, "vda")["root"], disk(&full, "vda")["root"]);
    Ok(())
}

/// A row of the table; its test is made there.
pub(crate) fn a_raw_and_a_version_2_disk_are_read_whole_beside_an_incremental_one() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB))
        .disk(DiskSpec::raw("vdb", 16 * MIB))
        .disk(DiskSpec::qcow2("vdc", 16 * MIB).compat_v2())
        .disk(DiskSpec::qcow2("vdd", 16 * MIB).data_file())
        .start()?;
    for name in ["vda", "vdb", "vdc", "vdd"] {
        vm.write(name, "write -P 7 1M 1M")?;
    }
    bed.backup(&vm, &[])?;
    for name in ["vda", "vdb", "vdc", "vdd"] {
        vm.write(name, "write -P 9 2M 64k")?;
    }
    let report = bed.backup(&vm, &[])?;
    assert_eq!(mode(&report, "vda"), "incremental");
    assert_eq!(mode(&report, "vdb"), "rescan: no-marks-on-raw");
    assert_eq!(mode(&report, "vdc"), "rescan: no-marks-on-qcow2-v2");
    assert_eq!(mode(&report, "vdd"), "incremental");
    let dir = bed.restore(&point(&report), "out", &["--format", "raw"])?;
    for name in ["vda", "vdb", "vdc", "vdd"] {
        let now = reference(&bed, &vm, name, &format!("ref-{name}"))?;
        assert_same(&now, &dir.join(format!("{name}.raw")))?;
    }
    bed.assert_tidy(&vm, 1)
}

/// A row of the table; its test is made there.
pub(crate) fn two_repositories_track_one_vm_independently() -> Result<()> {
    let bed = Bed::start()?;
    let vm = vm(&bed)?;
    let other = bed.lab.path("repo2");
    let other = other.to_str().expect("a path is text");
    bed.run(&["init", "--encryption", "none", "-r", other])?;
    vm.write("vda", "write -P 1 0 64k")?;
    bed.backup(&vm, &[])?;
    bed.backup(&vm, &["-r", other])?;
    bed.assert_tidy(&vm, 2)?;
    vm.write("vda", "write -P 2 64k 64k")?;
    let first = bed.backup(&vm, &[])?;
    vm.write("vda", "write -P 3 128k 64k")?;
    let second = bed.backup(&vm, &["-r", other])?;
    assert_eq!(mode(&first, "vda"), "incremental");
    assert_eq!(mode(&second, "vda"), "incremental");
    assert_eq!(disk(&first, "vda")["dirty_bytes"], 64 << 10);
    assert_eq!(disk(&second, "vda")["dirty_bytes"], 128 << 10);
    bed.assert_tidy(&vm, 2)
}
