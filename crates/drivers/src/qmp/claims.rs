//! Signs at a VM, as objects of its QEMU.
//!
//! An object's name is given once, so two cannot set up the same sign; QEMU
//! carries out one command after the other, whichever monitor it comes from;
//! and its objects go when it does, and are no part of what is migrated. They
//! are of the kind `authz-simple`, which every QEMU since 4.0 has: a name and
//! one text, which nothing reads unless it is pointed at.
//!
//! ```text
//! hw-claim-<id>    identity: the claim as JSON
//! hw-beat-<id>     identity: a number
//! hw-acting-<id>
//! ```

use std::sync::Arc;

use highwater_hypervisor::{
    Claim, Claimant, Claimer, HypervisorError, RunState, Sign, SignKind, Signs, Stance, VmRef,
};
use highwater_model::{ClaimId, Timestamp};
use serde_json::{Value, json};

use super::QmpDriver;
use super::client::Client;
use super::error::{QmpError, explain};
use super::identity::run_state;
use super::line::Line;
use crate::fence::{self, Board};

/// The kind of object that a sign is.
const KIND: &str = "authz-simple";
/// A host's name has at most 64 bytes, a boot id 36.
const TEXT_BYTES_MAX: usize = 1024;
/// Signs that are read; there is one claimant, or a few.
const SIGNS_MAX: usize = 256;

/// Reads and writes the signs at one VM.
struct QemuSigns {
    line: Arc<Line>,
    vm: VmRef,
}

impl Claimant for QemuSigns {
    fn signs(&mut self) -> Result<Signs, HypervisorError> {
        signs(&self.vm, &self.line.client()?)
    }

    fn set(&mut self, sign: &Sign) -> Result<(), HypervisorError> {
        set(&self.vm, &self.line.client()?, sign)
    }

    fn remove(&mut self, id: ClaimId, kind: SignKind) -> Result<(), HypervisorError> {
        remove(&self.vm, &self.line.client()?, id, kind)
    }

    fn removal_by_hand(&self, id: ClaimId) -> String {
        format!(
            r#"{{"execute":"object-del","arguments":{{"id":"{}"}}}} (at its monitor)"#,
            name(id, SignKind::Claim)
        )
    }
}

impl QmpDriver {
    pub(super) fn open_claimant(
        &mut self,
        vm: &VmRef,
    ) -> Result<Option<Box<dyn Claimant>>, HypervisorError> {
        let client = self.expect_vm(vm)?;
        let failed = |error: &QmpError| explain(format!("cannot claim VM `{}`", vm.name), error);
        let state = run_state(&client).map_err(|error| failed(&error))?;
        // Objects do not move along: a claim would be left behind.
        if state == RunState::NotResumed {
            return Ok(None);
        }
        Ok(Some(Box::new(QemuSigns {
            line: Arc::clone(&self.line),
            vm: vm.clone(),
        })))
    }

    pub(super) fn expect_claim(&mut self, vm: &VmRef) -> Result<(), HypervisorError> {
        let Some(claim) = self.claim else {
            return Ok(());
        };
        let client = self.expect_vm(vm)?;
        fence::expect(
            &InQemu {
                vm,
                client: &client,
            },
            claim,
        )
    }

    /// [Acts](fence::act) at this VM.
    pub(super) fn act<T>(
        &self,
        vm: &VmRef,
        client: &Client,
        act: impl FnOnce() -> Result<T, HypervisorError>,
    ) -> Result<T, HypervisorError> {
        fence::act(&InQemu { vm, client }, self.claim, act)
    }
}

/// The signs in a QEMU.
struct InQemu<'a> {
    vm: &'a VmRef,
    client: &'a Client,
}

impl Board for InQemu<'_> {
    fn vm(&self) -> &VmRef {
        self.vm
    }

    fn signs(&self) -> Result<Signs, HypervisorError> {
        signs(self.vm, self.client)
    }

    fn set(&self, sign: &Sign) -> Result<(), HypervisorError> {
        set(self.vm, self.client, sign)
    }

    fn remove(&self, id: ClaimId, kind: SignKind) -> Result<(), HypervisorError> {
        remove(self.vm, self.client, id, kind)
    }
}

