//! Replies that break the protocol, and odd ones that do not.
#![allow(
    clippy::needless_pass_by_value,
    reason = "a speech is made for one call"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it must be"
)]

mod common;

use common::peer::{SIZE, Speech, error_payload};
use common::{map, options};
use highwater_model::ByteRange;
use highwater_nbd::wire::HeaderStyle::{Extended, Simple, Structured};
use highwater_nbd::wire::{
    HeaderStyle, NBD_FLAG_HAS_FLAGS, NBD_FLAG_SEND_DF, NBD_REPLY_TYPE_ERROR_OFFSET,
    STATUS_EXTENTS_MAX,
};
use highwater_nbd::{
    Completion, Connection, Errno, Fragments, NbdError, ProtocolError, ProtocolError as Broken,
};

const KIB: u64 = 1024;
const ALLOCATION: &str = "base:allocation";
const DIRTY: &str = "qemu:dirty-bitmap:mark";
const FLAGS: u16 = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_DF;

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::between(start, end).unwrap()
}

/// Connects to a peer that negotiates well and then says `speech`.
fn connect(style: HeaderStyle, contexts: &[(u32, &str)], speech: &Speech) -> Connection {
    let speech = Speech::handshake(style, FLAGS, contexts).bytes(&speech.0);
    let names: Vec<_> = contexts.iter().map(|(_, name)| *name).collect();
    speech
        .connect(&options(style == Extended, &names))
        .0
        .unwrap()
}

/// What the answer to a read of bytes 4096..12288 (cookie 1) leads to.
fn read(style: HeaderStyle, speech: Speech, fragments: Fragments) -> Result<Completion, NbdError> {
    let mut connection = connect(style, &[], &speech);
    let poisoned = vec![0xee; 8192];
    connection
        .submit_read_with(7, range(4096, 12288), poisoned, fragments)
        .unwrap();
    let outcome = connection.next_completion();
    assert_eq!(connection.is_broken(), outcome.is_err());
    outcome
}

fn say() -> Speech {
    Speech::default()
}

/// A read answered like this ends the connection, for that reason.
fn refused(speech: Speech, because: &ProtocolError) {
    refused_by(Structured, Fragments::Allowed, speech, because);
}

fn refused_by(style: HeaderStyle, fragments: Fragments, speech: Speech, because: &ProtocolError) {
    match read(style, speech, fragments) {
        Err(NbdError::Protocol(found)) => assert_eq!(&found, because),
        other => panic!("expected {because:?}, got {other:?}"),
    }
}

#[test]
fn a_read_whose_chunks_do_not_cover_it_exactly_once_is_refused() {
    let (half, all) = (&[1; 4096][..], &[1; 8192][..]);
    refused(
        say().data(true, 1, 4096, half),
        &Broken::Gap {
            asked: 8192,
            covered: 4096,
        },
    );
    refused(
        say().data(false, 1, 4096, &all[..8191]).none(1),
        &Broken::Gap {
            asked: 8192,
            covered: 8191,
        },
    );
    refused(
        say().hole(true, 1, 8192, 4096),
        &Broken::Gap {
            asked: 8192,
            covered: 4096,
        },
    );
    refused(
        say().none(1),
        &Broken::Gap {
            asked: 8192,
            covered: 0,
        },
    );
    let twice = say().data(false, 1, 4096, half).data(false, 1, 4096, half);
    refused(twice, &Broken::Overlap(4096));
    let one_byte = say().data(false, 1, 4096, half).hole(false, 1, 8191, 4096);
    refused(one_byte, &Broken::Overlap(8191));
    let inside = say().data(false, 1, 4096, all).data(true, 1, 5000, &[1]);
    refused(inside, &Broken::Overlap(5000));
    let around = say().data(false, 1, 5000, &[1]).hole(true, 1, 4096, 8192);
    refused(around, &Broken::Overlap(5000));
}

