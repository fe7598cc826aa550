//! What becomes of disks and their images.

use std::fs;
use std::io::{Seek as _, SeekFrom, Write as _};

use anyhow::{Result, ensure};
use highwater_testkit::{DiskSpec, ErrorPolicy, KIB, MIB};
use serde_json::json;

use super::{
    SIZE, existing, heals, image, is_well, one, qcow2, qemu_img, restarts_with, two, unseen, with,
};
use crate::support::{disk, mode, point};
use crate::tale::{BareBed, Tale};

pub(super) fn new_disk() -> Result<()> {
    let mut tale = one()?;
    let disks = [existing("vda", &image(&tale, "vda")), qcow2("vdb")];
    restarts_with(&mut tale, &disks)?;
    // What was known has one disk: it is restored here.
    tale = Tale::of(&tale.bed.clone(), &tale.vm.clone(), &["vda", "vdb"]);
    heals(&mut tale, &["incremental", "full: new-disk"])
}

pub(super) fn disk_gone() -> Result<()> {
    let mut tale = two()?;
    let vda = existing("vda", &image(&tale, "vda"));
    restarts_with(&mut tale, &[vda])?;
    tale.writes(3)?;
    let report = tale.backs_up(&["incremental"])?;
    let point = point(&report);
    let shown = tale.bed.run("image:/none", &["show", &point, "--json"])?;
    ensure!(shown.contains("vdb"), "{shown}");
    is_well(&mut tale)
}

/// The VM has done its work with `below`; now it has `overlay` upon it.
fn overlay(tale: &Tale) -> Result<std::path::PathBuf> {
    let below = image(tale, "vda");
    let top = tale.bed.lab.path("overlay.qcow2");
    let text = |path: &std::path::Path| path.to_string_lossy().into_owned();
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "qcow2",
        "-b",
        &text(&below),
        &text(&top),
    ])?;
    Ok(top)
}

pub(super) fn overlay_by_qemu_img() -> Result<()> {
    let mut tale = one()?;
    tale.vm.quit()?;
    let top = overlay(&tale)?;
    restarts_with(&mut tale, &[existing("vda", &top)])?;
    heals(&mut tale, &["full: chain-changed"])
}

pub(super) fn overlay_committed_by_qemu_img() -> Result<()> {
    let mut tale = one()?;
    let below = image(&tale, "vda");
    tale.vm.quit()?;
    let top = overlay(&tale)?;
    restarts_with(&mut tale, &[existing("vda", &top)])?;
    tale.writes(5)?;
    tale.vm.quit()?;
    qemu_img(&["commit", "-q", &top.to_string_lossy()])?;
    restarts_with(&mut tale, &[existing("vda", &below)])?;
    heals(&mut tale, &["incremental"])
}

/// Puts an overlay on the running disk.
fn snapshot(tale: &Tale) -> Result<std::path::PathBuf> {
    let top = tale.bed.lab.path("snapshot.qcow2");
    tale.vm.qmp(
        "blockdev-snapshot-sync",
        &json!({"device": "vda", "snapshot-file": top, "format": "qcow2"}),
    )?;
    Ok(top)
}

fn snapshot_of(mut tale: Tale, expected: &[&str]) -> Result<()> {
    let top = snapshot(&tale)?;
    tale.writes(3)?;
    let before = tale.vm.graph()?;
    let report = tale.bed.backup(&tale.vm.uri(), "kvm0", &[])?;
    for (disk, expected) in tale.disks.iter().zip(expected) {
        ensure!(mode(&report, disk) == *expected, "{report}");
    }
    ensure!(tale.vm.graph()?.without_bitmaps() == before.without_bitmaps());
    // What the guest sees is read through the new image from now on.
    let mut disks = vec![existing("vda", &top)];
    if tale.disks.len() > 1 {
        disks.push(existing("vdb", &image(&tale, "vdb")));
    }
    restarts_with(&mut tale, &disks)?;
    tale.keeps(&point(&report))?;
    tale.writes(5)?;
    let since = tale.bed.backup(&tale.vm.uri(), "kvm0", &[])?;
    ensure!(
        ["incremental", "rescan: backing-changed"].contains(&mode(&since, "vda").as_str()),
        "{since}"
    );
    tale.keeps(&point(&since))?;
    is_well(&mut tale)
}

pub(super) fn external_snapshot() -> Result<()> {
    snapshot_of(one()?, &["full: chain-changed"])
}

pub(super) fn external_snapshot_of_one_disk() -> Result<()> {
    snapshot_of(two()?, &["full: chain-changed", "incremental"])
}

pub(super) fn internal_snapshot() -> Result<()> {
    let mut tale = one()?;
    let name = json!({"device": "vda", "name": "before-the-upgrade"});
    tale.vm.qmp("blockdev-snapshot-internal-sync", &name)?;
    heals(&mut tale, &["incremental"])
}

/// Its inode number is another one.
pub(super) fn image_moved() -> Result<()> {
    let mut tale = one()?;
    tale.vm.quit()?;
    let (image, copy) = (image(&tale, "vda"), tale.bed.lab.path("copy"));
    fs::copy(&image, &copy)?;
    fs::rename(&copy, &image)?;
    tale.vm.start()?;
    heals(&mut tale, &["incremental"])
}

