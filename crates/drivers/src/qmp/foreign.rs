//! What qmpbackup leaves in a QEMU when it is killed, and how it is removed.
//!
//! Its filter stays in the guest's path and its fleece grows with every write;
//! its next runs all fail at names that are taken. It names everything after
//! itself, so nothing else is touched:
//!
//! ```text
//! job     qmpbackup.<device>.<file>      cancelled first: it uses the nodes
//! node    <n>-snap                       then what it reads
//! filter  <n>-cbw                        out of the guest's path, then removed
//! node    <n>-fleece, <n>                then what it wrote to
//! file    <LEVEL>-<unix>-<name>.fleece.<format>, beside the disk
//! bitmap  qmpbackup-<uuid>               last: without them it makes a full backup
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use highwater_hypervisor::{Foreign, HypervisorError, VmRef, Wreck, Wreckage};
use serde_json::json;

use super::QmpDriver;
use super::client::Client;
use super::error::{QmpError, explain};
use super::files::{Files, Location};
use super::jobs::{Job, all_jobs};
use super::layout::{self, Layout};
use super::marks::remove_bitmap;
use super::process;
use crate::host;

/// What all its nodes and bitmaps begin with.
const PREFIX: &str = "qmpbackup-";
/// What its jobs begin with.
const JOB_PREFIX: &str = "qmpbackup.";
/// How long a job may take to end that was cancelled: it finishes what it reads.
const CANCEL_LIMIT: Duration = Duration::from_secs(30);
const CANCEL_INTERVAL: Duration = Duration::from_millis(50);

/// Everything of it, by what has to be done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Found {
    jobs: Vec<Job>,
    snapshots: Vec<String>,
    filters: Vec<Filter>,
    /// Fleece first, then what was written to.
    others: Vec<String>,
    /// Files of those nodes that go with them.
    files: Vec<PathBuf>,
    bitmaps: Vec<Bitmap>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Filter {
    node: String,
    /// The guest's device that writes to it, and what it is to write to instead.
    in_path: Option<InPath>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct InPath {
    target: String,
    device: String,
    /// `None` if QEMU does not tell.
    below: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Bitmap {
    node: String,
    name: String,
    target: String,
    is_useful: bool,
}

impl QmpDriver {
    pub(super) fn find_wreckage(
        &mut self,
        vm: &VmRef,
        of: Foreign,
    ) -> Result<Wreckage, HypervisorError> {
        let Foreign::Qmpbackup = of;
        let client = self.expect_vm(vm)?;
        let message = || format!("cannot look for remains of qmpbackup at VM `{}`", vm.name);
        let found = self
            .look_for_qmpbackup(&client)
            .map_err(|error| explain(message(), &error))?;
        let in_use = self.qmpbackup_at_work();
        Ok(Wreckage {
            wrecks: found.wrecks(),
            in_use,
            warnings: Vec::new(),
        })
    }

    pub(super) fn remove_wreckage(
        &mut self,
        vm: &VmRef,
        of: Foreign,
    ) -> Result<Wreckage, HypervisorError> {
        let Foreign::Qmpbackup = of;
        let client = self.expect_vm(vm)?;
        let message = || format!("cannot remove what qmpbackup left at VM `{}`", vm.name);
        let failed = |error: &QmpError| explain(message(), error);
        let found = self
            .look_for_qmpbackup(&client)
            .map_err(|error| failed(&error))?;
        if let Some(in_use) = self.qmpbackup_at_work() {
            return Ok(Wreckage {
                in_use: Some(in_use),
                ..Wreckage::default()
            });
        }
        self.expect_claim(vm)?;
        let warnings = remove(&client, &found);
        // What is really gone is what was there and is not any more.
        let left = self
            .look_for_qmpbackup(&client)
            .map_err(|error| failed(&error))?
            .wrecks();
        let mut wrecks = found.wrecks();
        wrecks.retain(|wreck| !left.contains(wreck));
        Ok(Wreckage {
            wrecks,
            in_use: None,
            warnings,
        })
    }

    fn look_for_qmpbackup(&self, client: &Client) -> Result<Found, QmpError> {
        let layout = layout::look(client)?;
        let jobs = all_jobs(client)?;
        let files = Files::of(self.process().as_ref());
        let mut found = find(&layout, jobs, &files);
        found.files.extend(stray_fleeces(&layout, &files));
        found.files.sort();
        found.files.dedup();
        Ok(found)
    }

    /// Says which program is at work on this VM, if one may be. One that serves
    /// another QEMU is told from it by its socket.
    fn qmpbackup_at_work(&self) -> Option<String> {
        let qemu = self.process().map(|process| process.identity.pid);
        let at_work = qmpbackups().into_iter().find(|(_, arguments)| {
            let socket = option(arguments, "--socket").filter(|it| it.starts_with('/'));
            let servers = socket.map(|socket| process::listeners(Path::new(socket)));
            match (servers, qemu) {
                (Some(servers), Some(qemu)) if !servers.is_empty() => servers.contains(&qemu),
                _ => true,
            }
        });
        at_work.map(|(pid, _)| format!("qmpbackup is running (process {pid})"))
    }
}

/// Returns the programs of that name on this host.
fn qmpbackups() -> Vec<(u32, Vec<String>)> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| Some((pid, host::arguments(pid)?)))
        .filter(|(_, arguments)| {
            // The interpreter, its options, and the program.
            let mut words = arguments.iter().take(4);
            words.any(|word| {
                Path::new(word)
                    .file_name()
                    .is_some_and(|it| it == "qmpbackup")
            })
        })
        .collect()
}