#[test]
fn a_chunk_outside_its_request_is_refused_before_it_is_stored() {
    for offset in [0, 4095, 8193, 12288, u64::MAX - 100, u64::MAX] {
        refused(
            say().data(true, 1, offset, &[1; 4096]),
            &Broken::OutsideTheRequest,
        );
        refused(
            say().hole(true, 1, offset, 4096),
            &Broken::OutsideTheRequest,
        );
    }
    refused(
        say().hole(true, 1, 4096, u32::MAX),
        &Broken::OutsideTheRequest,
    );
    let error = [&error_payload(5, "")[..], &0_u64.to_be_bytes()].concat();
    refused(
        say().chunk(true, NBD_REPLY_TYPE_ERROR_OFFSET, 1, &error),
        &Broken::OutsideTheRequest,
    );
}

#[test]
fn absurd_lengths_are_refused_before_they_are_waited_for() {
    let (data, status) = ("NBD_REPLY_TYPE_OFFSET_DATA", "NBD_REPLY_TYPE_BLOCK_STATUS");
    let long = u64::from(u32::MAX);
    let limit = 32 << 20;
    refused(
        say().head(true, 1, 1, u32::MAX),
        &Broken::TooLarge {
            what: data,
            len: long,
            limit,
        },
    );
    for len in [0, 7, 8] {
        let wrong = Broken::WrongLength {
            what: data,
            len: u64::from(len),
        };
        refused(say().head(true, 1, 1, len), &wrong);
    }
    let hole = "NBD_REPLY_TYPE_OFFSET_HOLE";
    refused(
        say().head(true, 2, 1, 13),
        &Broken::WrongLength {
            what: hole,
            len: 13,
        },
    );
    refused(
        say().hole(true, 1, 4096, 0),
        &Broken::WrongLength {
            what: "a hole",
            len: 0,
        },
    );
    let none = "NBD_REPLY_TYPE_NONE";
    refused(
        say().head(true, 0, 1, 1),
        &Broken::WrongLength { what: none, len: 1 },
    );
    refused(
        say().head(true, 5, 1, 4),
        &Broken::WrongLength {
            what: status,
            len: 4,
        },
    );
    let (len, limit) = (STATUS_EXTENTS_MAX + 1, STATUS_EXTENTS_MAX);
    let many = u32::try_from(4 + 8 * len).unwrap();
    refused(
        say().head(true, 5, 1, many),
        &Broken::TooLarge {
            what: status,
            len,
            limit,
        },
    );
    let (what, len, limit) = ("an error chunk", 8193, 8192);
    refused(
        say().head(true, 0x8001, 1, 8193),
        &Broken::TooLarge { what, len, limit },
    );
}

#[test]
fn replies_that_answer_nothing_are_refused() {
    refused(
        say().data(true, 2, 4096, &[1; 8192]),
        &Broken::UnknownCookie(2),
    );
    refused(say().simple(0, 0, b""), &Broken::UnknownCookie(0));
    refused(say().simple(1, 0, &[1; 8192]), &Broken::SimpleReply);
    refused(say().chunk(false, 0, 1, b""), &Broken::EmptyChunkNotLast);
    refused(say().chunk(true, 7, 1, b""), &Broken::UnexpectedChunk(7));
    refused(
        say().chunk(true, 6, 1, &[0; 24]),
        &Broken::UnexpectedChunk(6),
    );
    refused(
        say().status(true, 1, 0, &[(4096, 0)]),
        &Broken::UnexpectedChunk(5),
    );
    refused(say().error(true, 1, 0, ""), &Broken::ErrorWithoutError);
    refused(
        say().chunk(true, 0x8001, 1, &[0, 0, 0, 5, 0, 1]),
        &Broken::TooShort,
    );
    refused(say().chunk(true, 0x8001, 1, b""), &Broken::TooShort);
    let wrong = Broken::WrongMagic {
        message: "reply",
        found: 0x4854_5450,
    };
    refused(say().bytes(b"HTTP/1.1 400 Bad Request"), &wrong);
}

#[test]
fn a_fragmented_reply_to_a_read_that_forbids_it_is_refused() {
    let halves = say()
        .data(false, 1, 4096, &[1; 4096])
        .data(true, 1, 8192, &[1; 4096]);
    refused_by(
        Structured,
        Fragments::Forbidden,
        halves.clone(),
        &Broken::Fragmented,
    );
    assert!(read(Structured, halves, Fragments::Allowed).is_ok());
}