pub(super) fn older_copy_written_into_place() -> Result<()> {
    let bed = BareBed::start()?;
    let mut tale = unseen(&bed, &[qcow2("vda")])?;
    tale.writes(1)?;
    tale.vm.quit()?;
    let (image, copy) = (image(&tale, "vda"), bed.lab.path("copy"));
    fs::copy(&image, &copy)?;
    tale.vm.start()?;
    tale.writes(2)?;
    tale.backs_up(&["full: first-backup"])?;
    tale.vm.quit()?;
    fs::copy(&copy, &image)?;
    tale.vm.start()?;
    heals(&mut tale, &["rescan: bitmap-missing"])
}

pub(super) fn backing_file_changed() -> Result<()> {
    let bed = BareBed::start()?;
    let below = bed.lab.path("base.raw");
    fs::File::create(&below)?.set_len(SIZE)?;
    let mut tale = unseen(&bed, &[qcow2("vda").backing(&below, "raw")])?;
    tale.writes(1)?;
    tale.backs_up(&["full: first-backup"])?;
    tale.vm.quit()?;
    let mut file = fs::File::options().write(true).open(&below)?;
    file.seek(SeekFrom::Start(3 * MIB))?;
    file.write_all(&[7; 4096])?;
    drop(file);
    tale.vm.start()?;
    heals(&mut tale, &["rescan: backing-changed"])
}

pub(super) fn data_file_written_around_qemu() -> Result<()> {
    let mut tale = with(&[qcow2("vda").data_file()])?;
    let data = image(&tale, "vda").with_extension("data");
    let mut file = fs::File::options().write(true).open(&data)?;
    // Below what was written, so that QEMU reads it as data.
    file.seek(SeekFrom::Start(MIB + 4096))?;
    file.write_all(&[7; 4096])?;
    drop(file);
    let uri = tale.vm.uri();
    tale.backs_up_with(&uri, &["rescan: bitmap-lied"], &["--audit", "100%"])?;
    is_well(&mut tale)
}

pub(super) fn swapped_disks() -> Result<()> {
    let mut tale = two()?;
    let (one, two) = (image(&tale, "vda"), image(&tale, "vdb"));
    restarts_with(&mut tale, &[existing("vda", &two), existing("vdb", &one)])?;
    tale.write("vda", "write -P 77 2M 64k")?;
    heals(&mut tale, &["full: chain-changed"])
}

pub(super) fn other_serial() -> Result<()> {
    let mut tale = with(&[qcow2("vda").serial("one")])?;
    let other = existing("vda", &image(&tale, "vda")).serial("two");
    restarts_with(&mut tale, &[other])?;
    heals(&mut tale, &["full: disk-swapped"])
}

pub(super) fn grown_while_running() -> Result<()> {
    let mut tale = one()?;
    for size in [SIZE + 300 * KIB, 2 * SIZE] {
        let node = tale.vm.node("vda")?;
        let resize = json!({"node-name": node, "size": size});
        tale.vm.qmp("block_resize", &resize)?;
        tale.write("vda", &format!("write -P 9 {} 4k", size - 4096))?;
        let report = tale.backs_up(&["incremental"])?;
        ensure!(disk(&report, "vda")["size_bytes"] == size, "{report}");
    }
    is_well(&mut tale)
}

fn resized_off(tale: &Tale, args: &[&str], size: u64) -> Result<()> {
    tale.vm.quit()?;
    let (image, size) = (image(tale, "vda"), size.to_string());
    let image = image.to_string_lossy();
    qemu_img(&[&["resize", "-q", "-f", "qcow2"], args, &[&image, &size]].concat())?;
    tale.vm.start()
}

pub(super) fn grown_while_off() -> Result<()> {
    let mut tale = one()?;
    resized_off(&tale, &[], SIZE + 300 * KIB)?;
    tale.write("vda", &format!("write -P 9 {} 4k", SIZE + 200 * KIB))?;
    heals_small(&mut tale, "incremental")
}

pub(super) fn shrunk() -> Result<()> {
    let mut tale = one()?;
    resized_off(&tale, &["--shrink"], SIZE - MIB / 2)?;
    heals_small(&mut tale, "full: disk-shrank")
}

/// As [`heals`], with writes that fit.
fn heals_small(tale: &mut Tale, expected: &str) -> Result<()> {
    tale.write("vda", "write -P 5 1M 64k")?;
    tale.backs_up(&[expected])?;
    tale.write("vda", "write -P 6 2M 64k")?;
    tale.backs_up(&["incremental"])?;
    tale.one_mark_each()?;
    tale.ends_well()
}

pub(super) fn raw_and_version_2() -> Result<()> {
    let disks = [DiskSpec::raw("vda", SIZE), qcow2("vdb").compat_v2()];
    let mut tale = with(&disks)?;
    tale.backs_up(&["incremental"])?;
    tale.vm.quit()?;
    tale.vm.start()?;
    let lost = ["rescan: no-marks-on-raw", "rescan: no-marks-on-qcow2-v2"];
    heals(&mut tale, &lost)
}

pub(super) fn write_errors_reported() -> Result<()> {
    let disk = qcow2("vda").error_policy(ErrorPolicy::Report);
    heals(&mut with(&[disk])?, &["incremental"])
}

pub(super) fn write_errors_ignored() -> Result<()> {
    let disk = qcow2("vda").error_policy(ErrorPolicy::Ignore);
    heals(&mut with(&[disk])?, &["incremental"])
}
