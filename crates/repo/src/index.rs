//! The index: which object lies where in which pack.

mod cache;
mod file;
mod format;
mod merge;
mod set;

pub(crate) use file::pack_key;
pub(crate) use format::{
    BLOCK_LEN, HEADER_LEN, Header, IndexPack, IndexRow, decode_block, encode, prefix_of,
    prove_block, rows_in_block,
};
pub(crate) use set::{IndexSet, Place, need_repository};
