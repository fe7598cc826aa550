//! Names of things: repositories, restore points, sessions, marks, objects.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Timestamp, hex};

/// Why a text is not the id it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a {what}")]
pub struct IdError {
    what: &'static str,
    text: String,
}

macro_rules! binary_id {
    ($(#[$doc:meta])* $name:ident, $len:literal, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name([u8; $len]);

        impl $name {
            /// Wraps bytes that already are such an id.
            pub const fn from_bytes(bytes: [u8; $len]) -> Self {
                Self(bytes)
            }

            /// Returns the bytes.
            pub const fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                hex::decode(text)
                    .map(Self)
                    .ok_or_else(|| IdError { what: $what, text: text.chars().take(80).collect() })
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.to_string()
            }
        }
    };
}

macro_rules! random_id {
    ($name:ident) => {
        impl $name {
            /// Draws a new, unguessable id from the operating system's generator.
            pub fn random() -> Self {
                Self(random_bytes())
            }
        }
    };
}

binary_id!(
    /// Names one repository; drawn at `init` and never changed.
    RepoId, 16, "repository id"
);
random_id!(RepoId);
binary_id!(
    /// Names one running backup at the VM; part of the export names, so that
    /// nobody ends a job that is not theirs.
    SessionId, 8, "session id"
);
random_id!(SessionId);
binary_id!(
    /// Names the claim of one run on one VM; drawn anew for each.
    ClaimId, 8, "claim id"
);
random_id!(ClaimId);
binary_id!(
    /// Proves that a mark is the very one a manifest speaks of: it stands in
    /// the checkpoint's description and in the manifest.
    Nonce, 16, "nonce"
);
random_id!(Nonce);
binary_id!(
    /// Names a chunk or a tree page by its content (keyed BLAKE3).
    ObjectId, 32, "object id"
);
binary_id!(
    /// Names and proves one whole disk image: equal images have equal roots.
    RootHash, 32, "root hash"
);

/// Returns `N` random bytes of the operating system.
fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0_u8; N];
    getrandom::fill(&mut bytes).expect("the operating system's random generator works");
    bytes
}

/// Names one restore point: 48 bits of milliseconds and 80 random bits,
/// written as 26 Crockford base-32 characters (a ULID), so that names sort by
/// time and cannot be guessed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PointId(u128);

/// The last millisecond that 48 bits can hold.
const TIME_MAX: u128 = 0xffff_ffff_ffff;

const CROCKFORD: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";

impl PointId {
    /// Draws a new id for a backup that begins at `now`, which sorts after
    /// `newest` even if the clock went backwards since: the order of ids is
    /// the order of backups, and the newest one is the parent of the next.
    pub fn new_after(now: Timestamp, newest: Option<Self>) -> Self {
        let id = Self::new(now);
        match newest {
            Some(newest) if id <= newest => {
                let next_ms = (newest.0 >> 80) + 1;
                match i64::try_from(next_ms) {
                    Ok(ms) if next_ms <= TIME_MAX => Self::new(Timestamp::from_unix_ms(ms)),
                    // No later millisecond can be written down, and one that
                    // begins anew would make the oldest point the newest.
                    _ => Self(newest.0.saturating_add(1 + (id.0 & u128::from(u32::MAX)))),
                }
            }
            _ => id,
        }
    }

    /// Draws a new id for a backup that begins at `now`.
    pub fn new(now: Timestamp) -> Self {
        let time = (now.unix_ms() & 0xffff_ffff_ffff).cast_unsigned();
        let random = u128::from_be_bytes(random_bytes());
        Self((u128::from(time) << 80) | (random >> 48))
    }
}

impl fmt::Display for PointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text: String = (0..26_u32)
            .map(|place| {
                let digit = (self.0 >> (5 * (25 - place))) & 31;
                let digit = usize::try_from(digit).unwrap_or_default();
                char::from(CROCKFORD.get(digit).copied().unwrap_or(b'0'))
            })
            .collect();
        f.write_str(&text)
    }
}

impl fmt::Debug for PointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PointId({self})")
    }
}

impl FromStr for PointId {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        let wrong = || IdError {
            what: "restore point id",
            text: text.chars().take(80).collect(),
        };
        if text.len() != 26 {
            return Err(wrong());
        }
        let mut value = 0_u128;
        for (place, letter) in text.bytes().enumerate() {
            let digit = CROCKFORD
                .iter()
                .position(|known| *known == letter.to_ascii_uppercase())
                .ok_or_else(wrong)?;
            // 26 characters carry 130 bits; the first may only hold three.
            if place == 0 && digit > 7 {
                return Err(wrong());
            }
            value = (value << 5) | u128::try_from(digit).map_err(|_| wrong())?;
        }
        Ok(Self(value))
    }
}

