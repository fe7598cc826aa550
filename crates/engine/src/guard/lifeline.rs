//! Lets the guard cut the mover's NBD connections.
//!
//! QEMU cannot drain a disk while a reply waits in the socket of a client that
//! does not read: ending the job, and with it every other command and the
//! guest's I/O, would wait for a mover that is stopped or hangs in a dead file
//! system (measured with QEMU 10.0: `virDomainAbortJob` did not return for as
//! long as the mover was stopped). Killing the mover does not help either: a
//! thread in uninterruptible sleep keeps its sockets open.
//!
//! So the mover hands the guard a second descriptor of each connection, before
//! its first request. Shutting that one down ends the connection whatever the
//! mover does.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, recvmsg, sendmsg, shutdown,
};

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
        sendmsg(
            &*stream,
            &[IoSlice::new(b"s")],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )?;
        Ok(())
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

    /// Ends all connections.
    pub(super) fn cut(&mut self) {
        self.take();
        for socket in self.sockets.drain(..) {
            // Fails if the connection has ended, which is what is wanted.
            let _ = shutdown(&socket, Shutdown::Both);
        }
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
        cutter.cut();
        // The client's own descriptor is still open, and yet:
        assert_eq!(server.read(&mut [0; 1]).unwrap(), 0);
        assert!(server.write_all(b"more").is_err());
        drop(client);
    }

    #[test]
    fn a_cut_without_connections_or_mover_is_no_trouble() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut cutter = Cutter::new(theirs);
        cutter.cut();
        drop(ours);
        cutter.cut();
    }
}
