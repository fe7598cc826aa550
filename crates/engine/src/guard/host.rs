//! The guard's side: serves the mover, and settles when the mover is gone.
//!
//! ```text
//!              Begin              Committing            Finish
//!   idle ─────────────► reading ─────────────► committing ──────► idle
//!                          │ mover gone,            │ mover gone,
//!                          ▼ session broken         ▼ session broken
//!              end the job, remove           end the job, keep both
//!              the unfinished mark           marks: the manifest decides
//! ```
//!
//! A broken session is ended before the mover has had its say: a guest that a
//! full scratch file stopped waits for that, and the mover may hang.

use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use highwater_hypervisor::{
    BeginOrder, Begun, Driver, Ended, ErrorKind, HypervisorError, MarkOrder, VmRef,
};

use highwater_model::step::{Step, pass, patience};
use rustix::event::{PollFd, PollFlags};

use super::claims::{self, Patience};
use super::hold::{self, Hold};
use super::lifeline::Cutter;
use super::wire::{Answer, Message, Outcome, Reply, Request, receive, send};

/// A mover that was silent for this long is stopped or dead to us. The mover
/// beats every second, and a machine under heavy swap may miss a few; but the
/// VM has to be free ten seconds after the mover's death, however it died, and
/// ending a job takes one or two.
const SILENCE_MAX: Duration = Duration::from_secs(7);
/// A mover that knows that its session broke, and does not end its part of it
/// within this time, hangs (in a repository that does not answer). The VM's
/// lock must not wait for it.
const LOST_PATIENCE: Duration = Duration::from_secs(10);
/// How often a running session is looked at, if nothing is heard of it.
const CHECK_EVERY: Duration = Duration::from_secs(1);
/// How often it is asked whether something was heard.
const LISTEN_EVERY: Duration = Duration::from_millis(50);
/// How long a daemon may be away while a session runs: QEMU serves on, and a
/// restart takes seconds.
const AWAY_PATIENCE: Duration = Duration::from_secs(20);
/// How long a daemon that is away is waited for to end a session, job and mark
/// together. The mover waits two minutes for a reply, and then takes the guard
/// for dead.
const END_PATIENCE: Duration = Duration::from_mins(1);
const END_INTERVAL: Duration = Duration::from_millis(200);

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
        hold: None,
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
    hold: Option<Hold>,
    session: Option<Session>,
}

struct Session {
    order: BeginOrder,
    /// Others may write to what is read: see [`Begun::reads_images`].
    reads_images: bool,
    committing: bool,
    /// Since when the daemon has been away.
    away: Option<Instant>,
    broken: Option<Broken>,
}

/// A session that broke, and was ended for it.
struct Broken {
    /// Since when the mover has known.
    since: Instant,
    error: HypervisorError,
    /// How it was ended.
    outcome: Outcome,
    ended: Ended,
}

impl Session {
    fn new(order: BeginOrder, begun: &Begun) -> Self {
        Self {
            order,
            reads_images: begun.reads_images,
            committing: false,
            away: None,
            broken: None,
        }
    }

    /// What it comes to if the mover says nothing more.
    const fn outcome(&self) -> Outcome {
        if self.committing {
            Outcome::Unknown
        } else {
            Outcome::Failed
        }
    }
}

