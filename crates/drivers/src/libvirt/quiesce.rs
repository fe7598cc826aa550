//! Freezes the guest's file systems around the start call, and no longer.
//!
//! ```text
//! agent silent ------------------------------------------> not frozen (require: error)
//! frozen by somebody else --------------------------------> used, left as found
//! freeze -> start call -> still frozen? -> thaw -> thawed? -> done
//!              `- after 5 s a second connection thaws, whatever the first one waits for
//! ```
//!
//! A guest left frozen is the worst outcome of all, worse than no backup: every
//! path out of here thaws what was frozen here and asks whether it worked, over
//! a new connection when libvirt's daemon was restarted meanwhile.
//!
//! The commands go to the agent one by one with a time limit of their own.
//! libvirt's own call for freezing obeys a limit that is set for the whole VM
//! and for everybody, and by default there is none.

use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use highwater_hypervisor::{ErrorKind, HypervisorError, Quiesce, VmRef};
use highwater_model::step::patience;
use serde::Deserialize;

use super::connection::{Dialer, lookup};
use super::sys::CallError;
use super::sys::handles::DomainHandle;
use crate::blocks;

/// How long the agent may take to answer, seconds.
const AGENT_TIMEOUT_S: i32 = 5;
/// How long a guest may be frozen.
const FREEZE_DEADLINE: Duration = Duration::from_secs(5);
/// How long thawing is tried before giving up.
const THAW_DEADLINE: Duration = Duration::from_mins(1);
/// Pause between two attempts to thaw.
const THAW_INTERVAL: Duration = Duration::from_millis(200);

const STATUS: &str = r#"{"execute":"guest-fsfreeze-status"}"#;
const FREEZE: &str = r#"{"execute":"guest-fsfreeze-freeze"}"#;
const THAW: &str = r#"{"execute":"guest-fsfreeze-thaw"}"#;

/// A guest whose file systems are frozen. Dropping it thaws them.
pub(super) struct Frozen<'a> {
    vm: &'a VmRef,
    domain: &'a DomainHandle,
    dialer: &'a Dialer,
    since: Instant,
    /// `None` if somebody else froze the guest: then it stays frozen.
    watchdog: Option<Watchdog>,
}

/// What came of the wish to freeze.
pub(super) enum Outcome<'a> {
    /// It is frozen.
    Frozen(Frozen<'a>),
    /// It is not; why, if it was wished for.
    Not(Option<String>),
}

/// Freezes the guest as ordered; `note` is called right before it is. When this
/// fails, nothing is frozen, or the error says that it may be.
pub(super) fn freeze<'a>(
    vm: &'a VmRef,
    domain: &'a DomainHandle,
    dialer: &'a Dialer,
    wish: Quiesce,
    mountpoints: &[String],
    note: &dyn Fn() -> Result<(), HypervisorError>,
) -> Result<Outcome<'a>, HypervisorError> {
    if wish == Quiesce::Off {
        return Ok(Outcome::Not(None));
    }
    // Asked first: an agent that does not answer a question is not sent a
    // command whose outcome nobody would then know.
    let because = match status(domain) {
        Ok(Status::Frozen) => {
            return Ok(Outcome::Frozen(Frozen {
                vm,
                domain,
                dialer,
                since: Instant::now(),
                watchdog: None,
            }));
        }
        Ok(Status::Thawed) => match freeze_now(vm, domain, dialer, mountpoints, note)? {
            Ok(frozen) => return Ok(Outcome::Frozen(frozen)),
            Err(because) => because,
        },
        Err(because) => because,
    };
    match wish {
        Quiesce::Require => Err(HypervisorError::new(
            ErrorKind::CannotFreeze,
            format!("cannot freeze the file systems of VM `{}`", vm.name),
        )
        .because(because)
        .hint("is the guest agent (qemu-guest-agent) installed and running in the guest?")),
        Quiesce::Try | Quiesce::Off => Ok(Outcome::Not(Some(because))),
    }
}

