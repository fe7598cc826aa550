//! A long wire between the program under test and QEMU.
//!
//! QEMU makes the socket of a session a while before the program is told to
//! connect to it. In between, this puts QEMU's socket aside and listens under
//! its name. If it ever came too late, nobody would connect here, and
//! [`Proxy::end`] says so.

use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

/// How often a socket is looked for.
const LOOK: Duration = Duration::from_millis(1);
/// Bytes that travel as one.
const PIECE_BYTES: usize = 1 << 20;
/// Pieces under way: more than all requests that QEMU answers at once.
const PIECES: usize = 1024;

/// A proxy that waits for the next session.
pub(crate) struct Proxy {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<usize>>,
}

impl Proxy {
    /// Waits for a session's socket somewhere below `dir`, moves it to `aside`
    /// and takes its place.
    pub(crate) fn start(dir: PathBuf, aside: PathBuf, latency: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&stop);
        let thread = thread::spawn(move || serve(&dir, &aside, latency, &asked));
        Self { stop, thread }
    }

    /// Ends it; fails unless a program has connected.
    pub(crate) fn end(self) -> Result<()> {
        self.stop.store(true, Ordering::SeqCst);
        let connections = self
            .thread
            .join()
            .map_err(|_| anyhow::anyhow!("the proxy panicked"))??;
        ensure!(connections > 0, "nobody came through the proxy");
        Ok(())
    }
}

/// Returns how many connections there were.
fn serve(dir: &Path, aside: &Path, latency: Duration, stop: &AtomicBool) -> Result<usize> {
    let path = loop {
        if stop.load(Ordering::SeqCst) {
            return Ok(0);
        }
        match socket_below(dir) {
            Some(path) => break path,
            None => thread::sleep(LOOK),
        }
    };
    fs::rename(&path, aside).context("cannot put QEMU's socket aside")?;
    let listener = UnixListener::bind(&path).context("cannot listen in the place of QEMU")?;
    listener.set_nonblocking(true)?;
    let mut connections = 0;
    let mut threads = Vec::new();
    while !stop.load(Ordering::SeqCst) {
        match listener.accept() {
            Ok((near, _)) => {
                near.set_nonblocking(false)?;
                let far = UnixStream::connect(aside).context("QEMU does not listen")?;
                threads.extend(join(near, far, latency)?);
                connections += 1;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(LOOK),
            Err(error) => return Err(error.into()),
        }
    }
    for thread in threads {
        thread.join().unwrap_or_default();
    }
    fs::remove_file(aside)?;
    Ok(connections)
}

/// Finds a socket with the name of a session's.
fn socket_below(dir: &Path) -> Option<PathBuf> {
    for entry in fs::read_dir(dir).ok()?.flatten() {
        let (path, kind) = (entry.path(), entry.file_type().ok()?);
        let is_session = entry.file_name().to_string_lossy().starts_with("hw-");
        if kind.is_socket() && is_session {
            return Some(path);
        }
        let below = kind.is_dir().then(|| socket_below(&path)).flatten();
        if below.is_some() {
            return below;
        }
    }
    None
}

/// Passes requests on at once and answers later.
fn join(near: UnixStream, far: UnixStream, latency: Duration) -> io::Result<[JoinHandle<()>; 3]> {
    let (mut from_near, mut to_far) = (near.try_clone()?, far.try_clone()?);
    let (give, take) = sync_channel(PIECES);
    Ok([
        thread::spawn(move || {
            // Whoever hangs up ends both directions; how is no matter here.
            io::copy(&mut from_near, &mut to_far).unwrap_or_default();
            to_far.shutdown(Shutdown::Both).unwrap_or_default();
        }),
        thread::spawn(move || fill(far, &give)),
        thread::spawn(move || drain(near, &take, latency)),
    ])
}

fn fill(mut from: UnixStream, give: &SyncSender<(Instant, Vec<u8>)>) {
    loop {
        let mut piece = vec![0; PIECE_BYTES];
        let Ok(count @ 1..) = from.read(&mut piece) else {
            return;
        };
        piece.truncate(count);
        if give.send((Instant::now(), piece)).is_err() {
            return;
        }
    }
}

fn drain(mut to: UnixStream, take: &Receiver<(Instant, Vec<u8>)>, latency: Duration) {
    for (came, piece) in take {
        thread::sleep((came + latency).saturating_duration_since(Instant::now()));
        if to.write_all(&piece).is_err() {
            break;
        }
    }
    to.shutdown(Shutdown::Both).unwrap_or_default();
}
