//! The image written here is the image QEMU's own tools read.

#![allow(
    clippy::unwrap_used,
    clippy::needless_for_each,
    reason = "a test may stop at the first surprise"
)]

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use highwater_formats::{ChunkSetBuilder, Qcow2Layout};
use highwater_model::ChunkSize;

fn qemu_img(args: &[&str]) -> String {
    let output = Command::new("qemu-img")
        .args(args)
        .output()
        .expect("qemu-img is installed");
    assert!(
        output.status.success(),
        "qemu-img {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn path(path: &Path) -> &str {
    path.to_str().expect("test paths are text")
}

/// Writes an image with a distinct pattern in each chunk of `chunks`, has
/// qemu-img check it and compare it with a raw file made by plain writes.
fn check(size_bytes: u64, chunk_bytes: u64, chunks: &[u64]) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (raw, qcow2) = (dir.path().join("a.raw"), dir.path().join("a.qcow2"));
    let raw_file = File::create(&raw).unwrap();
    raw_file.set_len(size_bytes).unwrap();
    let mut set = ChunkSetBuilder::new(size_bytes.div_ceil(chunk_bytes));
    chunks.iter().for_each(|chunk| set.insert(*chunk));
    let layout = Qcow2Layout::new(
        size_bytes,
        ChunkSize::new(chunk_bytes).unwrap(),
        set.build(),
    );
    let file = File::create(&qcow2).unwrap();
    file.set_len(layout.file_bytes()).unwrap();
    layout
        .write_metadata(|offset, bytes| file.write_all_at(bytes, offset))
        .unwrap();
    for chunk in chunks {
        let start = chunk * chunk_bytes;
        let len = chunk_bytes.min(size_bytes - start);
        let pattern = u8::try_from(chunk % 250 + 1).unwrap();
        let bytes = vec![pattern; usize::try_from(len).unwrap()];
        raw_file.write_all_at(&bytes, start).unwrap();
        file.write_all_at(&bytes, layout.data_offset(*chunk).unwrap())
            .unwrap();
    }
    qemu_img(&["check", "-q", "-f", "qcow2", path(&qcow2)]);
    qemu_img(&[
        "compare",
        "-q",
        "-f",
        "raw",
        "-F",
        "qcow2",
        path(&raw),
        path(&qcow2),
    ]);
    let info = qemu_img(&["info", "--output=json", path(&qcow2)]);
    assert!(
        info.contains(&format!("\"virtual-size\": {size_bytes},")),
        "{info}"
    );
}

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

#[test]
fn qemu_reads_back_every_chunk_of_a_written_image() {
    check(0, 64 << 10, &[]);
    check(64 << 10, 64 << 10, &[0]);
    check(10 * MIB, 64 << 10, &[0, 1, 5, 159]);
    check(3 * GIB, 64 << 10, &[0, 8191, 8192, 20_000, 49_151]);
    check(3 * GIB, MIB, &[0, 511, 512, 3071]);
    check(3 * GIB, 4 * MIB, &[1, 127, 128, 767]);
}

#[test]
fn an_image_that_ends_inside_a_chunk_keeps_its_size() {
    check(10 * MIB + 512, 64 << 10, &[160]);
    check(10 * MIB + 512, 4 * MIB, &[0, 2]);
    check(512, 64 << 10, &[0]);
}

#[test]
fn an_image_of_eight_tebibytes_has_room_for_its_tables() {
    let last = (8 << 40) / (64 << 10) - 1;
    check(8 << 40, 64 << 10, &[0, 1 << 20, last]);
}

#[test]
fn many_chunks_fill_several_refcount_blocks() {
    let chunks: Vec<u64> = (0..33_000).collect();
    let size_bytes = 33_000 * (64 << 10);
    let mut set = ChunkSetBuilder::new(33_000);
    chunks.iter().for_each(|chunk| set.insert(*chunk));
    let layout = Qcow2Layout::new(size_bytes, ChunkSize::DEFAULT, set.build());
    let dir = tempfile::tempdir().expect("a temporary directory");
    let qcow2 = dir.path().join("a.qcow2");
    let file = File::create(&qcow2).unwrap();
    file.set_len(layout.file_bytes()).unwrap();
    layout
        .write_metadata(|offset, bytes| file.write_all_at(bytes, offset))
        .unwrap();
    qemu_img(&["check", "-q", "-f", "qcow2", path(&qcow2)]);
}
