//! Sessions: what is exported, how they end, and what is left of them.

use highwater_hypervisor::{Consistency, ErrorKind, JobFacts, ReadMode};
use highwater_testkit::MIB;

use crate::bench::Bench;
use crate::reading::mark_name;
use crate::stage::{Stage, assert_no_directories, new_mark};

const ALL: [&str; 3] = ["vda", "vdb", "vdc"];

pub(crate) fn begin_exports_the_point_of_all_disks_in_the_order_given<B: Bench>() {
    let mut stage = Stage::<B>::start(3);
    stage.bench.write(&[
        ("vda", "write -P 0xab 10M 3M".to_owned()),
        ("vdb", "write -P 0xcd 0 1M".to_owned()),
        ("vdc", "write -P 0xef 15M 64k".to_owned()),
    ]);
    stage.copies("point", &ALL);
    let before = stage.bench.shape();
    let order = stage.order(&[("vdb", None), ("vdc", None), ("vda", None)]);
    let begun = stage.driver.begin(&order).unwrap();
    let expected = if B::RUNS {
        Consistency::Crash
    } else {
        Consistency::Offline
    };
    assert_eq!(begun.consistency, expected);
    assert!(begun.mark_created_s.is_some(), "{begun:?}");
    assert_eq!(begun.warnings, [] as [String; 0]);
    let exports = begun.exports.iter();
    let targets: Vec<_> = exports.clone().map(|it| it.target.as_str()).collect();
    assert_eq!(targets, ["vdb", "vdc", "vda"]);
    for export in exports {
        assert_eq!(export.dirty_context, None);
    }
    for disk in &begun.disks {
        assert_eq!(disk.granularity, Some(65_536), "{disk:?}");
        assert_eq!(disk.counters.is_some(), B::RUNS, "{disk:?}");
    }
    if B::RUNS {
        // After the point in time: must not be seen.
        for disk in ALL {
            stage.write(disk, "write -P 0xee 9M 3M");
            stage.write(disk, "discard 0 512k");
        }
    }
    stage.assert_points(&begun, "point");
    stage.driver.check(&order.vm, order.session).unwrap();
    stage.end(&order);
    assert_eq!(stage.bench.shape(), before);
    for disk in ALL {
        assert_eq!(stage.names(disk), [new_mark(&order).to_string()]);
    }
}

pub(crate) fn observing_changes_nothing_and_says_the_same_twice<B: Bench>() {
    let mut stage = Stage::<B>::start(2);
    stage.bench.add_bitmap("vda", "theirs");
    let mark = stage.leave_mark(&["vda", "vdb"]);
    let before = (stage.bench.shape(), stage.bench.bitmaps("vda"));
    let first = stage.observe();
    assert_eq!(stage.observe(), first);
    stage.driver.survey(&stage.vm.clone()).unwrap();
    let places = [stage.bench.path("run"), stage.bench.path("scratch")];
    let vm = stage.vm.clone();
    assert_eq!(stage.driver.leftovers(&vm, &places).unwrap(), []);
    assert_eq!((stage.bench.shape(), stage.bench.bitmaps("vda")), before);
    assert!(first.job.is_none() && first.skipped.is_empty(), "{first:?}");
    let targets: Vec<_> = first.disks.iter().map(|disk| &disk.target).collect();
    assert_eq!(targets, ["vda", "vdb"]);
    for disk in &first.disks {
        assert_eq!(disk.size_bytes, 16 * MIB);
        let bitmap = disk.bitmaps.iter().find(|it| it.name == mark.to_string());
        let bitmap = bitmap.unwrap_or_else(|| panic!("{disk:?}"));
        assert!(bitmap.recording && bitmap.persistent, "{bitmap:?}");
        assert!(!bitmap.busy && !bitmap.inconsistent, "{bitmap:?}");
    }
}

pub(crate) fn a_begin_that_fails_leaves_nothing<B: Bench>() {
    let mut stage = Stage::<B>::start(2);
    let kept = stage.leave_mark(&["vda"]);
    let before = (stage.bench.shape(), stage.names("vda"), stage.names("vdb"));
    let unknown = mark_name();
    let orders = [
        (&[("vdz", None)][..], ErrorKind::NoSuchDisk),
        (&[][..], ErrorKind::NoSuchDisk),
        (&[("vda", None), ("vdz", None)], ErrorKind::NoSuchDisk),
        (
            &[("vda", None), ("vdb", Some(&unknown))],
            ErrorKind::UnknownMark,
        ),
        // It is on the other disk only.
        (
            &[("vda", Some(&kept)), ("vdb", Some(&kept))],
            ErrorKind::BadMark,
        ),
    ];
    for (disks, kind) in orders {
        let order = stage.order(disks);
        let error = stage.driver.begin(&order).unwrap_err();
        let either = [ErrorKind::BadMark, ErrorKind::UnknownMark];
        let both_say_it = either.contains(&kind) && either.contains(&error.kind);
        assert!(error.kind == kind || both_say_it, "{disks:?}: {error:?}");
        assert!(!error.left_behind, "{error:?}");
        assert_no_directories(&order);
        let after = (stage.bench.shape(), stage.names("vda"), stage.names("vdb"));
        assert_eq!(after, before, "{disks:?}");
    }
    let twice = stage.order(&[("vda", None), ("vda", None)]);
    stage.driver.begin(&twice).unwrap_err();
    let order = stage.order(&[("vda", Some(&kept)), ("vdb", None)]);
    stage.driver.begin(&order).unwrap();
    stage.end(&order);
}

