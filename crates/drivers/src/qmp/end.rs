//! Ends a session: takes out of QEMU what it put there.
//!
//! ```text
//! guest runs again -> exports -> server -> snapshots -> guest's path -> filters -> fleeces, keys
//! ```
//!
//! Nothing is remembered of the start. What is ours is looked up by its names,
//! taken out as far as it can be, and looked up again until nothing is left: so
//! it is the same whether a session ends, has failed half-way, was killed
//! anywhere (in here, too), or is undone by somebody who never knew it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use highwater_hypervisor::{BeginOrder, Ended, ErrorKind, HypervisorError, VmRef};
use highwater_model::SessionId;
use highwater_model::step::{Step, pass, patience};
use serde_json::json;

use super::QmpDriver;
use super::client::Client;
use super::error::{QmpError, explain};
use super::objects::{Ours, Role, Which};
use super::seen::{Seat, Seen};
use super::sequence::switch;
use super::servers::{accepts, is_visible, listening};
use super::stop::resume_after;
use crate::directories::SessionPaths;
use crate::host;
use crate::names::session_of_scratch;

/// How long exports may take to go: reads that are under way on slow storage
/// are waited for.
const GONE_DEADLINE: Duration = Duration::from_secs(90);
/// How long something may be in use that nobody reads any more: a request of
/// the guest's that is under way on slow storage is waited for.
const BUSY_DEADLINE: Duration = Duration::from_secs(5);
/// How long something may be refused for another reason.
const REFUSED_DEADLINE: Duration = Duration::from_secs(2);
const INTERVAL: Duration = Duration::from_millis(20);

/// Sessions whose server is meant, and where each listens, if that is known.
pub(super) type Known = BTreeMap<SessionId, Option<PathBuf>>;

/// What was taken out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Cleared {
    /// Whose, as far as it could be told.
    pub(super) sessions: BTreeSet<SessionId>,
    /// Whether there was anything.
    pub(super) was_there: bool,
    /// Whether something is still there that holds files (a server holds none).
    pub(super) is_left: bool,
    /// What could not be taken out, and what else was done for the guest.
    pub(super) warnings: Vec<String>,
}

impl QmpDriver {
    pub(super) fn end_session(&mut self, order: &BeginOrder) -> Result<Ended, HypervisorError> {
        let paths = SessionPaths::of_order(order);
        let mut ended = Ended::default();
        if let Some(client) = self.client_unless_gone(&order.vm, &paths)? {
            let targets = order.disks.iter().map(|disk| disk.target.as_str());
            let which = Which::of_session(order.session, targets);
            let known = [(order.session, Some(paths.socket()))].into();
            let cleared = self.clear(&order.vm, &client, &which, &known)?;
            ended.ended_job = cleared.was_there;
            ended.warnings = cleared.warnings;
            if cleared.was_there || paths.exist() {
                // Before it is thawed: a guest that stands does not answer.
                let resumed = self.resume_after_error(&order.vm, &client, &paths)?;
                ended.warnings.extend(resumed);
            }
            ended.warnings.extend(self.thaw_after(&order.vm, &paths));
            if cleared.is_left {
                // QEMU still writes to its files, and whoever tries again finds
                // it by them.
                self.watches.remove(&order.session);
                ended.warnings.push(not_ended(&order.vm, order.session));
                return Ok(ended);
            }
        } else {
            paths.note_thawed();
        }
        pass(Step::JobEnded);
        self.watches.remove(&order.session);
        ended.warnings.extend(paths.remove());
        pass(Step::FilesRemoved);
        Ok(ended)
    }

    pub(super) fn end_leftover_session(
        &mut self,
        vm: &VmRef,
        session: SessionId,
    ) -> Result<Ended, HypervisorError> {
        let client = self.expect_vm(vm)?;
        let seen = Seen::read(&client).map_err(|error| explain(cannot_end(vm), &error))?;
        let fleeces = seen.nodes.iter().filter(|(name, node)| {
            Role::of(name).is_some_and(|(role, _)| role == Role::Fleece)
                && session_of_scratch(&node.file) == Some(session)
        });
        let hashes = fleeces.clone().filter_map(|(name, _)| Role::of(name));
        let mut hashes: BTreeSet<String> = hashes.map(|(_, hash)| hash.to_owned()).collect();
        hashes.extend(Which::of_once(session));
        // Where its files are, before QEMU forgets it.
        let mut files = fleeces.filter_map(|(_, node)| node.path());
        let scratch_dir = files.find_map(|file| Some(file.parent()?.to_path_buf()));
        let which = Which::Hashes(hashes);
        let paths = scratch_dir.and_then(|dir| SessionPaths::of_scratch_dir(session, &dir));
        let known = [(session, paths.as_ref().map(SessionPaths::socket))].into();
        let cleared = self.clear(vm, &client, &which, &known)?;
        let mut ended = Ended {
            ended_job: cleared.was_there,
            warnings: cleared.warnings,
        };
        if let Some(paths) = &paths {
            let resumed = self.resume_after_error(vm, &client, paths)?;
            ended.warnings.extend(resumed);
            ended.warnings.extend(self.thaw_after(vm, paths));
        }
        if cleared.is_left {
            ended.warnings.push(not_ended(vm, session));
        } else if let Some(paths) = paths {
            ended.warnings.extend(paths.remove());
        }
        Ok(ended)
    }

