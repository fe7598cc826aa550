//! Drivers: what talks to the things that run VMs.
//!
//! Each driver implements [`highwater_hypervisor::Driver`] and decides nothing.

#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

mod blocks;
mod directories;
mod fence;
mod host;
mod label;
pub mod libvirt;
mod names;
pub mod offline;
pub mod qmp;
mod scratch_image;
mod sys;
pub mod uri;
