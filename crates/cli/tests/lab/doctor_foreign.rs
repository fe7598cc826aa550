//! `doctor` and what is not ours: told, attributed, and left alone.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{DiskSpec, Vm, tool};
use serde_json::{Value, json};

use crate::doctor::{backs_up, doctor, finds, tracked};
use crate::golden::Golden;
use crate::support::{Bed, mode};

const MIB: u64 = 1 << 20;

/// Returns the node that the guest's first disk writes to.
fn root(vm: &Vm) -> Result<String> {
    let blocks = vm.monitor(&json!({"execute": "query-block"}))?;
    let mut nodes = blocks.as_array().into_iter().flatten();
    let node = nodes.find_map(|block| block["inserted"]["node-name"].as_str());
    Ok(node.context("a disk")?.to_owned())
}

fn sentences(document: &Value) -> String {
    let findings = document["findings"].as_array().into_iter().flatten();
    let what = findings.filter_map(|it| it["what"].as_str());
    what.collect::<Vec<_>>().join("\n")
}

#[test]
fn foreign_checkpoints_bitmaps_and_exports_are_told_and_never_touched() -> Result<()> {
    let (bed, vm) = tracked()?;
    let node = root(&vm)?;
    bed.lab.virsh(&[
        "checkpoint-create-as",
        "web01",
        "--name",
        "virtnbdbackup.0",
        "--diskspec",
        "vda,checkpoint=bitmap",
    ])?;
    // One of the names nearly looks like one of ours.
    for name in ["qmpbackup-3c3a6f2e", "hw-0123456789ab-mine"] {
        vm.monitor(&json!({"execute": "block-dirty-bitmap-add", "arguments":
            {"node": node, "name": name, "persistent": true}}))?;
    }
    let socket = bed.lab.path("theirs.sock");
    vm.monitor(&json!({"execute": "nbd-server-start", "arguments":
        {"addr": {"type": "unix", "data": {"path": socket}}}}))?;
    vm.monitor(&json!({"execute": "block-export-add", "arguments":
        {"type": "nbd", "id": "theirs", "node-name": node, "name": "theirs"}}))?;
    let expected = [
        "hand: foreign-export",
        "nothing: foreign-checkpoint",
        "nothing: foreign-bitmap",
        "nothing: foreign-bitmap",
    ];
    let document = finds(&bed, &vm, &expected)?;
    let said = sentences(&document);
    for part in ["of virtnbdbackup on vda", "of qmpbackup on vda", "`theirs`"] {
        assert!(said.contains(part), "{said}");
    }
    for wish in ["--fix", "--purge-marks"] {
        let (code, document) = doctor(&bed, &[wish])?;
        assert_eq!(code, 4, "{document:#}");
        assert!(bed.fail(&["backup", "web01"])?.0 != 0);
    }
    let bitmaps = vm.bitmaps("vda")?.into_iter();
    let mut left: Vec<String> = bitmaps.map(|bitmap| bitmap.name).collect();
    left.sort();
    assert_eq!(
        left,
        [
            "hw-0123456789ab-mine",
            "qmpbackup-3c3a6f2e",
            "virtnbdbackup.0"
        ]
    );
    assert_eq!(vm.checkpoints()?, ["virtnbdbackup.0"]);
    finds(&bed, &vm, &expected)?;
    vm.monitor(&json!({"execute": "nbd-server-stop"}))?;
    finds(&bed, &vm, &expected[1..])?;
    backs_up(&bed, &vm, "rescan: bitmap-missing").map(drop)
}

#[test]
fn a_foreign_backup_job_is_named_and_left_alone() -> Result<()> {
    let (bed, vm) = tracked()?;
    let xml = bed.lab.path("foreign.xml");
    let socket = bed.lab.path("virtnbdbackup.4711");
    let text = format!(
        "<domainbackup mode='pull'><server transport='unix' socket='{}'/></domainbackup>",
        socket.display()
    );
    fs::write(&xml, text)?;
    bed.lab
        .virsh(&["backup-begin", "web01", xml.to_str().context("text")?])?;
    let document = finds(&bed, &vm, &["hand: foreign-job"])?;
    assert_eq!(document["job"]["kind"], "foreign-backup");
    assert!(document["job"]["seconds"].is_u64(), "{document:#}");
    assert!(
        sentences(&document).contains("of virtnbdbackup runs"),
        "{document:#}"
    );
    assert_eq!(document["next_backup"]["possible"], false);
    let (code, document) = doctor(&bed, &["--fix"])?;
    assert_eq!(code, 4, "{document:#}");
    assert!(vm.job_running()?);
    bed.lab.virsh(&["domjobabort", "web01"])?;
    finds(&bed, &vm, &[])?;
    backs_up(&bed, &vm, "incremental").map(drop)
}

