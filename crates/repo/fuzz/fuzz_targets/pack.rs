//! Any bytes as a pack.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| highwater_repo::fuzzing::pack(bytes));
