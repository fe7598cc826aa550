//! A whole repository, changed anywhere.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| highwater_repo::fuzzing::repository(bytes));
