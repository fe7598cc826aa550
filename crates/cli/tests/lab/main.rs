//! The program against real libvirt and QEMU; one private libvirtd per test.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    reason = "a test may stop at the first surprise"
)]

mod correctness;
mod disks;
mod healing;
mod interruption;
mod levels;
mod matrix;
mod matrix_changes;
mod matrix_history;
mod matrix_shapes;
mod matrix_sources;
mod restore;
mod saved;
mod scale;
mod stress;
mod support;
mod vms;
