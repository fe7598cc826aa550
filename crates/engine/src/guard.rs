//! Two processes make one backup, so that the VM never waits for a repository;
//! a third one watches both.
//!
//! A backup job blocks migration, save and snapshots, and never ends by
//! itself. So the process that owns the session at the VM (the *guard*) never
//! touches the repository, where a call may hang for ever; and the one that
//! does (the *mover*) never holds anything at the VM.
//!
//! ```text
//!   mover (child of what the user started)        guard (its child, own unix session)
//!   ──────────────────────────────────────        ──────────────────────────────────
//!   plan, read NBD, write repository    requests  libvirt connection, VM lock,
//!   print                              ────────►  begin · check · end · marks
//!                                      ◄────────  replies, "session lost"
//! ```
//!
//! The guard follows the mover's life by the socket between them: a mover
//! that dies (SIGKILL included) closes it, one that is stopped misses its beat.
//! Then the guard ends the session by itself, see [`host`]. A guard that dies
//! is noticed by the mover the same way; it starts another one to settle.
//! Where both are gone, or one is and the other hangs, the process that the user
//! started does that: it is their [`witness`], and touches neither repository
//! nor VM itself.

mod claims;
mod client;
mod hold;
mod host;
mod lifeline;
mod lock;
mod wire;
mod witness;

pub use client::{Guard, GuardError, Parting};
pub(crate) use host::one_line;
pub use host::{Connect, serve};
pub(crate) use lifeline::end_connection;
pub use lock::{LockHolder, lock_path};
pub use wire::Outcome;
pub use witness::{Heir, SessionEnds, Witness};
