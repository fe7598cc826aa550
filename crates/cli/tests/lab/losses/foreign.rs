//! Checkpoints, bitmaps, jobs and servers of others: respected, and working
//! afterwards.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{MIB, Vm, tool};
use serde_json::json;

use super::{Story, add_bitmap, foreign_marks, qmp, root_node};
use crate::support::{disk, reference};

/// Disables a bitmap of another tool.
fn disable(vm: &Vm, disk: &str, name: &str) -> Result<()> {
    let node = root_node(vm, disk)?;
    let arguments = json!({"node": node, "name": name});
    qmp(vm, "block-dirty-bitmap-disable", &arguments).map(drop)
}

fn checkpoint(story: &Story, name: &str) -> Result<()> {
    let create = ["checkpoint-create-as", "web01", "--name", name];
    story.bed.lab.virsh(&create).map(drop)
}

/// Backs up with libvirt alone since a checkpoint of its own, and returns the
/// ranges that it calls dirty.
fn dirty_since(story: &Story, name: &str) -> Result<String> {
    let socket = story.bed.lab.path("theirs.sock");
    let xml = story.bed.lab.path("theirs.xml");
    let text = format!(
        "<domainbackup mode='pull'><incremental>{name}</incremental>\
         <server transport='unix' socket='{}'/></domainbackup>",
        socket.display()
    );
    std::fs::write(&xml, text)?;
    let virsh = |args: &[&str]| story.bed.lab.virsh(args);
    virsh(&["backup-begin", "web01", xml.to_str().context("text")?])?;
    let export = format!("nbd+unix:///vda?socket={}", socket.display());
    let map = tool("nbdinfo").args(["--map=qemu:dirty-bitmap:backup-vda"]);
    let map = map.arg(&export).run();
    virsh(&["domjobabort", "web01"])?;
    let map = map?;
    let dirty = map.lines().filter(|line| line.ends_with("dirty"));
    let words = |line: &str| -> String {
        let words: Vec<&str> = line.split_whitespace().take(2).collect();
        words.join("+")
    };
    Ok(dirty.map(words).collect::<Vec<_>>().join(" "))
}

#[test]
fn foreign_checkpoints_and_bitmaps_are_beside_ours_and_work_afterwards() -> Result<()> {
    let mut story = Story::of_one_disk()?;
    // Stored, opened and not closed: nobody can use it any more.
    add_bitmap(&story.vm, "vda", "theirs-broken", true)?;
    story.vm.destroy()?;
    story.vm.start()?;
    story.vm.kill_qemu()?;
    story.vm.start()?;
    add_bitmap(&story.vm, "vda", "theirs-kept", true)?;
    add_bitmap(&story.vm, "vda", "theirs-passing", false)?;
    add_bitmap(&story.vm, "vda", "theirs-disabled", true)?;
    disable(&story.vm, "vda", "theirs-disabled")?;
    checkpoint(&story, "theirs-1")?;
    let theirs = foreign_marks(&story.vm, &["vda"])?;
    ensure!(theirs.len() == 6, "{theirs:?}");
    story.backup("full: first-backup")?;
    story.vm.write("vda", "write -P 2 8M 1M")?;
    story.backup("incremental")?;
    // One that depends on our mark, as libvirt counts: it is no reason to keep it.
    checkpoint(&story, "theirs-2")?;
    for round in 3..6 {
        let write = format!("write -P {round} {round}M 64k");
        story.vm.write("vda", &write)?;
        let report = story.backup("incremental")?;
        let warnings = report["warnings"].as_array().map(Vec::len);
        ensure!(warnings == Some(0), "{report}");
    }
    let left = foreign_marks(&story.vm, &["vda"])?;
    let mut expected = theirs.clone();
    expected.extend(["theirs-2", "vda/theirs-2 recording"].map(str::to_owned));
    expected.sort();
    ensure!(left == expected, "{left:?}");
    let ours = story.vm.checkpoints()?;
    ensure!(ours.len() == 3, "{ours:?}");
    let since_2 = dirty_since(&story, "theirs-2")?;
    ensure!(
        since_2 == "3145728+65536 4194304+65536 5242880+65536",
        "{since_2}"
    );
    let since_1 = dirty_since(&story, "theirs-1")?;
    ensure!(since_1.ends_with("8388608+1048576"), "{since_1}");
    // And ours after theirs.
    story.vm.write("vda", "write -P 7 9M 64k")?;
    story.backup("incremental")?;
    story.all_points_are_right()
}

/// Starts an NBD server in the VM's QEMU, as a user would; `export`s a disk.
fn serve(story: &Story, export: Option<&str>) -> Result<PathBuf> {
    let socket = story.bed.lab.path("user.sock");
    let address = json!({"type": "unix", "data": {"path": socket}});
    qmp(&story.vm, "nbd-server-start", &json!({"addr": address}))?;
    if let Some(disk) = export {
        let node = root_node(&story.vm, disk)?;
        let export = json!({"type": "nbd", "id": "user", "node-name": node, "name": "user"});
        qmp(&story.vm, "block-export-add", &export)?;
    }
    Ok(socket)
}

