//! What fuzzers found, replayed by plain tests.

use std::panic::{RefUnwindSafe, catch_unwind};
use std::path::Path;

/// Gives each file of a corpus to `entry`, which must not panic.
///
/// # Panics
/// If it does, naming the file; if the corpus cannot be read; if it has fewer
/// than 20 files, for then it is not the corpus.
pub fn replay(corpus: &Path, entry: impl Fn(&[u8]) + RefUnwindSafe) {
    let files = corpus
        .read_dir()
        .unwrap_or_else(|error| panic!("{}: {error}", corpus.display()));
    let mut count = 0;
    for file in files {
        let path = file.expect("a directory can be listed").path();
        let bytes = std::fs::read(&path).expect("a file of the corpus can be read");
        assert!(
            catch_unwind(|| entry(&bytes)).is_ok(),
            "{} fails",
            path.display()
        );
        count += 1;
    }
    assert!(count >= 20, "{} has only {count} files", corpus.display());
}
