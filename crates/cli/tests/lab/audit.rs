//! A bitmap that lies is found out, the disk is read as a whole in the same
//! run, and the point is right; one that does not is never called a liar.

use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{DiskSpec, NumberedWriter, Numbering, Vm, tool};
use serde_json::{Value, json};

use crate::support::{Bed, assert_same, disk, mode, point, reference};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const CHUNK: u64 = 64 * KIB;
const LIED: &str = "rescan: bitmap-lied";

/// Backs up, which must read the disk so, and compares the point with the disk.
fn right(bed: &Bed, vm: &Vm, args: &[&str], expected: &str) -> Result<Value> {
    let report = bed.backup(vm, args)?;
    ensure!(mode(&report, "vda") == expected, "{report}");
    let number = report["point"].as_str().unwrap_or("point").to_owned();
    let now = reference(bed, vm, "vda", &format!("ref-{number}"))?;
    let dir = bed.restore(&point(&report), &format!("out-{number}"), &[])?;
    assert_same(&now, &dir.join("vda.qcow2"))?;
    std::fs::remove_file(now)?;
    std::fs::remove_dir_all(dir)?;
    let lied = expected == LIED;
    let told = report["warnings"].to_string().contains("bitmap lied");
    ensure!(lied == told, "{report}");
    bed.assert_tidy(vm, 1)?;
    Ok(report)
}

fn audited(report: &Value) -> u64 {
    disk(report, "vda")["audited_blocks"].as_u64().unwrap()
}

/// Returns the node and the name of the newest mark's bitmap.
fn bitmap(vm: &Vm) -> Result<(String, String)> {
    let name = vm.checkpoints()?.pop().context("a mark")?;
    let nodes = vm.monitor(&json!({
        "execute": "query-named-block-nodes", "arguments": {"flat": true}
    }))?;
    let holds = |node: &&Value| node["dirty-bitmaps"].to_string().contains(&name);
    let node = nodes.as_array().and_then(|nodes| nodes.iter().find(holds));
    let node = node.context("a node with the mark's bitmap")?["node-name"].clone();
    Ok((node.as_str().context("a name")?.to_owned(), name))
}

/// Clears the mark's bitmap as a tool of somebody else would.
fn clear(vm: &Vm) -> Result<()> {
    let (node, name) = bitmap(vm)?;
    let arguments = json!({"node": node, "name": name});
    vm.monitor(&json!({"execute": "block-dirty-bitmap-clear", "arguments": arguments}))
        .map(drop)
}

fn resize(vm: &Vm, bytes: u64) -> Result<()> {
    let (node, _) = bitmap(vm)?;
    let arguments = json!({"node-name": node, "size": bytes});
    vm.monitor(&json!({"execute": "block_resize", "arguments": arguments}))
        .map(drop)
}

/// A disk of so many bytes, written to in one place, with a point.
fn vm(bed: &Bed, spec: DiskSpec) -> Result<Vm> {
    let vm = bed.lab.vm("web01").disk(spec).start()?;
    vm.write("vda", "write -P 1 0 4M")?;
    bed.backup(&vm, &[])?;
    Ok(vm)
}

#[test]
fn a_cleared_bitmap_is_found_out_by_the_busiest_block() -> Result<()> {
    let bed = Bed::start()?;
    // So large that no random block falls there.
    let vm = vm(&bed, DiskSpec::qcow2("vda", 64 * GIB))?;
    vm.write("vda", "write -P 2 30G 64k")?;
    right(&bed, &vm, &[], "incremental")?;
    vm.write("vda", "write -P 3 30G 4k")?;
    vm.write("vda", "write -P 3 33G 64k")?;
    clear(&vm)?;
    let report = right(&bed, &vm, &[], LIED)?;
    let warning = report["warnings"].to_string();
    ensure!(
        warning.contains("disk vda: bytes 0x780000000 to 0x780010000"),
        "{warning}"
    );
    let stored = disk(&report, "vda")["stored_bytes"].as_u64();
    ensure!(stored.is_some_and(|stored| stored < CHUNK), "{report}");
    vm.write("vda", "write -P 4 34G 64k")?;
    right(&bed, &vm, &[], "incremental").map(drop)
}