/// Sends the command. The inner error says why nothing is frozen; the outer
/// one, that it may be and could not be undone.
fn freeze_now<'a>(
    vm: &'a VmRef,
    domain: &'a DomainHandle,
    dialer: &'a Dialer,
    mountpoints: &[String],
    note: &dyn Fn() -> Result<(), HypervisorError>,
) -> Result<Result<Frozen<'a>, String>, HypervisorError> {
    // The second connection is opened while there is time.
    let watchdog = Watchdog::start(vm, dialer)?;
    // Before the guest is: a session killed in between is known to have meant it.
    note()?;
    let frozen = Frozen {
        vm,
        domain,
        dialer,
        since: Instant::now(),
        watchdog: Some(watchdog),
    };
    let command = if mountpoints.is_empty() {
        FREEZE.to_owned()
    } else {
        serde_json::json!({
            "execute": "guest-fsfreeze-freeze-list",
            "arguments": { "mountpoints": mountpoints },
        })
        .to_string()
    };
    let because = match ask::<i64>(domain, &command) {
        Ok(count) if count > 0 => return Ok(Ok(frozen)),
        Ok(_) => "the agent found no file system to freeze".to_owned(),
        // Some may be frozen, or will be when a late agent gets to it.
        Err(because) => because,
    };
    frozen.thaw().map(|_| Err(because))
}

impl Frozen<'_> {
    /// Asks whether the guest is frozen now. Asked after the start call came
    /// back, a yes proves that it was frozen all the time.
    pub(super) fn holds(&self) -> bool {
        matches!(status(self.domain), Ok(Status::Frozen))
    }

    /// Thaws, makes sure of it, and returns how long the guest was frozen.
    pub(super) fn thaw(mut self) -> Result<Duration, HypervisorError> {
        self.thaw_now()
    }

    fn thaw_now(&mut self) -> Result<Duration, HypervisorError> {
        let Some(watchdog) = self.watchdog.take() else {
            return Ok(self.since.elapsed());
        };
        let thawed = thaw_until_sure(self.vm, self.domain, self.dialer);
        let elapsed = self.since.elapsed();
        // Only now: until here it would have stepped in, and if it has, the
        // guest was frozen no longer than that.
        let elapsed = watchdog
            .stop()
            .map_or(elapsed, |stepped_in| elapsed.min(stepped_in));
        thawed.map(|()| elapsed).map_err(|because| {
            HypervisorError::new(
                ErrorKind::CannotFreeze,
                format!(
                    "cannot thaw the file systems of VM `{}`: it may still be frozen",
                    self.vm.name
                ),
            )
            .because(because)
            .hint(format!(
                "run `virsh domfsthaw {}` at once, or restart its guest agent",
                self.vm.name
            ))
        })
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        // Reached only when something else failed, which is what gets reported.
        drop(self.thaw_now());
    }
}

/// Thaws over a connection of its own when the first one takes too long.
struct Watchdog {
    stop: Sender<()>,
    thread: JoinHandle<Option<Duration>>,
}

impl Watchdog {
    fn start(vm: &VmRef, dialer: &Dialer) -> Result<Self, HypervisorError> {
        let connection = dialer.open()?;
        let domain = lookup(&connection, vm)?;
        let (stop, stopped) = mpsc::channel();
        let (watched, dialer) = (vm.clone(), dialer.clone());
        let thread = std::thread::Builder::new()
            .name("thaw-watchdog".to_owned())
            .spawn(move || {
                let since = Instant::now();
                if stopped.recv_timeout(FREEZE_DEADLINE) != Err(RecvTimeoutError::Timeout) {
                    return None;
                }
                // The first connection tries too and reports the outcome.
                thaw_until_sure(&watched, &domain, &dialer)
                    .ok()
                    .map(|()| since.elapsed())
            })
            .map_err(|error| {
                HypervisorError::new(
                    ErrorKind::CannotFreeze,
                    format!(
                        "cannot watch over the frozen file systems of VM `{}`",
                        vm.name
                    ),
                )
                .because(error.to_string())
            })?;
        Ok(Self { stop, thread })
    }

    /// Ends it: at once, or when its own attempts are over. Returns when it
    /// thawed the guest, counted from its start.
    fn stop(self) -> Option<Duration> {
        drop(self.stop);
        self.thread.join().ok().flatten()
    }
}

/// Thaws a guest that a dead session froze. Returns whether it was frozen.
pub(super) fn thaw_after(
    vm: &VmRef,
    domain: &DomainHandle,
    dialer: &Dialer,
) -> Result<bool, String> {
    match status(domain)? {
        Status::Thawed => Ok(false),
        Status::Frozen => thaw_until_sure(vm, domain, dialer).map(|()| true),
    }
}

