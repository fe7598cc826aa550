//! What becomes of marks.

use anyhow::{Context as _, Result, ensure};
use highwater_model::step::Step;
use highwater_testkit::BareVm;
use serde_json::{Value, json};

use super::{heals, image, is_well, one, qcow2, qemu_img, two, unseen};
use crate::tale::{BareBed, Tale};
use crate::waiting::Waiting;

pub(super) fn all_is_well() -> Result<()> {
    heals(&mut two()?, &["incremental"])
}

pub(super) fn first_backup() -> Result<()> {
    two()?.ends_well()
}

fn restarted(tale: &Tale, end: fn(&BareVm) -> Result<()>) -> Result<()> {
    end(&tale.vm)?;
    tale.vm.start()
}

pub(super) fn qemu_killed_before_its_bitmap_was_stored() -> Result<()> {
    let mut tale = one()?;
    restarted(&tale, BareVm::kill)?;
    heals(&mut tale, &["rescan: bitmap-missing"])
}

pub(super) fn qemu_killed_after_its_bitmap_was_stored() -> Result<()> {
    let mut tale = one()?;
    restarted(&tale, BareVm::quit)?;
    tale.writes(5)?;
    restarted(&tale, BareVm::kill)?;
    heals(&mut tale, &["rescan: bitmap-inconsistent"])
}

/// Returns a disk's node and its mark, as arguments of QEMU's.
fn mark_of(tale: &Tale, disk: &str) -> Result<Value> {
    let mark = tale.marks(disk)?.pop().context("a mark")?;
    Ok(json!({"node": tale.vm.node(disk)?, "name": mark}))
}

fn remove(tale: &Tale, disk: &str) -> Result<()> {
    let mark = mark_of(tale, disk)?;
    tale.vm.qmp("block-dirty-bitmap-remove", &mark).map(drop)
}

pub(super) fn bitmap_removed_while_the_vm_runs() -> Result<()> {
    let mut tale = one()?;
    remove(&tale, "vda")?;
    heals(&mut tale, &["rescan: bitmap-missing"])
}

pub(super) fn bitmap_removed_while_the_vm_is_off() -> Result<()> {
    let mut tale = one()?;
    let mark = tale.marks("vda")?.pop().context("a mark")?;
    tale.vm.quit()?;
    let image = image(&tale, "vda");
    let image = image.to_str().context("a path is text")?;
    qemu_img(&["bitmap", "--remove", image, &mark])?;
    tale.vm.start()?;
    heals(&mut tale, &["rescan: bitmap-missing"])
}

pub(super) fn bitmap_disabled() -> Result<()> {
    for is_restarted in [false, true] {
        let mut tale = one()?;
        let mark = mark_of(&tale, "vda")?;
        tale.vm.qmp("block-dirty-bitmap-disable", &mark)?;
        if is_restarted {
            restarted(&tale, BareVm::quit)?;
        }
        heals(&mut tale, &["rescan: bitmap-not-recording"])?;
    }
    Ok(())
}

/// Makes the mark's bitmap anew, with other properties.
fn remade(tale: &Tale, properties: &Value) -> Result<()> {
    let mut mark = mark_of(tale, "vda")?;
    remove(tale, "vda")?;
    for (name, value) in properties.as_object().into_iter().flatten() {
        mark[name] = value.clone();
    }
    tale.vm.qmp("block-dirty-bitmap-add", &mark).map(drop)
}

pub(super) fn bitmap_remade_only_in_memory() -> Result<()> {
    let mut tale = one()?;
    remade(&tale, &json!({"persistent": false}))?;
    heals(&mut tale, &["rescan: bitmap-not-persistent"])
}

pub(super) fn bitmap_remade_with_other_granularity() -> Result<()> {
    let mut tale = one()?;
    remade(&tale, &json!({"persistent": true, "granularity": 4096}))?;
    heals(&mut tale, &["rescan: bitmap-granularity"])
}

/// What the bitmap hides is among what is audited.
fn lies(tale: &mut Tale) -> Result<()> {
    let uri = tale.vm.uri();
    let report = tale.backs_up_with(&uri, &["rescan: bitmap-lied"], &["--audit", "100%"])?;
    ensure!(report["warnings"].to_string().contains("lied"), "{report}");
    is_well(tale)
}

pub(super) fn bitmap_remade_over_qmp() -> Result<()> {
    let mut tale = one()?;
    remade(&tale, &json!({"persistent": true}))?;
    lies(&mut tale)
}

fn cleared(tale: &Tale) -> Result<()> {
    let mark = mark_of(tale, "vda")?;
    tale.vm.qmp("block-dirty-bitmap-clear", &mark).map(drop)
}