#[test]
fn a_lie_is_told_as_a_warning_also_where_an_increment_was_demanded() -> Result<()> {
    let bed = Bed::start()?;
    let vm = vm(&bed, DiskSpec::qcow2("vda", 64 * MIB))?;
    vm.write("vda", "write -P 2 0 64k")?;
    clear(&vm)?;
    let args = ["backup", "web01", "-l", "incremental", "--strict"];
    let output = bed.output(&args)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(4), "{said}");
    ensure!(
        said.contains("warning: bitmap lied: disk vda: bytes 0x0 to 0x10000"),
        "{said}"
    );
    ensure!(said.contains("vda  rescan (bitmap lied"), "{said}");
    right(&bed, &vm, &[], "incremental").map(drop)
}

#[test]
fn a_data_file_written_around_qemu_is_found_out() -> Result<()> {
    let bed = Bed::start()?;
    let vm = vm(&bed, DiskSpec::qcow2("vda", 64 * MIB).data_file())?;
    let data = vm.image("vda").with_extension("data");
    let file = std::fs::OpenOptions::new().write(true).open(data)?;
    file.write_all_at(&[7; 512], 4 * KIB)?;
    file.sync_all()?;
    right(&bed, &vm, &[], LIED)?;
    right(&bed, &vm, &[], "incremental").map(drop)
}

/// The suffix that was cut holds one block of data, and nothing else is looked
/// at near it: only the question for the highest stored block leads there.
#[test]
fn a_shrink_that_was_undone_is_found_out_by_the_highest_block_of_data() -> Result<()> {
    let bed = Bed::start()?;
    let size = 256 * MIB;
    let spec = DiskSpec::qcow2("vda", size);
    let vm = bed.lab.vm("web01").disk(spec).start()?;
    vm.write("vda", &format!("write -P 1 0 {}", size - 2 * CHUNK))?;
    bed.backup(&vm, &[])?;
    resize(&vm, size - 3 * CHUNK)?;
    resize(&vm, size)?;
    let report = right(&bed, &vm, &[], LIED)?;
    let place = format!("bytes {:#x}", size - 3 * CHUNK);
    ensure!(report["warnings"].to_string().contains(&place), "{report}");
    // Also below blocks that are dirty.
    vm.write("vda", &format!("write -P 2 0 {}", size - 2 * CHUNK))?;
    right(&bed, &vm, &[], "incremental")?;
    resize(&vm, size - 9 * CHUNK)?;
    resize(&vm, size)?;
    vm.write(
        "vda",
        &format!("write -P 3 {} {}", size - 8 * CHUNK, 8 * CHUNK),
    )?;
    let report = right(&bed, &vm, &[], LIED)?;
    let place = format!("bytes {:#x}", size - 9 * CHUNK);
    ensure!(report["warnings"].to_string().contains(&place), "{report}");
    Ok(())
}

#[test]
fn a_differential_that_found_a_lie_is_followed_by_a_rescan() -> Result<()> {
    let bed = Bed::start()?;
    let vm = vm(&bed, DiskSpec::qcow2("vda", 64 * GIB))?;
    vm.write("vda", "write -P 2 0 64k")?;
    vm.write("vda", "write -P 2 41G 64k")?;
    clear(&vm)?;
    let mark = vm.checkpoints()?;
    let report = right(&bed, &vm, &["-l", "differential"], LIED)?;
    ensure!(
        audited(&report) > 0 && vm.checkpoints()? == mark,
        "{report}"
    );
    // What the audit would find is as it was; 41 GiB still is not.
    vm.write("vda", "write -P 1 0 64k")?;
    clear(&vm)?;
    let report = right(&bed, &vm, &[], LIED)?;
    ensure!(audited(&report) == 0, "{report}");
    ensure!(vm.checkpoints()? != mark);
    right(&bed, &vm, &[], "incremental").map(drop)
}