/// The way out is tried as it is told.
#[test]
fn a_snapshot_behind_libvirt_is_told_with_a_way_out_that_works() -> Result<()> {
    let (bed, vm) = tracked()?;
    let snapshot = bed.lab.path("behind.qcow2");
    vm.monitor(&json!({"execute": "blockdev-snapshot-sync", "arguments":
        {"node-name": root(&vm)?, "snapshot-file": snapshot, "snapshot-node-name": "behind",
         "format": "qcow2"}}))?;
    vm.write("vda", "write -P 7 30M 1M")?;
    let expected = ["hand: graph-changed", "nothing: foreign-node"];
    let document = finds(&bed, &vm, &expected)?;
    let (code, stderr) = bed.fail(&["backup", "web01"])?;
    assert_eq!(code, 1, "{stderr}");
    let (code, fixed) = doctor(&bed, &["--fix"])?;
    assert_eq!((code, &fixed["fixed"]), (4, &json!([])), "{fixed:#}");
    let todo = document["findings"][0]["do"]
        .as_array()
        .context("a way out")?;
    let commands: Vec<Value> = todo
        .iter()
        .filter_map(|line| line.as_str()?.split('\'').nth(1))
        .map(serde_json::from_str)
        .collect::<serde_json::Result<_>>()?;
    let [commit, ask, complete] = commands.as_slice() else {
        anyhow::bail!("{todo:?}")
    };
    vm.monitor(commit)?;
    while vm.monitor(ask)?[0]["ready"] != true {}
    vm.monitor(complete)?;
    while vm.monitor(ask)?[0].is_object() {}
    let (code, document) = doctor(&bed, &[])?;
    assert_eq!(code, 0, "{document:#}");
    backs_up(&bed, &vm, "incremental").map(drop)
}

#[test]
fn marks_of_another_repository_are_told_and_stay() -> Result<()> {
    let (bed, vm) = tracked()?;
    let other = bed.lab.path("other");
    let other = other.to_str().context("text")?;
    bed.run(&["init", "--encryption", "none", "-r", other])?;
    bed.backup(&vm, &["-r", other])?;
    let document = finds(&bed, &vm, &["nothing: other-repository"])?;
    assert!(
        sentences(&document).starts_with("1 mark of another repository"),
        "{document:#}"
    );
    let (code, document) = doctor(&bed, &["--purge-marks"])?;
    assert_eq!(code, 0, "{document:#}");
    assert_eq!(vm.checkpoints()?.len(), 1);
    vm.write("vda", "write -P 9 40M 64k")?;
    let report = bed.backup(&vm, &["-r", other])?;
    assert_eq!(mode(&report, "vda"), "incremental");
    backs_up(&bed, &vm, "rescan: bitmap-missing").map(drop)
}

/// What `--purge-marks` is for, with QEMU's own tools.
#[test]
fn without_marks_images_can_be_checked_and_reverted_to_internal_snapshots() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 64 * MIB))
        .disk(DiskSpec::qcow2("vdb", 8 * MIB))
        .define()?;
    let image = vm.image("vda");
    let snapshot = |flag: &str| {
        tool("qemu-img")
            .args(["snapshot", flag, "s1"])
            .arg(&image)
            .run()
    };
    snapshot("-c")?;
    vm.start()?;
    vm.write("vda", "write -P 1 0 4M")?;
    bed.backup(&vm, &[])?;
    vm.destroy()?;
    assert!(
        snapshot("-a").is_err(),
        "QEMU reverts although there is a bitmap"
    );
    // The mark is there in parts: one disk has lost its bitmap.
    let mark = vm.checkpoints()?.remove(0);
    tool("qemu-img")
        .args(["bitmap", "--remove"])
        .arg(vm.image("vdb"))
        .arg(&mark)
        .run()?;
    let (code, document) = doctor(&bed, &["--purge-marks"])?;
    assert_eq!(code, 0, "{document:#}");
    assert_eq!(document["marks"], json!([]));
    assert!(vm.checkpoints()?.is_empty(), "its record is left");
    tool("qemu-img")
        .args(["check", "-r", "all"])
        .arg(&image)
        .run()?;
    snapshot("-a")?;
    vm.start()?;
    let report = backs_up(&bed, &vm, "rescan: bitmap-missing")?;
    ensure!(mode(&report, "vdb") == "rescan: bitmap-missing", "{report}");
    vm.write("vda", "write -P 5 5M 64k")?;
    backs_up(&bed, &vm, "incremental").map(drop)
}

/// Without libvirt's record nothing but the image tells of its bitmap.
#[test]
fn a_vm_that_is_off_is_never_said_to_be_rid_of_marks_that_nobody_sees() -> Result<()> {
    let (bed, vm) = tracked()?;
    let mark = vm.checkpoints()?.remove(0);
    bed.lab
        .virsh(&["checkpoint-delete", "web01", &mark, "--metadata"])?;
    vm.destroy()?;
    let (image, away) = (vm.image("vda"), bed.lab.path("away"));
    fs::rename(&image, &away)?;
    let (code, document) = doctor(&bed, &["--purge-marks"])?;
    assert_eq!((code, &document["marks"]), (1, &json!([])), "{document:#}");
    assert_eq!(document["status"], "fix-failed");
    let hint = document["failed"][0]["hint"].as_str().context("a hint")?;
    assert!(hint.contains("make its images readable"), "{hint}");
    fs::rename(&away, &image)?;
    let (code, document) = doctor(&bed, &["--purge-marks"])?;
    assert_eq!(code, 0, "{document:#}");
    vm.start()?;
    assert_eq!(vm.bitmaps("vda")?.len(), 0);
    Ok(())
}

