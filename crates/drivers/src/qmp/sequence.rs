//! The commands of a session's start, in their order.
//!
//! ```text
//! server       QEMU has one NBD server: taken first, so that one in the way is
//!              known before anything is done
//! bitmaps      NEW records from here on, all disks at once
//! fleeces, filters                                     nothing is in the guest's path
//! [stop]       only if there are several disks and the guest runs
//! switch       each disk's filter into the guest's path     <- the point in time
//! [cont]
//! snapshots, merge (OLD into a bitmap of the snapshot), exports
//! ```
//!
//! NEW is there before the point and OLD is copied after it, so both may hold
//! clusters written in between: those are read once more than needed, and none
//! is missed. The filter knows no bitmap: with one, a cluster that is first
//! written after the bitmap was made could not be read at the point.

use std::path::PathBuf;
use std::time::Duration;

use highwater_hypervisor::{
    BeginOrder, ErrorKind, HypervisorError, NewMark, ReadMode, RunState, VmRef,
};
use highwater_model::step::{Step, pass};
use serde_json::{Value, json};

use super::client::Client;
use super::error::{QmpError, explain};
use super::line::Line;
use super::objects::Role;
use super::seen::Seat;
use super::stop::Stopped;
use crate::directories::SessionPaths;
use crate::host;
use crate::names::export_name;

/// How long the filter waits for a copy before it gives the point in time up,
/// seconds. It is the latency of a guest's write.
const COPY_TIMEOUT_S: u32 = 5;

/// One ordered disk, and where its filter goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Placed {
    pub(super) target: String,
    pub(super) mode: ReadMode,
    /// The node that carries marks.
    pub(super) node: String,
    pub(super) seat: Seat,
    /// What the filter stands on.
    pub(super) below: String,
    /// The device's absolute QOM path.
    pub(super) device: String,
    pub(super) size_bytes: u64,
    pub(super) encrypted: bool,
    /// The image, where it is a local file or device.
    pub(super) image: Option<PathBuf>,
}

/// A node that gets a bitmap of the new mark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Marked {
    pub(super) target: String,
    pub(super) node: String,
    pub(super) persistent: bool,
}

/// How the guest ran right before its disks are switched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) state: RunState,
    /// QEMU's word for it.
    pub(super) word: String,
    /// Events heard before it was asked for.
    pub(super) heard: u64,
}

/// Runs the commands of one session.
pub(super) struct Sequence<'a> {
    pub(super) client: &'a Client,
    pub(super) order: &'a BeginOrder,
    pub(super) disks: &'a [Placed],
    pub(super) paths: &'a SessionPaths,
}

