//! The repository: chunks, packs, index, trees, manifests, and the commit.
//!
//! ```text
//! Repository::writer -> Lane::add            chunks  -> packs
//!                       TreeBuilder::set     pages   -> packs
//!                       Writer::flush        packs durable, then the index
//!                       Flushed::commit      the manifest: the restore point
//! Repository::points -> Repository::image -> ImageReader::chunks -> Repository::fetch
//! ```
//!
//! The bytes are described in docs/format.md, the order of writes and why it is
//! safe in docs/ordering.md. Everything read from a store is hostile: lengths
//! and counts are checked before anything is allocated for them.

#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

mod claims;
mod compress;
mod config;
mod container;
mod error;
mod fetch;
#[doc(hidden)]
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod hash;
mod image;
mod index;
mod manifest;
mod objects;
mod pack;
mod page;
mod points;
mod repository;
mod seal;
mod secret;
mod stats;
mod verify;
mod wire;
mod writer;

pub use compress::Compression;
pub use error::{RepoError, RepoErrorKind};
pub use fetch::Sink;
pub use image::{Chunks, ImageReader};
pub use manifest::{
    DiskRecord, Evidence, EvidenceLink, ImageRoot, Manifest, MarkRecord, Origin, SavedFile,
    SkippedRecord, VmIdentity,
};
pub use points::{DamagedPoint, PointList};
pub use repository::{DamagedIndex, InitOptions, Repository};
pub use secret::{Secret, SecretKind};
pub use stats::{KindStorage, Storage};
pub use verify::{
    Checked, Damage, DamagedObject, HurtFile, HurtImage, HurtPoint, Progress, VerifyDepth,
    VerifyError, VerifyOptions, VerifyPhase, VerifyReport,
};
pub use writer::{Added, Flushed, Lane, TreeBuilder, Writer, WriterOptions, WriterStats};
