//! Asks the kernel which socket is at the other end of a unix socket.
//!
//! `/proc` does not tell. The answer names a socket only, which is then looked
//! for among the open files of processes.

use rustix::net::netlink::{SOCK_DIAG, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// `SOCK_DIAG_BY_FAMILY`.
const BY_FAMILY: u16 = 20;
/// `NLM_F_REQUEST`.
const REQUEST: u16 = 1;
/// `AF_UNIX`.
const UNIX: u8 = 1;
/// `UDIAG_SHOW_PEER`.
const SHOW_PEER: u32 = 4;
/// `UNIX_DIAG_PEER`.
const PEER: u16 = 2;
/// Length of `struct nlmsghdr` and of `struct unix_diag_msg`, bytes.
const HEADERS_BYTES: usize = 16 + 16;

/// Returns the inode number of the socket that this one is connected to; `None`
/// if the kernel does not tell.
pub(super) fn of_unix(inode: u64) -> Option<u64> {
    // The kernel numbers sockets with 32 bits here.
    let request = request(u32::try_from(inode).ok()?);
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        Some(SOCK_DIAG),
    )
    .ok()?;
    let kernel = SocketAddrNetlink::new(0, 0);
    rustix::net::sendto(&socket, &request, SendFlags::empty(), &kernel).ok()?;
    let mut answer = [0_u8; 512];
    // Queued before the call above returned.
    let (count, _) = rustix::net::recv(&socket, &mut answer, RecvFlags::DONTWAIT).ok()?;
    peer(answer.get(..count)?)
}

/// Writes a question about one socket.
fn request(inode: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(40);
    bytes.extend(40_u32.to_ne_bytes());
    bytes.extend(BY_FAMILY.to_ne_bytes());
    bytes.extend(REQUEST.to_ne_bytes());
    // Sequence and sender.
    bytes.extend([0; 8]);
    bytes.extend([UNIX, 0, 0, 0]);
    // In any state.
    bytes.extend(u32::MAX.to_ne_bytes());
    bytes.extend(inode.to_ne_bytes());
    bytes.extend(SHOW_PEER.to_ne_bytes());
    // No cookie.
    bytes.extend([0xff; 8]);
    bytes
}

fn peer(answer: &[u8]) -> Option<u64> {
    let kind: [u8; 2] = answer.get(4..6)?.try_into().ok()?;
    if u16::from_ne_bytes(kind) != BY_FAMILY {
        return None;
    }
    let mut rest = answer.get(HEADERS_BYTES..)?;
    while let Some((head, tail)) = rest.split_first_chunk::<4>() {
        let [a, b, c, d] = *head;
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let value = tail.get(..length.checked_sub(4)?)?;
        if u16::from_ne_bytes([c, d]) == PEER {
            return Some(u64::from(u32::from_ne_bytes(value.try_into().ok()?)));
        }
        rest = rest.get(length.checked_next_multiple_of(4)?..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn two_ends_know_each_other() {
        let (one, other) = UnixStream::pair().unwrap();
        let inode = |stream: &UnixStream| rustix::fs::fstat(stream.as_fd()).unwrap().st_ino;
        assert_eq!(of_unix(inode(&one)), Some(inode(&other)));
        assert_eq!(of_unix(0), None);
    }

    #[test]
    fn an_answer_that_is_cut_names_nobody() {
        let mut whole = vec![0_u8; HEADERS_BYTES];
        whole[4..6].copy_from_slice(&BY_FAMILY.to_ne_bytes());
        whole.extend([8_u16.to_ne_bytes(), PEER.to_ne_bytes()].concat());
        whole.extend(77_u32.to_ne_bytes());
        assert_eq!(peer(&whole), Some(77));
        for length in 0..whole.len() {
            assert_eq!(peer(&whole[..length]), None);
        }
    }
}
