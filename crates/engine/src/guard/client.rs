//! The mover's side: asks the guard, and beats so that the guard knows it lives.

use std::io::BufReader;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use highwater_hypervisor::{
    BeginOrder, Begun, Ended, ErrorKind, Foreign, HypervisorError, LeftDirectory, MarkOrder,
    RunState, Surroundings, Swept, VmFacts, VmRef, Wreckage,
};
use highwater_model::SessionId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::lifeline::{Giver, end_connection};
use super::lock::LockHolder;
use super::wire::{Answer, Message, Outcome, Reply, Request, receive, send};
use super::witness::{SessionEnds, Witness};

/// The guard allows seven times this.
const BEAT_EVERY: Duration = Duration::from_secs(1);
/// Longest time one request may take. libvirt gives up on its own job lock
/// after 30 s (field: `cannot acquire state change lock`), freezing after 5 s;
/// this is beyond their sum.
const REPLY_MAX: Duration = Duration::from_mins(2);
/// How long a dying holder of the VM's lock is waited for: its guard needs to
/// notice (7 s) and to settle, which libvirt may make it wait for on a busy host.
const LOCK_WAIT_MS: u64 = 30_000;
/// How long the guard may take to give the VM back: two short calls of libvirt.
const RELEASE_MAX: Duration = Duration::from_secs(5);

/// What can go wrong between mover and guard.
pub type GuardError = HypervisorError;

/// A connection to a guard.
#[derive(Debug)]
pub struct Guard {
    stream: Arc<Mutex<UnixStream>>,
    replies: Mutex<Replies>,
    lost: Arc<Mutex<Option<HypervisorError>>>,
    /// A request could not be sent, or got no reply.
    gone: AtomicBool,
    lifeline: Giver,
    leash: Arc<Leash>,
    connect: String,
    witness: Option<Box<dyn Witness>>,
    session: Mutex<Option<Told>>,
}

/// A session that the witness was told of.
#[derive(Debug)]
struct Told {
    order: BeginOrder,
    connections: Giver,
}

/// The sockets of a guard, which nobody locks.
#[derive(Debug)]
struct Leash {
    stream: UnixStream,
    /// Its other end is open for as long as the guard lives.
    lifeline: UnixStream,
    /// The NBD connections of the session, as the guard has them.
    connections: Mutex<Vec<OwnedFd>>,
}

impl Leash {
    fn connections(&self) -> MutexGuard<'_, Vec<OwnedFd>> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Parts a mover from its guard, which then ends the session on its own. For
/// when the mover hangs or ends: its sockets may stay open for ever.
#[derive(Debug, Clone)]
pub struct Parting(Weak<Leash>);

impl Parting {
    /// Parts them. May be called again, and from any thread.
    pub fn part(&self) {
        if let Some(leash) = self.0.upgrade() {
            // Fails if the guard has ended, which is as good.
            drop(leash.stream.shutdown(Shutdown::Both));
            // The guard does so as well; one that was killed does not, and QEMU
            // waits for whoever does not read.
            leash.connections().iter().for_each(end_connection);
        }
    }

    /// Waits until the guard has ended, but not for longer than this; returns
    /// whether it has.
    pub fn wait(&self, limit: Duration) -> bool {
        let Some(leash) = self.0.upgrade() else {
            return true;
        };
        let mut polled = [PollFd::new(&leash.lifeline, PollFlags::empty())];
        let limit = Timespec::try_from(limit).unwrap_or_default();
        // Interrupted: then it is not known.
        poll(&mut polled, Some(&limit)).is_ok_and(|ended| ended > 0)
    }

