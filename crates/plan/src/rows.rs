//! What may have become of a mark, and what the next backup does about it: the
//! one list of it.
//!
//! Every row is tested twice under its name: as a pure decision (`rows::cases`
//! here) and with real libvirt and QEMU (`crates/cli/tests/lab/rows`). Both
//! sets of tests are made from this list, so a row without them does not
//! compile. The table in `docs/checkpoints.md` is made from it, too.

#[cfg(test)]
mod cases;
#[cfg(test)]
pub(crate) mod view;

/// Calls a macro with all rows: `name: "what is found" => "what is done";`.
///
/// ```
/// macro_rules! names {
///     ($($name:ident: $found:literal => $done:literal;)+) => { [$(stringify!($name)),+] };
/// }
/// let names: &[&str] = &highwater_plan::with_rows!(names);
/// assert!(names.contains(&"all_is_well"));
/// ```
#[macro_export]
macro_rules! with_rows {
    ($callback:ident) => {
        $callback! {
            all_is_well:
                "the bitmap records, is whole and kept in the image; all that identifies disk and mark is as recorded"
                => "`incremental`";
            first_backup: "no point of this VM" => "`full: first-backup`";
            new_disk: "no point with this disk" => "`full: new-disk`; the others go on";
            disk_gone: "a disk of the newest point is no longer part of the VM" => "named in the point; the others go on";

            qemu_killed_before_its_bitmap_was_stored:
                "QEMU was killed before it first stored the bitmap, which is gone" => "`rescan: bitmap-missing`";
            qemu_killed_after_its_bitmap_was_stored:
                "QEMU was killed after it had stored the bitmap, which was not closed"
                => "`rescan: bitmap-inconsistent`; the broken bitmap is removed";
            bitmap_removed_while_the_vm_runs: "the bitmap was removed over QMP" => "`rescan: bitmap-missing`";
            bitmap_removed_while_the_vm_is_off: "the bitmap was removed by `qemu-img bitmap`" => "`rescan: bitmap-missing`";
            bitmap_disabled: "the bitmap does not record" => "`rescan: bitmap-not-recording`";
            bitmap_remade_only_in_memory:
                "the bitmap was made anew and is not kept in the image" => "`rescan: bitmap-not-persistent`";
            bitmap_remade_with_other_granularity:
                "the bitmap was made anew with another granularity" => "`rescan: bitmap-granularity`";
            bitmap_remade_over_qmp:
                "the bitmap was made anew behind libvirt's back: it lies"
                => "`rescan: bitmap-lied` in the same run, if the audit meets what it hides ([how likely](#what-cannot-be-seen))";
            data_file_written_around_qemu:
                "somebody wrote to the raw data file of a running VM: the bitmap lies" => "the same";
            bitmaps_gone_on_some_disks:
                "the bitmap is broken on some disks of the VM" => "those `rescan`, the others `incremental`";
            bitmap_in_use: "an export or a job of somebody else uses the bitmap" => "refused until that has ended";

            mark_remade_by_libvirt:
                "a checkpoint of the mark's name with another nonce or creation time"
                => "`rescan: mark-remade`; it is removed with its bitmaps";
            bitmap_remade_after_a_crash:
                "QEMU was killed before it stored the bitmap, and another tool made one of that name: this QEMU has neither made it with the mark nor read it from the image"
                => "`rescan: mark-remade`; it is removed";
            process_unknown:
                "QEMU has made the bitmap itself, and its process cannot be identified (`hidepid`, another pid namespace): nobody knows whether it is the one made with the mark"
                => "`rescan: process-unknown`, each time until the process can be seen";
            undefined_and_defined:
                "the VM was undefined and defined again: the bitmap records, libvirt forgot the checkpoint"
                => "told to libvirt again, which checks it; `incremental`";
            transient_started_again: "the same, of a VM that was never defined" => "the same";
            checkpoint_forgotten_while_the_vm_runs:
                "the same, by `checkpoint-delete --metadata`" => "the same";
            checkpoint_refused: "the same, and libvirt refuses to be told" => "`rescan: mark-refused`";

            died_before_commit:
                "a newer mark of ours without a restore point: we died before the commit"
                => "removed; `incremental` since the older one, which went on recording";
            died_before_settling:
                "a newer mark of ours with a restore point, and the older one: we died after the commit"
                => "`incremental` since the newer one; the older one is removed";
            partial_runs: "the newest backups were of some disks only (`-d`, `-x`)"
                => "each disk `incremental` since its own newest mark; a mark goes when no disk needs it";
            failed_disk: "a disk could not be read last time" => "the same";
            copies_only: "earlier backups left no mark (`--level copy`)" => "`rescan: no-mark-yet`";
            parent_unreadable: "the parent's tree cannot be read, or has another chunk size"
                => "`rescan: parent-damaged`, `rescan: chunk-size-differs`";

            bitmap_cleared:
                "the bitmap was cleared, or the image written around it, and a block that it calls clean is not as it was stored"
                => "`rescan: bitmap-lied` in the same run, if the block is among those that are audited";
            shrunk_and_grown: "the same, because the disk was shrunk and grown again" => "the same; found unless the audit ends early";
            writes_in_no_bitmap: "the guest has written, and the bitmap calls nothing dirty" => "`rescan: bitmap-lied`";
            lie_found_by_a_differential:
                "a differential found one of these, left no mark of its own, and took off the one that lied" => "`rescan: bitmap-lied`";

            managed_save: "the VM was saved and restored" => "`incremental`";
            internal_snapshot: "an internal snapshot was made" => "`incremental`";
            external_snapshot:
                "libvirt took an external snapshot: another image is on top" => "`full: chain-changed`, then `incremental`";
            external_snapshot_of_one_disk: "the same, of one disk of several"
                => "that one `full: chain-changed`, then once `rescan: backing-changed`; the others `incremental`";
            snapshot_and_commit:
                "libvirt took an external snapshot and merged it, with a backup between"
                => "`full: chain-changed` each time";
            snapshot_and_commit_between_backups:
                "the same between two backups: the chain is as it was, its bitmaps merged" => "`incremental`";
            block_copy_to_qcow2: "libvirt moved the disk to another qcow2 image" => "`full: chain-changed`, then `incremental`";
            block_copy_to_raw:
                "libvirt moved the disk to a raw image" => "`full: chain-changed`, then `rescan: no-marks-on-raw`";
            overlay_by_qemu_img: "an overlay was made while the VM was off" => "`full: chain-changed`, then `incremental`";
            overlay_committed_by_qemu_img:
                "the same, and `qemu-img commit` merged it: the bitmap below recorded that" => "`incremental`";
            snapshot_behind_libvirt:
                "the guest writes to another node than libvirt would export (a snapshot over QMP)"
                => "refused until that is merged, or the VM was started anew from what it writes to";
            image_moved:
                "the image has another inode number: it was copied, or mounted anew"
                => "as its bitmap says; `incremental` only with a mandatory audit";
            older_copy_moved_into_place:
                "the same, of an older copy" => "the same; mostly `rescan: bitmap-missing`";
            older_data_file: "the raw data file of a qcow2, or that qcow2, has another inode number"
                => "`rescan: image-replaced`";
            older_copy_written_into_place:
                "the image file has the content of an older copy" => "`rescan: bitmap-missing`";
            older_copy_with_its_mark_in_place:
                "the same, of a copy that has the mark in it and was closed: it is right for its data"
                => "`incremental`";
            backing_file_changed: "a backing file has another size or time" => "`rescan: backing-changed`";
            backing_file_unseen:
                "a backing file that nobody can check: a device, behind a server, not visible" => "`rescan: backing-unseen`";
            image_unseen: "the image file cannot be seen (its volume has no path, no permission)"
                => "`rescan: image-unseen`";

            swapped_disks: "two disks changed places" => "`full: chain-changed` each";
            other_serial: "another serial number, or without one another device" => "`full: disk-swapped`";
            grown_while_running: "the disk has grown" => "`incremental`; the new part is read in full";
            grown_while_off: "the same, while the VM was off" => "the same";
            shrunk: "the disk became smaller" => "`full: disk-shrank`, then `incremental`";
            raw_and_version_2: "raw, or qcow2 version 2" => "`rescan: no-marks-on-raw`, `rescan: no-marks-on-qcow2-v2`";
            write_errors_reported:
                "`error_policy` is `report`" => "as without, with a scratch file whose space is reserved before";
            write_errors_ignored: "`error_policy` is `ignore`" => "the same";

            foreign_marks: "checkpoints and bitmaps of others" => "as without; they stay";
            other_repository: "marks of another repository" => "as without; they stay";
            foreign_backup_job: "another program's backup job runs" => "refused until it has ended";
            foreign_block_job: "a block copy runs" => "refused until it has ended";
            foreign_nbd_server: "somebody's NBD server runs in QEMU, which has one only"
                => "refused until it has ended; nothing is left, the old mark stays";
            dead_session: "the job, scratch file and socket of a session of ours whose processes are dead"
                => "ended and removed; then as without";
        }
    };
}