pub(super) fn bitmap_cleared() -> Result<()> {
    let mut tale = one()?;
    cleared(&tale)?;
    lies(&mut tale)
}

pub(super) fn lie_found_by_a_differential() -> Result<()> {
    let mut tale = one()?;
    cleared(&tale)?;
    let uri = tale.vm.uri();
    let args = ["--level", "differential", "--audit", "100%"];
    tale.backs_up_with(&uri, &["rescan: bitmap-lied"], &args)?;
    ensure!(tale.marks("vda")?.is_empty(), "{:?}", tale.marks("vda")?);
    heals(&mut tale, &["rescan: bitmap-lied"])
}

pub(super) fn bitmaps_gone_on_some_disks() -> Result<()> {
    let mut tale = two()?;
    remove(&tale, "vdb")?;
    heals(&mut tale, &["incremental", "rescan: bitmap-missing"])
}

/// Somebody's backup uses it.
pub(super) fn bitmap_in_use() -> Result<()> {
    let mut tale = one()?;
    let mark = mark_of(&tale, "vda")?;
    let target = tale.bed.lab.path("theirs.qcow2");
    tale.vm.qmp(
        "drive-backup",
        &json!({"job-id": "theirs", "device": "vda", "target": target, "sync": "bitmap",
            "bitmap": mark["name"], "bitmap-mode": "never", "speed": 1}),
    )?;
    let told = tale.bed.fail(&tale.vm.uri(), &["backup", "kvm0"], 11)?;
    ensure!(told.contains("error: "), "{told}");
    ensure!(tale.marks("vda")?.len() == 1);
    super::others::cancel(&tale, "theirs")?;
    heals(&mut tale, &["incremental"])
}

/// Neither made by this QEMU with the mark, nor read from the image.
pub(super) fn bitmap_remade_after_a_crash() -> Result<()> {
    let mut tale = one()?;
    let name = tale.marks("vda")?.pop().context("a mark")?;
    restarted(&tale, BareVm::kill)?;
    let mark = json!({"node": tale.vm.node("vda")?, "name": name, "persistent": true});
    tale.vm.qmp("block-dirty-bitmap-add", &mark)?;
    heals(&mut tale, &["rescan: mark-remade"])
}

/// A backup of which everybody dies at a step.
fn dies_at(tale: &Tale, step: Step) -> Result<()> {
    let command = tale.bed.command(&tale.vm.uri(), &["backup", "kvm0"]);
    let mut waiting = Waiting::at(command, &tale.bed.lab.dir(), step, "wait")?;
    waiting.kill_all()
}

pub(super) fn died_before_commit() -> Result<()> {
    let mut tale = one()?;
    dies_at(&tale, Step::Committing)?;
    ensure!(tale.marks("vda")?.len() == 2, "{:?}", tale.marks("vda")?);
    ensure!(tale.points()? == 1);
    tale.writes(5)?;
    tale.backs_up(&["incremental"])?;
    is_well(&mut tale)
}

pub(super) fn died_before_settling() -> Result<()> {
    let mut tale = one()?;
    dies_at(&tale, Step::Committed)?;
    ensure!(tale.marks("vda")?.len() == 2, "{:?}", tale.marks("vda")?);
    tale.keeps_newest()?;
    let report = tale.backs_up(&["incremental"])?;
    // Since the newer one nobody has written.
    ensure!(report["disks"][0]["dirty_bytes"] == 0, "{report}");
    is_well(&mut tale)
}

/// The session still holds the VM.
pub(super) fn dead_session() -> Result<()> {
    let mut tale = one()?;
    for step in [Step::QmpSwitched, Step::Begun] {
        dies_at(&tale, step)?;
        tale.backs_up(&["incremental"])?;
        ensure!(tale.vm.state()? == "running");
        tale.no_files()?;
    }
    is_well(&mut tale)
}

pub(super) fn partial_runs() -> Result<()> {
    let mut tale = two()?;
    for (round, disk) in (5..).zip(["vda", "vda", "vdb"]) {
        tale.writes(round)?;
        let report = tale.bed.backup(&tale.vm.uri(), "kvm0", &["-d", disk])?;
        ensure!(crate::support::mode(&report, disk) == "incremental");
        ensure!(report["disks"].as_array().map(Vec::len) == Some(1));
    }
    heals(&mut tale, &["incremental"])
}

pub(super) fn copies_only() -> Result<()> {
    let bed = BareBed::start()?;
    let mut tale = unseen(&bed, &[qcow2("vda")])?;
    tale.writes(1)?;
    let uri = tale.vm.uri();
    tale.backs_up_with(&uri, &["copy"], &["--level", "copy"])?;
    heals(&mut tale, &["rescan: no-mark-yet"])
}
