//! Stops a guest's processors for the few milliseconds in which several disks
//! are switched, and lets them run again whatever happens in between.
//!
//! ```text
//! note -> stop -> switch, switch, ... -> still stopped? -> cont -> runs? -> note gone
//!   |                 `- any failure: cont all the same
//!   `- a session killed in here left the note: whoever sweeps lets the guest run
//! ```
//!
//! The note is an object of QEMU itself. It is there before the guest is
//! stopped, goes when its QEMU does, and is seen by whoever reaches the VM; a
//! guest without it was stopped by somebody else and stays so.

use std::time::{Duration, Instant};

use highwater_hypervisor::{ErrorKind, HypervisorError, VmRef};
use highwater_model::SessionId;
use highwater_model::step::{Step, pass, patience};
use serde_json::json;

use super::QmpDriver;
use super::client::Client;
use super::error::{QmpError, explain};
use super::identity::status;
use super::line::Line;
use super::objects::{Role, STOP_KIND};
use super::sequence::has_resumed;
use crate::directories::SessionPaths;

/// A guest is not kept stopped for longer than this to switch one more disk.
const STOP_MAX: Duration = Duration::from_secs(2);
/// How long letting it run is tried before giving up.
const RESUME_DEADLINE: Duration = Duration::from_mins(1);
const RESUME_INTERVAL: Duration = Duration::from_millis(100);
/// QEMU's word for a guest that `stop` has stopped.
const STOPPED: &str = "paused";
/// QEMU's word for a guest that a failed write has stopped.
pub(super) const STOPPED_BY_ERROR: &str = "io-error";

/// A guest that is stopped. Dropping it lets it run.
pub(super) struct Stopped<'a> {
    client: &'a Client,
    line: &'a Line,
    vm: &'a VmRef,
    note: String,
    since: Instant,
    /// Events heard before.
    heard: u64,
    is_over: bool,
}

impl<'a> Stopped<'a> {
    /// Stops a guest that runs.
    pub(super) fn stop(
        client: &'a Client,
        line: &'a Line,
        vm: &'a VmRef,
        session: SessionId,
    ) -> Result<Self, HypervisorError> {
        let message = || format!("cannot stop VM `{}` for a moment", vm.name);
        let failed = |error: &QmpError| explain(message(), error);
        let note = Role::Stop.name(session, "");
        let object = json!({
            "qom-type": STOP_KIND, "id": note, "identity": session.to_string(),
        });
        client
            .run("object-add", object)
            .map_err(|error| failed(&error))?;
        pass(Step::QmpStopNoted);
        // Asked at the last moment: one that somebody else stopped stays so.
        let mut stopped = Self {
            client,
            line,
            vm,
            note,
            since: Instant::now(),
            heard: client.heard().count,
            is_over: false,
        };
        let found = state(client).map_err(|error| failed(&error));
        if found.as_deref() != Ok("running") {
            // It is not ours to let run.
            stopped.is_over = true;
            stopped.forget();
            return Err(found.map_or_else(
                |error| error,
                |word| {
                    HypervisorError::new(ErrorKind::WrongState, message())
                        .because(format!("it does not run any more (it is {word})"))
                },
            ));
        }
        match client.run("stop", json!({})) {
            Ok(_) => {
                pass(Step::QmpStopped);
                Ok(stopped)
            }
            // Nobody knows whether it will still be carried out; what is sent
            // after it is, after it.
            Err(error) => {
                let resumed = stopped.resume();
                Err(resumed.map_or_else(|worse| worse, |_| failed(&error)))
            }
        }
    }

    /// Fails if the guest has been stopped for too long to go on.
    pub(super) fn expect_time(&self) -> Result<(), HypervisorError> {
        if self.since.elapsed() < STOP_MAX {
            return Ok(());
        }
        let message = format!("cannot keep VM `{}` stopped any longer", self.vm.name);
        Err(HypervisorError::new(ErrorKind::Other, message)
            .because(format!("its disks were not switched within {STOP_MAX:?}")))
    }

