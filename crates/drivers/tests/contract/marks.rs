//! Marks: what they record, how long they live, and how they go.

use highwater_hypervisor::{ErrorKind, MarkOrder};
use highwater_testkit::{MIB, Workload};

use crate::bench::Bench;
use crate::reading::{dirty_ranges, disk_facts};
use crate::stage::{Stage, new_mark};

pub(crate) fn a_mark_records_from_the_point_on<B: Bench>() {
    let mut stage = Stage::<B>::start(2);
    stage.write("vda", "write -P 1 0 4M");
    stage.copies("first", &["vda", "vdb"]);
    let first = stage.order(&[("vda", None), ("vdb", None)]);
    stage.driver.begin(&first).unwrap();
    if B::RUNS {
        stage.write("vda", "write -P 2 5M 64k");
    }
    stage.end(&first);
    stage.write("vda", "write -z 1M 64k");
    stage.write("vda", "discard 2M 64k");
    let mark = new_mark(&first);
    let second = stage.order(&[("vda", Some(&mark)), ("vdb", Some(&mark))]);
    stage.copies("second", &["vda", "vdb"]);
    let begun = stage.driver.begin(&second).unwrap();
    let mut expected = vec![(MIB, 64 << 10), (2 * MIB, 64 << 10)];
    if B::RUNS {
        expected.push((5 * MIB, 64 << 10));
        stage.write("vda", "write -P 3 3M 64k");
    }
    assert_eq!(dirty_ranges(&begun.exports[0]), expected);
    assert_eq!(dirty_ranges(&begun.exports[1]), []);
    stage.assert_increments(&begun, "first", "second");
    stage.end(&second);
    let (old, new) = (mark.to_string(), new_mark(&second).to_string());
    let mut both = vec![old, new];
    both.sort();
    assert_eq!(stage.names("vda"), both);
}

pub(crate) fn all_that_changed_since_a_mark_is_read_again_and_again<B: Bench>() {
    let mut stage = Stage::<B>::start(2);
    let disks = ["vda", "vdb"];
    let size = usize::try_from(16 * MIB).unwrap();
    let mut work = [Workload::new(1, size), Workload::new(2, size)];
    let mut mark = stage.leave_mark(&disks);
    stage.copies("0", &disks);
    for round in 1..5 {
        let mut writes = Vec::new();
        for (disk, work) in disks.iter().zip(&mut work) {
            writes.extend((0..20).map(|_| (*disk, work.step().to_qemu_io())));
        }
        stage.bench.write(&writes);
        let order = stage.order(&[("vda", Some(&mark)), ("vdb", Some(&mark))]);
        stage.copies(&round.to_string(), &disks);
        let begun = stage.driver.begin(&order).unwrap();
        if B::RUNS {
            for (disk, work) in disks.iter().zip(&mut work) {
                stage.write(disk, &work.step().to_qemu_io());
            }
        }
        let (from, to) = ((round - 1).to_string(), round.to_string());
        stage.assert_increments(&begun, &from, &to);
        stage.assert_points(&begun, &to);
        stage.end(&order);
        stage.remove(&mark);
        mark = new_mark(&order);
        for disk in disks {
            assert_eq!(stage.names(disk), [mark.to_string()]);
        }
    }
}

pub(crate) fn a_mark_lives_as_long_as_the_image_is_closed_in_order<B: Bench>() {
    let mut stage = Stage::<B>::start(1);
    stage.copies("first", &["vda"]);
    let mark = stage.leave_mark(&["vda"]);
    stage.write("vda", "write -P 1 1M 64k");
    stage.bench.cycle();
    stage.driver = stage.bench.driver();
    stage.write("vda", "write -P 2 2M 64k");
    stage.copies("second", &["vda"]);
    let facts = stage.observe();
    let bitmap = disk_facts(&facts, "vda").bitmaps.first().unwrap().clone();
    assert!(bitmap.in_image && bitmap.recording, "{bitmap:?}");
    let order = stage.order(&[("vda", Some(&mark))]);
    let begun = stage.driver.begin(&order).unwrap();
    assert_eq!(
        dirty_ranges(&begun.exports[0]),
        [(MIB, 64 << 10), (2 * MIB, 64 << 10)]
    );
    stage.assert_increments(&begun, "first", "second");
    stage.end(&order);
}

