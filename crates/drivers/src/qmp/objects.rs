//! What a session makes in QEMU: its names, and how it is found again.
//!
//! Every object is called `hw-<role>-<hash>`, where the hash is of session and
//! disk, so a dead session is found without knowing anything of it: whoever
//! holds the VM's claim knows that no other session lives. The file of a fleece
//! carries the session's own name.

use std::collections::BTreeSet;

use highwater_model::SessionId;

/// Digits of a hash: a node's name has 31 characters at most.
const HASH_DIGITS: usize = 12;

/// What an object is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    /// Keeps what the guest overwrites (a node).
    Fleece,
    /// The fleece's file (a node that goes with it).
    FleeceFile,
    /// Copies to the fleece before the guest writes (a node).
    Filter,
    /// Shows the point in time (a node).
    Snapshot,
    /// Shows it to the mover (an NBD export).
    Export,
    /// What changed until the point (a bitmap of the snapshot's node).
    Changed,
    /// Opens an encrypted fleece (an object).
    Key,
    /// Says that the session stops the guest for a moment (an object).
    Stop,
}

impl Role {
    const ALL: [Self; 8] = [
        Self::Fleece,
        Self::FleeceFile,
        Self::Filter,
        Self::Snapshot,
        Self::Export,
        Self::Changed,
        Self::Key,
        Self::Stop,
    ];

    const fn word(self) -> &'static str {
        match self {
            Self::Fleece => "fleece",
            Self::FleeceFile => "ffile",
            Self::Filter => "cbw",
            Self::Snapshot => "snap",
            Self::Export => "exp",
            Self::Changed => "tmp",
            Self::Key => "key",
            Self::Stop => "stop",
        }
    }

    /// Names the object of a session's disk; what the session has once belongs
    /// to the disk without a name.
    pub(super) fn name(self, session: SessionId, target: &str) -> String {
        format!("hw-{}-{}", self.word(), hash(session, target))
    }

    /// Returns what an object of ours is for, and the hash in its name.
    pub(super) fn of(name: &str) -> Option<(Self, &str)> {
        let (word, hash) = name.strip_prefix("hw-")?.split_once('-')?;
        let is_hash = hash.len() == HASH_DIGITS
            && hash
                .bytes()
                .all(|it| it.is_ascii_digit() || (b'a'..=b'f').contains(&it));
        let role = Self::ALL.into_iter().find(|role| role.word() == word)?;
        is_hash.then_some((role, hash))
    }
}

/// FNV-1a. It only has to tell the few disks of one VM apart, for as long as a
/// session lives, and QEMU refuses a name that is taken.
pub(super) fn hash(session: SessionId, target: &str) -> String {
    let bytes = session.as_bytes().iter().chain(target.as_bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{:012x}", hash >> 16)
}

/// The type of [`Role::Stop`]: one that does nothing unless it is pointed at (`claims`).
pub(super) const STOP_KIND: &str = "authz-simple";

/// Which objects of ours are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Which {
    /// Of any session: none is alive.
    All,
    /// With these hashes.
    Hashes(BTreeSet<String>),
}

impl Which {
    /// Those of one session with these disks.
    pub(super) fn of_session<'a>(
        session: SessionId,
        targets: impl Iterator<Item = &'a str>,
    ) -> Self {
        let all = targets.chain([""]);
        Self::Hashes(all.map(|target| hash(session, target)).collect())
    }

    /// The hash of what a session has once.
    pub(super) fn of_once(session: SessionId) -> [String; 1] {
        [hash(session, "")]
    }

    pub(super) fn includes(&self, hash: &str) -> bool {
        match self {
            Self::All => true,
            Self::Hashes(hashes) => hashes.contains(hash),
        }
    }
}

/// What of ours is in QEMU.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Ours {
    /// Whose, as far as fleeces tell.
    pub(super) sessions: BTreeSet<SessionId>,
    pub(super) exports: Vec<String>,
    /// Whether there are exports of others.
    pub(super) is_shared: bool,
    pub(super) snapshots: Vec<String>,
    pub(super) filters: Vec<String>,
    pub(super) fleeces: Vec<String>,
    pub(super) keys: Vec<String>,
    pub(super) stops: Vec<String>,
}

impl Ours {
    /// Returns whether there is nothing.
    pub(super) fn is_nothing(&self) -> bool {
        self.names().next().is_none()
    }

    /// Returns the hashes in all names.
    pub(super) fn hashes(&self) -> BTreeSet<String> {
        let hashes = self.names().filter_map(|name| Role::of(name));
        hashes.map(|(_, hash)| hash.to_owned()).collect()
    }

    fn names(&self) -> impl Iterator<Item = &String> {
        let lists = [
            &self.exports,
            &self.snapshots,
            &self.filters,
            &self.fleeces,
            &self.keys,
            &self.stops,
        ];
        lists.into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session() -> SessionId {
        SessionId::from_bytes([1; 8])
    }

    #[test]
    fn names_are_short_enough_for_qemu_and_known_again() {
        for role in Role::ALL {
            let name = role.name(session(), "a-disk-with-a-name-longer-than-any-node's");
            assert!(name.len() <= 31, "{name}");
            let (found, hash) = Role::of(&name).unwrap();
            assert_eq!(found, role);
            assert_eq!(Role::of(&name[..name.len() - 1]), None);
            assert!(name.ends_with(hash));
        }
        for other in ["hw-cbw-ABCDEF012345", "hw-claim-0123456789ab", "cbw", "hw-"] {
            assert_eq!(Role::of(other), None, "{other}");
        }
        let other = Role::Filter.name(session(), "vdb");
        assert_ne!(Role::Filter.name(session(), "vda"), other);
    }
}
