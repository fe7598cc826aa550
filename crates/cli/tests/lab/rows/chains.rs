//! What becomes of the images that a disk consists of.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use highwater_testkit::{DiskSpec, tool};
use serde_json::json;

use super::marks::finds_the_lie;
use super::tracked::{SIZE, Tracked, qemu_img, says, text, write_outside};
use crate::support::Bed;

/// libvirt puts an overlay on `vda`, and on no other disk.
pub(super) fn snapshot(it: &mut Tracked, name: &str) -> Result<PathBuf> {
    let overlay = it.bed.lab.path(&format!("web01-vda.{name}"));
    let spec = format!("vda,file={}", overlay.display());
    let mut args = vec![
        "snapshot-create-as",
        "web01",
        "--disk-only",
        "--no-metadata",
        "--diskspec",
        &spec,
    ];
    if it.disks.len() > 1 {
        args.extend(["--diskspec", "vdb,snapshot=no"]);
    }
    it.virsh(&args)?;
    it.reads("vda", &overlay, "qcow2")?;
    Ok(overlay)
}

pub(super) fn commit(it: &mut Tracked) -> Result<()> {
    it.virsh(&[
        "blockcommit",
        "web01",
        "vda",
        "--active",
        "--pivot",
        "--wait",
    ])?;
    let image = it.vm.image("vda");
    it.reads("vda", &image, "qcow2")
}

pub(super) fn external_snapshot() -> Result<()> {
    let mut it = Tracked::start()?;
    for name in ["one", "two"] {
        snapshot(&mut it, name)?;
        it.heals("full: chain-changed")?;
        it.heals("incremental")?;
        it.write()?;
    }
    it.ends_well()
}

pub(super) fn external_snapshot_of_one_disk() -> Result<()> {
    let mut it = Tracked::two()?;
    snapshot(&mut it, "one")?;
    it.heals_each(&["full: chain-changed", "incremental"])?;
    // The mark that the other disk needed lay below this one, too: to give it
    // up was to write to a backing file.
    it.heals_each(&["rescan: backing-changed", "incremental"])?;
    it.ends_well()
}

pub(super) fn snapshot_and_commit() -> Result<()> {
    let mut it = Tracked::start()?;
    snapshot(&mut it, "one")?;
    it.heals("full: chain-changed")?;
    it.write()?;
    commit(&mut it)?;
    it.heals("full: chain-changed")?;
    it.ends_well()
}

pub(super) fn snapshot_and_commit_between_backups() -> Result<()> {
    let mut it = Tracked::two()?;
    for name in ["one", "two"] {
        snapshot(&mut it, name)?;
        it.write()?;
        commit(&mut it)?;
        it.heals("incremental")?;
        it.write()?;
    }
    it.ends_well()
}

fn block_copy(it: &Tracked, to: &Path, format: &str) -> Result<()> {
    it.virsh(&[
        "blockcopy",
        "web01",
        "vda",
        "--dest",
        text(to)?,
        "--format",
        format,
        "--transient-job",
        "--wait",
        "--pivot",
    ])
    .map(drop)
}

pub(super) fn block_copy_to_qcow2() -> Result<()> {
    let mut it = Tracked::two()?;
    let copy = it.bed.lab.path("web01-vda.copy");
    block_copy(&it, &copy, "qcow2")?;
    it.reads("vda", &copy, "qcow2")?;
    it.heals_each(&["full: chain-changed", "incremental"])?;
    it.heals("incremental")?;
    it.ends_well()
}

pub(super) fn block_copy_to_raw() -> Result<()> {
    let mut it = Tracked::two()?;
    let copy = it.bed.lab.path("web01-vda.raw");
    block_copy(&it, &copy, "raw")?;
    it.reads("vda", &copy, "raw")?;
    it.disks[0].expected = "rescan: no-marks-on-raw";
    it.heals_each(&["full: chain-changed", "incremental"])?;
    it.heals_each(&["rescan: no-marks-on-raw", "incremental"])?;
    it.ends_well()
}

fn overlay(of: &Path, to: &Path) -> Result<()> {
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "qcow2",
        "-b",
        text(of)?,
        text(to)?,
    ])
}

pub(super) fn overlay_by_qemu_img() -> Result<()> {
    let mut it = Tracked::start()?;
    let (image, top) = (it.vm.image("vda"), it.bed.lab.path("web01-vda.top"));
    it.while_off(|| {
        overlay(&image, &top)?;
        it.redefine(&[(text(&image)?, text(&top)?)])
    })?;
    it.reads("vda", &top, "qcow2")?;
    it.heals("full: chain-changed")?;
    it.heals("incremental")?;
    // And once more, this time under the name that the image had.
    let below = it.bed.lab.path("web01-vda.below");
    it.while_off(|| {
        tool("mv").arg(&top).arg(&below).run()?;
        overlay(&below, &top)
    })?;
    it.heals("full: chain-changed")?;
    it.heals("incremental")?;
    it.ends_well()
}

pub(super) fn overlay_committed_by_qemu_img() -> Result<()> {
    let mut it = Tracked::start()?;
    let (image, top) = (it.vm.image("vda"), it.bed.lab.path("web01-vda.top"));
    it.while_off(|| {
        overlay(&image, &top)?;
        it.redefine(&[(text(&image)?, text(&top)?)])
    })?;
    it.write()?;
    it.while_off(|| {
        qemu_img(&["commit", "-q", text(&top)?])?;
        it.redefine(&[(text(&top)?, text(&image)?)])
    })?;
    it.heals("incremental")?;
    it.ends_well()
}

