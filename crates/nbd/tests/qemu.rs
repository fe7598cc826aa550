//! Interoperation with QEMU's three servers.
#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it must be"
)]

mod common;

use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use common::{HEADERS, Monitor, Server, map, options, qemu_io, run, write_file};
use highwater_model::ByteRange;
use highwater_nbd::wire::HeaderStyle;
use highwater_nbd::{
    ConnectOptions, Connection, ContextExtents, Endpoint, Fragments, NbdError, UsageError,
    list_exports, list_meta_contexts,
};
use serde_json::json;
use tempfile::TempDir;

const KIB: u64 = 1024;
const MIB: u64 = 1 << 20;

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::between(start, end).unwrap()
}

/// Returns bytes that differ from place to place, with a hole in the middle.
fn content(len: usize) -> Vec<u8> {
    let byte = |at: usize| {
        if (len / 3..len / 2).contains(&at) {
            0
        } else {
            ((at * 31) >> 7).to_le_bytes()[0]
        }
    };
    (0..len).map(byte).collect()
}

/// Reads all of an export, eight requests at a time, into used buffers.
fn read_all(connection: &mut Connection, piece: u64, fragments: Fragments) -> Result<Vec<u8>> {
    let size_bytes = connection.export().size_bytes;
    let mut content = vec![0; usize::try_from(size_bytes)?];
    let mut spare = vec![vec![0xee; 3]; 8];
    let mut at = 0;
    while at < size_bytes || connection.in_flight() > 0 {
        if let (true, Some(buffer)) = (at < size_bytes, spare.pop()) {
            let piece = range(at, size_bytes.min(at + piece));
            connection.submit_read_with(at, piece, buffer, fragments)?;
            at = piece.end();
            continue;
        }
        let done = connection.next_completion()?;
        assert_eq!(done.cookie, done.range.start());
        let mut bytes = done.result?;
        let start = usize::try_from(done.range.start())?;
        content[start..start + bytes.len()].copy_from_slice(&bytes);
        bytes.fill(0xee);
        spare.push(bytes);
    }
    Ok(content)
}

#[test]
fn an_export_of_qemu_nbd_reads_as_its_file_with_any_headers_and_pieces() -> Result<()> {
    let directory = TempDir::new()?;
    let content = content(3 << 20);
    write_file(&directory.path().join("disk.raw"), &content)?;
    let server = Server::qemu_nbd(directory, &["-f", "raw", "-r", "disk.raw"])?;
    for extended in HEADERS {
        let mut connection = server.connect(&options(extended, &[]))?;
        let style = if extended {
            HeaderStyle::Extended
        } else {
            HeaderStyle::Structured
        };
        assert_eq!(connection.export().header_style, style);
        assert!(connection.export().is_read_only() && connection.export().can_multi_conn());
        for piece in [4 * KIB, 100 * KIB, MIB, 3 * MIB] {
            assert!(read_all(&mut connection, piece, Fragments::Allowed)? == content);
        }
        assert!(read_all(&mut connection, MIB, Fragments::Forbidden)? == content);
        let mut part = vec![0; 5000];
        connection.read_at(1_000_001, &mut part)?;
        assert!(part == content[1_000_001..1_005_001]);
        connection.disconnect()?;
    }
    Ok(())
}

#[test]
fn an_export_of_qemu_nbd_over_tcp_reads_as_its_file() -> Result<()> {
    let directory = TempDir::new()?;
    let content = content(2 << 20);
    write_file(&directory.path().join("disk.raw"), &content)?;
    let server = Server::qemu_nbd_tcp(directory, &["-f", "raw", "-r", "disk.raw"])?;
    let mut connection = server.connect(&options(true, &[]))?;
    assert!(read_all(&mut connection, 256 * KIB, Fragments::Allowed)? == content);
    Ok(())
}

#[test]
fn a_dirty_bitmap_of_qemu_nbd_maps_what_was_written_since() -> Result<()> {
    let directory = TempDir::new()?;
    let at = directory.path();
    run(
        at,
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "disk.qcow2", "8G"],
    )?;
    qemu_io(at, "disk.qcow2", &["write -P 1 0 1M"])?;
    run(at, "qemu-img", &["bitmap", "--add", "disk.qcow2", "mark"])?;
    qemu_io(
        at,
        "disk.qcow2",
        &["write -P 2 1M 64k", "write -z 6G 128k", "discard 512k 64k"],
    )?;
    let server = Server::qemu_nbd(
        directory,
        &["-f", "qcow2", "-r", "-B", "mark", "disk.qcow2"],
    )?;
    for extended in HEADERS {
        let contexts = ["qemu:dirty-bitmap:mark", "base:allocation"];
        let mut connection = server.connect(&options(extended, &contexts))?;
        let dirty: Vec<_> = map(&mut connection, contexts[0])?
            .into_iter()
            .filter(|(_, _, flags)| flags & 1 != 0)
            .map(|(start, end, _)| (start, end))
            .collect();
        let zeroes = 6 * KIB * MIB;
        let expected = [
            (512 * KIB, 576 * KIB),
            (MIB, MIB + 64 * KIB),
            (zeroes, zeroes + 128 * KIB),
        ];
        assert_eq!(dirty, expected);
        let allocation = map(&mut connection, contexts[1])?;
        assert_eq!(allocation.first(), Some(&(0, 512 * KIB, 0)));
        // 8 GiB need three requests where the length has 32 bits.
        assert_eq!(allocation.last().map(|last| last.1), Some(8 * KIB * MIB));
    }
    Ok(())
}

