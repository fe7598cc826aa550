//! The exporter: a child that shows the images of a VM that is off over NBD.
//!
//! `qemu-storage-daemon` opens every image read-only. A killed one leaves nothing
//! in them, while one that had them open for writing would leave each bitmap in
//! use, and so worthless. It is told what to do over its standard input, and ends
//! when we do.

use std::fs::{self, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use highwater_hypervisor::{ErrorKind, HypervisorError};
use highwater_model::SessionId;
use highwater_model::step::patience;
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::{Value, json};

use super::image::{Chain, Format, Image};
use crate::sys;

/// Opening an image takes milliseconds; storage that takes longer hangs.
const REPLY_PATIENCE: Duration = Duration::from_mins(1);
/// Replies are a few lines.
const REPLY_BYTES_MAX: usize = 1 << 20;
/// Words of a program that failed, for people.
const WORDS_BYTES_MAX: u64 = 2048;

/// A disk to be shown.
#[derive(Debug)]
pub(crate) struct Shown<'a> {
    pub(crate) chain: &'a Chain,
    /// Name of the export, and of its bitmap.
    pub(crate) export: &'a str,
    /// Bitmap whose dirty bits are shown, of every image that has it.
    pub(crate) since: Option<&'a str>,
}

/// The child.
#[derive(Debug)]
pub(crate) struct Exporter {
    child: Child,
    /// Closed with it.
    monitor: Monitor,
}

/// Where the session's exporter notes what it is.
pub(crate) fn note(socket_dir: &Path, session: SessionId) -> PathBuf {
    socket_dir.join(format!("hw-{session}.pid"))
}

impl Exporter {
    /// Starts it; when this returns, all exports can be reached.
    pub(crate) fn start(
        socket: &Path,
        session: SessionId,
        disks: &[Shown<'_>],
    ) -> Result<Self, HypervisorError> {
        let mut exporter = Self::spawn(socket, session)?;
        let prepared = exporter.prepare(socket, disks);
        match prepared {
            Ok(()) => Ok(exporter),
            Err(Trouble { kind, because }) => {
                exporter.stop();
                let mut error = HypervisorError::new(kind, "cannot export the images");
                error = error.because(because);
                if let Some(words) = words(&log(socket, session)) {
                    error = error.because(words);
                }
                Err(error)
            }
        }
    }

    fn spawn(socket: &Path, session: SessionId) -> Result<Self, HypervisorError> {
        let failed = |error: &io::Error| {
            let failed = HypervisorError::new(ErrorKind::Other, "cannot export the images")
                .because(format!("cannot run `qemu-storage-daemon`: {error}"));
            if error.kind() == io::ErrorKind::NotFound {
                // Debian's has it in `qemu-system-common` before version 8.1, others
                // in a package of its own.
                return failed.hint(
                    "install it (Debian, Ubuntu: `qemu-utils` or `qemu-system-common`; \
                     others: `qemu-storage-daemon`)",
                );
            }
            failed
        };
        let log = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(log(socket, session))
            .map_err(|error| failed(&error))?;
        let mut command = Command::new("qemu-storage-daemon");
        command
            .args(["--chardev", "stdio,id=monitor,signal=off"])
            .args(["--monitor", "chardev=monitor,mode=control"])
            // Says which session it belongs to, to whoever lists processes.
            .arg("--pidfile")
            .arg(note(socket.parent().unwrap_or(Path::new("/")), session))
            .current_dir("/")
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log);
        sys::end_with_us(&mut command);
        let mut child = command.spawn().map_err(|error| failed(&error))?;
        match (child.stdin.take(), child.stdout.take()) {
            (Some(input), Some(output)) => Ok(Self {
                child,
                monitor: Monitor {
                    input,
                    output,
                    unread: Vec::new(),
                },
            }),
            (_, _) => Err(failed(&io::Error::other("it has no standard input"))),
        }
    }

