//! What becomes of bitmaps and checkpoints.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{DiskSpec, Vm};
use serde_json::{Value, json};

use super::tracked::{SIZE, Tracked, qemu_img, says, text};
use crate::support::{Bed, assert_same, mode, point, reference};

pub(super) fn all_is_well() -> Result<()> {
    let mut it = Tracked::two()?;
    it.heals("incremental")?;
    it.ends_well()
}

pub(super) fn first_backup() -> Result<()> {
    Tracked::two()?.ends_well()
}

pub(super) fn qemu_killed_before_its_bitmap_was_stored() -> Result<()> {
    let mut it = Tracked::two()?;
    it.vm.kill_qemu()?;
    it.vm.start()?;
    it.heals("rescan: bitmap-missing")?;
    it.ends_well()
}

pub(super) fn qemu_killed_after_its_bitmap_was_stored() -> Result<()> {
    let mut it = Tracked::start()?;
    it.while_off(|| Ok(()))?;
    it.heals("incremental")?;
    it.while_off(|| Ok(()))?;
    it.write()?;
    it.vm.kill_qemu()?;
    it.vm.start()?;
    // QEMU resizes no disk with a broken bitmap.
    let grow = ["blockresize", "web01", "vda", "4M"];
    ensure!(it.virsh(&grow).is_err(), "the bitmap is not broken");
    it.heals("rescan: bitmap-inconsistent")?;
    it.virsh(&grow)?;
    it.ends_well()
}

fn remove(it: &Tracked, target: &str) -> Result<()> {
    let of = json!({"node": it.node(target)?, "name": it.mark()?});
    it.qmp("block-dirty-bitmap-remove", &of).map(drop)
}

/// Makes a bitmap of the mark's name anew, behind libvirt's back.
fn remake(it: &Tracked, persistent: bool, granularity: u32) -> Result<()> {
    let (node, name) = (it.node("vda")?, it.mark()?);
    remove(it, "vda")?;
    let new =
        json!({"node": node, "name": name, "persistent": persistent, "granularity": granularity});
    it.qmp("block-dirty-bitmap-add", &new).map(drop)
}

pub(super) fn bitmap_removed_while_the_vm_runs() -> Result<()> {
    let mut it = Tracked::start()?;
    remove(&it, "vda")?;
    it.heals("rescan: bitmap-missing")?;
    it.ends_well()
}

pub(super) fn bitmap_removed_while_the_vm_is_off() -> Result<()> {
    let mut it = Tracked::start()?;
    let (mark, image) = (it.mark()?, it.vm.image("vda"));
    it.while_off(|| qemu_img(&["bitmap", "--remove", text(&image)?, &mark]))?;
    it.heals("rescan: bitmap-missing")?;
    it.ends_well()
}

pub(super) fn bitmap_disabled() -> Result<()> {
    let mut it = Tracked::start()?;
    for restarted in [false, true] {
        let of = json!({"node": it.node("vda")?, "name": it.mark()?});
        it.qmp("block-dirty-bitmap-disable", &of)?;
        it.write()?;
        if restarted {
            it.while_off(|| Ok(()))?;
        }
        it.heals("rescan: bitmap-not-recording")?;
    }
    it.ends_well()
}

pub(super) fn bitmap_remade_only_in_memory() -> Result<()> {
    let mut it = Tracked::start()?;
    remake(&it, false, 64 << 10)?;
    it.heals("rescan: bitmap-not-persistent")?;
    it.ends_well()
}

pub(super) fn bitmap_remade_with_other_granularity() -> Result<()> {
    let mut it = Tracked::start()?;
    remake(&it, true, 4 << 10)?;
    it.heals("rescan: bitmap-granularity")?;
    it.ends_well()
}

/// The bitmap hides something; the disk is so small that the audit reads all of it.
pub(super) fn finds_the_lie(it: &mut Tracked) -> Result<()> {
    let report = it.heals_with_warnings(&["rescan: bitmap-lied"])?;
    says(&report, "warnings", "bitmap lied")
}

