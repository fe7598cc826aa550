//! Signals, locks, foreign jobs, and a repository that fails.

use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{DiskSpec, Vm, tool};

use crate::processes::{front_of, guard_of, mover_of, signal};
use crate::support::{Bed, mode, wait_for_job, write_noise};

const MIB: u64 = 1 << 20;

fn busy_vm(bed: &Bed) -> Result<Vm> {
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 256 * MIB))
        .start()?;
    bed.backup(&vm, &[])?;
    // What cannot be compressed keeps the backup busy long enough.
    write_noise(bed, &vm, "vda", 0, 64)?;
    Ok(vm)
}

fn a_signal_ends_cleanly(name: &str) -> Result<()> {
    let bed = Bed::start()?;
    let vm = busy_vm(&bed)?;
    let marks = vm.checkpoints()?;
    let child = bed.spawn_slow(&["backup", "web01"])?;
    wait_for_job(&vm)?;
    signal(name, front_of(&child))?;
    let output = child.wait_with_output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(130),
        "{}: {stderr}",
        output.status
    );
    ensure!(stderr.contains("error: interrupted"), "{stderr}");
    ensure!(
        stderr.contains("state: no restore point was added"),
        "{stderr}"
    );
    ensure!(vm.checkpoints()? == marks, "{:?}", vm.checkpoints()?);
    bed.assert_tidy(&vm, 1)?;
    let report = bed.backup(&vm, &[])?;
    ensure!(mode(&report, "vda") == "incremental", "{report}");
    Ok(())
}

#[test]
fn sigint_ends_cleanly_with_130_and_keeps_the_old_mark() -> Result<()> {
    a_signal_ends_cleanly("-INT")
}

#[test]
fn sigterm_ends_cleanly_with_130_and_keeps_the_old_mark() -> Result<()> {
    a_signal_ends_cleanly("-TERM")
}

/// A terminal signals the whole group, `kill` and systemd one process.
#[test]
fn every_signal_to_any_process_ends_a_backup_with_130_and_frees_the_vm() -> Result<()> {
    let bed = Bed::start()?;
    let vm = busy_vm(&bed)?;
    let marks = vm.checkpoints()?;
    let slow = ["--workers", "1", "--compression", "zstd:19"];
    for name in ["-INT", "-TERM", "-HUP"] {
        for to in ["front", "mover", "group"] {
            let child = bed
                .command(&[&["backup", "web01"], &slow[..]].concat())
                .stderr(std::process::Stdio::piped())
                .process_group(0)
                .spawn()?;
            wait_for_job(&vm)?;
            let front = front_of(&child);
            let since = Instant::now();
            match to {
                "front" => signal(name, front)?,
                "mover" => signal(name, mover_of(&child)?)?,
                _ => drop(
                    tool("kill")
                        .args([name, "--", &format!("-{front}")])
                        .run()?,
                ),
            }
            let output = child.wait_with_output()?;
            let (took, told) = (since.elapsed(), String::from_utf8_lossy(&output.stderr));
            ensure!(output.status.code() == Some(130), "{name} {to}: {told}");
            ensure!(told.contains("error: interrupted"), "{name} {to}: {told}");
            bed.assert_tidy(&vm, 1)?;
            ensure!(vm.checkpoints()? == marks, "{name} {to}");
            ensure!(took < Duration::from_secs(10), "{name} {to}: {took:?}");
            eprintln!(
                "{name} to the {to}: ended after {:.1} s",
                took.as_secs_f64()
            );
        }
    }
    Ok(())
}

#[test]
fn a_signal_that_was_ignored_at_the_start_ends_nothing() -> Result<()> {
    let bed = Bed::start()?;
    let vm = busy_vm(&bed)?;
    let slow = ["--workers", "1", "--compression", "zstd:19", "--json"];
    let plain = bed.command(&[&["backup", "web01"], &slow[..]].concat());
    let mut command = std::process::Command::new("nohup");
    command.arg(plain.get_program()).args(plain.get_args());
    for (name, value) in plain.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let child = command
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .context("no `nohup`: install coreutils")?;
    wait_for_job(&vm)?;
    signal("-HUP", mover_of(&child)?)?;
    signal("-HUP", front_of(&child))?;
    let output = child.wait_with_output()?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {told}", output.status);
    let report = serde_json::from_slice(&output.stdout)?;
    ensure!(mode(&report, "vda") == "incremental", "{report}");
    bed.assert_tidy(&vm, 1)
}