fn option<'a>(arguments: &'a [String], name: &str) -> Option<&'a str> {
    let at = arguments.iter().position(|it| it == name)?;
    arguments.get(at.checked_add(1)?).map(String::as_str)
}

/// Finds what is its own. Decides nothing else.
fn find(layout: &Layout, mut jobs: Vec<Job>, files: &Files) -> Found {
    jobs.retain(|job| job.id.starts_with(JOB_PREFIX));
    let mut found = Found {
        jobs,
        ..Found::default()
    };
    let own = layout
        .nodes
        .iter()
        .filter(|(name, _)| name.starts_with(PREFIX));
    for (name, node) in own {
        match node.driver.as_str() {
            "snapshot-access" => found.snapshots.push(name.clone()),
            "copy-before-write" => found.filters.push(Filter {
                node: name.clone(),
                in_path: in_path(name, layout),
            }),
            _ => {
                // The fleece goes first: its file is the one that grows.
                let at = if name.ends_with("-fleece") {
                    0
                } else {
                    found.others.len()
                };
                found.others.insert(at, name.clone());
                found.files.extend(temporary_file(name, layout, files));
            }
        }
    }
    for disk in &layout.disks {
        let below = layout.graph.below(&disk.root);
        let nodes = below.iter().filter(|node| !node.starts_with(PREFIX));
        for (node, facts) in nodes.filter_map(|node| Some((node, layout.blocks.nodes.get(node)?))) {
            let own = facts
                .bitmaps
                .iter()
                .filter(|it| it.name.starts_with(PREFIX));
            found.bitmaps.extend(own.map(|bitmap| Bitmap {
                node: node.clone(),
                name: bitmap.name.clone(),
                target: disk.target.clone(),
                is_useful: bitmap.recording && !bitmap.inconsistent,
            }));
        }
    }
    found
}

/// Returns the device that writes to this filter, and what it wrote to before.
fn in_path(filter: &str, layout: &Layout) -> Option<InPath> {
    let disk = layout.disks.iter().find(|disk| disk.root == filter)?;
    Some(InPath {
        target: disk.target.clone(),
        device: disk.path.clone(),
        below: layout
            .graph
            .child(filter, "file")
            .map(|below| highest(below, layout).to_owned()),
    })
}

