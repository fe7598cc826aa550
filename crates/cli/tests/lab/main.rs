//! The program against real libvirt and QEMU; one private libvirtd per test.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    clippy::print_stderr,
    dead_code,
    reason = "a test may stop at the first surprise"
)]

mod audit;
mod bad_input;
mod bad_input_names;
mod bad_input_nbd;
mod bad_input_places;
mod bad_input_space;
mod bare;
mod bare_crash;
mod bare_life;
mod bare_rows;
mod correctness;
mod crash;
mod disks;
mod doctor;
mod doctor_foreign;
#[path = "../golden/mod.rs"]
mod golden;
mod groups;
mod healing;
mod hosts;
mod hung;
mod hung_mount;
mod inactive;
mod interruption;
mod late;
mod latency;
mod levels;
mod life;
mod losses;
mod matrix;
mod matrix_changes;
mod matrix_history;
mod matrix_shapes;
mod matrix_sources;
mod off;
mod output;
mod people;
mod processes;
mod readme;
mod restore;
mod rows;
mod saved;
mod scale;
mod scene;
mod shells;
mod slapos;
mod slow_disk;
mod stress;
mod support;
mod tale;
mod verify;
mod vms;
mod waiting;