pub(super) fn bitmap_remade_over_qmp() -> Result<()> {
    let mut it = Tracked::start()?;
    remake(&it, true, 64 << 10)?;
    finds_the_lie(&mut it)?;
    it.ends_well()
}

pub(super) fn bitmaps_gone_on_some_disks() -> Result<()> {
    let mut it = Tracked::two()?;
    remove(&it, "vdb")?;
    it.heals_each(&["incremental", "rescan: bitmap-missing"])?;
    it.heals("incremental")?;
    // The same, with the first of them disabled.
    let of = json!({"node": it.node("vda")?, "name": it.mark()?});
    it.qmp("block-dirty-bitmap-disable", &of)?;
    it.heals_each(&["rescan: bitmap-not-recording", "incremental"])?;
    it.ends_well()
}

/// A backup of somebody else's over QMP, which libvirt knows nothing of, reads
/// what our mark recorded.
pub(super) fn bitmap_in_use() -> Result<()> {
    let mut it = Tracked::start()?;
    let sink = json!({"driver": "null-co", "node-name": "sink", "size": SIZE});
    it.qmp("blockdev-add", &sink)?;
    let (node, mark) = (it.node("vda")?, it.mark()?);
    let job = json!({
        "job-id": "user", "device": node, "target": "sink", "speed": 1,
        "sync": "bitmap", "bitmap": mark, "bitmap-mode": "never",
    });
    it.qmp("blockdev-backup", &job)?;
    it.is_refused(11, &["its bitmap is in use", "end that"])?;
    let jobs = it.vm.monitor(&json!({"execute": "query-jobs"}))?;
    ensure!(jobs[0]["id"] == "user", "{jobs}");
    it.qmp(
        "block-job-cancel",
        &json!({"device": "user", "force": true}),
    )?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while it.vm.monitor(&json!({"execute": "query-jobs"}))? != json!([]) {
        ensure!(Instant::now() < deadline, "their job does not end");
    }
    it.qmp("blockdev-del", &json!({"node-name": "sink"}))?;
    it.heals("incremental")?;
    it.ends_well()
}

pub(super) fn bitmap_remade_after_a_crash() -> Result<()> {
    crate::losses::v1_a_bitmap_re_made_after_a_crash_by_another_tool_is_not_believed()
}

/// A second process that bears the VM's UUID: nobody can say which is QEMU.
pub(super) fn process_unknown() -> Result<()> {
    let mut it = Tracked::start()?;
    let uuid = it.vm.uuid()?;
    // Ends with its stdin, and so with this test.
    let mut double = Command::new("sh")
        .args(["-c", "read line", "sh", "-uuid", &uuid])
        .stdin(Stdio::piped())
        .spawn()?;
    for _ in 0..2 {
        it.heals("rescan: process-unknown")?;
    }
    let document: Value = serde_json::from_str(&it.bed.run(&["doctor", "web01", "--json"])?)?;
    ensure!(document["findings"] == json!([]), "{document:#}");
    ensure!(
        document["next_backup"]["disks"][0]["reason"] == "process-unknown",
        "{document:#}"
    );
    drop(double.stdin.take());
    double.wait()?;
    // The newest mark was made when nobody knew.
    it.heals("rescan: process-unknown")?;
    it.heals("incremental")?;
    it.ends_well()
}

pub(super) fn mark_remade_by_libvirt() -> Result<()> {
    let mut it = Tracked::start()?;
    let mark = it.mark()?;
    it.virsh(&["checkpoint-delete", "web01", &mark])?;
    it.virsh(&[
        "checkpoint-create-as",
        "web01",
        "--name",
        &mark,
        "--diskspec",
        "vda,checkpoint=bitmap",
    ])?;
    it.heals("rescan: mark-remade")?;
    it.ends_well()
}

