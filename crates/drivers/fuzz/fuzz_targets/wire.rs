//! Any bytes as what a monitor says.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| highwater_drivers::qmp::fuzzing::wire(bytes));