/// Thaws until the agent says that nothing is frozen, or the VM is gone.
fn thaw_until_sure(vm: &VmRef, domain: &DomainHandle, dialer: &Dialer) -> Result<(), String> {
    let since = Instant::now();
    // A restarted daemon never answers over the old connection.
    let mut anew: Option<DomainHandle> = None;
    loop {
        let domain = anew.as_ref().unwrap_or(domain);
        let thawed: Result<i64, String> = ask(domain, THAW);
        let because = match (status(domain), thawed) {
            (Ok(Status::Thawed), _) => return Ok(()),
            (Ok(Status::Frozen), Ok(_)) => "the agent says that it is still frozen".to_owned(),
            (Ok(Status::Frozen), Err(because)) | (Err(because), _) => because,
        };
        if is_gone(domain) {
            return Ok(());
        }
        if since.elapsed() > patience(THAW_DEADLINE) {
            return Err(because);
        }
        if !domain.is_connected() {
            match dialer.open().and_then(|it| lookup(&it, vm)) {
                Ok(domain) => anew = Some(domain),
                // It has ended, and was forgotten.
                Err(error) if error.kind == ErrorKind::NoSuchVm => return Ok(()),
                // The daemon needs a moment to come back.
                Err(_) => {}
            }
        }
        std::thread::sleep(THAW_INTERVAL);
    }
}

/// A VM that has ended is not frozen.
fn is_gone(domain: &DomainHandle) -> bool {
    /// `VIR_DOMAIN_SHUTOFF`.
    const SHUTOFF: i32 = 5;
    matches!(domain.state(), Ok((SHUTOFF, _)))
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Thawed,
    Frozen,
}

fn status(domain: &DomainHandle) -> Result<Status, String> {
    ask(domain, STATUS)
}

fn ask<T: for<'de> Deserialize<'de>>(domain: &DomainHandle, command: &str) -> Result<T, String> {
    let words = |error: &CallError| error.message.clone();
    let reply = domain
        .agent_command(command, AGENT_TIMEOUT_S)
        .map_err(|error| words(&error))?;
    blocks::reply(&reply).map_err(|error| error.to_string())
}

/// Says why a guest that had to be frozen cannot be: it does not run.
pub(super) fn paused_guest(vm: &VmRef) -> HypervisorError {
    HypervisorError::new(
        ErrorKind::CannotFreeze,
        format!("cannot freeze the file systems of VM `{}`", vm.name),
    )
    .because("the VM is paused, so its agent cannot answer")
}

#[cfg(test)]
mod with_a_real_guest {
    use highwater_hypervisor::Driver as _;
    use highwater_testkit::{DiskSpec, Lab, MIB, guest};

    use super::*;
    use crate::libvirt::{LibvirtDriver, LibvirtOptions};

    /// The first connection does nothing, as if its start call hung.
    #[test]
    fn a_guest_is_thawed_after_five_seconds_whatever_the_first_connection_waits_for() {
        let lab = Lab::start().unwrap();
        guest::make_ext4(&lab.path("files.raw"), 16 * MIB).unwrap();
        let files = DiskSpec::existing("vda", &lab.path("files.raw"), "raw");
        let vm = lab.vm("web01").disk(files).guest().start().unwrap();
        let inside = vm.guest().unwrap();
        inside.wait_for_agent().unwrap();
        let mut driver = LibvirtDriver::connect(&lab.uri(), &LibvirtOptions::default()).unwrap();
        let found = driver.find("web01").unwrap();
        let domain = driver.domain(&found).unwrap();

        let Outcome::Frozen(frozen) = freeze(
            &found,
            &domain,
            &driver.dialer,
            Quiesce::Require,
            &[],
            &|| Ok(()),
        )
        .unwrap() else {
            panic!("not frozen")
        };
        assert!(frozen.holds());
        let since = Instant::now();
        while inside.is_frozen().unwrap() {
            assert!(
                since.elapsed() < FREEZE_DEADLINE * 2,
                "nobody thawed the guest"
            );
        }
        assert!(!frozen.holds());
        let elapsed = frozen.thaw().unwrap();
        assert!(
            elapsed > FREEZE_DEADLINE && elapsed < FREEZE_DEADLINE * 2,
            "{elapsed:?}"
        );
    }
}