#[test]
fn of_several_vms_each_is_told_and_one_that_is_not_there_is_3() -> Result<()> {
    let (bed, _vm) = tracked()?;
    bed.lab
        .vm("db01")
        .disk(DiskSpec::qcow2("vda", MIB))
        .define()?;
    let all: Value = serde_json::from_str(&bed.run(&["doctor", "--all", "--json"])?)?;
    let told = all["results"].as_array().context("results")?.iter();
    let told: Vec<&Value> = told.map(|it| &it["vm"]).collect();
    assert_eq!(told, ["db01", "web01"]);
    let output = bed.output(&["doctor", "web01", "wbe01", "--json"])?;
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let document: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(document["results"][1]["status"], "failed", "{document:#}");
    Ok(())
}

/// Scripts rely on these fields, on their order in no way.
#[test]
fn a_doctors_json_has_the_fields_of_schema_1() -> Result<()> {
    let (bed, vm) = tracked()?;
    // Something of each kind of list.
    let mark = vm.checkpoints()?.remove(0);
    bed.lab
        .virsh(&["checkpoint-delete", "web01", &mark, "--metadata"])?;
    let (code, document) = doctor(&bed, &[])?;
    assert_eq!(code, 4);
    let keys = |value: &Value| -> String {
        let mut keys: Vec<&str> = value
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        keys.sort_unstable();
        keys.join(" ")
    };
    assert_eq!(
        keys(&document),
        "exit_code failed findings fixed held_by job marks next_backup schema state status vm \
         vm_uuid warnings"
    );
    assert_eq!(
        keys(&document["findings"][0]),
        "disk do kind mark remedy what"
    );
    let marks = &document["marks"][0];
    assert_eq!(
        keys(marks),
        "checkpoint disks mark needed_by point reason this_repository verdict"
    );
    assert_eq!(keys(&marks["disks"][0]), "bitmap dirty_bytes disk");
    let next = &document["next_backup"];
    assert_eq!(keys(next), "because disks possible would_heal");
    assert_eq!(
        keys(&next["disks"][0]),
        "dirty_bytes disk mode read_bytes reason size_bytes"
    );
    assert_eq!(document["schema"], 1);
    assert_eq!(document["vm_uuid"], vm.uuid()?);
    Ok(())
}

fn say(golden: &mut Golden, bed: &Bed, words: &str) -> Result<()> {
    let args: Vec<&str> = words.split(' ').collect();
    golden.run(&format!("highwater {words}"), &mut bed.command(&args))?;
    Ok(())
}

#[test]
fn the_doctor_is_short_and_tells_the_worst_first() -> Result<()> {
    let (bed, vm) = tracked()?;
    let mark = vm.checkpoints()?.remove(0);
    // An unfinished mark: of our repository, and of a point that never was.
    let unfinished = format!("{}zzzzzzzzzzzzz", &mark[..mark.len() - 13]);
    let mut golden = Golden::new("doctor")
        .without_dates()
        .text(mark.clone(), "hw-MARK")
        .text(unfinished.clone(), "hw-UNFINISHED")
        .path(&bed.repo(), "/backup")
        .path(&bed.lab.run_dir(), "/run/libvirt")
        .path(&bed.lab.dir(), "/lab");
    say(&mut golden, &bed, "doctor web01")?;
    say(&mut golden, &bed, "doctor web01 --json")?;
    let record = |name: &str| {
        let disks = "vda,checkpoint=bitmap";
        bed.lab.virsh(&[
            "checkpoint-create-as",
            "web01",
            "--name",
            name,
            "--diskspec",
            disks,
        ])
    };
    record("virtnbdbackup.0")?;
    record(&unfinished)?;
    bed.lab
        .virsh(&["checkpoint-delete", "web01", &mark, "--metadata"])?;
    say(&mut golden, &bed, "doctor web01")?;
    say(&mut golden, &bed, "doctor web01 --json")?;
    say(&mut golden, &bed, "doctor web01 --fix")?;
    say(&mut golden, &bed, "doctor web01 --quiet")?;
    say(
        &mut golden,
        &bed,
        "doctor web01 --purge-marks --json=events",
    )?;
    vm.destroy()?;
    say(&mut golden, &bed, "doctor web01")?;
    say(&mut golden, &bed, "doctor web01 --purge-marks")?;
    say(&mut golden, &bed, "doctor wbe01")?;
    golden.check()
}
