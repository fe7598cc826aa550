//! Disks of every shape in one VM, in chunks of every size.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{DiskSpec, KIB, MIB, Vm, tool};
use serde_json::Value;

use crate::matrix::{
    Reading, Subject, Taken, check, check_own_format, rounds_equal_the_disks, take, write_to,
};
use crate::support::{Bed, point, wait_for_job};

const INCREMENTAL: &str = "incremental";
const NO_MARKS: &str = "rescan: no-marks-on-raw";

/// A disk to be made, its size as the guest sees it, and what becomes of it.
type Shape = (&'static str, DiskSpec, u64, &'static str);

/// Sizes are no multiples of a chunk, nor of 64 KiB, but where it says so.
fn shapes(bed: &Bed) -> Result<Vec<Shape>> {
    let qcow2 = DiskSpec::qcow2;
    let chain = chain(bed)?;
    let compressed = compressed(bed)?;
    let odd = bed.lab.path("odd.raw");
    fs::write(&odd, vec![0x5a; 3_000_003])?;
    let odd_size = 3_000_003_u64.next_multiple_of(512);
    let shape = |target, spec: fn(&str, u64) -> DiskSpec, size, expected| {
        (target, spec(target, size), size, expected)
    };
    let plain = |target, spec: DiskSpec, size| (target, spec, size, INCREMENTAL);
    let (a, b, c) = (5 * MIB + 512, 4 * MIB + 65_024, 6 * MIB + 4096);
    Ok(vec![
        shape("vda", qcow2, a, INCREMENTAL),
        shape(
            "vdb",
            |t, s| DiskSpec::qcow2(t, s).extended_l2(),
            b,
            INCREMENTAL,
        ),
        shape(
            "vdc",
            |t, s| DiskSpec::qcow2(t, s).cluster(4 * KIB),
            a,
            INCREMENTAL,
        ),
        shape(
            "vdd",
            |t, s| DiskSpec::qcow2(t, s).cluster(512),
            b,
            INCREMENTAL,
        ),
        shape(
            "vde",
            |t, s| DiskSpec::qcow2(t, s).cluster(2 * MIB),
            c,
            INCREMENTAL,
        ),
        shape(
            "vdf",
            |t, s| DiskSpec::qcow2(t, s).compat_v2(),
            a,
            "rescan: no-marks-on-qcow2-v2",
        ),
        shape("vdg", DiskSpec::raw, 4 * MIB, NO_MARKS),
        (
            "vdh",
            DiskSpec::existing("vdh", &odd, "raw"),
            odd_size,
            NO_MARKS,
        ),
        plain(
            "vdi",
            qcow2("vdi", 7 * MIB).backing(&chain, "qcow2"),
            7 * MIB,
        ),
        shape(
            "vdj",
            |t, s| DiskSpec::qcow2(t, s).data_file(),
            b,
            INCREMENTAL,
        ),
        plain(
            "vdk",
            DiskSpec::existing("vdk", &compressed, "qcow2"),
            3 * MIB,
        ),
        shape(
            "vdl",
            |t, s| {
                let disk = DiskSpec::qcow2(t, s).option("lazy_refcounts=on".to_owned());
                disk.option("refcount_bits=64".to_owned()).discard_ignored()
            },
            b,
            INCREMENTAL,
        ),
        shape(
            "vdm",
            |t, s| DiskSpec::qcow2(t, s).iothread(),
            a,
            INCREMENTAL,
        ),
        plain(
            "vdn",
            qcow2("vdn", c)
                .cluster(64 * KIB)
                .element("<blockio logical_block_size='4096' physical_block_size='4096'/>"),
            c,
        ),
        shape("sda", qcow2, a, INCREMENTAL),
        shape(
            "hda",
            |t, s| DiskSpec::qcow2(t, s).extended_l2().cluster(2 * MIB),
            b,
            INCREMENTAL,
        ),
    ])
}

/// A raw file below a qcow2 of small clusters below one of large clusters, each
/// longer than the one below it. Named like the disk, so that the testkit knows
/// whose they are.
fn chain(bed: &Bed) -> Result<PathBuf> {
    let base = bed.lab.path("web01-vdi.base");
    fs::write(&base, vec![0x5a; 3 << 20])?;
    let below = bed.lab.path("web01-vdi.below");
    overlay(&below, &base, "raw", "cluster_size=4k", "5M")?;
    fill(&below, &["write -P 9 2560k 1M", "write -z 1M 70k"])?;
    let middle = bed.lab.path("web01-vdi.middle");
    overlay(&middle, &below, "qcow2", "cluster_size=2M", "6M")?;
    fill(&middle, &["write -P 8 4900k 600k", "discard 0 2M"])?;
    Ok(middle)
}