#[test]
fn a_second_last_chunk_is_refused() {
    let speech = say().hole(true, 1, 4096, 8192).hole(true, 1, 4096, 8192);
    let mut connection = connect(Structured, &[], &speech);
    connection
        .submit_read(1, range(4096, 12288), Vec::new())
        .unwrap();
    connection
        .submit_read(2, range(4096, 12288), Vec::new())
        .unwrap();
    assert!(connection.next_completion().is_ok());
    let error = connection.next_completion().unwrap_err();
    assert!(
        matches!(error, NbdError::Protocol(Broken::UnknownCookie(1))),
        "{error:?}"
    );
}

#[test]
fn chunks_scattered_into_too_many_pieces_are_refused() {
    let mut speech = say();
    for at in 0..4097 {
        speech = speech.data(false, 1, at * 2, &[1]);
    }
    let mut connection = connect(Structured, &[], &speech);
    connection
        .submit_read(1, range(0, 16384), Vec::new())
        .unwrap();
    let error = connection.next_completion().unwrap_err();
    assert!(
        matches!(error, NbdError::Protocol(Broken::TooManyPieces(4096))),
        "{error:?}"
    );
}

#[test]
fn each_header_style_refuses_the_others() {
    let fragments = Fragments::Allowed;
    let wrong = |found| Broken::WrongMagic {
        message: "reply",
        found,
    };
    let structured = say().hole(true, 1, 4096, 8192);
    refused_by(Simple, fragments, structured.clone(), &wrong(0x668e_33ef));
    refused_by(Extended, fragments, structured, &wrong(0x668e_33ef));
    refused_by(
        Extended,
        fragments,
        say().simple(1, 5, b""),
        &wrong(0x6744_6698),
    );
    let hole = [&4096_u64.to_be_bytes()[..], &8192_u32.to_be_bytes()].concat();
    let extended = say().extended(true, 2, 1, 4096, &hole);
    refused_by(Structured, fragments, extended.clone(), &wrong(0x6e8a_278c));
    assert!(read(Extended, extended, fragments).unwrap().result.unwrap() == [0; 8192]);
    let elsewhere = Broken::WrongOffset {
        asked: 4096,
        found: 0,
    };
    refused_by(
        Extended,
        fragments,
        say().extended(true, 2, 1, 0, &hole),
        &elsewhere,
    );
}

#[test]
fn holes_read_as_zeroes_whatever_the_buffer_held() {
    let speech = say()
        .hole(false, 1, 8192, 4096)
        .data(false, 1, 4096, &[1; 100]);
    let speech = speech
        .hole(false, 1, 4196, 3900)
        .data(true, 1, 8096, &[2; 96]);
    let bytes = read(Structured, speech, Fragments::Allowed)
        .unwrap()
        .result
        .unwrap();
    assert_eq!(bytes[..100], [1; 100]);
    assert!(bytes[100..4000].iter().all(|byte| *byte == 0));
    assert_eq!(bytes[4000..4096], [2; 96]);
    assert!(bytes[4096..].iter().all(|byte| *byte == 0));
}

#[test]
fn an_error_chunk_fails_the_read_even_if_all_its_bytes_came() {
    let whole = || say().data(false, 1, 4096, &[1; 8192]);
    let offset = [
        &error_payload(5, "bad\x1b[2Jblock")[..],
        &5000_u64.to_be_bytes(),
    ]
    .concat();
    let unknown = error_payload(1234, "later");
    for (speech, errno, message, at) in [
        (whole().error(true, 1, 5, "gone"), Errno::Io, "gone", None),
        (
            say().error(false, 1, 5, "gone").hole(true, 1, 4096, 8192),
            Errno::Io,
            "gone",
            None,
        ),
        (
            say().error(false, 1, 12, "").error(true, 1, 5, "x"),
            Errno::NoMem,
            "",
            None,
        ),
        (
            whole().chunk(true, 0x8002, 1, &offset),
            Errno::Io,
            "bad [2Jblock",
            Some(5000),
        ),
        (
            whole().chunk(true, 0x8765, 1, &unknown),
            Errno::Other(1234),
            "later",
            None,
        ),
        (
            say().error(true, 1, 22, "whole"),
            Errno::Inval,
            "whole",
            None,
        ),
        (say().simple(1, 5, b""), Errno::Io, "", None),
    ] {
        let done = read(Structured, speech, Fragments::Allowed).unwrap();
        let error = done.result.unwrap_err();
        assert_eq!(
            (error.errno, error.message.as_str(), error.offset),
            (errno, message, at)
        );
        assert!(done.spare.is_empty(), "no byte of a failed read is shown");
    }
}

