//! Any bytes at all against each decoder.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| highwater_nbd::fuzzing::wire(bytes));
