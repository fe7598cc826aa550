//! One backup per VM at a time among all who can reach it, wherever they run.
//!
//! A claim is a sign at the VM itself ([`highwater_hypervisor::Claimant`]). It is taken so:
//!
//! ```text
//!   set up my claim ─► read all ─► nobody else stands there ────────► it is mine
//!         ▲               ▲   │
//!         │               │   ├─► one is dead ──► remove its claim ──┐
//!         │               └───┼───────────────────────────────────────┘
//!         │                   └─► one lives: wait; the greater id yields meanwhile
//!         └──────────────────────────── nobody else stands there any more
//! ```
//!
//! Each sets up its claim before it reads, so of two at least one sees the other.
//! Who sees another one that stands never goes in; that the greater id yields
//! lets the smaller one in.
//!
//! *Who is dead* is told by no clock but the reader's own. A process of the same
//! boot and pid namespace that runs this program is looked for. Any other one has to beat, that is, to
//! change its sign; one that does not, while the reader itself has beaten
//! [`SILENT_BEATS`] times at the same VM, counts as dead. A VM at which nothing
//! can be changed for a while thus makes nobody dead.
//!
//! *One that is not dead after all* (it was stopped) finds its claim gone, and does
//! nothing more that could hurt who came after it. What it was just about to do
//! when it was stopped, the kernel prevents (see [`Driver::act_for`]): it leaves
//! a sign while it is so, and who finds that sign without a living owner waits
//! until the time is over.
//!
//! [`Driver::act_for`]: highwater_hypervisor::Driver::act_for

mod owner;
mod turn;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use highwater_hypervisor::{
    CLAIM_GONE, Claim, Claimant, ErrorKind, HypervisorError, Sign, SignKind, Stance, VmRef,
};
use highwater_model::step::{Step, pass};
use highwater_model::{ClaimId, Clock as _, SystemClock};

use super::lock::{LockHolder, held};
use owner::Life;
use turn::{Move, Taking};

/// How often a claim beats. Each beat is a change of the VM's metadata, of which
/// libvirt tells everybody who listens.
const BEAT_EVERY: Duration = Duration::from_secs(2);
/// How long taking a claim may go on beyond the wait for one that lives. Who looks
/// dead is dead after eight seconds, what he may have been about to do is over
/// after thirty; somebody who claims anew all the time is waited for no longer.
const TAKING_MAX: Duration = Duration::from_mins(1);
/// How often the signs are read while somebody is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A claim that was taken; dropping it gives it up.
#[derive(Debug)]
pub(super) struct HeldClaim {
    id: ClaimId,
    is_lost: Arc<AtomicBool>,
    stop: Option<Sender<()>>,
    beating: Option<JoinHandle<()>>,
}

impl HeldClaim {
    pub(super) const fn id(&self) -> ClaimId {
        self.id
    }

    /// Returns whether the claim was seen to be gone.
    pub(super) fn is_lost(&self) -> bool {
        self.is_lost.load(Ordering::Relaxed)
    }

    fn beat_on(mut claimant: Box<dyn Claimant>, id: ClaimId, mut beats: u64) -> Self {
        let is_lost = Arc::new(AtomicBool::new(false));
        let lost = Arc::clone(&is_lost);
        let (stop, stopped) = channel::<()>();
        let beating = std::thread::spawn(move || {
            while stopped.recv_timeout(BEAT_EVERY) == Err(RecvTimeoutError::Timeout) {
                // Trouble passes, or the session breaks by it: the daemon is
                // being restarted, or the VM is gone.
                match claimant.signs() {
                    Ok(signs) if signs.claim(id).is_none() => lost.store(true, Ordering::Relaxed),
                    Ok(_) if claimant.set(&Sign::Beat(id, beats + 1)).is_ok() => beats += 1,
                    Ok(_) | Err(_) => {}
                }
            }
            give_up(claimant.as_mut(), id);
        });
        Self {
            id,
            is_lost,
            stop: Some(stop),
            beating: Some(beating),
        }
    }
}

impl Drop for HeldClaim {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(beating) = self.beating.take() {
            // It does not panic, and there is nothing to do if it did.
            drop(beating.join());
        }
    }
}

