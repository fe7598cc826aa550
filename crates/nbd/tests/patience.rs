//! Deadlines over real sockets: nothing waits for ever, and nobody is hurried.
#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it must be"
)]

mod common;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use common::options;
use common::peer::Speech;
use highwater_model::ByteRange;
use highwater_nbd::wire::HeaderStyle;
use highwater_nbd::{ConnectOptions, Connection, Endpoint, NbdError};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_millis(300);
/// A deadline that works is met long before this; one that does not, never is.
const FAR_TOO_LONG: Duration = Duration::from_secs(5);

fn impatient() -> ConnectOptions {
    ConnectOptions {
        connect_timeout: PATIENCE,
        handshake_timeout: PATIENCE,
        reply_timeout: PATIENCE,
        ..options(false, &[])
    }
}

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::between(start, end).unwrap()
}

/// Listens, and gives the first client to `serve`.
fn listen(serve: impl FnOnce(UnixStream) + Send + 'static) -> Result<(TempDir, Endpoint)> {
    let directory = TempDir::new()?;
    let socket = directory.path().join("socket");
    let listener = UnixListener::bind(&socket)?;
    thread::spawn(move || {
        if let Ok((stream, _)) = listener.accept() {
            serve(stream);
        }
    });
    Ok((directory, Endpoint::Unix(socket)))
}

/// Sends one byte every 20 ms for as long as anybody listens.
fn drip(mut stream: &UnixStream, bytes: &[u8]) {
    for byte in bytes {
        if stream.write_all(&[*byte]).is_err() {
            return;
        }
        thread::park_timeout(Duration::from_millis(20));
    }
}

fn handshake() -> Vec<u8> {
    Speech::handshake(HeaderStyle::Structured, 1, &[]).0
}

#[test]
fn a_peer_that_drips_its_greeting_is_held_to_the_deadline_of_the_whole_handshake() -> Result<()> {
    let (_directory, endpoint) = listen(|stream| drip(&stream, &handshake()))?;
    let begun = Instant::now();
    let error = Connection::connect(&endpoint, &impatient()).unwrap_err();
    assert!(matches!(error, NbdError::Timeout { .. }), "{error:?}");
    assert!(begun.elapsed() < FAR_TOO_LONG);
    Ok(())
}

#[test]
fn a_peer_that_drips_a_reply_is_held_to_the_deadline_of_the_whole_reply() -> Result<()> {
    let (_directory, endpoint) = listen(|mut stream| {
        stream.write_all(&handshake()).unwrap();
        drip(&stream, &Speech::default().data(true, 1, 0, &[1; 4096]).0);
    })?;
    let mut connection = Connection::connect(&endpoint, &impatient())?;
    let begun = Instant::now();
    let error = connection.read_at(0, &mut [0; 4096]).unwrap_err();
    assert!(matches!(error, NbdError::Timeout { .. }), "{error:?}");
    assert!(begun.elapsed() < FAR_TOO_LONG);
    assert_eq!(connection.unanswered().count(), 1);
    Ok(())
}

#[test]
fn a_caller_held_up_elsewhere_still_gets_its_reply() -> Result<()> {
    let (_directory, endpoint) = listen(|mut stream| {
        let reply = Speech::default().data(true, 1, 0, &[1; 4096]).0;
        stream.write_all(&[handshake(), reply].concat()).unwrap();
        stream.read_to_end(&mut Vec::new()).ok();
    })?;
    let mut connection = Connection::connect(&endpoint, &impatient())?;
    connection.submit_read(1, range(0, 4096), Vec::new())?;
    let held_up = Instant::now();
    while held_up.elapsed() < 2 * PATIENCE {
        thread::park_timeout(PATIENCE);
    }
    assert_eq!(connection.next_completion()?.result?, [1; 4096]);
    Ok(())
}

#[test]
fn a_peer_that_does_not_take_requests_is_held_to_the_deadline() -> Result<()> {
    let (_directory, endpoint) = listen(|mut stream| {
        stream.write_all(&handshake()).unwrap();
        thread::park_timeout(Duration::from_mins(1));
    })?;
    let mut connection = Connection::connect(&endpoint, &impatient())?;
    let error = connection
        .submit_write(1, range(0, 1 << 20), vec![1; 1 << 20])
        .unwrap_err();
    assert!(matches!(error, NbdError::Timeout { .. }), "{error:?}");
    Ok(())
}

#[test]
fn a_peer_that_dies_inside_a_chunk_is_a_hang_up() -> Result<()> {
    let (_directory, endpoint) = listen(|mut stream| {
        stream.write_all(&handshake()).unwrap();
        // Flags, NBD_OPT_STRUCTURED_REPLY, NBD_OPT_GO, and the read itself.
        stream.read_exact(&mut [0; 4 + 16 + 32 + 28]).unwrap();
        let reply = Speech::default().data(true, 1, 0, &[1; 4096]).0;
        stream.write_all(&reply[..2000]).unwrap();
    })?;
    let mut connection = Connection::connect(&endpoint, &impatient())?;
    let error = connection.read_at(0, &mut [0; 4096]).unwrap_err();
    assert!(matches!(error, NbdError::HungUp { .. }), "{error:?}");
    Ok(())
}

/// Fills the listen queue of a socket until it takes no more.
fn fill_the_queue(socket: &Path) -> Result<Vec<UnixStream>> {
    let mut queued = Vec::new();
    let socket = PathBuf::from(socket);
    loop {
        let (done, connected) = std::sync::mpsc::channel();
        let socket = socket.clone();
        thread::spawn(move || done.send(UnixStream::connect(socket)));
        match connected.recv_timeout(Duration::from_millis(500)) {
            Ok(stream) => queued.push(stream?),
            Err(_) => return Ok(queued),
        }
    }
}

#[test]
fn a_unix_socket_whose_queue_is_full_times_out() -> Result<()> {
    let directory = TempDir::new()?;
    let socket = directory.path().join("socket");
    let listener = UnixListener::bind(&socket)?;
    rustix::net::listen(&listener, 1)?;
    let _queued = fill_the_queue(&socket)?;
    let begun = Instant::now();
    let error = Connection::connect(&Endpoint::Unix(socket), &impatient()).unwrap_err();
    let NbdError::Connect { source, .. } = error else {
        panic!("{error:?}");
    };
    assert_eq!(source.kind(), std::io::ErrorKind::TimedOut);
    assert!(begun.elapsed() < FAR_TOO_LONG);
    Ok(())
}

#[test]
fn a_port_that_accepts_and_says_nothing_times_out_in_the_handshake() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let endpoint = Endpoint::Tcp {
        host: String::from("localhost"),
        port,
    };
    let error = Connection::connect(&endpoint, &impatient()).unwrap_err();
    assert!(matches!(error, NbdError::Timeout { .. }), "{error:?}");
    Ok(())
}

#[test]
fn a_cancelled_connection_refuses_further_requests() -> Result<()> {
    let (_directory, endpoint) = listen(|mut stream| {
        stream.write_all(&handshake()).unwrap();
        stream.read_to_end(&mut Vec::new()).ok();
    })?;
    let mut connection = Connection::connect(&endpoint, &impatient())?;
    let canceller = connection.canceller();
    canceller.cancel();
    let error = connection.read_at(0, &mut [0; 512]).unwrap_err();
    assert!(matches!(error, NbdError::Cancelled { .. }), "{error:?}");
    drop(connection);
    canceller.cancel();
    assert!(canceller.is_cancelled());
    Ok(())
}