impl Sequence<'_> {
    pub(super) fn run(&self, command: &str, arguments: Value) -> Result<Value, HypervisorError> {
        let answer = self.client.run(command, arguments);
        answer.map_err(|error| explain(cannot_begin(&self.order.vm), &error))
    }

    fn name(&self, role: Role, disk: &Placed) -> String {
        role.name(self.order.session, &disk.target)
    }

    pub(super) fn start_server(&self) -> Result<(), HypervisorError> {
        let path = self.paths.socket();
        let address = json!({"type": "unix", "data": {"path": path}});
        let started = self
            .client
            .run("nbd-server-start", json!({"addr": address}));
        started.map_err(|error| {
            let is_taken = error.refusal().is_some_and(|it| it.contains("already"));
            let explained = explain(cannot_begin(&self.order.vm), &error);
            if is_taken {
                return explained.hint(
                    "QEMU has one NBD server, and somebody else has started it, or a backup \
                     of which no file is left; it is ended with `nbd-server-stop` at QEMU's \
                     monitor",
                );
            }
            explained
        })?;
        pass(Step::QmpServerStarted);
        Ok(())
    }

    /// All or none: QEMU takes back what it did of a transaction that fails.
    pub(super) fn add_bitmaps(
        &self,
        mark: &NewMark,
        nodes: &[Marked],
    ) -> Result<(), HypervisorError> {
        let name = mark.name.to_string();
        let add = |marked: &Marked| {
            let data = json!({"node": marked.node, "name": name, "persistent": marked.persistent});
            json!({"type": "block-dirty-bitmap-add", "data": data})
        };
        let actions: Vec<Value> = nodes.iter().map(add).collect();
        self.run("transaction", json!({ "actions": actions }))?;
        pass(Step::QmpBitmapsAdded);
        Ok(())
    }

    /// Has QEMU know the key of encrypted fleeces.
    pub(super) fn add_key(&self, value: &str) -> Result<(), HypervisorError> {
        let id = Role::Key.name(self.order.session, "");
        let key = json!({"qom-type": "secret", "id": id, "data": value});
        self.run("object-add", key)?;
        pass(Step::QmpKeyAdded);
        Ok(())
    }

    pub(super) fn add_fleece(&self, disk: &Placed) -> Result<(), HypervisorError> {
        let mut fleece = json!({
            "driver": "qcow2",
            "node-name": self.name(Role::Fleece, disk),
            // It is of no use to anybody once this QEMU is gone.
            "cache": {"no-flush": true},
            "file": {
                "driver": "file",
                "node-name": self.name(Role::FleeceFile, disk),
                "filename": self.paths.scratch(&disk.target),
            },
        });
        if let (true, Some(options)) = (disk.encrypted, fleece.as_object_mut()) {
            let key = Role::Key.name(self.order.session, "");
            let open = json!({"format": "luks", "key-secret": key});
            options.insert("encrypt".to_owned(), open);
        }
        self.run("blockdev-add", fleece)?;
        pass(Step::QmpFleeceAdded);
        Ok(())
    }

    pub(super) fn add_filter(&self, disk: &Placed) -> Result<(), HypervisorError> {
        let filter = json!({
            "driver": "copy-before-write",
            "node-name": self.name(Role::Filter, disk),
            "file": disk.below,
            "target": self.name(Role::Fleece, disk),
            // Trouble with the fleece costs the backup, never the guest.
            "on-cbw-error": "break-snapshot",
            "cbw-timeout": COPY_TIMEOUT_S,
            // What is below decides; a filter that swallowed discards would
            // have the image grow.
            "discard": "unmap",
        });
        self.run("blockdev-add", filter)?;
        pass(Step::QmpFilterAdded);
        Ok(())
    }

    /// Takes the point in time of all disks. Returns for how long the guest was
    /// stopped, if it was.
    pub(super) fn switch_all(
        &self,
        found: &Found,
        line: &Line,
    ) -> Result<Option<Duration>, HypervisorError> {
        let is_several = self.disks.len() > 1;
        if found.state != RunState::Running || !is_several {
            for disk in self.disks {
                self.switch(disk)?;
            }
            if is_several && has_resumed(self.client, found.heard) {
                return Err(HypervisorError::new(
                    ErrorKind::WrongState,
                    cannot_begin(&self.order.vm),
                )
                .because("somebody let the guest run while its disks were switched"));
            }
            return Ok(None);
        }
        let stopped = Stopped::stop(self.client, line, &self.order.vm, self.order.session)?;
        for disk in self.disks {
            stopped.expect_time()?;
            self.switch(disk)?;
        }
        stopped.expect_still_stopped()?;
        let elapsed = stopped.resume()?;
        pass(Step::QmpResumed);
        Ok(Some(elapsed))
    }

    fn switch(&self, disk: &Placed) -> Result<(), HypervisorError> {
        let filter = self.name(Role::Filter, disk);
        let switched = switch(self.client, &disk.seat, &filter);
        switched.map_err(|error| explain(cannot_begin(&self.order.vm), &error))?;
        pass(Step::QmpSwitched);
        Ok(())
    }

    pub(super) fn add_snapshot(&self, disk: &Placed) -> Result<(), HypervisorError> {
        let snapshot = json!({
            "driver": "snapshot-access",
            "node-name": self.name(Role::Snapshot, disk),
            "file": self.name(Role::Filter, disk),
        });
        self.run("blockdev-add", snapshot)?;
        pass(Step::QmpSnapshotAdded);
        Ok(())
    }

    /// Copies each old mark's bitmap to the snapshot it is exported with.
    pub(super) fn merge(&self) -> Result<(), HypervisorError> {
        let mut actions = Vec::new();
        for disk in self.disks {
            let ReadMode::Since(mark) = &disk.mode else {
                continue;
            };
            let node = self.name(Role::Snapshot, disk);
            let bitmap = self.name(Role::Changed, disk);
            let add = json!({"node": node, "name": bitmap, "disabled": true});
            actions.push(json!({"type": "block-dirty-bitmap-add", "data": add}));
            let old = json!([{"node": disk.node, "name": mark.to_string()}]);
            let merge = json!({"node": node, "target": bitmap, "bitmaps": old});
            actions.push(json!({"type": "block-dirty-bitmap-merge", "data": merge}));
        }
        if !actions.is_empty() {
            self.run("transaction", json!({ "actions": actions }))?;
        }
        pass(Step::QmpMerged);
        Ok(())
    }

    pub(super) fn export(&self, disk: &Placed) -> Result<(), HypervisorError> {
        let mut export = json!({
            "type": "nbd",
            "id": self.name(Role::Export, disk),
            "node-name": self.name(Role::Snapshot, disk),
            "name": export_name(self.order.session, &disk.target),
            "writable": false,
        });
        if let (ReadMode::Since(_), Some(options)) = (&disk.mode, export.as_object_mut()) {
            let bitmaps = json!([self.name(Role::Changed, disk)]);
            options.insert("bitmaps".to_owned(), bitmaps);
        }
        self.run("block-export-add", export)?;
        pass(Step::QmpExported);
        Ok(())
    }
}

