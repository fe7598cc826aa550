//! The connection to a libvirt daemon, and the driver made of it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use highwater_hypervisor::{
    BeginOrder, Begun, Claimant, Driver, Ended, ErrorKind, HypervisorError, LeftDirectory,
    MarkOrder, RunState, Surroundings, Swept, VmFacts, VmRef,
};
use highwater_model::{ClaimId, Clock, SessionId, SystemClock};

use super::begin::Watch;
use super::error::{code, explain, explain_connection, explain_load};
use super::jobs;
use super::sys::events::EventListener;
use super::sys::handles::{ConnectionHandle, DomainHandle};
use super::sys::{Api, CallError};
use crate::blocks::{self, Blocks, ReplyError};
use crate::offline::OfflineSessions;

/// A daemon that gives no sign of life for `KEEP_ALIVE_S * KEEP_ALIVE_COUNT`
/// seconds counts as gone; libvirt's own tools use the same numbers.
const KEEP_ALIVE_S: i32 = 5;
const KEEP_ALIVE_COUNT: u32 = 6;

/// How to reach libvirt.
#[derive(Clone)]
pub struct LibvirtOptions {
    /// Where `libvirt.so.0` is; `None` leaves the search to the system.
    pub library: Option<PathBuf>,
    /// The user's configuration directory (`~/.config`), where a daemon at
    /// `qemu:///session` keeps the state of emulated TPMs; without it such a
    /// state is not found.
    pub user_config_dir: Option<PathBuf>,
    /// Says when a point in time was taken.
    pub clock: Arc<dyn Clock>,
}

impl Default for LibvirtOptions {
    fn default() -> Self {
        Self {
            library: None,
            user_config_dir: None,
            clock: Arc::new(SystemClock),
        }
    }
}

impl fmt::Debug for LibvirtOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LibvirtOptions")
            .field("library", &self.library)
            .finish_non_exhaustive()
    }
}

/// Drives the VMs of one local libvirt daemon.
pub struct LibvirtDriver {
    pub(super) dialer: Dialer,
    pub(super) connection: Arc<ConnectionHandle>,
    pub(super) clock: Arc<dyn Clock>,
    /// What is watched for sessions that this value began.
    pub(super) watches: BTreeMap<SessionId, Watch>,
    /// Sessions of VMs that were off when they began.
    pub(super) offline: OfflineSessions,
    /// The claim that all this is done for.
    pub(super) claim: Option<ClaimId>,
}

impl fmt::Debug for LibvirtDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LibvirtDriver")
            .field("uri", &self.dialer.uri)
            .finish_non_exhaustive()
    }
}

/// Opens connections to one daemon: the driver's own, and a second one for
/// thawing when the first is stuck.
#[derive(Clone)]
pub(super) struct Dialer {
    api: &'static Api,
    uri: String,
    user_config_dir: Option<PathBuf>,
}

impl Dialer {
    pub(super) fn open(&self) -> Result<Arc<ConnectionHandle>, HypervisorError> {
        let failed = |error: &CallError| explain_connection(&self.uri, error);
        let connection =
            ConnectionHandle::open(self.api, &self.uri).map_err(|error| failed(&error))?;
        // Some old or odd daemons cannot be asked for signs of life; then a
        // dead one is noticed by the kernel closing its socket.
        match connection.keep_alive(KEEP_ALIVE_S, KEEP_ALIVE_COUNT) {
            Ok(()) => Ok(connection),
            Err(error) if error.code == code::NO_SUPPORT => Ok(connection),
            Err(error) => Err(failed(&error)),
        }
    }
}

impl Dialer {
    /// Returns where this daemon keeps the state of emulated TPMs.
    pub(super) fn swtpm_dir(&self) -> Option<PathBuf> {
        if !self.uri.contains(":///session") {
            return Some(PathBuf::from("/var/lib/libvirt/swtpm"));
        }
        self.user_config_dir
            .as_ref()
            .map(|config| config.join("libvirt/qemu/swtpm"))
    }
}

