//! The program against real libvirt and QEMU; one private libvirtd per test.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    dead_code,
    reason = "a test may stop at the first surprise"
)]

mod correctness;
mod disks;
#[path = "../golden/mod.rs"]
mod golden;
mod healing;
mod interruption;
mod levels;
mod output;
mod people;
mod restore;
mod saved;
mod shells;
mod stress;
mod support;
mod vms;