#[test]
fn allocation_depth_tells_the_layer_of_a_chain() -> Result<()> {
    let directory = TempDir::new()?;
    let at = directory.path();
    run(
        at,
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "base.qcow2", "1M"],
    )?;
    qemu_io(at, "base.qcow2", &["write -P 1 0 512k"])?;
    let create = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "base.qcow2",
        "-F",
        "qcow2",
        "top.qcow2",
    ];
    run(at, "qemu-img", &create)?;
    qemu_io(at, "top.qcow2", &["write -P 2 0 64k"])?;
    let server = Server::qemu_nbd(directory, &["-f", "qcow2", "-r", "-A", "top.qcow2"])?;
    for extended in HEADERS {
        let mut connection = server.connect(&options(extended, &["qemu:allocation-depth"]))?;
        let depths = map(&mut connection, "qemu:allocation-depth")?;
        let expected = [
            (0, 64 * KIB, 1),
            (64 * KIB, 512 * KIB, 2),
            (512 * KIB, MIB, 0),
        ];
        assert_eq!(depths, expected);
    }
    Ok(())
}

/// Starts a QEMU without a guest, serving nothing yet.
fn qemu(directory: TempDir, arguments: &[&str]) -> Result<(Server, Monitor)> {
    let socket = directory.path().join("socket");
    let mut command = Command::new("qemu-system-x86_64");
    command.args([
        "-S",
        "-display",
        "none",
        "-nodefaults",
        "-accel",
        "tcg",
        "-pidfile",
        "pid",
    ]);
    command
        .args(["-qmp", "unix:qmp,server=on,wait=off"])
        .args(arguments);
    let server = Server::start(directory, command, Endpoint::Unix(socket.clone()))?;
    let mut monitor = Monitor::open(&server.path("qmp"))?;
    let address = json!({"type": "unix", "data": {"path": socket}});
    monitor.execute(
        "nbd-server-start",
        &json!({"addr": address, "max-connections": 2}),
    )?;
    Ok((server, monitor))
}

#[test]
fn the_server_inside_qemu_tells_the_ranges_a_guest_device_wrote() -> Result<()> {
    let directory = TempDir::new()?;
    run(
        directory.path(),
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "disk.qcow2", "1G"],
    )?;
    let disk = "driver=qcow2,node-name=d0,file.driver=file,file.filename=disk.qcow2";
    let device = "virtio-blk-pci,drive=d0,id=v0";
    let (server, mut monitor) = qemu(directory, &["-blockdev", disk, "-device", device])?;
    monitor.execute(
        "block-dirty-bitmap-add",
        &json!({"node": "d0", "name": "mark"}),
    )?;
    for write in [
        "write -P 0xab 10M 3M",
        "write -z 100M 1M",
        "write 1023M 512",
    ] {
        let command = format!("qemu-io -d /machine/peripheral/v0/virtio-backend \"{write}\"");
        monitor.execute("human-monitor-command", &json!({"command-line": command}))?;
    }
    monitor.execute(
        "block-dirty-bitmap-disable",
        &json!({"node": "d0", "name": "mark"}),
    )?;
    let export = json!({"type": "nbd", "id": "e0", "node-name": "d0", "name": "disk",
        "bitmaps": ["mark"], "allocation-depth": true, "description": "the first disk"});
    monitor.execute("block-export-add", &export)?;
    for extended in HEADERS {
        let mut connection = server.connect(&options(extended, &["qemu:dirty-bitmap:mark"]))?;
        assert_eq!(connection.export().description, "the first disk");
        assert_eq!(connection.export().block_sizes.maximum, 32 << 20);
        let expected = [
            (0, 10 * MIB, 0),
            (10 * MIB, 13 * MIB, 1),
            (13 * MIB, 100 * MIB, 0),
            (100 * MIB, 101 * MIB, 1),
            (101 * MIB, 1023 * MIB, 0),
            (1023 * MIB, 1023 * MIB + 64 * KIB, 1),
            (1023 * MIB + 64 * KIB, 1024 * MIB, 0),
        ];
        assert_eq!(map(&mut connection, "qemu:dirty-bitmap:mark")?, expected);
        let mut bytes = vec![0; 4096];
        connection.read_at(13 * MIB - 2048, &mut bytes)?;
        assert!(bytes[..2048].iter().all(|byte| *byte == 0xab));
        assert!(bytes[2048..].iter().all(|byte| *byte == 0));
    }
    Ok(())
}

