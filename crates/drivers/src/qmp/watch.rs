//! Looks whether a session still stands.
//!
//! A fleece that fails says nothing: QEMU gives the point in time up, so that
//! the guest does not suffer, and refuses every later read of it, which fails
//! the backup. What is looked for here is what no reader would notice: a guest
//! that writes past the filter, and room that runs short.

use highwater_hypervisor::{ErrorKind, HypervisorError, ProcessIdentity, ScratchReserve, VmRef};
use highwater_model::SessionId;

use super::QmpDriver;
use super::client::Client;
use super::error::explain;
use super::objects::{Role, Which};
use super::seen::{Seat, Seen};
use super::sequence::Placed;
use super::stop::{STOPPED_BY_ERROR, state};
use crate::directories::free_bytes;

/// What is watched for one session.
pub(super) struct Watch {
    /// The QEMU it began in, if that could be told.
    pub(super) process: Option<ProcessIdentity>,
    /// The connection that hears of what happens.
    pub(super) client: Client,
    /// Events heard when the session was last looked at.
    pub(super) heard: u64,
    pub(super) disks: Vec<Watched>,
    pub(super) reserve: ScratchReserve,
    /// Whether an I/O error had stopped the guest before the session began.
    pub(super) was_stopped_before: bool,
}

/// What must stay as it is for one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Watched {
    target: String,
    export: String,
    filter: String,
    seat: Seat,
}

impl Watched {
    pub(super) fn new(session: SessionId, disk: &Placed) -> Self {
        Self {
            target: disk.target.clone(),
            export: Role::Export.name(session, &disk.target),
            filter: Role::Filter.name(session, &disk.target),
            seat: disk.seat.clone(),
        }
    }

    /// Returns what is wrong.
    fn trouble(&self, seen: &Seen) -> Option<String> {
        let target = &self.target;
        // Until the filter is out, the new image names it, and cannot be opened.
        if let Some(overlay) = seen.overlays_of(&self.filter).next() {
            return Some(format!(
                "somebody took a snapshot of disk `{target}` (node `{overlay}`)"
            ));
        }
        let export = seen.exports.iter().find(|it| it.id == self.export);
        if export.is_none_or(|export| export.is_ending) {
            return Some(format!(
                "the export of disk `{target}` was removed by somebody else"
            ));
        }
        let is_in_path = seen
            .seats_of(&self.filter)
            .iter()
            .any(|seat| match (seat, &self.seat) {
                (Seat::Device { path }, Seat::Device { path: wanted }) => path == wanted,
                (Seat::Below { node, .. }, Seat::Below { node: wanted, .. }) => node == wanted,
                (
                    Seat::Device { .. }
                    | Seat::Below { .. }
                    | Seat::Backing { .. }
                    | Seat::Fixed { .. },
                    _,
                ) => false,
            });
        (!is_in_path).then(|| {
            format!("the guest's device of disk `{target}` was given another node, or removed")
        })
    }
}

impl QmpDriver {
    pub(super) fn check_session(
        &mut self,
        vm: &VmRef,
        session: SessionId,
    ) -> Result<(), HypervisorError> {
        let lost = |because: &str| HypervisorError::session_lost(vm, session, because);
        let client = match self.expect_vm(vm) {
            Ok(client) => client,
            Err(error) if error.kind == ErrorKind::NoSuchVm => {
                return Err(lost("another VM is behind its monitor"));
            }
            Err(error) if error.kind == ErrorKind::Unreachable && self.is_gone(session) => {
                return Err(lost("QEMU ended"));
            }
            Err(error) => return Err(error),
        };
        let now = self.process().map(|found| found.identity);
        let looked = client.heard_count();
        let seen = Seen::read(&client)
            .map_err(|error| explain(format!("cannot look after VM `{}`", vm.name), &error))?;
        let stopped = state(&client)
            .map_err(|error| explain(format!("cannot look after VM `{}`", vm.name), &error))?
            == STOPPED_BY_ERROR;
        let Some(watch) = self.watches.get_mut(&session) else {
            // Somebody else's, who may know more: it stands if it is there.
            let is_there = seen.ours(&Which::All).sessions.contains(&session);
            return is_there
                .then_some(())
                .ok_or_else(|| lost("it is not there"));
        };
        if watch.process.is_some() && now.is_some() && watch.process != now {
            return Err(lost("another QEMU runs the VM"));
        }
        // As it was before anything was asked: what came meanwhile is looked at
        // next time.
        watch.heard = looked;
        watch.client = client;
        if let Some(trouble) = watch.disks.iter().find_map(|disk| disk.trouble(&seen)) {
            return Err(lost(&trouble));
        }
        // It shall not wait until everything is copied: the fleece may have taken
        // the room that it needs.
        if stopped && !watch.was_stopped_before {
            return Err(lost("QEMU stopped the guest: a write failed"));
        }
        let free = free_bytes(&watch.reserve.dir)?;
        if free < watch.reserve.bytes {
            return Err(watch.reserve.shortage(vm, session, free));
        }
        Ok(())
    }

    pub(super) fn is_session_alarmed(&mut self, session: SessionId) -> bool {
        let watch = self.watches.get(&session);
        watch.is_some_and(|it| it.client.heard_count() != it.heard || it.client.is_closed())
    }

    /// Returns whether the QEMU that a session began in is known to have ended.
    fn is_gone(&self, session: SessionId) -> bool {
        let watch = self.watches.get(&session);
        let process = watch.and_then(|watch| watch.process.as_ref());
        process.is_some_and(|process| !crate::host::is_alive(process))
    }
}