    fn prepare(&mut self, socket: &Path, disks: &[Shown<'_>]) -> Result<(), Trouble> {
        self.monitor.greeting()?;
        self.monitor.run("qmp_capabilities", &json!({}))?;
        let address = json!({ "type": "unix", "data": { "path": socket } });
        let server = json!({ "addr": address, "max-connections": 0 });
        self.monitor.run("nbd-server-start", &server)?;
        for (number, disk) in disks.iter().enumerate() {
            let node = |place: usize| format!("hw-{number}-{place}");
            let graph = graph(&disk.chain.images, &node);
            let graph = graph.ok_or_else(|| Trouble::other("a disk has no image"))?;
            self.monitor.run("blockdev-add", &graph)?;
            let bitmaps = match disk.since {
                None => Vec::new(),
                Some(mark) => {
                    self.merge(disk, mark, &node)?;
                    vec![disk.export]
                }
            };
            let export = json!({
                "type": "nbd",
                "id": disk.export,
                "node-name": node(0),
                "name": disk.export,
                "writable": false,
                "bitmaps": bitmaps,
            });
            self.monitor.run("block-export-add", &export)?;
        }
        Ok(())
    }

    /// Puts the bitmaps of a mark together in one that is only in memory. A write
    /// to an image is recorded in the bitmap of that image alone, and after a
    /// snapshot the guest's disk consists of several.
    fn merge(
        &mut self,
        disk: &Shown<'_>,
        mark: &str,
        node: &impl Fn(usize) -> String,
    ) -> Result<(), Trouble> {
        let holders = disk.chain.images.iter().enumerate();
        let holders: Vec<_> = holders
            .filter_map(|(place, image)| Some((place, image.bitmap(mark)?)))
            .collect();
        let granularity = holders.iter().map(|(_, bitmap)| bitmap.granularity).min();
        let Some(granularity) = granularity else {
            return Err(Trouble {
                kind: ErrorKind::BadMark,
                because: format!("bitmap `{mark}` is not there"),
            });
        };
        let sources: Vec<Value> = holders
            .iter()
            .map(|(place, _)| json!({ "node": node(*place), "name": mark }))
            .collect();
        let added = json!({
            "node": node(0), "name": disk.export, "disabled": true, "granularity": granularity,
        });
        let merged = json!({ "node": node(0), "target": disk.export, "bitmaps": sources });
        self.monitor.run("block-dirty-bitmap-add", &added)?;
        let outcome = self.monitor.run("block-dirty-bitmap-merge", &merged);
        outcome.map_err(|error| Trouble {
            kind: ErrorKind::BadMark,
            ..error
        })
    }

    /// Returns how it ended, if it did.
    pub(crate) fn ended(&mut self) -> Option<String> {
        match self.child.try_wait() {
            Ok(None) => None,
            Ok(Some(status)) => Some(format!("its exporter ended ({status})")),
            Err(error) => Some(format!(
                "its exporter does not tell whether it runs: {error}"
            )),
        }
    }

    /// Ends it at once. May be called again.
    pub(crate) fn stop(&mut self) {
        // Fails only if it has ended.
        drop(self.child.kill());
        // Killed while it waits for storage that hangs, it ends when that does; the
        // images are none the worse for it.
        let since = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && since.elapsed() < patience(STOP_PATIENCE)
        {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

const STOP_PATIENCE: Duration = Duration::from_secs(5);

impl Drop for Exporter {
    fn drop(&mut self) {
        self.stop();
    }
}

fn log(socket: &Path, session: SessionId) -> PathBuf {
    socket.with_file_name(format!("hw-{session}.exporter"))
}

fn words(log: &Path) -> Option<String> {
    let mut text = String::new();
    let file = fs::File::open(log).ok()?;
    file.take(WORDS_BYTES_MAX).read_to_string(&mut text).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.replace('\n', "; "))
}

/// Describes the nodes of a disk: each file by name, so that nothing depends on
/// what the images say of each other. All are shared: others may do with the files
/// what they like, and a VM starts at once.
fn graph(images: &[Image], node: &impl Fn(usize) -> String) -> Option<Value> {
    let file = |path: &Path, is_device: bool| {
        let driver = if is_device { "host_device" } else { "file" };
        json!({
            "driver": driver,
            "filename": path,
            "read-only": true,
            "force-share": true,
        })
    };
    let mut below: Option<Value> = None;
    for (place, image) in images.iter().enumerate().rev() {
        let mut described = json!({
            "driver": image.format_name(),
            "node-name": node(place),
            "read-only": true,
            "force-share": true,
            "file": file(&image.path, image.is_device),
        });
        if let (Format::Qcow2(_), Some(fields)) = (&image.format, described.as_object_mut()) {
            // Even where there is none: QEMU would look into the image for it.
            fields.insert("backing".to_owned(), below.take().unwrap_or(Value::Null));
            if let Some((data, is_device)) = &image.data_file {
                fields.insert("data-file".to_owned(), file(data, *is_device));
            }
        }
        below = Some(described);
    }
    below
}

/// Why something was not done.
#[derive(Debug)]
struct Trouble {
    kind: ErrorKind,
    because: String,
}

impl Trouble {
    fn other(because: impl Into<String>) -> Self {
        Self {
            kind: ErrorKind::Other,
            because: because.into(),
        }
    }
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::other(format!("the exporter does not answer: {error}"))
    }
}

/// Speaks QMP with the child, over its standard input and output.
#[derive(Debug)]
struct Monitor {
    input: ChildStdin,
    output: ChildStdout,
    unread: Vec<u8>,
}

impl Monitor {
    fn greeting(&mut self) -> Result<(), Trouble> {
        let deadline = deadline();
        while self.line(deadline)?.get("QMP").is_none() {}
        Ok(())
    }

    fn run(&mut self, command: &str, arguments: &Value) -> Result<(), Trouble> {
        let order = json!({ "execute": command, "arguments": arguments });
        self.input.write_all(format!("{order}\n").as_bytes())?;
        let deadline = deadline();
        loop {
            let reply = self.line(deadline)?;
            if reply.get("return").is_some() {
                return Ok(());
            }
            if let Some(error) = reply.get("error") {
                let text = error.get("desc").and_then(Value::as_str);
                let text = text.unwrap_or("it gives no reason");
                let is_locked = text.contains("Failed to get");
                return Err(Trouble {
                    kind: if is_locked {
                        ErrorKind::Busy
                    } else {
                        ErrorKind::Other
                    },
                    because: text.to_owned(),
                });
            }
            // An event.
        }
    }

    fn line(&mut self, deadline: Instant) -> Result<Value, Trouble> {
        loop {
            if let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                return serde_json::from_slice(&line)
                    .map_err(|error| Trouble::other(format!("its answer is no JSON: {error}")));
            }
            if self.unread.len() > REPLY_BYTES_MAX {
                return Err(Trouble::other("its answer does not end"));
            }
            self.read_more(deadline)?;
        }
    }

    fn read_more(&mut self, deadline: Instant) -> Result<(), io::Error> {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = rustix::time::Timespec {
            tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut ready = [PollFd::from_borrowed_fd(self.output.as_fd(), PollFlags::IN)];
        match poll(&mut ready, Some(&left)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let mut bytes = [0; 4096];
        let count = self.output.read(&mut bytes)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.unread.extend(bytes.get(..count).unwrap_or_default());
        Ok(())
    }
}

fn deadline() -> Instant {
    let now = Instant::now();
    now.checked_add(patience(REPLY_PATIENCE)).unwrap_or(now)
}
