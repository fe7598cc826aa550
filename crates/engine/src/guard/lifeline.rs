//! Lets the guard cut the mover's NBD connections.
//!
//! QEMU cannot drain a disk while a reply waits in the socket of a client that
//! does not read: ending the job, and with it every other command and the
//! guest's I/O, would wait for a mover that is stopped or hangs in a dead file
//! system (measured with QEMU 10.0: `virDomainAbortJob` did not return for as
//! long as the mover was stopped, with the main loop waiting in
//! `bdrv_cbw_drop` for a reply of 220 KiB to leave). Killing the mover does not help either: a
//! thread in uninterruptible sleep keeps its sockets open.
//!
//! So the mover hands the guard a second descriptor of each connection, before
//! its first request. The guard ends the connection through it, whatever the
//! mover does. That takes two things:
//!
//! * *shutting it down*, so that nothing more is sent;
//! * *reading what has been sent*. A unix socket does not become writable by a
//!   shutdown while unread bytes fill its buffer (Linux 6.18: `poll` says HUP,
//!   never OUT), and QEMU waits for nothing but OUT to finish its reply. This
//!   holds for as long as any descriptor of the socket is open, the guard's
//!   own included, so even a mover's death would not free QEMU.
//!
//! Bytes that the guard reads are missing for the mover, which might take the
//! next ones for them. So this is done only when the session has ended for the
//! guard: it answers nothing any more that would let the mover commit.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, recv, recvmsg, sendmsg, shutdown,
};

/// How often connections are cut while the session is being ended: a mover
/// that wakes up meanwhile may open new ones, and a peer behind TCP may send on.
const CUT_EVERY: Duration = Duration::from_millis(20);
/// How long a guard, or a front, that does not take what it is given is waited
/// for: it may have been stopped, and a mover must not be held up by that.
const GIVE_MAX: Duration = Duration::from_secs(5);
/// More than a unix socket holds by default (208 KiB), bytes.
const DRAIN_BYTES: usize = 256 << 10;

/// Ends a connection so that its server is not kept waiting: shuts it down and
/// takes what nobody will read. Nobody else may be reading from it for good.
pub(crate) fn end_connection(socket: &impl AsFd) {
    // Fails if the connection has ended, which is what is wanted.
    let _ = shutdown(socket, Shutdown::Both);
    let mut nobody_reads = vec![0_u8; DRAIN_BYTES];
    // Ends: after the shutdown a unix peer sends nothing new, and no recv waits.
    while recv(socket, nobody_reads.as_mut_slice(), RecvFlags::DONTWAIT)
        .is_ok_and(|(bytes, _)| bytes > 0)
    {}
}

/// The mover's end.
#[derive(Debug)]
pub(super) struct Giver(Mutex<UnixStream>);

impl Giver {
    pub(super) const fn new(stream: UnixStream) -> Self {
        Self(Mutex::new(stream))
    }

    /// Hands one descriptor over; it is the guard's when this returns.
    pub(super) fn give(&self, socket: &impl AsFd) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let sockets = [socket.as_fd()];
        ancillary.push(SendAncillaryMessage::ScmRights(&sockets));
        let stream = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let end = Instant::now() + GIVE_MAX;
        loop {
            match sendmsg(&*stream, &[IoSlice::new(b"s")], &mut ancillary, flags) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if Instant::now() < end => {
                    let left = end.saturating_duration_since(Instant::now());
                    let left = Timespec::try_from(left).unwrap_or_default();
                    let mut polled = [PollFd::new(&*stream, PollFlags::OUT)];
                    // Writable or not: the next attempt tells.
                    let _ = poll(&mut polled, Some(&left));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The guard's end.
#[derive(Debug)]
pub(super) struct Cutter {
    stream: UnixStream,
    sockets: Vec<OwnedFd>,
}

impl Cutter {
    pub(super) const fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            sockets: Vec::new(),
        }
    }

    /// Where sockets come from.
    pub(super) const fn incoming(&self) -> &UnixStream {
        &self.stream
    }

    /// Takes what was handed over so far.
    pub(super) fn take(&mut self) {
        loop {
            let mut byte = [0_u8; 1];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let received = recvmsg(
                &self.stream,
                &mut [IoSliceMut::new(&mut byte)],
                &mut ancillary,
                flags,
            );
            // Nothing waits, or the mover is gone.
            if !received.is_ok_and(|received| received.bytes > 0) {
                return;
            }
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(sockets) = message {
                    self.sockets.extend(sockets);
                }
            }
        }
    }