/// Returns the filter that stood on this node before: qmpbackup leaves it out,
/// and the guest would be rid of its throttle.
fn highest<'a>(node: &'a str, layout: &'a Layout) -> &'a str {
    let is_free = |name: &str| {
        !name.starts_with(PREFIX)
            && layout.is_filter(name)
            && layout.disks.iter().all(|disk| disk.root != name)
            && !name.starts_with("hw-")
    };
    let mut name = node;
    for _ in 0..layout.nodes.len() {
        let above: Vec<&str> = layout
            .graph
            .parents(name)
            .filter(|it| is_free(it))
            .collect();
        match above.as_slice() {
            [one] => name = one,
            _ => break,
        }
    }
    name
}

/// Returns the file of a node that nobody needs without it: a fleece, or the
/// target of a backup that was never finished.
fn temporary_file(node: &str, layout: &Layout, files: &Files) -> Option<PathBuf> {
    let storage = super::disks::storage(node, layout);
    let about = layout.nodes.get(storage)?;
    let Location::File(path) = files.location(&about.driver, &about.file) else {
        return None;
    };
    let name = path.file_name()?.to_str()?;
    let is_temporary = is_fleece(name) || name.ends_with(".partial");
    // Removed is what QEMU has there, not what a path of another namespace leads to.
    (is_temporary && files.is_held_here(&path)).then_some(path)
}

/// Finds fleeces beside the disks that no process has open: their QEMU is gone.
fn stray_fleeces(layout: &Layout, files: &Files) -> Vec<PathBuf> {
    let dirs: BTreeSet<PathBuf> = layout
        .nodes
        .values()
        .filter_map(|node| match files.location(&node.driver, &node.file) {
            Location::File(path) => path.parent().map(Path::to_path_buf),
            Location::Block(_) | Location::Other(_) => None,
        })
        .filter(|dir| dir.is_absolute())
        .collect();
    let found: Vec<PathBuf> = dirs
        .into_iter()
        .filter_map(|dir| fs::read_dir(dir).ok())
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()))
        .filter(|entry| entry.file_name().to_str().is_some_and(is_fleece))
        .map(|entry| entry.path())
        .collect();
    if found.is_empty() {
        return found;
    }
    // Another VM's disks may lie in the same directory. After the list was made:
    // one that is just making its fleece has not opened it yet.
    if !qmpbackups().is_empty() {
        return Vec::new();
    }
    let Some(open) = process::open_files() else {
        return Vec::new();
    };
    found
        .into_iter()
        .filter(|path| {
            host::file_identity(path).is_some_and(|identity| !open.contains(&identity.inode))
        })
        .collect()
}

/// Returns whether this is what qmpbackup calls a fleece:
/// `<LEVEL>-<unix>-<name>.fleece.<format>`.
fn is_fleece(name: &str) -> bool {
    let levels = ["FULL-", "INC-", "COPY-", "DIFF-"];
    let Some(rest) = levels.iter().find_map(|level| name.strip_prefix(level)) else {
        return false;
    };
    let Some((time, rest)) = rest.split_once('-') else {
        return false;
    };
    let is_time = time.len() >= 9 && time.bytes().all(|digit| digit.is_ascii_digit());
    is_time && rest.contains(".fleece.")
}

impl Found {
    /// Lists it in the order in which it is removed.
    fn wrecks(&self) -> Vec<Wreck> {
        let wreck = |kind: &str, name: &str, disk: Option<&String>, harms: bool| Wreck {
            kind: kind.to_owned(),
            name: name.to_owned(),
            disk: disk.cloned(),
            harms,
        };
        let mut wrecks = Vec::new();
        wrecks.extend(
            self.jobs
                .iter()
                .map(|job| wreck("job", &job.id, None, true)),
        );
        wrecks.extend(
            self.snapshots
                .iter()
                .map(|it| wreck("node", it, None, true)),
        );
        wrecks.extend(self.filters.iter().map(|it| {
            let disk = it.in_path.as_ref().map(|in_path| &in_path.target);
            wreck("filter", &it.node, disk, true)
        }));
        wrecks.extend(self.others.iter().map(|it| wreck("node", it, None, true)));
        let files = self.files.iter();
        wrecks.extend(files.map(|it| wreck("file", &it.display().to_string(), None, true)));
        wrecks.extend(
            self.bitmaps
                .iter()
                .map(|it| wreck("bitmap", &it.name, Some(&it.target), !it.is_useful)),
        );
        wrecks
    }
}

