//! What people ask of a backup besides the backup: to be told before, to be
//! left alone when nothing changed, to be held back, to be told in a stream.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{DiskSpec, Vm};
use serde_json::Value;

use crate::processes::guard_of;
use crate::support::{Bed, assert_same, disk, mode, reference, write_noise};

const MIB: u64 = 1 << 20;

fn started(bed: &Bed, mib: u64) -> Result<Vm> {
    bed.lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", mib * MIB))
        .start()
}

fn json(bed: &Bed, args: &[&str]) -> Result<Value> {
    Ok(serde_json::from_str(&bed.run(args)?)?)
}

/// All files below a directory with what tells that one was written to.
fn stamps(dir: &Path) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    let Ok(entries) = fs::read_dir(dir) else {
        return Ok(found);
    };
    for entry in entries {
        let entry = entry?;
        let about = entry.metadata()?;
        let stamp = format!("{} {:?}", about.len(), about.modified()?);
        found.insert(entry.path().display().to_string(), stamp);
        if about.is_dir() {
            found.extend(stamps(&entry.path())?);
        }
    }
    Ok(found)
}

#[test]
fn below_the_threshold_no_point_is_made_and_the_marks_stay() -> Result<()> {
    let bed = Bed::start()?;
    let vm = started(&bed, 16)?;
    vm.write("vda", "write -P 1 0 1M")?;
    // Nothing is known of a disk without a mark: it is backed up whatever was asked.
    let first = bed.backup(&vm, &["--threshold", "1GiB"])?;
    assert_eq!(first["status"], "ok");
    let before = vm.leftovers(&bed.runtime().join("scratch"))?;

    vm.write("vda", "write -P 2 4M 64k")?;
    for threshold in ["1MiB", "65537"] {
        let report = bed.backup(&vm, &["--threshold", threshold])?;
        assert_eq!(report["status"], "below-threshold", "{report}");
        assert_eq!(
            (&report["point"], &report["consistency"]),
            (&Value::Null, &Value::Null)
        );
        assert_eq!(disk(&report, "vda")["dirty_bytes"], 64 << 10);
        assert_eq!(vm.leftovers(&bed.runtime().join("scratch"))?, before);
    }
    assert_eq!(
        json(&bed, &["list", "--json"])?["points"]
            .as_array()
            .map(Vec::len),
        Some(1)
    );

    vm.write("vda", "write -P 3 8M 64k")?;
    let second = bed.backup(&vm, &["--threshold", "128KiB"])?;
    assert_eq!(mode(&second, "vda"), "incremental");
    assert_eq!(disk(&second, "vda")["dirty_bytes"], 128 << 10);
    let wanted = reference(&bed, &vm, "vda", "wanted.raw")?;
    let restored = bed.restore("web01", "out", &["--format", "raw"])?;
    assert_same(&wanted, &restored.join("vda.raw"))
}

#[test]
fn an_estimate_tells_what_a_backup_does_and_touches_nothing() -> Result<()> {
    let bed = Bed::start()?;
    let vm = started(&bed, 16)?;
    vm.write("vda", "write -P 1 0 2M")?;
    vm.flush("vda")?;
    let check = |mode_and_reason: &str, heals: usize| -> Result<Value> {
        let scratch = bed.runtime().join("scratch");
        let state = || -> Result<_> {
            Ok((
                vm.leftovers(&scratch)?,
                stamps(&bed.repo())?,
                stamps(&bed.runtime())?,
            ))
        };
        let before = state()?;
        let told = json(&bed, &["backup", "web01", "--estimate", "--json"])?;
        assert_eq!(state()?, before, "an estimate touched something");
        assert_eq!(told["status"], "estimate");
        assert_eq!(mode(&told, "vda"), mode_and_reason);
        assert_eq!(
            told["would_heal"].as_array().map(Vec::len),
            Some(heals),
            "{told}"
        );
        Ok(told)
    };
    let told = check("full: first-backup", 0)?;
    let to_read = disk(&told, "vda")["read_bytes"]
        .as_u64()
        .context("a number")?;
    assert!((2 * MIB..4 * MIB).contains(&to_read), "{told}");
    bed.backup(&vm, &[])?;
    check("incremental", 0)?;

    vm.write("vda", "write -P 2 4M 192k")?;
    let told = check("incremental", 0)?;
    assert_eq!(told["dirty_bytes"], 192 << 10);
    let done = bed.backup(&vm, &[])?;
    assert_eq!(disk(&done, "vda")["dirty_bytes"], 192 << 10);

    // libvirt forgets the checkpoint: a backup would tell it again.
    let xml = bed.lab.virsh(&["dumpxml", "web01"])?;
    let mark = vm.checkpoints()?.pop().context("there is a mark")?;
    bed.lab
        .virsh(&["checkpoint-delete", "web01", &mark, "--metadata"])?;
    check("incremental", 1)?;
    // A mark whose point is gone is an unfinished one, and would be removed.
    let points = bed.repo().join("points");
    for vm_dir in fs::read_dir(&points)? {
        fs::remove_dir_all(vm_dir?.path())?;
    }
    check("full: first-backup", 1)?;
    ensure!(
        xml == bed.lab.virsh(&["dumpxml", "web01"])?,
        "the definition changed"
    );
    let done = bed.backup(&vm, &[])?;
    assert_eq!(mode(&done, "vda"), "full: first-backup");
    assert_eq!(done["healed"].as_array().map(Vec::len), Some(1), "{done}");
    Ok(())
}