/// An image of compressed clusters.
fn compressed(bed: &Bed) -> Result<PathBuf> {
    let (raw, image) = (bed.lab.path("plain.raw"), bed.lab.path("zstd.qcow2"));
    let bytes: Vec<u8> = (0..=u8::MAX)
        .flat_map(|byte| vec![byte; 12 << 10])
        .collect();
    fs::write(&raw, bytes)?;
    let convert = tool("qemu-img").args(["convert", "-c", "-f", "raw", "-O", "qcow2"]);
    let convert = convert.args(["-o", "compression_type=zstd"]);
    convert.arg(&raw).arg(&image).run()?;
    Ok(image)
}

fn overlay(path: &Path, below: &Path, format: &str, option: &str, size: &str) -> Result<()> {
    let create = tool("qemu-img").args(["create", "-q", "-f", "qcow2", "-o", option]);
    create
        .args(["-F", format, "-b"])
        .arg(below)
        .arg(path)
        .arg(size)
        .run()?;
    Ok(())
}

fn fill(image: &Path, commands: &[&str]) -> Result<()> {
    let mut io = tool("qemu-io").args(["-f", "qcow2"]);
    for command in commands {
        io = io.args(["-c", command]);
    }
    io.arg(image).run()?;
    Ok(())
}

/// Makes the VM; `first` are disks before all others.
fn vm_of_every_shape(bed: &Bed, first: &[DiskSpec]) -> Result<(Vm, Vec<Subject>)> {
    let shapes = shapes(bed)?;
    let mut vm = bed.lab.vm("web01");
    for spec in first {
        vm = vm.disk(spec.clone());
    }
    for (_, spec, _, _) in &shapes {
        vm = vm.disk(spec.clone());
    }
    let vm = vm.start()?;
    let subjects = shapes.iter().map(|(target, _, size, expected)| {
        let image = vm.image(target);
        let reading = if image.extension().is_some_and(|it| it == "raw") {
            Reading::RawFile(image)
        } else {
            Reading::Image(image, "qcow2")
        };
        Subject::new(target, *size, reading, expected)
    });
    let subjects = subjects.collect::<Result<Vec<_>>>()?;
    Ok((vm, subjects))
}

fn every_shape_comes_back(chunk_size: &str, rounds: usize) -> Result<()> {
    let bed = Bed::with_init(&["--encryption", "none", "--chunk-size", chunk_size], None)?;
    let (vm, mut subjects) = vm_of_every_shape(&bed, &[])?;
    rounds_equal_the_disks(&bed, &vm, &mut subjects, rounds).context(chunk_size.to_owned())?;
    bed.assert_tidy(&vm, 1)
}

#[test]
fn disks_of_every_shape_come_back_byte_for_byte_in_chunks_of_64_kib() -> Result<()> {
    every_shape_comes_back("64KiB", 5)
}

#[test]
fn disks_of_every_shape_come_back_byte_for_byte_in_chunks_of_256_kib() -> Result<()> {
    every_shape_comes_back("256KiB", 3)
}

#[test]
fn disks_of_every_shape_come_back_byte_for_byte_in_chunks_of_4_mib() -> Result<()> {
    every_shape_comes_back("4MiB", 3)
}

/// Smaller than a chunk, than a cluster, than a sector; exactly as large; and a
/// sector more.
#[test]
fn disks_of_a_few_bytes_come_back_with_their_own_length() -> Result<()> {
    const CHUNK: u64 = 64 * KIB;
    let bed = Bed::start()?;
    let mut vm = bed.lab.vm("web01");
    let mut images = Vec::new();
    for (place, bytes) in [0_u16, 1, 511, 512, 513].into_iter().enumerate() {
        let image = bed.lab.path(&format!("tiny{bytes}.raw"));
        fs::write(&image, vec![0x5a; usize::from(bytes)])?;
        let target = format!("sd{}", ["a", "b", "c", "d", "e"][place]);
        vm = vm.disk(DiskSpec::existing(&target, &image, "raw"));
        images.push((target, Reading::RawFile(image)));
    }
    for (target, bytes) in [
        ("vda", 512),
        ("vdb", CHUNK - 512),
        ("vdc", CHUNK),
        ("vdd", CHUNK + 512),
        ("vde", 64 * CHUNK),
        ("vdf", 64 * CHUNK + 512),
    ] {
        vm = vm.disk(DiskSpec::qcow2(target, bytes));
        let image = bed.lab.path(&format!("web01-{target}.qcow2"));
        images.push((target.to_owned(), Reading::Image(image, "qcow2")));
    }
    let vm = vm.start()?;
    let subjects: Vec<Subject> = images
        .into_iter()
        .map(|(target, reading)| Subject::new(&target, MIB, reading, ""))
        .collect::<Result<_>>()?;
    let mut points = Vec::new();
    for pattern in 1..4 {
        let write = format!("write -P {pattern} 0 512");
        let qcow2 = subjects.iter().map(|subject| subject.target.as_str());
        let qcow2 = qcow2.filter(|target| target.starts_with('v'));
        let commands = qcow2.flat_map(|target| [(target, write.as_str()), (target, "flush")]);
        vm.write_each(&commands.collect::<Vec<_>>())?;
        let (taken, _) = take(&bed, &vm, &[], &subjects)?;
        points.push(taken);
    }
    for taken in &points {
        check(&bed, taken)?;
    }
    check_own_format(&bed, &points[1])?;
    bed.assert_tidy(&vm, 1)
}

