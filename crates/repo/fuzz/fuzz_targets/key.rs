//! Any bytes as a configuration or a key object.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| highwater_repo::fuzzing::key(bytes));