    /// Whether there is still a guard to part from.
    pub fn is_over(&self) -> bool {
        self.0.strong_count() == 0
    }
}

#[derive(Debug)]
struct Replies {
    next_id: u64,
    receiver: Receiver<(u64, Result<Reply, HypervisorError>)>,
}

impl Guard {
    /// Speaks to the guard at the other end of `stream` and has it connect;
    /// `lifeline` leads to the same guard.
    pub fn connect(
        stream: UnixStream,
        lifeline: UnixStream,
        uri: &str,
        lock_dir: &Path,
    ) -> Result<Self, GuardError> {
        let gone = |source: std::io::Error| guard_gone().because(source.to_string());
        let reading = stream.try_clone().map_err(gone)?;
        let leash = Arc::new(Leash {
            stream: stream.try_clone().map_err(gone)?,
            lifeline: lifeline.try_clone().map_err(gone)?,
            connections: Mutex::default(),
        });
        let (sender, receiver) = channel();
        let lost = Arc::new(Mutex::new(None));
        let lost_sink = Arc::clone(&lost);
        thread::Builder::new()
            .spawn(move || read_answers(reading, &sender, &lost_sink))
            .map_err(gone)?;
        let stream = Arc::new(Mutex::new(stream));
        let beating = Arc::downgrade(&stream);
        let beat = move || {
            while let Some(stream) = beating.upgrade() {
                let beat = Message {
                    id: 0,
                    request: Request::Beat,
                };
                let sent = send(
                    &mut *stream.lock().unwrap_or_else(PoisonError::into_inner),
                    &beat,
                );
                drop(stream);
                if sent.is_err() {
                    return;
                }
                thread::sleep(BEAT_EVERY);
            }
        };
        thread::Builder::new().spawn(beat).map_err(gone)?;
        let guard = Self {
            stream,
            replies: Mutex::new(Replies {
                next_id: 1,
                receiver,
            }),
            lost,
            gone: AtomicBool::new(false),
            lifeline: Giver::new(lifeline),
            leash,
            connect: uri.to_owned(),
            witness: None,
            session: Mutex::new(None),
        };
        let hello = Request::Hello {
            connect: uri.to_owned(),
            lock_dir: lock_dir.to_owned(),
        };
        guard.done(hello)?;
        Ok(guard)
    }

    /// Has somebody told of the sessions, who can end them in our place.
    #[must_use]
    pub fn witnessed_by(mut self, witness: Box<dyn Witness>) -> Self {
        self.witness = Some(witness);
        self
    }

    /// Returns the means to part from this guard at any time.
    pub fn parting(&self) -> Parting {
        Parting(Arc::downgrade(&self.leash))
    }

    /// Lists all VMs and how each runs.
    pub fn list(&self) -> Result<Vec<(VmRef, RunState)>, GuardError> {
        match self.ask(Request::List)? {
            Reply::Vms(vms) => Ok(vms),
            _ => Err(wrong_reply()),
        }
    }

    /// Finds a VM by name or UUID.
    pub fn find(&self, name: &str) -> Result<VmRef, GuardError> {
        match self.ask(Request::Find {
            name: name.to_owned(),
        })? {
            Reply::Vm(vm) => Ok(vm),
            _ => Err(wrong_reply()),
        }
    }

    /// Takes the VM's lock; the guard holds it until it ends or locks another.
    pub fn lock(&self, vm: &VmRef) -> Result<(), GuardError> {
        self.lock_within(vm, LOCK_WAIT_MS)
    }

    /// Returns who holds the VM's lock, without taking it.
    pub fn lock_holder(&self, vm: &VmRef) -> Result<Option<LockHolder>, GuardError> {
        match self.ask(Request::LockHolder { vm: vm.clone() })? {
            Reply::Holder(holder) => Ok(holder),
            _ => Err(wrong_reply()),
        }
    }

    /// Like [`lock`](Self::lock), with a patience of so many milliseconds.
    pub fn lock_within(&self, vm: &VmRef, wait_ms: u64) -> Result<(), GuardError> {
        self.done(Request::Lock {
            vm: vm.clone(),
            wait_ms,
        })
    }

    /// Reports what lies around a VM.
    pub fn survey(&self, vm: &VmRef) -> Result<Surroundings, GuardError> {
        match self.ask(Request::Survey { vm: vm.clone() })? {
            Reply::Surroundings(found) => Ok(found),
            _ => Err(wrong_reply()),
        }
    }

    /// Returns the directories that dead sessions of this VM left.
    pub fn leftovers(
        &self,
        vm: &VmRef,
        places: &[PathBuf],
    ) -> Result<Vec<LeftDirectory>, GuardError> {
        let (vm, places) = (vm.clone(), places.to_vec());
        match self.ask(Request::Leftovers { vm, places })? {
            Reply::Leftovers(found) => Ok(found),
            _ => Err(wrong_reply()),
        }
    }

    /// Removes them; the VM's lock must have been taken.
    pub fn sweep(&self, vm: &VmRef, places: &[PathBuf]) -> Result<Swept, GuardError> {
        let (vm, places) = (vm.clone(), places.to_vec());
        match self.ask(Request::Sweep { vm, places })? {
            Reply::Swept(swept) => Ok(swept),
            _ => Err(wrong_reply()),
        }
    }

    /// Reports what another program has left at a VM.
    pub fn wreckage(&self, vm: &VmRef, of: Foreign) -> Result<Wreckage, GuardError> {
        self.wreckage_by(Request::Wreckage { vm: vm.clone(), of })
    }

    /// Removes it, and returns what was removed; the VM's lock must have been
    /// taken.
    pub fn clear_wreckage(&self, vm: &VmRef, of: Foreign) -> Result<Wreckage, GuardError> {
        self.wreckage_by(Request::ClearWreckage { vm: vm.clone(), of })
    }

