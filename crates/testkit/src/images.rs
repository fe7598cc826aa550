//! Are two disk images the same, byte for byte?

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::command::tool;

/// Read at once when hashing: a qcow2 cluster, so that holes are seen as such.
const BLOCK_BYTES: usize = 64 << 10;

/// Fails unless both images have the same size and every byte in common.
///
/// Files named `*.raw` or `*.img` are taken as raw, `*.qcow2` as qcow2; others
/// are probed. (Probing a raw image can be fooled by what a guest wrote to it.)
pub fn compare_images(a: &Path, b: &Path) -> Result<()> {
    let (size_a, size_b) = (virtual_size(a)?, virtual_size(b)?);
    ensure!(
        size_a == size_b,
        "{} has {size_a} bytes, {} has {size_b}",
        a.display(),
        b.display()
    );
    let mut compare = tool("qemu-img").args(["compare", "-q", "-U"]);
    if let Some(format) = format_by_name(a) {
        compare = compare.args(["-f", format]);
    }
    if let Some(format) = format_by_name(b) {
        compare = compare.args(["-F", format]);
    }
    compare.arg(a).arg(b).run()?;
    Ok(())
}

/// Returns the size of the disk in an image.
pub(crate) fn virtual_size(image: &Path) -> Result<u64> {
    info(image)?["virtual-size"]
        .as_u64()
        .with_context(|| format!("qemu-img tells no size of {}", image.display()))
}

/// Returns what `qemu-img info` tells about an image.
pub(crate) fn info(image: &Path) -> Result<Value> {
    let mut info = tool("qemu-img").args(["info", "-U", "--output=json"]);
    if let Some(format) = format_by_name(image) {
        info = info.args(["-f", format]);
    }
    Ok(serde_json::from_str(&info.arg(image).run()?)?)
}

fn format_by_name(image: &Path) -> Option<&'static str> {
    match image.extension()?.to_str()? {
        "raw" | "img" => Some("raw"),
        "qcow2" => Some("qcow2"),
        _ => None,
    }
}

/// Returns a hash of a raw image's content and size.
///
/// Equal content gives equal hashes wherever the holes are, and holes cost
/// little: zeroes are not hashed, data is hashed with its place.
pub fn raw_hash(image: &Path) -> Result<String> {
    let file = File::open(image).with_context(|| format!("cannot open {}", image.display()))?;
    let size = file.metadata()?.len();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&size.to_le_bytes());
    let mut block = vec![0_u8; BLOCK_BYTES];
    let mut at = 0;
    while let Some(data) = next_data(&file, at, size)? {
        at = data - data % BLOCK_BYTES as u64;
        let len = usize::try_from(size - at)
            .unwrap_or(usize::MAX)
            .min(BLOCK_BYTES);
        let bytes = &mut block[..len];
        file.read_exact_at(bytes, at)?;
        if bytes.iter().any(|byte| *byte != 0) {
            hasher.update(&at.to_le_bytes());
            hasher.update(bytes);
        }
        at += len as u64;
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Returns where the next data begins at or after `from`.
fn next_data(file: &File, from: u64, size: u64) -> Result<Option<u64>> {
    if from >= size {
        return Ok(None);
    }
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(from)) {
        Ok(data) => Ok(Some(data)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_tells_content_and_place_but_not_holes() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str, bytes: &[u8], at: u64, fill: bool| {
            let path = dir.path().join(name);
            let file = File::create(&path).unwrap();
            if fill {
                file.write_all_at(&vec![0; 1 << 20], 0).unwrap();
            }
            file.set_len(1 << 20).unwrap();
            file.write_all_at(bytes, at).unwrap();
            raw_hash(&path).unwrap()
        };
        let sparse = make("sparse", b"high", 70_000, false);
        assert_eq!(sparse, make("full", b"high", 70_000, true));
        assert_ne!(sparse, make("moved", b"high", 200_000, false));
        assert_ne!(sparse, make("other", b"tide", 70_000, false));
    }
}
