//! Interoperation with nbdkit, whose filters make a bad server on demand.
#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it must be"
)]

mod common;

use std::time::{Duration, Instant};

use anyhow::Result;
use common::{HEADERS, Server, map, options, write_file};
use highwater_model::ByteRange;
use highwater_nbd::wire::HeaderStyle;
use highwater_nbd::{
    ConnectOptions, Connection, Endpoint, Errno, Holes, NbdError, UsageError, list_exports,
};
use tempfile::TempDir;

const KIB: u64 = 1024;
const MIB: u64 = 1 << 20;

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::between(start, end).unwrap()
}

/// Returns what the `pattern` plugin serves: each eight bytes are their offset.
fn pattern(offset: u64, len: u64) -> Vec<u8> {
    (offset / 8..(offset + len) / 8)
        .flat_map(|at| (at * 8).to_be_bytes())
        .collect()
}

#[test]
fn sixteen_requests_in_flight_return_each_its_own_bytes() -> Result<()> {
    let server = Server::nbdkit(&["pattern", "8G"])?;
    let mut connection = server.connect(&options(true, &[]))?;
    assert_eq!(connection.export().header_style, HeaderStyle::Structured);
    for round in 0..8 {
        for cookie in 0..16 {
            let start = round * 900 * MIB + cookie * 7 * MIB;
            connection.submit_read(cookie, range(start, start + 64 * KIB), Vec::new())?;
        }
        let full = connection.submit_read(99, range(0, 512), Vec::new());
        assert!(matches!(
            full,
            Err(NbdError::Usage(UsageError::PipelineFull(16)))
        ));
        for _ in 0..16 {
            let done = connection.next_completion()?;
            assert!(done.result? == pattern(done.range.start(), done.range.len()));
        }
    }
    assert!(matches!(
        connection.next_completion(),
        Err(NbdError::Usage(UsageError::NothingInFlight))
    ));
    Ok(())
}

#[test]
fn a_failed_request_fails_alone_and_the_connection_goes_on() -> Result<()> {
    let directory = TempDir::new()?;
    let trigger = directory.path().join("trigger");
    let file = format!("error-file={}", trigger.display());
    for plain in [false, true] {
        let mut arguments = vec!["--filter=error", "pattern", "1M", "error=EIO"];
        arguments.extend(["error-pread-rate=100%", &file]);
        if plain {
            arguments.insert(0, "--no-sr");
        }
        let server = Server::nbdkit(&arguments)?;
        let mut connection = server.connect(&options(true, &["base:allocation"]))?;
        for _ in 0..3 {
            write_file(&trigger, b"")?;
            connection.submit_read(5, range(0, 64 * KIB), vec![1; 64 << 10])?;
            let done = connection.next_completion()?;
            assert_eq!(done.result.unwrap_err().errno, Errno::Io);
            assert!(done.spare.is_empty() && done.spare.capacity() >= 64 << 10);
            let error = connection.read_at(0, &mut [0; 512]).unwrap_err();
            assert!(matches!(error, NbdError::Request { .. }), "{error:?}");
            std::fs::remove_file(&trigger)?;
            let mut bytes = vec![0; 64 << 10];
            connection.read_at(8 * KIB, &mut bytes)?;
            assert!(bytes == pattern(8 * KIB, 64 * KIB));
        }
    }
    Ok(())
}

#[test]
fn failing_block_status_fails_the_map_and_not_the_reads() -> Result<()> {
    let server = Server::nbdkit(&["--filter=error", "memory", "1M", "error-extents-rate=100%"])?;
    let mut connection = server.connect(&options(true, &["base:allocation"]))?;
    let error = map(&mut connection, "base:allocation").unwrap_err();
    assert!(matches!(&error, NbdError::Request { source, .. } if source.errno == Errno::Io));
    connection.read_at(0, &mut [0; 4096])?;
    Ok(())
}

#[test]
fn a_slow_server_is_a_timeout_and_ends_the_connection() -> Result<()> {
    let server = Server::nbdkit(&["--filter=delay", "memory", "1M", "rdelay=5"])?;
    let patience = Duration::from_millis(200);
    let impatient = ConnectOptions {
        reply_timeout: patience,
        ..options(true, &[])
    };
    let mut connection = server.connect(&impatient)?;
    let begun = Instant::now();
    let error = connection.read_at(0, &mut [0; 512]).unwrap_err();
    assert!(
        matches!(error, NbdError::Timeout { limit, .. } if limit == patience),
        "{error:?}"
    );
    assert!(begun.elapsed() < Duration::from_secs(3));
    assert!(matches!(
        connection.read_at(0, &mut [0; 512]),
        Err(NbdError::Broken)
    ));
    Ok(())
}

