//! The QMP driver: a VM whose QEMU is reached over its own monitor, without
//! libvirt.
//!
//! ```text
//! observe   run state, nodes, devices, jobs, the process       (reads only)
//! begin     bitmap -> fleece -> filter -> guest's path -> snapshot -> export
//! check     do the session's nodes stand, is there room for the fleece
//! end       export -> snapshot -> guest's path back -> filter -> fleece
//! mark      remove bitmaps
//! survey    what else is there (jobs, exports, nodes), for people
//! sweep     what dead sessions left in the graph, and their directories
//! ```
//!
//! One driver is one VM. A monitor serves one client at a time, so the driver
//! and whoever claims the VM through it share one connection ([`line`]).

mod address;
mod agent;
mod begin;
mod claims;
mod client;
mod disks;
mod end;
mod error;
mod files;
mod foreign;
mod freeze;
#[doc(hidden)]
pub mod fuzzing;
mod graph;
mod identity;
mod iothreads;
mod jobs;
mod layout;
mod line;
mod marks;
mod objects;
mod observe;
mod options;
mod peers;
mod process;
mod secrets;
mod seen;
mod sequence;
mod servers;
mod stop;
mod survey;

mod sweep;
mod tpm;
mod watch;
mod wire;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use highwater_hypervisor::{
    BeginOrder, Begun, Claimant, Driver, Ended, Foreign, HypervisorError, LeftDirectory, MarkOrder,
    RunState, Surroundings, Swept, VmFacts, VmRef, Wreckage,
};
use highwater_model::{ClaimId, Clock, SessionId};

use client::Client;
use line::Line;
use options::Options;
use watch::Watch;

use crate::host::QemuProcess;

/// Drives the VM behind one monitor.
pub struct QmpDriver {
    options: Options,
    line: Arc<Line>,
    clock: Arc<dyn Clock>,
    /// What is watched for sessions that this value began.
    watches: BTreeMap<SessionId, Watch>,
    /// The claim that all this is done for.
    claim: Option<ClaimId>,
}

impl fmt::Debug for QmpDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QmpDriver")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl QmpDriver {
    /// Connects to the monitor at `uri`: `qmp:/path/to.sock`,
    /// `qmp:tcp:127.0.0.1:PORT`, both with `?name=N&uuid=U&agent=A&config=F`.
    pub fn connect(uri: &str, clock: Arc<dyn Clock>) -> Result<Self, HypervisorError> {
        let options = Options::parse(uri)?;
        let line = Line::open(options.monitor.clone())?;
        Ok(Self {
            options,
            line: Arc::new(line),
            clock,
            watches: BTreeMap::new(),
            claim: None,
        })
    }

    /// Returns the connection, made anew if it has ended: a QEMU that was
    /// restarted listens at the same place.
    fn client(&self) -> Result<Client, HypervisorError> {
        self.line.client()
    }

    /// Returns the QEMU that is there now, if it can be told which it is.
    fn process(&self) -> Option<QemuProcess> {
        self.line.process()
    }
}

impl Driver for QmpDriver {
    fn list(&mut self) -> Result<Vec<(VmRef, RunState)>, HypervisorError> {
        self.list_vms()
    }

    fn find(&mut self, name_or_uuid: &str) -> Result<VmRef, HypervisorError> {
        self.find_vm(name_or_uuid)
    }

    fn observe(&mut self, vm: &VmRef) -> Result<VmFacts, HypervisorError> {
        self.observe_vm(vm)
    }

    fn begin(&mut self, order: &BeginOrder) -> Result<Begun, HypervisorError> {
        self.begin_session(order)
    }

    fn check(&mut self, vm: &VmRef, session: SessionId) -> Result<(), HypervisorError> {
        self.check_session(vm, session)
    }

    fn is_alarmed(&mut self, session: SessionId) -> bool {
        self.is_session_alarmed(session)
    }

    fn end(&mut self, order: &BeginOrder) -> Result<Ended, HypervisorError> {
        self.end_session(order)
    }

    fn end_leftover(&mut self, vm: &VmRef, session: SessionId) -> Result<Ended, HypervisorError> {
        self.end_leftover_session(vm, session)
    }

    fn mark(&mut self, vm: &VmRef, order: &MarkOrder) -> Result<(), HypervisorError> {
        self.change_mark(vm, order)
    }

    fn survey(&mut self, vm: &VmRef) -> Result<Surroundings, HypervisorError> {
        self.survey_vm(vm)
    }

    fn leftovers(
        &mut self,
        vm: &VmRef,
        places: &[PathBuf],
    ) -> Result<Vec<LeftDirectory>, HypervisorError> {
        self.find_leftovers(vm, places)
    }

    fn sweep(&mut self, vm: &VmRef, places: &[PathBuf]) -> Result<Swept, HypervisorError> {
        self.sweep_leftovers(vm, places)
    }

    fn wreckage(&mut self, vm: &VmRef, of: Foreign) -> Result<Wreckage, HypervisorError> {
        self.find_wreckage(vm, of)
    }

    fn clear_wreckage(&mut self, vm: &VmRef, of: Foreign) -> Result<Wreckage, HypervisorError> {
        self.remove_wreckage(vm, of)
    }

    fn claimant(&mut self, vm: &VmRef) -> Result<Option<Box<dyn Claimant>>, HypervisorError> {
        self.open_claimant(vm)
    }

    fn act_for(&mut self, claim: Option<ClaimId>) {
        self.claim = claim;
    }

    fn still_claimed(&mut self, vm: &VmRef) -> Result<(), HypervisorError> {
        self.expect_claim(vm)
    }
}
