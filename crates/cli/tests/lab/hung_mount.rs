//! A file system that stops to answer, and answers again later.
//!
//! It is a FUSE mount whose daemon (bindfs) is stopped. A request that a daemon
//! has not read yet can be given up by killing who waits for it; one that was
//! read cannot, by nobody (Linux: `request_wait_answer`). So there are two ways
//! to hang: nobody reads, or a thief reads through the daemon's own descriptor
//! and answers nothing.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::tool;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::processes::signal;

const CONNECTIONS: &str = "/sys/fs/fuse/connections";
const PATIENCE: Duration = Duration::from_secs(10);
/// The kernel refuses to give a request to whoever offers less room.
const REQUEST_BYTES: usize = 2 << 20;

/// What becomes of those who wait for an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hang {
    /// They can be killed.
    Killable,
    /// They cannot.
    Unkillable,
}

/// A directory seen through a file system that can hang.
pub(crate) struct HungMount {
    daemon: Child,
    behind: PathBuf,
    at: PathBuf,
    connection: PathBuf,
}

impl HungMount {
    /// Shows the directory `behind` as `at`.
    pub(crate) fn start(behind: &Path, at: &Path) -> Result<Self> {
        fs::create_dir_all(behind)?;
        fs::create_dir_all(at)?;
        let (daemon, connection) = mount(behind, at)?;
        Ok(Self {
            daemon,
            behind: behind.to_owned(),
            at: at.to_owned(),
            connection,
        })
    }

    /// From now on nothing is answered.
    pub(crate) fn hang(&self, hang: Hang) -> Result<()> {
        signal("-STOP", self.daemon.id())?;
        if hang == Hang::Killable {
            return Ok(());
        }
        let mut requests = self.requests()?;
        // Ends with the connection.
        std::thread::spawn(move || {
            let mut request = vec![0; REQUEST_BYTES];
            while requests.read(&mut request).is_ok() {}
        });
        Ok(())
    }

    /// Returns the daemon's own descriptor, from which requests are read.
    fn requests(&self) -> Result<File> {
        let id = self.daemon.id();
        let number = fs::read_dir(format!("/proc/{id}/fd"))?
            .flatten()
            .find(|fd| fs::read_link(fd.path()).is_ok_and(|to| to == Path::new("/dev/fuse")))
            .and_then(|fd| fd.file_name().to_str()?.parse().ok())
            .context("the daemon has no FUSE device")?;
        let pid = i32::try_from(id).ok().and_then(Pid::from_raw);
        let pidfd = pidfd_open(pid.context("a process id")?, PidfdFlags::empty())?;
        let copied = pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty())?;
        Ok(File::from(copied))
    }

    /// Fails all who wait, and everything after them until it is mounted anew.
    pub(crate) fn abort(&mut self) -> Result<()> {
        fs::write(self.connection.join("abort"), "1")?;
        self.daemon.kill()?;
        self.daemon.wait()?;
        tool("umount").arg("-l").arg(&self.at).run().map(drop)
    }

    /// Answers again.
    pub(crate) fn mount_again(&mut self) -> Result<()> {
        (self.daemon, self.connection) = mount(&self.behind, &self.at)?;
        Ok(())
    }
}

impl Drop for HungMount {
    fn drop(&mut self) {
        // Nobody must be left who cannot be killed.
        drop(fs::write(self.connection.join("abort"), "1"));
        drop(self.daemon.kill());
        drop(self.daemon.wait());
        drop(Command::new("umount").arg("-l").arg(&self.at).output());
    }
}

fn mount(behind: &Path, at: &Path) -> Result<(Child, PathBuf)> {
    let outside = fs::metadata(at)?.dev();
    let daemon = Command::new("bindfs")
        .args([
            "-f",
            "-o",
            "attr_timeout=0,entry_timeout=0,negative_timeout=0",
        ])
        .args([behind, at])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .context("bindfs: is it installed? `scripts/setup.sh --for test` does")?;
    let end = Instant::now() + PATIENCE;
    let device = loop {
        let device = fs::metadata(at)?.dev();
        if device != outside {
            break device;
        }
        ensure!(Instant::now() < end, "bindfs did not mount");
        std::thread::sleep(Duration::from_millis(5));
    };
    if fs::read_dir(CONNECTIONS)?.next().is_none() {
        tool("mount")
            .args(["-t", "fusectl", "none", CONNECTIONS])
            .run()?;
    }
    // The connection is named after the device.
    let connection = Path::new(CONNECTIONS).join(device.to_string());
    ensure!(connection.exists(), "no {}", connection.display());
    Ok((daemon, connection))
}