fn signs(vm: &VmRef, client: &Client) -> Result<Signs, HypervisorError> {
    let message = || format!("cannot see who claims VM `{}`", vm.name);
    let listed = client
        .run("qom-list", json!({"path": "/objects"}))
        .map_err(|error| explain(message(), &error))?;
    let mut found = Signs::default();
    for (kind, id) in signs_among(&listed) {
        let path = format!("/objects/{}", name(id, kind));
        let arguments = json!({"path": path, "property": "identity"});
        let text = match client.run("qom-get", arguments) {
            Ok(Value::String(text)) => text,
            // Removed between the list and the question, or not one of ours.
            Ok(_) => continue,
            Err(error) if error.is_refusal() => continue,
            Err(error) => return Err(explain(message(), &error)),
        };
        match kind {
            SignKind::Claim => found.claims.extend(claim(id, &text)),
            SignKind::Beat => found.beats.extend(text.parse().ok().map(|it| (id, it))),
            SignKind::Acting => {
                found.acting.insert(id);
            }
        }
    }
    Ok(found)
}

fn set(vm: &VmRef, client: &Client, sign: &Sign) -> Result<(), HypervisorError> {
    let (id, kind, text) = match sign {
        Sign::Claim(claim) => (claim.id, SignKind::Claim, spelt(claim)),
        Sign::Beat(id, number) => (*id, SignKind::Beat, number.to_string()),
        Sign::Acting(id) => (*id, SignKind::Acting, "acting".to_owned()),
    };
    let name = name(id, kind);
    let add = json!({"qom-type": KIND, "id": name, "identity": text});
    let Err(first) = client.run("object-add", add) else {
        return Ok(());
    };
    // It is there: one text takes the place of the other, at once.
    let path = format!("/objects/{name}");
    let replace = json!({"path": path, "property": "identity", "value": text});
    let replaced = if first.is_refusal() {
        client.run("qom-set", replace).map(drop)
    } else {
        Err(first.clone())
    };
    // What the first one said is why it cannot be there.
    replaced.map_err(|error| {
        let error = if error.is_refusal() { first } else { error };
        explain(format!("cannot claim VM `{}`", vm.name), &error)
    })
}

fn remove(vm: &VmRef, client: &Client, id: ClaimId, kind: SignKind) -> Result<(), HypervisorError> {
    let name = name(id, kind);
    let message = || format!("cannot remove a claim from VM `{}`", vm.name);
    let Err(error) = client.run("object-del", json!({"id": name})) else {
        return Ok(());
    };
    if !error.is_refusal() {
        return Err(explain(message(), &error));
    }
    // Its words for "not there" are no promise.
    let listed = client
        .run("qom-list", json!({"path": "/objects"}))
        .map_err(|error| explain(message(), &error))?;
    if signs_among(&listed).any(|it| it == (kind, id)) {
        return Err(explain(message(), &error));
    }
    Ok(())
}

fn name(id: ClaimId, kind: SignKind) -> String {
    format!("hw-{}-{id}", kind.word())
}

/// Returns the signs in a list of objects.
fn signs_among(listed: &Value) -> impl Iterator<Item = (SignKind, ClaimId)> {
    let objects = listed.as_array().map(Vec::as_slice).unwrap_or_default();
    let names = objects
        .iter()
        .filter(|object| {
            let kind = object.get("type").and_then(Value::as_str);
            kind.and_then(|kind| kind.strip_prefix("child<")) == Some("authz-simple>")
        })
        .filter_map(|object| object.get("name").and_then(Value::as_str));
    names.filter_map(sign_of).take(SIGNS_MAX)
}

fn sign_of(text: &str) -> Option<(SignKind, ClaimId)> {
    let (kind, id) = text.strip_prefix("hw-")?.split_once('-')?;
    let kind = SignKind::from_word(kind)?;
    let id: ClaimId = id.parse().ok()?;
    // Only the exact spelling is one of ours.
    (name(id, kind) == text).then_some((kind, id))
}

/// Writes a claim; later versions may read it, so the words are fixed here.
fn spelt(claim: &Claim) -> String {
    let by = &claim.claimer;
    let stance = claim.stance.word();
    json!({
        "stance": stance,
        "host": by.host,
        "boot": by.boot_id,
        "pidns": by.pid_namespace,
        "process": by.process,
        "start": by.start_ticks,
        "since": by.since.unix_ms(),
    })
    .to_string()
}

