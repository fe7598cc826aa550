//! What does a program cost? Runs it and sees.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, WaitOptions, set_child_subreaper, waitpid};
use serde_json::{Value, json};

/// How often memory is looked at, and the end waited for.
const LOOK: Duration = Duration::from_millis(10);
/// How long what a program left running may take to end.
const ORPHANS_MAX: Duration = Duration::from_secs(30);
/// `sysconf(_SC_CLK_TCK)` on every Linux that QEMU runs on.
const TICKS_PER_SECOND: f64 = 100.0;

/// The unit of `st_blocks`, whatever the file system's own.
const BLOCK_BYTES: u64 = 512;

/// What one run cost.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cost {
    /// Until the program ended.
    pub(crate) wall_seconds: f64,
    /// Of the program and all it started, what outlived it too.
    pub(crate) cpu_seconds: f64,
    /// Of the VM's QEMU meanwhile.
    pub(crate) qemu_seconds: f64,
    /// The most anonymous memory that the program and all it started held at once.
    pub(crate) memory_mib: f64,
    /// What it left in storage.
    pub(crate) stored_mib: Option<f64>,
}

impl Cost {
    /// Counts all that lies at `path` as stored by this run.
    pub(crate) fn with_stored(self, path: &Path) -> Result<Self> {
        Ok(Self {
            stored_mib: Some(size_mib(path)?),
            ..self
        })
    }

    /// Returns the MiB it stored; NaN if that was not asked for.
    pub(crate) fn stored(&self) -> f64 {
        self.stored_mib.unwrap_or(f64::NAN)
    }

    /// Returns all processor time spent for it.
    pub(crate) fn all_cpu_seconds(&self) -> f64 {
        self.cpu_seconds + self.qemu_seconds
    }

    /// Returns it for machines.
    pub(crate) fn json(&self) -> Value {
        json!({
            "wall_seconds": self.wall_seconds, "cpu_seconds": self.cpu_seconds,
            "qemu_cpu_seconds": self.qemu_seconds, "memory_mib": self.memory_mib,
            "stored_mib": self.stored_mib,
        })
    }
}

/// Makes this process the parent of what its children leave behind, so that
/// their time is counted too.
pub(crate) fn adopt_orphans() -> Result<()> {
    set_child_subreaper(Some(rustix::process::getpid())).context("cannot adopt orphans")
}

/// Runs a program that must succeed; returns what it printed and what it cost.
pub(crate) fn run(command: &mut Command, qemu: Option<u32>) -> Result<(String, Cost)> {
    let shown = format!("{command:?}");
    let out = tempfile::NamedTempFile::new()?;
    let err = tempfile::NamedTempFile::new()?;
    command
        .stdin(Stdio::null())
        .stdout(Stdio::from(out.reopen()?))
        .stderr(Stdio::from(err.reopen()?));
    let known = children(std::process::id());
    let qemu_before = qemu.map_or(Ok(0.0), processor_seconds)?;
    let before = waited_for_seconds()?;
    let start = Instant::now();
    let mut child = command.spawn().with_context(|| {
        format!("cannot start {shown}: is it installed? `scripts/setup.sh --for bench` does")
    })?;
    let mut memory_kib = 0;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        memory_kib = memory_kib.max(anonymous_kib(child.id()));
        thread::sleep(LOOK);
    };
    let wall_seconds = start.elapsed().as_secs_f64();
    reap_orphans(&known).with_context(|| shown.clone())?;
    let cost = Cost {
        wall_seconds,
        cpu_seconds: waited_for_seconds()? - before,
        qemu_seconds: qemu.map_or(Ok(0.0), processor_seconds)? - qemu_before,
        memory_mib: memory_kib as f64 / 1024.0,
        stored_mib: None,
    };
    let said = fs::read_to_string(out.path())?;
    ensure!(
        status.success(),
        "{shown}: {status}\n{said}{}",
        fs::read_to_string(err.path())?
    );
    Ok((said, cost))
}

fn reap_orphans(known: &BTreeSet<u32>) -> Result<()> {
    let end = Instant::now() + ORPHANS_MAX;
    loop {
        let all = children(std::process::id());
        let mut left = all.difference(known).peekable();
        if left.peek().is_none() {
            return Ok(());
        }
        for pid in left {
            let pid = i32::try_from(*pid).ok().and_then(Pid::from_raw);
            waitpid(pid, WaitOptions::NOHANG)?;
        }
        ensure!(Instant::now() < end, "what it started does not end");
        thread::sleep(LOOK);
    }
}

/// Returns the processor time of a process.
fn processor_seconds(pid: u32) -> Result<f64> {
    ticks(&format!("/proc/{pid}/stat"), 11)
}

/// Returns the processor time of all processes this one has waited for, and of
/// those they had waited for.
fn waited_for_seconds() -> Result<f64> {
    ticks("/proc/self/stat", 13)
}

/// Adds up two neighbouring fields, counted from the one behind the name.
fn ticks(file: &str, first: usize) -> Result<f64> {
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {file}"))?;
    // The name in parentheses may hold anything, so look behind it.
    let fields = text.rsplit_once(") ").context("a stat without a name")?.1;
    let mut times = fields.split(' ').skip(first).take(2).map(str::parse::<u64>);
    let (user, system) = (
        times.next().context("too short")??,
        times.next().context("too short")??,
    );
    Ok((user + system) as f64 / TICKS_PER_SECOND)
}

/// Returns the process ids of the direct children of all its threads.
fn children(pid: u32) -> BTreeSet<u32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    let lists = threads
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    lists.flat_map(|list| numbers(&list)).collect()
}

/// Returns the anonymous memory of a process and all below it; what is gone
/// meanwhile has none.
fn anonymous_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let own = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let own = own
        .and_then(|line| line.split_whitespace().next()?.parse().ok())
        .unwrap_or(0);
    children(pid)
        .into_iter()
        .map(anonymous_kib)
        .fold(own, u64::saturating_add)
}

/// Finds the process that has `inner` as its id in a namespace and `argument`
/// somewhere on its command line.
pub(crate) fn outer_pid(inner: &str, argument: &str) -> Result<u32> {
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let read = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
        let status = String::from_utf8_lossy(&read("status")).into_owned();
        let inmost = status
            .lines()
            .find_map(|line| line.strip_prefix("NSpid:"))
            .and_then(|ids| ids.split_whitespace().next_back());
        if inmost == Some(inner) && String::from_utf8_lossy(&read("cmdline")).contains(argument) {
            return Ok(pid);
        }
    }
    anyhow::bail!("no process {inner} with {argument}")
}

fn numbers(text: &str) -> Vec<u32> {
    text.split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect()
}

/// Returns the length of all files below a directory; of a single file, which
/// may be an image with holes, the room it takes.
pub(crate) fn size_mib(path: &Path) -> Result<f64> {
    Ok(size_bytes(path)? as f64 / f64::from(1 << 20))
}

fn size_bytes(path: &Path) -> Result<u64> {
    if path.is_file() {
        return Ok(path.metadata()?.blocks() * BLOCK_BYTES);
    }
    let mut sum = 0;
    for entry in fs::read_dir(path).with_context(|| format!("cannot list {}", path.display()))? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sum += size_bytes(&entry.path())?;
        } else if kind.is_file() {
            sum += entry.metadata()?.len();
        }
    }
    Ok(sum)
}