#[test]
fn a_wait_is_cancelled_from_another_thread() -> Result<()> {
    let server = Server::nbdkit(&["--filter=delay", "memory", "1M", "rdelay=60"])?;
    let mut connection = server.connect(&options(true, &[]))?;
    let canceller = connection.canceller();
    let begun = Instant::now();
    connection.submit_read(1, range(0, 512), Vec::new())?;
    let waiting = std::thread::spawn(move || connection.next_completion());
    canceller.cancel();
    let error = waiting.join().unwrap().unwrap_err();
    assert!(matches!(error, NbdError::Cancelled { .. }), "{error:?}");
    assert!(begun.elapsed() < Duration::from_secs(20));
    Ok(())
}

#[test]
fn a_truncated_export_of_an_odd_size_is_read_to_its_last_byte() -> Result<()> {
    let server = Server::nbdkit(&["--filter=truncate", "pattern", "2M", "truncate=1000008"])?;
    let mut connection = server.connect(&options(true, &["base:allocation"]))?;
    let mut bytes = vec![0; 1_000_008];
    connection.read_at(0, &mut bytes)?;
    assert!(bytes == pattern(0, 1_000_008));
    assert_eq!(
        map(&mut connection, "base:allocation")?,
        [(0, 1_000_008, 0)]
    );
    let beyond = connection.read_at(1_000_000, &mut [0; 9]);
    assert!(matches!(
        beyond,
        Err(NbdError::Usage(UsageError::BeyondTheEnd { .. }))
    ));
    Ok(())
}

#[test]
fn a_server_whose_last_client_says_goodbye_ends() -> Result<()> {
    let mut server = Server::nbdkit(&["--filter=exitlast", "memory", "1M"])?;
    server.connect(&options(true, &[]))?.disconnect()?;
    server.wait()?;
    let gone = server.connect(&options(true, &[]));
    assert!(matches!(gone, Err(NbdError::Connect { .. })), "{gone:?}");
    Ok(())
}

#[test]
fn block_sizes_of_the_server_are_respected() -> Result<()> {
    let policy = [
        "blocksize-minimum=4K",
        "blocksize-preferred=8K",
        "blocksize-maximum=64K",
    ];
    let mut arguments = vec!["--filter=blocksize-policy", "pattern", "1M"];
    arguments.push("blocksize-error-policy=error");
    arguments.extend(policy);
    let server = Server::nbdkit(&arguments)?;
    let mut connection = server.connect(&options(true, &["base:allocation"]))?;
    let sizes = connection.export().block_sizes;
    assert_eq!(
        (sizes.minimum, sizes.preferred, sizes.maximum),
        (4096, 8192, 65536)
    );
    let mut bytes = vec![0; 1 << 20];
    connection.read_at(0, &mut bytes)?;
    assert!(bytes == pattern(0, MIB), "a long read is split");
    let odd = connection.submit_read(1, range(512, 4096), Vec::new());
    assert!(matches!(
        odd,
        Err(NbdError::Usage(UsageError::Unaligned { .. }))
    ));
    let long = connection.submit_read(1, range(0, 128 * KIB), Vec::new());
    assert!(matches!(
        long,
        Err(NbdError::Usage(UsageError::TooLong { .. }))
    ));
    // A map may be asked for at any place; the question is aligned outwards.
    let mut mapped = Vec::new();
    connection.map("base:allocation", range(512, 5000), &mut |part, flags| {
        mapped.push((part, flags));
        Ok::<(), NbdError>(())
    })?;
    assert_eq!(mapped, [(range(512, 5000), 0)]);
    Ok(())
}

