//! A whole client against a peer that may say anything.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| highwater_nbd::fuzzing::client(bytes));