pub(crate) fn a_mark_whose_image_was_not_closed_is_never_read<B: Bench>() {
    let mut stage = Stage::<B>::start(1);
    let mark = stage.leave_mark(&["vda"]);
    // Now it is in the image.
    stage.bench.cycle();
    stage.bench.crash();
    stage.driver = stage.bench.driver();
    let facts = stage.observe();
    let bitmap = disk_facts(&facts, "vda").bitmaps.first().unwrap().clone();
    assert!(bitmap.inconsistent && !bitmap.recording, "{bitmap:?}");
    let order = stage.order(&[("vda", Some(&mark))]);
    let error = stage.driver.begin(&order).unwrap_err();
    assert_eq!(error.kind, ErrorKind::BadMark);
    stage.remove(&mark);
    assert_eq!(stage.names("vda"), [] as [String; 0]);
    let order = stage.order(&[("vda", None)]);
    stage.copies("after", &["vda"]);
    let begun = stage.driver.begin(&order).unwrap();
    stage.assert_points(&begun, "after");
    stage.end(&order);
}

pub(crate) fn removing_a_mark_twice_is_no_error_and_touches_no_other<B: Bench>() {
    let mut stage = Stage::<B>::start(2);
    let first = stage.leave_mark(&["vda", "vdb"]);
    let second = stage.leave_mark(&["vda"]);
    stage.remove(&first);
    assert_eq!(stage.names("vda"), [second.to_string()]);
    assert_eq!(stage.names("vdb"), [] as [String; 0]);
    stage.remove(&first);
    assert_eq!(stage.names("vda"), [second.to_string()]);
    stage.write("vda", "write -P 1 1M 64k");
    let order = stage.order(&[("vda", Some(&second))]);
    let begun = stage.driver.begin(&order).unwrap();
    assert_eq!(dirty_ranges(&begun.exports[0]), [(MIB, 64 << 10)]);
    stage.end(&order);
}

pub(crate) fn a_mark_distrusted_on_one_disk_goes_on_with_the_others<B: Bench>() {
    let mut stage = Stage::<B>::start(2);
    let mark = stage.leave_mark(&["vda", "vdb"]);
    let facts = stage.observe();
    let bitmaps = &disk_facts(&facts, "vda").bitmaps;
    let nodes = bitmaps.iter().map(|bitmap| bitmap.node.clone()).collect();
    let name = mark.clone();
    let distrust = MarkOrder::Distrust { name, nodes };
    stage.driver.mark(&stage.vm, &distrust).unwrap();
    stage.driver.mark(&stage.vm, &distrust).unwrap();
    assert_eq!(stage.names("vda"), [] as [String; 0]);
    assert_eq!(stage.names("vdb"), [mark.to_string()]);
    stage.remove(&mark);
    assert_eq!(stage.names("vdb"), [] as [String; 0]);
}

pub(crate) fn bitmaps_of_others_stay_as_they_are<B: Bench>() {
    let mut stage = Stage::<B>::start(2);
    stage.bench.add_bitmap("vda", "theirs");
    stage
        .bench
        .add_bitmap("vdb", "a-name-with-\u{fc}ml\u{e4}uts and blanks");
    stage.write("vda", "write -P 1 1M 64k");
    let theirs = |stage: &Stage<B>| {
        let ours = |name: &str| name.starts_with("hw-");
        let disks = ["vda", "vdb"].into_iter();
        let bitmaps = disks.flat_map(|disk| stage.bench.bitmaps(disk));
        let theirs: Vec<_> = bitmaps.filter(|it| !ours(&it.name)).collect();
        assert_eq!(theirs.len(), 2);
        theirs
    };
    let before = theirs(&stage);
    let mark = stage.leave_mark(&["vda", "vdb"]);
    let order = stage.order(&[("vda", Some(&mark)), ("vdb", Some(&mark))]);
    stage.driver.begin(&order).unwrap();
    stage.end(&order);
    stage.remove(&mark);
    stage.remove(&new_mark(&order));
    assert_eq!(theirs(&stage), before);
}
