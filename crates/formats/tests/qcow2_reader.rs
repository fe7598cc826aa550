//! What the reader says of real images, against what QEMU says.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![allow(
    clippy::disallowed_methods,
    reason = "files of a test need not be durable"
)]
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use highwater_formats::{BitmapState, ImageEncryption, Qcow2Error, Qcow2Reader, fuzzing};
use highwater_testkit::tool;
use serde_json::Value;

fn create(dir: &Path, name: &str, options: &str, size: &str) -> PathBuf {
    let path = dir.join(name);
    tool("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", options])
        .arg(&path)
        .arg(size)
        .run()
        .unwrap();
    path
}

fn write(image: &Path, command: &str) {
    tool("qemu-io")
        .args(["-f", "qcow2", "-c", command])
        .arg(image)
        .run()
        .unwrap();
}

fn open(path: &Path) -> Qcow2Reader<File> {
    let file = File::open(path).unwrap();
    Qcow2Reader::open(file).unwrap().expect("a qcow2")
}

fn dirty(reader: &Qcow2Reader<File>, name: &str) -> u64 {
    let bitmaps = reader.bitmaps().unwrap();
    let bitmap = bitmaps.iter().find(|one| one.name == name).unwrap();
    reader.count_dirty(bitmap, &mut (1 << 30)).unwrap()
}

/// Compares everything that `qemu-img info` tells with what the reader says.
fn check(path: &Path) {
    let text = tool("qemu-img")
        .args(["info", "-U", "-f", "qcow2", "--output=json"])
        .arg(path)
        .run()
        .unwrap();
    let qemu: Value = serde_json::from_str(&text).unwrap();
    let (reader, details) = (open(path), &qemu["format-specific"]["data"]);
    let header = reader.header();
    let text = |value: &Value| value.as_str().map(ToOwned::to_owned);
    assert_eq!(header.size_bytes, qemu["virtual-size"], "{qemu}");
    assert_eq!(header.cluster_bytes(), qemu["cluster-size"], "{qemu}");
    assert_eq!(header.backing, text(&qemu["backing-filename"]), "{qemu}");
    assert_eq!(
        header.backing_format,
        text(&qemu["backing-filename-format"])
    );
    let data = header.data_file.as_ref().and_then(|data| data.name.clone());
    assert_eq!(data, text(&details["data-file"]), "{qemu}");
    let compat = if header.version == 2 { "0.10" } else { "1.1" };
    assert_eq!(details["compat"], compat);
    let is_encrypted = header.encryption != ImageEncryption::None;
    assert_eq!(is_encrypted, qemu["encrypted"] == true, "{qemu}");
    let known = details["bitmaps"].as_array().cloned().unwrap_or_default();
    let found = reader.bitmaps().unwrap();
    assert_eq!(found.len(), known.len(), "{qemu}");
    for (ours, theirs) in found.iter().zip(&known) {
        assert_eq!(theirs["name"], ours.name);
        assert_eq!(theirs["granularity"], ours.granularity());
        let has = |flag: &str| {
            theirs["flags"]
                .as_array()
                .unwrap()
                .iter()
                .any(|it| it == flag)
        };
        let state = match (has("in-use"), has("auto")) {
            (true, _) => BitmapState::InUse,
            (false, true) => BitmapState::Recording,
            (false, false) => BitmapState::Disabled,
        };
        assert_eq!(ours.state, state, "{theirs}");
    }
}

fn bitmap(action: &str, options: &[&str], image: &Path, name: &str) {
    tool("qemu-img")
        .args(["bitmap", action])
        .args(options)
        .arg(image)
        .arg(name)
        .run()
        .unwrap();
}

#[test]
fn images_of_every_cluster_size_are_read_as_qemu_reads_them() {
    let dir = tempfile::tempdir().unwrap();
    for bits in 9..=21_u32 {
        let options = format!("cluster_size={}", 1_u32 << bits);
        let path = create(dir.path(), "a.qcow2", &options, "8M");
        check(&path);
        bitmap("--add", &["-g", "512"], &path, "m");
        write(&path, "write -P 7 1M 1536");
        check(&path);
        assert_eq!(dirty(&open(&path), "m"), 1536, "{options}");
    }
}