/// libvirt has no checkpoint of ours any more: it is told again.
fn told_again(it: &mut Tracked) -> Result<()> {
    ensure!(it.vm.checkpoints()?.is_empty());
    let report = it.heals("incremental")?;
    says(&report, "healed", "told the hypervisor again about mark")
}

pub(super) fn undefined_and_defined() -> Result<()> {
    let mut it = Tracked::two()?;
    let xml = it.virsh(&["dumpxml", "--inactive", "web01"])?;
    it.vm.destroy()?;
    it.virsh(&["undefine", "web01", "--checkpoints-metadata"])?;
    it.bed.lab.define(&xml)?;
    it.vm.start()?;
    told_again(&mut it)?;
    it.ends_well()
}

pub(super) fn transient_started_again() -> Result<()> {
    let bed = Bed::start()?;
    let vm: Vm = bed
        .lab
        .vm("web01")
        .uuid("6f4b2d0e-5a3c-4c56-9c39-0f9a5d8c7e11")
        .disk(DiskSpec::qcow2("vda", SIZE))
        .start_transient()?;
    let mut it = Tracked::of_one(bed, vm)?;
    it.heals("full: first-backup")?;
    it.write()?;
    it.vm.destroy()?;
    let xml = it.bed.lab.path("web01.xml");
    it.virsh(&["create", text(&xml)?])?;
    told_again(&mut it)?;
    it.ends_well()
}

pub(super) fn checkpoint_forgotten_while_the_vm_runs() -> Result<()> {
    let mut it = Tracked::two()?;
    let mark = it.mark()?;
    it.virsh(&["checkpoint-delete", "web01", &mark, "--metadata"])?;
    told_again(&mut it)?;
    it.ends_well()
}

pub(super) fn checkpoint_refused() -> Result<()> {
    let mut it = Tracked::start()?;
    let mark = it.mark()?;
    it.virsh(&["checkpoint-delete", "web01", &mark, "--metadata"])?;
    // libvirt cannot keep the record of this one mark.
    let records = it.bed.lab.lib_dir().join("qemu/checkpoint/web01");
    fs::create_dir_all(records.join(format!("{mark}.xml/in-the-way")))?;
    let report = it.heals_with_warnings(&["rescan: mark-refused"])?;
    says(
        &report,
        "warnings",
        "cannot tell the hypervisor again about mark",
    )?;
    it.ends_well()
}

pub(super) fn died_before_commit() -> Result<()> {
    let mut it = Tracked::two()?;
    // What a run leaves that was killed after its begin.
    let mark = it.mark()?;
    let (kept, last) = mark.split_at(mark.len() - 2);
    let newer = format!("{kept}{}", if last == "zz" { "zy" } else { "zz" });
    it.virsh(&["checkpoint-create-as", "web01", "--name", &newer])?;
    let report = it.heals("incremental")?;
    says(
        &report,
        "healed",
        &format!("removed unfinished mark {newer}"),
    )?;
    it.ends_well()
}

pub(super) fn died_before_settling() -> Result<()> {
    let mut it = Tracked::two()?;
    let older = it.mark()?;
    it.heals("incremental")?;
    it.write()?;
    // What a run leaves that was killed after its commit.
    it.virsh(&["checkpoint-create-as", "web01", "--name", &older])?;
    ensure!(it.vm.checkpoints()?.contains(&older));
    it.heals("incremental")?;
    it.ends_well()
}

pub(super) fn copies_only() -> Result<()> {
    let mut it = Tracked::unseen(&[DiskSpec::qcow2("vda", SIZE)])?;
    it.write()?;
    it.back_up(&["-l", "copy"])?;
    it.check_marks()?;
    it.heals("rescan: no-mark-yet")?;
    it.ends_well()
}

pub(super) fn managed_save() -> Result<()> {
    let mut it = Tracked::two()?;
    for _ in 0..2 {
        it.virsh(&["managedsave", "web01"])?;
        it.vm.start()?;
        it.heals("incremental")?;
    }
    it.ends_well()
}

