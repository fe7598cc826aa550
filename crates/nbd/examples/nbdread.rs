//! Reads a whole export over several connections and prints the rate.
//!
//! `nbdread ENDPOINT EXPORT CONNECTIONS IN_FLIGHT REQUEST_BYTES`, where the
//! endpoint is the path of a socket or HOST:PORT.
#![expect(
    clippy::print_stdout,
    reason = "this is a program to look at numbers with"
)]

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};
use highwater_model::ByteRange;
use highwater_nbd::{ConnectOptions, Connection, Endpoint};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [place, export, connections, in_flight, request_bytes] = arguments.as_slice() else {
        anyhow::bail!("usage: nbdread ENDPOINT EXPORT CONNECTIONS IN_FLIGHT REQUEST_BYTES");
    };
    let endpoint = endpoint(place)?;
    let connections: usize = connections.parse()?;
    let request_bytes: u64 = request_bytes.parse()?;
    let options = ConnectOptions {
        in_flight_max: in_flight.parse()?,
        ..ConnectOptions::for_export(export.as_str())
    };
    let next = AtomicU64::new(0);
    let begun = Instant::now();
    let bytes = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..connections)
            .map(|_| scope.spawn(|| read(&endpoint, &options, request_bytes, &next)))
            .collect();
        readers.into_iter().try_fold(0_u64, |sum, reader| {
            let read = reader.join().ok().context("a reader panicked")??;
            anyhow::Ok(sum.saturating_add(read))
        })
    })?;
    let seconds = begun.elapsed().as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let rate = bytes as f64 / 1e6 / seconds;
    println!("{bytes} bytes in {seconds:.3} s: {rate:.0} MB/s");
    Ok(())
}

fn endpoint(place: &str) -> Result<Endpoint> {
    if place.contains('/') {
        return Ok(Endpoint::Unix(PathBuf::from(place)));
    }
    let (host, port) = place
        .rsplit_once(':')
        .context("neither a path nor HOST:PORT")?;
    Ok(Endpoint::Tcp {
        host: host.to_owned(),
        port: port.parse()?,
    })
}

/// Takes pieces off the shared counter until the export is read.
fn read(
    endpoint: &Endpoint,
    options: &ConnectOptions,
    request_bytes: u64,
    next: &AtomicU64,
) -> Result<u64> {
    let mut connection = Connection::connect(endpoint, options)?;
    let size_bytes = connection.export().size_bytes;
    let mut spare = Vec::new();
    let mut bytes = 0_u64;
    let mut more = true;
    while more || connection.in_flight() > 0 {
        while more && connection.in_flight() < connection.capacity() {
            let start = next.fetch_add(request_bytes, Ordering::Relaxed);
            let end = start.saturating_add(request_bytes).min(size_bytes);
            let Some(range) = ByteRange::between(start, end).filter(|range| !range.is_empty())
            else {
                more = false;
                break;
            };
            connection.submit_read(start, range, spare.pop().unwrap_or_default())?;
        }
        if connection.in_flight() > 0 {
            let done = connection.next_completion()?;
            bytes = bytes.saturating_add(done.range.len());
            spare.push(done.result?);
        }
    }
    connection.disconnect()?;
    Ok(bytes)
}