impl TryFrom<String> for PointId {
    type Error = IdError;
    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<PointId> for String {
    fn from(id: PointId) -> Self {
        id.to_string()
    }
}

/// The name of a mark: the bitmap's and the checkpoint's name at the VM.
///
/// # Invariant
/// `hw-<first 12 hex digits of the repository id>-<point id in lower case>`:
/// unique per backup, unguessable, and never used twice.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MarkName {
    repo: String,
    point: PointId,
}

const MARK_PREFIX: &str = "hw-";
const MARK_REPO_DIGITS: usize = 12;

impl MarkName {
    /// Names the mark that the backup `point` into `repo` leaves behind.
    pub fn new(repo: RepoId, point: PointId) -> Self {
        Self {
            repo: repo.to_string().chars().take(MARK_REPO_DIGITS).collect(),
            point,
        }
    }

    /// Returns the restore point whose backup made this mark.
    pub fn point(&self) -> PointId {
        self.point
    }

    /// Returns whether this is a mark of `repo`.
    pub fn is_of(&self, repo: RepoId) -> bool {
        repo.to_string().starts_with(&self.repo)
    }
}

impl fmt::Display for MarkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{MARK_PREFIX}{}-{}",
            self.repo,
            self.point.to_string().to_ascii_lowercase()
        )
    }
}

impl fmt::Debug for MarkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MarkName({self})")
    }
}

impl FromStr for MarkName {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        let wrong = || IdError {
            what: "mark name",
            text: text.chars().take(80).collect(),
        };
        let (repo, point) = text
            .strip_prefix(MARK_PREFIX)
            .and_then(|rest| rest.split_once('-'))
            .ok_or_else(wrong)?;
        let is_repo = repo.len() == MARK_REPO_DIGITS
            && repo
                .bytes()
                .all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
        if !is_repo {
            return Err(wrong());
        }
        let name = Self {
            repo: repo.to_owned(),
            point: point.parse().map_err(|_| wrong())?,
        };
        // Only the exact spelling is ours; a near miss belongs to somebody else.
        if name.to_string() == text {
            Ok(name)
        } else {
            Err(wrong())
        }
    }
}

impl TryFrom<String> for MarkName {
    type Error = IdError;
    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<MarkName> for String {
    fn from(name: MarkName) -> Self {
        name.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_id_sorts_by_time_and_survives_its_text_form() {
        let early = PointId::new(Timestamp::from_unix_ms(1_000));
        let late = PointId::new(Timestamp::from_unix_ms(1_001));
        assert!(early < late);
        assert!(early.to_string() < late.to_string());
        assert_eq!(late.to_string().parse::<PointId>().unwrap(), late);
        assert_eq!(
            late.to_string().to_lowercase().parse::<PointId>().unwrap(),
            late
        );
    }

    #[test]
    fn ids_keep_the_order_of_backups_when_the_clock_goes_back() {
        let newest = PointId::new(Timestamp::from_unix_ms(5_000));
        for now in [0, 4_999, 5_000, 5_001, 9_000] {
            let id = PointId::new_after(Timestamp::from_unix_ms(now), Some(newest));
            assert!(id > newest, "{now}");
        }
        // A name like this may come from outside.
        let last: PointId = "7ZZZZZZZZZ0000000000000000".parse().unwrap();
        let id = PointId::new_after(Timestamp::from_unix_ms(1), Some(last));
        assert!(id > last, "{id}");
    }

    #[test]
    fn a_point_id_of_130_bits_or_foreign_letters_is_refused() {
        assert!("8ZZZZZZZZZZZZZZZZZZZZZZZZZ".parse::<PointId>().is_err());
        assert!("0UZZZZZZZZZZZZZZZZZZZZZZZZ".parse::<PointId>().is_err());
        assert!("01".parse::<PointId>().is_err());
    }

    #[test]
    fn a_mark_name_is_ours_only_in_its_exact_spelling() {
        let repo = RepoId::from_bytes([0xab; 16]);
        let name = MarkName::new(repo, PointId::new(Timestamp::from_unix_ms(5)));
        let text = name.to_string();
        assert_eq!(text.parse::<MarkName>().unwrap(), name);
        assert!(name.is_of(repo));
        assert!(!name.is_of(RepoId::from_bytes([0xcd; 16])));
        assert!(text.to_uppercase().parse::<MarkName>().is_err());
        assert!(format!("{text}x").parse::<MarkName>().is_err());
        assert!("virtnbdbackup.0".parse::<MarkName>().is_err());
    }

    #[test]
    fn a_hex_id_survives_its_text_form() {
        let id = ObjectId::from_bytes([7; 32]);
        assert_eq!(id.to_string().parse::<ObjectId>().unwrap(), id);
        assert!("07".parse::<ObjectId>().is_err());
    }
}