pub(super) fn internal_snapshot() -> Result<()> {
    let mut it = Tracked::start()?;
    it.virsh(&["snapshot-create-as", "web01", "before-the-upgrade"])?;
    it.heals("incremental")?;
    let listed = it.virsh(&["snapshot-list", "web01", "--name"])?;
    ensure!(listed.contains("before-the-upgrade"), "{listed}");
    it.virsh(&["snapshot-delete", "web01", "before-the-upgrade"])?;
    it.heals("incremental")?;
    it.ends_well()
}

/// The tree that an increment would be built on is gone, or damaged where it
/// lies. What it had is stored again.
pub(super) fn parent_unreadable() -> Result<()> {
    for is_gone in [true, false] {
        let mut it = Tracked::start()?;
        for pack in files_below(&it.bed.repo().join("packs"))? {
            if is_gone {
                fs::remove_file(pack)?;
                continue;
            }
            let bytes = vec![0x55; fs::read(&pack)?.len()];
            fs::write(&pack, bytes)?;
        }
        it.loses_its_points();
        it.heals("rescan: parent-damaged")?;
        it.ends_well()
            .with_context(|| format!("all packs are gone: {is_gone}"))?;
    }
    damaged_where_the_audit_looks().context("where the audit looks")?;
    damaged_where_the_guest_wrote().context("where the guest wrote")
}

/// In a page of the tree that is not on the way to its first chunk.
fn damaged_where_the_audit_looks() -> Result<()> {
    let mut it = Tracked::unseen(&[DiskSpec::qcow2("vda", 16 << 20)])?;
    // Bytes that no drawn write repeats: that would find its copy damaged.
    let far = ["write -P 254 9M 64k", "flush"].map(str::to_owned);
    it.vm.write_all("vda", &far)?;
    it.back_up(&[])?;
    let packs = files_below(&it.bed.repo().join("packs"))?;
    it.heals("incremental")?;
    damage(&packs)?;
    it.loses_its_points();
    let report = it.heals_with_warnings(&["rescan: parent-damaged"])?;
    says(&report, "warnings", "disk vda was read as a whole")?;
    it.ends_right()
        .with_context(|| format!("the point of {report}"))?;
    it.ends_well()
}

fn files_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(files_below(&path)?);
        } else {
            files.push(path);
        }
    }
    ensure!(!files.is_empty(), "nothing in {}", dir.display());
    Ok(files)
}

/// In a page that an increment changes, of a disk so large that the audit comes
/// there once in a hundred runs.
fn damaged_where_the_guest_wrote() -> Result<()> {
    let bed = Bed::start()?;
    let disk = DiskSpec::qcow2("vda", 16 << 30);
    let vm = bed.lab.vm("web01").disk(disk).start()?;
    vm.write("vda", "write -P 1 4M 64k")?;
    bed.backup(&vm, &[])?;
    let packs = files_below(&bed.repo().join("packs"))?;
    vm.write_all(
        "vda",
        &["write -P 2 0 64k", "write -P 3 10G 64k"].map(str::to_owned),
    )?;
    bed.backup(&vm, &[])?;
    damage(&packs)?;
    vm.write("vda", "write -P 4 4M 64k")?;
    for expected in ["rescan: parent-damaged", "incremental"] {
        let report = bed.backup(&vm, &[])?;
        ensure!(mode(&report, "vda") == expected, "{report}");
        let now = reference(&bed, &vm, "vda", expected)?;
        let dir = bed.restore(&point(&report), &format!("out {expected}"), &[])?;
        assert_same(&now, &dir.join("vda.qcow2"))?;
        vm.write("vda", "write -P 5 5M 64k")?;
    }
    bed.assert_tidy(&vm, 1)
}

fn damage(packs: &[PathBuf]) -> Result<()> {
    for pack in packs {
        fs::write(pack, vec![0x55; fs::read(pack)?.len()])?;
    }
    Ok(())
}
