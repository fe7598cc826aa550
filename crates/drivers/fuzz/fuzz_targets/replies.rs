//! Any bytes as what QEMU says.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| highwater_drivers::libvirt::fuzzing::replies(bytes));
