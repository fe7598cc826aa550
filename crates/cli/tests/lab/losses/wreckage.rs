//! What other backup programs leave at a VM when they are killed.

use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::tool;
use serde_json::{Value, json};

use super::{Story, add_bitmap, foreign_marks, qmp, root_node, wait};
use crate::support::{wait_for_job, write_noise};

/// Prepares to run virtnbdbackup on the lab's VM.
fn virtnbdbackup(story: &Story, level: &str) -> Command {
    let mut command = Command::new("virtnbdbackup");
    command
        .args(["-U", &story.bed.lab.uri(), "-d", "web01", "-l", level])
        // It wants a name for any URI with a `+`; nobody asks for it here.
        .args(["--user", "root", "--password", "none"])
        .arg("-o")
        .arg(story.bed.lab.path("theirs"))
        .arg("--scratchdir")
        .arg(story.bed.lab.dir())
        .arg("-f")
        .arg(story.bed.lab.path("theirs.sock"))
        .env("LC_ALL", "C")
        .stdin(Stdio::null());
    command
}

const INSTALL: &str = "virtnbdbackup: is it installed? `scripts/setup.sh --for test` does";

fn theirs(story: &Story, level: &str) -> Result<String> {
    let output = virtnbdbackup(story, level).output().context(INSTALL)?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{}: {told}", output.status);
    Ok(told)
}

/// Starts one of theirs and kills it in mid transfer.
fn killed(story: &Story, level: &str) -> Result<()> {
    let mut child: Child = virtnbdbackup(story, level)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context(INSTALL)?;
    let begun = wait_for_job(&story.vm);
    child.kill()?;
    child.wait()?;
    begun?;
    ensure!(story.vm.job_running()?, "their job ended before the kill");
    Ok(())
}

/// Marks of ours that libvirt knows of.
fn ours(story: &Story) -> Result<Vec<String>> {
    let mut ours = story.vm.checkpoints()?;
    ours.retain(|name| name.starts_with("hw-"));
    Ok(ours)
}

#[test]
fn what_a_killed_virtnbdbackup_leaves_is_told_of_and_left_alone_beside_our_increments() -> Result<()>
{
    let mut story = Story::of_one_disk()?;
    theirs(&story, "full")?;
    story.vm.write("vda", "write -P 2 8M 1M")?;
    theirs(&story, "inc")?;
    write_noise(&story.bed, &story.vm, "vda", 10, 40)?;
    killed(&story, "inc")?;
    let socket = story.bed.lab.path("theirs.sock");
    let whose = format!("(its data go to `{}`)", socket.display());
    let way_out = "if it is dead, `virsh domjobabort web01` ends its job";
    story.busy(&["another program's backup job", &whose, way_out])?;
    ensure!(story.vm.job_running()?, "their job was ended");
    story.bed.lab.virsh(&["domjobabort", "web01"])?;
    let left = foreign_marks(&story.vm, &["vda"])?;
    ensure!(left.len() == 6, "{left:?}");
    let mut expected = "full: first-backup";
    for round in 3..6 {
        let write = format!("write -P {round} {round}M 64k");
        story.vm.write("vda", &write)?;
        let report = story.backup(expected)?;
        ensure!(report["warnings"] == json!([]), "{report}");
        ensure!(ours(&story)?.len() == 1, "{:?}", ours(&story)?);
        expected = "incremental";
    }
    ensure!(foreign_marks(&story.vm, &["vda"])? == left, "{left:?}");
    theirs_goes_on(&story)?;
    story.vm.write("vda", "write -P 6 6M 64k")?;
    let report = story.backup("incremental")?;
    let healed = report["healed"].to_string();
    ensure!(
        healed.contains("told the hypervisor again about mark"),
        "{healed}"
    );
    ensure!(ours(&story)?.len() == 1, "{:?}", ours(&story)?);
    story.all_points_are_right()
}

/// Its next increment works as its users make it work after a crash. It bears
/// no checkpoint but its own, of whomever, so libvirt is made to forget ours for
/// that time; the bitmap stays.
fn theirs_goes_on(story: &Story) -> Result<()> {
    let refused = virtnbdbackup(story, "inc").output()?;
    let told = String::from_utf8_lossy(&refused.stderr);
    ensure!(told.contains("Foreign checkpoint found: [hw-"), "{told}");
    let forget = ["checkpoint-delete", "web01", "--metadata"];
    for mark in ours(story)? {
        let forget = [&forget[..], &[&mark]].concat();
        story.bed.lab.virsh(&forget)?;
    }
    let partial = tool("find").arg(story.bed.lab.path("theirs"));
    partial.args(["-name", "*.partial", "-delete"]).run()?;
    theirs(story, "inc").map(drop)
}

