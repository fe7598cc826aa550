//! Any bytes as the manifest that the next backup builds on.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| highwater_engine::fuzzing::manifest(bytes));
