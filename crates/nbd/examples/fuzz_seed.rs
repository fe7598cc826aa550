//! Records what a real server sends as a seed for the fuzz target `client`.
//!
//! `fuzz_seed SOCKET OPTIONS STEPS FILE`, where the steps are hex digits as
//! `highwater_nbd::fuzzing` reads them.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context, Result};
use highwater_nbd::Transport;
use highwater_nbd::fuzzing::{Script, play};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, options, steps, file] = arguments.as_slice() else {
        anyhow::bail!("usage: fuzz_seed SOCKET OPTIONS STEPS FILE");
    };
    let steps = steps.as_bytes().chunks(2).map(|pair| {
        let digits = std::str::from_utf8(pair).context("steps are hex digits")?;
        Ok(u8::from_str_radix(digits, 16)?)
    });
    let steps = steps.collect::<Result<Vec<u8>>>()?;
    let script = Script::new(options.parse()?, &steps);
    let heard = Arc::new(Mutex::new(Vec::new()));
    let stream = Recorded {
        stream: UnixStream::connect(socket)?,
        heard: Arc::clone(&heard),
    };
    let seen = play(script, Box::new(stream), 0);
    let mut report = io::stderr().lock();
    for line in seen {
        writeln!(report, "{}", line.chars().take(150).collect::<String>())?;
    }
    let heard = heard
        .lock()
        .map_err(|_| io::Error::other("a recorder panicked"))?;
    File::create(file)?.write_all(&script.with_peer(&heard))?;
    Ok(())
}

/// A socket that keeps what it received.
struct Recorded {
    stream: UnixStream,
    heard: Arc<Mutex<Vec<u8>>>,
}

impl Read for Recorded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.stream.read(buffer)?;
        let mut heard = self
            .heard
            .lock()
            .map_err(|_| io::Error::other("a recorder panicked"))?;
        heard.extend(buffer.iter().take(read));
        Ok(read)
    }
}

impl Write for Recorded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl Transport for Recorded {
    fn set_deadline(&mut self, _: Instant) {}
}
