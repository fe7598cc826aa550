//! Verification of a repository that real backups made.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use highwater_testkit::{DiskSpec, Vm};
use serde_json::Value;

use crate::support::{Bed, assert_same, point, reference};

const MIB: u64 = 1 << 20;

/// A restore point with the disk as it was.
struct Kept {
    point: String,
    disk: PathBuf,
}

fn backed_up(bed: &Bed, vm: &Vm, number: u64) -> Result<Kept> {
    vm.write("vda", &format!("write -P {number} {number}M 512K"))?;
    let report = bed.backup(vm, &[])?;
    Ok(Kept {
        point: point(&report),
        disk: reference(bed, vm, "vda", &format!("ref-{number}"))?,
    })
}

fn objects(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            objects(&path, found)?;
        } else {
            found.push(path);
        }
    }
    Ok(())
}

/// Restores a point; it is as the disk was, or is refused as damage and leaves
/// nothing.
fn restored_right_or_not_at_all(bed: &Bed, kept: &Kept, what: &str) -> Result<bool> {
    let to = bed.lab.path("out.raw");
    let args = ["restore", &kept.point, "-d", "vda", "--to"];
    let output = bed.output(&[&args[..], &[to.to_str().context("a path is text")?]].concat())?;
    if output.status.success() {
        assert_same(&kept.disk, &to).with_context(|| what.to_owned())?;
        fs::remove_file(&to)?;
        return Ok(true);
    }
    let code = output.status.code();
    // A point whose manifest is damaged cannot be found any more.
    assert!(matches!(code, Some(1 | 12 | 20)), "{what}: {output:?}");
    assert!(!to.exists(), "{what}");
    Ok(false)
}

fn every_harm_is_found(bed: &Bed) -> Result<()> {
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB))
        .start()?;
    let kept = [backed_up(bed, &vm, 1)?, backed_up(bed, &vm, 2)?];
    let document: Value = serde_json::from_str(&bed.run(&["verify", "--read-data", "--json"])?)?;
    assert_eq!(document["checked"]["points"], 2, "{document}");
    assert_eq!(
        document["warnings"].as_array().map(Vec::len),
        Some(0),
        "{document}"
    );
    let mut all = Vec::new();
    objects(&bed.repo(), &mut all)?;
    assert!(all.len() >= 9, "{all:?}");
    for path in all {
        let good = fs::read(&path)?;
        let name = path
            .strip_prefix(bed.repo())?
            .to_string_lossy()
            .into_owned();
        for at in [good.len() / 3, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            fs::write(&path, &bad)?;
            let output = bed.output(&["verify", "--read-data"])?;
            let said = format!("{output:?}");
            assert_eq!(output.status.code(), Some(20), "{name} at {at}: {said}");
            assert!(said.contains(&name), "{name} at {at}: {said}");
            let mut whole = 0;
            for kept in &kept {
                whole += u64::from(restored_right_or_not_at_all(bed, kept, &name)?);
            }
            if name.starts_with("packs/") || name.starts_with("points/") {
                let told = format!("state: {whole} of 2 restore points are whole");
                assert!(said.contains(&told), "{name} at {at}: {whole}: {said}");
            }
        }
        fs::write(&path, &good)?;
    }
    bed.run(&["verify", "--read-data"])?;
    bed.backup(&vm, &[])?;
    bed.run(&["verify", "--read-data"])?;
    bed.assert_tidy(&vm, 1)
}

#[test]
fn every_harm_to_real_backups_is_found_and_none_is_restored_as_right() -> Result<()> {
    every_harm_is_found(&Bed::start()?)
}

#[test]
fn every_harm_to_encrypted_backups_is_found_and_none_is_restored_as_right() -> Result<()> {
    every_harm_is_found(&Bed::start_encrypted()?)
}

#[test]
fn a_full_backup_stores_a_lost_pack_again_and_heals_the_points_before() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB))
        .start()?;
    let kept = [backed_up(&bed, &vm, 1)?, backed_up(&bed, &vm, 2)?];
    let mut packs = Vec::new();
    objects(&bed.repo().join("packs"), &mut packs)?;
    for pack in packs {
        fs::remove_file(pack)?;
    }
    bed.fail(&["verify"])?;
    bed.backup(&vm, &["-l", "full"])?;
    // The chunks are back; the page that only the first point had is not.
    let document = bed.output(&["verify", "--read-data", "--json"])?.stdout;
    let document: Value = serde_json::from_slice(&document)?;
    assert_eq!(document["checked"]["points"], 3, "{document}");
    assert_eq!(document["checked"]["points_damaged"], 1, "{document}");
    assert!(!restored_right_or_not_at_all(&bed, &kept[0], "the first")?);
    assert!(restored_right_or_not_at_all(&bed, &kept[1], "the second")?);
    Ok(())
}