/// Removes what a claim consists of, the claim itself last. What stays, because
/// the daemon or the VM is gone, counts as a dead one's.
fn give_up(claimant: &mut dyn Claimant, id: ClaimId) {
    let signs = claimant.signs().unwrap_or_default();
    if signs.acting.contains(&id) {
        drop(claimant.remove(id, SignKind::Acting));
    }
    if signs.beats.contains_key(&id) {
        drop(claimant.remove(id, SignKind::Beat));
    }
    if signs.claim(id).is_some() {
        drop(claimant.remove(id, SignKind::Claim));
    }
}

/// How long a claim is waited for.
#[derive(Clone, Copy)]
pub(super) struct Patience<'a> {
    /// For a living holder to end.
    pub(super) wait: Duration,
    /// How much longer who looks dead is looked at.
    pub(super) beyond: Duration,
    /// Says whether nobody wants the claim any more.
    pub(super) is_given_up: &'a dyn Fn() -> bool,
}

impl<'a> Patience<'a> {
    pub(super) const fn new(wait: Duration, is_given_up: &'a dyn Fn() -> bool) -> Self {
        Self {
            wait,
            beyond: TAKING_MAX,
            is_given_up,
        }
    }
}

/// Claims a VM.
pub(super) fn take(
    mut claimant: Box<dyn Claimant>,
    vm: &VmRef,
    patience: Patience<'_>,
) -> Result<HeldClaim, HypervisorError> {
    let mut claim = Claim {
        id: ClaimId::random(),
        stance: Stance::Stands,
        claimer: owner::myself(),
    };
    let mut taking = Taking::new(claim.id);
    let taken = wait_for_turn(claimant.as_mut(), vm, patience, &mut claim, &mut taking);
    match taken {
        Ok(()) => Ok(HeldClaim::beat_on(claimant, claim.id, taking.beats())),
        Err(error) => {
            give_up(claimant.as_mut(), claim.id);
            Err(error)
        }
    }
}

fn wait_for_turn(
    claimant: &mut dyn Claimant,
    vm: &VmRef,
    patience: Patience<'_>,
    claim: &mut Claim,
    taking: &mut Taking,
) -> Result<(), HypervisorError> {
    claimant.set(&Sign::Claim(claim.clone()))?;
    pass(Step::ClaimSet);
    let until = Instant::now() + patience.wait;
    let mut beaten = Instant::now();
    loop {
        if (patience.is_given_up)() || Instant::now() >= until + patience.beyond {
            return Err(contended(vm));
        }
        let signs = claimant.signs()?;
        match taking.turn(&signs, claim.stance, &owner::life) {
            Move::Enter => return Ok(()),
            Move::Set(stance) => {
                claim.stance = stance;
                claimant.set(&Sign::Claim(claim.clone()))?;
            }
            Move::Remove(id, kind) => claimant.remove(id, kind)?,
            Move::Wait { living } => {
                if let Some(holder) = living
                    && Instant::now() >= until
                {
                    let by_hand = claimant.removal_by_hand(holder.id);
                    let held = held(&holder_of(&holder, &claim.claimer), vm);
                    return Err(held.hint(format!(
                        "wait until it has ended, or end that process: the VM is tidied up then; \
                         if there is no such backup, remove its claim: `{by_hand}`"
                    )));
                }
                std::thread::sleep(LOOK_EVERY);
            }
        }
        if beaten.elapsed() >= BEAT_EVERY {
            claimant.set(&Sign::Beat(claim.id, taking.beats() + 1))?;
            taking.has_beaten();
            beaten = Instant::now();
        }
    }
}

