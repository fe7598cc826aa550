//! Others at the same VM: their marks, jobs and servers, and a dead session.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Result, ensure};
use highwater_testkit::BitmapPlace;
use serde_json::json;

use super::tracked::{Tracked, text};

/// Bitmaps that are not ours, and what they have recorded.
fn theirs(it: &Tracked) -> Result<BTreeSet<(String, u64, bool)>> {
    let places = it.vm.bitmaps_everywhere()?;
    let theirs = places
        .into_iter()
        .filter(|it| !it.bitmap.name.starts_with("hw-"));
    Ok(theirs
        .map(|BitmapPlace { bitmap, .. }| (bitmap.name, bitmap.dirty_bytes, bitmap.recording))
        .collect())
}

/// Checkpoints before and after ours, a bitmap without a checkpoint, and one
/// that is disabled.
pub(super) fn foreign_marks() -> Result<()> {
    let mut it = Tracked::two()?;
    it.virsh(&["checkpoint-create-as", "web01", "--name", "other.1"])?;
    let node = it.node("vda")?;
    for (name, disabled) in [("other", false), ("hw-other", false), ("idle", true)] {
        let new = json!({"node": node, "name": name, "persistent": true, "disabled": disabled});
        it.qmp("block-dirty-bitmap-add", &new)?;
    }
    for number in 2..5 {
        it.write()?;
        let before = theirs(&it)?;
        ensure!(before.len() >= 4, "{before:?}");
        let report = it.back_up(&[])?;
        ensure!(
            crate::support::mode(&report, "vda") == "incremental",
            "{report}"
        );
        ensure!(
            theirs(&it)? == before,
            "{:?} instead of {before:?}",
            theirs(&it)?
        );
        // Theirs becomes the child of ours, and ours the child of theirs.
        let name = format!("other.{number}");
        it.virsh(&["checkpoint-create-as", "web01", "--name", &name])?;
        it.while_off(|| Ok(()))?;
    }
    let kept: BTreeSet<String> = it.vm.checkpoints()?.into_iter().collect();
    for number in 1..5 {
        ensure!(kept.contains(&format!("other.{number}")), "{kept:?}");
    }
    ensure!(kept.len() == 5, "{kept:?}");
    // One of theirs that libvirt knows and QEMU lost is no trouble of ours.
    let lost = json!({"node": it.node("vda")?, "name": "other.2"});
    it.qmp("block-dirty-bitmap-remove", &lost)?;
    it.write()?;
    let before = theirs(&it)?;
    it.back_up(&[])?;
    ensure!(theirs(&it)? == before);
    for number in 1..5 {
        let name = format!("other.{number}");
        it.virsh(&["checkpoint-delete", "web01", &name, "--metadata"])?;
    }
    it.ends_well()
}

pub(super) fn other_repository() -> Result<()> {
    crate::levels::two_repositories_track_one_vm_independently()
}

pub(super) fn foreign_backup_job() -> Result<()> {
    let mut it = Tracked::start()?;
    let (xml, socket) = (it.bed.lab.path("job.xml"), it.bed.lab.path("job.sock"));
    let job = format!(
        "<domainbackup mode='pull'><server transport='unix' socket='{}'/></domainbackup>",
        socket.display()
    );
    fs::write(&xml, job)?;
    it.virsh(&["backup-begin", "web01", text(&xml)?])?;
    it.is_refused(
        11,
        &[
            "another program's backup job runs on it",
            "`virsh domjobabort web01`",
        ],
    )?;
    ensure!(it.vm.job_running()?);
    it.virsh(&["domjobabort", "web01"])?;
    it.heals("incremental")?;
    it.ends_well()
}

pub(super) fn foreign_block_job() -> Result<()> {
    let mut it = Tracked::two()?;
    let copy = it.bed.lab.path("web01-vda.copy");
    let begin = ["blockcopy", "web01", "vda", "--transient-job", "--dest"];
    it.virsh(&[&begin[..], &[text(&copy)?]].concat())?;
    it.is_refused(11, &["a job runs on it"])?;
    it.virsh(&["blockjob", "web01", "vda", "--abort"])?;
    it.heals("incremental")?;
    it.ends_well()
}

pub(super) fn foreign_nbd_server() -> Result<()> {
    let mut it = Tracked::start()?;
    let socket = it.bed.lab.path("user.sock");
    let at = json!({"addr": {"type": "unix", "data": {"path": socket}}});
    it.qmp("nbd-server-start", &at)?;
    it.is_refused(11, &["NBD server already running"])?;
    it.check_marks()?;
    it.vm.monitor(&json!({"execute": "nbd-server-stop"}))?;
    it.heals("incremental")?;
    it.ends_well()
}

pub(super) fn dead_session() -> Result<()> {
    crate::stress::all_processes_killed_together_are_healed_by_the_next_backup()
}