#[test]
fn a_connection_beyond_the_servers_limit_times_out_in_the_handshake() -> Result<()> {
    let directory = TempDir::new()?;
    let (server, mut monitor) = qemu(
        directory,
        &["-blockdev", "driver=null-co,node-name=d0,size=1048576"],
    )?;
    let export = json!({"type": "nbd", "id": "e0", "node-name": "d0", "name": "disk"});
    monitor.execute("block-export-add", &export)?;
    let limited = ConnectOptions {
        handshake_timeout: Duration::from_millis(300),
        ..options(true, &[])
    };
    let (_first, _second) = (server.connect(&limited)?, server.connect(&limited)?);
    let third = server.connect(&limited);
    assert!(matches!(third, Err(NbdError::Timeout { .. })), "{third:?}");
    Ok(())
}

/// Starts a storage daemon with a disk of nothing, a writable export `disk`
/// and a fine bitmap.
fn storage_daemon() -> Result<(Server, Monitor)> {
    let directory = TempDir::new()?;
    let socket = directory.path().join("socket");
    let mut command = Command::new("qemu-storage-daemon");
    command.args([
        "--pidfile",
        "pid",
        "--chardev",
        "socket,id=c0,path=qmp,server=on,wait=off",
    ]);
    command.args([
        "--monitor",
        "chardev=c0",
        "--nbd-server",
        "addr.type=unix,addr.path=socket",
    ]);
    command.args([
        "--blockdev",
        "driver=null-co,node-name=d0,size=1073741824,read-zeroes=on",
    ]);
    command.args([
        "--export",
        "type=nbd,id=e0,node-name=d0,name=disk,writable=on",
    ]);
    let server = Server::start(directory, command, Endpoint::Unix(socket))?;
    let mut monitor = Monitor::open(&server.path("qmp"))?;
    let bitmap = json!({"node": "d0", "name": "fine", "granularity": 512});
    monitor.execute("block-dirty-bitmap-add", &bitmap)?;
    Ok((server, monitor))
}

/// Dirties `count` sectors, every second one.
fn dirty_every_second_sector(connection: &mut Connection, count: u64) -> Result<()> {
    let mut spare = vec![vec![7; 512]; connection.capacity()];
    let mut next = 0;
    while next < count || connection.in_flight() > 0 {
        if let (true, Some(buffer)) = (next < count, spare.pop()) {
            connection.submit_write(next, range(next * 1024, next * 1024 + 512), buffer)?;
            next += 1;
            continue;
        }
        let bytes = connection.next_completion()?.result?;
        assert_eq!(bytes, [7; 512], "a write gives its buffer back");
        spare.push(bytes);
    }
    connection.flush()?;
    Ok(())
}

#[test]
fn a_map_of_more_extents_than_one_reply_carries_is_whole() -> Result<()> {
    let (server, mut monitor) = storage_daemon()?;
    let count = 70_000;
    dirty_every_second_sector(&mut server.connect(&options(true, &[]))?, count)?;
    monitor.execute(
        "block-dirty-bitmap-disable",
        &json!({"node": "d0", "name": "fine"}),
    )?;
    let export = json!({"type": "nbd", "id": "e1", "node-name": "d0", "name": "marked",
        "bitmaps": ["fine"]});
    monitor.execute("block-export-add", &export)?;
    let mut bitmaps = options(true, &["qemu:dirty-bitmap:"]);
    bitmaps.export = String::from("marked");
    assert_eq!(
        list_meta_contexts(&server.endpoint, &bitmaps)?,
        ["qemu:dirty-bitmap:fine"]
    );
    let context = "qemu:dirty-bitmap:fine";
    for extended in HEADERS {
        let mut wanted = options(extended, &["base:allocation", context]);
        wanted.export = String::from("marked");
        let mut connection = server.connect(&wanted)?;
        let once = connection.block_status(range(0, 1 << 30))?;
        let covered = |name| {
            once.iter()
                .find(|one| one.context == name)
                .and_then(ContextExtents::covered_to)
        };
        // The two contexts stop at different places in one and the same reply.
        assert_eq!(covered("base:allocation"), Some(1 << 30));
        assert_eq!(covered(context), Some(131_072 * 512));
        let mapped = map(&mut connection, context)?;
        assert_eq!(mapped.len() as u64, 2 * count);
        let dirty = mapped.iter().filter(|extent| extent.2 == 1);
        assert!(
            dirty
                .zip(0..)
                .all(|(extent, at)| extent.0 == at * 1024 && extent.1 == at * 1024 + 512)
        );
    }
    Ok(())
}

