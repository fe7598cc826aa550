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
//! boot and pid namespace is looked for. Any other one has to beat, that is, to
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
    Claim, Claimant, ErrorKind, HypervisorError, Sign, SignKind, Stance, VmRef,
};
use highwater_model::step::{Step, pass};
use highwater_model::{ClaimId, Clock as _, SystemClock};

use super::lock::{LockHolder, held};
use owner::Life;
use turn::{Move, Taking};

/// How often a claim beats. Each beat is a change of the VM's metadata, of which
/// libvirt tells everybody who listens.
const BEAT_EVERY: Duration = Duration::from_secs(2);
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

/// Claims a VM, waiting at most `wait` for a living holder to end. Who looks
/// dead is looked at for as long as it takes.
pub(super) fn take(
    mut claimant: Box<dyn Claimant>,
    vm: &VmRef,
    wait: Duration,
) -> Result<HeldClaim, HypervisorError> {
    let mut claim = Claim {
        id: ClaimId::random(),
        stance: Stance::Stands,
        claimer: owner::myself(),
    };
    let mut taking = Taking::new(claim.id);
    let taken = wait_for_turn(claimant.as_mut(), vm, wait, &mut claim, &mut taking);
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
    wait: Duration,
    claim: &mut Claim,
    taking: &mut Taking,
) -> Result<(), HypervisorError> {
    claimant.set(&Sign::Claim(claim.clone()))?;
    pass(Step::ClaimSet);
    let until = Instant::now() + wait;
    let mut beaten = Instant::now();
    loop {
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
                    return Err(held(&holder_of(&holder, &claim.claimer), vm));
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

/// Says that another one has the VM now.
pub(super) fn lost(vm: &VmRef) -> HypervisorError {
    HypervisorError::new(
        ErrorKind::SessionLost,
        format!("cannot keep the session of VM `{}`", vm.name),
    )
    .because(
        "its claim is gone: another backup took this one for dead and has taken over, or the VM \
         was restarted",
    )
}

/// Returns now; claims are dated for people only.
fn now() -> highwater_model::Timestamp {
    SystemClock.now()
}
