//! Freezing the guest's file systems: what the points are worth, and that the
//! guest is left as it was found.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use highwater_testkit::guest::{self, Guest};
use highwater_testkit::{DiskSpec, MIB, Vm, tool};
use serde_json::Value;

use crate::support::{Bed, point};

/// A guest with an ext4 file system on `vda`, and an agent that answers.
fn start(bed: &Bed) -> Result<(Vm, Guest)> {
    let (raw, qcow2) = (bed.lab.path("files.raw"), bed.lab.path("files.qcow2"));
    guest::make_ext4(&raw, 32 * MIB)?;
    let convert = tool("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]);
    convert.args([&raw, &qcow2]).run()?;
    let files = DiskSpec::existing("vda", &qcow2, "qcow2");
    let vm = bed.lab.vm("web01").disk(files).guest().start()?;
    let guest = vm.guest()?;
    guest.wait_for_agent()?;
    Ok((vm, guest))
}

fn restored(bed: &Bed, report: &Value, name: &str) -> Result<PathBuf> {
    let dir = bed.restore(&point(report), name, &["--format", "raw"])?;
    Ok(dir.join("vda.raw"))
}

/// Says whether the journal holds something that is not in its place yet.
fn needs_recovery(image: &Path) -> Result<bool> {
    Ok(tool("dumpe2fs")
        .arg("-h")
        .arg(image)
        .run()?
        .contains("needs_recovery"))
}

/// Returns a file of a file system that nobody mounts.
fn content(image: &Path, file: &str) -> Result<String> {
    tool("debugfs")
        .args(["-R", &format!("cat {file}")])
        .arg(image)
        .run()
}

fn count_points(bed: &Bed) -> Result<usize> {
    let list: Value = serde_json::from_str(&bed.run(&["list", "--json"])?)?;
    Ok(list["points"].as_array().map_or(0, Vec::len))
}

#[test]
fn a_required_freeze_gives_a_clean_file_system_and_the_guest_goes_on() -> Result<()> {
    let bed = Bed::start()?;
    let (vm, guest) = start(&bed)?;
    let mut frozen = Vec::new();
    for args in [
        &["--quiesce", "require"][..],
        &["--quiesce", "require", "--freeze-mountpoint", "/data"],
    ] {
        // Not synced: only the freeze brings it to the disk.
        guest.run(&format!("echo high-{} > /data/water", frozen.len()))?;
        let report = bed.backup(&vm, args)?;
        assert_eq!(report["consistency"], "filesystem", "{report}");
        assert_eq!(
            report["warnings"].as_array().map(Vec::len),
            Some(0),
            "{report}"
        );
        assert!(!guest.is_frozen()?);
        guest.run("echo low > /data/water && sync")?;
        frozen.push(report);
    }
    let crash = bed.backup(&vm, &["--quiesce", "off"])?;
    assert_eq!(crash["consistency"], "crash", "{crash}");
    bed.assert_tidy(&vm, 1)?;
    for (number, report) in frozen.iter().enumerate() {
        let image = restored(&bed, report, &format!("out-{number}"))?;
        tool("e2fsck").arg("-fn").arg(&image).run()?;
        assert!(!needs_recovery(&image)?);
        assert_eq!(content(&image, "/water")?, format!("high-{number}\n"));
    }
    // The difference is the freeze, not the file system.
    assert!(needs_recovery(&restored(&bed, &crash, "out-crash")?)?);
    Ok(())
}

#[test]
fn a_freeze_that_fails_leaves_nothing_and_a_thawed_guest() -> Result<()> {
    let bed = Bed::start()?;
    let (vm, guest) = start(&bed)?;
    bed.backup(&vm, &[])?;
    let nowhere = ["--quiesce", "require", "--freeze-mountpoint", "/nowhere"];
    let (code, stderr) = bed.fail(&[&["backup", "web01"][..], &nowhere].concat())?;
    assert_eq!(code, 1, "{stderr}");
    assert!(!guest.is_frozen()?);

    guest.run("kill -9 $(pidof qemu-ga)")?;
    let since = Instant::now();
    let (code, stderr) = bed.fail(&["backup", "web01", "--quiesce", "require"])?;
    assert_eq!(code, 1, "{stderr}");
    assert!(
        stderr.contains("cannot freeze the file systems of VM `web01`"),
        "{stderr}"
    );
    assert!(
        stderr.contains("state: no restore point was added"),
        "{stderr}"
    );
    assert!(stderr.contains("hint: is the guest agent"), "{stderr}");
    bed.assert_tidy(&vm, 1)?;
    assert_eq!(count_points(&bed)?, 1);

    let report = bed.backup(&vm, &["--quiesce", "try"])?;
    assert_eq!(report["consistency"], "crash", "{report}");
    let warning = report["warnings"][0].as_str().unwrap_or_default();
    assert!(
        warning.starts_with("the guest was not frozen: "),
        "{report}"
    );
    assert!(
        since.elapsed() < Duration::from_secs(30),
        "{:?}",
        since.elapsed()
    );
    bed.assert_tidy(&vm, 1)
}

#[test]
fn a_guest_that_somebody_else_froze_stays_frozen_after_a_backup() -> Result<()> {
    let bed = Bed::start()?;
    let (vm, guest) = start(&bed)?;
    guest.run("echo high > /data/water")?;
    guest.agent(r#"{"execute":"guest-fsfreeze-freeze"}"#)?;
    let report = bed.backup(&vm, &["--quiesce", "require"])?;
    assert_eq!(report["consistency"], "filesystem", "{report}");
    assert!(guest.is_frozen()?);
    guest.agent(r#"{"execute":"guest-fsfreeze-thaw"}"#)?;
    guest.run("sync")?;
    let image = restored(&bed, &report, "out")?;
    tool("e2fsck").arg("-fn").arg(&image).run()?;
    assert_eq!(content(&image, "/water")?, "high\n");
    bed.assert_tidy(&vm, 1)
}