impl LibvirtDriver {
    /// Connects to the daemon at `uri` (`qemu:///system`, `qemu:///session`,
    /// `qemu+unix:///system?socket=PATH`).
    ///
    /// libvirt's library is loaded here and not before; that it is missing is
    /// an error of this call ([`ErrorKind::Unreachable`]).
    pub fn connect(uri: &str, options: &LibvirtOptions) -> Result<Self, HypervisorError> {
        refuse_unless_local(uri)?;
        let api = Api::load(options.library.as_deref()).map_err(|error| explain_load(&error))?;
        let user_config_dir = options.user_config_dir.clone();
        let dialer = Dialer {
            api,
            uri: uri.to_owned(),
            user_config_dir,
        };
        let connection = dialer.open()?;
        Ok(Self {
            dialer,
            connection,
            clock: Arc::clone(&options.clock),
            watches: BTreeMap::new(),
            offline: OfflineSessions::default(),
            claim: None,
        })
    }

    /// Reconnects if the daemon was restarted, and goes on watching the
    /// sessions: QEMU and its job do not notice such a restart.
    pub(super) fn revive(&mut self) -> Result<(), HypervisorError> {
        if self.connection.is_alive() {
            return Ok(());
        }
        self.connection = self.dialer.open()?;
        let connection = &self.connection;
        for watch in self.watches.values_mut() {
            watch.listener = lookup(connection, &watch.vm)
                .ok()
                .and_then(|domain| EventListener::open(&domain).ok());
        }
        Ok(())
    }

    /// Finds a VM's domain, by UUID where it has one.
    pub(super) fn domain(&mut self, vm: &VmRef) -> Result<DomainHandle, HypervisorError> {
        self.revive()?;
        lookup(&self.connection, vm)
    }
}

/// Finds a VM's domain on a connection.
pub(super) fn lookup(
    connection: &Arc<ConnectionHandle>,
    vm: &VmRef,
) -> Result<DomainHandle, HypervisorError> {
    let found = match &vm.uuid {
        Some(uuid) => connection.domain_by_uuid(uuid),
        None => connection.domain_by_name(&vm.name),
    };
    found.map_err(|error| explain(format!("cannot find VM `{}`", vm.name), &error))
}

/// Names a domain.
pub(super) fn vm_ref(domain: &DomainHandle) -> Result<VmRef, CallError> {
    let uuid = domain.uuid()?;
    let is_none = uuid.chars().all(|letter| matches!(letter, '0' | '-'));
    Ok(VmRef {
        name: domain.name()?,
        uuid: (!is_none).then_some(uuid),
    })
}

/// Asks QEMU about its block layer.
pub(super) fn query_blocks(vm: &VmRef, domain: &DomainHandle) -> Result<Blocks, HypervisorError> {
    let message = || format!("cannot ask QEMU about the disks of VM `{}`", vm.name);
    let ask = |query: &str| {
        domain
            .monitor_command(query)
            .map_err(|error| explain(message(), &error))
    };
    let refused = |error: &ReplyError| {
        HypervisorError::new(ErrorKind::Other, message()).because(error.to_string())
    };
    let mut found = Blocks::parse(&ask(blocks::QUERY_NODES)?, &ask(blocks::QUERY_DEVICES)?)
        .map_err(|error| refused(&error))?;
    if found.needs_graph() {
        // The command is not a stable one; without it a filter on top makes the
        // root node `Unknown`, and nothing is assumed.
        let _unstable = domain
            .monitor_command(blocks::QUERY_GRAPH)
            .is_ok_and(|graph| found.add_graph(&graph).is_ok());
    }
    Ok(found)
}

/// Only a daemon of this host can be driven: exports are reached over a unix
/// socket, and scratch space is looked at through the file system.
fn refuse_unless_local(uri: &str) -> Result<(), HypervisorError> {
    let refused = |because: &str| {
        HypervisorError::new(
            ErrorKind::Unreachable,
            format!("cannot use connection `{uri}`"),
        )
        .because(because)
    };
    let Some((scheme, rest)) = uri.split_once("://") else {
        return Err(refused("it is not a libvirt URI")
            .hint("use `qemu:///system`, `qemu:///session` or `qemu+unix:///system?socket=PATH`"));
    };
    let (hypervisor, transport) = scheme.split_once('+').unwrap_or((scheme, "unix"));
    if hypervisor != "qemu" {
        return Err(refused("only VMs of QEMU can be backed up").hint("use `qemu:///system`"));
    }
    let host = rest.split(['/', '?']).next().unwrap_or_default();
    if transport != "unix" || !host.is_empty() {
        return Err(refused("libvirt on another host cannot be used yet")
            .hint("run highwater on the host that runs the VM"));
    }
    Ok(())
}