/// The user's export shows the disk as it is.
fn still_serves(story: &Story, socket: &std::path::Path, name: &str) -> Result<()> {
    story.vm.flush("vda")?;
    let url = format!("nbd+unix:///user?socket={}", socket.display());
    let copy = story.bed.lab.path(name);
    let convert = tool("qemu-img").args(["convert", "-f", "raw", "-O", "raw", &url]);
    convert.arg(&copy).run()?;
    let now = reference(&story.bed, &story.vm, "vda", &format!("{name}-now"))?;
    crate::support::assert_same(&now, &copy)
}

const OCCUPIED: [&str; 4] = [
    "error: cannot freeze a point in time of VM `web01`",
    "NBD server already running",
    "state: no restore point was added",
    "hint: QEMU has one NBD server at a time, and another program has started it",
];

#[test]
fn a_users_nbd_server_is_told_of_and_left_alone() -> Result<()> {
    let mut story = Story::of_one_disk()?;
    story.backup("full: first-backup")?;
    for export in [None, Some("vda")] {
        let socket = serve(&story, export)?;
        story.vm.write("vda", "write -P 2 8M 1M")?;
        story.busy(&OCCUPIED)?;
        story.busy(&OCCUPIED)?;
        if export.is_none() {
            let node = root_node(&story.vm, "vda")?;
            let later = json!({"type": "nbd", "id": "user", "node-name": node, "name": "user"});
            qmp(&story.vm, "block-export-add", &later)?;
        }
        still_serves(&story, &socket, "served.raw")?;
        ensure!(story.vm.checkpoints()?.len() == 1);
        qmp(&story.vm, "nbd-server-stop", &json!({}))?;
        let report = story.backup("incremental")?;
        ensure!(disk(&report, "vda")["dirty_bytes"] == MIB, "{report}");
        story.bed.assert_tidy(&story.vm, 1)?;
    }
    story.all_points_are_right()
}

/// A job of the monitor's, of which libvirt knows nothing.
fn copy_slowly(story: &Story, mark: Option<&str>) -> Result<()> {
    let size = 64 * MIB;
    let target = json!({"driver": "null-co", "node-name": "theirs", "size": size});
    qmp(&story.vm, "blockdev-add", &target)?;
    let mut job = json!({"job-id": "theirs", "device": root_node(&story.vm, "vda")?,
        "target": "theirs", "sync": "full", "speed": 65536});
    if let Some(mark) = mark {
        job["sync"] = json!("bitmap");
        job["bitmap"] = json!(mark);
        job["bitmap-mode"] = json!("never");
    }
    qmp(&story.vm, "blockdev-backup", &job).map(drop)
}

/// Fails unless their job runs; ends it.
fn end_copy(story: &Story) -> Result<()> {
    let jobs = qmp(&story.vm, "query-jobs", &json!({}))?;
    ensure!(jobs.to_string().contains("theirs"), "it is gone: {jobs}");
    qmp(&story.vm, "job-cancel", &json!({"id": "theirs"}))?;
    super::wait("the end of their job", || {
        let jobs = qmp(&story.vm, "query-jobs", &json!({}))?;
        Ok(!jobs.to_string().contains("theirs"))
    })?;
    qmp(&story.vm, "blockdev-del", &json!({"node-name": "theirs"})).map(drop)
}

#[test]
fn a_mark_that_somebody_uses_is_refused_as_busy_and_theirs_goes_on() -> Result<()> {
    let mut story = Story::of_one_disk()?;
    story.backup("full: first-backup")?;
    let mark = story.vm.checkpoints()?.remove(0);
    story.vm.write("vda", "write -P 2 8M 32M")?;
    copy_slowly(&story, Some(&mark))?;
    story.busy(&[
        "cannot back up disk `vda` of VM `web01`: its bitmap is in use",
        "state: no restore point was added; earlier ones are untouched",
        "hint: a job or an NBD export of another program uses it",
    ])?;
    end_copy(&story)?;
    let report = story.backup("incremental")?;
    ensure!(disk(&report, "vda")["dirty_bytes"] == 32 * MIB, "{report}");
    story.all_points_are_right()?;
    story.bed.assert_tidy(&story.vm, 1)
}

#[test]
fn a_job_that_libvirt_does_not_know_of_is_left_alone_and_costs_no_point() -> Result<()> {
    let mut story = Story::of_one_disk()?;
    story.backup("full: first-backup")?;
    copy_slowly(&story, None)?;
    story.vm.write("vda", "write -P 2 8M 1M")?;
    story.backup("incremental")?;
    end_copy(&story)?;
    story.vm.write("vda", "write -P 3 9M 1M")?;
    story.backup("incremental")?;
    story.all_points_are_right()?;
    story.bed.assert_tidy(&story.vm, 1)
}
