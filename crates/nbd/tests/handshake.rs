//! Handshakes that go wrong, odd ones that do not, and the seam for TLS.
#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it must be"
)]

mod common;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::options;
use common::peer::{SIZE, Speech};
use highwater_nbd::wire::{
    HeaderStyle, NBD_FLAG_HAS_FLAGS, NBD_INFO_BLOCK_SIZE, NBD_OPT_GO, NBD_OPT_LIST,
    NBD_OPT_SET_META_CONTEXT, NBD_OPT_STARTTLS, NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK,
    NBD_REP_ERR_POLICY, NBD_REP_ERR_SHUTDOWN, NBD_REP_ERR_TLS_REQD, NBD_REP_ERR_UNSUP,
    NBD_REP_INFO, NBD_REP_SERVER,
};
use highwater_nbd::{
    ConnectOptions, Endpoint, ExportInfo, NbdError, ProtocolError as Broken, TlsUpgrade, Transport,
    UsageError,
};

fn say() -> Speech {
    Speech::default().greeting(3)
}

/// Structured replies agreed on.
fn structured() -> Speech {
    say().reply(NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK, b"")
}

fn connect(speech: Speech) -> Result<ExportInfo, NbdError> {
    let connected = speech.connect(&options(false, &["base:allocation"])).0;
    connected.map(|connection| connection.export().clone())
}

fn refused(speech: Speech, because: &Broken) {
    match connect(speech) {
        Err(NbdError::Protocol(found)) => assert_eq!(&found, because),
        other => panic!("expected {because:?}, got {other:?}"),
    }
}

/// After no contexts were selected, the export is opened by this.
fn opening(speech: &Speech) -> Speech {
    structured()
        .reply(NBD_OPT_SET_META_CONTEXT, NBD_REP_ACK, b"")
        .bytes(&speech.0)
}

fn sizes(minimum: u32, preferred: u32, maximum: u32) -> Vec<u8> {
    let fields = [minimum, preferred, maximum].map(u32::to_be_bytes).concat();
    [&NBD_INFO_BLOCK_SIZE.to_be_bytes()[..], &fields].concat()
}

#[test]
fn what_is_no_nbd_server_is_told_from_its_first_bytes() {
    refused(
        Speech::default().bytes(b"SSH-2.0-OpenSSH_9.2p1\r\n"),
        &Broken::NotNbd,
    );
    refused(Speech::default().bytes(b"HTTP/1.1"), &Broken::NotNbd);
    refused(
        Speech::default().bytes(b"NBDMAGICNBDMAGIC"),
        &Broken::NotNbd,
    );
    let silent = connect(Speech::default());
    assert!(matches!(silent, Err(NbdError::HungUp { .. })), "{silent:?}");
}

#[test]
fn replies_to_options_that_break_the_protocol_are_refused() {
    let option = NBD_OPT_STRUCTURED_REPLY;
    let wrong = Broken::WrongOption {
        asked: option,
        found: NBD_OPT_LIST,
    };
    refused(say().reply(NBD_OPT_LIST, NBD_REP_ACK, b""), &wrong);
    let unexpected = Broken::UnexpectedReply {
        option,
        reply: NBD_REP_SERVER,
    };
    refused(say().reply(option, NBD_REP_SERVER, &[0; 4]), &unexpected);
    let mut absurd = say().reply(option, NBD_REP_ACK, b"");
    let len = absurd.0.len();
    absurd.0[len - 4..].fill(0xff);
    let (what, limit) = ("a reply to an option", 16384);
    refused(
        absurd,
        &Broken::TooLarge {
            what,
            len: u64::from(u32::MAX),
            limit,
        },
    );
    refused(
        say().bytes(&[1; 20]),
        &Broken::WrongMagic {
            message: "reply to an option",
            found: 0x0101_0101_0101_0101,
        },
    );
}