    fn wreckage_by(&self, request: Request) -> Result<Wreckage, GuardError> {
        match self.ask(request)? {
            Reply::Wreckage(found) => Ok(found),
            _ => Err(wrong_reply()),
        }
    }

    /// Starts a VM that is off, paused; its lock must have been taken.
    pub fn start_paused(&self, vm: &VmRef) -> Result<(), GuardError> {
        self.done(Request::StartPaused { vm: vm.clone() })
    }

    /// Shuts it off again, unless somebody has resumed it; says whether.
    pub fn stop_if_started(&self, vm: &VmRef) -> Result<bool, GuardError> {
        match self.ask(Request::StopIfStarted { vm: vm.clone() })? {
            Reply::Stopped(was_ours) => Ok(was_ours),
            _ => Err(wrong_reply()),
        }
    }

    /// Reports everything about a VM.
    pub fn observe(&self, vm: &VmRef) -> Result<VmFacts, GuardError> {
        match self.ask(Request::Observe { vm: vm.clone() })? {
            Reply::Facts(facts) => Ok(*facts),
            _ => Err(wrong_reply()),
        }
    }

    /// Takes the point in time.
    pub fn begin(&self, order: &BeginOrder) -> Result<Begun, GuardError> {
        self.tell_begins(order)?;
        let begun = self.ask(Request::Begin {
            order: Box::new(order.clone()),
        });
        match begun {
            Ok(Reply::Begun(begun)) => Ok(*begun),
            Ok(_) => Err(wrong_reply()),
            Err(error) => {
                // A guard that lives has taken back what it had begun.
                if !self.is_gone() && !error.left_behind {
                    self.tell_ended(order);
                }
                Err(error)
            }
        }
    }

    /// Tells the guard that the manifest is about to be written. Only after
    /// its reply may it be.
    pub fn committing(&self) -> Result<(), GuardError> {
        if let (Some(witness), Some(told)) = (&self.witness, &*self.told()) {
            // First: the guard may die between its reply and the manifest, and
            // whoever settles then must not take the backup for one that failed.
            witness.commits(&told.order).map_err(witness_gone)?;
        }
        self.done(Request::Committing)
    }

    /// Ends the session at the VM.
    pub fn finish(&self, outcome: Outcome) -> Result<Ended, GuardError> {
        let ended = self.ended(Request::Finish { outcome })?;
        self.leash.connections().clear();
        if ended.warnings.is_empty()
            && let Some(told) = self.told().take()
        {
            self.tell_ended(&told.order);
        }
        Ok(ended)
    }

    /// Ends the session of another guard, which has died; what could not be
    /// done is in the warnings.
    pub fn settle(&self, order: &BeginOrder, outcome: Outcome) -> Result<Ended, GuardError> {
        let ended = self.ended(Request::Settle {
            order: Box::new(order.clone()),
            outcome,
        })?;
        if ended.warnings.is_empty() {
            self.tell_ended(order);
        }
        Ok(ended)
    }

    /// Does the same from the beginning: waits for that guard if it still lives,
    /// and clears what is left where the job had ended before. Returns what could
    /// not be done.
    pub fn settle_for_another(
        &self,
        order: &BeginOrder,
        outcome: Outcome,
    ) -> Result<Vec<String>, GuardError> {
        self.lock(&order.vm)?;
        let mut ended = self.settle(order, outcome)?;
        let dirs = [&order.socket_dir, &order.scratch_dir];
        let above = dirs.iter().filter_map(|dir| dir.parent());
        let places: Vec<PathBuf> = above.map(Path::to_owned).collect();
        let swept = self.sweep(&order.vm, &places)?;
        ended.warnings.extend(swept.warnings);
        Ok(ended.warnings)
    }

    /// Ends what a dead session left behind.
    pub fn end_leftover(&self, vm: &VmRef, session: SessionId) -> Result<Ended, GuardError> {
        self.ended(Request::EndLeftover {
            vm: vm.clone(),
            session,
        })
    }

    /// Changes a mark.
    pub fn mark(&self, vm: &VmRef, order: &MarkOrder) -> Result<(), GuardError> {
        self.done(Request::Mark {
            vm: vm.clone(),
            order: order.clone(),
        })
    }

    /// Gives the guard the means to cut an NBD connection that reads from its
    /// session. To be called before the connection's first request.
    pub fn entrust(&self, socket: &impl AsFd) -> Result<(), GuardError> {
        let own = socket.as_fd().try_clone_to_owned().map_err(|source| {
            HypervisorError::new(ErrorKind::Other, "cannot duplicate an NBD connection")
                .because(source.to_string())
        })?;
        self.leash.connections().push(own);
        if let Some(told) = &*self.told() {
            // Nobody cuts the connection for a witness that is gone, and a
            // mover without one is about to end.
            told.connections.give(socket).map_err(witness_gone)?;
        }
        self.lifeline
            .give(socket)
            .map_err(|source| guard_gone().because(source.to_string()))
    }