/// Puts a node into a guest's path.
pub(super) fn switch(client: &Client, seat: &Seat, node: &str) -> Result<(), QmpError> {
    let (command, arguments) = match seat {
        Seat::Device { path } => (
            "qom-set",
            json!({"path": path, "property": "drive", "value": node}),
        ),
        Seat::Below { options, .. } => {
            let mut options = options.clone();
            options.insert("file".to_owned(), json!(node));
            ("blockdev-reopen", json!({"options": [options]}))
        }
        // Has no block to copy, as nothing but filters is in between, so it is done
        // at once: it names what is below as backing, in the image, too. (What else
        // would write that down writes the image's own format for that of its
        // backing.)
        Seat::Backing { overlay } => (
            "block-stream",
            json!({"job-id": format!("hw-unchain-{overlay}").replace('#', ""), "device": overlay, "base-node": node}),
        ),
        Seat::Fixed { node: above } => {
            return Err(QmpError::Malformed(format!(
                "node `{above}` cannot be given another child"
            )));
        }
    };
    client.run(command, arguments).map(drop)
}

/// Returns whether the guest was let run, or woke up, since so many events.
pub(super) fn has_resumed(client: &Client, since: u64) -> bool {
    let heard = client.heard();
    heard
        .since(since)
        .iter()
        .any(|event| matches!(event.name.as_str(), "RESUME" | "WAKEUP"))
}

/// Has the host write out what QEMU has written: stopping a guest waits until
/// the last byte of all its disks is on stable storage, and the guest with it.
/// Whatever cannot be done here is done then.
pub(super) fn sync_images(disks: &[Placed]) {
    for image in disks.iter().filter_map(|disk| disk.image.as_ref()) {
        drop(host::open_without_waiting(image).and_then(|file| file.sync_data()));
    }
}

pub(super) fn cannot_begin(vm: &VmRef) -> String {
    format!("cannot begin a backup of VM `{}`", vm.name)
}