/// Removes it all, each after what stands on it, and returns what could not be.
fn remove(client: &Client, found: &Found) -> Vec<String> {
    let mut warnings = Vec::new();
    for job in &found.jobs {
        warnings.extend(end_job(client, job).err());
    }
    let mut is_whole = warnings.is_empty();
    let mut run = |what: &str, name: &str, command: &str, arguments: serde_json::Value| -> bool {
        match client.run(command, arguments) {
            Ok(_) => true,
            Err(error) => {
                warnings.push(format!("cannot {what} `{name}`: {error}"));
                is_whole = false;
                false
            }
        }
    };
    let node = |name: &String| json!({"node-name": name});
    for name in &found.snapshots {
        run("remove node", name, "blockdev-del", node(name));
    }
    for filter in &found.filters {
        let is_free = match &filter.in_path {
            None => true,
            Some(in_path) => in_path.below.as_ref().is_some_and(|below| {
                let arguments =
                    json!({"path": in_path.device, "property": "drive", "value": below});
                run(
                    "give back the node of disk",
                    &in_path.target,
                    "qom-set",
                    arguments,
                )
            }),
        };
        if is_free {
            run(
                "remove filter",
                &filter.node,
                "blockdev-del",
                node(&filter.node),
            );
        }
    }
    for name in &found.others {
        run("remove node", name, "blockdev-del", node(name));
    }
    // A file that is still in use by a node stays.
    if is_whole {
        for path in &found.files {
            if let Err(error) = fs::remove_file(path) {
                warnings.push(format!("cannot remove file `{}`: {error}", path.display()));
            }
        }
    }
    for bitmap in &found.bitmaps {
        if let Err(error) = remove_bitmap(client, &bitmap.node, &bitmap.name) {
            warnings.push(format!("cannot remove bitmap `{}`: {error}", bitmap.name));
        }
    }
    warnings
}

/// Cancels a job and waits until it is gone.
fn end_job(client: &Client, job: &Job) -> Result<(), String> {
    let failed = |error: &QmpError| format!("cannot end job `{}`: {error}", job.id);
    let since = Instant::now();
    let cancel = json!({"device": job.id, "force": true});
    if job.status != "concluded"
        && let Err(error) = client.run("block-job-cancel", cancel)
        && !error.is_refusal()
    {
        return Err(failed(&error));
    }
    loop {
        let jobs = all_jobs(client).map_err(|error| failed(&error))?;
        match jobs.iter().find(|it| it.id == job.id) {
            None => return Ok(()),
            Some(found) if found.status == "concluded" => {
                let dismiss = client.run("job-dismiss", json!({"id": job.id}));
                dismiss.map_err(|error| failed(&error))?;
            }
            Some(found) if since.elapsed() > CANCEL_LIMIT => {
                return Err(format!("job `{}` does not end ({})", job.id, found.status));
            }
            Some(_) => std::thread::sleep(CANCEL_INTERVAL),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_qmpbackup_gives_are_its_fleeces() {
        for (name, is_one) in [
            ("FULL-1706260646-disk1.fleece.qcow2", true),
            ("INC-1706260646-block123.fleece.raw", true),
            ("FULL-1706260646-disk1.qcow2", false),
            ("my.fleece.qcow2", false),
            ("FULL-x-disk1.fleece.qcow2", false),
            ("FULL-1706260646.fleece.qcow2", false),
        ] {
            assert_eq!(is_fleece(name), is_one, "{name}");
        }
    }
}
