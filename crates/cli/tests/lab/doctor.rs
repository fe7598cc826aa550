//! `doctor`: each thing that can be wrong with marks and sessions of ours is
//! made for real, found without anything being changed, repaired, and the next
//! plain backup equals the disk.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{DiskSpec, Vm, tool};
use serde_json::{Value, json};

use crate::processes::{kill_all, mover_of, signal};
use crate::support::{Bed, assert_same, mode, point, reference, write_noise};

const MIB: u64 = 1 << 20;

/// A bed and a running VM with a restore point.
pub(crate) fn tracked() -> Result<(Bed, Vm)> {
    let bed = Bed::start()?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 64 * MIB))
        .start()?;
    vm.write("vda", "write -P 1 0 4M")?;
    bed.backup(&vm, &[])?;
    vm.write("vda", "write -P 2 8M 1M")?;
    Ok((bed, vm))
}

/// Runs the doctor; returns its exit code and its document.
pub(crate) fn doctor(bed: &Bed, args: &[&str]) -> Result<(i32, Value)> {
    let output = bed.output(&[&["doctor", "web01", "--json"], args].concat())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let code = output.status.code().context("it was killed")?;
    let document: Value = serde_json::from_str(&text)
        .with_context(|| format!("{text}{}", String::from_utf8_lossy(&output.stderr)))?;
    ensure!(document["exit_code"] == code, "{code}: {document}");
    Ok((code, document))
}

fn words(document: &Value) -> Vec<String> {
    let word = |finding: &Value, field: &str| finding[field].as_str().unwrap_or("?").to_owned();
    let findings = document["findings"].as_array().into_iter().flatten();
    findings
        .map(|it| format!("{}: {}", word(it, "remedy"), word(it, "kind")))
        .collect()
}

/// Fails unless the doctor finds exactly this, and leaves everything as it is.
pub(crate) fn finds(bed: &Bed, vm: &Vm, expected: &[&str]) -> Result<Value> {
    let before = trace(bed, vm)?;
    let (code, document) = doctor(bed, &[])?;
    ensure!(words(&document) == expected, "{document:#}");
    let needs = expected.iter().any(|it| !it.starts_with('n'));
    ensure!(code == if needs { 4 } else { 0 }, "{code}: {document:#}");
    let after = trace(bed, vm)?;
    ensure!(before == after, "before: {before}\nafter: {after}");
    Ok(document)
}

/// Has it repaired; fails unless that is said in these words (of each, the
/// beginning), a second run has nothing to do, and the next backup is what is
/// expected and equals the disk.
fn cured(bed: &Bed, vm: &Vm, fixed: &[&str], expected: &str) -> Result<()> {
    let (code, document) = doctor(bed, &["--fix"])?;
    ensure!(code == 0, "{document:#}");
    let told: Vec<&str> = document["fixed"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    ensure!(told.len() == fixed.len(), "{told:?}");
    for (told, fixed) in told.iter().zip(fixed) {
        ensure!(told.starts_with(fixed), "{told} is not {fixed}");
    }
    let (code, again) = doctor(bed, &["--fix"])?;
    let nothing = again["fixed"].as_array().is_some_and(Vec::is_empty);
    ensure!(code == 0 && nothing, "{again:#}");
    ensure!(again["status"] == "healthy", "{again:#}");
    backs_up(bed, vm, expected).map(drop)
}

/// Fails unless a plain backup is what is expected, equals the disk, and leaves
/// nothing but its mark.
pub(crate) fn backs_up(bed: &Bed, vm: &Vm, expected: &str) -> Result<Value> {
    let report = bed.backup(vm, &[])?;
    ensure!(mode(&report, "vda") == expected, "{report}");
    let number = report["point"].as_str().context("a point")?.to_owned();
    let now = reference(bed, vm, "vda", &format!("ref-{number}"))?;
    let dir = bed.restore(&point(&report), &format!("out-{number}"), &[])?;
    assert_same(&now, &dir.join("vda.qcow2"))?;
    Ok(report)
}

/// Everything that the doctor could change: records, bitmaps, jobs, nodes, the
/// guest's state, and all files of ours with their times.
fn trace(bed: &Bed, vm: &Vm) -> Result<String> {
    let mut text = format!("{}\n", vm.state()?);
    for name in vm.checkpoints()? {
        let record = bed
            .lab
            .virsh(&["checkpoint-dumpxml", "--no-domain", "web01", &name])?;
        text.push_str(&record);
    }
    writeln!(text, "{:?}", vm.bitmaps("vda")?)?;
    text.push_str(&bed.lab.virsh(&["dumpxml", "web01"])?);
    text.push_str(
        &bed.lab
            .virsh(&["dominfo", "web01"])?
            .replace("CPU time", "\nCPU time"),
    );
    if vm.is_active()? {
        writeln!(text, "{}", vm.job_running()?)?;
        let query = json!({"execute": "query-named-block-nodes", "arguments": {"flat": true}});
        for node in vm.monitor(&query)?.as_array().into_iter().flatten() {
            writeln!(text, "{} {}", node["node-name"], node["drv"])?;
        }
    }
    for dir in [bed.runtime(), bed.repo()] {
        files(&dir, &mut text)?;
    }
    // Time goes by whatever the doctor does.
    let lines = text.lines().filter(|line| !line.starts_with("CPU time"));
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

fn files(dir: &Path, text: &mut String) -> Result<()> {
    let mut entries = fs::read_dir(dir)?.collect::<std::io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::path);
    for entry in entries {
        let about = fs::symlink_metadata(entry.path())?;
        let modified = about.modified()?;
        writeln!(
            text,
            "{} {} {modified:?}",
            entry.path().display(),
            about.len()
        )?;
        if about.is_dir() {
            files(&entry.path(), text)?;
        }
    }
    Ok(())
}

/// Begins a backup that takes a while, and waits until it reads.
pub(crate) fn busy(bed: &Bed, vm: &Vm) -> Result<Child> {
    write_noise(bed, vm, "vda", 8, 48)?;
    let child = bed.spawn_slow(&["backup", "web01"])?;
    reads(vm)?;
    Ok(child)
}

fn reads(vm: &Vm) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !vm.job_running().unwrap_or_default() || vm.checkpoints()?.len() < 2 {
        ensure!(Instant::now() < deadline, "no job began");
    }
    Ok(())
}