#[test]
fn contexts_that_break_the_protocol_are_refused() {
    let twice = structured()
        .context(3, "base:allocation")
        .context(3, "other:one");
    refused(twice, &Broken::ContextTwice(3));
    let renamed = structured()
        .context(3, "base:allocation")
        .context(4, "base:allocation");
    refused(renamed, &Broken::ContextTwice(4));
    let data = [0, 0, 0, 1, 0xff, 0xfe];
    refused(
        structured().reply(NBD_OPT_SET_META_CONTEXT, 4, &data),
        &Broken::NotText,
    );
    let short = structured().reply(NBD_OPT_SET_META_CONTEXT, 4, &[0, 0]);
    refused(short, &Broken::TooShort);
    let mut endless = structured();
    for id in 0..100 {
        endless = endless.context(id, &format!("x-many:{id}"));
    }
    let what = "the number of replies to an option";
    refused(
        endless,
        &Broken::TooLarge {
            what,
            len: 65,
            limit: 64,
        },
    );
}

#[test]
fn exports_that_break_the_protocol_are_refused() {
    let speech = Speech::default;
    let ack = |speech: Speech| opening(&speech.reply(NBD_OPT_GO, NBD_REP_ACK, b""));
    refused(ack(speech()), &Broken::NoExportSize);
    refused(
        ack(speech().export(1 << 63, 1)),
        &Broken::AbsurdSize(1 << 63),
    );
    for (minimum, preferred, maximum) in [
        (0, 4096, 1 << 20),
        (3, 4096, 1 << 20),
        (1 << 17, 1 << 17, 1 << 20),
        (512, 256, 4096),
        (1, 3, 4096),
        (4096, 4096, 512),
    ] {
        let because = Broken::BlockSizes {
            minimum,
            preferred,
            maximum,
        };
        refused(
            ack(speech().info(&sizes(minimum, preferred, maximum))),
            &because,
        );
    }
    let what = "NBD_INFO_EXPORT";
    refused(
        ack(speech().info(&[0, 0, 1])),
        &Broken::WrongLength { what, len: 3 },
    );
    refused(ack(speech().info(&[0])), &Broken::TooShort);
    let mut endless = speech();
    for _ in 0..300 {
        endless = endless.reply(NBD_OPT_GO, NBD_REP_INFO, &[0x77, 0x77]);
    }
    let what = "the number of replies to an option";
    refused(
        opening(&endless),
        &Broken::TooLarge {
            what,
            len: 257,
            limit: 256,
        },
    );
}

#[test]
fn facts_about_the_export_are_kept_and_unknown_ones_ignored() {
    let speech = Speech::default()
        .info(&[0x77, 0x77, 1, 2, 3])
        .info(b"\0\x01canonical")
        .info(b"\0\x02a disk\x1b[31m of mine")
        .export(SIZE, NBD_FLAG_HAS_FLAGS)
        .info(&sizes(512, 4096, u32::MAX))
        .reply(NBD_OPT_GO, NBD_REP_ACK, b"");
    let export = connect(opening(&speech)).unwrap();
    assert_eq!(export.name, "canonical");
    assert_eq!(
        export.description, "a disk [31m of mine",
        "nothing steers a terminal"
    );
    assert_eq!(export.size_bytes, SIZE);
    assert_eq!(
        export.block_sizes.maximum,
        32 << 20,
        "we ask for no more than that"
    );
}

#[test]
fn refusals_keep_the_servers_words() {
    let go = |reply| opening(&Speech::default().reply(NBD_OPT_GO, reply, b"come back later"));
    let error = connect(go(NBD_REP_ERR_SHUTDOWN)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot negotiate NBD_OPT_GO with the NBD server: it answered NBD_REP_ERR_SHUTDOWN \
         (it said: come back later)"
    );
    let error = connect(go(NBD_REP_ERR_TLS_REQD)).unwrap_err();
    assert!(matches!(error, NbdError::TlsRequired { message } if message == "come back later"));
}

#[test]
fn an_old_server_is_asked_with_the_old_option() {
    for (flags, zeroes) in [(1, 124), (3, 0)] {
        let speech = Speech::default()
            .greeting(flags)
            .reply(NBD_OPT_STRUCTURED_REPLY, NBD_REP_ERR_UNSUP, b"")
            .reply(NBD_OPT_GO, NBD_REP_ERR_UNSUP, b"")
            .bytes(&SIZE.to_be_bytes())
            .bytes(&[0, 3])
            .bytes(&vec![0; zeroes])
            .simple(1, 0, &[7; 512]);
        let mut connection = speech.connect(&options(false, &[])).0.unwrap();
        assert_eq!(connection.export().header_style, HeaderStyle::Simple);
        assert!(connection.export().is_read_only());
        let mut bytes = [0; 512];
        connection.read_at(0, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 512]);
    }
    let hung_up = Speech::default()
        .greeting(3)
        .reply(NBD_OPT_STRUCTURED_REPLY, NBD_REP_ERR_UNSUP, b"")
        .reply(NBD_OPT_GO, NBD_REP_ERR_UNSUP, b"");
    let error = hung_up.connect(&options(false, &[])).0.unwrap_err();
    assert!(matches!(error, NbdError::NoSuchExport { .. }), "{error:?}");
}

