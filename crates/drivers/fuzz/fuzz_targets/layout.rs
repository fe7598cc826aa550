//! Any bytes as what QEMU says about a guest's disks.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| highwater_drivers::qmp::fuzzing::layout(bytes));
