//! Values as people write them, in arguments and in the configuration alike.

use highwater_engine::AuditWish;
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

/// How much an audit reads, as it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Audit(pub(crate) AuditWish);

impl std::fmt::Display for Audit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            AuditWish::Blocks(blocks) => write!(f, "{blocks}"),
            AuditWish::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

pub(crate) fn audit(text: &str) -> Result<Audit, String> {
    let wish = match text.strip_suffix('%') {
        Some(percent) => percent
            .parse()
            .ok()
            .filter(|percent| *percent <= 100)
            .map(AuditWish::Percent),
        None => text.parse().ok().map(AuditWish::Blocks),
    };
    wish.map(Audit)
        .ok_or_else(|| "write a number of blocks such as 500, or 0% to 100%".to_owned())
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
    fn an_audit_is_a_number_of_blocks_or_a_share_of_all() {
        for (text, wish) in [
            ("0", AuditWish::Blocks(0)),
            ("500", AuditWish::Blocks(500)),
            ("0%", AuditWish::Percent(0)),
            ("100%", AuditWish::Percent(100)),
        ] {
            assert_eq!(audit(text), Ok(Audit(wish)));
            assert_eq!(Audit(wish).to_string(), text);
        }
        for wrong in ["", "%", "-1", "101%", "1.5%", "many", "5 %", "300%"] {
            assert!(audit(wrong).is_err(), "{wrong}");
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
