//! The handshake: from a fresh stream to an opened export.
//!
//! ```text
//!  greeting > flags > [STARTTLS] > EXTENDED_HEADERS | STRUCTURED_REPLY
//!           > [SET_META_CONTEXT] > GO > transmission
//! ```
//!
//! Only fixed newstyle is spoken: oldstyle cannot name an export or say why
//! not. A server without `NBD_OPT_GO` is asked with `NBD_OPT_EXPORT_NAME`.

use crate::channel::Channel;
use crate::error::{NbdError, ProtocolError};
use crate::export::{BlockSizes, ExportInfo, ListedExport, MetaContext};
use crate::options::{CONTEXTS_MAX, ConnectOptions};
use crate::transport::Endpoint;
use crate::wire::{
    ExportReply, Greeting, HeaderStyle, InfoReply, MetaContextReply, NBD_FLAG_FIXED_NEWSTYLE,
    NBD_FLAG_NO_ZEROES, NBD_INFO_BLOCK_SIZE, NBD_INFO_DESCRIPTION, NBD_INFO_NAME, NBD_OPT_ABORT,
    NBD_OPT_EXPORT_NAME, NBD_OPT_EXTENDED_HEADERS, NBD_OPT_GO, NBD_OPT_LIST,
    NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT, NBD_OPT_STARTTLS,
    NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK, NBD_REP_ERR_BLOCK_SIZE_REQD,
    NBD_REP_ERR_EXT_HEADER_REQD, NBD_REP_ERR_INVALID, NBD_REP_ERR_PLATFORM, NBD_REP_ERR_POLICY,
    NBD_REP_ERR_SHUTDOWN, NBD_REP_ERR_TLS_REQD, NBD_REP_ERR_TOO_BIG, NBD_REP_ERR_UNKNOWN,
    NBD_REP_ERR_UNSUP, NBD_REP_FLAG_ERROR, NBD_REP_INFO, NBD_REP_META_CONTEXT, NBD_REP_SERVER,
    OptionReplyHeader, ServerReply, displayable, encode_client_flags, encode_go,
    encode_meta_context, encode_option,
};

/// Most replies to one option other than a list of exports.
const REPLIES_MAX: usize = 256;
/// Most exports in a list.
const EXPORTS_MAX: usize = 10_000;

/// Opens the export that `options` name.
pub(crate) fn open(
    channel: Channel,
    options: &ConnectOptions,
    endpoint: Option<&Endpoint>,
) -> Result<(Channel, ExportInfo), NbdError> {
    let mut haggling = Haggling::greet(channel, options, endpoint)?;
    match haggling.open(options) {
        Ok(export) => Ok((haggling.channel, export)),
        Err(error) => Err(haggling.abort(error)),
    }
}

/// Lists the server's exports.
pub(crate) fn list_exports(
    channel: Channel,
    options: &ConnectOptions,
    endpoint: Option<&Endpoint>,
) -> Result<Vec<ListedExport>, NbdError> {
    let mut haggling = Haggling::greet(channel, options, endpoint)?;
    let listed = haggling.list_exports();
    haggling.finish(listed)
}

/// Lists the metadata contexts of an export that match `options.meta_contexts`
/// (all of them if there are none).
pub(crate) fn list_contexts(
    channel: Channel,
    options: &ConnectOptions,
    endpoint: Option<&Endpoint>,
) -> Result<Vec<String>, NbdError> {
    let mut haggling = Haggling::greet(channel, options, endpoint)?;
    let listed = haggling.list_contexts(options);
    haggling.finish(listed)
}

