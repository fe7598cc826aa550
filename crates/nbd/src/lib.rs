//! The NBD protocol: wire format, negotiation, pipelined client.
//!
//! QEMU hands out the content of disks and their dirty bitmaps over the
//! [Network Block Device protocol]; this crate is Highwater's own client for
//! it. Threads, no async: one [`Connection`] per socket, used by one thread at
//! a time, with several requests in flight.
//!
//! ```text
//!   Endpoint --connect--> Transport --negotiate--> Connection
//!                            |  ^                    | submit_*      next_completion
//!                   TlsUpgrade (seam)                v                    ^
//!                                                 request ... chunk chunk chunk
//! ```
//!
//! What a caller may rely on:
//!
//! * A read is complete only if chunks covered each of its bytes exactly once.
//!   Holes are filled with zeroes here, whatever the buffer held before.
//! * The server's errors are per request ([`RequestError`]) and leave the
//!   connection usable; anything the protocol forbids ([`ProtocolError`])
//!   ends the connection.
//! * The coverage of each metadata context is tracked on its own: a reply may
//!   stop early for one context and not for another.
//! * Nothing waits for ever: connecting, the whole handshake and each wait for
//!   a completion have a total deadline that a dripping peer cannot stretch.
//! * Memory is bounded by the buffers the caller submits, one fixed input
//!   buffer, and a fixed number of extents; a length from the peer is checked
//!   before anything is allocated for it.
//!
//! ```no_run
//! use highwater_model::ByteRange;
//! use highwater_nbd::{ConnectOptions, Connection, Endpoint, NbdError};
//!
//! # fn main() -> Result<(), NbdError> {
//! let dirty = "qemu:dirty-bitmap:mark";
//! let options = ConnectOptions {
//!     meta_contexts: vec![dirty.to_owned()],
//!     ..ConnectOptions::for_export("vda")
//! };
//! let endpoint = Endpoint::Unix("/run/session/nbd.sock".into());
//! let mut connection = Connection::connect(&endpoint, &options)?;
//! if let Some(whole) = ByteRange::new(0, connection.export().size_bytes) {
//!     let mut dirty_bytes = 0;
//!     connection.map(dirty, whole, &mut |range, flags| {
//!         dirty_bytes += if flags & 1 == 0 { 0 } else { range.len() };
//!         Ok::<(), NbdError>(())
//!     })?;
//! }
//! let mut boot_sector = [0; 512];
//! connection.read_at(0, &mut boot_sector)?;
//! connection.disconnect()
//! # }
//! ```
//!
//! Section names in the documentation are those of the protocol's `proto.md`;
//! extended headers are its `extension-ext-header` branch.
//!
//! [Network Block Device protocol]: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md

#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

mod channel;
mod client;
mod error;
mod export;
#[doc(hidden)]
pub mod fuzzing;
mod negotiate;
mod options;
mod transport;
pub mod wire;

pub use client::{
    Completion, Connection, ContextExtents, Extent, Fragments, Holes, list_exports,
    list_meta_contexts,
};
pub use error::{Errno, NbdError, ProtocolError, RequestError, UsageError};
pub use export::{BlockSizes, ExportInfo, ListedExport, MetaContext};
pub use options::ConnectOptions;
pub use transport::{Canceller, Endpoint, Sent, TlsUpgrade, Transport};
