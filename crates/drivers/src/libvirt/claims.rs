//! Claims as elements in the metadata of the running domain.
//!
//! Each sign has a namespace of its own, made of its kind and the claim's id, so
//! libvirt replaces and removes it without touching any other: nothing is read,
//! changed and written back. They are set for the running domain only, outlive a
//! libvirtd that is restarted, may be changed while a backup job runs, and go
//! with QEMU's process.

use std::sync::Arc;

use highwater_hypervisor::{
    Claim, Claimant, Claimer, ErrorKind, HypervisorError, RunState, Sign, SignKind, Signs, Stance,
    VmRef,
};
use highwater_model::{ClaimId, Timestamp};
use roxmltree::Node;

use super::backup_xml::escape;
use super::connection::{Dialer, LibvirtDriver, lookup};
use super::error::explain;
use super::jobs::run_state;
use super::sys::handles::{ConnectionHandle, DomainHandle, Which};
use super::xml::{child, document};
use crate::fence::{self, Board};

/// Names nothing that could be looked up: `.invalid` never resolves.
const NAMESPACES: &str = "https://highwater.invalid/";
/// libvirt wants a prefix for the namespace; all of ours may share one.
pub(super) const PREFIX: &str = "highwater";
/// A host's name has at most 64 bytes, a boot id 36.
/// Namespace of the sign at a VM that was started for its backup.
pub(super) const STARTED: &str = "https://highwater.invalid/started";
const TEXT_BYTES_MAX: usize = 255;

/// Reads and writes the signs at one VM.
struct DomainSigns {
    dialer: Dialer,
    vm: VmRef,
    connection: Arc<ConnectionHandle>,
}

impl DomainSigns {
    fn domain(&mut self) -> Result<DomainHandle, HypervisorError> {
        if !self.connection.is_alive() {
            self.connection = self.dialer.open()?;
        }
        lookup(&self.connection, &self.vm)
    }
}

impl Claimant for DomainSigns {
    fn signs(&mut self) -> Result<Signs, HypervisorError> {
        let domain = self.domain()?;
        signs(&self.vm, &domain)
    }

    fn set(&mut self, sign: &Sign) -> Result<(), HypervisorError> {
        let domain = self.domain()?;
        set(&self.vm, &domain, sign)
    }

    fn remove(&mut self, id: ClaimId, kind: SignKind) -> Result<(), HypervisorError> {
        let domain = self.domain()?;
        remove(&self.vm, &domain, id, kind)
    }

    fn removal_by_hand(&self, id: ClaimId) -> String {
        let uri = namespace(id, SignKind::Claim);
        format!(
            "virsh metadata {} --live --uri {uri} --remove",
            self.vm.name
        )
    }
}

impl LibvirtDriver {
    pub(super) fn open_claimant(
        &mut self,
        vm: &VmRef,
    ) -> Result<Option<Box<dyn Claimant>>, HypervisorError> {
        let domain = match self.domain(vm) {
            Ok(domain) => domain,
            Err(error) if error.kind == ErrorKind::NoSuchVm => return Ok(None),
            Err(error) => return Err(error),
        };
        if run_state(vm, &domain)? == RunState::Off || other_job_runs(&domain) {
            return Ok(None);
        }
        Ok(Some(Box::new(DomainSigns {
            dialer: self.dialer.clone(),
            vm: vm.clone(),
            connection: self.dialer.open()?,
        })))
    }

