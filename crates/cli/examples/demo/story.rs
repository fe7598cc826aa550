//! What happens in the demo, from the first file to the last comparison.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use highwater_model::format_size;
use highwater_testkit::{NumberedWriter, Numbering};

use crate::check::{self, Busy};
use crate::program::Show;
use crate::screen;
use crate::table::{Facts, table};
use crate::workshop::{BLOCKS_BYTES, FILES_BYTES, GUEST_PATIENCE, VM, Workshop};

/// A restore point, and what it must give back.
pub(crate) struct Point {
    pub(crate) facts: Facts,
    pub(crate) before: &'static str,
    /// Both disks as they were, copied without the program.
    pub(crate) references: [PathBuf; 2],
    /// Hashes and names of the files, as the guest listed them.
    pub(crate) files: String,
}

const INTRODUCTION: &str = "\
Highwater: a demonstration

A real guest in a private libvirtd; no other VM of this machine is touched.
Each command below is run as shown. Not shown: -c, which names that libvirtd,
and HIGHWATER_REPO. The guest is emulated and slow; no KVM is needed.";

/// Ninety files of up to 1.3 MB; the noise does not compress.
const WRITE_FILES: &str = "mkdir -p /data/files /data/busy; cd /data/files; \
    for n in $(seq 45); do head -c $((n * 29000)) /dev/urandom >noise-$n; \
    seq $((n * 1500)) >text-$n; done; sync";

/// Writes files and lists each with its hash, until it is told to stop.
const KEEP_WRITING: &str = "touch /tmp/busy /tmp/writing; cd /data/busy; \
    ( n=0; while [ -e /tmp/busy ]; do n=$((n + 1)); \
    head -c $((n % 7 * 30000 + 1000)) /dev/urandom >$n; sha256sum $n >>SUMS; \
    done; rm /tmp/writing ) >/dev/null 2>&1 &";

const STOP_WRITING: &str =
    "rm /tmp/busy; while [ -e /tmp/writing ]; do usleep 10000; done; wc -l </data/busy/SUMS";

const CHANGE: &str = "cd /data/files; for n in 3 9 27; do \
    dd if=/dev/urandom of=noise-$n bs=4k seek=5 count=3 conv=notrunc 2>/dev/null; \
    echo more >>text-$n; done; mv text-1 renamed; head -c 3000000 /dev/urandom >new; \
    dd if=/dev/urandom of=/dev/vdb bs=64k seek=2000 count=40 conv=notrunc 2>/dev/null; sync";

const DELETE: &str = "cd /data; rm -r busy files/noise-1? files/text-2?; \
    dd if=/dev/zero of=files/noise-45 bs=4k count=300 conv=notrunc 2>/dev/null; sync; \
    fstrim -v /data; blkdiscard -o 131072000 -l 1310720 /dev/vdb; \
    dd if=/dev/zero of=/dev/vdb bs=4k count=64 2>/dev/null; sync";

/// What is synced here is on the disks when QEMU dies, and in no bitmap after.
const WRITE_UNTIL_KILLED: &str = "mkdir -p /data/busy; cd /data/busy; \
    ( n=0; while :; do n=$((n + 1)); head -c 50000 /dev/urandom >$n; sync; \
    dd if=$n of=/dev/vdb bs=4k seek=$((40000 + n * 20)) conv=notrunc,fsync; \
    done ) >/dev/null 2>&1 & while [ ! -e /data/busy/30 ]; do usleep 10000; done";

const LITTLE: &str = "cd /data/files; echo after the crash >note; \
    dd if=/dev/urandom of=noise-40 bs=4k count=2 conv=notrunc 2>/dev/null; sync";

/// Tells the whole story; an error is a comparison that failed, or worse.
pub(crate) fn tell(since: Instant) -> Result<()> {
    screen::say(INTRODUCTION);

    screen::chapter(1, "A VM is backed up while it writes");
    let mut shop = Workshop::open()?;
    shop.guest.run_within(WRITE_FILES, GUEST_PATIENCE)?;
    screen::guest(&format!(
        "{} booted, ext4 on vda ({}), vdb without a file system ({})",
        shop.guest.run("uname -sr")?.trim(),
        format_size(FILES_BYTES),
        format_size(BLOCKS_BYTES)
    ));
    let amount = shop.guest.run("du -sh /data/files | cut -f1")?;
    screen::guest(&format!("writes 90 files, {}", amount.trim()));
    let init = ["init", "--encryption", "none"];
    shop.program.run(&init, Show::All)?;
    let (first, busy) = back_up_while_it_writes(&shop)?;
    let mut points = vec![first];

    screen::chapter(2, "The next backup reads what has changed");
    shop.guest.run(CHANGE)?;
    screen::guest("overwrites parts of files, appends, renames one, adds one; writes to vdb");
    screen::host(
        "to compare with, here and below: the disks as qemu-img reads them before the\n        \
         backup, while the guest writes nothing (its file system is read-only till after it)",
    );
    back_up_at_rest(&shop, &mut points, "files changed", "incremental")?;

    screen::chapter(3, "Deleted, trimmed, zeroed");
    let trimmed = shop.guest.run(DELETE)?;
    screen::guest("deletes files, overwrites one with zeroes, discards and zeroes parts of vdb");
    screen::guest(&format!("fstrim: {}", trimmed.trim()));
    back_up_at_rest(&shop, &mut points, "deleted, fstrim, zeroed", "incremental")?;

    screen::chapter(4, "QEMU is killed while the guest writes");
    shop.guest.run(WRITE_UNTIL_KILLED)?;
    shop.vm.kill_qemu()?;
    screen::guest("writes and syncs file after file to vda, block after block to vdb");
    screen::host("kill -9 QEMU: what its bitmaps knew of these writes is lost");
    shop.power_on()?;
    let left = shop.guest.run("ls /data/busy | wc -l")?;
    screen::host(&format!(
        "virsh start {VM}: ext4 replays its journal, {} files are there; nothing else is done",
        left.trim()
    ));
    back_up_at_rest(&shop, &mut points, "QEMU killed with -9", "rescan")?;

    screen::chapter(5, "And on as if nothing had been");
    shop.guest.run(LITTLE)?;
    screen::guest("writes a note, and 8 KiB into a file");
    back_up_at_rest(&shop, &mut points, "a small change", "incremental")?;

    screen::chapter(6, "Every point is restored and compared");
    shop.check_tidy()?;
    screen::checked("at the VM: one mark on each disk, and nothing else of ours");
    shop.vm.destroy()?;
    shop.program.run(&["list", VM], Show::All)?;
    let restored = check::restore_and_compare(&shop, &points, &busy)?;
    let files = check::boot_and_compare(&shop, &points, &restored, &busy)?;
    screen::space();
    screen::checked(&format!(
        "a guest boots with point {} as its disk and the older points beside it:",
        points.len()
    ));
    screen::say(&format!(
        "        {files} files hashed, all as recorded before their backup"
    ));
    sum_up(&points, files, since);
    Ok(())
}

