//! The guard's side: serves the mover, and settles when the mover is gone.
//!
//! ```text
//!              Begin              Committing            Finish
//!   idle ─────────────► reading ─────────────► committing ──────► idle
//!                          │ mover gone             │ mover gone
//!                          ▼                        ▼
//!              end the job, remove           end the job, keep both
//!              the unfinished mark           marks: the manifest decides
//! ```

use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use highwater_hypervisor::{
    BeginOrder, Driver, Ended, ErrorKind, HypervisorError, MarkOrder, VmRef,
};

use highwater_model::step::{Step, pass};

use super::lifeline::Cutter;
use super::lock::{self, VmLock};
use super::wire::{Answer, Message, Outcome, Reply, Request, receive, send};

/// A mover that was silent for this long is stopped or dead to us. The mover
/// beats every second; a machine under heavy swap may miss a few.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// A mover that knows that its session broke, and has not ended it after this
/// time, hangs (in a repository that does not answer). The guest must not wait
/// for it: its scratch file may be filling up.
const LOST_PATIENCE: Duration = Duration::from_secs(10);
/// How often a running session is looked at.
const CHECK_EVERY: Duration = Duration::from_secs(1);

/// Opens the driver for a connection URI.
pub type Connect = dyn Fn(&str) -> Result<Box<dyn Driver>, HypervisorError>;

/// Serves one mover over `stream` until it is gone, then settles and returns.
///
/// Over `lifeline` the mover hands its NBD connections. `connect` opens the driver for a connection URI.
pub fn serve(stream: UnixStream, lifeline: UnixStream, connect: &Connect) {
    let (sender, requests) = channel();
    let Ok(reading) = stream.try_clone() else {
        return;
    };
    // Ends with the stream; nobody needs to wait for it.
    std::thread::spawn(move || read_requests(reading, &sender));
    let mut host = Host {
        stream,
        cutter: Cutter::new(lifeline),
        driver: None,
        lock_dir: PathBuf::new(),
        lock: None,
        session: None,
    };
    host.run(&requests, connect);
    host.abandon();
}

fn read_requests(stream: UnixStream, sender: &Sender<Message>) {
    let mut stream = BufReader::new(stream);
    while let Ok(Some(message)) = receive(&mut stream) {
        if sender.send(message).is_err() {
            return;
        }
    }
}

struct Host {
    stream: UnixStream,
    cutter: Cutter,
    driver: Option<Box<dyn Driver>>,
    lock_dir: PathBuf,
    /// Which VM is locked.
    lock: Option<(VmRef, VmLock)>,
    session: Option<Session>,
}

struct Session {
    order: BeginOrder,
    committing: bool,
    /// Since when the mover has known that the session broke.
    told_lost: Option<Instant>,
}

