//! Which process is at the other end of a monitor's socket.
//!
//! The kernel tells who made the listening socket, which may be a launcher that
//! passed it on; the one that counts holds the socket that our connection was
//! accepted as. Where that cannot be seen (another network or pid namespace,
//! another user's process), the maker counts if it is a QEMU. If nobody can
//! tell, it is nobody. And nobody is it who is no QEMU: a proxy between us and
//! one is the peer of our connection, too.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use serde_json::json;

use super::address::{Address, Stream};
use super::client::Client;
use super::peers;
use crate::host::{self, QemuProcess};

/// Finds the process that serves this connection.
pub(super) fn behind(address: &Address, client: &Client) -> Option<QemuProcess> {
    let stream = client.stream();
    let is_it = |pid: &u32| is_qemu(*pid) || holds_an_image(*pid, client);
    let is_it: &dyn Fn(&u32) -> bool = &is_it;
    let pid = match (address, stream) {
        (Address::Unix(path), _) => {
            let maker = rustix::net::sockopt::socket_peercred(stream.fd())
                .ok()
                .and_then(|peer| u32::try_from(peer.pid.as_raw_nonzero().get()).ok());
            let ours = rustix::fs::fstat(stream.fd())
                .ok()
                .map(|about| about.st_ino);
            let peer = ours.and_then(peers::of_unix).into_iter().collect();
            only(processes_with(&peer))
                .filter(is_it)
                .or_else(|| behind_unix(path, maker, is_it))
        }
        (Address::Tcp(_), Stream::Tcp(stream)) => {
            let ours = stream.local_addr().ok()?;
            let theirs = stream.peer_addr().ok()?;
            only(processes_with(&tcp_inodes(&theirs, &ours))).filter(is_it)
        }
        (Address::Tcp(_), Stream::Unix(_)) => None,
    };
    host::process(pid?)
}

fn behind_unix(path: &Path, maker: Option<u32>, is_it: &dyn Fn(&u32) -> bool) -> Option<u32> {
    let sockets = unix_sockets(path);
    let inodes = |is_listening: bool| -> BTreeSet<u64> {
        sockets
            .iter()
            .filter(|socket| socket.is_listening == is_listening)
            .map(|socket| socket.inode)
            .collect()
    };
    // An accepted socket bears the path that it was accepted at.
    let accepted = processes_with(&inodes(false));
    if let Some(pid) = only(accepted.clone()).filter(is_it) {
        return Some(pid);
    }
    let candidates = if accepted.is_empty() {
        processes_with(&inodes(true))
    } else {
        accepted
    };
    match maker.filter(is_it) {
        Some(pid) if candidates.is_empty() || candidates.contains(&pid) => Some(pid),
        _ => only(candidates.into_iter().filter(is_it).collect()),
    }
}

fn only(pids: BTreeSet<u32>) -> Option<u32> {
    let mut pids = pids.into_iter();
    let first = pids.next()?;
    pids.next().is_none().then_some(first)
}

fn is_qemu(pid: u32) -> bool {
    let arguments = host::arguments(pid).unwrap_or_default();
    let called = arguments.first().map(PathBuf::from);
    let program = fs::read_link(format!("/proc/{pid}/exe")).ok();
    [called, program].into_iter().flatten().any(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.contains("qemu") || name.contains("kvm")
    })
}

/// Returns whether a process has an image open that the QEMU behind the monitor
/// says it has: whatever it is called, then it is that QEMU.
fn holds_an_image(pid: u32, client: &Client) -> bool {
    let about = |path: &Path| {
        let about = fs::metadata(path).ok()?;
        let kind = about.file_type();
        (kind.is_file() || kind.is_block_device()).then(|| (about.dev(), about.ino()))
    };
    let listed = client.run("query-named-block-nodes", json!({"flat": true}));
    let listed = listed.unwrap_or_default();
    let names = listed.as_array().into_iter().flatten();
    let images: BTreeSet<(u64, u64)> = names
        .filter_map(|node| node.get("file")?.as_str())
        .map(Path::new)
        .filter(|path| path.is_absolute())
        .filter_map(about)
        .collect();
    let files = fs::read_dir(format!("/proc/{pid}/fd"));
    let files = files.into_iter().flatten().flatten();
    files
        .filter_map(|file| about(&file.path()))
        .any(|file| images.contains(&file))
}

/// A unix socket of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
struct UnixSocket {
    inode: u64,
    is_listening: bool,
}

