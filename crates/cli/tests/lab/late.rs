//! What happens to images and repository while no backup runs.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{DiskSpec, MIB, Vm, tool};
use serde_json::Value;

use crate::support::{Bed, assert_same, mode, point, reference};

fn vm(bed: &Bed) -> Result<Vm> {
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 32 * MIB))
        .start()?;
    vm.write("vda", "write -P 1 0 4M")?;
    bed.backup(&vm, &[])?;
    vm.write("vda", "write -P 2 8M 100k")?;
    Ok(vm)
}

fn check(bed: &Bed, vm: &Vm, report: &Value, expected: &str) -> Result<()> {
    ensure!(mode(report, "vda") == expected, "{report}");
    let now = reference(bed, vm, "vda", "now.raw")?;
    let dir = bed.restore(&point(report), "restored", &[])?;
    assert_same(&now, &dir.join("vda.qcow2"))?;
    fs::remove_dir_all(dir)?;
    bed.assert_tidy(vm, 1)
}

#[test]
fn what_qemus_tools_write_while_the_vm_is_off_is_in_the_next_increment() -> Result<()> {
    let bed = Bed::start()?;
    let vm = vm(&bed)?;
    vm.destroy()?;
    tool("qemu-io")
        .args([
            "-f",
            "qcow2",
            "-c",
            "write -P 3 16M 100k",
            "-c",
            "write -z 1M 64k",
        ])
        .arg(vm.image("vda"))
        .run()?;
    vm.start()?;
    vm.write("vda", "write -P 4 20M 4k")?;
    let report = bed.backup(&vm, &[])?;
    check(&bed, &vm, &report, "incremental")
}

/// A program that does not know bitmaps clears qcow2's autoclear bits before it
/// writes (QEMU `docs/interop/qcow2.rst`).
#[test]
fn what_a_program_writes_that_does_not_know_bitmaps_is_a_rescan() -> Result<()> {
    let bed = Bed::start()?;
    let vm = vm(&bed)?;
    vm.destroy()?;
    let image = vm.image("vda");
    clear_autoclear_bits(&image)?;
    tool("qemu-io")
        .args(["-f", "qcow2", "-c", "write -P 3 16M 100k"])
        .arg(&image)
        .run()?;
    vm.start()?;
    let report = bed.backup(&vm, &[])?;
    let how = mode(&report, "vda");
    ensure!(
        how == "rescan: bitmap-missing" || how == "rescan: bitmap-inconsistent",
        "{report}"
    );
    check(&bed, &vm, &report, &how)
}

fn clear_autoclear_bits(image: &Path) -> Result<()> {
    let mut bytes = fs::read(image)?;
    let bits = bytes.get_mut(88..96).context("a header of version 3")?;
    ensure!(bits[7] & 1 == 1, "the image has no bitmaps: {bits:?}");
    bits.fill(0);
    Ok(fs::write(image, bytes)?)
}

/// The newest manifest's file in the repository.
fn newest_manifest(bed: &Bed) -> Result<PathBuf> {
    let mut found = Vec::new();
    for vm in fs::read_dir(bed.repo().join("points"))? {
        for point in fs::read_dir(vm?.path())? {
            found.push(point?.path());
        }
    }
    found.into_iter().max().context("a manifest")
}

/// A store that is slow may do later what it was asked for; by then the next
/// run has taken the backup for one that never was.
#[test]
fn a_manifest_that_appears_after_its_mark_was_removed_is_a_point_without_a_mark() -> Result<()> {
    let bed = Bed::start()?;
    let vm = vm(&bed)?;
    let signs = tempfile::tempdir_in(bed.lab.dir())?;
    let die = |step: &str| -> Result<()> {
        let fault = format!("{step}:kill:{}", signs.path().display());
        let status = bed
            .command(&["backup", "web01", "--quiet"])
            .env("HIGHWATER_FAULT", fault)
            .status()?;
        ensure!(status.code() == Some(1), "{status}");
        Ok(())
    };
    let written = reference(&bed, &vm, "vda", "written.raw")?;
    die("committed")?;
    let manifest = newest_manifest(&bed)?;
    let away = bed.lab.path("manifest");
    fs::rename(&manifest, &away)?;
    // It removes the mark, and goes no further.
    vm.write("vda", "write -P 5 9M 100k")?;
    die("mark-tidied")?;
    fs::rename(&away, &manifest)?;
    let id = manifest.file_name().and_then(|name| name.to_str());
    let dir = bed.restore(&format!("id:{}", id.context("an id")?), "late", &[])?;
    assert_same(&written, &dir.join("vda.qcow2"))?;
    vm.write("vda", "write -P 6 10M 100k")?;
    let report = bed.backup(&vm, &[])?;
    check(&bed, &vm, &report, "rescan: bitmap-missing")?;
    vm.write("vda", "write -P 7 11M 100k")?;
    let report = bed.backup(&vm, &[])?;
    check(&bed, &vm, &report, "incremental")
}