#[test]
fn interleaved_replies_find_their_requests() {
    let speech = say()
        .data(false, 2, 0, &[2; 512])
        .data(false, 1, 512, &[1; 512])
        .error(true, 3, 5, "third")
        .data(true, 1, 0, &[1; 512])
        .hole(true, 2, 512, 512);
    let mut connection = connect(Structured, &[], &speech);
    for cookie in [11, 12, 13] {
        connection
            .submit_read(cookie, range(0, 1024), vec![0xee; 5000])
            .unwrap();
    }
    let mut next = || connection.next_completion().unwrap();
    let (third, first, second) = (next(), next(), next());
    assert!(third.cookie == 13 && third.result.is_err());
    assert!(first.cookie == 11 && first.result.unwrap() == [1; 1024]);
    let expected = [[2; 512], [0; 512]].concat();
    assert!(second.cookie == 12 && second.result.unwrap() == expected);
}

#[test]
fn each_context_is_asked_again_from_where_its_own_answer_ended() {
    let quarter = u32::try_from(SIZE / 4).unwrap();
    // Context 5 stops after a quarter each time, context 9 says all at once.
    let mut speech = say();
    for (cookie, left) in (1..).zip([4, 3, 2, 1]) {
        speech = speech.status(false, cookie, 9, &[(left * quarter, 3)]);
        speech = speech.status(true, cookie, 5, &[(quarter, u32::from(left % 2 == 0))]);
    }
    let mut connection = connect(Structured, &[(9, ALLOCATION), (5, DIRTY)], &speech);
    let quarter = u64::from(quarter);
    let expected = [
        (0, quarter, 1),
        (quarter, 2 * quarter, 0),
        (2 * quarter, 3 * quarter, 1),
        (3 * quarter, 4 * quarter, 0),
    ];
    assert_eq!(map(&mut connection, DIRTY).unwrap(), expected);
}

#[test]
fn extents_beyond_the_request_are_cut_from_a_map_and_shown_by_block_status() {
    let speech = || say().status(true, 1, 5, &[(4096, 1), (64 << 10, 0)]);
    let mut connection = connect(Structured, &[(5, DIRTY)], &speech());
    let once = connection.block_status(range(8192, 16384)).unwrap();
    assert_eq!(once[0].covered_to(), Some(8192 + 4096 + 64 * KIB));
    let mut connection = connect(Structured, &[(5, DIRTY)], &speech());
    let mut seen = Vec::new();
    let sink = &mut |part, flags| {
        seen.push((part, flags));
        Ok::<(), NbdError>(())
    };
    connection.map(DIRTY, range(8192, 16384), sink).unwrap();
    assert_eq!(seen, [(range(8192, 12288), 1), (range(12288, 16384), 0)]);
}

/// Block status answered like this ends the connection, for that reason.
fn status_refused(speech: Speech, because: &ProtocolError) {
    let mut connection = connect(Structured, &[(9, ALLOCATION), (5, DIRTY)], &speech);
    match connection.block_status(range(0, SIZE)) {
        Err(NbdError::Protocol(found)) => assert_eq!(&found, because),
        other => panic!("expected {because:?}, got {other:?}"),
    }
    assert!(connection.is_broken());
}

#[test]
fn block_status_that_breaks_the_protocol_is_refused() {
    let good = || say().status(false, 1, 9, &[(4096, 0)]);
    status_refused(good().none(1), &Broken::ContextMissing(5));
    status_refused(
        good().status(true, 1, 9, &[(1, 0)]),
        &Broken::ContextTwice(9),
    );
    status_refused(
        good().status(true, 1, 6, &[(1, 0)]),
        &Broken::UnknownContext(6),
    );
    status_refused(
        good().status(true, 1, 5, &[(1, 0), (0, 0)]),
        &Broken::EmptyExtent,
    );
    status_refused(good().data(true, 1, 0, &[1]), &Broken::UnexpectedChunk(1));
    status_refused(good().hole(true, 1, 0, 1), &Broken::UnexpectedChunk(2));
    status_refused(say().simple(1, 0, b""), &Broken::SimpleReply);
    let what = "NBD_REPLY_TYPE_BLOCK_STATUS";
    status_refused(
        say().head(true, 5, 1, 13),
        &Broken::WrongLength { what, len: 13 },
    );
}

