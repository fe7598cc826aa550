//! Signs that those who back a VM up leave at the VM itself.
//!
//! A lock file is seen by who shares its directory; the VM is the one thing
//! that all share who could spoil each other's backups. So whoever wants to back
//! it up sets up a *claim* there, which the others read, whatever host, user or
//! container they come from.
//!
//! Each claimant writes signs of its own only, under its own [`ClaimId`], so
//! nobody overwrites another's, and no sign is ever read, changed and written
//! back. What the signs mean for who may go on is not decided here.

use std::collections::{BTreeMap, BTreeSet};

use highwater_model::{ClaimId, Timestamp};
use serde::{Deserialize, Serialize};

use crate::HypervisorError;

/// "This VM is mine", or "it shall be".
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Its name.
    pub id: ClaimId,
    /// Whether it is in the way of others.
    pub stance: Stance,
    /// Whose it is.
    pub claimer: Claimer,
}

/// Whether a claim is in the way of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stance {
    /// Its owner backs the VM up, or is about to.
    Stands,
    /// Its owner lets others go first.
    Yields,
}

impl Stance {
    /// Returns the word that a sign says it with.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Stands => "stands",
            Self::Yields => "yields",
        }
    }

    /// Returns what a sign says. A word of a later version is in the way,
    /// whatever it means.
    pub fn from_word(word: &str) -> Self {
        if word == Self::Yields.word() {
            Self::Yields
        } else {
            Self::Stands
        }
    }
}

/// A process that claims a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claimer {
    /// Name of its host, for people.
    pub host: String,
    /// `/proc/sys/kernel/random/boot_id` there.
    pub boot_id: String,
    /// Which pid namespace its process id belongs to; `None` if it cannot tell.
    pub pid_namespace: Option<u64>,
    /// Its process id.
    pub process: u32,
    /// When that process started, clock ticks since boot; `None` if it cannot
    /// tell.
    pub start_ticks: Option<u64>,
    /// Since when it claims the VM by its own clock, for people.
    pub since: Timestamp,
}

/// All signs at one VM.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Signs {
    /// The claims.
    pub claims: Vec<Claim>,
    /// How often each owner has said that it lives.
    pub beats: BTreeMap<ClaimId, u64>,
    /// Whose owners may have a request under way that would hit whatever job
    /// there is.
    pub acting: BTreeSet<ClaimId>,
}

impl Signs {
    /// Returns the claim of this name.
    pub fn claim(&self, id: ClaimId) -> Option<&Claim> {
        self.claims.iter().find(|claim| claim.id == id)
    }
}

/// A sign to be set up; one of the same kind and claim is replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sign {
    /// The claim itself.
    Claim(Claim),
    /// "I live", for the n-th time.
    Beat(ClaimId, u64),
    /// "I may be acting."
    Acting(ClaimId),
}

/// Why somebody who had a claim is told to stop.
pub const CLAIM_GONE: &str = "its claim is gone: another backup took this one for dead and has \
     taken over, or the VM was restarted";

/// A kind of sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SignKind {
    /// [`Sign::Claim`].
    Claim,
    /// [`Sign::Beat`].
    Beat,
    /// [`Sign::Acting`].
    Acting,
}

impl SignKind {
    /// Returns the word that names it at a VM.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Claim => "claim",
            Self::Beat => "beat",
            Self::Acting => "acting",
        }
    }

    /// Returns the kind that a word names.
    pub fn from_word(word: &str) -> Option<Self> {
        let mut all = [Self::Claim, Self::Beat, Self::Acting].into_iter();
        all.find(|kind| kind.word() == word)
    }
}

/// Reads, sets up and removes signs at one VM, over a connection of its own:
/// what is called here never waits for a call of the [`Driver`](crate::Driver).
///
/// All calls of all claimants at one VM come one after the other: when one has
/// returned, every later `signs`, whoever asks, sees what it did. The signs go
/// when the VM's process does.
pub trait Claimant: Send {
    /// Returns all signs. What is not understood is left out.
    fn signs(&mut self) -> Result<Signs, HypervisorError>;

    /// Sets a sign up.
    fn set(&mut self, sign: &Sign) -> Result<(), HypervisorError>;

    /// Removes a sign. One that is not there is no error.
    fn remove(&mut self, id: ClaimId, kind: SignKind) -> Result<(), HypervisorError>;

    /// Returns the command by which a person removes a claim.
    fn removal_by_hand(&self, id: ClaimId) -> String;
}
