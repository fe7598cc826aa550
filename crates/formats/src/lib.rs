//! Image formats, in and out.
//!
//! So far one: a qcow2 image written once, whole, with every cluster's place
//! known beforehand ([`Qcow2Layout`]), so that a restore can write its data in
//! any order and from several threads.

mod chunk_set;
mod qcow2;

pub use chunk_set::{ChunkSet, ChunkSetBuilder};
pub use qcow2::Qcow2Layout;