/// The way out is the one that the message tells: shut down, merge, start.
pub(super) fn snapshot_behind_libvirt() -> Result<()> {
    let mut it = Tracked::start()?;
    let overlay = it.bed.lab.path("web01-vda.behind");
    let snapshot = json!({
        "node-name": it.node("vda")?,
        "snapshot-node-name": "behind",
        "snapshot-file": overlay,
        "format": "qcow2",
    });
    it.qmp("blockdev-snapshot-sync", &snapshot)?;
    let words = [
        "its image chain was changed behind the hypervisor's back",
        "shut `web01` down, merge the snapshot if it is one, and start `web01` again",
    ];
    it.is_refused(1, &words)?;
    it.while_off(|| qemu_img(&["commit", "-q", text(&overlay)?]))?;
    it.heals("incremental")?;
    it.ends_well()
}

/// Copies a file, holes included, into another that stays the same file.
fn write_into(from: &Path, to: &Path) -> Result<()> {
    tool("cp")
        .args(["--sparse=always"])
        .arg(from)
        .arg(to)
        .run()
        .map(drop)
}

pub(super) fn image_moved() -> Result<()> {
    let mut it = Tracked::two()?;
    let (image, copy) = (it.vm.image("vdb"), it.bed.lab.path("copy"));
    it.while_off(|| {
        write_into(&image, &copy)?;
        tool("mv").arg(&copy).arg(&image).run().map(drop)
    })?;
    let report = it.heals("incremental")?;
    says(&report, "healed", "believed the mark of disk vdb")?;
    // The file has its place; nothing is surprising about it any more.
    let report = it.heals("incremental")?;
    ensure!(report["healed"] == json!([]), "{report}");
    it.ends_well()
}

pub(super) fn older_copy_moved_into_place() -> Result<()> {
    let mut it = Tracked::start()?;
    let (image, copy) = (it.vm.image("vda"), it.bed.lab.path("older"));
    let take_copy = || write_into(&image, &copy);
    let move_copy = || tool("mv").arg(&copy).arg(&image).run().map(drop);
    // With the bitmap that the parent needs, right for its data.
    it.while_off(take_copy)?;
    it.write()?;
    it.while_off(move_copy)?;
    let report = it.heals("incremental")?;
    says(&report, "healed", "believed the mark of disk vda")?;
    it.write()?;
    // And with one that nobody needs any more.
    it.while_off(take_copy)?;
    it.heals("incremental")?;
    it.while_off(move_copy)?;
    it.heals("rescan: bitmap-missing")?;
    it.ends_well()
}

pub(super) fn data_file_written_around_qemu() -> Result<()> {
    let mut it = Tracked::with(&[DiskSpec::qcow2("vda", SIZE).data_file()])?;
    it.heals("incremental")?;
    let data = it.vm.image("vda").with_extension("data");
    let file = fs::OpenOptions::new().write(true).open(data)?;
    file.write_all_at(&vec![7; 2 << 20], 0)?;
    file.sync_all()?;
    finds_the_lie(&mut it)?;
    it.ends_well()
}

/// The bitmap lies in the qcow2 and speaks of a file beside it, so an older copy
/// of that file alone is a lie.
pub(super) fn older_data_file() -> Result<()> {
    let mut it = Tracked::with(&[DiskSpec::qcow2("vda", SIZE).data_file()])?;
    let data = it.vm.image("vda").with_extension("data");
    let older = it.bed.lab.path("older");
    it.while_off(|| write_into(&data, &older))?;
    it.heals("incremental")?;
    it.while_off(|| tool("mv").arg(&older).arg(&data).run().map(drop))?;
    it.heals("rescan: image-replaced")?;
    it.ends_well()
}

pub(super) fn older_copy_written_into_place() -> Result<()> {
    let mut it = Tracked::two()?;
    let (image, copy) = (it.vm.image("vda"), it.bed.lab.path("older"));
    it.while_off(|| write_into(&image, &copy))?;
    it.heals("incremental")?;
    it.write()?;
    it.while_off(|| write_into(&copy, &image))?;
    it.heals_each(&["rescan: bitmap-missing", "incremental"])?;
    it.ends_well()
}

pub(super) fn older_copy_with_its_mark_in_place() -> Result<()> {
    let mut it = Tracked::start()?;
    let (image, copy) = (it.vm.image("vda"), it.bed.lab.path("older"));
    it.while_off(|| write_into(&image, &copy))?;
    it.write()?;
    it.while_off(|| write_into(&copy, &image))?;
    it.heals("incremental")?;
    it.ends_well()
}

pub(super) fn backing_file_changed() -> Result<()> {
    let bed = Bed::start()?;
    let base = bed.lab.path("web01-vda.base");
    qemu_img(&["create", "-q", "-f", "qcow2", text(&base)?, "2M"])?;
    write_outside(&base, "write -P 7 0 2M")?;
    let disk = DiskSpec::qcow2("vda", SIZE).backing(&base, "qcow2");
    let mut it = Tracked::in_bed(bed, &[disk])?;
    it.heals("full: first-backup")?;
    it.heals("incremental")?;
    it.while_off(|| write_outside(&base, "write -P 8 1M 512k"))?;
    it.heals("rescan: backing-changed")?;
    it.ends_well()
}

pub(super) fn backing_file_unseen() -> Result<()> {
    crate::matrix_sources::a_qcow2_behind_a_server_is_incremental_and_one_over_it_is_not()
}

pub(super) fn image_unseen() -> Result<()> {
    crate::matrix_sources::volumes_come_back_and_a_pool_made_anew_elsewhere_is_noticed()
}