impl Driver for LibvirtDriver {
    fn list(&mut self) -> Result<Vec<(VmRef, RunState)>, HypervisorError> {
        self.revive()?;
        let failed = |error: &CallError| explain("cannot list VMs", error);
        let domains = self.connection.domains().map_err(|error| failed(&error))?;
        let mut found = Vec::with_capacity(domains.len());
        for domain in &domains {
            match vm_ref(domain) {
                Ok(vm) => {
                    let state = jobs::run_state(&vm, domain)?;
                    found.push((vm, state));
                }
                // Undefined between the list and the question.
                Err(error) if error.code == code::NO_DOMAIN => {}
                Err(error) => return Err(failed(&error)),
            }
        }
        found.sort_by(|(one, _), (other, _)| one.name.cmp(&other.name));
        Ok(found)
    }

    fn find(&mut self, name_or_uuid: &str) -> Result<VmRef, HypervisorError> {
        self.revive()?;
        let message = || format!("cannot find VM `{name_or_uuid}`");
        let ask = |found: Result<DomainHandle, CallError>| match found {
            Ok(domain) => vm_ref(&domain)
                .map(Some)
                .map_err(|error| explain(message(), &error)),
            Err(error) if error.code == code::NO_DOMAIN => Ok(None),
            Err(error) => Err(explain(message(), &error)),
        };
        let by_name = ask(self.connection.domain_by_name(name_or_uuid))?;
        let by_uuid = if is_uuid(name_or_uuid) {
            ask(self.connection.domain_by_uuid(name_or_uuid))?
        } else {
            None
        };
        match (by_name, by_uuid) {
            (Some(named), Some(numbered)) if named != numbered => {
                Err(HypervisorError::new(ErrorKind::NoSuchVm, message())
                    .because("one VM has it as its name and another as its UUID"))
            }
            (Some(vm), _) | (None, Some(vm)) => Ok(vm),
            (None, None) => Err(
                HypervisorError::new(ErrorKind::NoSuchVm, message()).because(format!(
                    "libvirt at `{}` knows no VM of that name or UUID",
                    self.dialer.uri
                )),
            ),
        }
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
        let watch = self.watches.get(&session);
        watch.is_some_and(|watch| watch.log() != watch.heard) || self.offline.is_alarmed(session)
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

    fn start_paused(&mut self, vm: &VmRef) -> Result<(), HypervisorError> {
        self.start_vm_paused(vm)
    }

    fn stop_if_started(&mut self, vm: &VmRef) -> Result<bool, HypervisorError> {
        self.stop_vm_if_started(vm)
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

fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text
            .bytes()
            .all(|letter| letter.is_ascii_hexdigit() || letter == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_daemon_of_this_host_is_accepted() {
        for local in [
            "qemu:///system",
            "qemu:///session",
            "qemu+unix:///system?socket=/run/x/libvirt-sock",
        ] {
            assert!(refuse_unless_local(local).is_ok(), "{local}");
        }
        for refused in [
            "qemu+ssh://host/system",
            "qemu+ssh:///system",
            "qemu://host/system",
            "qemu+tls://host/system",
            "test:///default",
            "xen:///system",
            "",
            "/path/to.sock",
        ] {
            assert!(refuse_unless_local(refused).is_err(), "{refused}");
        }
    }

    #[test]
    fn without_a_daemon_the_error_asks_for_it() {
        let uri = "qemu+unix:///system?socket=/nowhere/libvirt-sock";
        let error = LibvirtDriver::connect(uri, &LibvirtOptions::default()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unreachable);
        assert!(
            error.because[0].contains("/nowhere/libvirt-sock"),
            "{error:?}"
        );
        assert!(error.hint.unwrap().contains("running"));
    }

    #[test]
    fn without_the_library_the_error_says_so_and_what_to_do() {
        let options = LibvirtOptions {
            library: Some("/nowhere/libvirt.so.0".into()),
            ..Default::default()
        };
        let error = LibvirtDriver::connect("qemu:///system", &options).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unreachable);
        assert_eq!(error.message, "cannot use libvirt");
        assert!(error.because[0].contains("/nowhere/libvirt.so.0"));
        assert!(error.hint.unwrap().contains("libvirt0"));
    }
}