    /// Fails if somebody else let the guest run meanwhile.
    pub(super) fn expect_still_stopped(&self) -> Result<(), HypervisorError> {
        let message = || format!("cannot take one point in time of VM `{}`", self.vm.name);
        let state = state(self.client).map_err(|error| explain(message(), &error))?;
        if state == STOPPED && !has_resumed(self.client, self.heard) {
            return Ok(());
        }
        Err(HypervisorError::new(ErrorKind::WrongState, message())
            .because("somebody let the guest run while its disks were switched"))
    }

    /// Lets the guest run, makes sure of it, and returns how long it stood.
    pub(super) fn resume(mut self) -> Result<Duration, HypervisorError> {
        self.resume_now()
    }

    fn resume_now(&mut self) -> Result<Duration, HypervisorError> {
        self.is_over = true;
        let resumed = resume_until_sure(self.client, self.line);
        let elapsed = self.since.elapsed();
        resumed.map_err(|because| {
            HypervisorError::new(
                ErrorKind::Other,
                format!("cannot let VM `{}` run again: it is stopped", self.vm.name),
            )
            .because(because)
            .hint("run `cont` at QEMU's monitor at once")
        })?;
        self.forget();
        Ok(elapsed)
    }

    /// Takes the note away: the guest is as it was.
    fn forget(&self) {
        // One that stays has the next run look once more, and find a guest that
        // runs.
        drop(self.client.run("object-del", json!({"id": self.note})));
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        if !self.is_over {
            // Something else failed, which is what gets reported; the note stays
            // if this does, too.
            drop(self.resume_now());
        }
    }
}

/// Lets a guest run until QEMU says that it is not stopped any more, or is gone.
fn resume_until_sure(client: &Client, line: &Line) -> Result<(), String> {
    let since = Instant::now();
    let mut client = client.clone();
    loop {
        let resumed = client.run("cont", json!({}));
        let because = match (state(&client), resumed) {
            (Ok(state), _) if state != STOPPED => return Ok(()),
            (Ok(_), Ok(_)) => "QEMU says that it is still stopped".to_owned(),
            (Ok(_), Err(error)) | (Err(error), _) => error.to_string(),
        };
        if since.elapsed() > patience(RESUME_DEADLINE) {
            return Err(because);
        }
        if client.is_closed() {
            match line.client() {
                Ok(anew) => client = anew,
                // QEMU is gone, and its guest with it; or the note tells.
                Err(error) => return Err(error.to_string()),
            }
        }
        std::thread::sleep(RESUME_INTERVAL);
    }
}

/// Lets a guest run that dead sessions stopped, as their notes say, and removes
/// the notes. Returns whether it was stopped.
pub(super) fn resume_after(client: &Client, notes: &[String]) -> Result<bool, QmpError> {
    let is_stopped = state(client)? == STOPPED;
    if is_stopped {
        client.run("cont", json!({}))?;
    }
    for note in notes {
        client.run("object-del", json!({"id": note}))?;
    }
    Ok(is_stopped)
}

impl QmpDriver {
    /// Lets a guest run that a failed write has stopped while the VM had this
    /// session: its fleece may have taken the room. Gives that back first.
    /// Returns a warning.
    pub(super) fn resume_after_error(
        &self,
        vm: &VmRef,
        client: &Client,
        paths: &SessionPaths,
    ) -> Result<Option<String>, HypervisorError> {
        if paths.was_stopped_before() {
            return Ok(None);
        }
        let message = || format!("cannot see how VM `{}` runs", vm.name);
        let found = state(client).map_err(|error| explain(message(), &error))?;
        if found != STOPPED_BY_ERROR {
            return Ok(None);
        }
        paths.free_scratch();
        let resumed = self.act(vm, client, || Ok(client.run("cont", json!({}))))?;
        Ok(Some(match resumed {
            Ok(_) => {
                "the guest was stopped by an I/O error during the session and runs again".to_owned()
            }
            Err(error) => format!(
                "the guest of VM `{}` was stopped by an I/O error during the session and cannot \
                 be let run: {error}; run `cont` at QEMU's monitor",
                vm.name
            ),
        }))
    }
}

/// Returns QEMU's word for how the guest runs.
pub(super) fn state(client: &Client) -> Result<String, QmpError> {
    let answer = client.run("query-status", json!({}))?;
    status(&answer)
        .map(str::to_owned)
        .ok_or_else(|| QmpError::Malformed("it tells no status".to_owned()))
}