#[test]
fn exports_and_contexts_are_listed() -> Result<()> {
    let (server, _monitor) = storage_daemon()?;
    let exports = list_exports(&server.endpoint, &ConnectOptions::default())?;
    assert_eq!(
        exports
            .iter()
            .map(|one| one.name.as_str())
            .collect::<Vec<_>>(),
        ["disk"]
    );
    for extended in HEADERS {
        let contexts = list_meta_contexts(&server.endpoint, &options(extended, &[]))?;
        assert_eq!(contexts, ["base:allocation"]);
    }
    Ok(())
}

#[test]
fn an_unknown_export_is_refused_in_the_servers_words() -> Result<()> {
    let (server, _monitor) = storage_daemon()?;
    for contexts in [&[][..], &["base:allocation"]] {
        let mut wanted = options(true, contexts);
        wanted.export = String::from("dusk");
        let error = server.connect(&wanted).unwrap_err();
        assert!(matches!(&error, NbdError::NoSuchExport { export, .. } if export == "dusk"));
        assert!(
            error.to_string().contains("export 'dusk' not present"),
            "{error}"
        );
    }
    Ok(())
}

#[test]
fn a_context_the_server_lacks_is_absent_and_refused_before_anything_is_sent() -> Result<()> {
    let (server, _monitor) = storage_daemon()?;
    let wanted = options(true, &["base:allocation", "qemu:dirty-bitmap:lost"]);
    let mut connection = server.connect(&wanted)?;
    assert_eq!(connection.export().contexts.len(), 1);
    let mapped = map(&mut connection, "qemu:dirty-bitmap:lost");
    assert!(
        matches!(mapped, Err(NbdError::Usage(UsageError::NoSuchContext(_)))),
        "{mapped:?}"
    );
    assert!(!connection.is_broken());
    Ok(())
}

#[test]
fn a_server_killed_while_it_answers_is_a_hang_up_and_its_requests_are_known() -> Result<()> {
    let directory = TempDir::new()?;
    write_file(&directory.path().join("disk.raw"), &vec![7; 16 << 20])?;
    let mut server = Server::qemu_nbd(directory, &["-f", "raw", "-r", "disk.raw"])?;
    let mut connection = server.connect(&options(true, &[]))?;
    for at in 0..16 {
        connection.submit_read(at, range(at << 20, (at + 1) << 20), Vec::new())?;
    }
    connection.next_completion()?;
    server.kill()?;
    let error = loop {
        if let Err(error) = connection.next_completion() {
            break error;
        }
    };
    assert!(matches!(error, NbdError::HungUp { .. }), "{error:?}");
    assert!(connection.unanswered().count() > 0);
    assert!(matches!(
        connection.next_completion(),
        Err(NbdError::Broken)
    ));
    Ok(())
}

#[test]
fn block_status_that_qemu_fails_for_one_of_two_contexts_leaves_the_connection_usable() -> Result<()>
{
    let (server, mut monitor) = storage_daemon()?;
    let broken = json!({"driver": "blkdebug", "node-name": "broken", "image": "d0",
        "inject-error": [{"event": "none", "iotype": "block-status", "errno": 5}]});
    monitor.execute("block-export-del", &json!({"id": "e0", "mode": "hard"}))?;
    monitor.execute("blockdev-add", &broken)?;
    let bitmap = json!({"node": "broken", "name": "mark", "disabled": true});
    monitor.execute("block-dirty-bitmap-add", &bitmap)?;
    let export = json!({"type": "nbd", "id": "e1", "node-name": "broken", "name": "broken",
        "bitmaps": ["mark"]});
    monitor.execute("block-export-add", &export)?;
    for extended in HEADERS {
        let mut wanted = options(extended, &["base:allocation", "qemu:dirty-bitmap:mark"]);
        wanted.export = String::from("broken");
        let mut connection = server.connect(&wanted)?;
        for _ in 0..3 {
            let status = connection.block_status(range(0, MIB));
            assert!(
                matches!(status, Err(NbdError::Request { .. })),
                "{status:?}"
            );
            // Without fragments QEMU does not look for holes, which would fail as well.
            connection.submit_read_with(1, range(0, 512), vec![1; 512], Fragments::Forbidden)?;
            assert_eq!(connection.next_completion()?.result?, [0; 512]);
        }
        // With extended headers the broken context need not be asked at all.
        let mapped = map(&mut connection, "qemu:dirty-bitmap:mark");
        assert_eq!(mapped.is_ok(), extended, "{mapped:?}");
    }
    Ok(())
}