/// Point 1: the guest writes files to vda and numbered blocks to vdb meanwhile.
fn back_up_while_it_writes(shop: &Workshop) -> Result<(Point, Busy)> {
    let files = shop.list_files()?;
    let numbering = Numbering {
        slots: 256,
        stride_bytes: 64 << 10,
        disks: vec!["/dev/vdb".to_owned()],
    };
    let writer = NumberedWriter::start(&shop.guest, &numbering, 16)?;
    shop.guest.run(KEEP_WRITING)?;
    shop.guest
        .run("while [ ! -e /data/busy/10 ]; do usleep 10000; done")?;
    let files_before = shop.guest.run("wc -l </data/busy/SUMS")?.trim().parse()?;
    let blocks_before = writer.acknowledged();
    screen::guest("goes on writing: files to vda, block after block to vdb");

    let backup = shop.program.start(&["backup", VM])?;
    let beside = shop.copy_disks_beside(&backup, "reference-1");
    let took = backup.wait(Show::All)?;
    let (references, held) = beside?;

    let blocks_after = writer.granted();
    let files_after = shop.guest.run(STOP_WRITING)?.trim().parse()?;
    writer.stop()?;
    let busy = Busy {
        numbering,
        blocks_before,
        blocks_after,
        files_before,
        files_after,
    };
    screen::guest(&format!(
        "wrote {} files and {} blocks meanwhile",
        files_after - files_before,
        blocks_after - blocks_before
    ));
    screen::host(&format!(
        "to compare with: both disks at that same instant, read from QEMU by nbdcopy\n        \
         (highwater was held for {:.1} s for that, which counts in its time)",
        held.as_secs_f64()
    ));
    let facts = facts(shop, "full", took)?;
    Ok((
        Point {
            facts,
            before: "first, guest writing",
            references,
            files,
        },
        busy,
    ))
}

/// Adds any other point: the disks are at rest, so the copy to compare with can be
/// taken without any backup job.
fn back_up_at_rest(
    shop: &Workshop,
    points: &mut Vec<Point>,
    before: &'static str,
    mode: &str,
) -> Result<()> {
    shop.rest()?;
    let files = shop.list_files()?;
    let references = shop.copy_disks(&format!("reference-{}", points.len() + 1))?;
    let took = shop.program.run(&["backup", VM], Show::All)?;
    shop.wake()?;
    points.push(Point {
        facts: facts(shop, mode, took)?,
        before,
        references,
        files,
    });
    Ok(())
}

/// Asks about the point just made, which must be of the mode that the story tells.
fn facts(shop: &Workshop, mode: &str, took: Duration) -> Result<Facts> {
    let facts = Facts::of(&shop.program, VM, took)?;
    ensure!(
        facts.mode.starts_with(mode),
        "not {mode} but {}",
        facts.mode
    );
    ensure!(
        facts.consistency == "filesystem",
        "the guest was not frozen: {}",
        facts.consistency
    );
    Ok(facts)
}

fn sum_up(points: &[Point], files: usize, since: Instant) {
    screen::say("");
    screen::say(&table(
        points.iter().map(|point| (&point.facts, point.before)),
    ));
    let disks: u64 = points.iter().map(|point| point.facts.size_bytes).sum();
    let stored: u64 = points.iter().map(|point| point.facts.stored_bytes).sum();
    screen::say(&format!(
        "{} restore points of two disks ({} of disk in {}), all identical byte for byte, {files} files",
        points.len(),
        format_size(disks),
        format_size(stored),
    ));
    screen::say(&format!(
        "as the guest wrote them, one crash healed by the next backup. {:.0} s in all.",
        since.elapsed().as_secs_f64()
    ));
}