impl Host {
    fn run(&mut self, requests: &Receiver<Message>, connect: &Connect) {
        let mut heard = Instant::now();
        let mut checked = Instant::now();
        loop {
            match requests.recv_timeout(CHECK_EVERY) {
                Ok(Message {
                    request: Request::Beat,
                    ..
                }) => heard = Instant::now(),
                Ok(Message { id, request }) => {
                    let result = self.answer(request, connect);
                    if send(&mut self.stream, &Answer::Reply { id, result }).is_err() {
                        return;
                    }
                    // The beats that arrived meanwhile are still in the queue.
                    heard = Instant::now();
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if self.session.is_some() && heard.elapsed() > SILENCE_MAX {
                return;
            }
            if self
                .lost_since()
                .is_some_and(|since| since.elapsed() > LOST_PATIENCE)
            {
                return;
            }
            if checked.elapsed() >= CHECK_EVERY {
                checked = Instant::now();
                self.cutter.take();
                if self.tell_if_lost().is_err() {
                    return;
                }
            }
        }
    }

    fn answer(&mut self, request: Request, connect: &Connect) -> Result<Reply, HypervisorError> {
        match request {
            Request::Hello {
                connect: uri,
                lock_dir,
            } => {
                self.driver = Some(connect(&uri)?);
                self.lock_dir = lock_dir;
                Ok(Reply::Done)
            }
            Request::List => self.driver()?.list().map(Reply::Vms),
            Request::Find { name } => self.driver()?.find(&name).map(Reply::Vm),
            Request::Lock { vm, wait_ms } => {
                self.lock = None;
                let wait = Duration::from_millis(wait_ms);
                let taken = lock::take(&self.lock_dir, &vm, wait)?;
                self.lock = Some((vm, taken));
                Ok(Reply::Done)
            }
            Request::Observe { vm } => self
                .driver()?
                .observe(&vm)
                .map(|facts| Reply::Facts(Box::new(facts))),
            Request::Begin { order } => {
                let begun = self.driver()?.begin(&order)?;
                self.session = Some(Session {
                    order: *order,
                    committing: false,
                    told_lost: None,
                });
                Ok(Reply::Begun(Box::new(begun)))
            }
            Request::Committing => {
                let session = self.session.as_mut().ok_or_else(no_session)?;
                session.committing = true;
                pass(Step::CommitTold);
                Ok(Reply::Done)
            }
            Request::Finish { outcome } => {
                let session = self.session.take().ok_or_else(no_session)?;
                Ok(Reply::Ended(self.finish(&session.order, outcome)))
            }
            Request::Settle { order, outcome } => Ok(Reply::Ended(self.finish(&order, outcome))),
            Request::EndLeftover { vm, session } => {
                self.driver()?.end_leftover(&vm, session).map(Reply::Ended)
            }
            Request::Mark { vm, order } => self.driver()?.mark(&vm, &order).map(|()| Reply::Done),
            Request::LockHolder { vm } => lock::holder(&self.lock_dir, &vm).map(Reply::Holder),
            Request::Survey { vm } => self.driver()?.survey(&vm).map(Reply::Surroundings),
            Request::Leftovers { vm, places } => {
                self.driver()?.leftovers(&vm, &places).map(Reply::Leftovers)
            }
            Request::Sweep { vm, places } => {
                // Who does not hold the lock cannot know that a session is dead.
                if self.lock.as_ref().is_none_or(|(locked, _)| *locked != vm) {
                    return Err(HypervisorError::new(
                        ErrorKind::Other,
                        format!("cannot tidy up after sessions of VM `{}`", vm.name),
                    )
                    .because("its lock was not taken"));
                }
                self.driver()?.sweep(&vm, &places).map(Reply::Swept)
            }
            Request::Beat => Ok(Reply::Done),
        }
    }

    fn driver(&mut self) -> Result<&mut Box<dyn Driver>, HypervisorError> {
        self.driver.as_mut().ok_or_else(|| {
            HypervisorError::new(
                ErrorKind::Unreachable,
                "cannot use a hypervisor before connecting",
            )
        })
    }

    /// Ends the session at the VM. Trouble here is a warning: the next run
    /// repairs it.
    fn finish(&mut self, order: &BeginOrder, outcome: Outcome) -> Ended {
        let Some(driver) = &mut self.driver else {
            return Ended::default();
        };
        // QEMU waits for whoever does not read.
        let ending = self.cutter.cut_while(|| driver.end(order));
        let mut ended = ending.unwrap_or_else(|error| Ended {
            ended_job: false,
            warnings: vec![one_line(&error)],
        });
        match (outcome, &order.new_mark) {
            (Outcome::Failed, Some(mark)) => {
                // Every mark records on its own since its creation, so giving
                // up the new one loses nothing: the old one goes on.
                let removal = MarkOrder::Remove(mark.name.clone());
                if let Err(error) = driver.mark(&order.vm, &removal) {
                    ended.warnings.push(one_line(&error));
                }
            }
            (Outcome::Failed | Outcome::Committed | Outcome::Unknown, _) => {}
        }
        ended
    }

    fn lost_since(&self) -> Option<Instant> {
        self.session.as_ref().and_then(|session| session.told_lost)
    }

    fn tell_if_lost(&mut self) -> std::io::Result<()> {
        let (Some(session), Some(driver)) = (&mut self.session, &mut self.driver) else {
            return Ok(());
        };
        if session.told_lost.is_some() {
            return Ok(());
        }
        if let Err(error) = driver.check(&session.order.vm, session.order.session) {
            session.told_lost = Some(Instant::now());
            send(&mut self.stream, &Answer::Lost { error })?;
        }
        Ok(())
    }

    /// The mover is gone: leaves the VM as if it had never begun, unless the
    /// manifest may exist.
    fn abandon(&mut self) {
        let Some(session) = self.session.take() else {
            return;
        };
        let outcome = if session.committing {
            Outcome::Unknown
        } else {
            Outcome::Failed
        };
        self.finish(&session.order, outcome);
    }
}

fn no_session() -> HypervisorError {
    HypervisorError::new(ErrorKind::Other, "cannot end a session that has not begun")
}

/// Returns an error and its causes as one line for a warning.
pub(crate) fn one_line(error: &HypervisorError) -> String {
    std::iter::once(error.message.as_str())
        .chain(error.because.iter().map(String::as_str))
        .collect::<Vec<_>>()
        .join(": ")
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use highwater_hypervisor::{
        Begun, Consistency, LeftDirectory, Quiesce, RunState, Surroundings, Swept, VmFacts,
    };
    use highwater_model::{MarkName, Nonce, PointId, RepoId, SessionId, Timestamp};

    use super::*;
    use crate::guard::Guard;

    /// A hypervisor whose session breaks at once; notes what it is asked to do.
    struct Broken(Arc<Mutex<Vec<&'static str>>>);

    impl Broken {
        #[expect(clippy::unnecessary_wraps, reason = "it is what every method answers")]
        fn note<T>(&self, what: &'static str, answer: T) -> Result<T, HypervisorError> {
            self.0.lock().unwrap().push(what);
            Ok(answer)
        }
    }

    impl Driver for Broken {
        fn list(&mut self) -> Result<Vec<(VmRef, RunState)>, HypervisorError> {
            self.note("list", Vec::new())
        }
        fn find(&mut self, name: &str) -> Result<VmRef, HypervisorError> {
            let name = name.to_owned();
            self.note("find", VmRef { name, uuid: None })
        }
        fn observe(&mut self, _: &VmRef) -> Result<VmFacts, HypervisorError> {
            Err(no_session())
        }
        fn begin(&mut self, _: &BeginOrder) -> Result<Begun, HypervisorError> {
            let begun = Begun {
                exports: Vec::new(),
                consistency: Consistency::Crash,
                taken_at: Timestamp::from_unix_ms(0),
                frozen_ms: None,
                mark_created_s: None,
                disks: Vec::new(),
                warnings: Vec::new(),
            };
            self.note("begin", begun)
        }
        fn check(&mut self, _: &VmRef, _: SessionId) -> Result<(), HypervisorError> {
            Err(HypervisorError::new(
                ErrorKind::SessionLost,
                "cannot keep the session: scratch is nearly full",
            ))
        }
        fn end(&mut self, _: &BeginOrder) -> Result<Ended, HypervisorError> {
            self.note("end", Ended::default())
        }
        fn end_leftover(&mut self, _: &VmRef, _: SessionId) -> Result<Ended, HypervisorError> {
            self.note("end_leftover", Ended::default())
        }
        fn mark(&mut self, _: &VmRef, _: &MarkOrder) -> Result<(), HypervisorError> {
            self.note("mark", ())
        }
        fn survey(&mut self, _: &VmRef) -> Result<Surroundings, HypervisorError> {
            self.note("survey", Surroundings::default())
        }
        fn leftovers(
            &mut self,
            _: &VmRef,
            _: &[PathBuf],
        ) -> Result<Vec<LeftDirectory>, HypervisorError> {
            self.note("leftovers", Vec::new())
        }
        fn sweep(&mut self, _: &VmRef, _: &[PathBuf]) -> Result<Swept, HypervisorError> {
            self.note("sweep", Swept::default())
        }
    }

    /// The mover lives and beats, and yet does nothing about a session it was
    /// told is lost: as when all its other threads hang in a dead repository.
    #[test]
    fn a_lost_session_is_ended_although_the_mover_only_beats() {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (lifeline, cutter) = UnixStream::pair().unwrap();
        let noted = Arc::clone(&asked);
        let guard_thread = std::thread::spawn(move || {
            serve(theirs, cutter, &move |_| {
                Ok(Box::new(Broken(Arc::clone(&noted))))
            });
        });
        let guard = Guard::connect(ours, lifeline, "test:///", &std::env::temp_dir()).unwrap();
        let repo = RepoId::from_bytes([1; 16]);
        let order = BeginOrder {
            vm: guard.find("web01").unwrap(),
            session: SessionId::random(),
            disks: Vec::new(),
            new_mark: Some(highwater_hypervisor::NewMark {
                name: MarkName::new(repo, PointId::new(Timestamp::from_unix_ms(1))),
                nonce: Nonce::random(),
                disks: vec!["vda".to_owned()],
            }),
            quiesce: Quiesce::Off,
            freeze_mountpoints: Vec::new(),
            socket_dir: PathBuf::from("/nowhere"),
            scratch_dir: PathBuf::from("/nowhere"),
        };
        guard.begin(&order).unwrap();
        // Ends only when the guard gives the session up by itself.
        guard_thread.join().unwrap();
        assert_eq!(*asked.lock().unwrap(), ["find", "begin", "end", "mark"]);
        assert!(
            guard.committing().is_err(),
            "a session that was ended must not commit"
        );
    }

    /// Whoever does not hold the lock cannot know that a session is dead.
    #[test]
    fn directories_are_cleared_only_under_the_lock_of_their_vm() {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (lifeline, cutter) = UnixStream::pair().unwrap();
        let noted = Arc::clone(&asked);
        std::thread::spawn(move || {
            serve(theirs, cutter, &move |_| {
                Ok(Box::new(Broken(Arc::clone(&noted))))
            });
        });
        let guard = Guard::connect(ours, lifeline, "test:///", dir.path()).unwrap();
        let (web01, web02) = (guard.find("web01").unwrap(), guard.find("web02").unwrap());
        assert!(guard.sweep(&web01, &[]).is_err());
        guard.lock(&web02).unwrap();
        assert!(guard.sweep(&web01, &[]).is_err());
        guard.lock(&web01).unwrap();
        guard.sweep(&web01, &[]).unwrap();
        assert_eq!(*asked.lock().unwrap(), ["find", "find", "sweep"]);
        let holder = guard.lock_holder(&web01).unwrap();
        assert_eq!(holder.unwrap().process, Some(std::process::id()));
        assert_eq!(guard.lock_holder(&web02).unwrap(), None);
    }
}
