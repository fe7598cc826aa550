//! A repository on a disk of its own that is slow, or answers no more.
//!
//! The disk is a file that nbdkit serves and nbdfuse shows as a file again, with
//! a loop device and an ext4 file system over it. When nbdkit is stopped, whoever
//! writes to the file system sleeps in the kernel and cannot be killed.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{tool, wait_until};

use crate::processes::signal;
use crate::scene::Mount;
use crate::support::Bed;

/// Below a repository; goes on when it is dropped, so that nobody sleeps for ever.
pub(crate) struct SlowDisk {
    mount: Option<Mount>,
    server: Child,
    bridge: Child,
    shown: PathBuf,
}

impl SlowDisk {
    /// Mounts such a disk where the lab's repository will be. Each request takes
    /// so much longer.
    pub(crate) fn mount(bed: &Bed, bytes: u64, delay: Duration) -> Result<Self> {
        let (file, socket) = (bed.lab.path("slow.img"), bed.lab.path("slow.sock"));
        fs::File::create(&file)?.set_len(bytes)?;
        let make = tool("mkfs.ext4").args(["-q", "-F", "-m", "0"]);
        make.arg(&file).run()?;
        let server = Command::new("nbdkit")
            .args(["--foreground", "--filter=delay", "-U"])
            .arg(&socket)
            .arg("file")
            .arg(&file)
            .arg(format!("rdelay={}ms", delay.as_millis()))
            .arg(format!("wdelay={}ms", delay.as_millis()))
            .stdin(Stdio::null())
            .spawn()
            .context("nbdkit")?;
        let shown = bed.lab.path("shown");
        fs::create_dir_all(&shown)?;
        wait_until("nbdkit listens", Duration::from_secs(20), || {
            Ok(socket.exists())
        })?;
        let mut uri = std::ffi::OsString::from("nbd+unix:///?socket=");
        uri.push(&socket);
        let bridge = Command::new("nbdfuse")
            .arg(shown.join("disk"))
            .arg(uri)
            .stdin(Stdio::null())
            .spawn()
            .context("nbdfuse, which comes with libnbd's programs")?;
        let mut disk = Self {
            mount: None,
            server,
            bridge,
            shown,
        };
        let image = disk.shown.join("disk");
        wait_until("nbdfuse shows the disk", Duration::from_secs(20), || {
            Ok(fs::metadata(&image).is_ok_and(|it| it.len() == bytes))
        })?;
        fs::create_dir_all(bed.repo())?;
        disk.mount = Some(Mount::again(&image, &bed.repo())?);
        Ok(disk)
    }

    /// From now on it answers no more.
    pub(crate) fn hang(&self) -> Result<()> {
        signal("-STOP", self.server.id())
    }

    /// It answers again.
    pub(crate) fn wake(&self) -> Result<()> {
        signal("-CONT", self.server.id())
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        drop(self.wake());
        drop(self.mount.take());
        // Waits for what the loop device still has to write.
        drop(tool("umount").arg("-l").arg(&self.shown).run());
        for child in [&mut self.bridge, &mut self.server] {
            drop(signal("-TERM", child.id()));
            drop(child.wait());
        }
    }
}

#[test]
fn a_disk_that_hangs_is_one_that_nobody_can_write_to_and_goes_on_afterwards() -> Result<()> {
    let bed = Bed::without_repository()?;
    let disk = SlowDisk::mount(&bed, 64 << 20, Duration::from_millis(1))?;
    disk.hang()?;
    let mut writer = Command::new("sh")
        .args(["-c", "echo one >\"$0/one\" && sync \"$0/one\""])
        .arg(bed.repo())
        .spawn()?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(
        writer.try_wait()?.is_none(),
        "it wrote to a disk that hangs"
    );
    let state = fs::read_to_string(format!("/proc/{}/stat", child_of(writer.id())?))?;
    ensure!(state.contains(") D "), "not in the kernel: {state}");
    disk.wake()?;
    ensure!(writer.wait()?.success());
    Ok(())
}

fn child_of(pid: u32) -> Result<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    Ok(children.trim().parse().unwrap_or(pid))
}