/// `exec 9>lock; flock 9` in a script, whose lock ends with the script.
#[test]
fn a_guard_keeps_nothing_open_that_its_caller_left_open() -> Result<()> {
    let bed = Bed::start()?;
    let vm = busy_vm(&bed)?;
    let lock = bed.lab.path("lock");
    let slow = ["--workers", "1", "--compression", "zstd:19"];
    let plain = bed.command(&[&["backup", "web01"], &slow[..]].concat());
    let script = format!("exec 9>{}; exec \"$0\" \"$@\"", lock.display());
    let mut command = std::process::Command::new("sh");
    command.args(["-c", &script]).arg(plain.get_program());
    command.args(plain.get_args());
    for (name, value) in plain.get_envs() {
        command.env(name, value.unwrap_or_default());
    }
    let mut child = command.spawn()?;
    wait_for_job(&vm)?;
    let holds = |pid: u32| -> Result<bool> {
        let mut open = std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten();
        Ok(open.any(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to == lock)))
    };
    let held = (holds(mover_of(&child)?)?, holds(guard_of(&child)?)?);
    signal("-TERM", front_of(&child))?;
    child.wait()?;
    ensure!(held.0, "the mover has what it may need");
    ensure!(!held.1, "the guard holds the lock");
    bed.assert_tidy(&vm, 1)
}

#[test]
fn a_second_backup_of_the_same_vm_is_told_who_holds_it() -> Result<()> {
    let bed = Bed::start()?;
    let vm = busy_vm(&bed)?;
    let mut first = bed.spawn_slow(&["backup", "web01"])?;
    wait_for_job(&vm)?;
    // Stopped, it holds the VM for some seconds more: the second one waits for
    // that and goes on.
    let mover = mover_of(&first)?;
    signal("-STOP", mover)?;
    let report = bed
        .backup(&vm, &[])
        .context("the second backup waits for the dying first")?;
    assert_eq!(mode(&report, "vda"), "incremental");
    signal("-CONT", mover)?;
    let first = first.wait()?;
    ensure!(
        !first.success(),
        "the first backup lost its session and must not claim success"
    );
    bed.assert_tidy(&vm, 1)
}

#[test]
fn a_repository_that_cannot_be_written_leaves_the_old_mark_and_no_session() -> Result<()> {
    let bed = Bed::start()?;
    let vm = busy_vm(&bed)?;
    let marks = vm.checkpoints()?;
    // Root may write whatever the mode says: a file where a directory is due
    // stops even root.
    let packs = bed.repo().join("packs");
    let away = bed.repo().join("packs.away");
    tool("mv").arg(&packs).arg(&away).run()?;
    std::fs::File::create(&packs)?.set_permissions(std::fs::Permissions::from_mode(0o400))?;
    let (code, stderr) = bed.fail(&["backup", "web01"])?;
    assert_eq!(code, 1, "{stderr}");
    assert!(
        stderr.contains("error: cannot store the backup of VM `web01`"),
        "{stderr}"
    );
    assert_eq!(vm.checkpoints()?, marks);
    bed.assert_tidy(&vm, 1)?;
    std::fs::remove_file(&packs)?;
    tool("mv").arg(&away).arg(&packs).run()?;
    let report = bed.backup(&vm, &[])?;
    assert_eq!(mode(&report, "vda"), "incremental");
    Ok(())
}

#[test]
fn qemu_killed_in_mid_backup_is_an_error_and_the_next_backup_heals() -> Result<()> {
    let bed = Bed::start()?;
    let vm = busy_vm(&bed)?;
    let child = bed.spawn_slow(&["backup", "web01"])?;
    wait_for_job(&vm)?;
    vm.kill_qemu()?;
    let output = child.wait_with_output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1),
        "{}: {stderr}",
        output.status
    );
    vm.start()?;
    let report = bed.backup(&vm, &[])?;
    assert_eq!(mode(&report, "vda"), "rescan: bitmap-missing");
    bed.assert_tidy(&vm, 1)
}