pub(crate) fn a_session_is_ended_by_its_own_end_only_and_any_number_of_times<B: Bench>() {
    let mut stage = Stage::<B>::start(1);
    let before = stage.bench.shape();
    let order = stage.order(&[("vda", None)]);
    stage.copies("point", &["vda"]);
    let begun = stage.driver.begin(&order).unwrap();
    let mut stranger = stage.bench.stranger();
    let other = stage.order(&[("vda", None)]);
    assert_eq!(stranger.begin(&other).unwrap_err().kind, ErrorKind::Busy);
    assert!(!stranger.end(&other).unwrap().ended_job);
    let ended = stranger.end_leftover(&other.vm, other.session).unwrap();
    assert!(!ended.ended_job);
    stage.driver.check(&order.vm, order.session).unwrap();
    stage.assert_points(&begun, "point");
    assert!(stage.driver.end(&order).unwrap().ended_job);
    for _ in 0..2 {
        assert!(!stage.driver.end(&order).unwrap().ended_job);
        assert!(!stranger.end(&order).unwrap().ended_job);
    }
    let lost = stage.driver.check(&order.vm, order.session).unwrap_err();
    assert_eq!(lost.kind, ErrorKind::SessionLost);
    assert_no_directories(&order);
    assert_eq!(stage.bench.shape(), before);
    assert_eq!(stage.names("vda"), [new_mark(&order).to_string()]);
}

pub(crate) fn a_session_whose_driver_died_is_found_ended_and_followed_by_another<B: Bench>() {
    let mut stage = Stage::<B>::start(2);
    let before = stage.bench.shape();
    let old = stage.leave_mark(&["vda", "vdb"]);
    stage.copies("old", &["vda", "vdb"]);
    stage.write("vda", "write -P 1 1M 128k");
    let order = stage.order(&[("vda", Some(&old)), ("vdb", None)]);
    stage.die_in(&order);
    if B::RUNS {
        // The dead one's filters and scratch files are still in the guest's way.
        stage.write("vdb", "write -P 2 2M 64k");
        let job = stage.observe().job;
        assert_eq!(job, Some(JobFacts::Ours(order.session)));
    }
    stage.driver.end_leftover(&order.vm, order.session).unwrap();
    let places = [stage.bench.path("run"), stage.bench.path("scratch")];
    let vm = stage.vm.clone();
    let swept = stage.driver.sweep(&vm, &places).unwrap();
    assert!(swept.warnings.is_empty(), "{swept:?}");
    assert_no_directories(&order);
    assert_eq!(stage.bench.shape(), before);
    assert_eq!(stage.observe().job, None);
    // The old mark has gone on recording, and the unfinished one is removed.
    stage.remove(&new_mark(&order));
    stage.copies("new", &["vda", "vdb"]);
    let order = stage.order(&[("vda", Some(&old)), ("vdb", Some(&old))]);
    let begun = stage.driver.begin(&order).unwrap();
    stage.assert_increments(&begun, "old", "new");
    stage.end(&order);
    assert_eq!(stage.bench.shape(), before);
}

pub(crate) fn a_sweep_touches_nothing_of_others<B: Bench>() {
    let mut stage = Stage::<B>::start(1);
    stage.bench.add_bitmap("vda", "theirs");
    let mark = stage.leave_mark(&["vda"]);
    let (run, scratch) = (stage.bench.path("run"), stage.bench.path("scratch"));
    // Without a label: made by nobody we know.
    for place in [&run, &scratch] {
        std::fs::create_dir_all(place.join("theirs")).unwrap();
        std::fs::write(place.join("theirs/file"), "theirs").unwrap();
    }
    let before = (stage.bench.shape(), stage.names("vda"));
    let vm = stage.vm.clone();
    let swept = stage
        .driver
        .sweep(&vm, &[run.clone(), scratch.clone()])
        .unwrap();
    assert_eq!((swept.sessions, swept.warnings), (vec![], vec![]));
    assert_eq!((stage.bench.shape(), stage.names("vda")), before);
    for place in [run, scratch] {
        assert_eq!(std::fs::read(place.join("theirs/file")).unwrap(), b"theirs");
    }
    assert_eq!(stage.names("vda"), [mark.to_string(), "theirs".to_owned()]);
}

pub(crate) fn a_session_that_lost_its_images_says_so<B: Bench>() {
    let mut stage = Stage::<B>::start(1);
    let order = stage.order(&[("vda", None)]);
    stage.driver.begin(&order).unwrap();
    stage.driver.check(&order.vm, order.session).unwrap();
    stage.bench.turn();
    let lost = stage.driver.check(&order.vm, order.session).unwrap_err();
    assert_eq!(lost.kind, ErrorKind::SessionLost);
    stage.driver.end(&order).unwrap();
    assert_no_directories(&order);
}

pub(crate) fn a_vm_is_found_by_its_name_and_nothing_else_is<B: Bench>() {
    let mut stage = Stage::<B>::start(1);
    let error = stage.driver.find("web02").unwrap_err();
    assert_eq!(error.kind, ErrorKind::NoSuchVm);
    let listed = stage.driver.list().unwrap();
    let names: Vec<_> = listed.iter().map(|(vm, _)| vm.name.as_str()).collect();
    assert_eq!(names, ["web01"]);
    let facts = stage.observe();
    assert_eq!(listed[0], (facts.vm, facts.run_state));
    assert!(matches!(
        stage.order(&[("vda", None)]).disks[0].mode,
        ReadMode::All
    ));
}
