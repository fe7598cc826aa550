//! Every point of a long history equals the disks as they were.

use anyhow::Result;
use highwater_testkit::DiskSpec;
use highwater_testkit::workload::Workload;

use crate::support::{Bed, assert_same, mode, point, reference};

const MIB: u64 = 1 << 20;

/// Two disks, fourteen points, every kind of guest write between them.
fn every_point_equals_the_disks_as_they_were(bed: &Bed, seed: u64, args: &[&str]) -> Result<()> {
    const POINTS: usize = 14;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 64 * MIB))
        .disk(DiskSpec::qcow2("vdb", 24 * MIB + 12_800))
        .start()?;
    let mut vda = Workload::new(seed, usize::try_from(64 * MIB)?);
    let mut vdb = Workload::new(seed + 1, usize::try_from(24 * MIB + 12_800)?);
    let mut points = Vec::new();
    for number in 0..POINTS {
        vda.run(&vm, "vda", 40)?;
        // Now and then one disk is left alone.
        if number % 4 != 3 {
            vdb.run(&vm, "vdb", 15)?;
        }
        let report = bed.backup(&vm, args)?;
        let expected = if number == 0 {
            "full: first-backup"
        } else {
            "incremental"
        };
        assert_eq!(mode(&report, "vda"), expected, "point {number}: {report}");
        assert_eq!(mode(&report, "vdb"), expected, "point {number}: {report}");
        assert_eq!(
            report["warnings"].as_array().map(Vec::len),
            Some(0),
            "{report}"
        );
        let references = [
            reference(bed, &vm, "vda", &format!("ref-{number}-vda"))?,
            reference(bed, &vm, "vdb", &format!("ref-{number}-vdb"))?,
        ];
        points.push((point(&report), references));
        bed.assert_tidy(&vm, 1)?;
    }
    for (number, (point, [vda, vdb])) in points.iter().enumerate() {
        let format = if number % 2 == 0 { "qcow2" } else { "raw" };
        let dir = bed.restore(point, &format!("out-{number}"), &["--format", format])?;
        assert_same(vda, &dir.join(format!("vda.{format}")))?;
        assert_same(vdb, &dir.join(format!("vdb.{format}")))?;
        std::fs::remove_dir_all(dir)?;
    }
    Ok(())
}

#[test]
fn fourteen_points_of_two_disks_come_back_byte_for_byte() -> Result<()> {
    every_point_equals_the_disks_as_they_were(&Bed::start()?, 1, &[])
}

#[test]
fn fourteen_encrypted_points_come_back_byte_for_byte() -> Result<()> {
    every_point_equals_the_disks_as_they_were(&Bed::start_encrypted()?, 100, &[])
}

#[test]
fn fourteen_uncompressed_points_in_large_chunks_come_back_byte_for_byte() -> Result<()> {
    let bed = Bed::with_init(&["--encryption", "none", "--chunk-size", "1MiB"], None)?;
    every_point_equals_the_disks_as_they_were(&bed, 200, &["--compression", "none"])
}
