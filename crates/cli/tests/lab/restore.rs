//! Restores: to a directory, a file, a stream; never over anything.

use std::fs;

use anyhow::Result;
use highwater_testkit::{DiskSpec, Vm};

use crate::support::{Bed, point, reference};

const MIB: u64 = 1 << 20;

fn backed_up(bed: &Bed) -> Result<(Vm, String)> {
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB))
        .disk(DiskSpec::raw("vdb", 8 * MIB))
        .start()?;
    vm.write("vda", "write -P 1 1M 2M")?;
    vm.write("vdb", "write -P 2 7M 1M")?;
    let report = bed.backup(&vm, &[])?;
    Ok((vm, point(&report)))
}

#[test]
fn one_disk_goes_to_a_file_or_to_stdout() -> Result<()> {
    let bed = Bed::start()?;
    let (vm, point) = backed_up(&bed)?;
    let now = reference(&bed, &vm, "vda", "ref")?;
    let file = bed.lab.path("one.img");
    let to = file.to_str().expect("a path is text");
    bed.run(&["restore", &point, "-d", "vda", "--to", to])?;
    assert_eq!(fs::read(&file)?, fs::read(&now)?);
    let output = bed.output(&["restore", &point, "-d", "vda", "--to", "-"])?;
    assert!(output.status.success());
    assert_eq!(output.stdout, fs::read(&now)?);
    Ok(())
}

#[test]
fn a_raw_restore_is_sparse_where_the_disk_is_zero() -> Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    let bed = Bed::start()?;
    let (_, point) = backed_up(&bed)?;
    let dir = bed.restore(&point, "out", &["--format", "raw"])?;
    let metadata = fs::metadata(dir.join("vda.raw"))?;
    assert_eq!(metadata.len(), 16 * MIB);
    assert!(
        metadata.blocks() * 512 <= 2 * MIB + 4096,
        "{} blocks",
        metadata.blocks()
    );
    Ok(())
}

#[test]
fn a_restore_never_overwrites_and_leaves_no_partial_file() -> Result<()> {
    let bed = Bed::start()?;
    let (_, point) = backed_up(&bed)?;
    let dir = bed.lab.path("out");
    fs::create_dir(&dir)?;
    fs::File::create(dir.join("vdb.raw"))?;
    let to = dir.to_str().expect("a path is text");
    let (code, stderr) = bed.fail(&["restore", &point, "--to", to])?;
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("vdb.raw: it exists"), "{stderr}");
    let names: Vec<_> = fs::read_dir(&dir)?
        .map(|entry| entry.map(|it| it.file_name()))
        .collect::<Result<_, _>>()?;
    assert_eq!(names, ["vdb.raw"]);
    Ok(())
}

#[test]
fn the_definition_is_restored_with_the_disks_and_is_private() -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let bed = Bed::start()?;
    let (_, point) = backed_up(&bed)?;
    let dir = bed.restore(&point, "out", &[])?;
    let definition = dir.join("web01.xml");
    assert!(fs::read_to_string(&definition)?.contains("<name>web01</name>"));
    for entry in fs::read_dir(&dir)? {
        let entry = entry?;
        let mode = entry.metadata()?.permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{}", entry.path().display());
    }
    assert!(dir.join("vda.qcow2").exists() && dir.join("vdb.raw").exists());
    Ok(())
}

#[test]
fn an_odd_raw_file_gets_its_own_length_back() -> Result<()> {
    let bed = Bed::start()?;
    let image = bed.lab.path("odd.raw");
    let mut bytes = vec![0x5a_u8; 1_000_003];
    bytes[999_999] = 0x17;
    fs::write(&image, &bytes)?;
    let vm = bed
        .lab
        .vm("odd")
        .disk(DiskSpec::existing("vda", &image, "raw"))
        .start()?;
    let report = bed.backup(&vm, &[])?;
    let dir = bed.restore(&point(&report), "out", &[])?;
    assert_eq!(fs::read(dir.join("vda.raw"))?, bytes);
    Ok(())
}

#[test]
fn a_flipped_byte_in_a_pack_is_never_restored() -> Result<()> {
    let bed = Bed::start()?;
    let (_, point) = backed_up(&bed)?;
    let packs = highwater_testkit::tool("find")
        .arg(bed.repo().join("packs"))
        .args(["-type", "f", "-printf", "%s %p\\n"])
        .run()?;
    let largest = packs
        .lines()
        .filter_map(|line| line.split_once(' '))
        .max_by_key(|(size, _)| size.parse::<u64>().unwrap_or_default());
    let pack = largest
        .map(|(_, path)| path.to_owned())
        .expect("there is a pack");
    let mut bytes = fs::read(&pack)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&pack, bytes)?;
    let dir = bed.lab.path("out");
    let (code, stderr) = bed.fail(&["restore", &point, "--to", dir.to_str().expect("text")])?;
    assert_eq!(code, 20, "{stderr}");
    Ok(())
}
