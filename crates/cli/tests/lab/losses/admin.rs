//! An admin at work while a backup runs: both get what they asked for, or an
//! error that says why not.

use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::tool;

use super::Story;
use crate::support::{mode, wait_for_job, write_noise};

/// A VM with a point, and enough to copy since.
fn busy() -> Result<Story> {
    let mut story = Story::of_one_disk()?;
    story.backup("full: first-backup")?;
    write_noise(&story.bed, &story.vm, "vda", 8, 20)?;
    Ok(story)
}

fn begin(story: &Story) -> Result<Child> {
    let mover = story.bed.spawn_slow(&["backup", "web01", "--json"])?;
    wait_for_job(&story.vm)?;
    Ok(mover)
}

/// Starts virsh in the background.
fn admin(story: &Story, args: &[&str]) -> Result<Child> {
    let mut virsh = Command::new("virsh");
    virsh.args(["-q", "-c", &story.bed.lab.uri()]).args(args);
    virsh.env("LC_ALL", "C").stdin(Stdio::null());
    virsh.stdout(Stdio::piped()).stderr(Stdio::piped());
    virsh
        .spawn()
        .context("virsh, which comes with libvirt's clients")
}

/// Fails unless it ended so; returns what it said.
fn ended(child: Child, code: i32) -> Result<String> {
    let output = child.wait_with_output()?;
    let told = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    ensure!(
        output.status.code() == Some(code),
        "{}: {told}",
        output.status
    );
    Ok(told)
}

/// Fails unless the next backup is an increment, all points are right, and
/// nothing is left at the VM but a mark.
fn goes_on(mut story: Story) -> Result<()> {
    story.vm.write("vda", "write -P 3 60M 64k")?;
    story.backup("incremental")?;
    story.all_points_are_right()?;
    story.bed.assert_tidy(&story.vm, 1)
}

#[test]
fn a_snapshot_asked_for_in_mid_backup_waits_and_neither_is_harmed() -> Result<()> {
    let mut story = busy()?;
    let mover = begin(&story)?;
    let disk = "vda,snapshot=external";
    let snapshot = [
        "snapshot-create-as",
        "web01",
        "s1",
        "--disk-only",
        "--diskspec",
        disk,
    ];
    let mut snapshot = admin(&story, &snapshot)?;
    // What needs no job of libvirt's goes on at once.
    story.bed.lab.virsh(&["domblkinfo", "web01", "vda"])?;
    story.bed.lab.virsh(&["dumpxml", "web01"])?;
    ensure!(snapshot.try_wait()?.is_none(), "the snapshot did not wait");
    let report: serde_json::Value = serde_json::from_str(&ended(mover, 0)?)?;
    ensure!(mode(&report, "vda") == "incremental", "{report}");
    ended(snapshot, 0)?;
    let merge = [
        "blockcommit",
        "web01",
        "vda",
        "--active",
        "--pivot",
        "--wait",
    ];
    story.bed.lab.virsh(&merge)?;
    let delete = ["snapshot-delete", "web01", "s1", "--metadata"];
    story.bed.lab.virsh(&delete)?;
    story.vm.write("vda", "write -P 3 60M 64k")?;
    let report = story.bed.backup(&story.vm, &[])?;
    ensure!(report["status"] == "ok", "{report}");
    story.vm.write("vda", "write -P 4 61M 64k")?;
    story.backup("incremental")?;
    story.all_points_are_right()?;
    story.bed.assert_tidy(&story.vm, 1)
}

#[test]
fn a_save_asked_for_in_mid_backup_waits_and_the_saved_vm_goes_on_incrementally() -> Result<()> {
    let story = busy()?;
    let mover = begin(&story)?;
    let mut save = admin(&story, &["managedsave", "web01"])?;
    let jobs = ["blockjob", "web01", "vda", "--info"];
    story.bed.lab.virsh(&jobs)?;
    ensure!(save.try_wait()?.is_none(), "the save did not wait");
    ended(mover, 0)?;
    ended(save, 0)?;
    // Saved is off: what is read is as after a power cut, and nothing is lost.
    let report = story.bed.backup(&story.vm, &[])?;
    ensure!(report["consistency"] == "crash", "{report}");
    story.bed.lab.restart_libvirtd()?;
    story.vm.start()?;
    goes_on(story)
}

#[test]
fn a_backup_job_ended_by_an_admin_is_a_clear_error_and_the_next_backup_heals() -> Result<()> {
    let story = busy()?;
    // It must not have read everything: then the job is no longer needed.
    let slowly = ["backup", "web01", "--json", "--limit", "8MiB"];
    let mover = story.bed.spawn(&slowly)?;
    wait_for_job(&story.vm)?;
    story.bed.lab.virsh(&["domjobabort", "web01"])?;
    let told = ended(mover, 1)?;
    ensure!(told.contains("no restore point was added"), "{told}");
    story.bed.assert_tidy(&story.vm, 1)?;
    goes_on(story)
}

#[test]
fn a_guest_stopped_and_let_go_on_in_mid_backup_is_left_as_the_admin_wants_it() -> Result<()> {
    let story = busy()?;
    let mover = begin(&story)?;
    story.bed.lab.virsh(&["suspend", "web01"])?;
    ended(mover, 0)?;
    ensure!(story.vm.state()? == "paused", "{}", story.vm.state()?);
    story.bed.lab.virsh(&["resume", "web01"])?;
    goes_on(story)
}

#[test]
fn a_vm_switched_off_in_mid_backup_costs_that_backup_and_no_write() -> Result<()> {
    let story = busy()?;
    let mover = begin(&story)?;
    story.vm.destroy()?;
    let told = ended(mover, 1)?;
    ensure!(told.contains("no restore point was added"), "{told}");
    story.vm.start()?;
    goes_on(story)
}

/// qmpbackup V6: a repository that hangs stalls or fails the guest's writes.
#[test]
fn v6_a_repository_that_hangs_stalls_no_guest_write_and_costs_no_mark() -> Result<()> {
    let mut story = busy()?;
    let marks = story.vm.checkpoints()?;
    // A file system of its own, which can be made to hang.
    let (image, away) = (story.bed.lab.path("fs.img"), story.bed.lab.path("away"));
    let repo = story.bed.repo();
    std::fs::rename(&repo, &away)?;
    let mount = crate::scene::Mount::ext4(&image, 256 << 20, &[], &repo)?;
    tool("cp").arg("-a").arg(away.join(".")).arg(&repo).run()?;
    let mover = begin(&story)?;
    let freezer = |how| tool("fsfreeze").arg(how).arg(&repo).run();
    freezer("-f")?;
    let hang = std::time::Instant::now();
    let mut silence = std::time::Duration::ZERO;
    let mut place = 0;
    let written = loop {
        let since = std::time::Instant::now();
        // Onto what is yet to be copied, too.
        let write = format!("write -P 7 {}M 64k", place % 64);
        if let Err(error) = story.vm.write("vda", &write) {
            break Err(error);
        }
        silence = silence.max(since.elapsed());
        place += 1;
        if hang.elapsed().as_secs() >= 3 {
            break Ok(());
        }
    };
    freezer("-u")?;
    written?;
    ensure!(silence.as_secs() < 2, "a guest's write took {silence:?}");
    // It goes on where it hung; that it would have been given up is another test.
    ended(mover, 0)?;
    ensure!(story.vm.checkpoints()? != marks);
    story.backup("incremental")?;
    story.all_points_are_right()?;
    story.bed.assert_tidy(&story.vm, 1)?;
    drop(story);
    drop(mount);
    Ok(())
}