/// One row, for tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Name of the row and of its two tests.
    pub name: &'static str,
    /// What a backup finds.
    pub found: &'static str,
    /// What it does.
    pub done: &'static str,
}

macro_rules! list {
    ($($name:ident: $found:literal => $done:literal;)+) => {
        /// All rows, in the order of the table.
        pub const ROWS: &[Row] = &[$(Row {
            name: stringify!($name),
            found: $found,
            done: $done,
        }),+];
    };
}
with_rows!(list);

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;
    use std::fs;
    use std::path::Path;

    use super::*;

    const BEGIN: &str = "<!-- rows -->\n";
    const END: &str = "<!-- /rows -->";

    fn table() -> String {
        let mut table =
            String::from("| found | what the next backup does | row |\n|---|---|---|\n");
        for row in ROWS {
            writeln!(table, "| {} | {} | `{}` |", row.found, row.done, row.name)
                .expect("writing to a String cannot fail");
        }
        table
    }

    #[test]
    #[allow(
        clippy::disallowed_methods,
        clippy::unwrap_used,
        reason = "a test may stop at the first surprise"
    )]
    fn the_table_in_the_documents_is_this_list() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/checkpoints.md");
        let text = fs::read_to_string(&path).unwrap();
        let (before, rest) = text.split_once(BEGIN).unwrap();
        let (found, after) = rest.split_once(END).unwrap();
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&path, format!("{before}{BEGIN}{}{END}{after}", table())).unwrap();
            return;
        }
        assert!(
            found == table(),
            "the table in docs/checkpoints.md is not the list of rows; write it anew with UPDATE_GOLDEN=1"
        );
    }
}
