//! One connection: requests go out, completions come back, in any order.
//!
//! ```text
//!  submit_* --> pending --chunk, chunk, last chunk--> ready --> next_completion
//!                  `-- protocol error, timeout, hang-up: broken, for good
//! ```

mod assembly;
mod blocking;
mod completion;
mod limits;
mod pending;
mod receive;

use std::collections::VecDeque;
use std::time::Duration;

use highwater_model::ByteRange;

use crate::channel::Channel;
use crate::error::{NbdError, UsageError};
use crate::export::{ExportInfo, ListedExport};
use crate::negotiate;
use crate::options::ConnectOptions;
use crate::transport::{Canceller, Endpoint, Sent, Socket, Transport};
use crate::wire::{
    Command, HeaderStyle, NBD_CMD_FLAG_DF, NBD_CMD_FLAG_NO_HOLE, NBD_CMD_FLAG_PAYLOAD_LEN, Request,
};
use assembly::Assembly;
pub use completion::{Completion, ContextExtents, Extent, Fragments, Holes};
use pending::{Pending, Status, Straggler, Work};

/// Which metadata contexts are asked.
#[derive(Clone, Copy)]
enum Contexts {
    All,
    One(u32),
}

/// A connection to one export of an NBD server.
///
/// Used by one thread at a time. [`Connection::canceller`] ends it from another.
pub struct Connection {
    channel: Channel,
    export: ExportInfo,
    reply_timeout: Duration,
    in_flight_max: usize,
    next_handle: u64,
    pending: Vec<Pending>,
    ready: VecDeque<(u64, Completion)>,
    /// Extents held in unfinished and unclaimed block status replies.
    extents_held: usize,
    stragglers: VecDeque<Straggler>,
    header: Vec<u8>,
    broken: bool,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("export", &self.export)
            .field("in_flight", &self.in_flight())
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}

/// Opens the socket; the handshake follows.
fn dial(endpoint: &Endpoint, options: &ConnectOptions) -> Result<Channel, NbdError> {
    options.check()?;
    match Socket::connect(endpoint, options.connect_timeout) {
        Ok(socket) => {
            let canceller = socket.canceller();
            Ok(Channel::new(Box::new(socket), canceller))
        }
        Err(source) => Err(NbdError::Connect {
            endpoint: endpoint.to_string(),
            source,
        }),
    }
}

/// Lists the exports of a server, for people; servers may hide some.
pub fn list_exports(
    endpoint: &Endpoint,
    options: &ConnectOptions,
) -> Result<Vec<ListedExport>, NbdError> {
    negotiate::list_exports(dial(endpoint, options)?, options, Some(endpoint))
}

/// Lists the metadata contexts of the export `options.export` that match the
/// queries `options.meta_contexts`, or all if there are none. A query may end
/// after its colon: `qemu:dirty-bitmap:` lists every exported bitmap.
pub fn list_meta_contexts(
    endpoint: &Endpoint,
    options: &ConnectOptions,
) -> Result<Vec<String>, NbdError> {
    negotiate::list_contexts(dial(endpoint, options)?, options, Some(endpoint))
}

impl Connection {
    /// Connects and opens the export that `options` name.
    pub fn connect(endpoint: &Endpoint, options: &ConnectOptions) -> Result<Self, NbdError> {
        let channel = dial(endpoint, options)?;
        Self::negotiated(channel, options, Some(endpoint))
    }

    /// Opens the export over a stream that somebody else made.
    ///
    /// [`Connection::canceller`] then only marks the connection; what waits in
    /// the stream is the stream's own affair.
    pub fn over(stream: Box<dyn Transport>, options: &ConnectOptions) -> Result<Self, NbdError> {
        options.check()?;
        Self::negotiated(Channel::new(stream, Canceller::default()), options, None)
    }

    fn negotiated(
        channel: Channel,
        options: &ConnectOptions,
        endpoint: Option<&Endpoint>,
    ) -> Result<Self, NbdError> {
        let (channel, export) = negotiate::open(channel, options, endpoint)?;
        Ok(Self {
            channel,
            export,
            reply_timeout: options.reply_timeout,
            in_flight_max: options.in_flight_max.max(1),
            next_handle: 1,
            pending: Vec::new(),
            ready: VecDeque::new(),
            extents_held: 0,
            stragglers: VecDeque::new(),
            header: Vec::with_capacity(128),
            broken: false,
        })
    }

    /// Returns what the server told about the export.
    pub const fn export(&self) -> &ExportInfo {
        &self.export
    }

    /// Returns a handle that ends this connection from another thread.
    pub fn canceller(&self) -> Canceller {
        self.channel.canceller()
    }

    /// Returns how many requests await [`Connection::next_completion`].
    pub fn in_flight(&self) -> usize {
        self.pending.len().saturating_add(self.ready.len())
    }

    /// Returns how many requests may be in flight.
    pub const fn capacity(&self) -> usize {
        self.in_flight_max
    }

