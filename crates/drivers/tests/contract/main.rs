//! What every driver promises, tried with every driver: one suite, against real
//! QEMU and libvirt.
#![allow(
    clippy::disallowed_methods,
    reason = "files of a lab die with the test: nothing here must be durable"
)]
#![allow(
    clippy::unwrap_used,
    reason = "what a helper of a test cannot do fails the test, with the error and the line"
)]

mod bench;
mod bench_bare;
mod bench_libvirt;
mod bench_off;
mod marks;
#[path = "../reading/mod.rs"]
mod reading;
mod sessions;
mod stage;

/// Runs the suite for one kind of bench.
macro_rules! contract {
    ($name:ident, $bench:ty) => {
        mod $name {
            use super::{marks, sessions};
            contract!(@each $bench, sessions,
                begin_exports_the_point_of_all_disks_in_the_order_given,
                observing_changes_nothing_and_says_the_same_twice,
                a_begin_that_fails_leaves_nothing,
                a_session_is_ended_by_its_own_end_only_and_any_number_of_times,
                a_session_whose_driver_died_is_found_ended_and_followed_by_another,
                a_sweep_touches_nothing_of_others,
                a_session_that_lost_its_images_says_so,
                a_vm_is_found_by_its_name_and_nothing_else_is,
            );
            contract!(@each $bench, marks,
                a_mark_records_from_the_point_on,
                all_that_changed_since_a_mark_is_read_again_and_again,
                a_mark_lives_as_long_as_the_image_is_closed_in_order,
                a_mark_whose_image_was_not_closed_is_never_read,
                removing_a_mark_twice_is_no_error_and_touches_no_other,
                a_mark_distrusted_on_one_disk_goes_on_with_the_others,
                bitmaps_of_others_stay_as_they_are,
            );
        }
    };
    (@each $bench:ty, $module:ident, $($promise:ident,)*) => {
        $(#[test]
        fn $promise() {
            $module::$promise::<$bench>();
        })*
    };
}

contract!(libvirt_running, crate::bench_libvirt::Running);
contract!(
    qmp_running,
    crate::bench_bare::Bare<crate::bench_bare::Named>
);
contract!(
    qmp_running_in_qemu_7_2,
    crate::bench_bare::Bare<crate::bench_bare::Oldest>
);
contract!(images, crate::bench_off::Images);
contract!(libvirt_shut_off, crate::bench_off::ShutOff);
