//! Each row of the table in docs/checkpoints.md over QEMU's own monitor, where it
//! can occur there.

mod disks;
mod marks;
mod others;

use std::path::PathBuf;

use anyhow::Result;
use highwater_testkit::{Attach, DiskSpec, MIB, tool};

use crate::tale::{BareBed, Tale};
use disks::*;
use marks::*;
use others::*;

/// A test for each row of the first list. Those of the second say why they have
/// none; that there is no third kind is a test.
macro_rules! rows {
    (here: $($here:ident)+; elsewhere: $($elsewhere:ident: $why:literal;)+) => {
        mod row {
            $(#[test]
            fn $here() -> super::Result<()> {
                super::$here()
            })+
        }

        #[test]
        fn every_row_is_here_or_said_to_be_elsewhere() {
            let mut known = vec![$(stringify!($here),)+ $(stringify!($elsewhere)),+];
            let mut all: Vec<_> = highwater_plan::ROWS.iter().map(|row| row.name).collect();
            known.sort_unstable();
            all.sort_unstable();
            assert_eq!(known, all);
            assert!([$($why),+].iter().all(|why| !why.is_empty()));
        }
    };
}

rows! {
    here:
    all_is_well first_backup new_disk disk_gone
    qemu_killed_before_its_bitmap_was_stored qemu_killed_after_its_bitmap_was_stored
    bitmap_removed_while_the_vm_runs bitmap_removed_while_the_vm_is_off bitmap_disabled
    bitmap_remade_only_in_memory bitmap_remade_with_other_granularity bitmap_remade_over_qmp
    data_file_written_around_qemu bitmaps_gone_on_some_disks bitmap_in_use
    bitmap_remade_after_a_crash
    died_before_commit died_before_settling partial_runs copies_only
    bitmap_cleared lie_found_by_a_differential
    internal_snapshot external_snapshot external_snapshot_of_one_disk
    overlay_by_qemu_img overlay_committed_by_qemu_img
    image_moved older_copy_written_into_place backing_file_changed
    swapped_disks other_serial grown_while_running grown_while_off shrunk raw_and_version_2
    write_errors_reported write_errors_ignored
    foreign_marks other_repository foreign_block_job foreign_nbd_server dead_session;

    elsewhere:
    mark_remade_by_libvirt: "there are no checkpoints without libvirt";
    undefined_and_defined: "nobody forgets a mark where nobody keeps a record of it";
    transient_started_again: "the same";
    checkpoint_forgotten_while_the_vm_runs: "the same";
    checkpoint_refused: "the same";
    managed_save: "libvirt's; without it that is a start with -incoming, which is refused";
    snapshot_behind_libvirt: "QEMU itself is asked what the guest writes to";
    foreign_backup_job: "libvirt's; QEMU's own is a block job";
    process_unknown: "over the monitor of a QEMU that cannot be seen: crates/drivers/tests";
    failed_disk: "the engine's, which knows no driver";
    parent_unreadable: "the engine's";
    writes_in_no_bitmap: "QEMU's monitor writes without being counted";
    shrunk_and_grown: "the audit's; a bitmap that was cleared is the same to it";
    snapshot_and_commit: "two changes of the chain, each of which has a row here";
    snapshot_and_commit_between_backups: "the same as overlay_committed_by_qemu_img";
    block_copy_to_qcow2: "another image on top, as after a snapshot";
    block_copy_to_raw: "the same";
    older_copy_moved_into_place: "an image that was moved, and an older copy: both are here";
    older_copy_with_its_mark_in_place: "the same";
    older_data_file: "the identity of files, which all drivers take from one place";
    backing_file_unseen: "the same";
    image_unseen: "the same";
}

const SIZE: u64 = 16 * MIB;

fn qcow2(name: &str) -> DiskSpec {
    DiskSpec::qcow2(name, SIZE)
}

/// A VM with these disks and one point, written to since.
fn with(disks: &[DiskSpec]) -> Result<Tale> {
    let bed = BareBed::start()?;
    let mut tale = unseen(&bed, disks)?;
    tale.writes(1)?;
    tale.backs_up(&["full: first-backup"])?;
    tale.writes(2)?;
    Ok(tale)
}

/// The same, without a point.
fn unseen(bed: &BareBed, disks: &[DiskSpec]) -> Result<Tale> {
    let mut vm = bed.lab.vm("kvm0");
    let mut names = Vec::new();
    for disk in disks {
        let name: &'static str = ["vda", "vdb"]
            .into_iter()
            .find(|name| *name == disk.target())
            .unwrap_or("vdc");
        let attach = Attach::drive_and_device("virtio-blk-pci").id(name);
        vm = vm.disk_as(disk.clone(), attach);
        names.push(name);
    }
    Ok(Tale::of(bed, &vm.start()?, &names))
}

fn one() -> Result<Tale> {
    with(&[qcow2("vda")])
}

fn two() -> Result<Tale> {
    with(&[qcow2("vda"), qcow2("vdb")])
}

/// The guest writes, the next backup reads the disks in these ways, and the one
/// after that all of them as increments.
fn heals(tale: &mut Tale, expected: &[&str]) -> Result<()> {
    tale.writes(3)?;
    tale.backs_up(expected)?;
    is_well(tale)
}

fn is_well(tale: &mut Tale) -> Result<()> {
    let before = tale.vm.graph()?;
    tale.writes(4)?;
    tale.backs_up(&["incremental"])?;
    tale.is_tidy(&before)?;
    tale.ends_well()
}

/// The VM ends, and is started with these disks.
fn restarts_with(tale: &mut Tale, disks: &[DiskSpec]) -> Result<()> {
    if tale.vm.is_active() {
        tale.vm.quit()?;
    }
    let other = unseen(&tale.bed, disks)?;
    (tale.vm, tale.disks) = (other.vm, other.disks);
    Ok(())
}

fn existing(name: &str, image: &std::path::Path) -> DiskSpec {
    DiskSpec::existing(name, image, "qcow2")
}

fn image(tale: &Tale, name: &str) -> PathBuf {
    tale.vm.image(name)
}

fn qemu_img(args: &[&str]) -> Result<()> {
    tool("qemu-img").args(args).run().map(drop)
}