    /// Returns whether an earlier error ended the connection.
    pub const fn is_broken(&self) -> bool {
        self.broken
    }

    /// Asks for the bytes of `range`, to be put into `buffer`, whose length
    /// and content do not matter (its capacity saves an allocation).
    pub fn submit_read(
        &mut self,
        cookie: u64,
        range: ByteRange,
        buffer: Vec<u8>,
    ) -> Result<(), NbdError> {
        self.submit_read_with(cookie, range, buffer, Fragments::Allowed)
    }

    /// Asks for the bytes of `range`, choosing whether the reply may be split.
    pub fn submit_read_with(
        &mut self,
        cookie: u64,
        range: ByteRange,
        mut buffer: Vec<u8>,
        fragments: Fragments,
    ) -> Result<(), NbdError> {
        let len = self.check_payload(range)?;
        let flags = match fragments {
            Fragments::Allowed => 0,
            Fragments::Forbidden if self.export.can_df() => NBD_CMD_FLAG_DF,
            Fragments::Forbidden => {
                return Err(UsageError::NotOffered("unfragmented reads").into());
            }
        };
        self.check_room()?;
        buffer.resize(len, 0);
        let work = Work::Read {
            buffer,
            assembly: Assembly::new(range, fragments),
        };
        self.submit(cookie, Command::Read, flags, range, work, Vec::new())
    }

    /// Asks what each negotiated metadata context says about `range`.
    pub fn submit_block_status(&mut self, cookie: u64, range: ByteRange) -> Result<(), NbdError> {
        if self.export.contexts.is_empty() {
            return Err(UsageError::NoContexts.into());
        }
        self.submit_status(cookie, range, Contexts::All)
    }

    /// Asks for all contexts, or for one where the server lets us choose. What
    /// the others say for want of a choice is checked and not kept.
    fn submit_status(
        &mut self,
        cookie: u64,
        range: ByteRange,
        wanted: Contexts,
    ) -> Result<(), NbdError> {
        self.check_range(range, self.longest_effect())?;
        self.check_room()?;
        let all: Vec<u32> = self
            .export
            .contexts
            .iter()
            .map(|context| context.id)
            .collect();
        let mut payload = Vec::new();
        let mut flags = 0;
        let status = match wanted {
            Contexts::All => Status::asking(all.clone(), all),
            Contexts::One(id) if self.export.can_choose_contexts() => {
                flags = NBD_CMD_FLAG_PAYLOAD_LEN;
                payload.extend_from_slice(&range.len().to_be_bytes());
                payload.extend_from_slice(&id.to_be_bytes());
                Status::asking(vec![id], vec![id])
            }
            Contexts::One(id) => Status::asking(all, vec![id]),
        };
        let work = Work::Status(status);
        self.submit(cookie, Command::BlockStatus, flags, range, work, payload)
    }

    /// Writes `buffer` to `range`; it comes back with the completion.
    pub fn submit_write(
        &mut self,
        cookie: u64,
        range: ByteRange,
        buffer: Vec<u8>,
    ) -> Result<(), NbdError> {
        self.check_writable()?;
        let len = self.check_payload(range)?;
        if buffer.len() != len {
            let (buffer, range) = (buffer.len(), range.len());
            return Err(UsageError::WrongLength { buffer, range }.into());
        }
        self.check_room()?;
        let flags = match self.export.header_style {
            HeaderStyle::Extended => NBD_CMD_FLAG_PAYLOAD_LEN,
            HeaderStyle::Simple | HeaderStyle::Structured => 0,
        };
        let work = Work::Write { buffer: Vec::new() };
        self.submit(cookie, Command::Write, flags, range, work, buffer)
    }

    /// Writes zeroes to `range`, which may be longer than a read.
    pub fn submit_write_zeroes(
        &mut self,
        cookie: u64,
        range: ByteRange,
        holes: Holes,
    ) -> Result<(), NbdError> {
        self.check_writable()?;
        if !self.export.can_write_zeroes() {
            return Err(UsageError::NotOffered("writing zeroes").into());
        }
        let flags = match holes {
            Holes::Allowed => 0,
            Holes::Forbidden => NBD_CMD_FLAG_NO_HOLE,
        };
        self.check_range(range, self.longest_effect())?;
        self.check_room()?;
        self.submit(
            cookie,
            Command::WriteZeroes,
            flags,
            range,
            Work::Effect,
            Vec::new(),
        )
    }

    /// Tells the server that nobody needs the content of `range` any more.
    pub fn submit_trim(&mut self, cookie: u64, range: ByteRange) -> Result<(), NbdError> {
        self.check_writable()?;
        if !self.export.can_trim() {
            return Err(UsageError::NotOffered("trimming").into());
        }
        self.check_range(range, self.longest_effect())?;
        self.check_room()?;
        self.submit(cookie, Command::Trim, 0, range, Work::Effect, Vec::new())
    }