/// Kills all processes of a backup, so that nobody tidies up.
fn killed_with_its_guard(bed: &Bed, vm: &Vm) -> Result<()> {
    let mut started = busy(bed, vm)?;
    let lock = bed.runtime().join(format!("vm-{}.lock", vm.uuid()?));
    let note = fs::read_to_string(&lock)?;
    let guard = note.split(' ').nth(1).context("a process id")?.to_owned();
    let mover = mover_of(&started)?;
    signal("-STOP", mover)?;
    kill_all(&mut started, guard.parse()?, mover)
}

fn sessions(bed: &Bed, below: &str) -> Result<usize> {
    let mut text = String::new();
    files(&bed.runtime().join(below), &mut text)?;
    Ok(text.matches(".session ").count())
}

#[test]
fn a_healthy_vm_is_called_healthy_whether_it_runs_or_not() -> Result<()> {
    let (bed, vm) = tracked()?;
    let document = finds(&bed, &vm, &[])?;
    assert_eq!(document["status"], "healthy");
    assert_eq!(document["next_backup"]["disks"][0]["mode"], "incremental");
    assert_eq!(document["next_backup"]["disks"][0]["dirty_bytes"], MIB);
    assert_eq!(document["marks"][0]["verdict"], "needed");
    vm.destroy()?;
    let document = finds(&bed, &vm, &[])?;
    assert_eq!(document["state"], "off");
    // Its image tells.
    assert_eq!(document["marks"][0]["disks"][0]["bitmap"], "recording");
    assert_eq!(document["marks"][0]["disks"][0]["dirty_bytes"], MIB);
    assert_eq!(document["next_backup"]["possible"], true);
    assert_eq!(document["next_backup"]["disks"][0]["mode"], "incremental");
    vm.start()?;
    cured(&bed, &vm, &[], "incremental")
}

#[test]
fn the_job_of_a_backup_killed_with_its_guard_is_ended() -> Result<()> {
    let (bed, vm) = tracked()?;
    killed_with_its_guard(&bed, &vm)?;
    assert!(vm.job_running()?);
    let document = finds(&bed, &vm, &["fix: dead-session", "fix: unfinished-mark"])?;
    assert_eq!(document["job"]["kind"], "ours");
    assert_eq!(document["next_backup"]["possible"], true);
    let fixed = ["ended the backup job of", "removed unfinished mark hw-"];
    cured(&bed, &vm, &fixed, "incremental")?;
    bed.assert_tidy(&vm, 1)
}

