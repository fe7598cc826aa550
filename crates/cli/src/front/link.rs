//! What the mover tells the front, and the front the mover.
//!
//! One packet is one message, with the descriptors that belong to it. Both ends
//! are the same binary, so there is no version to negotiate.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use highwater_engine::SessionEnds;
use highwater_hypervisor::BeginOrder;
use highwater_model::SessionId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketFlags, SocketType, recvmsg, sendmsg, shutdown,
    socketpair,
};
use serde::{Deserialize, Serialize};

/// A unix socket takes no longer message by default (`wmem_default`), bytes.
const MESSAGE_BYTES_MAX: usize = 208 << 10;
/// Descriptors that come with one message.
const DESCRIPTORS_MAX: usize = 2;
/// How long a front that does not listen is waited for: it may have been
/// stopped, and a mover must not be held up for ever by that.
const SEND_MAX: Duration = Duration::from_secs(5);

/// What the mover says.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Said {
    /// A session is about to begin; two descriptors come along.
    Begins {
        order: Box<BeginOrder>,
        connect: String,
    },
    /// Its manifest is about to be written.
    Commits { session: SessionId },
    /// Nothing of it is at the VM any more.
    Ended { session: SessionId },
    /// A passphrase is about to be asked for at the terminal, or has been.
    Asks { is_asking: bool },
    /// All is done and told. Whether the process can end is another matter.
    Done { code: u8 },
}

/// What the front hears.
#[derive(Debug)]
pub(super) enum Heard {
    /// A message, with its descriptors.
    Message(Said, Vec<OwnedFd>),
    /// Nothing waits.
    Nothing,
    /// The mover's end is closed.
    End,
}

/// One end of the link.
#[derive(Debug)]
pub(super) struct Link(OwnedFd);

impl Link {
    /// Makes both ends; neither outlives an `exec` as it is.
    pub(super) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
        let (ours, theirs) = socketpair(family, kind, SocketFlags::CLOEXEC, None)?;
        Ok((Self(ours), theirs))
    }

    pub(super) const fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Tells the front.
    pub(super) fn say(&self, said: &Said, ends: Option<&SessionEnds>) -> io::Result<()> {
        let message = serde_json::to_vec(said).map_err(io::Error::other)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = ends.map(|ends| [ends.guard.as_fd(), ends.connections.as_fd()]);
        if let Some(descriptors) = &descriptors {
            ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        self.wait_until_writable()?;
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        sendmsg(&self.0, &[IoSlice::new(&message)], &mut ancillary, flags)?;
        Ok(())
    }

    fn wait_until_writable(&self) -> io::Result<()> {
        let mut polled = [PollFd::new(&self.0, PollFlags::OUT)];
        let limit = Timespec::try_from(SEND_MAX).map_err(io::Error::other)?;
        poll(&mut polled, Some(&limit))?;
        Ok(())
    }

    /// Hears the mover, without waiting for it.
    pub(super) fn hear(&self) -> Heard {
        let mut bytes = vec![0; MESSAGE_BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let received = loop {
            match recvmsg(&self.0, &mut slices, &mut ancillary, flags) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other,
            }
        };
        let length = match received {
            Ok(received) if received.bytes > 0 => received.bytes,
            Err(rustix::io::Errno::AGAIN) => return Heard::Nothing,
            Ok(_) | Err(_) => return Heard::End,
        };
        let mut descriptors = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(sent) = message {
                descriptors.extend(sent);
            }
        }
        bytes.truncate(length);
        match serde_json::from_slice(&bytes) {
            // We have no room for its descriptors, and a session that we could not
            // end must not begin: the mover is told that we are as good as gone.
            Ok(Said::Begins { .. }) if descriptors.len() < DESCRIPTORS_MAX => {
                let _ = shutdown(&self.0, Shutdown::Both);
                Heard::End
            }
            Ok(said) => Heard::Message(said, descriptors),
            // Only a mover that is none of ours speaks otherwise.
            Err(_) => Heard::End,
        }
    }

    /// Has the mover know that a signal came.
    pub(super) fn relay(&self) {
        // A mover that is gone, or that does not listen, is dealt with anyway.
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let _ = rustix::net::send(&self.0, b"s", flags);
    }

    /// Waits for the front's next word; `false` when the front is gone.
    pub(super) fn wait_for_signal(&self) -> bool {
        let mut byte = [0; 1];
        loop {
            match rustix::net::recv(&self.0, byte.as_mut_slice(), RecvFlags::empty()) {
                Err(rustix::io::Errno::INTR) => {}
                received => return received.is_ok_and(|(bytes, _)| bytes > 0),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_comes_whole_and_the_end_is_seen() {
        let (front, mover) = Link::pair().unwrap();
        let mover = Link::new(mover);
        assert!(matches!(front.hear(), Heard::Nothing));
        let session = SessionId::random();
        mover.say(&Said::Commits { session }, None).unwrap();
        mover.say(&Said::Done { code: 7 }, None).unwrap();
        let Heard::Message(Said::Commits { session: heard }, _) = front.hear() else {
            panic!("the first message is the first");
        };
        assert_eq!(heard, session);
        assert!(matches!(
            front.hear(),
            Heard::Message(Said::Done { code: 7 }, _)
        ));
        front.relay();
        assert!(mover.wait_for_signal());
        drop(mover);
        assert!(matches!(front.hear(), Heard::End));
    }

    #[test]
    fn a_mover_learns_that_its_front_is_gone() {
        let (front, mover) = Link::pair().unwrap();
        drop(front);
        let mover = Link::new(mover);
        assert!(!mover.wait_for_signal());
        assert!(mover.say(&Said::Done { code: 0 }, None).is_err());
    }
}
