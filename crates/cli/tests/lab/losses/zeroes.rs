//! Zeroes, holes and raw disks: what is dirty is never dropped.

use anyhow::{Result, ensure};
use highwater_testkit::{DiskSpec, KIB, MIB, tool};

use super::Story;
use crate::support::{Bed, disk};

/// virtnbdbackup finding 1: an increment drops every dirty range that is a hole
/// or zero, and a restore ignores zero frames: blocks zeroed, unmapped or
/// discarded come back with their old content.
#[test]
fn finding_1_zeroed_unmapped_and_trimmed_blocks_come_back_as_zeroes() -> Result<()> {
    let mut story = Story::of_one_disk()?;
    story.vm.write("vda", "write -P 0xaa 4M 12M")?;
    story.backup("full: first-backup")?;
    let zeroing = [
        "write -z 4M 1M",
        "write -z -u 6M 1M",
        "discard 8M 1M",
        "write -P 0 10M 1M",
    ];
    for write in zeroing {
        story.vm.write("vda", write)?;
        story.backup("incremental")?;
    }
    // All over again, and some of it written once more.
    story.vm.write("vda", "write -P 0xbb 4M 8M")?;
    story.backup("incremental")?;
    story.vm.write_all("vda", &zeroing.map(str::to_owned))?;
    story.vm.write("vda", "write -P 0xcc 8256k 64k")?;
    story.backup("incremental")?;
    story.all_points_are_right()?;
    story.bed.assert_tidy(&story.vm, 1)
}

/// virtnbdbackup finding 1, their own test `fstrimsmall`: a file system trims
/// many small pieces, smaller than a cluster, too.
#[test]
fn finding_1_many_small_discards_are_not_forgotten() -> Result<()> {
    let mut story = Story::of_one_disk()?;
    story.vm.write("vda", "write -P 0xaa 0 16M")?;
    story.backup("full: first-backup")?;
    for round in 0..3_u64 {
        let pieces = (0..60).map(|piece| {
            let offset = (piece * 3 + round) * 76;
            let len = [4, 16, 64, 100][usize::try_from(piece % 4).unwrap()];
            format!("discard {offset}k {len}k")
        });
        story.vm.write_all("vda", &pieces.collect::<Vec<_>>())?;
        let report = story.backup("incremental")?;
        ensure!(disk(&report, "vda")["dirty_bytes"] != 0, "{report}");
    }
    story.all_points_are_right()
}

/// virtnbdbackup finding 6: raw disks with compression become garbage.
#[test]
fn finding_6_raw_disks_come_back_with_every_compression() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed.lab.vm("web01").disk(DiskSpec::raw("vda", 8 * MIB));
    let mut story = Story::new(bed, vm.start()?, &["vda"]);
    let mut expected = "full: first-backup";
    for (number, compression) in ["lz4", "zstd:1", "zstd:19", "none"].iter().enumerate() {
        let write = format!("write -P {number} {number}M 1500k");
        story.vm.write("vda", &write)?;
        story.backup_as(&["--compression", compression], expected)?;
        expected = "rescan: no-marks-on-raw";
    }
    story.all_points_are_right()
}

/// Pieces of data in a map of what is allocated; one reply has room for twice
/// as many ranges as this.
const PIECES: u64 = 66_000;
const PIECE: u64 = KIB;

/// virtnbdbackup finding 7: one block-status call for two contexts, of which
/// one is cut off after 131072 ranges: the other runs ahead, and what is dirty
/// beyond the cut is dropped. Seen with `extended_l2`.
#[test]
fn finding_7_a_cut_off_map_of_allocation_hides_nothing_that_is_dirty() -> Result<()> {
    let bed = Bed::start()?;
    let disk_of_pieces = DiskSpec::qcow2("vda", 1024 * MIB)
        .cluster(16 * KIB)
        .extended_l2();
    let vm = bed.lab.vm("web01").disk(disk_of_pieces).define()?;
    write_pieces(&bed, &vm.image("vda"))?;
    vm.start()?;
    let mut story = Story::new(bed, vm, &["vda"]);
    story.backup("full: first-backup")?;
    // Far beyond the pieces, one within them, one at the disk's end.
    for place in ["900M", "70M", "1048512k"] {
        let write = format!("write -P 9 {place} 64k");
        story.vm.write("vda", &write)?;
    }
    let report = story.backup("incremental")?;
    ensure!(
        disk(&report, "vda")["dirty_bytes"] == 3 * 64 * KIB,
        "{report}"
    );
    story.all_points_are_right()
}

/// Writes every second piece while the VM is off.
fn write_pieces(bed: &Bed, image: &std::path::Path) -> Result<()> {
    let source = bed.lab.path("pieces.raw");
    let size = PIECES * 2 * PIECE;
    let mut bytes = vec![0; usize::try_from(size)?];
    for piece in bytes.chunks_mut(usize::try_from(2 * PIECE)?) {
        piece[..usize::try_from(PIECE)?].fill(7);
    }
    std::fs::write(&source, bytes)?;
    let convert = tool("qemu-img").args(["convert", "-n", "--target-is-zero", "-S", "1k"]);
    let convert = convert.args(["-f", "raw", "-O", "qcow2"]);
    convert.arg(&source).arg(image).run()?;
    let map = tool("qemu-img").args(["map", "--output", "json"]);
    let ranges = map.arg(image).run()?.matches("\"start\"").count();
    ensure!(ranges > 131_072, "only {ranges} ranges");
    Ok(())
}
