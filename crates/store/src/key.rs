//! What an object is called: its kind and its name.

use std::fmt;

/// The kinds of objects a repository has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ObjectKind {
    /// The repository's configuration; there is one, named `config`.
    Config,
    /// A wrapped key.
    Key,
    /// A pack of chunks or tree pages.
    Pack,
    /// A table from object ids to places in packs.
    Index,
    /// A restore point's manifest, named `<vm key>/<point id>`.
    Point,
    /// A sign of life of a writer or reader.
    Lease,
    /// A tombstone of a damaged object.
    Damage,
    /// A record of what was verified when.
    Proof,
    /// A record of what a prune considered.
    Prune,
}

impl ObjectKind {
    /// All kinds that have a folder of their own.
    pub const FOLDERS: [Self; 8] = [
        Self::Key,
        Self::Pack,
        Self::Index,
        Self::Point,
        Self::Lease,
        Self::Damage,
        Self::Proof,
        Self::Prune,
    ];

    /// Returns the first component of the paths of this kind.
    pub const fn folder(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::Key => "keys",
            Self::Pack => "packs",
            Self::Index => "index",
            Self::Point => "points",
            Self::Lease => "leases",
            Self::Damage => "damage",
            Self::Proof => "proofs",
            Self::Prune => "prunes",
        }
    }
}

/// A name no object can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` is no name of an object in `{}`", kind.folder())]
pub struct KeyError {
    kind: ObjectKind,
    name: String,
}

/// Kind and name of an object.
///
/// # Invariant
/// Each component of the name has 1 to 128 ASCII letters, digits, `-` or `_`,
/// so that no name leads out of its folder; points have two components, packs
/// at least two characters, everything else one component.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    kind: ObjectKind,
    name: String,
}

const COMPONENT_LEN_MAX: usize = 128;

impl ObjectKey {
    /// Checks and wraps a name.
    pub fn new(kind: ObjectKind, name: impl Into<String>) -> Result<Self, KeyError> {
        let name = name.into();
        let good = match kind {
            ObjectKind::Config => name == "config",
            ObjectKind::Pack => name.len() >= 2 && is_component(&name),
            ObjectKind::Point => name
                .split_once('/')
                .is_some_and(|(vm, point)| is_component(vm) && is_component(point)),
            ObjectKind::Key
            | ObjectKind::Index
            | ObjectKind::Lease
            | ObjectKind::Damage
            | ObjectKind::Proof
            | ObjectKind::Prune => is_component(&name),
        };
        if good {
            return Ok(Self { kind, name });
        }
        Err(KeyError {
            kind,
            name: name.chars().take(80).collect(),
        })
    }

    /// Returns the key of the repository's configuration.
    pub fn config() -> Self {
        Self {
            kind: ObjectKind::Config,
            name: "config".to_owned(),
        }
    }

    /// Returns the kind.
    pub fn kind(&self) -> ObjectKind {
        self.kind
    }

    /// Returns the name within the kind.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the path relative to the repository, as docs/format.md has it.
    pub fn path(&self) -> String {
        match self.kind {
            ObjectKind::Config => self.name.clone(),
            ObjectKind::Pack => {
                let shard = self.name.get(..2).unwrap_or(&self.name);
                format!("packs/{shard}/{}", self.name)
            }
            kind => format!("{}/{}", kind.folder(), self.name),
        }
    }
}

fn is_component(text: &str) -> bool {
    (1..=COMPONENT_LEN_MAX).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path())
    }
}

impl fmt::Debug for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ObjectKey({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_leads_out_of_its_folder() {
        for wrong in ["", ".", "..", "../x", "a/b", "/etc", "a\0b", "a.b", "é"] {
            assert!(
                ObjectKey::new(ObjectKind::Index, wrong).is_err(),
                "{wrong:?}"
            );
        }
        for wrong in ["a", "a/", "/a", "a/b/c", "../a", "a/.."] {
            assert!(
                ObjectKey::new(ObjectKind::Point, wrong).is_err(),
                "{wrong:?}"
            );
        }
        assert!(ObjectKey::new(ObjectKind::Config, "configs").is_err());
        assert!(ObjectKey::new(ObjectKind::Pack, "a").is_err());
    }

    #[test]
    fn paths_are_those_of_the_format() {
        let path = |kind, name: &str| ObjectKey::new(kind, name).unwrap().path();
        assert_eq!(ObjectKey::config().path(), "config");
        assert_eq!(path(ObjectKind::Pack, "abcd"), "packs/ab/abcd");
        assert_eq!(path(ObjectKind::Point, "vm/p1"), "points/vm/p1");
        assert_eq!(path(ObjectKind::Key, "k"), "keys/k");
    }
}
