//! What the fuzzers found is replayed with each test run.

use std::path::Path;

use highwater_repo::fuzzing;

fn replay(target: &str, entry: fn(&[u8])) {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    highwater_testkit::replay(&corpora.join(target), entry);
}

#[test]
fn packs_survive_what_the_fuzzer_found() {
    replay("pack", fuzzing::pack);
}

#[test]
fn index_files_survive_what_the_fuzzer_found() {
    replay("index", fuzzing::index);
}

#[test]
fn configurations_and_keys_survive_what_the_fuzzer_found() {
    replay("key", fuzzing::key);
}

#[test]
fn a_repository_changed_anywhere_gives_no_wrong_byte() {
    replay("repository", fuzzing::repository);
}
