//! Values as people write them, in arguments and in the configuration alike.

use highwater_engine::repository::Compression;
use highwater_model::{ChunkSize, parse_size};

/// Longest tag or name of a group, bytes; a table of points shall stay one.
const LABEL_BYTES_MAX: usize = 100;

pub(crate) fn size(text: &str) -> Result<u64, String> {
    parse_size(text).ok_or_else(|| "write a size such as 512KiB or 20GiB".to_owned())
}

pub(crate) fn rate(text: &str) -> Result<u64, String> {
    let bytes = text.strip_suffix("/s").unwrap_or(text);
    parse_size(bytes)
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| "write bytes per second, such as 800KiB or 50MiB".to_owned())
}

pub(crate) fn chunk_size(text: &str) -> Result<ChunkSize, String> {
    ChunkSize::new(size(text)?).map_err(|error| error.to_string())
}

pub(crate) fn compression(text: &str) -> Result<Compression, String> {
    match text {
        "none" => Ok(Compression::None),
        "lz4" => Ok(Compression::Lz4),
        // Level 3 is zstd's own default; here level 1 keeps up with a disk.
        "zstd" => Ok(Compression::Zstd(1)),
        _ => {
            let level = text
                .strip_prefix("zstd:")
                .and_then(|level| level.parse().ok());
            level
                .filter(|level| (1..=19).contains(level))
                .map(Compression::Zstd)
                .ok_or_else(|| "use zstd, zstd:1 to zstd:19, lz4 or none".to_owned())
        }
    }
}

/// A tag, or the name of a group: it stands in tables and in shell commands.
pub(crate) fn label(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > LABEL_BYTES_MAX {
        return Err(format!("use 1 to {LABEL_BYTES_MAX} bytes"));
    }
    if text
        .chars()
        .any(|c| c.is_control() || c.is_whitespace() || c == ',')
    {
        return Err("use no blanks, commas or control characters".to_owned());
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_a_size_with_or_without_per_second() {
        for (text, bytes) in [("50MiB", 50 << 20), ("50MiB/s", 50 << 20), ("1", 1)] {
            assert_eq!(rate(text), Ok(bytes), "{text}");
        }
        for wrong in ["0", "", "fast", "5MiB/min"] {
            assert!(rate(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_label_is_one_word() {
        assert_eq!(label("nightly"), Ok("nightly".to_owned()));
        for wrong in ["", "a b", "a,b", "a\nb", &"x".repeat(101)] {
            assert!(label(wrong).is_err(), "{wrong}");
        }
    }
}