    /// Returns the connection; none if the QEMU that the session began in is
    /// known to be gone, and everything that was in it.
    fn client_unless_gone(
        &mut self,
        vm: &VmRef,
        paths: &SessionPaths,
    ) -> Result<Option<Client>, HypervisorError> {
        match self.expect_vm(vm) {
            Ok(client) => Ok(Some(client)),
            Err(error) if error.kind == ErrorKind::NoSuchVm => Ok(None),
            Err(error) => match paths.process() {
                Some(process) if !host::is_alive(&process) => Ok(None),
                // Ended before, with its files: a second end learns whether there is a point.
                None if self.line.is_over() => Ok(None),
                // It lives, or nobody knows: it may still hold everything.
                Some(_) | None => Err(error),
            },
        }
    }

    /// Takes out of QEMU what is ours, and the server if it is of one of these
    /// sessions or of one whose fleece is found.
    pub(super) fn clear(
        &self,
        vm: &VmRef,
        client: &Client,
        which: &Which,
        known: &Known,
    ) -> Result<Cleared, HypervisorError> {
        let failed = |error: &QmpError| explain(cannot_end(vm), error);
        let mut cleared = Cleared::default();
        let since = Instant::now();
        let mut refused_since = None;
        loop {
            let seen = Seen::read(client).map_err(|error| failed(&error))?;
            let ours = seen.ours(which);
            let served = self.our_server(&ours, known);
            if ours.is_nothing() && served.is_empty() {
                break;
            }
            if !cleared.was_there {
                pass(Step::JobSeen);
            }
            cleared.was_there = true;
            cleared.sessions.extend(ours.sessions.iter().chain(&served));
            let mut pass_over = Pass {
                driver: self,
                vm,
                client,
                seen: &seen,
                ours: &ours,
                warnings: Vec::new(),
                refused: Vec::new(),
            };
            pass_over.run(!served.is_empty())?;
            let Pass {
                warnings, refused, ..
            } = pass_over;
            cleared.warnings.extend(warnings);
            let Some(worst) = refused
                .iter()
                .map(|it| it.1)
                .min_by_key(|kind| *kind != ErrorKind::Busy)
            else {
                // All done as it seems; looked at once more.
                if since.elapsed() > patience(GONE_DEADLINE) {
                    cleared.is_left = !ours.is_nothing();
                    break;
                }
                continue;
            };
            let (since, deadline) = match worst {
                ErrorKind::Busy if !ours.exports.is_empty() => (since, patience(GONE_DEADLINE)),
                ErrorKind::Busy => (
                    *refused_since.get_or_insert_with(Instant::now),
                    patience(BUSY_DEADLINE),
                ),
                _ => (
                    *refused_since.get_or_insert_with(Instant::now),
                    REFUSED_DEADLINE,
                ),
            };
            if since.elapsed() > deadline {
                cleared.is_left = !ours.is_nothing();
                let in_vm = |(because, _)| {
                    format!(
                        "cannot tidy up after a backup in VM `{}`: {because}",
                        vm.name
                    )
                };
                cleared.warnings.extend(refused.into_iter().map(in_vm));
                break;
            }
            std::thread::sleep(INTERVAL);
        }
        Ok(cleared)
    }

    /// Returns whose server QEMU runs, if it is one of those that are meant.
    fn our_server(&self, ours: &Ours, known: &Known) -> BTreeSet<SessionId> {
        let sessions = known.keys().chain(&ours.sessions);
        let sessions: BTreeSet<SessionId> = sessions.copied().collect();
        let process = self.process().map(|found| found.identity.pid);
        let mut found = listening(process, &sessions);
        found.retain(|session| sessions.contains(session));
        if !is_visible(process) {
            // In a container, say: its sockets are in no table of ours.
            let sockets = known
                .iter()
                .filter_map(|(id, socket)| Some((id, socket.as_ref()?)));
            let accepting = sockets.filter(|(_, socket)| accepts(socket));
            found.extend(accepting.map(|(session, _)| *session));
        }
        found
    }
}

/// One attempt at everything, each thing after what stands on it.
struct Pass<'a> {
    driver: &'a QmpDriver,
    vm: &'a VmRef,
    client: &'a Client,
    seen: &'a Seen,
    ours: &'a Ours,
    warnings: Vec<String>,
    /// What could not be done, to be tried again.
    refused: Vec<(String, ErrorKind)>,
}

