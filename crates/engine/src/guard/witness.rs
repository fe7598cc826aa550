//! Who ends a session when neither its mover nor its guard can.
//!
//! ```text
//!   begins ──► (commits) ──► ended           told by the mover, before each step
//!      │            │
//!      └────────────┴─ the guard is gone, or the mover: the heir settles
//! ```
//!
//! The process that the user started watches both. It is told what a session
//! needs to be ended, and holds two descriptors of it: one of the guard's
//! stream, through which it sees the guard die and can send it on its way
//! though the mover hangs; and one over which the mover's NBD connections come,
//! as the guard gets them.

use std::fmt::Debug;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use highwater_hypervisor::BeginOrder;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{Shutdown, shutdown};

use super::client::{Guard, GuardError};
use super::lifeline::Cutter;
use super::wire::Outcome;

/// What belongs to a session that begins.
#[derive(Debug)]
pub struct SessionEnds {
    /// Where the guard is reached.
    pub connect: String,
    /// The mover's end of the guard's stream.
    pub guard: OwnedFd,
    /// Where the NBD connections come from.
    pub connections: OwnedFd,
}

/// Is told by the mover how far a session is, always before the VM is.
pub trait Witness: Send + Sync + Debug {
    /// A session is about to begin. It must not if this fails.
    fn begins(&self, order: &BeginOrder, ends: SessionEnds) -> io::Result<()>;

    /// The manifest of the session is about to be written. It must not if this
    /// fails: whoever does not know of it would remove the new mark.
    fn commits(&self, order: &BeginOrder) -> io::Result<()>;

    /// Nothing of the session is at the VM any more.
    fn ended(&self, order: &BeginOrder);
}

/// Ends a session in place of its mover and its guard.
#[derive(Debug)]
pub struct Heir {
    order: BeginOrder,
    connect: String,
    committing: bool,
    guard: OwnedFd,
    cutter: Cutter,
}

impl Heir {
    /// Takes what the mover told before the session began.
    pub fn new(order: BeginOrder, ends: SessionEnds) -> Self {
        Self {
            order,
            connect: ends.connect,
            committing: false,
            guard: ends.guard,
            cutter: Cutter::new(UnixStream::from(ends.connections)),
        }
    }

    /// Which session it is.
    pub const fn order(&self) -> &BeginOrder {
        &self.order
    }

    /// Whether only a reader of the repository knows that the backup exists.
    pub const fn is_committing(&self) -> bool {
        self.committing
    }

    /// From now on only a reader of the repository knows whether the backup
    /// exists.
    pub const fn commits(&mut self) {
        self.committing = true;
    }

    /// Whether mover and guard have parted: the guard is dead, or ends the
    /// session on its own.
    pub fn is_parted(&self) -> bool {
        let mut polled = [PollFd::new(&self.guard, PollFlags::empty())];
        let now = Timespec::default();
        let seen = poll(&mut polled, Some(&now));
        seen.is_ok()
            && polled
                .iter()
                .any(|fd| fd.revents().contains(PollFlags::HUP))
    }

    /// The guard's stream, to wait for its end.
    pub fn guard(&self) -> BorrowedFd<'_> {
        self.guard.as_fd()
    }

    /// Where the mover's connections come from.
    pub fn connections(&self) -> BorrowedFd<'_> {
        self.cutter.incoming().as_fd()
    }

    /// Takes the connections that have come: the mover waits when many have.
    pub fn take_connections(&mut self) {
        self.cutter.take();
    }

    /// Parts mover and guard. The guard ends the session, and the mover cannot
    /// commit any more unless it has told that it does.
    pub fn part(&self) {
        // Fails if they have parted already.
        let _ = shutdown(&self.guard, Shutdown::Both);
    }

    /// Ends the session, after its guard if that lives. To be called when they
    /// have [parted](Self::part); may be called again. Returns what could not
    /// be done.
    pub fn settle(
        &mut self,
        start: &dyn Fn(&str) -> Result<Guard, GuardError>,
    ) -> Result<Vec<String>, GuardError> {
        let (order, connect) = (&self.order, &self.connect);
        let outcome = if self.committing {
            Outcome::Unknown
        } else {
            Outcome::Failed
        };
        // QEMU waits for whoever does not read; a guard that died has cut nothing.
        self.cutter
            .cut_while(|| start(connect)?.settle_for_another(order, outcome))
    }
}
