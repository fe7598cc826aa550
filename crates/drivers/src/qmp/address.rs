//! Where a monitor or an agent listens.
//!
//! Only this host's: what is backed up is read over a unix socket, and scratch
//! space is looked at through the file system.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::error::QmpError;

/// Where somebody listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP port of this host.
    Tcp(SocketAddr),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

impl Address {
    /// Reads `/path/to.sock`, `tcp:HOST:PORT` or `unix:/path`. The error says
    /// what is wrong with it.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if let Some(rest) = text.strip_prefix("tcp:") {
            return tcp(rest);
        }
        let path = text.strip_prefix("unix:").unwrap_or(text);
        let path = std::path::absolute(path).map_err(|error| error.to_string())?;
        // What the kernel takes; with its zero byte.
        if path.as_os_str().len() > 107 {
            return Err("a socket's path has 107 bytes at most".to_owned());
        }
        Ok(Self::Unix(path))
    }

    /// Connects. Never waits for longer than the limit: a monitor that is taken
    /// may not even take connections any more.
    pub(super) fn connect(&self, limit: Duration) -> Result<Stream, QmpError> {
        let failed = |error: io::Error| unreachable(self, &error);
        match self {
            Self::Unix(path) => connect_unix(path, limit).map(Stream::Unix),
            Self::Tcp(address) => TcpStream::connect_timeout(address, limit)
                .and_then(|stream| {
                    stream.set_nodelay(true)?;
                    Ok(Stream::Tcp(stream))
                })
                .map_err(failed),
        }
    }
}

fn unreachable(place: &dyn fmt::Display, error: &io::Error) -> QmpError {
    let text = format!("cannot connect to `{place}`: {error}");
    match error.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => QmpError::Nobody(text),
        _ => QmpError::Unreachable(text),
    }
}

fn tcp(text: &str) -> Result<Address, String> {
    let malformed = || "it is not of the form `tcp:HOST:PORT`".to_owned();
    let (host, port) = text.rsplit_once(':').ok_or_else(malformed)?;
    let port: u16 = port.parse().map_err(|_| malformed())?;
    let host = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .unwrap_or(host);
    let address = match host {
        "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
        _ => host.parse().map_err(|_| {
            "only an address of this host will do (`127.0.0.1`, `[::1]`)".to_owned()
        })?,
    };
    if !address.is_loopback() {
        return Err(
            "QEMU has to run on this host: backups are read over a unix socket, and scratch files \
             lie in a local directory"
                .to_owned(),
        );
    }
    Ok(Address::Tcp(SocketAddr::new(address, port)))
}

/// Connects to a unix socket without waiting: its queue is full when it has one
/// waiting connection more than the one that it serves.
fn connect_unix(path: &Path, limit: Duration) -> Result<UnixStream, QmpError> {
    let failed = |error: io::Error| unreachable(&path.display(), &error);
    let address = SocketAddrUnix::new(path).map_err(|error| failed(error.into()))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|error| failed(error.into()))?;
    let since = Instant::now();
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => break,
            Err(rustix::io::Errno::AGAIN) if since.elapsed() < limit => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(rustix::io::Errno::AGAIN) => return Err(QmpError::Taken(String::new())),
            Err(error) => return Err(failed(error.into())),
        }
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false).map_err(failed)?;
    Ok(stream)
}

/// A connection.
#[derive(Debug)]
pub(super) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
        })
    }

    pub(super) fn set_limits(
        &self,
        read: Option<Duration>,
        write: Option<Duration>,
    ) -> io::Result<()> {
        match self {
            Self::Unix(stream) => {
                stream.set_read_timeout(read)?;
                stream.set_write_timeout(write)
            }
            Self::Tcp(stream) => {
                stream.set_read_timeout(read)?;
                stream.set_write_timeout(write)
            }
        }
    }

    /// Ends the connection for all who share it.
    pub(super) fn shut_down(&self) {
        let how = std::net::Shutdown::Both;
        // The other side may have done it before.
        drop(match self {
            Self::Unix(stream) => stream.shutdown(how),
            Self::Tcp(stream) => stream.shutdown(how),
        });
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl io::Read for &Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => io::Read::read(&mut &*stream, buffer),
            Stream::Tcp(stream) => io::Read::read(&mut &*stream, buffer),
        }
    }
}

impl io::Write for &Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => io::Write::write(&mut &*stream, bytes),
            Stream::Tcp(stream) => io::Write::write(&mut &*stream, bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_host_is_accepted() {
        for good in [
            "/run/vm.sock",
            "unix:/run/vm.sock",
            "tcp:127.0.0.1:4444",
            "tcp:localhost:4444",
            "tcp:[::1]:4444",
        ] {
            assert!(Address::parse(good).is_ok(), "{good}");
        }
        let long = format!("/{}", "x".repeat(107));
        for bad in [
            "",
            "tcp:192.168.1.1:4444",
            "tcp:[2001:db8::1]:4444",
            "tcp:kvm2:4444",
            "tcp:127.0.0.1",
            "tcp:127.0.0.1:99999",
            "tcp:0.0.0.0:4444",
            long.as_str(),
        ] {
            assert!(Address::parse(bad).is_err(), "{bad}");
        }
    }
}
