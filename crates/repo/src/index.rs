//! The index: which object lies where in which pack.

mod cache;
mod file;
mod format;
mod merge;
mod set;

pub(crate) use format::{IndexPack, IndexRow, encode};
pub(crate) use set::{IndexSet, Place};