#[test]
fn a_moved_image_is_believed_after_an_audit_and_another_one_is_not() -> Result<()> {
    let bed = Bed::start()?;
    let vm = vm(&bed, DiskSpec::qcow2("vda", 64 * MIB))?;
    let image = vm.image("vda");
    let copy = image.with_extension("copy");
    let exchange = |change: &dyn Fn() -> Result<()>| -> Result<()> {
        vm.destroy()?;
        std::fs::copy(&image, &copy)?;
        change()?;
        tool("mv").arg(&copy).arg(&image).run()?;
        vm.start()
    };
    exchange(&|| Ok(()))?;
    vm.write("vda", "write -P 2 8M 64k")?;
    let report = right(&bed, &vm, &[], "incremental")?;
    let healed = report["healed"].to_string();
    ensure!(healed.contains("believed the mark of disk vda"), "{healed}");
    // All that is clean: the disk has no more blocks than are read at least.
    ensure!(audited(&report) >= 1024, "{report}");
    exchange(&|| {
        let map = tool("qemu-img")
            .args(["map", "--output=json"])
            .arg(&copy)
            .run()?;
        let map: Value = serde_json::from_str(&map)?;
        let offset = map[0]["offset"].as_u64().context("data at the start")?;
        let file = std::fs::OpenOptions::new().write(true).open(&copy)?;
        file.write_all_at(&[9; 512], offset + 3 * MIB)
            .map_err(Into::into)
    })?;
    right(&bed, &vm, &[], LIED)?;
    right(&bed, &vm, &[], "incremental").map(drop)
}

#[test]
fn an_audit_of_everything_finds_one_changed_block_anywhere() -> Result<()> {
    let bed = Bed::start()?;
    let vm = vm(&bed, DiskSpec::qcow2("vda", 256 * MIB))?;
    for (number, at) in [201 * MIB + CHUNK, 77 * MIB, 255 * MIB + 3 * CHUNK]
        .into_iter()
        .enumerate()
    {
        vm.write("vda", &format!("write -P {} {at} 512", number + 3))?;
        clear(&vm)?;
        right(&bed, &vm, &["--audit", "100%"], LIED)?;
    }
    let report = right(&bed, &vm, &["--audit", "100%"], "incremental")?;
    ensure!(audited(&report) >= 4096, "{report}");
    let report = right(&bed, &vm, &["--audit", "0"], "incremental")?;
    ensure!((3..=70).contains(&audited(&report)), "{report}");
    Ok(())
}

/// QEMU counts what its guest writes, and the monitor's writes it does not.
#[test]
fn writes_that_were_counted_and_are_in_no_bitmap_prove_the_lie() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 64 * GIB))
        .guest()
        .start()?;
    let guest = vm.guest()?;
    let write = |at: u64| -> Result<()> {
        let seek = at / (4 * KIB);
        guest
            .run(&format!(
                "dd if=/dev/urandom of=/dev/vda bs=4096 count=1 seek={seek} && sync"
            ))
            .map(drop)
    };
    write(0)?;
    bed.backup(&vm, &[])?;
    write(37 * GIB + MIB)?;
    clear(&vm)?;
    let report = right(&bed, &vm, &[], LIED)?;
    // Known before anything was read.
    ensure!(audited(&report) == 0, "{report}");
    right(&bed, &vm, &[], "incremental")?;
    write(39 * GIB + MIB)?;
    right(&bed, &vm, &[], "incremental").map(drop)
}

#[test]
fn a_guest_that_never_stops_writing_makes_no_bitmap_a_liar() -> Result<()> {
    let bed = Bed::start()?;
    let numbering = Numbering {
        slots: 6000,
        stride_bytes: CHUNK,
        disks: vec!["/dev/vda".to_owned()],
    };
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", numbering.disk_bytes()))
        .guest()
        .start()?;
    let guest = vm.guest()?;
    let writer = NumberedWriter::start(&guest, &numbering, 2)?;
    let mut points = Vec::new();
    for number in 0..16 {
        let acknowledged = writer.acknowledged();
        let report = bed.backup(&vm, &["--quiesce", "off"])?;
        let granted = writer.granted();
        if number > 0 {
            ensure!(mode(&report, "vda") == "incremental", "{report}");
            ensure!(audited(&report) > 0, "{report}");
        }
        ensure!(report["warnings"] == json!([]), "{report}");
        points.push((point(&report), acknowledged, granted));
    }
    writer.stop()?;
    for (number, (point, acknowledged, granted)) in points.iter().enumerate() {
        let dir = bed.restore(point, &format!("out-{number}"), &["--format", "raw"])?;
        let image: PathBuf = dir.join("vda.raw");
        numbering.check_prefix(&[&image], *acknowledged, *granted)?;
        std::fs::remove_dir_all(dir)?;
    }
    bed.assert_tidy(&vm, 1)
}
