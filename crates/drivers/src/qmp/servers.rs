//! Tells whether QEMU's NBD server is one of ours.
//!
//! QEMU has one server, and tells neither whether it runs nor where. It listens
//! on a socket that carries its session's name, and the kernel knows who listens,
//! even if the directory is gone.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use std::time::Duration;

use highwater_model::SessionId;

use super::address::Address;

/// How long a server may take to accept.
const ACCEPT_LIMIT: Duration = Duration::from_secs(1);
/// `__SO_ACCEPTCON` (linux/net.h): the socket listens.
const LISTENS: u32 = 1 << 16;

/// Returns the sessions on whose sockets this process listens. Without a
/// process, or the right to look at it, those of `known` that anybody does:
/// their names are used once.
pub(super) fn listening(process: Option<u32>, known: &BTreeSet<SessionId>) -> BTreeSet<SessionId> {
    let held = process.and_then(sockets_of);
    let table = process.map_or_else(
        || PathBuf::from("/proc/net/unix"),
        |pid| PathBuf::from(format!("/proc/{pid}/net/unix")),
    );
    let rows = fs::read(table).unwrap_or_default();
    let rows = rows.split(|byte| *byte == b'\n');
    let rows = rows.filter_map(|row| listener(&String::from_utf8_lossy(row)));
    rows.filter(|(inode, session)| match &held {
        Some(held) => held.contains(inode),
        None => known.contains(session),
    })
    .map(|(_, session)| session)
    .collect()
}

/// Returns whether it can be seen what sockets this process has.
pub(super) fn is_visible(process: Option<u32>) -> bool {
    process.is_some_and(|pid| sockets_of(pid).is_some())
}

/// Returns whether somebody listens on this socket. Its path is used once, and a
/// QEMU has one server, so whoever does is the session's own; and a path leads
/// there from any namespace that it can be seen from.
pub(super) fn accepts(socket: &Path) -> bool {
    let address = Address::Unix(socket.to_path_buf());
    address.connect(ACCEPT_LIMIT).is_ok()
}

/// Reads a row of the kernel's table: number, flags and path of a socket.
fn listener(row: &str) -> Option<(u64, SessionId)> {
    let mut fields = row.split_ascii_whitespace();
    let flags = fields.nth(3)?;
    let inode = fields.nth(2)?.parse().ok()?;
    let path = fields.next()?;
    let is_listening = u32::from_str_radix(flags, 16).ok()? & LISTENS != 0;
    let name = Path::new(path).file_name()?.to_str()?;
    let session = name.strip_prefix("hw-")?.strip_suffix(".sock")?;
    let parsed: SessionId = session.parse().ok()?;
    // Only the exact spelling is ours.
    (is_listening && parsed.to_string() == session).then_some((inode, parsed))
}

fn sockets_of(pid: u32) -> Option<BTreeSet<u64>> {
    let links = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    let number = |link: PathBuf| {
        let target = fs::read_link(link).ok()?;
        let text = target.to_str()?.strip_prefix("socket:[")?;
        text.strip_suffix(']')?.parse().ok()
    };
    let links = links.filter_map(Result::ok);
    Some(links.filter_map(|link| number(link.path())).collect())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_socket_that_somebody_listens_on_is_known_even_when_its_name_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (
            SessionId::from_bytes([0xa1; 8]),
            SessionId::from_bytes([0xb2; 8]),
        );
        let path = |session: SessionId| dir.path().join(format!("hw-{session}.sock"));
        let me = Some(std::process::id());
        let nobody = BTreeSet::new();
        {
            let _listener = UnixListener::bind(path(one)).unwrap();
            fs::remove_file(path(one)).unwrap();
            assert!(listening(me, &nobody).contains(&one));
            assert!(!listening(me, &nobody).contains(&other));
            assert!(listening(None, &[one].into()).contains(&one));
            assert!(!listening(None, &[other].into()).contains(&one));
            // It is not the parent's.
            let parent = rustix::process::getppid().unwrap();
            let parent = u32::try_from(parent.as_raw_nonzero().get()).unwrap();
            assert!(!listening(Some(parent), &nobody).contains(&one));
        }
        assert!(!listening(me, &nobody).contains(&one));
    }

    #[test]
    fn a_socket_accepts_until_its_listener_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        assert!(!accepts(&path));
        let listener = UnixListener::bind(&path).unwrap();
        assert!(accepts(&path));
        drop(listener);
        assert!(!accepts(&path));
    }

    #[test]
    fn rows_of_others_and_cut_ones_are_nobodys() {
        let row =
            "0000000000000000: 00000002 00000000 00010000 0001 01 4711 /x/hw-0101010101010101.sock";
        assert_eq!(listener(row), Some((4711, SessionId::from_bytes([1; 8]))));
        for other in [
            "Num       RefCount Protocol Flags    Type St Inode Path",
            "0: 00000002 00000000 00010000 0001 01 4711",
            "0: 00000002 00000000 00000000 0001 03 4711 /x/hw-0101010101010101.sock",
            "0: 00000002 00000000 00010000 0001 01 4711 /x/hw-01.sock",
            "0: 00000002 00000000 00010000 0001 01 4711 /x/hw-010101010101010A.sock",
            "",
        ] {
            assert_eq!(listener(other), None, "{other}");
        }
    }
}