/// Returns who claims the VM and lives. Changes nothing; takes a few seconds
/// where a process cannot be seen and has to be listened for.
pub(super) fn holder(claimant: &mut dyn Claimant) -> Result<Option<LockHolder>, HypervisorError> {
    let first = claimant.signs()?;
    let me = owner::myself();
    let mut unknown = Vec::new();
    let standing = |claim: &&Claim| claim.stance == Stance::Stands;
    for claim in first.claims.iter().filter(standing) {
        match owner::life(&claim.claimer) {
            Life::Lives => return Ok(Some(holder_of(claim, &me))),
            Life::Dead => {}
            Life::Unknown => unknown.push(claim),
        }
    }
    let since = Instant::now();
    // One beat more than it may miss: it cannot be asked to change anything
    // here, so nobody knows whether it could have.
    while !unknown.is_empty() && since.elapsed() < BEAT_EVERY * (turn::SILENT_BEATS + 1) {
        std::thread::sleep(LOOK_EVERY);
        let signs = claimant.signs()?;
        unknown.retain(|claim| signs.claim(claim.id).is_some());
        let has_beaten = |claim: &&&Claim| signs.beats.get(&claim.id) != first.beats.get(&claim.id);
        if let Some(claim) = unknown.iter().find(has_beaten) {
            return Ok(Some(holder_of(claim, &me)));
        }
    }
    Ok(None)
}

fn holder_of(claim: &Claim, me: &highwater_hypervisor::Claimer) -> LockHolder {
    let by = &claim.claimer;
    // The same name on another machine, or a process id of another namespace,
    // would send a person after the wrong process.
    let is_here = by.boot_id == me.boot_id
        && by.host == me.host
        && by.pid_namespace.is_some()
        && by.pid_namespace == me.pid_namespace;
    LockHolder {
        host: (!is_here).then(|| by.host.clone()),
        process: Some(by.process),
        since: Some(by.since),
    }
}

/// Says that others did not let us have the VM, though none of them has it.
fn contended(vm: &VmRef) -> HypervisorError {
    HypervisorError::new(ErrorKind::Busy, format!("cannot lock VM `{}`", vm.name))
        .because("others keep claiming it, and none of them goes on")
        .hint("see which other hosts or users back it up")
}

/// Says that another one has the VM now.
pub(super) fn lost(vm: &VmRef) -> HypervisorError {
    HypervisorError::new(
        ErrorKind::SessionLost,
        format!("cannot keep the session of VM `{}`", vm.name),
    )
    .because(CLAIM_GONE)
}

/// Returns now; claims are dated for people only.
fn now() -> highwater_model::Timestamp {
    SystemClock.now()
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::BTreeSet;

    use highwater_hypervisor::Signs;

    use super::*;

    /// A VM at which somebody new is acting whenever it is looked at.
    #[derive(Default)]
    struct Restless {
        claims: Vec<Claim>,
    }

    impl Claimant for Restless {
        fn signs(&mut self) -> Result<Signs, HypervisorError> {
            Ok(Signs {
                claims: self.claims.clone(),
                acting: BTreeSet::from([ClaimId::random()]),
                ..Signs::default()
            })
        }

        fn set(&mut self, sign: &Sign) -> Result<(), HypervisorError> {
            if let Sign::Claim(claim) = sign {
                self.claims = vec![claim.clone()];
            }
            Ok(())
        }

        fn remove(&mut self, id: ClaimId, kind: SignKind) -> Result<(), HypervisorError> {
            if kind == SignKind::Claim {
                self.claims.retain(|claim| claim.id != id);
            }
            Ok(())
        }

        fn removal_by_hand(&self, _: ClaimId) -> String {
            String::new()
        }
    }

    fn refused(patience: Patience<'_>) -> HypervisorError {
        let vm = VmRef {
            name: "web01".to_owned(),
            uuid: None,
        };
        take(Box::new(Restless::default()), &vm, patience).unwrap_err()
    }

    #[test]
    fn a_vm_at_which_somebody_new_acts_all_the_time_is_not_waited_for_without_end() {
        let since = Instant::now();
        let error = refused(Patience {
            wait: Duration::from_millis(10),
            beyond: Duration::from_millis(100),
            is_given_up: &|| since.elapsed() > Duration::from_secs(20),
        });
        assert_eq!(error.kind, ErrorKind::Busy);
        assert!(since.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_claim_is_not_waited_for_when_its_mover_is_gone() {
        let looks = Cell::new(0);
        let is_given_up = || looks.replace(looks.get() + 1) == 2;
        refused(Patience {
            wait: Duration::ZERO,
            beyond: Duration::from_secs(20),
            is_given_up: &is_given_up,
        });
        assert_eq!(looks.get(), 3);
    }
}