#[test]
fn directories_of_a_backup_killed_with_guard_and_qemu_are_removed() -> Result<()> {
    let (bed, vm) = tracked()?;
    killed_with_its_guard(&bed, &vm)?;
    vm.kill_qemu()?;
    assert_eq!(sessions(&bed, "")?, 2);
    let expected = [
        "fix: left-directories",
        "fix: useless-mark",
        "fix: unfinished-mark",
    ];
    // Its image tells as much as QEMU does.
    finds(&bed, &vm, &expected)?;
    vm.start()?;
    let document = finds(&bed, &vm, &expected)?;
    assert_eq!(document["marks"][0]["reason"], "bitmap-missing");
    let fixed = [
        "removed the directories of dead session",
        "removed useless mark hw-",
        "removed unfinished mark hw-",
    ];
    cured(&bed, &vm, &fixed, "rescan: bitmap-missing")?;
    assert_eq!(sessions(&bed, "")?, 0);
    bed.assert_tidy(&vm, 1)
}

/// As libvirt leaves it when it dies while a job ends; the session's directories
/// are gone.
#[test]
fn what_a_dead_session_left_in_qemu_is_ours_and_is_removed() -> Result<()> {
    let (bed, vm) = tracked()?;
    let scratch = bed.lab.path("hw-0123456789abcdef-vda.scratch");
    tool("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&scratch)
        .arg("64M")
        .run()?;
    vm.monitor(
        &json!({"execute": "blockdev-add", "arguments": {"driver": "qcow2",
        "node-name": "left-format", "file":
        {"driver": "file", "filename": scratch, "node-name": "left-storage"}}}),
    )?;
    let socket = bed.lab.path("left.sock");
    vm.monitor(&json!({"execute": "nbd-server-start", "arguments":
        {"addr": {"type": "unix", "data": {"path": socket}}}}))?;
    vm.monitor(&json!({"execute": "block-export-add", "arguments":
        {"type": "nbd", "id": "left", "node-name": "left-format", "name": "vda"}}))?;
    let document = finds(&bed, &vm, &["fix: session-remains"])?;
    assert_eq!(document["next_backup"]["possible"], true, "{document:#}");
    let would = &document["next_backup"]["would_heal"];
    assert_eq!(
        would,
        &json!(["remove what dead session 0123456789abcdef had left in the hypervisor"])
    );
    let fixed = ["removed what dead session 0123456789abcdef had left"];
    cured(&bed, &vm, &fixed, "incremental")?;
    bed.assert_tidy(&vm, 1)
}

#[test]
fn the_next_backup_clears_directories_of_its_vm_and_of_no_other() -> Result<()> {
    let (bed, vm) = tracked()?;
    killed_with_its_guard(&bed, &vm)?;
    vm.kill_qemu()?;
    vm.start()?;
    // The same wreckage, as if it were of another VM; and things that only look so.
    let run = bed.runtime();
    let session = fs::read_dir(run.join("scratch"))?
        .next()
        .context("a session")??
        .file_name();
    let session = session.to_str().context("text")?.to_owned();
    let other = session.chars().rev().collect::<String>();
    for place in [run.clone(), run.join("scratch")] {
        let dir = place.join(&other);
        fs::create_dir(&dir)?;
        let label = fs::read_to_string(place.join(&session).join(format!("hw-{session}.session")))?;
        let label = label
            .replace(&vm.uuid()?, "00000000-0000-4000-8000-000000000001")
            .replace(&session, &other);
        fs::write(dir.join(format!("hw-{other}.session")), label)?;
        fs::write(dir.join(format!("hw-{other}-vda.scratch")), "theirs")?;
        fs::create_dir(place.join("0123456789abcdef"))?;
        fs::write(
            place.join("0123456789abcdef/hw-0123456789abcdef-vda.scratch"),
            "",
        )?;
    }
    let report = backs_up(&bed, &vm, "rescan: bitmap-missing")?;
    let healed = report["healed"].to_string();
    assert!(
        healed.contains(&format!(
            "removed the directories of dead session {session}"
        )),
        "{healed}"
    );
    for place in [run.clone(), run.join("scratch")] {
        assert!(!place.join(&session).exists());
        assert!(
            place
                .join(&other)
                .join(format!("hw-{other}-vda.scratch"))
                .exists()
        );
        assert!(
            place
                .join("0123456789abcdef/hw-0123456789abcdef-vda.scratch")
                .exists()
        );
    }
    finds(&bed, &vm, &[]).map(drop)
}

#[test]
fn a_mark_that_libvirt_forgot_is_told_again() -> Result<()> {
    let (bed, vm) = tracked()?;
    let xml = bed.lab.virsh(&["dumpxml", "--inactive", "web01"])?;
    vm.destroy()?;
    bed.lab
        .virsh(&["undefine", "web01", "--checkpoints-metadata"])?;
    bed.lab.define(&xml)?;
    vm.start()?;
    finds(&bed, &vm, &["fix: forgotten-mark"])?;
    let fixed = ["told the hypervisor again about mark hw-"];
    cured(&bed, &vm, &fixed, "incremental")?;
    bed.assert_tidy(&vm, 1)
}

#[test]
fn an_inconsistent_bitmap_and_its_record_are_removed() -> Result<()> {
    let (bed, vm) = tracked()?;
    vm.destroy()?;
    vm.start()?;
    vm.kill_qemu()?;
    vm.start()?;
    let document = finds(&bed, &vm, &["fix: useless-mark"])?;
    assert_eq!(document["marks"][0]["reason"], "bitmap-inconsistent");
    let next = &document["next_backup"]["disks"][0];
    assert_eq!(next["reason"], "bitmap-inconsistent");
    let fixed = ["removed useless mark hw-"];
    cured(&bed, &vm, &fixed, "rescan: bitmap-missing")?;
    bed.assert_tidy(&vm, 1)
}

#[test]
fn a_mark_re_made_and_an_old_one_that_came_back_are_removed() -> Result<()> {
    let (bed, vm) = tracked()?;
    let old = vm.checkpoints()?.remove(0);
    bed.backup(&vm, &[])?;
    let new = vm.checkpoints()?.remove(0);
    bed.lab.virsh(&["checkpoint-delete", "web01", &new])?;
    for name in [&old, &new] {
        let disks = "vda,checkpoint=bitmap";
        let args = [
            "checkpoint-create-as",
            "web01",
            "--name",
            name,
            "--diskspec",
            disks,
        ];
        bed.lab.virsh(&args)?;
    }
    let document = finds(&bed, &vm, &["fix: superseded-mark", "fix: useless-mark"])?;
    assert_eq!(document["marks"][1]["reason"], "mark-remade");
    let fixed = ["removed superseded mark hw-", "removed useless mark hw-"];
    cured(&bed, &vm, &fixed, "rescan: bitmap-missing")?;
    bed.assert_tidy(&vm, 1)
}

#[test]
fn a_running_backup_is_told_of_and_never_disturbed() -> Result<()> {
    let (bed, vm) = tracked()?;
    write_noise(&bed, &vm, "vda", 8, 48)?;
    let child = bed.spawn(&["backup", "web01", "--limit", "1MiB"])?;
    reads(&vm)?;
    let (code, document) = doctor(&bed, &[])?;
    assert_eq!(
        (code, words(&document)),
        (0, Vec::<String>::new()),
        "{document:#}"
    );
    assert!(document["held_by"]["process"].is_u64(), "{document:#}");
    assert_eq!(document["next_backup"]["possible"], false);
    let verdicts: Vec<&Value> = document["marks"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|mark| &mark["verdict"])
        .collect();
    assert_eq!(verdicts, ["needed", "in-flight"]);
    for wish in ["--fix", "--purge-marks"] {
        let (code, stderr) = bed.fail(&["doctor", "web01", wish])?;
        assert_eq!(code, 11, "{stderr}");
        assert!(stderr.contains("another backup of it runs"), "{stderr}");
        assert!(stderr.contains("state: nothing was changed"), "{stderr}");
    }
    assert!(vm.job_running()?);
    tool("kill").args(["-INT", &child.id().to_string()]).run()?;
    let output = child.wait_with_output()?;
    ensure!(output.status.code() == Some(130), "{output:?}");
    finds(&bed, &vm, &[])?;
    bed.assert_tidy(&vm, 1)
}

/// Neither libvirt nor the topmost image tells of it.
#[test]
fn a_purge_reaches_a_mark_below_an_overlay_that_libvirt_forgot() -> Result<()> {
    let (bed, vm) = tracked()?;
    let mark = vm.checkpoints()?.remove(0);
    let disk = "vda,snapshot=external";
    let snapshot = [
        "snapshot-create-as",
        "web01",
        "s1",
        "--disk-only",
        "--diskspec",
    ];
    bed.lab.virsh(&[&snapshot[..], &[disk]].concat())?;
    bed.lab
        .virsh(&["checkpoint-delete", "web01", &mark, "--metadata"])?;
    ensure!(!vm.bitmaps_everywhere()?.is_empty(), "no mark to purge");
    let (code, document) = doctor(&bed, &["--purge-marks"])?;
    ensure!(code == 0, "{document:#}");
    let left = vm.bitmaps_everywhere()?;
    ensure!(left.is_empty(), "{left:?}: {document:#}");
    let report = bed.backup(&vm, &[])?;
    ensure!(mode(&report, "vda") == "full: chain-changed", "{report}");
    bed.assert_tidy(&vm, 1)
}
