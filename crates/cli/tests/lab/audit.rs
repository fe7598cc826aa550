//! A bitmap that lies is found out, the disk is read as a whole in the same
//! run, and the point is right; one that does not is never called a liar.
//!
//! What is no test here is a row of the table, see `rows`.

use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{DiskSpec, NumberedWriter, Numbering, Vm, tool};
use serde_json::{Value, json};

use crate::processes::mover_of;
use crate::support::{Bed, assert_same, disk, mode, point, reference};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const CHUNK: u64 = 64 * KIB;
const LIED: &str = "rescan: bitmap-lied";

/// Backs up, which must read the disk so, and compares the point with the disk.
fn right(bed: &Bed, vm: &Vm, args: &[&str], expected: &str) -> Result<Value> {
    right_and_leaves(bed, vm, args, expected, 1)
}

/// The same, leaving so many marks.
fn right_and_leaves(
    bed: &Bed,
    vm: &Vm,
    args: &[&str],
    expected: &str,
    marks: usize,
) -> Result<Value> {
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
    bed.assert_tidy(vm, marks)?;
    Ok(report)
}

fn audited(report: &Value) -> u64 {
    disk(report, "vda")["audited_blocks"].as_u64().unwrap()
}

/// Starts a VM with a real guest and a disk so large that chance finds nothing.
fn large_with_guest(bed: &Bed) -> Result<Vm> {
    let large = DiskSpec::qcow2("vda", 64 * GIB);
    bed.lab.vm("web01").disk(large).guest().start()
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

/// Found out by the busiest block.
pub(crate) fn bitmap_cleared() -> Result<()> {
    let bed = Bed::start()?;
    // So large that no random block falls there, nor moves on to there: there
    // is data right before.
    let vm = vm(&bed, DiskSpec::qcow2("vda", 64 * GIB))?;
    vm.write("vda", "write -P 1 30719M 2M")?;
    right(&bed, &vm, &[], "incremental")?;
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
pub(crate) fn shrunk_and_grown() -> Result<()> {
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

pub(crate) fn lie_found_by_a_differential() -> Result<()> {
    let bed = Bed::start()?;
    let vm = vm(&bed, DiskSpec::qcow2("vda", 64 * GIB))?;
    vm.write("vda", "write -P 2 0 64k")?;
    vm.write("vda", "write -P 2 41G 64k")?;
    clear(&vm)?;
    let differential = ["-l", "differential"];
    let report = right_and_leaves(&bed, &vm, &differential, LIED, 0)?;
    ensure!(audited(&report) > 0, "{report}");
    ensure!(vm.bitmaps("vda")?.is_empty(), "the liar is still there");
    // What the audit would find is as it was; 41 GiB still is not.
    vm.write("vda", "write -P 1 0 64k")?;
    let report = right(&bed, &vm, &[], LIED)?;
    ensure!(audited(&report) == 0, "{report}");
    right(&bed, &vm, &[], "incremental").map(drop)
}

/// What proved the lie is hidden by the guest's next write.
#[test]
fn a_lie_is_not_forgotten_by_a_run_that_found_it_and_failed() -> Result<()> {
    let bed = Bed::start()?;
    let vm = vm(&bed, DiskSpec::qcow2("vda", 64 * GIB))?;
    vm.write("vda", "write -P 2 0 64k")?;
    vm.write("vda", "write -P 2 41G 64k")?;
    clear(&vm)?;
    let signs = tempfile::tempdir_in(bed.lab.dir())?;
    let mut mover = bed
        .command(&["backup", "web01", "--quiet"])
        .env(
            "HIGHWATER_FAULT",
            format!("copied:wait:{}", signs.path().display()),
        )
        .spawn()?;
    let end = Instant::now() + Duration::from_secs(30);
    while !signs.path().join("copied").exists() {
        ensure!(Instant::now() < end, "nothing was copied");
        std::thread::sleep(Duration::from_millis(5));
    }
    let pid = mover_of(&mover)?.to_string();
    tool("kill").args(["-INT", &pid]).run()?;
    std::fs::write(signs.path().join("go"), "")?;
    ensure!(mover.wait()?.code() == Some(130));
    ensure!(vm.bitmaps("vda")?.is_empty(), "the liar is still there");
    vm.write("vda", "write -P 3 0 64k")?;
    right(&bed, &vm, &[], "rescan: bitmap-missing")?;
    right(&bed, &vm, &[], "incremental").map(drop)
}

#[test]
fn a_lie_is_not_forgotten_by_a_run_that_was_refused_for_it() -> Result<()> {
    let bed = Bed::start()?;
    let vm = large_with_guest(&bed)?;
    let guest = vm.guest()?;
    let write = |gib: u64| -> Result<()> {
        let seek = gib * GIB / (4 * KIB);
        let dd = format!("dd if=/dev/urandom of=/dev/vda bs=4096 count=1 seek={seek} && sync");
        guest.run(&dd).map(drop)
    };
    write(0)?;
    bed.backup(&vm, &[])?;
    write(37)?;
    clear(&vm)?;
    let doctor = bed.output(&["doctor", "web01"])?;
    let said = String::from_utf8_lossy(&doctor.stdout);
    ensure!(
        doctor.status.code() == Some(4) && said.contains("the bitmap of its mark lies"),
        "{}: {said}",
        doctor.status
    );
    let (code, said) = bed.fail(&["backup", "web01", "-l", "incremental"])?;
    ensure!(code == 1 && said.contains("bitmap lied"), "{code}: {said}");
    // Something is dirty now, and the proof is gone.
    write(39)?;
    right(&bed, &vm, &[], "rescan: bitmap-missing")?;
    write(41)?;
    clear(&vm)?;
    let fixed = bed.run(&["doctor", "web01", "--fix"])?;
    ensure!(fixed.contains("removed"), "{fixed}");
    write(43)?;
    // The mark was of this disk alone, so nothing of it was left to need.
    right(&bed, &vm, &[], "rescan: bitmap-missing").map(drop)
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
pub(crate) fn writes_in_no_bitmap() -> Result<()> {
    let bed = Bed::start()?;
    let vm = large_with_guest(&bed)?;
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

/// A qcow2 behind a server that cannot read the 64 KiB whose offset stands in
/// the file `bad`.
fn on_failing_storage(bed: &Bed, image: &std::path::Path) -> Result<DiskSpec> {
    let (socket, bad) = (bed.lab.path("storage.sock"), bed.lab.path("bad"));
    tool("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(image)
        .arg("64M")
        .run()?;
    // An export does not grow.
    let file = std::fs::OpenOptions::new().write(true).open(image)?;
    file.set_len(16 * MIB)?;
    let (image, bad) = (image.display(), bad.display());
    let server = bed.lab.inside("nbdkit").arg("-U").arg(&socket);
    let server = server.args(["eval", "get_size=echo 16M", "flush=true"]);
    let server = server.arg(format!(
        "pread=if [ -e {bad} ]; then at=$(cat {bad}); \
         if [ $4 -lt $((at + 65536)) ] && [ $(($4 + $3)) -gt $at ]; then \
         echo EIO the head scratches >&2; exit 1; fi; fi; \
         dd if={image} iflag=skip_bytes,count_bytes skip=$4 count=$3 bs=64k status=none"
    ));
    server
        .arg(format!(
            "pwrite=dd of={image} oflag=seek_bytes seek=$4 conv=notrunc bs=64k status=none"
        ))
        .run()?;
    let xml = format!(
        "<disk type='network' device='disk'><driver name='qemu' type='qcow2'/>\
         <source protocol='nbd' name=''><host transport='unix' socket='{}'/></source>\
         <target dev='vda' bus='virtio'/></disk>",
        socket.display()
    );
    Ok(DiskSpec::raw_xml("vda", &xml))
}

#[test]
fn a_clean_block_that_cannot_be_read_ends_no_increments() -> Result<()> {
    let bed = Bed::start()?;
    let image = bed.lab.path("far.qcow2");
    let spec = on_failing_storage(&bed, &image)?;
    let vm = bed.lab.vm("web01").disk(spec).start()?;
    vm.write("vda", "write -P 1 0 64k")?;
    bed.backup(&vm, &[])?;
    vm.write("vda", "write -P 2 8M 64k")?;
    vm.flush("vda")?;
    let raw = bed.lab.path("far.raw");
    let tool_args = ["convert", "-U", "-f", "qcow2", "-O", "raw"];
    tool("qemu-img")
        .args(tool_args)
        .arg(&image)
        .arg(&raw)
        .run()?;
    let map = tool("qemu-img").args(["map", "-U", "--output=json"]);
    let map: Value = serde_json::from_str(&map.arg(&image).run()?)?;
    let offset = map[0]["offset"].as_u64().context("data at the start")?;
    std::fs::write(bed.lab.path("bad"), offset.to_string())?;
    let report = bed.backup(&vm, &[])?;
    ensure!(mode(&report, "vda") == "incremental", "{report}");
    let warnings = report["warnings"].to_string();
    ensure!(
        warnings.contains("cannot read bytes 0x0 to 0x10000"),
        "{report}"
    );
    ensure!(!warnings.contains("bitmap lied"), "{report}");
    let dir = bed.restore(&point(&report), "far", &["--format", "raw"])?;
    assert_same(&raw, &dir.join("vda.raw"))
}