    /// Makes all writes completed so far durable. Its completion's range is empty.
    pub fn submit_flush(&mut self, cookie: u64) -> Result<(), NbdError> {
        if !self.export.can_flush() {
            return Err(UsageError::NotOffered("flushing").into());
        }
        self.check_room()?;
        let nowhere = ByteRange::new(0, 0).ok_or(UsageError::Empty)?;
        self.submit(cookie, Command::Flush, 0, nowhere, Work::Effect, Vec::new())
    }

    /// Waits for the next request to be done, in whatever order the server chose.
    ///
    /// An `Err` ends the connection, except [`UsageError::NothingInFlight`].
    /// The requests still in flight are then lost: see [`Connection::unanswered`].
    pub fn next_completion(&mut self) -> Result<Completion, NbdError> {
        if self.ready.is_empty() {
            self.check_alive()?;
            if self.pending.is_empty() {
                return Err(UsageError::NothingInFlight.into());
            }
            self.channel
                .begin("wait for a reply of the NBD server", self.reply_timeout);
            while self.ready.is_empty() {
                self.receive()?;
            }
        }
        self.ready
            .pop_front()
            .map(|(_, done)| self.hand_over(done))
            .ok_or(NbdError::Broken)
    }

    /// Returns cookie and range of each request without an answer; after an
    /// error, what to ask again on another connection.
    pub fn unanswered(&self) -> impl Iterator<Item = (u64, ByteRange)> + '_ {
        self.pending
            .iter()
            .map(|pending| (pending.cookie, pending.range))
    }

    /// Says goodbye. Requests in flight are given up; flush before.
    pub fn disconnect(mut self) -> Result<(), NbdError> {
        self.check_alive()?;
        let goodbye = Request {
            flags: 0,
            command: Command::Disconnect,
            cookie: 0,
            offset: 0,
            len: 0,
        };
        let mut header = Vec::new();
        goodbye
            .encode(self.export.header_style, &mut header)
            .ok_or(NbdError::Broken)?;
        self.channel
            .begin("disconnect from the NBD server", self.reply_timeout);
        self.channel.send_all(&header)
    }

    /// Sends a request and remembers it.
    fn submit(
        &mut self,
        cookie: u64,
        command: Command,
        flags: u16,
        range: ByteRange,
        work: Work,
        payload: Vec<u8>,
    ) -> Result<(), NbdError> {
        self.check_alive()?;
        let handle = self.next_handle;
        self.next_handle = handle.wrapping_add(1);
        let len = if flags & NBD_CMD_FLAG_PAYLOAD_LEN == 0 {
            range.len()
        } else {
            payload.len() as u64
        };
        let request = Request {
            flags,
            command,
            cookie: handle,
            offset: range.start(),
            len,
        };
        let mut header = std::mem::take(&mut self.header);
        header.clear();
        if request
            .encode(self.export.header_style, &mut header)
            .is_none()
        {
            return Err(UsageError::TooLong {
                len,
                max: u64::from(u32::MAX),
            }
            .into());
        }
        // Remembered before it is sent: its reply may arrive while the payload
        // of a write is still going out.
        self.pending.push(Pending {
            handle,
            cookie,
            range,
            work,
            error: None,
        });
        self.channel
            .begin("send a request to the NBD server", self.reply_timeout);
        self.send(&header)?;
        self.send(&payload)?;
        self.header = header;
        self.keep_written(handle, payload);
        Ok(())
    }

    /// Sends all of `bytes`, taking replies in when the server insists.
    fn send(&mut self, mut bytes: &[u8]) -> Result<(), NbdError> {
        while !bytes.is_empty() {
            match self.channel.send(bytes) {
                Ok(Sent::Bytes(sent)) => bytes = bytes.get(sent..).unwrap_or_default(),
                Ok(Sent::ReplyWaiting) => self.receive()?,
                Err(error) => {
                    self.broken = true;
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Keeps a write's buffer until it is done, to give it back.
    fn keep_written(&mut self, handle: u64, payload: Vec<u8>) {
        let pending = self
            .pending
            .iter_mut()
            .find(|pending| pending.handle == handle);
        if let Some(Pending {
            work: Work::Write { buffer },
            ..
        }) = pending
        {
            *buffer = payload;
            return;
        }
        // A server may refuse a write before it has seen all of it.
        if let Some((_, done)) = self.ready.iter_mut().find(|(ready, _)| *ready == handle) {
            let spare = match &mut done.result {
                Ok(buffer) => buffer,
                Err(_) => &mut done.spare,
            };
            *spare = payload;
        }
    }

    fn hand_over(&mut self, done: Completion) -> Completion {
        let held: usize = done
            .extents
            .iter()
            .map(|context| context.extents.len())
            .sum();
        self.extents_held = self.extents_held.saturating_sub(held);
        done
    }
}
