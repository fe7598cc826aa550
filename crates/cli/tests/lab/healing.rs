//! After a crash of anything the next plain backup succeeds and says what it did.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use highwater_testkit::{DiskSpec, Vm};

use crate::processes::{mover_of, signal};
use crate::support::{Bed, assert_same, mode, point, reference, write_noise};

const MIB: u64 = 1 << 20;

fn vm(bed: &Bed) -> Result<Vm> {
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 64 * MIB))
        .start()?;
    vm.write("vda", "write -P 1 0 4M")?;
    Ok(vm)
}

/// Backs up plainly, which must heal as expected, and compares the point with
/// the disk.
fn heals(bed: &Bed, vm: &Vm, expected: &str) -> Result<serde_json::Value> {
    let report = bed.backup(vm, &[])?;
    ensure!(mode(&report, "vda") == expected, "{report}");
    let number = report["point"].as_str().unwrap_or("point").to_owned();
    let now = reference(bed, vm, "vda", &format!("ref-{number}"))?;
    let dir = bed.restore(&point(&report), &format!("out-{number}"), &[])?;
    assert_same(&now, &dir.join("vda.qcow2"))?;
    bed.assert_tidy(vm, 1)?;
    Ok(report)
}

/// Kills the program with SIGKILL in the middle of copying.
fn killed_while_copying(bed: &Bed, vm: &Vm) -> Result<()> {
    let mut child = bed.spawn_slow(&["backup", "web01"])?;
    let deadline = Instant::now() + Duration::from_secs(20);
    while !vm.job_running().unwrap_or_default() {
        ensure!(Instant::now() < deadline, "no job began");
        ensure!(
            child.try_wait()?.is_none(),
            "it ended before it could be killed"
        );
    }
    signal("-KILL", mover_of(&child)?)?;
    child.wait()?;
    Ok(())
}

#[test]
fn a_killed_backup_leaves_nothing_at_the_vm_and_keeps_the_old_mark() -> Result<()> {
    let bed = Bed::start()?;
    let vm = vm(&bed)?;
    bed.backup(&vm, &[])?;
    let marks = vm.checkpoints()?;
    // Enough that zstd:19 is still at work.
    write_noise(&bed, &vm, "vda", 8, 48)?;
    killed_while_copying(&bed, &vm)?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while vm.job_running().unwrap_or(true) || vm.checkpoints()? != marks {
        ensure!(
            Instant::now() < deadline,
            "the guard did not tidy up: {:?}",
            vm.checkpoints()?
        );
    }
    bed.assert_tidy(&vm, 1)?;
    heals(&bed, &vm, "incremental").map(drop)
}
