//! A service is killed as a whole: what its control group holds, at once.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{DiskSpec, MIB, wait_until};

use crate::processes::{guard_of, mover_of, wait_for_end};
use crate::support::{Bed, wait_for_job, write_noise};

/// A control group that goes when it is dropped.
struct Group(PathBuf);

impl Group {
    fn make() -> Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let line = mounts
            .lines()
            .find(|line| line.contains(" - cgroup2 "))
            .context("no cgroup2 hierarchy is mounted, which this test needs")?;
        let top = line.split(' ').nth(4).context("a mount has a place")?;
        let group = PathBuf::from(top).join(format!("highwater-test-{}", std::process::id()));
        fs::create_dir(&group).context("cannot make a cgroup: this test needs root")?;
        Ok(Self(group))
    }

    fn kill(&self) -> Result<()> {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .open(self.0.join("cgroup.kill"))?;
        Ok(std::io::Write::write_all(&mut file, b"1")?)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let emptied = wait_until("the group is empty", Duration::from_secs(5), || {
            Ok(fs::remove_dir(&self.0).is_ok())
        });
        drop(emptied);
    }
}

#[test]
fn a_guard_outlives_the_service_that_is_killed_as_a_whole() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed.lab.vm("web01").disk(DiskSpec::qcow2("vda", 64 * MIB));
    let vm = vm.start()?;
    write_noise(&bed, &vm, "vda", 0, 48)?;
    let group = Group::make()?;
    let slow = [
        "backup",
        "web01",
        "--workers",
        "1",
        "--compression",
        "zstd:19",
    ];
    let plain = bed.command(&slow);
    let mut command = Command::new("sh");
    command
        .args(["-c", "echo $$ >\"$0/cgroup.procs\"; exec \"$@\""])
        .arg(&group.0)
        .arg(plain.get_program())
        .args(plain.get_args())
        .envs(
            plain
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        )
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut front = command.spawn()?;
    wait_for_job(&vm)?;
    let (mover, guard) = (mover_of(&front)?, guard_of(&front)?);
    let members = fs::read_to_string(group.0.join("cgroup.procs"))?;
    ensure!(
        members.contains(&mover.to_string()),
        "the mover left: {members}"
    );
    group.kill()?;
    ensure!(!front.wait()?.success());
    wait_for_end(mover)?;
    wait_until("the guard has tidied up", Duration::from_secs(10), || {
        Ok(bed.assert_tidy(&vm, 0).is_ok())
    })?;
    wait_for_end(guard)
}
