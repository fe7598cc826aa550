//! The words of Highwater: ids, ranges, extent maps, image geometry, time.
//!
//! Nothing here does input or output. A word means the same thing in code, in
//! messages and in the documents; `DESIGN` fixes them, this crate defines them:
//!
//! * *restore point*: what a user restores, named by a [`PointId`];
//! * *mark*: our named bitmap/checkpoint pair of one backup, see [`MarkName`];
//! * *chunk*: a fixed-size piece of a disk image, named by its [`ObjectId`];
//! * *root*: the hash that proves one whole disk image, see [`RootHash`].

mod clock;
mod extents;
mod hex;
mod ids;
mod range;
mod size;
pub mod step;

pub use clock::{Clock, FixedClock, SystemClock, Timestamp};
pub use extents::{ExtentMap, OutOfOrder};
pub use ids::{ClaimId, IdError, MarkName, Nonce, ObjectId, PointId, RepoId, RootHash, SessionId};
pub use range::ByteRange;
/// The format under which the raw data file of a qcow2 image is reported: it
/// stands in a chain right behind its image.
pub const DATA_FILE_FORMAT: &str = "data-file";

pub use size::{ChunkSize, ChunkSizeError, format_size, parse_size};