/// Filters between the guest and its image, and what else a definition may say.
#[test]
fn disks_with_filters_limits_queues_and_slices_come_back_byte_for_byte() -> Result<()> {
    let bed = Bed::start()?;
    let base = bed.lab.path("web01-vda.base");
    fs::write(&base, vec![0x66; 3 << 20])?;
    let sliced = bed.lab.path("sliced.raw");
    fs::write(&sliced, vec![0x5a; 6 << 20])?;
    let slice = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'>\
         <slices><slice type='storage' offset='1048576' size='3145728'/></slices></source>\
         <target dev='vdd' bus='virtio'/></disk>",
        sliced.display()
    );
    let size = 3 * MIB + 512;
    let vm = bed
        .lab
        .vm("web01")
        .disk(
            DiskSpec::qcow2("vda", size)
                .backing(&base, "raw")
                .driver("copy_on_read='on'"),
        )
        .disk(
            DiskSpec::qcow2("vdb", size)
                .element("<iotune><total_iops_sec>100000</total_iops_sec></iotune>"),
        )
        .disk(DiskSpec::qcow2("vdc", size).driver("queues='2' detect_zeroes='unmap' io='threads'"))
        .disk(DiskSpec::raw_xml("vdd", &slice))
        .disk(DiskSpec::qcow2("sda", size).serial("S1"))
        .start()?;
    let reading = |target| Reading::Image(vm.image(target), "qcow2");
    let of_slice = format!(
        "driver=raw,offset=1048576,size=3145728,file.filename={}",
        sliced.display()
    );
    let of_slice = Reading::Options(vec!["--image-opts".to_owned(), of_slice]);
    let mut subjects = vec![Subject::new("vdd", 3 * MIB, of_slice, NO_MARKS)?];
    for target in ["vda", "vdb", "vdc", "sda"] {
        subjects.push(Subject::new(target, size, reading(target), INCREMENTAL)?);
    }
    rounds_equal_the_disks(&bed, &vm, &mut subjects, 4)
}

/// Two disks that are slow to copy keep the others waiting; what the guest does
/// to those meanwhile belongs to the next point.
#[test]
fn disks_of_every_shape_are_of_one_moment_while_the_guest_overwrites_them() -> Result<()> {
    let bed = Bed::start()?;
    let slow = ["vdx", "vdy"];
    let ballast = slow.map(|target| DiskSpec::qcow2(target, 16 * MIB));
    let (vm, mut subjects) = vm_of_every_shape(&bed, &ballast)?;
    write_to(&vm, &mut subjects, 10)?;
    let mut points = Vec::new();
    for round in 0..2 {
        for target in slow {
            vm.write(target, &format!("write -s {} 0 4M", text(&bed)?.display()))?;
        }
        let mut references = Vec::new();
        for subject in &subjects {
            references.push(subject.copy(&bed, &format!("moment-{round}"))?);
        }
        let arguments = ["backup", "web01", "--json", "--workers", "1"];
        let mut child = bed.spawn(&[&arguments[..], &["--compression", "zstd:19"]].concat())?;
        wait_for_job(&vm)?;
        write_to(&vm, &mut subjects, 4)?;
        ensure!(child.try_wait()?.is_none(), "the backup was too quick");
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "{output:?}");
        let report: Value = serde_json::from_slice(&output.stdout)?;
        points.push(Taken {
            point: point(&report),
            references,
        });
    }
    for taken in &points {
        check(&bed, taken)?;
    }
    bed.assert_tidy(&vm, 1)
}

/// Returns 4 MiB that a compressor tries its best at: random letters. (With
/// random bytes it gives up at once.)
fn text(bed: &Bed) -> Result<PathBuf> {
    let file = bed.lab.path("text");
    let command = "base64 -w 0 /dev/urandom | head -c 4M > \"$0\"";
    tool("bash").args(["-c", command]).arg(&file).run()?;
    Ok(file)
}
