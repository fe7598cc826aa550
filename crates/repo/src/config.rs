//! The repository's configuration object: plain, small, read first.
//!
//! One line of JSON, and on a second line its BLAKE3 hash: enough to notice
//! damage. Against tampering it is bound into the wrap of every key.

use highwater_model::{ChunkSize, RepoId};
use serde::{Deserialize, Serialize};

use crate::error::{Flaw, RepoError, RepoErrorKind};
use crate::seal::Cipher;

/// More than any version will need; the object is read whole.
pub(crate) const CONFIG_LEN_MAX: u64 = 64 << 10;

const FORMAT: &str = "highwater";
const VERSION: u32 = 1;

/// What a repository is, once and for all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Config {
    pub(crate) id: RepoId,
    pub(crate) chunk_size: ChunkSize,
    pub(crate) cipher: Cipher,
}

/// The JSON as stored.
#[derive(Serialize, Deserialize)]
struct Wire {
    format: String,
    version: u32,
    features_incompat: Vec<String>,
    features_ro: Vec<String>,
    id: RepoId,
    chunk_bytes: u32,
    cipher: String,
}

/// The part that every version of the format has.
#[derive(Deserialize)]
struct Preamble {
    format: String,
    version: u32,
    #[serde(default)]
    features_incompat: Vec<String>,
}

/// Other programs keep a `config` too. One that was ours before it was damaged
/// still has some of our words.
pub(crate) fn is_ours(bytes: &[u8]) -> bool {
    let has = |word: &[u8]| bytes.windows(word.len()).any(|part| part == word);
    has(FORMAT.as_bytes()) || has(b"features_incompat") || has(b"chunk_bytes")
}

impl Config {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let wire = Wire {
            format: FORMAT.to_owned(),
            version: VERSION,
            features_incompat: Vec::new(),
            features_ro: Vec::new(),
            id: self.id,
            chunk_bytes: self.chunk_size.into(),
            cipher: self.cipher.name().to_owned(),
        };
        let line = serde_json::to_string(&wire).expect("a struct of plain fields becomes JSON");
        let hash = blake3::hash(line.as_bytes()).to_hex();
        format!("{line}\n{hash}\n").into_bytes()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, RepoError> {
        let damaged = |flaw| RepoError::damaged("read the repository's `config`", flaw);
        let text = str::from_utf8(bytes).map_err(|_| damaged(Flaw("it is not text")))?;
        let mut lines = text.split('\n');
        let line = lines.next().unwrap_or_default();
        let preamble: Preamble =
            serde_json::from_str(line).map_err(|_| damaged(Flaw("it is not a configuration")))?;
        if preamble.format != FORMAT {
            return Err(damaged(Flaw("it is not one of Highwater")));
        }
        // Before the hash: a later version may have another way to check.
        if preamble.version != VERSION || !preamble.features_incompat.is_empty() {
            let why = format!(
                "it has format version {} with features {:?}; this program knows version {VERSION}",
                preamble.version, preamble.features_incompat
            );
            return Err(
                RepoError::new(RepoErrorKind::NewerFormat, "open the repository").because(why),
            );
        }
        let hash = blake3::hash(line.as_bytes()).to_hex();
        if lines.next() != Some(hash.as_str()) || lines.next() != Some("") || lines.next().is_some()
        {
            return Err(damaged(Flaw("its hash does not match")));
        }
        let wire: Wire =
            serde_json::from_str(line).map_err(|_| damaged(Flaw("a field is missing or wrong")))?;
        let chunk_size = ChunkSize::try_from(wire.chunk_bytes)
            .map_err(|_| damaged(Flaw("its chunk size is impossible")))?;
        let cipher = Cipher::from_name(&wire.cipher)
            .ok_or_else(|| damaged(Flaw("its cipher is unknown")))?;
        Ok(Self {
            id: wire.id,
            chunk_size,
            cipher,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config {
            id: RepoId::from_bytes([0xab; 16]),
            chunk_size: ChunkSize::DEFAULT,
            cipher: Cipher::Aes256Gcm,
        }
    }

    #[test]
    fn the_bytes_of_a_config_never_change() {
        let wanted = concat!(
            r#"{"format":"highwater","version":1,"features_incompat":[],"features_ro":[],"#,
            r#""id":"abababababababababababababababab","chunk_bytes":65536,"cipher":"aes-256-gcm"}"#,
        );
        let text = String::from_utf8(config().encode()).unwrap();
        let (line, hash) = text.split_once('\n').unwrap();
        assert_eq!(line, wanted);
        assert_eq!(
            hash.trim_end(),
            blake3::hash(wanted.as_bytes()).to_hex().as_str()
        );
        assert_eq!(Config::decode(text.as_bytes()).unwrap(), config());
    }

    #[test]
    fn a_newer_or_featureful_repository_is_refused_by_name() {
        for (from, to) in [
            (r#""version":1"#, r#""version":2"#),
            (r#"compat":[]"#, r#"compat":["x"]"#),
        ] {
            let text = String::from_utf8(config().encode())
                .unwrap()
                .replacen(from, to, 1);
            let error = Config::decode(text.as_bytes()).unwrap_err();
            assert_eq!(error.kind(), RepoErrorKind::NewerFormat, "{to}");
        }
    }

    #[test]
    fn every_flipped_bit_of_a_config_is_noticed() {
        let good = config().encode();
        for at in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[at / 8] ^= 1 << (at % 8);
            assert!(Config::decode(&bad).is_err(), "bit {at}");
        }
    }
}
