//! What the fuzzers found is replayed with each test run.
#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something is not as it must be"
)]

use std::path::Path;

use highwater_drivers::libvirt::fuzzing;

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
fn what_libvirt_says_survives_what_the_fuzzer_found() {
    replay("xml", fuzzing::xml);
}

#[test]
fn what_qemu_says_survives_what_the_fuzzer_found() {
    replay("replies", fuzzing::replies);
}
