//! Any bytes as what libvirt says.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| highwater_drivers::libvirt::fuzzing::xml(bytes));
