//! Several VMs in one run, and VMs that are not there.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use highwater_testkit::{DiskSpec, tool};
use serde_json::Value;

use crate::support::Bed;

const MIB: u64 = 1 << 20;

#[test]
fn one_vm_that_fails_keeps_none_of_the_others_from_its_backup() -> Result<()> {
    let bed = Bed::start()?;
    for name in ["web01", "web03"] {
        bed.lab.vm(name).disk(DiskSpec::qcow2("vda", MIB)).start()?;
    }
    let output = bed.output(&["backup", "web01", "web02", "web03", "--json"])?;
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let document: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(document["schema"], 1);
    let told: Vec<(&str, &str)> = document["results"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|it| (it["vm"].as_str().unwrap(), it["status"].as_str().unwrap()))
        .collect();
    assert_eq!(
        told,
        [("web01", "ok"), ("web02", "failed"), ("web03", "ok")]
    );
    assert_eq!(document["results"][1]["exit_code"], 1);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        stderr.contains("because: cannot find VM `web02`"),
        "{stderr}"
    );
    let list: Value = serde_json::from_str(&bed.run(&["list", "--json"])?)?;
    assert_eq!(list["points"].as_array().map(Vec::len), Some(2));
    // Those that are off, too, unless they are to be left alone.
    bed.lab
        .vm("web04")
        .disk(DiskSpec::qcow2("vda", MIB))
        .define()?;
    for (offline, count) in [("yield", 3), ("refuse", 2)] {
        let args = ["backup", "--all", "--json", "--offline", offline];
        let all: Value = serde_json::from_str(&bed.run(&args)?)?;
        assert_eq!(
            all["results"].as_array().map(Vec::len),
            Some(count),
            "{all}"
        );
    }
    Ok(())
}

#[test]
fn a_session_that_breaks_at_one_vm_breaks_none_at_the_next() -> Result<()> {
    let bed = Bed::start()?;
    let first = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 256 * MIB))
        .start()?;
    let noise = bed.lab.path("noise");
    tool("dd")
        .args(["if=/dev/urandom", "bs=1M", "count=64", "status=none"])
        .arg(format!("of={}", noise.display()))
        .run()?;
    first.write("vda", &format!("write -s {} 0 64M", noise.display()))?;
    bed.lab
        .vm("web02")
        .disk(DiskSpec::qcow2("vda", MIB))
        .start()?;
    let arguments = ["backup", "web01", "web02", "--json"];
    let child = bed.spawn_slow(&arguments)?;
    let deadline = Instant::now() + Duration::from_secs(20);
    while !first.job_running().unwrap_or_default() {
        ensure!(Instant::now() < deadline, "no job began");
    }
    bed.lab.virsh(&["domjobabort", "web01"])?;
    let output = child.wait_with_output()?;
    let document: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(document["results"][0]["status"], "failed", "{document}");
    assert_eq!(document["results"][1]["status"], "ok", "{document}");
    Ok(())
}

#[test]
fn vms_that_are_not_there_or_off_fail_with_their_own_words() -> Result<()> {
    let bed = Bed::start()?;
    let (code, stderr) = bed.fail(&["backup", "--all"])?;
    assert_eq!(code, 2, "{stderr}");
    bed.lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", MIB))
        .define()?;
    for (vm, because) in [
        ("nobody", "because: cannot find VM `nobody`"),
        ("web01", "error: cannot back up VM `web01`: it is off"),
    ] {
        let (code, stderr) = bed.fail(&["backup", vm, "--offline", "refuse"])?;
        assert_eq!(code, 1, "{stderr}");
        assert!(stderr.contains(because), "{stderr}");
        assert!(
            stderr.contains("state: no restore point was added"),
            "{stderr}"
        );
        assert!(stderr.contains("hint: "), "{stderr}");
    }
    Ok(())
}

/// Scripts rely on these fields, on their order in no way.
#[test]
fn a_backups_json_has_the_fields_of_schema_1() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", MIB))
        .start()?;
    vm.write("vda", "write -P 1 0 64k")?;
    let report = bed.backup(&vm, &[])?;
    let keys = |value: &Value| -> Vec<String> {
        let mut keys: Vec<String> = value.as_object().unwrap().keys().cloned().collect();
        keys.sort();
        keys
    };
    let expected = "consistency disks healed point schema seconds status vm vm_uuid warnings";
    assert_eq!(keys(&report).join(" "), expected);
    let expected = "audited_blocks dirty_bytes disk mode read_bytes reason root seconds size_bytes stored_bytes";
    assert_eq!(keys(&report["disks"][0]).join(" "), expected);
    assert_eq!(report["schema"], 1);
    assert_eq!(report["status"], "ok");
    assert_eq!(report["vm_uuid"], vm.uuid()?);
    assert_eq!(report["disks"][0]["size_bytes"], MIB);
    assert_eq!(report["disks"][0]["read_bytes"], 64 << 10);
    Ok(())
}