/// qmpbackup leaves its filter in the guest's path when it is killed.
#[test]
fn the_filter_that_a_killed_qmpbackup_leaves_costs_no_write_and_is_left_alone() -> Result<()> {
    let mut story = Story::of_one_disk()?;
    story.backup("full: first-backup")?;
    let bitmap = "qmpbackup-4d2b7b7e-0e3f-4c19-9f3e-000000000001";
    add_bitmap(&story.vm, "vda", bitmap, true)?;
    let node = root_node(&story.vm, "vda")?;
    leave_filter(&story, &node)?;
    // All that the guest writes still goes through to the disk below, so the
    // filter harms nothing but the guest's speed.
    for (write, dirty) in [
        ("write -P 2 8M 1M", 16 << 16),
        ("write -z -u 8M 128k", 2 << 16),
    ] {
        story.vm.write("vda", write)?;
        let report = story.backup("incremental")?;
        ensure!(report["disks"][0]["dirty_bytes"] == dirty, "{report}");
    }
    let theirs = foreign_marks(&story.vm, &["vda"])?;
    ensure!(theirs == [format!("vda/{bitmap} recording")], "{theirs:?}");
    take_filter_away(&story, &node)?;
    story.vm.write("vda", "write -P 3 10M 64k")?;
    let report = story.backup("incremental")?;
    ensure!(report["disks"][0]["dirty_bytes"] == 1 << 16, "{report}");
    ensure!(foreign_marks(&story.vm, &["vda"])? == theirs);
    story.all_points_are_right()
}

/// What the guest's device reads from and writes to.
fn drive(node: &str) -> Value {
    let device = "/machine/peripheral/virtio-disk0/virtio-backend";
    json!({"path": device, "property": "drive", "value": node})
}

/// The nodes of a run of qmpbackup, as many as there are when it is killed.
fn leave_filter(story: &Story, node: &str) -> Result<()> {
    let fleece = story.bed.lab.path("INC-1-vda.fleece.qcow2");
    let create = tool("qemu-img").args(["create", "-q", "-f", "qcow2"]);
    create.arg(&fleece).arg("64M").run()?;
    let add = |node: Value| qmp(&story.vm, "blockdev-add", &node);
    add(
        json!({"driver": "qcow2", "node-name": "qmpbackup-vda-fleece",
        "file": {"driver": "file", "filename": fleece}}),
    )?;
    add(
        json!({"driver": "copy-before-write", "node-name": "qmpbackup-vda-cbw",
        "file": node, "target": "qmpbackup-vda-fleece",
        "on-cbw-error": "break-snapshot", "cbw-timeout": 45}),
    )?;
    qmp(&story.vm, "qom-set", &drive("qmpbackup-vda-cbw"))?;
    add(
        json!({"driver": "snapshot-access", "node-name": "qmpbackup-vda-snap",
        "file": "qmpbackup-vda-cbw"}),
    )?;
    Ok(())
}

/// Fails if one of them is gone.
fn take_filter_away(story: &Story, node: &str) -> Result<()> {
    let delete = |name: &str| {
        let node = json!({"node-name": format!("qmpbackup-vda-{name}")});
        qmp(&story.vm, "blockdev-del", &node)
    };
    delete("snap")?;
    qmp(&story.vm, "qom-set", &drive(node))?;
    delete("cbw")?;
    delete("fleece").map(drop)
}

/// A snapshot that a program took over QMP, and left when it was killed.
#[test]
fn a_snapshot_left_behind_libvirts_back_is_refused_and_costs_no_write_once_it_is_merged()
-> Result<()> {
    let mut story = Story::of_one_disk()?;
    story.backup("full: first-backup")?;
    let node = root_node(&story.vm, "vda")?;
    let overlay = story.bed.lab.path("left.qcow2");
    let create = tool("qemu-img").args(["create", "-q", "-f", "qcow2"]);
    create.arg(&overlay).arg("64M").run()?;
    let add = json!({"driver": "qcow2", "node-name": "left", "backing": null,
        "file": {"driver": "file", "filename": overlay}});
    qmp(&story.vm, "blockdev-add", &add)?;
    let snapshot = json!({"node": node, "overlay": "left"});
    qmp(&story.vm, "blockdev-snapshot", &snapshot)?;
    story.vm.write("vda", "write -P 2 8M 1M")?;
    let (code, told) = story.bed.fail(&["backup", "web01"])?;
    ensure!(code == 1, "{code}: {told}");
    for words in [
        "error: cannot back up disk `vda` of VM `web01`: its image chain was changed behind",
        "state: no restore point was added; earlier ones are untouched",
        "hint: another program put a snapshot or a filter over it behind the hypervisor's back",
    ] {
        ensure!(told.contains(words), "{told}");
    }
    story.all_points_are_right()?;
    let commit = json!({"job-id": "merge", "device": "left", "top-node": "left"});
    qmp(&story.vm, "block-commit", &commit)?;
    wait("the merge", || {
        let done = qmp(&story.vm, "block-job-complete", &json!({"device": "merge"}));
        let jobs = qmp(&story.vm, "query-jobs", &json!({}))?;
        Ok(done.is_ok() || jobs == json!([]))
    })?;
    wait("its end", || {
        Ok(qmp(&story.vm, "query-jobs", &json!({}))? == json!([]))
    })?;
    story.vm.write("vda", "write -P 3 10M 64k")?;
    let report = story.backup("incremental")?;
    // The merge wrote what the guest had written: tracked, not lost.
    ensure!(report["disks"][0]["dirty_bytes"] == 17 << 16, "{report}");
    story.all_points_are_right()
}