impl Host {
    fn run(&mut self, requests: &Receiver<Message>, connect: &Connect) {
        let mut heard = Instant::now();
        let mut checked = Instant::now();
        loop {
            let wait = if self.session.is_some() {
                LISTEN_EVERY
            } else {
                CHECK_EVERY
            };
            match requests.recv_timeout(wait) {
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
                self.tell_silence();
                return;
            }
            if self
                .lost_since()
                .is_some_and(|since| since.elapsed() > LOST_PATIENCE)
            {
                return;
            }
            if checked.elapsed() >= CHECK_EVERY || self.is_alarmed() {
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
                self.hold = None;
                let lock_dir = self.lock_dir.clone();
                let stream = self.stream.try_clone().map_err(|error| no_stream(&error))?;
                let wait = Duration::from_millis(wait_ms);
                let is_given_up = || is_gone(&stream);
                let patience = Patience::new(wait, &is_given_up);
                let taken = Hold::take(self.driver()?.as_mut(), &lock_dir, &vm, patience)?;
                self.hold = Some(taken);
                Ok(Reply::Done)
            }
            Request::Release => {
                if self.session.is_none() {
                    self.hold = None;
                }
                Ok(Reply::Done)
            }
            Request::Observe { vm } => self
                .driver()?
                .observe(&vm)
                .map(|facts| Reply::Facts(Box::new(facts))),
            Request::Begin { order } => {
                self.expect_claim(&order.vm)?;
                let begun = self.driver()?.begin(&order)?;
                self.session = Some(Session::new(*order, &begun));
                Ok(Reply::Begun(Box::new(begun)))
            }
            Request::Committing => {
                let session = self.session.as_mut().ok_or_else(no_session)?;
                if let Some(broken) = &session.broken {
                    return Err(broken.error.clone());
                }
                let (vm, id) = (session.order.vm.clone(), session.order.session);
                let reads_images = session.reads_images;
                // A successor has removed our mark, or is about to.
                self.driver()?.still_claimed(&vm)?;
                // All is read. An image that was written to before now may have
                // been read in parts from before and after; QEMU holds a point of
                // its own for a VM that runs.
                if reads_images && let Err(error) = self.driver()?.check(&vm, id) {
                    // As at any other time; the reply tells the mover, too.
                    drop(self.end_broken(error.clone()));
                    return Err(error);
                }
                if let Some(session) = &mut self.session {
                    session.committing = true;
                }
                pass(Step::CommitTold);
                Ok(Reply::Done)
            }
            Request::Finish { outcome } => {
                let session = self.session.take().ok_or_else(no_session)?;
                Ok(Reply::Ended(self.finish_session(session, outcome)))
            }
            Request::Settle { order, outcome } => Ok(Reply::Ended(self.finish(&order, outcome))),
            Request::EndLeftover { vm, session } => {
                self.expect_claim(&vm)?;
                self.driver()?.end_leftover(&vm, session).map(Reply::Ended)
            }
            Request::Mark { vm, order } => {
                // What is to be done to it was decided from what was there
                // before: an unfinished mark of a successor was not.
                self.driver()?.still_claimed(&vm)?;
                self.driver()?.mark(&vm, &order).map(|()| Reply::Done)
            }
            Request::LockHolder { vm } => {
                let lock_dir = self.lock_dir.clone();
                let holder = hold::holder(self.driver()?.as_mut(), &lock_dir, &vm)?;
                Ok(Reply::Holder(holder))
            }
            Request::Survey { vm } => self.driver()?.survey(&vm).map(Reply::Surroundings),
            Request::Leftovers { vm, places } => {
                self.driver()?.leftovers(&vm, &places).map(Reply::Leftovers)
            }
            Request::Sweep { vm, places } => {
                // Who does not hold the lock cannot know that a session is dead.
                self.expect_hold(&vm, "tidy up after sessions of")?;
                self.driver()?.sweep(&vm, &places).map(Reply::Swept)
            }
            Request::Wreckage { vm, of } => self.driver()?.wreckage(&vm, of).map(Reply::Wreckage),
            Request::ClearWreckage { vm, of } => {
                self.expect_hold(&vm, "remove another program's wreckage from")?;
                self.driver()?.clear_wreckage(&vm, of).map(Reply::Wreckage)
            }
            Request::StartPaused { vm } => {
                self.expect_hold(&vm, "start")?;
                self.driver()?.start_paused(&vm).map(|()| Reply::Done)
            }
            Request::StopIfStarted { vm } => {
                self.expect_hold(&vm, "shut off")?;
                self.driver()?.stop_if_started(&vm).map(Reply::Stopped)
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

    /// Fails unless the VM's lock was taken, and it is ours alone.
    fn expect_hold(&mut self, vm: &VmRef, what: &str) -> Result<(), HypervisorError> {
        if self.hold.as_ref().is_none_or(|hold| hold.vm != *vm) {
            return Err(HypervisorError::new(
                ErrorKind::Other,
                format!("cannot {what} VM `{}`", vm.name),
            )
            .because("its lock was not taken"));
        }
        self.expect_claim(vm)
    }

    /// Fails unless the VM is ours alone.
    fn expect_claim(&mut self, vm: &VmRef) -> Result<(), HypervisorError> {
        if let (Some(hold), Some(driver)) = (&mut self.hold, &mut self.driver) {
            hold.complete(driver.as_mut(), &|| is_gone(&self.stream))?;
        }
        self.driver()?.still_claimed(vm)
    }

    /// Ends the session, if that was not done when it broke.
    fn finish_session(&mut self, session: Session, outcome: Outcome) -> Ended {
        match session.broken {
            None => self.finish(&session.order, outcome),
            Some(broken) if broken.outcome == outcome || session.reads_images => broken.ended,
            // Nobody knew then; the mover does.
            Some(mut broken) => {
                let rest = self.finish(&session.order, outcome);
                broken.ended.warnings.extend(rest.warnings);
                broken.ended
            }
        }
    }

    /// Ends the session at the VM. Trouble here is a warning: the next run
    /// repairs it.
    fn finish(&mut self, order: &BeginOrder, outcome: Outcome) -> Ended {
        let Some(driver) = &mut self.driver else {
            return Ended::default();
        };
        // QEMU waits for whoever does not read.
        let until = Instant::now() + patience(END_PATIENCE);
        let ending = self
            .cutter
            .cut_while(|| while_away(until, || driver.end(order)));
        let mut ended = ending.unwrap_or_else(|error| Ended {
            ended_job: false,
            warnings: vec![one_line(&error)],
        });
        match (outcome, &order.new_mark) {
            (Outcome::Failed, Some(mark)) => {
                // Every mark records on its own since its creation, so giving
                // up the new one loses nothing: the old one goes on.
                let removal = MarkOrder::Remove(mark.name.clone());
                if let Err(error) = while_away(until, || driver.mark(&order.vm, &removal)) {
                    ended.warnings.push(one_line(&error));
                }
            }
            (Outcome::Failed | Outcome::Committed | Outcome::Unknown, _) => {}
        }
        ended
    }

    /// Leaves word for a mover that was stopped and may wake.
    fn tell_silence(&mut self) {
        let Some(session) = &self.session else { return };
        if session.broken.is_some() {
            return;
        }
        let because = format!(
            "the process that copies was stopped, or hung, for more than {} s",
            SILENCE_MAX.as_secs()
        );
        let order = &session.order;
        let error = HypervisorError::session_lost(&order.vm, order.session, because)
            .hint("a suspended backup holds its VM: let it run to its end");
        // It may be dead.
        drop(send(&mut self.stream, &Answer::Lost { error }));
    }

    fn lost_since(&self) -> Option<Instant> {
        let broken = self.session.as_ref()?.broken.as_ref()?;
        Some(broken.since)
    }

    fn is_alarmed(&mut self) -> bool {
        match (&self.session, &mut self.driver) {
            (Some(session), Some(driver)) if session.broken.is_none() => {
                driver.is_alarmed(session.order.session)
            }
            _ => false,
        }
    }

    fn tell_if_lost(&mut self) -> std::io::Result<()> {
        let (Some(session), Some(driver)) = (&mut self.session, &mut self.driver) else {
            return Ok(());
        };
        if session.broken.is_some() {
            return Ok(());
        }
        let vm = &session.order.vm;
        let checked = if self.hold.as_ref().is_some_and(Hold::is_lost) {
            Err(claims::lost(vm))
        } else {
            driver.check(vm, session.order.session)
        };
        let error = match checked {
            Ok(()) => {
                session.away = None;
                return Ok(());
            }
            Err(error) => error,
        };
        let away = *session.away.get_or_insert_with(Instant::now);
        if error.kind == ErrorKind::Unreachable && away.elapsed() < AWAY_PATIENCE {
            return Ok(());
        }
        self.end_broken(error)
    }

    /// Tells the mover that its session broke, and ends it.
    fn end_broken(&mut self, error: HypervisorError) -> std::io::Result<()> {
        let Some(mut session) = self.session.take() else {
            return Ok(());
        };
        // First, so that the mover knows why its connections end.
        let lost = Answer::Lost {
            error: error.clone(),
        };
        let told = send(&mut self.stream, &lost);
        // Somebody starts the VM: to take the mark out now would lock its images in
        // the very moment in which QEMU opens them.
        let outcome = if session.reads_images {
            Outcome::Unknown
        } else {
            session.outcome()
        };
        let mut ended = self.finish(&session.order, outcome);
        if let (true, Some(mark)) = (session.reads_images, &session.order.new_mark) {
            ended.warnings.push(format!(
                "mark {} stays in the images for now; the next backup removes it",
                mark.name
            ));
        }
        session.broken = Some(Broken {
            since: Instant::now(),
            error,
            outcome,
            ended,
        });
        self.session = Some(session);
        told
    }

    /// The mover is gone: leaves the VM as if it had never begun, unless the
    /// manifest may exist.
    fn abandon(&mut self) {
        if let Some(session) = self.session.take() {
            let outcome = session.outcome();
            self.finish_session(session, outcome);
        }
    }
}

/// Does something at a daemon that may just be restarting.
fn while_away<T>(
    until: Instant,
    mut work: impl FnMut() -> Result<T, HypervisorError>,
) -> Result<T, HypervisorError> {
    loop {
        match work() {
            Err(error) if error.kind == ErrorKind::Unreachable && Instant::now() < until => {
                std::thread::sleep(END_INTERVAL);
            }
            done => return done,
        }
    }
}

/// Returns whether the other end of a stream is closed.
fn is_gone(stream: &UnixStream) -> bool {
    let mut looked = [PollFd::new(stream, PollFlags::empty())];
    let now = rustix::event::Timespec::default();
    let found = rustix::event::poll(&mut looked, Some(&now));
    found.is_ok_and(|found| found > 0)
}

fn no_stream(source: &std::io::Error) -> HypervisorError {
    HypervisorError::new(ErrorKind::Other, "cannot watch the process that copies")
        .because(source.to_string())
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
mod tests;