    fn told(&self) -> MutexGuard<'_, Option<Told>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell_begins(&self, order: &BeginOrder) -> Result<(), GuardError> {
        let Some(witness) = &self.witness else {
            return Ok(());
        };
        let told = (|| {
            let (connections, theirs) = UnixStream::pair()?;
            let ends = SessionEnds {
                connect: self.connect.clone(),
                guard: OwnedFd::from(self.leash.stream.try_clone()?),
                connections: OwnedFd::from(theirs),
            };
            witness.begins(order, ends)?;
            Ok(Giver::new(connections))
        })();
        *self.told() = Some(Told {
            order: order.clone(),
            connections: told.map_err(witness_gone)?,
        });
        Ok(())
    }

    fn tell_ended(&self, order: &BeginOrder) {
        if let Some(witness) = &self.witness {
            witness.ended(order);
        }
    }

    /// Returns why the running session broke, if the guard said so.
    pub fn lost(&self) -> Option<GuardError> {
        self.lost
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Returns whether a request went unanswered: it is dead, or hangs.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    fn done(&self, request: Request) -> Result<(), GuardError> {
        match self.ask(request)? {
            Reply::Done => Ok(()),
            _ => Err(wrong_reply()),
        }
    }

    fn ended(&self, request: Request) -> Result<Ended, GuardError> {
        match self.ask(request)? {
            Reply::Ended(ended) => Ok(ended),
            _ => Err(wrong_reply()),
        }
    }

    fn ask(&self, request: Request) -> Result<Reply, GuardError> {
        self.ask_within(request, REPLY_MAX)
    }

    fn ask_within(&self, request: Request, limit: Duration) -> Result<Reply, GuardError> {
        let mut replies = self.replies.lock().unwrap_or_else(PoisonError::into_inner);
        let id = replies.next_id;
        replies.next_id += 1;
        let sent = {
            let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
            send(&mut *stream, &Message { id, request })
        };
        if let Err(source) = sent {
            self.gone.store(true, Ordering::Relaxed);
            return Err(guard_gone().because(source.to_string()));
        }
        loop {
            match replies.receiver.recv_timeout(limit) {
                Ok((answered, result)) if answered == id => return result,
                // The late reply to a request that was given up.
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    self.gone.store(true, Ordering::Relaxed);
                    return Err(cannot_reach_guard()
                        .because(format!("it did not reply within {} s", limit.as_secs())));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    self.gone.store(true, Ordering::Relaxed);
                    return Err(guard_gone());
                }
            }
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // The guard may not outlive us: in a container of our own it ends when we
        // do, and would leave its claim to be waited for.
        if !self.is_gone() {
            drop(self.ask_within(Request::Release, RELEASE_MAX));
        }
        let stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        // The reader thread holds a duplicate: only a shutdown ends the stream.
        // An error means it has ended already.
        drop(stream.shutdown(Shutdown::Both));
    }
}

fn read_answers(
    stream: UnixStream,
    replies: &Sender<(u64, Result<Reply, HypervisorError>)>,
    lost: &Mutex<Option<HypervisorError>>,
) {
    let mut stream = BufReader::new(stream);
    loop {
        match receive(&mut stream) {
            Ok(Some(Answer::Reply { id, result })) => {
                if replies.send((id, result)).is_err() {
                    return;
                }
            }
            Ok(Some(Answer::Lost { error })) => note_lost(lost, error),
            Ok(None) | Err(_) => {
                note_lost(lost, guard_gone());
                return;
            }
        }
    }
}

/// Keeps the first cause; later ones follow from it.
fn note_lost(lost: &Mutex<Option<HypervisorError>>, error: HypervisorError) {
    lost.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .get_or_insert(error);
}

fn guard_gone() -> HypervisorError {
    cannot_reach_guard().because("it has ended")
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "it is what `map_err` hands over"
)]
fn witness_gone(source: std::io::Error) -> HypervisorError {
    HypervisorError::new(
        ErrorKind::Unreachable,
        "cannot reach the process that was started",
    )
    .because(source.to_string())
}

fn cannot_reach_guard() -> HypervisorError {
    HypervisorError::new(ErrorKind::Unreachable, "cannot reach the guard process")
}

fn wrong_reply() -> HypervisorError {
    HypervisorError::new(ErrorKind::Other, "cannot understand the guard process")
}
