//! What the fuzzers found is replayed with each test run.
#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it must be"
)]

use std::path::Path;

use highwater_repo::fuzzing;

/// Replays each file of a corpus; there must be some.
fn replay(target: &str, entry: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let mut files = 0;
    for file in corpus.read_dir().unwrap() {
        let path = file.unwrap().path();
        let outcome = std::panic::catch_unwind(|| entry(&std::fs::read(&path).unwrap()));
        assert!(outcome.is_ok(), "{} fails", path.display());
        files += 1;
    }
    assert!(files >= 20, "the corpus `{target}` has only {files} files");
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
