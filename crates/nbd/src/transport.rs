//! Sockets whose every wait has a deadline, and the seams for TLS and tests.

use std::fmt;
use std::io::{self, IoSliceMut, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType};

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP port.
    Tcp {
        /// Name or address.
        host: String,
        /// Port; the protocol's own is 10809.
        port: u16,
    },
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// What became of an attempt to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// This many bytes went out.
    Bytes(usize),
    /// Nothing could go out, and the peer has sent something. Two peers that
    /// only write wait for each other for ever; so this one must read now.
    ReplyWaiting,
}

/// A stream of bytes to a server.
///
/// `read` and `write` block, but never beyond the deadline: then they fail
/// with [`io::ErrorKind::TimedOut`]. They retry interrupted system calls.
pub trait Transport: Read + Write + Send {
    /// Sets the moment at which waiting ends.
    fn set_deadline(&mut self, deadline: Instant);

    /// Sends some of `bytes`, or says that a reply is waiting while the
    /// socket takes nothing.
    ///
    /// The default only ever writes, which is right for a transport that
    /// takes whatever it is given.
    fn send(&mut self, bytes: &[u8]) -> io::Result<Sent> {
        self.write(bytes).map(Sent::Bytes)
    }
}

/// The seam for TLS: turns a plain stream into a protected one.
///
/// Called once per connection, after the server has acknowledged
/// `NBD_OPT_STARTTLS` and before anything else is negotiated. The returned
/// transport must pass [`Transport::set_deadline`] on to `plain`, and must
/// have verified the server when this returns `Ok`.
pub trait TlsUpgrade: fmt::Debug + Send + Sync {
    /// Does the TLS handshake on `plain` with the server at `endpoint`
    /// (`None` for a stream that somebody else opened).
    fn upgrade(
        &self,
        plain: Box<dyn Transport>,
        endpoint: Option<&Endpoint>,
    ) -> io::Result<Box<dyn Transport>>;
}

/// Ends a connection from another thread.
///
/// It does not keep the socket open.
#[derive(Debug, Clone, Default)]
pub struct Canceller {
    cancelled: Arc<AtomicBool>,
    socket: Weak<OwnedFd>,
}

impl Canceller {
    /// Ends the connection at once; whoever waits on it gets
    /// [`NbdError::Cancelled`](crate::NbdError::Cancelled). May be called twice.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
        if let Some(socket) = self.socket.upgrade() {
            // Fails only if the peer has gone, and then there is nobody to wake.
            rustix::net::shutdown(&*socket, Shutdown::Both).unwrap_or_default();
        }
    }

    /// Returns whether the connection was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    /// Returns another descriptor of the connection's socket, if it has one
    /// and is still there: whoever holds it can shut the connection down even
    /// when this process cannot.
    pub fn duplicate(&self) -> io::Result<Option<OwnedFd>> {
        let socket = self.socket.upgrade();
        socket.map(|socket| socket.try_clone()).transpose()
    }
}

/// A non-blocking socket that waits with `poll`.
pub(crate) struct Socket {
    fd: Arc<OwnedFd>,
    deadline: Instant,
}

impl Socket {
    /// Opens a socket to `endpoint` before `timeout` has passed.
    pub(crate) fn connect(endpoint: &Endpoint, timeout: Duration) -> io::Result<Self> {
        let deadline = after(timeout);
        let fd = match endpoint {
            Endpoint::Unix(path) => connect_unix(path, deadline)?,
            Endpoint::Tcp { host, port } => connect_tcp(host, *port, deadline)?,
        };
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self {
            fd: Arc::new(fd),
            deadline,
        })
    }

    pub(crate) fn canceller(&self) -> Canceller {
        Canceller {
            cancelled: Arc::default(),
            socket: Arc::downgrade(&self.fd),
        }
    }

    /// Waits for one of `wanted`; returns what came.
    fn wait(&self, wanted: PollFlags) -> io::Result<PollFlags> {
        loop {
            let left = time_left(self.deadline)?;
            let left = Timespec {
                tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut polled = [PollFd::new(&*self.fd, wanted)];
            match poll(&mut polled, Some(&left)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return Ok(polled.first().map_or(PollFlags::empty(), PollFd::revents)),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// Returns the moment `timeout` from now; "for ever" is some decades.
pub(crate) fn after(timeout: Duration) -> Instant {
    let now = Instant::now();
    let decades = Duration::from_secs(1 << 30);
    now.checked_add(timeout.min(decades)).unwrap_or(now)
}

fn time_left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        Err(io::ErrorKind::TimedOut.into())
    } else {
        Ok(left)
    }
}

/// A Unix socket whose listen queue is full makes a non-blocking connect fail
/// and a blocking one wait for ever; a blocking one with a send timeout waits
/// as long as it should.
fn connect_unix(path: &Path, deadline: Instant) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let fd = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    loop {
        let left = time_left(deadline)?;
        rustix::net::sockopt::set_socket_timeout(
            &fd,
            rustix::net::sockopt::Timeout::Send,
            Some(left),
        )?;
        match rustix::net::connect(&fd, &address) {
            Ok(()) => return Ok(fd),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Tries each address of the name in turn, like every client does.
fn connect_tcp(host: &str, port: u16, deadline: Instant) -> io::Result<OwnedFd> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, time_left(deadline)?) {
            Ok(stream) => {
                // Requests are small and must not wait for company.
                stream.set_nodelay(true)?;
                return Ok(stream.into());
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.read_vectored(&mut [IoSliceMut::new(buffer)])
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        // The deadline counts even while bytes keep dripping in.
        time_left(self.deadline)?;
        loop {
            match rustix::io::readv(&*self.fd, buffers) {
                Ok(read) => return Ok(read),
                Err(rustix::io::Errno::AGAIN) => drop(self.wait(PollFlags::IN)?),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.send_now(bytes)? {
                Some(sent) => return Ok(sent),
                None => drop(self.wait(PollFlags::OUT)?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Socket {
    /// Sends what the socket takes; `None` if it takes nothing now.
    fn send_now(&self, bytes: &[u8]) -> io::Result<Option<usize>> {
        time_left(self.deadline)?;
        loop {
            // NOSIGNAL: a peer that went away is an error, not our death.
            match rustix::net::send(&*self.fd, bytes, SendFlags::NOSIGNAL) {
                Ok(sent) => return Ok(Some(sent)),
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl Transport for Socket {
    fn set_deadline(&mut self, deadline: Instant) {
        self.deadline = deadline;
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<Sent> {
        loop {
            if let Some(sent) = self.send_now(bytes)? {
                return Ok(Sent::Bytes(sent));
            }
            let ready = self.wait(PollFlags::IN | PollFlags::OUT)?;
            if ready.contains(PollFlags::IN) && !ready.contains(PollFlags::OUT) {
                return Ok(Sent::ReplyWaiting);
            }
        }
    }
}