impl Pass<'_> {
    fn run(&mut self, is_served: bool) -> Result<(), HypervisorError> {
        // First: a guest waits for it.
        if !self.ours.stops.is_empty() {
            self.resume()?;
        }
        self.remove_exports()?;
        if is_served {
            self.stop_server()?;
        }
        for node in &self.ours.snapshots {
            if self.try_run("blockdev-del", json!({"node-name": node}))? {
                pass(Step::QmpSnapshotRemoved);
            }
        }
        for filter in &self.ours.filters {
            self.take_out(filter)?;
        }
        for node in &self.ours.fleeces {
            if self.try_run("blockdev-del", json!({"node-name": node}))? {
                pass(Step::QmpFleeceRemoved);
            }
        }
        for id in &self.ours.keys {
            self.try_run("object-del", json!({"id": id}))?;
        }
        Ok(())
    }

    /// Does something; notes what QEMU refuses.
    fn try_run(
        &mut self,
        command: &str,
        arguments: serde_json::Value,
    ) -> Result<bool, HypervisorError> {
        let outcome = self.client.run(command, arguments);
        self.note(outcome.map(drop))
    }

    fn note(&mut self, outcome: Result<(), QmpError>) -> Result<bool, HypervisorError> {
        match outcome {
            Ok(()) => Ok(true),
            Err(error) if error.is_refusal() || matches!(error, QmpError::Malformed(_)) => {
                self.refused.push((error.to_string(), error.kind()));
                Ok(false)
            }
            Err(error) => Err(explain(cannot_end(self.vm), &error)),
        }
    }

    /// Does what would hit a successor's session as well, if there were one.
    fn act(
        &mut self,
        deed: impl FnOnce(&Client) -> Result<(), QmpError>,
    ) -> Result<bool, HypervisorError> {
        let (driver, vm, client) = (self.driver, self.vm, self.client);
        let outcome = driver.act(vm, client, || Ok(deed(client)))?;
        self.note(outcome)
    }

    fn resume(&mut self) -> Result<(), HypervisorError> {
        let ours = self.ours;
        let mut was_stopped = false;
        self.act(|client| {
            was_stopped = resume_after(client, &ours.stops)?;
            Ok(())
        })?;
        if was_stopped {
            let warning = "the guest was left stopped by a session and runs again";
            self.warnings.push(warning.to_owned());
        }
        Ok(())
    }

    /// Removes our exports, and waits a moment for those that are being read.
    fn remove_exports(&mut self) -> Result<(), HypervisorError> {
        if self.ours.exports.is_empty() {
            return Ok(());
        }
        let ending = |id: &String| {
            let mut exports = self.seen.exports.iter();
            exports.any(|export| export.id == *id && export.is_ending)
        };
        let to_end: Vec<String> = self
            .ours
            .exports
            .iter()
            .filter(|id| !ending(id))
            .cloned()
            .collect();
        for id in to_end {
            self.try_run("block-export-del", json!({"id": id, "mode": "hard"}))?;
        }
        let left = || -> Result<bool, QmpError> {
            let seen = Seen::read(self.client)?;
            let mut exports = seen.exports.iter();
            Ok(exports.any(|export| self.ours.exports.contains(&export.id)))
        };
        let since = Instant::now();
        while left().map_err(|error| explain(cannot_end(self.vm), &error))? {
            if since.elapsed() > patience(GONE_DEADLINE) {
                let because = "an export does not end".to_owned();
                self.refused.push((because, ErrorKind::Busy));
                return Ok(());
            }
            std::thread::sleep(INTERVAL);
        }
        pass(Step::QmpExportsRemoved);
        Ok(())
    }

    /// Stops the server if it serves nothing but ours: we started it.
    fn stop_server(&mut self) -> Result<(), HypervisorError> {
        if self.ours.is_shared {
            self.refused.push((
                "the NBD server also serves exports of somebody else".to_owned(),
                ErrorKind::Other,
            ));
            return Ok(());
        }
        let stop = |client: &Client| client.run("nbd-server-stop", json!({})).map(drop);
        if self.act(stop)? {
            pass(Step::QmpServerStopped);
        }
        Ok(())
    }

    /// Gives the guest's device the node below the filter, whatever that is by
    /// now, and removes the filter.
    fn take_out(&mut self, filter: &str) -> Result<(), HypervisorError> {
        let seats: Vec<Seat> = self.seen.seats_of(filter);
        if !seats.is_empty() {
            let Some(below) = self.seen.below.get(filter) else {
                let because = format!("QEMU does not tell what is below node `{filter}`");
                self.refused.push((because, ErrorKind::Other));
                return Ok(());
            };
            for seat in &seats {
                if self.act(|client| switch(client, seat, below))? {
                    pass(Step::QmpSwitchedBack);
                }
            }
        }
        if self.try_run("blockdev-del", json!({"node-name": filter}))? {
            pass(Step::QmpFilterRemoved);
        }
        Ok(())
    }
}

fn not_ended(vm: &VmRef, session: SessionId) -> String {
    format!(
        "session {session} is still in VM `{}`, and its files stay where they are: the next \
         backup tries to end it again",
        vm.name
    )
}

pub(super) fn cannot_end(vm: &VmRef) -> String {
    format!("cannot tidy up after a backup in VM `{}`", vm.name)
}
