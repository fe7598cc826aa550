//! What the fuzzers found is replayed with each test run.

use std::path::Path;

fn replay(target: &str, entry: fn(&[u8])) {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    highwater_testkit::replay(&corpora.join(target), entry);
}

#[test]
fn the_decoders_survive_what_the_fuzzer_found() {
    replay("wire", highwater_nbd::fuzzing::wire);
}

#[test]
fn a_whole_client_survives_what_the_fuzzer_found() {
    replay("client", highwater_nbd::fuzzing::client);
}
