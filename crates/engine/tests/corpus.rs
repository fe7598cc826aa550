//! What the fuzzers found is replayed with each test run.

use std::path::Path;

use highwater_engine::fuzzing;

fn replay(target: &str, entry: fn(&[u8])) {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    highwater_testkit::replay(&corpora.join(target), entry);
}

#[test]
fn a_plan_built_on_any_manifest_reads_only_what_is_proven() {
    replay("manifest", fuzzing::manifest);
}
