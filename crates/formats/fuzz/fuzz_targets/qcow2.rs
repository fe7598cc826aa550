//! Any bytes as a qcow2 image.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| highwater_formats::fuzzing::qcow2(bytes));