/// Returns the sockets that were bound to, or accepted at, this path. A program
/// may have bound it by another spelling, so those whose last part is the same
/// are looked at too: which file is meant is then asked of the file system.
fn unix_sockets(path: &Path) -> Vec<UnixSocket> {
    let table = fs::read("/proc/net/unix").unwrap_or_default();
    let all = table.split(|byte| *byte == b'\n').skip(1);
    let named = all.filter_map(|line| {
        let (socket, bound) = unix_row(line)?;
        let bound = Path::new(std::ffi::OsStr::from_bytes(bound));
        (bound == path || (bound.is_relative() && bound.file_name() == path.file_name()))
            .then_some(socket)
    });
    named.collect()
}

/// Reads `address: refs protocol flags type state inode path`.
fn unix_row(line: &[u8]) -> Option<(UnixSocket, &[u8])> {
    /// `__SO_ACCEPTCON`.
    const LISTENS: u32 = 0x1_0000;
    let mut rest = line;
    let mut fields: [&[u8]; 7] = [&[]; 7];
    for field in &mut fields {
        rest = rest.trim_ascii_start();
        let end = rest.iter().position(|byte| *byte == b' ')?;
        (*field, rest) = rest.split_at_checked(end)?;
    }
    let [_, _, _, flags, _, _, inode] = fields;
    let flags = u32::from_str_radix(str::from_utf8(flags).ok()?, 16).ok()?;
    let inode: u64 = str::from_utf8(inode).ok()?.parse().ok()?;
    let socket = UnixSocket {
        inode,
        is_listening: flags & LISTENS != 0,
    };
    // Not accepted yet: nobody's.
    (inode != 0).then_some((socket, rest.strip_prefix(b" ")?))
}

/// Returns the socket at this end of a TCP connection.
fn tcp_inodes(local: &SocketAddr, remote: &SocketAddr) -> BTreeSet<u64> {
    let table = if local.is_ipv4() { "tcp" } else { "tcp6" };
    let text = fs::read_to_string(format!("/proc/net/{table}")).unwrap_or_default();
    let rows = text.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let is_it = fields.next()? == spelt(local) && fields.next()? == spelt(remote);
        is_it.then(|| fields.nth(6)?.parse::<u64>().ok())?
    });
    rows.filter(|inode| *inode != 0).collect()
}

/// Writes an address as the kernel does: words in the host's byte order.
fn spelt(address: &SocketAddr) -> String {
    use std::fmt::Write as _;
    let bytes: Vec<u8> = match address.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let mut text = String::new();
    for word in bytes.chunks_exact(4) {
        let word: [u8; 4] = word.try_into().unwrap_or_default();
        // Writing to a string cannot fail.
        let _infallible = write!(text, "{:08X}", u32::from_ne_bytes(word));
    }
    let _infallible = write!(text, ":{:04X}", address.port());
    text
}

/// Returns the processes that hold one of these sockets open, as far as they
/// may be seen.
fn processes_with(inodes: &BTreeSet<u64>) -> BTreeSet<u32> {
    if inodes.is_empty() {
        return BTreeSet::new();
    }
    let links: BTreeSet<PathBuf> = inodes
        .iter()
        .map(|inode| PathBuf::from(format!("socket:[{inode}]")))
        .collect();
    let holds_one = |pid: &u32| {
        let files = fs::read_dir(format!("/proc/{pid}/fd"));
        let mut files = files.into_iter().flatten().flatten();
        files.any(|file| fs::read_link(file.path()).is_ok_and(|link| links.contains(&link)))
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(holds_one)
        .collect()
}

/// Returns the processes that listen at this path.
pub(super) fn listeners(path: &Path) -> BTreeSet<u32> {
    let sockets = unix_sockets(path).into_iter().filter(|it| it.is_listening);
    processes_with(&sockets.map(|it| it.inode).collect())
}

/// Returns device and inode numbers of all files that any process has open;
/// `None` if not all of them may be seen.
pub(super) fn open_files() -> Option<BTreeSet<(u64, u64)>> {
    // Where processes of others are hidden they are not even listed; the first
    // one is always there.
    fs::read_dir("/proc/1/fd").ok()?;
    let mut open = BTreeSet::new();
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        if !entry.file_name().as_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        match fs::read_dir(entry.path().join("fd")) {
            Ok(files) => {
                for file in files {
                    match file.and_then(|file| fs::metadata(file.path())) {
                        Ok(about) => {
                            open.insert((about.dev(), about.ino()));
                        }
                        Err(error) if has_ended(&error) => {}
                        // In a container it may be the host's, and starts others.
                        Err(_) if entry.file_name() == "1" && !is_qemu(1) => {}
                        Err(_) => return None,
                    }
                }
            }
            Err(error) if has_ended(&error) => {}
            Err(_) => return None,
        }
    }
    Some(open)
}