#[test]
fn what_is_written_trimmed_and_zeroed_is_read_back() -> Result<()> {
    for arguments in [&["memory", "4M"][..], &["--no-sr", "memory", "4M"]] {
        let server = Server::nbdkit(arguments)?;
        let mut connection = server.connect(&options(true, &[]))?;
        connection.write_at(0, &pattern(0, 4 * MIB))?;
        connection.write_zeroes(range(MIB, 2 * MIB), Holes::Forbidden)?;
        connection.write_zeroes(range(2 * MIB, 2 * MIB + 4096), Holes::Allowed)?;
        connection.trim(range(3 * MIB, 4 * MIB))?;
        connection.flush()?;
        let mut expected = pattern(0, 4 * MIB);
        expected[1 << 20..(2 << 20) + 4096].fill(0);
        expected[3 << 20..].fill(0);
        let mut bytes = vec![0xee; 4 << 20];
        connection.read_at(0, &mut bytes)?;
        assert!(bytes == expected);
    }
    Ok(())
}

#[test]
fn a_long_write_and_unread_replies_do_not_wait_for_each_other() -> Result<()> {
    // One thread: this server reads no further request before it got rid of a reply.
    let server = Server::nbdkit(&["--threads=1", "memory", "64M"])?;
    let impatient = ConnectOptions {
        reply_timeout: Duration::from_secs(10),
        ..options(true, &[])
    };
    let mut connection = server.connect(&impatient)?;
    connection.write_at(0, &vec![1; 16 << 20])?;
    connection.submit_read(1, range(0, 8 * MIB), Vec::new())?;
    connection.submit_read(2, range(8 * MIB, 16 * MIB), Vec::new())?;
    connection.submit_write(3, range(0, 8 * MIB), vec![3; 8 << 20])?;
    connection.submit_read(4, range(0, 8 * MIB), Vec::new())?;
    for (cookie, byte) in [(1, 1), (2, 1), (3, 3), (4, 3)] {
        let done = connection.next_completion()?;
        assert_eq!(done.cookie, cookie);
        assert!(done.result?.iter().all(|found| *found == byte));
    }
    Ok(())
}

#[test]
fn what_a_server_does_not_offer_is_refused_before_it_is_sent() -> Result<()> {
    let server = Server::nbdkit(&["--filter=nozero", "memory", "1M", "zeromode=none"])?;
    let mut connection = server.connect(&options(true, &[]))?;
    let refused = connection.write_zeroes(range(0, 4096), Holes::Allowed);
    assert!(
        matches!(refused, Err(NbdError::Usage(UsageError::NotOffered(_)))),
        "{refused:?}"
    );
    let server = Server::nbdkit(&["--readonly", "memory", "1M"])?;
    let mut connection = server.connect(&options(true, &[]))?;
    for refused in [
        connection.write_at(0, &[1; 512]),
        connection.trim(range(0, 512)),
    ] {
        assert!(matches!(
            refused,
            Err(NbdError::Usage(UsageError::NotOffered(_)))
        ));
    }
    connection.read_at(0, &mut [0; 512])?;
    Ok(())
}

#[test]
fn without_extents_all_is_data() -> Result<()> {
    let server = Server::nbdkit(&["--filter=noextents", "memory", "1G"])?;
    let mut connection = server.connect(&options(true, &["base:allocation"]))?;
    assert_eq!(map(&mut connection, "base:allocation")?, [(0, 1 << 30, 0)]);
    Ok(())
}

#[test]
fn a_server_without_structured_replies_is_read_and_has_no_contexts() -> Result<()> {
    let server = Server::nbdkit(&["--no-sr", "pattern", "1M"])?;
    let mut connection = server.connect(&options(true, &["base:allocation"]))?;
    assert_eq!(connection.export().header_style, HeaderStyle::Simple);
    assert!(connection.export().contexts.is_empty());
    let mut bytes = vec![0; 1 << 20];
    connection.read_at(0, &mut bytes)?;
    assert!(bytes == pattern(0, MIB));
    let status = connection.block_status(range(0, 4096));
    assert!(matches!(
        status,
        Err(NbdError::Usage(UsageError::NoContexts))
    ));
    Ok(())
}

#[test]
fn a_quarter_million_extents_are_mapped_without_gaps() -> Result<()> {
    let directory = TempDir::new()?;
    let count: u64 = 250_000;
    let line = |at: u64| {
        format!(
            "{} 4K {}\n",
            at * 4096,
            if at.is_multiple_of(2) { "" } else { "hole" }
        )
    };
    let list: String = (0..count).map(line).collect();
    write_file(&directory.path().join("list"), list.as_bytes())?;
    let extents = format!("extentlist={}", directory.path().join("list").display());
    let server = Server::nbdkit(&["--filter=extentlist", "memory", "1G", &extents])?;
    let mut connection = server.connect(&options(true, &["base:allocation"]))?;
    let mapped = map(&mut connection, "base:allocation")?;
    assert_eq!(
        mapped.iter().filter(|extent| extent.2 == 0).count() as u64,
        count / 2
    );
    assert_eq!(mapped[1], (4096, 8192, 1));
    Ok(())
}