#[test]
fn an_estimate_fails_where_a_backup_would() -> Result<()> {
    let bed = Bed::start()?;
    let vm = started(&bed, 1)?;
    for (args, code) in [
        (&["backup", "web02", "--estimate"][..], 1),
        (&["backup", "web01", "--estimate", "-d", "vdz"], 2),
        (&["backup", "web01", "--estimate", "-l", "incremental"], 1),
    ] {
        let (estimated, said) = bed.fail(args)?;
        assert_eq!(estimated, code, "{said}");
        let (done, _) = bed.fail(
            &args
                .iter()
                .copied()
                .filter(|it| *it != "--estimate")
                .collect::<Vec<_>>(),
        )?;
        assert_eq!(done, code, "{said}");
    }
    vm.destroy()?;
    let off = ["backup", "web01", "--offline", "refuse", "--estimate"];
    assert_eq!(bed.fail(&off)?.0, 1);
    Ok(())
}

#[test]
fn events_tell_a_backup_from_begin_to_end() -> Result<()> {
    let bed = Bed::start()?;
    let vm = started(&bed, 16)?;
    vm.write("vda", "write -P 1 0 1M")?;
    bed.lab
        .vm("web02")
        .disk(DiskSpec::qcow2("vda", MIB))
        .start()?;
    let output = bed.output(&["backup", "web01", "nobody", "web02", "--json=events"])?;
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let lines: Vec<Value> = String::from_utf8(output.stdout)?
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    let of = |vm: &str| -> Vec<String> {
        let told = lines
            .iter()
            .filter(|line| line["vm"] == vm && line["event"] != "progress");
        told.map(|line| line["event"].as_str().unwrap_or("?").to_owned())
            .collect()
    };
    let whole = [
        "begin",
        "plan",
        "point-in-time",
        "disk",
        "committed",
        "result",
    ];
    assert_eq!(of("web01"), whole);
    assert_eq!(of("web02"), whole);
    assert_eq!(of("nobody"), ["result"]);
    assert!(lines.iter().any(|line| line["event"] == "progress"));
    assert!(lines.iter().all(|line| line["schema"] == 1));
    let plan = lines
        .iter()
        .find(|line| line["event"] == "plan")
        .context("a plan")?;
    assert_eq!(
        (&plan["mode"], &plan["reason"]),
        (&"full".into(), &"first-backup".into())
    );
    assert_eq!(lines.last().context("an end")?["exit_code"], 3);
    Ok(())
}

#[test]
fn a_backup_keeps_to_its_limit_and_is_whole() -> Result<()> {
    let bed = Bed::start()?;
    let vm = started(&bed, 16)?;
    write_noise(&bed, &vm, "vda", 0, 8)?;
    let began = Instant::now();
    let report = bed.backup(&vm, &["--limit", "4MiB/s"])?;
    assert_eq!(disk(&report, "vda")["read_bytes"], 8 * MIB);
    let took = began.elapsed();
    assert!(
        took > Duration::from_millis(1500),
        "8 MiB at 4 MiB/s took {took:?}"
    );
    let wanted = reference(&bed, &vm, "vda", "wanted.raw")?;
    let restored = bed.restore("web01", "out", &["--format", "raw"])?;
    assert_same(&wanted, &restored.join("vda.raw"))
}

#[test]
fn a_warning_of_a_backup_makes_it_end_with_4_under_strict() -> Result<()> {
    let bed = Bed::start()?;
    // An agent's channel with nobody at its other end: freezing is tried in vain.
    let channel =
        "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>";
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", MIB))
        .device(channel)
        .start()?;
    let report = bed.backup(&vm, &[])?;
    assert_eq!(
        report["warnings"].as_array().map(Vec::len),
        Some(1),
        "{report}"
    );
    let output = bed.output(&["backup", "web01", "--strict", "--json"])?;
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(report["status"], "ok", "the point was made all the same");
    let output = bed.output(&["backup", "web01", "--strict", "--quiesce", "off"])?;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    Ok(())
}

#[test]
fn the_guard_knows_no_passphrase_and_holds_no_descriptor_of_one() -> Result<()> {
    let bed = Bed::start_encrypted()?;
    let vm = started(&bed, 256)?;
    write_noise(&bed, &vm, "vda", 0, 32)?;
    let file = bed.lab.path("pass");
    fs::write(&file, "correct horse battery\n")?;
    let line = format!(
        "exec 7<{} && exec {} backup web01 -c '{}' --limit 8MiB",
        file.display(),
        env!("CARGO_BIN_EXE_highwater"),
        bed.lab.uri()
    );
    let mut command = std::process::Command::new("bash");
    command
        .args(["-c", &line])
        .env("HIGHWATER_REPO", bed.repo())
        .env("HIGHWATER_CONFIG", "")
        .env("HIGHWATER_RUNTIME_DIR", bed.runtime())
        .env("HIGHWATER_PASSWORD_FD", "7")
        .stderr(std::process::Stdio::null());
    let mut child = command.spawn()?;
    let deadline = Instant::now() + Duration::from_secs(20);
    while !vm.job_running().unwrap_or_default() {
        ensure!(Instant::now() < deadline, "no job began");
    }
    let guard = guard_of(&child)?;
    let proc = Path::new("/proc").join(guard.to_string());
    let open: Vec<_> = fs::read_dir(proc.join("fd"))?
        .filter_map(|fd| fs::read_link(fd.ok()?.path()).ok())
        .collect();
    assert!(!open.contains(&file), "{open:?}");
    let environment = String::from_utf8_lossy(&fs::read(proc.join("environ"))?).into_owned();
    assert!(
        !environment.contains("HIGHWATER_PASSWORD_FD"),
        "{environment}"
    );
    assert!(child.wait()?.success());
    Ok(())
}