#[test]
fn names_too_long_for_the_protocol_are_refused_before_anything_is_sent() {
    let long = ConnectOptions::for_export("x".repeat(4097));
    let (connected, heard) = say().connect(&long);
    assert!(matches!(
        connected,
        Err(NbdError::Usage(UsageError::NameTooLong { .. }))
    ));
    assert!(heard.lock().unwrap().is_empty());
}

/// Counts how often it is asked, and "protects" by passing everything on.
#[derive(Debug, Default)]
struct PassThrough {
    upgrades: AtomicUsize,
}

impl TlsUpgrade for PassThrough {
    fn upgrade(
        &self,
        plain: Box<dyn Transport>,
        endpoint: Option<&Endpoint>,
    ) -> io::Result<Box<dyn Transport>> {
        assert!(endpoint.is_none());
        self.upgrades.fetch_add(1, Ordering::Relaxed);
        Ok(plain)
    }
}

struct Untrusting;

impl fmt::Debug for Untrusting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Untrusting")
    }
}

impl TlsUpgrade for Untrusting {
    fn upgrade(
        &self,
        _: Box<dyn Transport>,
        _: Option<&Endpoint>,
    ) -> io::Result<Box<dyn Transport>> {
        Err(io::Error::other("the certificate is somebody else's"))
    }
}

fn with_tls(tls: Arc<dyn TlsUpgrade>) -> ConnectOptions {
    ConnectOptions {
        tls: Some(tls),
        ..options(false, &[])
    }
}

#[test]
fn tls_is_started_before_anything_else_is_negotiated() {
    let tls = Arc::new(PassThrough::default());
    // The peer gives at most 1000 bytes at a time and the greeting is padded
    // to that, so that the rest does not arrive before TLS is up.
    let after = structured()
        .export(SIZE, 1)
        .reply(NBD_OPT_GO, NBD_REP_ACK, b"")
        .0;
    let first = say().reply(NBD_OPT_STARTTLS, NBD_REP_ACK, &vec![0; 1000 - 18 - 20]);
    let (connected, heard) = first.bytes(&after[18..]).connect(&with_tls(tls.clone()));
    connected.unwrap();
    assert_eq!(tls.upgrades.load(Ordering::Relaxed), 1);
    let heard = heard.lock().unwrap();
    assert_eq!(
        heard[4..16],
        *b"IHAVEOPT\0\0\0\x05",
        "STARTTLS is the first option"
    );
}

#[test]
fn bytes_sent_in_the_open_are_not_taken_for_protected_ones() {
    let injected = say().reply(NBD_OPT_STARTTLS, NBD_REP_ACK, b"").reply(
        NBD_OPT_STRUCTURED_REPLY,
        NBD_REP_ACK,
        b"",
    );
    let error = injected
        .connect(&with_tls(Arc::new(PassThrough::default())))
        .0
        .unwrap_err();
    assert!(
        matches!(error, NbdError::Protocol(Broken::BytesBeforeTls)),
        "{error:?}"
    );
}

#[test]
fn a_server_that_refuses_tls_is_not_spoken_to_in_the_open() {
    let refusing = say().reply(NBD_OPT_STARTTLS, NBD_REP_ERR_POLICY, b"no TLS here");
    let (connected, heard) = refusing.connect(&with_tls(Arc::new(PassThrough::default())));
    let error = connected.unwrap_err();
    assert!(matches!(&error, NbdError::TlsRefused { message } if message == "no TLS here"));
    assert_eq!(
        heard.lock().unwrap().len(),
        4 + 16,
        "flags and STARTTLS, no more"
    );
    let trusted = say().reply(NBD_OPT_STARTTLS, NBD_REP_ACK, b"");
    let error = trusted
        .connect(&with_tls(Arc::new(Untrusting)))
        .0
        .unwrap_err();
    assert!(matches!(error, NbdError::Tls { .. }), "{error:?}");
}