#[test]
fn versions_names_data_files_and_encryption_are_read_as_qemu_reads_them() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    check(&create(dir, "old.qcow2", "compat=0.10", "1M"));
    check(&create(
        dir,
        "wide.qcow2",
        "extended_l2=on,cluster_size=128k",
        "1M",
    ));
    check(&create(dir, "zstd.qcow2", "compression_type=zstd", "1M"));
    check(&create(dir, "odd.qcow2", "cluster_size=4k", "1049088"));
    let base = create(dir, "base \u{e9},x.qcow2", "compat=1.1", "1M");
    let backing = format!("backing_file={},backing_fmt=qcow2", base.display());
    check(&create(
        dir,
        "over.qcow2",
        &backing.replace(",x", ",,x"),
        "2M",
    ));
    for raw in ["on", "off"] {
        let data = dir.join(format!("data-{raw}"));
        let options = format!("data_file={},data_file_raw={raw}", data.display());
        let path = create(dir, &format!("df-{raw}.qcow2"), &options, "1M");
        check(&path);
        let header = open(&path).header().clone();
        assert_eq!(header.data_file.unwrap().is_raw, raw == "on");
    }
    let luks = dir.join("luks.qcow2");
    tool("qemu-img")
        .args([
            "create",
            "-q",
            "-f",
            "qcow2",
            "--object",
            "secret,id=s,data=sesame",
        ])
        .args([
            "-o",
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        ])
        .arg(&luks)
        .arg("1M")
        .run()
        .unwrap();
    check(&luks);
    fs::write(dir.join("raw"), [0x51; 4096]).unwrap();
    let raw = File::open(dir.join("raw")).unwrap();
    assert!(Qcow2Reader::open(raw).unwrap().is_none());
}

#[test]
fn dirty_bytes_are_those_that_were_written_since() {
    let dir = tempfile::tempdir().unwrap();
    // The last bit stands for less than the others, and the disk ends in a byte of bits.
    let path = create(dir.path(), "a.qcow2", "cluster_size=4k", "1000448");
    bitmap("--add", &["-g", "512"], &path, "fine");
    bitmap("--add", &["-g", "64k"], &path, "coarse");
    bitmap("--add", &["--disable"], &path, "off");
    write(&path, "write -P 1 0 1000448");
    check(&path);
    assert_eq!(dirty(&open(&path), "fine"), 1_000_448);
    assert_eq!(dirty(&open(&path), "coarse"), 16 * 65536);
    assert_eq!(dirty(&open(&path), "off"), 0);
    bitmap("--clear", &[], &path, "fine");
    assert_eq!(dirty(&open(&path), "fine"), 0);
    write(&path, "write -P 2 999936 512");
    assert_eq!(dirty(&open(&path), "fine"), 512);
}

#[test]
fn eight_tebibytes_and_many_bitmaps_are_read_within_their_budget() {
    let dir = tempfile::tempdir().unwrap();
    let path = create(dir.path(), "a.qcow2", "compat=1.1", "8T");
    for n in 0..10 {
        bitmap("--add", &["-g", "64k"], &path, &format!("m{n}"));
    }
    write(&path, "write -P 1 7T 64k");
    check(&path);
    let reader = open(&path);
    let mut budget = 1 << 20;
    let all = reader.bitmaps().unwrap();
    let counts = all.iter().map(|one| reader.count_dirty(one, &mut budget));
    let first: Vec<u64> = counts.take(10).map(Result::unwrap).collect();
    assert_eq!(first, [65536; 10]);
    assert!(reader.count_dirty(&all[0], &mut 64).is_err());
}

#[test]
fn a_bitmap_that_was_not_closed_is_in_use_and_a_program_without_bitmaps_forgets_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = create(dir.path(), "a.qcow2", "compat=1.1", "1M");
    bitmap("--add", &[], &path, "m");
    let aborted = tool("qemu-io")
        .args(["-f", "qcow2", "-c", "write 0 64k", "-c", "abort"])
        .arg(&path)
        .run();
    assert!(aborted.is_err());
    check(&path);
    assert_eq!(open(&path).bitmaps().unwrap()[0].state, BitmapState::InUse);
    // Autoclear features: a program that knows of none writes zeroes.
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[0; 8], 88).unwrap();
    assert_eq!(open(&path).bitmaps().unwrap(), []);
    check(&path);
}

#[test]
fn an_image_that_is_cut_off_or_lies_is_refused_and_no_reading_panics() {
    let dir = tempfile::tempdir().unwrap();
    let path = create(dir.path(), "a.qcow2", "cluster_size=512", "64k");
    bitmap("--add", &["-g", "512"], &path, "m");
    let whole = fs::read(&path).unwrap();
    for length in 0..whole.len() {
        fuzzing::qcow2(&whole[..length]);
    }
    // Every byte of header and extensions, and what else a field may say.
    for place in 0..whole.len().min(1024) {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut lying = whole.clone();
            lying[place] = value;
            fuzzing::qcow2(&lying);
        }
    }
    let lie = |at: usize, bytes: &[u8]| {
        let mut lying = whole.clone();
        lying[at..at + bytes.len()].copy_from_slice(bytes);
        Qcow2Reader::open(lying.as_slice()).map(drop)
    };
    assert!(matches!(
        lie(4, &9_u32.to_be_bytes()),
        Err(Qcow2Error::Unknown(_))
    ));
    assert!(matches!(lie(72, &[0x80]), Err(Qcow2Error::Unknown(_))));
    assert!(matches!(
        lie(20, &[0, 0, 0, 40]),
        Err(Qcow2Error::Malformed(_))
    ));
    assert!(matches!(lie(24, &[0xff]), Err(Qcow2Error::Malformed(_))));
}

#[test]
fn what_the_fuzzer_found_is_survived() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    highwater_testkit::replay(&corpora.join("qcow2"), fuzzing::qcow2);
}