#[test]
fn wide_extents_that_overflow_or_are_miscounted_are_refused() {
    let payload = |count: u32, len: u64| {
        [
            &9_u32.to_be_bytes()[..],
            &count.to_be_bytes(),
            &len.to_be_bytes(),
            &[0; 8],
        ]
        .concat()
    };
    let what = "NBD_REPLY_TYPE_BLOCK_STATUS_EXT";
    for (payload, because) in [
        (payload(2, 4096), Broken::WrongLength { what, len: 2 }),
        (payload(1, 0), Broken::EmptyExtent),
        (payload(1, u64::MAX), Broken::OutsideTheRequest),
    ] {
        let speech = say().extended(true, 6, 1, 0, &payload);
        let mut connection = connect(Extended, &[(9, ALLOCATION)], &speech);
        let error = connection.block_status(range(0, SIZE)).unwrap_err();
        assert!(
            matches!(&error, NbdError::Protocol(found) if *found == because),
            "{error:?}"
        );
    }
    let speech = say().extended(true, 6, 1, 0, &payload(1, 1 << 40));
    let mut connection = connect(Extended, &[(9, ALLOCATION)], &speech);
    assert_eq!(map(&mut connection, ALLOCATION).unwrap(), [(0, SIZE, 0)]);
}

#[test]
fn a_failed_block_status_leaves_the_connection_usable() {
    let speech = say()
        .status(false, 1, 9, &[(4096, 0)])
        .error(true, 1, 22, "no status here")
        .hole(true, 2, 0, 512);
    let mut connection = connect(Structured, &[(9, ALLOCATION), (5, DIRTY)], &speech);
    let error = connection.block_status(range(0, SIZE)).unwrap_err();
    assert!(matches!(error, NbdError::Request { .. }), "{error:?}");
    connection.read_at(0, &mut [1; 512]).unwrap();
}

#[test]
fn a_flood_of_extents_is_refused_at_a_fixed_number() {
    // Each chunk is as large as the protocol allows, three of them are too much.
    let million = vec![(1, 0); 1 << 20];
    let contexts = [(1, "x-a:a"), (2, "x-a:b"), (3, "x-a:c")];
    let speech = (1..=3).fold(say(), |speech, id| speech.status(id == 3, 1, id, &million));
    let mut connection = connect(Structured, &contexts, &speech);
    let error = connection.block_status(range(0, SIZE)).unwrap_err();
    let (what, limit) = ("the number of extents", 2 << 20);
    let because = Broken::TooLarge {
        what,
        len: limit,
        limit,
    };
    assert!(
        matches!(&error, NbdError::Protocol(found) if *found == because),
        "{error:?}"
    );
    // A map keeps one context only, and so gets by.
    let mut connection = connect(Structured, &contexts, &speech);
    assert_eq!(map(&mut connection, "x-a:b").unwrap(), [(0, SIZE, 0)]);
}

#[test]
fn after_a_failed_block_status_only_its_other_contexts_may_come_late() {
    let contexts = [(9, ALLOCATION), (5, DIRTY)];
    let failed = || say().error(true, 1, 5, "no status here");
    let after = |speech: Speech| {
        let mut connection = connect(Structured, &contexts, &speech.hole(true, 2, 0, 512));
        assert!(matches!(
            connection.block_status(range(0, SIZE)),
            Err(NbdError::Request { .. })
        ));
        connection.read_at(0, &mut [1; 512])
    };
    after(failed().status(true, 1, 5, &[(4096, 1), (4096, 0)])).unwrap();
    after(failed().error(true, 1, 5, "nor here").error(true, 1, 5, "")).unwrap();
    let late = failed()
        .error(true, 1, 5, "")
        .error(true, 1, 5, "")
        .error(true, 1, 5, "");
    for speech in [failed().hole(true, 1, 0, 512), failed().none(1), late] {
        let error = after(speech).unwrap_err();
        assert!(
            matches!(error, NbdError::Protocol(Broken::UnknownCookie(1))),
            "{error:?}"
        );
    }
}