fn claim(id: ClaimId, text: &str) -> Option<Claim> {
    if text.len() > TEXT_BYTES_MAX {
        return None;
    }
    let fields: Value = serde_json::from_str(text).ok()?;
    let text = |key: &str| fields.get(key)?.as_str().map(str::to_owned);
    let number = |key: &str| fields.get(key)?.as_u64();
    Some(Claim {
        id,
        stance: Stance::from_word(&text("stance")?),
        claimer: Claimer {
            host: text("host")?,
            boot_id: text("boot")?,
            pid_namespace: number("pidns"),
            process: number("process")?.try_into().ok()?,
            start_ticks: number("start"),
            since: Timestamp::from_unix_ms(fields.get("since")?.as_i64()?),
        },
    })
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

    #[test]
    fn a_claim_is_read_as_it_was_written_whatever_the_host_is_called() {
        for host in ["kvm2", "a'b\"<&>\n", ""] {
            let written = claim_of(host);
            assert_eq!(claim(written.id, &spelt(&written)), Some(written));
        }
    }

    #[test]
    fn what_is_no_sign_of_ours_is_left_out() {
        let object = |name: &str, kind: &str| json!({"name": name, "type": kind});
        let (ours, simple) = ("hw-claim-0707070707070707", "child<authz-simple>");
        for (name, kind, is_one) in [
            (ours, simple, true),
            ("hw-beat-0707070707070707", simple, true),
            (ours, "child<secret>", false),
            (ours, "string", false),
            ("hw-claim-07", simple, false),
            ("hw-claim-070707070707070A", simple, false),
            ("hw-strange-0707070707070707", simple, false),
            ("claim-0707070707070707", simple, false),
        ] {
            let listed = json!([object("type", "string"), object(name, kind)]);
            assert_eq!(signs_among(&listed).count(), usize::from(is_one), "{name}");
        }
        assert_eq!(signs_among(&json!({"a": 1})).count(), 0);
        let id = ClaimId::from_bytes([7; 8]);
        for text in ["", "[]", "{}", "{\"stance\":\"stands\",\"host\":1}"] {
            assert_eq!(claim(id, text), None, "{text}");
        }
    }
}

#[cfg(test)]
mod with_a_real_qemu {
    use std::sync::Arc;

    use highwater_hypervisor::{Driver as _, ErrorKind};
    use highwater_model::SystemClock;
    use highwater_testkit::BareLab;

    use super::*;

    fn connect(socket: &std::path::Path) -> QmpDriver {
        let uri = format!("qmp:{}", socket.display());
        QmpDriver::connect(&uri, Arc::new(SystemClock)).unwrap()
    }

    #[test]
    fn who_acts_says_so_meanwhile_and_only_acts_while_its_claim_stands() {
        let lab = BareLab::start().unwrap();
        let running = lab.vm("web01").prelaunch().start().unwrap();
        let mut one = connect(&running.qmp_socket());
        let mut other = connect(&running.second_socket());
        let vm = one.find("web01").unwrap();
        let mut watching = other.claimant(&vm).unwrap().unwrap();
        let client = one.client().unwrap();
        let id = ClaimId::from_bytes([7; 8]);
        let mut claimant = one.claimant(&vm).unwrap().unwrap();
        one.act_for(Some(id));

        let mut has_acted = false;
        let acted = one.act(&vm, &client, || {
            has_acted = true;
            Ok(())
        });
        assert_eq!(acted.unwrap_err().kind, ErrorKind::Busy);
        assert!(!has_acted, "it has no claim");

        let claim = Claim {
            id,
            stance: Stance::Stands,
            claimer: Claimer {
                host: "h".to_owned(),
                boot_id: "b".to_owned(),
                pid_namespace: None,
                process: 1,
                start_ticks: None,
                since: Timestamp::from_unix_ms(1),
            },
        };
        claimant.set(&Sign::Claim(claim)).unwrap();
        let seen = one.act(&vm, &client, || watching.signs()).unwrap();
        assert!(seen.acting.contains(&id));
        assert!(watching.signs().unwrap().acting.is_empty());
    }
}