    pub(super) fn expect_claim(&mut self, vm: &VmRef) -> Result<(), HypervisorError> {
        let Some(claim) = self.claim else {
            return Ok(());
        };
        match self.domain(vm) {
            // Nobody's, until it is started.
            Ok(domain) if run_state(vm, &domain)? == RunState::Off => Ok(()),
            Ok(domain) => fence::expect(
                &AtDomain {
                    vm,
                    domain: &domain,
                },
                claim,
            ),
            Err(error) if error.kind == ErrorKind::NoSuchVm => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Returns whether a job (save, migration) runs that libvirt lets nobody change
/// anything beside: it would have us wait for half a minute.
pub(super) fn other_job_runs(domain: &DomainHandle) -> bool {
    /// `VIR_DOMAIN_JOB_OPERATION_BACKUP`.
    const BACKUP: i32 = 9;
    let stats = domain.job_stats();
    stats.is_ok_and(|stats| matches!(stats.kind, 1 | 2) && stats.operation != BACKUP)
}

/// [Acts](fence::act) at a domain.
pub(super) fn act<T>(
    vm: &VmRef,
    domain: &DomainHandle,
    claim: Option<ClaimId>,
    act: impl FnOnce() -> Result<T, HypervisorError>,
) -> Result<T, HypervisorError> {
    fence::act(&AtDomain { vm, domain }, claim, act)
}

/// The signs at a domain.
struct AtDomain<'a> {
    vm: &'a VmRef,
    domain: &'a DomainHandle,
}

impl Board for AtDomain<'_> {
    fn vm(&self) -> &VmRef {
        self.vm
    }

    fn signs(&self) -> Result<Signs, HypervisorError> {
        signs(self.vm, self.domain)
    }

    fn set(&self, sign: &Sign) -> Result<(), HypervisorError> {
        set(self.vm, self.domain, sign)
    }

    fn remove(&self, id: ClaimId, kind: SignKind) -> Result<(), HypervisorError> {
        remove(self.vm, self.domain, id, kind)
    }
}

fn signs(vm: &VmRef, domain: &DomainHandle) -> Result<Signs, HypervisorError> {
    let message = || format!("cannot see who claims VM `{}`", vm.name);
    let xml = domain.xml(0).map_err(|error| explain(message(), &error))?;
    let document = document(&xml, "domain").map_err(|error| {
        HypervisorError::new(ErrorKind::Other, message()).because(error.to_string())
    })?;
    Ok(read(document.root_element()))
}

fn set(vm: &VmRef, domain: &DomainHandle, sign: &Sign) -> Result<(), HypervisorError> {
    let (id, kind) = match sign {
        Sign::Claim(claim) => (claim.id, SignKind::Claim),
        Sign::Beat(id, _) => (*id, SignKind::Beat),
        Sign::Acting(id) => (*id, SignKind::Acting),
    };
    let element = element(sign);
    domain
        .set_metadata(Some(&element), PREFIX, &namespace(id, kind), Which::Running)
        .map_err(|error| explain(format!("cannot claim VM `{}`", vm.name), &error))
}

fn remove(
    vm: &VmRef,
    domain: &DomainHandle,
    id: ClaimId,
    kind: SignKind,
) -> Result<(), HypervisorError> {
    if run_state(vm, domain)? == RunState::Off {
        return Ok(());
    }
    domain
        .set_metadata(None, PREFIX, &namespace(id, kind), Which::Running)
        .map_err(|error| {
            let message = format!("cannot remove a claim from VM `{}`", vm.name);
            explain(message, &error)
        })
}

fn namespace(id: ClaimId, kind: SignKind) -> String {
    format!("{NAMESPACES}{}/{id}", kind.word())
}

fn element(sign: &Sign) -> String {
    match sign {
        Sign::Claim(claim) => {
            let by = &claim.claimer;
            let stance = claim.stance.word();
            let optional =
                |number: Option<u64>| number.map_or_else(String::new, |it| it.to_string());
            format!(
                "<claim stance='{stance}' host='{}' boot='{}' pidns='{}' process='{}' start='{}' \
                 since='{}'/>",
                harmless(&by.host),
                harmless(&by.boot_id),
                optional(by.pid_namespace),
                by.process,
                optional(by.start_ticks),
                by.since.unix_ms()
            )
        }
        Sign::Beat(_, number) => format!("<beat number='{number}'/>"),
        Sign::Acting(_) => "<acting/>".to_owned(),
    }
}

/// What a host calls itself may be anything; libvirt refuses control characters.
fn harmless(text: &str) -> String {
    let plain: String = text.chars().filter(|it| !it.is_control()).collect();
    escape(&plain)
}

/// Finds the signs in a domain's definition.
fn read(domain: Node<'_, '_>) -> Signs {
    let mut found = Signs::default();
    let elements = child(domain, "metadata").into_iter();
    for element in elements.flat_map(|metadata| metadata.children()) {
        let Some((kind, id)) = sign_of(element) else {
            continue;
        };
        match kind {
            SignKind::Claim => found.claims.extend(claim(id, element)),
            SignKind::Beat => {
                let number = element.attribute("number").and_then(|it| it.parse().ok());
                found.beats.extend(number.map(|number| (id, number)));
            }
            SignKind::Acting => {
                found.acting.insert(id);
            }
        }
    }
    found
}

/// Returns what an element is a sign of, by its namespace.
fn sign_of(element: Node<'_, '_>) -> Option<(SignKind, ClaimId)> {
    let name = element.tag_name();
    let (kind, id) = name
        .namespace()?
        .strip_prefix(NAMESPACES)?
        .split_once('/')?;
    let kind = SignKind::from_word(kind)?;
    (name.name() == kind.word()).then_some(())?;
    Some((kind, id.parse().ok()?))
}

fn claim(id: ClaimId, element: Node<'_, '_>) -> Option<Claim> {
    let text = |name: &str| {
        let value = element.attribute(name)?;
        (value.len() <= TEXT_BYTES_MAX).then(|| value.to_owned())
    };
    let number = |name: &str| text(name)?.parse::<u64>().ok();
    Some(Claim {
        id,
        stance: Stance::from_word(&text("stance")?),
        claimer: Claimer {
            host: text("host")?,
            boot_id: text("boot")?,
            pid_namespace: number("pidns"),
            process: number("process")?.try_into().ok()?,
            start_ticks: number("start"),
            since: Timestamp::from_unix_ms(text("since")?.parse().ok()?),
        },
    })
}

/// Takes the signs out of a definition that is to be kept: a VM without a
/// persistent definition shows them in its only one. Everything else stays as it
/// is, byte for byte.
pub(super) fn without_signs(definition: String) -> String {
    if !definition.contains(NAMESPACES) {
        return definition;
    }
    let Ok(document) = document(&definition, "domain") else {
        return definition;
    };
    let Some(metadata) = child(document.root_element(), "metadata") else {
        return definition;
    };
    let is_started = |it: &Node<'_, '_>| it.tag_name().namespace() == Some(STARTED);
    let is_sign = |it: &Node<'_, '_>| sign_of(*it).is_some() || is_started(it);
    let signs = metadata.children().filter(is_sign);
    let mut kept = String::new();
    let mut from = 0;
    for sign in signs {
        let range = sign.range();
        let before = definition.get(from..range.start).unwrap_or_default();
        // And the line that it stood on.
        kept.push_str(before.trim_end_matches([' ', '\t', '\n']));
        from = range.end;
    }
    kept.push_str(definition.get(from..).unwrap_or_default());
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim_of(host: &str) -> Claim {
        Claim {
            id: ClaimId::from_bytes([7; 8]),
            stance: Stance::Yields,
            claimer: Claimer {
                host: host.to_owned(),
                boot_id: "b-1".to_owned(),
                pid_namespace: Some(4_026_531_836),
                process: 4711,
                start_ticks: None,
                since: Timestamp::from_unix_ms(1_700_000_000_123),
            },
        }
    }

    /// Writes signs as libvirt shows them.
    fn domain(signs: &[Sign]) -> String {
        let one = |sign: &Sign| {
            let (id, kind) = match sign {
                Sign::Claim(claim) => (claim.id, SignKind::Claim),
                Sign::Beat(id, _) => (*id, SignKind::Beat),
                Sign::Acting(id) => (*id, SignKind::Acting),
            };
            let named = element(sign).replacen('<', "<highwater:", 1);
            let name = format!(" xmlns:highwater=\"{}\"", namespace(id, kind));
            let at = named.find([' ', '/']).unwrap();
            format!("    {}{name}{}\n", &named[..at], &named[at..])
        };
        let signs: String = signs.iter().map(one).collect();
        format!("<domain>\n  <metadata>\n{signs}  </metadata>\n  <name>x</name>\n</domain>\n")
    }

    fn read_back(text: &str) -> Signs {
        read(document(text, "domain").unwrap().root_element())
    }

    #[test]
    fn signs_are_read_as_they_were_written_whatever_the_host_is_called() {
        for host in ["kvm2", "a'b\"<&>", ""] {
            let claim = claim_of(host);
            let other = ClaimId::from_bytes([8; 8]);
            let signs = [
                Sign::Claim(claim.clone()),
                Sign::Beat(claim.id, 12),
                Sign::Acting(other),
            ];
            let found = read_back(&domain(&signs));
            assert_eq!(found.claims, std::slice::from_ref(&claim));
            assert_eq!(found.beats, [(claim.id, 12)].into());
            assert_eq!(found.acting, [other].into());
        }
    }

    #[test]
    fn what_is_no_sign_of_ours_is_left_out() {
        let uri = namespace(ClaimId::from_bytes([7; 8]), SignKind::Claim);
        let all = "stance='stands' host='h' boot='b' process='1' since='1'";
        let long = "x".repeat(300);
        for (uri, name, attributes, is_one) in [
            (uri.as_str(), "claim", all.to_owned(), true),
            (uri.as_str(), "beat", all.to_owned(), false),
            (
                "https://highwater.invalid/claim/07",
                "claim",
                all.to_owned(),
                false,
            ),
            (
                "https://example.org/claim/0707070707070707",
                "claim",
                all.to_owned(),
                false,
            ),
            (uri.as_str(), "claim", all.replace("'1'", "'-'"), false),
            (
                uri.as_str(),
                "claim",
                all.replace("'h'", &format!("'{long}'")),
                false,
            ),
        ] {
            let text = format!(
                "<domain><metadata><a:{name} xmlns:a='{uri}' {attributes}/></metadata></domain>"
            );
            assert_eq!(read_back(&text).claims.len(), usize::from(is_one), "{text}");
        }
    }

    #[test]
    fn a_definition_is_kept_without_our_signs_and_else_as_it_is() {
        let id = ClaimId::from_bytes([7; 8]);
        let bare = domain(&[]);
        let own = "<a:claim xmlns:a='https://example.org/'>\n text </a:claim>\n";
        let noted = |text: &str| text.replace("  </metadata>", &format!("    {own}  </metadata>"));
        let signs = [Sign::Claim(claim_of("h")), Sign::Beat(id, 1)];
        assert_eq!(without_signs(domain(&signs)), bare);
        assert_eq!(without_signs(noted(&domain(&signs))), noted(&bare));
        assert_eq!(without_signs(noted(&bare)), noted(&bare));
    }
}
