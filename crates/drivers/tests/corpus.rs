//! What the fuzzers found is replayed with each test run.

use std::path::Path;

use highwater_drivers::libvirt::fuzzing;
use highwater_drivers::qmp;

fn replay(target: &str, entry: fn(&[u8])) {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    highwater_testkit::replay(&corpora.join(target), entry);
}

#[test]
fn what_libvirt_says_survives_what_the_fuzzer_found() {
    replay("xml", fuzzing::xml);
}

#[test]
fn what_qemu_says_survives_what_the_fuzzer_found() {
    replay("replies", fuzzing::replies);
}

#[test]
fn what_a_monitor_says_survives_what_the_fuzzer_found() {
    replay("wire", qmp::fuzzing::wire);
}

#[test]
fn what_qemu_says_of_disks_survives_what_the_fuzzer_found() {
    replay("layout", qmp::fuzzing::layout);
}