/// Returns whether a process, or its file, is not there any more.
fn has_ended(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// Names who has a connection to this monitor beside us, as text that follows a
/// sentence; empty if nobody can tell.
pub(super) fn holders(address: &Address) -> String {
    let pids = match address {
        Address::Unix(path) => {
            let accepted = unix_sockets(path).into_iter().filter(|it| !it.is_listening);
            let peers = accepted.filter_map(|it| peers::of_unix(it.inode)).collect();
            processes_with(&peers)
        }
        Address::Tcp(address) => {
            let table = if address.is_ipv4() { "tcp" } else { "tcp6" };
            let text = fs::read_to_string(format!("/proc/net/{table}")).unwrap_or_default();
            processes_with(&clients_of(&text, &spelt(address)))
        }
    };
    let names: Vec<String> = pids
        .into_iter()
        .map(|pid| format!("process {pid} ({})", called(pid)))
        .collect();
    if names.is_empty() {
        String::new()
    } else {
        format!(": {}", names.join(", "))
    }
}

/// Returns under which name a process was started, without its directory; what
/// the kernel calls it is that of a file, which for a guard of ours is `exe`.
fn called(pid: u32) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let first = line.split(|byte| *byte == 0).next().unwrap_or_default();
    let name = String::from_utf8_lossy(first);
    name.rsplit('/').next().unwrap_or_default().to_owned()
}

/// Returns the sockets whose connections a TCP server has accepted: those that
/// still wait for it belong to nobody at its end.
fn clients_of(table: &str, server: &str) -> BTreeSet<u64> {
    let rows: Vec<TcpRow<'_>> = table.lines().skip(1).filter_map(tcp_row).collect();
    let served = rows.iter().filter(|row| row.local == server);
    let clients: BTreeSet<&str> = served.map(|row| row.remote).collect();
    let theirs = rows.iter().filter(|row| row.remote == server);
    theirs
        .filter(|row| clients.contains(row.local))
        .map(|row| row.inode)
        .collect()
}

struct TcpRow<'a> {
    local: &'a str,
    remote: &'a str,
    inode: u64,
}

/// Reads `number: local remote state ... inode` of a connection that stands and
/// that somebody holds.
fn tcp_row(line: &str) -> Option<TcpRow<'_>> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (local, remote, state) = (fields.next()?, fields.next()?, fields.next()?);
    let inode = fields.nth(5)?.parse().ok()?;
    (state == "01" && inode != 0).then_some(TcpRow {
        local,
        remote,
        inode,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_the_kernels_table_is_read_whatever_the_path_holds() {
        let row = b"000000009edd5c31: 00000002 00000000 00010000 0001 01 8689112 /a b/q.sock";
        let (socket, path) = unix_row(row).unwrap();
        assert_eq!(path, b"/a b/q.sock");
        assert_eq!((socket.inode, socket.is_listening), (8_689_112, true));
        let nameless = b"0000000079ca2481: 00000003 00000000 00000000 0001 03 8690125";
        assert_eq!(unix_row(nameless), None);
        assert_eq!(unix_row(b""), None);
    }

    #[test]
    fn who_waits_for_a_port_does_not_hold_it() {
        let row = |local: &str, remote: &str, inode: u64| {
            format!(" 0: {local} {remote} 01 0:0 00:0 0 0 0 {inode} 1\n")
        };
        let table = ["sl\n".to_owned(), row("S", "A", 7), row("A", "S", 8)].concat();
        let waiting = [row("S", "B", 0), row("B", "S", 9)].concat();
        assert_eq!(clients_of(&(table + &waiting), "S"), [8].into());
    }

    #[test]
    fn addresses_are_spelt_as_the_kernel_does() {
        let v4 = "127.0.0.1:4444".parse().unwrap();
        assert_eq!(spelt(&v4), "0100007F:115C");
        let v6 = "[::1]:1".parse().unwrap();
        assert_eq!(spelt(&v6), "00000000000000000000000001000000:0001");
    }
}
