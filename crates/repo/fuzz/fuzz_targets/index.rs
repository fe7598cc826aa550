//! Any bytes as an index file.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| highwater_repo::fuzzing::index(bytes));
