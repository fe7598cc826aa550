//! Others at the same VM: their marks, jobs and servers.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::{heals, one};
use crate::support::mode;
use crate::tale::Tale;
use crate::waiting::wait_until;

pub(super) fn foreign_marks() -> Result<()> {
    let mut tale = one()?;
    let node = tale.vm.node("vda")?;
    for (name, is_disabled) in [("other", false), ("hw-other", false), ("idle", true)] {
        let new = json!({"node": node, "name": name, "persistent": true, "disabled": is_disabled});
        tale.vm.qmp("block-dirty-bitmap-add", &new)?;
    }
    let theirs = |tale: &Tale| -> Result<Vec<_>> {
        let all = tale.vm.bitmaps("vda")?.into_iter();
        let names = ["other", "hw-other", "idle"];
        let theirs = all.filter(|it| names.contains(&it.name.as_str()));
        Ok(theirs
            .map(|it| (it.name, it.dirty_bytes, it.recording))
            .collect())
    };
    tale.writes(3)?;
    let before = theirs(&tale)?;
    ensure!(before.len() == 3, "{before:?}");
    tale.backs_up(&["incremental"])?;
    ensure!(theirs(&tale)? == before, "not {before:?}");
    tale.vm.quit()?;
    tale.vm.start()?;
    tale.backs_up(&["incremental"])?;
    ensure!(theirs(&tale)?.len() == 3);
    tale.ends_well()
}

pub(super) fn other_repository() -> Result<()> {
    let mut tale = one()?;
    let other = tale.bed.lab.path("other");
    let other = other.to_str().context("a path is text")?;
    let uri = tale.vm.uri();
    tale.bed
        .run(&uri, &["init", "-r", other, "--encryption", "none"])?;
    for (round, expected) in [(5, "full: first-backup"), (6, "incremental")] {
        tale.writes(round)?;
        let report = tale.bed.backup(&uri, "kvm0", &["-r", other])?;
        ensure!(mode(&report, "vda") == expected, "{report}");
        tale.backs_up(&["incremental"])?;
        ensure!(tale.marks("vda")?.len() == 2, "{:?}", tale.marks("vda")?);
    }
    tale.ends_well()
}

/// Ends a job of somebody else's.
pub(super) fn cancel(tale: &Tale, job: &str) -> Result<()> {
    tale.vm
        .qmp("block-job-cancel", &json!({"device": job, "force": true}))?;
    wait_until(|| Ok(tale.vm.graph()?.jobs.is_empty()))
}

/// Refused while it runs, and nothing is changed.
fn is_refused(tale: &Tale) -> Result<()> {
    let before = tale.vm.graph()?;
    let told = tale.bed.fail(&tale.vm.uri(), &["backup", "kvm0"], 11)?;
    ensure!(told.contains("state: "), "{told}");
    ensure!(tale.vm.graph()? == before, "{told}");
    tale.no_files()
}

pub(super) fn foreign_block_job() -> Result<()> {
    let mut tale = one()?;
    let target = tale.bed.lab.path("mirror.qcow2");
    tale.vm.qmp(
        "drive-mirror",
        &json!({"job-id": "theirs", "device": "vda", "target": target, "sync": "full", "speed": 1}),
    )?;
    is_refused(&tale)?;
    cancel(&tale, "theirs")?;
    heals(&mut tale, &["incremental"])
}

pub(super) fn foreign_nbd_server() -> Result<()> {
    let mut tale = one()?;
    let path = tale.bed.lab.path("theirs.sock");
    let address = json!({"addr": {"type": "unix", "data": {"path": path}}});
    tale.vm.qmp("nbd-server-start", &address)?;
    is_refused(&tale)?;
    tale.vm.qmp("nbd-server-stop", &json!({}))?;
    heals(&mut tale, &["incremental"])
}
