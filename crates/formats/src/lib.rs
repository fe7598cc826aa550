//! Image formats, in and out.
//!
//! Out: a qcow2 image written once, whole, with every cluster's place known
//! beforehand ([`Qcow2Layout`]), so that a restore can write its data in any
//! order and from several threads. In: what a qcow2 image says about itself
//! ([`Qcow2Reader`]).

mod chunk_set;
#[doc(hidden)]
pub mod fuzzing;
mod qcow2;
mod qcow2_reader;

pub use chunk_set::{ChunkSet, ChunkSetBuilder};
pub use qcow2::Qcow2Layout;
pub use qcow2_reader::{
    BitmapState, DataFile, ImageEncryption, Qcow2Error, Qcow2Header, Qcow2Reader, ReadAt,
    StoredBitmap,
};