#[test]
fn extents_of_a_script_are_taken_as_they_come() -> Result<()> {
    let server = Server::nbdkit(&[
        "eval",
        "get_size=echo 1M",
        "pread=dd if=/dev/zero count=$3 iflag=count_bytes status=none",
        "can_extents=exit 0",
        // One extent at a time, from wherever it is asked.
        "extents=echo $4 16384 hole",
    ])?;
    let mut connection = server.connect(&options(true, &["base:allocation"]))?;
    let first = connection.block_status(range(0, MIB))?;
    assert_eq!(first[0].covered_to(), Some(16384), "the reply stops early");
    assert_eq!(map(&mut connection, "base:allocation")?, [(0, MIB, 1)]);
    Ok(())
}

#[test]
fn an_oldstyle_server_is_refused_in_words() -> Result<()> {
    let server = Server::nbdkit(&["--oldstyle", "memory", "1M"])?;
    let error = server.connect(&options(true, &[])).unwrap_err();
    assert!(
        matches!(error, NbdError::Oldstyle { found: "oldstyle" }),
        "{error:?}"
    );
    assert!(error.to_string().contains("oldstyle"));
    Ok(())
}

#[test]
fn a_server_that_masks_fixed_newstyle_is_refused_in_words() -> Result<()> {
    let server = Server::nbdkit(&["--mask-handshake=0", "memory", "1M"])?;
    let error = server.connect(&options(true, &[])).unwrap_err();
    assert!(
        matches!(
            error,
            NbdError::Oldstyle {
                found: "unfixed newstyle"
            }
        ),
        "{error:?}"
    );
    Ok(())
}

#[test]
fn a_server_that_requires_tls_is_refused_in_words() -> Result<()> {
    let directory = TempDir::new()?;
    write_file(
        &directory.path().join("psk"),
        b"somebody:0123456789abcdef0123456789abcdef\n",
    )?;
    let psk = format!("--tls-psk={}", directory.path().join("psk").display());
    let server = Server::nbdkit(&["--tls=require", &psk, "memory", "1M"])?;
    for contexts in [&[][..], &["base:allocation"]] {
        let error = server.connect(&options(true, contexts)).unwrap_err();
        assert!(matches!(error, NbdError::TlsRequired { .. }), "{error:?}");
    }
    let error = list_exports(&server.endpoint, &ConnectOptions::default()).unwrap_err();
    assert!(matches!(error, NbdError::TlsRequired { .. }), "{error:?}");
    Ok(())
}

#[test]
fn a_socket_that_is_not_there_or_not_listened_to_is_a_connect_error() -> Result<()> {
    let directory = TempDir::new()?;
    let nowhere = Endpoint::Unix(directory.path().join("socket"));
    let error = Connection::connect(&nowhere, &options(true, &[])).unwrap_err();
    assert!(matches!(&error, NbdError::Connect { endpoint, .. } if endpoint.ends_with("/socket")));
    let mut server = Server::nbdkit_in(directory, &["memory", "1M"])?;
    server.kill()?;
    let error = server.connect(&options(true, &[])).unwrap_err();
    assert!(matches!(error, NbdError::Connect { .. }), "{error:?}");
    Ok(())
}

#[test]
fn asking_a_server_without_extended_headers_for_them_does_no_harm() -> Result<()> {
    let server = Server::nbdkit(&["data", "1 @0x10000 2", "size=1M"])?;
    for extended in HEADERS {
        let mut connection = server.connect(&options(extended, &["base:allocation"]))?;
        let mapped = map(&mut connection, "base:allocation")?;
        // The plugin allocates 32 KiB at a time.
        let expected = [(0, 32, 0), (32, 64, 3), (64, 96, 0), (96, 1024, 3)];
        assert_eq!(
            mapped,
            expected.map(|(start, end, flags)| (start * KIB, end * KIB, flags))
        );
    }
    Ok(())
}