/// An option by number and by name.
#[derive(Clone, Copy)]
struct Opt(u32, &'static str);

const GO: Opt = Opt(NBD_OPT_GO, "NBD_OPT_GO");
const EXPORT_NAME: Opt = Opt(NBD_OPT_EXPORT_NAME, "NBD_OPT_EXPORT_NAME");
const LIST: Opt = Opt(NBD_OPT_LIST, "NBD_OPT_LIST");
const STARTTLS: Opt = Opt(NBD_OPT_STARTTLS, "NBD_OPT_STARTTLS");
const STRUCTURED: Opt = Opt(NBD_OPT_STRUCTURED_REPLY, "NBD_OPT_STRUCTURED_REPLY");
const EXTENDED: Opt = Opt(NBD_OPT_EXTENDED_HEADERS, "NBD_OPT_EXTENDED_HEADERS");
const LIST_CONTEXT: Opt = Opt(NBD_OPT_LIST_META_CONTEXT, "NBD_OPT_LIST_META_CONTEXT");
const SET_CONTEXT: Opt = Opt(NBD_OPT_SET_META_CONTEXT, "NBD_OPT_SET_META_CONTEXT");

/// Takes each reply of an option but the last: its type and its data.
type EachReply<'a> = dyn FnMut(u32, &[u8]) -> Result<(), ProtocolError> + 'a;

/// How an option ended.
enum End {
    Ack,
    Error { reply: u32, message: String },
}

/// A refusal that stays one whatever the option was.
fn refusal(option: Opt, reply: u32, message: String) -> NbdError {
    let name = match reply {
        NBD_REP_ERR_TLS_REQD => return NbdError::TlsRequired { message },
        NBD_REP_ERR_UNSUP => "NBD_REP_ERR_UNSUP",
        NBD_REP_ERR_POLICY => "NBD_REP_ERR_POLICY",
        NBD_REP_ERR_INVALID => "NBD_REP_ERR_INVALID",
        NBD_REP_ERR_PLATFORM => "NBD_REP_ERR_PLATFORM",
        NBD_REP_ERR_UNKNOWN => "NBD_REP_ERR_UNKNOWN",
        NBD_REP_ERR_SHUTDOWN => "NBD_REP_ERR_SHUTDOWN",
        NBD_REP_ERR_BLOCK_SIZE_REQD => "NBD_REP_ERR_BLOCK_SIZE_REQD",
        NBD_REP_ERR_TOO_BIG => "NBD_REP_ERR_TOO_BIG",
        NBD_REP_ERR_EXT_HEADER_REQD => "NBD_REP_ERR_EXT_HEADER_REQD",
        _ => "an unknown error",
    };
    NbdError::Refused {
        option: option.1,
        reply: name,
        message,
    }
}

/// A stream between greeting and transmission.
struct Haggling {
    channel: Channel,
    server_flags: u16,
}

impl Haggling {
    /// Takes the greeting, answers it, and starts TLS if that is wanted.
    fn greet(
        mut channel: Channel,
        options: &ConnectOptions,
        endpoint: Option<&Endpoint>,
    ) -> Result<Self, NbdError> {
        channel.begin("negotiate with the NBD server", options.handshake_timeout);
        let server_flags = match channel.message(Greeting::decode)? {
            Greeting::Oldstyle => return Err(NbdError::Oldstyle { found: "oldstyle" }),
            Greeting::Newstyle { flags } if flags & NBD_FLAG_FIXED_NEWSTYLE == 0 => {
                return Err(NbdError::Oldstyle {
                    found: "unfixed newstyle",
                });
            }
            Greeting::Newstyle { flags } => flags,
        };
        let mut answer = Vec::with_capacity(4);
        encode_client_flags(server_flags, &mut answer);
        channel.send_all(&answer)?;
        let mut haggling = Self {
            channel,
            server_flags,
        };
        let Some(tls) = &options.tls else {
            return Ok(haggling);
        };
        // First of all options, so that nothing is agreed on in the open.
        match haggling.ask(STARTTLS, &[])? {
            End::Ack => {}
            End::Error { message, .. } => return Err(NbdError::TlsRefused { message }),
        }
        let channel = haggling.channel.upgrade(&**tls, endpoint)?;
        Ok(Self {
            channel,
            server_flags,
        })
    }

    fn open(&mut self, options: &ConnectOptions) -> Result<ExportInfo, NbdError> {
        let header_style = self.agree_on_headers(options.extended_headers)?;
        let contexts = match header_style {
            // Metadata needs structured replies; without them there is none.
            HeaderStyle::Simple => Vec::new(),
            HeaderStyle::Structured | HeaderStyle::Extended => self.select_contexts(options)?,
        };
        let mut export = ExportInfo {
            name: options.export.clone(),
            description: String::new(),
            size_bytes: 0,
            flags: 0,
            block_sizes: BlockSizes::DEFAULT,
            contexts,
            header_style,
        };
        self.go(options, &mut export)?;
        Ok(export)
    }

    /// Extended headers first, because they cannot be had after structured
    /// replies from every server; then structured replies; else simple ones.
    fn agree_on_headers(&mut self, extended: bool) -> Result<HeaderStyle, NbdError> {
        let wanted = [
            (EXTENDED, HeaderStyle::Extended),
            (STRUCTURED, HeaderStyle::Structured),
        ];
        for (option, style) in wanted.into_iter().skip(usize::from(!extended)) {
            match self.ask(option, &[])? {
                End::Ack => return Ok(style),
                End::Error {
                    reply: NBD_REP_ERR_TLS_REQD,
                    message,
                } => {
                    return Err(NbdError::TlsRequired { message });
                }
                End::Error { .. } => {}
            }
        }
        Ok(HeaderStyle::Simple)
    }

    fn select_contexts(&mut self, options: &ConnectOptions) -> Result<Vec<MetaContext>, NbdError> {
        if options.meta_contexts.is_empty() {
            return Ok(Vec::new());
        }
        let mut data = Vec::new();
        encode_meta_context(&options.export, &options.meta_contexts, &mut data);
        let mut contexts: Vec<MetaContext> = Vec::new();
        let end = self.ask_for_contexts(SET_CONTEXT, &data, &mut |reply| {
            let known = |known: &&MetaContext| known.id == reply.id || known.name == reply.name;
            if contexts.iter().find(known).is_some() {
                return Err(ProtocolError::ContextTwice(reply.id));
            }
            contexts.push(MetaContext {
                name: reply.name,
                id: reply.id,
            });
            Ok(())
        })?;
        match end {
            End::Ack => Ok(contexts),
            // An old server: whoever needs a context finds that it is absent.
            End::Error {
                reply: NBD_REP_ERR_UNSUP,
                ..
            } => Ok(Vec::new()),
            End::Error {
                reply: NBD_REP_ERR_UNKNOWN,
                message,
            } => Err(NbdError::NoSuchExport {
                export: options.export.clone(),
                message,
            }),
            End::Error { reply, message } => Err(refusal(SET_CONTEXT, reply, message)),
        }
    }

    fn go(&mut self, options: &ConnectOptions, export: &mut ExportInfo) -> Result<(), NbdError> {
        let wanted = [NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_BLOCK_SIZE];
        let mut data = Vec::new();
        encode_go(&options.export, &wanted, &mut data);
        let mut told = None;
        let end = self.haggle(GO, &data, REPLIES_MAX, &mut |reply, data| {
            if reply != NBD_REP_INFO {
                return Err(ProtocolError::UnexpectedReply {
                    option: NBD_OPT_GO,
                    reply,
                });
            }
            match InfoReply::decode(data)? {
                InfoReply::Export(found) => told = Some(found),
                InfoReply::Name(name) => export.name = name,
                InfoReply::Description(text) => export.description = text,
                InfoReply::BlockSize(minimum, preferred, maximum) => {
                    export.block_sizes = BlockSizes::checked(minimum, preferred, maximum)?;
                }
                InfoReply::Unknown(_) => {}
            }
            Ok(())
        })?;
        let told = match end {
            End::Ack => told.ok_or(ProtocolError::NoExportSize)?,
            End::Error {
                reply: NBD_REP_ERR_UNKNOWN,
                message,
            } => {
                return Err(NbdError::NoSuchExport {
                    export: options.export.clone(),
                    message,
                });
            }
            End::Error {
                reply: NBD_REP_ERR_UNSUP,
                ..
            } if export.header_style != HeaderStyle::Extended => {
                self.open_by_name(&options.export)?
            }
            End::Error { reply, message } => return Err(refusal(GO, reply, message)),
        };
        if told.size_bytes > i64::MAX.cast_unsigned() {
            return Err(ProtocolError::AbsurdSize(told.size_bytes).into());
        }
        export.size_bytes = told.size_bytes;
        export.flags = told.flags;
        Ok(())
    }

    /// For servers older than `NBD_OPT_GO`; they close the connection to say no.
    fn open_by_name(&mut self, export: &str) -> Result<ExportReply, NbdError> {
        self.say(EXPORT_NAME, export.as_bytes())?;
        let with_zeroes = self.server_flags & NBD_FLAG_NO_ZEROES == 0;
        let told = self
            .channel
            .message(|bytes| ExportReply::decode(bytes, with_zeroes));
        told.map_err(|error| match error {
            NbdError::HungUp { .. } => NbdError::NoSuchExport {
                export: export.to_owned(),
                message: String::new(),
            },
            other => other,
        })
    }

    fn list_exports(&mut self) -> Result<Vec<ListedExport>, NbdError> {
        let mut exports = Vec::new();
        let end = self.haggle(LIST, &[], EXPORTS_MAX, &mut |reply, data| {
            if reply != NBD_REP_SERVER {
                return Err(ProtocolError::UnexpectedReply {
                    option: NBD_OPT_LIST,
                    reply,
                });
            }
            let ServerReply { name, description } = ServerReply::decode(data)?;
            exports.push(ListedExport { name, description });
            Ok(())
        })?;
        match end {
            End::Ack => Ok(exports),
            End::Error { reply, message } => Err(refusal(LIST, reply, message)),
        }
    }

    fn list_contexts(&mut self, options: &ConnectOptions) -> Result<Vec<String>, NbdError> {
        self.agree_on_headers(options.extended_headers)?;
        let mut data = Vec::new();
        encode_meta_context(&options.export, &options.meta_contexts, &mut data);
        let mut names = Vec::new();
        let end = self.ask_for_contexts(LIST_CONTEXT, &data, &mut |reply| {
            names.push(reply.name);
            Ok(())
        })?;
        match end {
            End::Ack => Ok(names),
            End::Error {
                reply: NBD_REP_ERR_UNKNOWN,
                message,
            } => Err(NbdError::NoSuchExport {
                export: options.export.clone(),
                message,
            }),
            End::Error { reply, message } => Err(refusal(LIST_CONTEXT, reply, message)),
        }
    }

    fn ask_for_contexts(
        &mut self,
        option: Opt,
        data: &[u8],
        each: &mut dyn FnMut(MetaContextReply) -> Result<(), ProtocolError>,
    ) -> Result<End, NbdError> {
        let most = if option.0 == NBD_OPT_SET_META_CONTEXT {
            CONTEXTS_MAX
        } else {
            REPLIES_MAX
        };
        self.haggle(option, data, most, &mut |reply, data| {
            if reply != NBD_REP_META_CONTEXT {
                return Err(ProtocolError::UnexpectedReply {
                    option: option.0,
                    reply,
                });
            }
            each(MetaContextReply::decode(data)?)
        })
    }

    /// Sends an option whose only good answer is an acknowledgement.
    fn ask(&mut self, option: Opt, data: &[u8]) -> Result<End, NbdError> {
        self.haggle(option, data, 0, &mut |reply, _| {
            Err(ProtocolError::UnexpectedReply {
                option: option.0,
                reply,
            })
        })
    }

    /// Sends an option and gives each reply before the last to `each`.
    fn haggle(
        &mut self,
        option: Opt,
        data: &[u8],
        most: usize,
        each: &mut EachReply<'_>,
    ) -> Result<End, NbdError> {
        self.say(option, data)?;
        for _ in 0..=most {
            let header = self.channel.message(OptionReplyHeader::decode)?;
            if header.option != option.0 {
                let (asked, found) = (option.0, header.option);
                return Err(ProtocolError::WrongOption { asked, found }.into());
            }
            if header.reply & NBD_REP_FLAG_ERROR != 0 {
                let message = self
                    .channel
                    .payload(header.len, |data| Ok(displayable(data)))?;
                return Ok(End::Error {
                    reply: header.reply,
                    message,
                });
            }
            if header.reply == NBD_REP_ACK {
                // The protocol gives it no data; some would be harmless, so it is skipped.
                self.channel.payload(header.len, |_| Ok(()))?;
                return Ok(End::Ack);
            }
            self.channel
                .payload(header.len, |data| each(header.reply, data))?;
        }
        let (len, limit) = (most.saturating_add(1) as u64, most as u64);
        Err(ProtocolError::TooLarge {
            what: "the number of replies to an option",
            len,
            limit,
        }
        .into())
    }

    fn say(&mut self, option: Opt, data: &[u8]) -> Result<(), NbdError> {
        let mut message = Vec::with_capacity(data.len().saturating_add(16));
        encode_option(option.0, data, &mut message);
        self.channel.send_all(&message)
    }

    /// Ends a handshake that asked what it wanted to know.
    fn finish<T>(mut self, answer: Result<T, NbdError>) -> Result<T, NbdError> {
        // Best effort: the answer is here, and a server that does not take the
        // goodbye sees the socket close.
        drop(self.say(Opt(NBD_OPT_ABORT, "NBD_OPT_ABORT"), &[]));
        answer
    }

    /// Says goodbye after a refusal, where both sides still understand each other.
    fn abort(self, error: NbdError) -> NbdError {
        let understood = matches!(
            error,
            NbdError::Refused { .. } | NbdError::NoSuchExport { .. } | NbdError::TlsRequired { .. }
        );
        if understood {
            return self
                .finish::<()>(Err(error))
                .err()
                .unwrap_or(NbdError::Broken);
        }
        error
    }
}