    /// Cuts all connections, and goes on doing so until `end` has returned.
    ///
    /// Only when the mover cannot commit any more.
    pub(super) fn cut_while<T>(&mut self, end: impl FnOnce() -> T) -> T {
        self.cut();
        let (ended, wait) = channel::<()>();
        let cutter = &mut *self;
        let result = thread::scope(|scope| {
            let cutting = move || {
                while wait.recv_timeout(CUT_EVERY) == Err(RecvTimeoutError::Timeout) {
                    cutter.cut();
                }
            };
            // Where no thread can be had the connections were cut once, and that
            // must do: only a mover that lives makes new ones.
            drop(thread::Builder::new().spawn_scoped(scope, cutting));
            // Dropped even if `end` panics: the thread above must not stay.
            let _ended = ended;
            end()
        });
        self.sockets.clear();
        result
    }

    fn cut(&mut self) {
        self.take();
        self.sockets.iter().for_each(end_connection);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;

    #[test]
    fn a_cut_ends_connections_whose_owner_does_nothing() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (giver, mut cutter) = (Giver::new(ours), Cutter::new(theirs));
        let (mut server, client) = UnixStream::pair().unwrap();
        giver.give(&client).unwrap();
        server.write_all(b"a reply that nobody reads").unwrap();
        cutter.cut_while(|| ());
        // The client's own descriptor is still open, and yet:
        assert_eq!(server.read(&mut [0; 1]).unwrap(), 0);
        assert!(server.write_all(b"more").is_err());
        drop(client);
    }

    #[test]
    fn a_cut_wakes_a_server_that_waits_until_it_can_write() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (giver, mut cutter) = (Giver::new(ours), Cutter::new(theirs));
        let (mut server, client) = UnixStream::pair().unwrap();
        giver.give(&client).unwrap();
        fill(&mut server);
        cutter.cut_while(|| ());
        // What QEMU waits for; that the connection has ended does not wake it.
        assert!(is_writable(&server));
        assert!(server.write_all(b"more").is_err());
        drop(client);
    }

    #[test]
    fn a_connection_made_while_the_session_ends_is_cut_too() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (giver, mut cutter) = (Giver::new(ours), Cutter::new(theirs));
        let (mut server, client) = UnixStream::pair().unwrap();
        // Like the call that ends a job: returns when the server can go on.
        cutter.cut_while(|| {
            fill(&mut server);
            giver.give(&client).unwrap();
            let waited = Instant::now();
            while !is_writable(&server) {
                assert!(waited.elapsed() < Duration::from_secs(10), "nobody cut it");
            }
        });
        drop(client);
    }

    fn fill(server: &mut UnixStream) {
        server.set_nonblocking(true).unwrap();
        while server.write(&[0; 4096]).is_ok() {}
        assert!(!is_writable(server));
    }

    fn is_writable(server: &UnixStream) -> bool {
        let mut polled = [PollFd::new(server, PollFlags::OUT)];
        let soon = Timespec {
            tv_sec: 0,
            tv_nsec: 10_000_000,
        };
        poll(&mut polled, Some(&soon)).unwrap();
        polled[0].revents().contains(PollFlags::OUT)
    }

    #[test]
    fn whoever_does_not_take_connections_holds_nobody_up_for_long() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let giver = Giver::new(ours);
        let (_server, client) = UnixStream::pair().unwrap();
        let begun = Instant::now();
        let refused = (0..100_000).find_map(|_| giver.give(&client).err());
        assert!(refused.is_some(), "there is no end of room");
        assert!(begun.elapsed() < GIVE_MAX + Duration::from_secs(10));
    }

    #[test]
    fn a_cut_without_connections_or_mover_is_no_trouble() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut cutter = Cutter::new(theirs);
        cutter.cut_while(|| ());
        drop(ours);
        cutter.cut_while(|| ());
    }
}
