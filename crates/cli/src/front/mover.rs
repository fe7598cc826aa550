//! The mover's side of the front: what it tells, and how it ends.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use highwater_engine::{Heir, SessionEnds, Witness};
use highwater_hypervisor::BeginOrder;

use super::link::{Link, Said};
use super::settling::{self, Settling};
use crate::advice::{self, CliError};
use crate::cut_short::{self, CutShort, Why};
use crate::json::{self, OneOfSeveral};
use crate::{doing, guard_process, output, several, signals, sys, terminal};

/// The name under which the mover is started, before the number of its link.
pub(super) const NAME: &str = "highwater-mover:";
/// How long guards may take to end their sessions before the error is told.
const GUARDS_MAX: Duration = Duration::from_secs(3);
/// How long telling an error may take; nobody may be reading it.
const TELL_MAX: Duration = Duration::from_secs(1);

static LINK: OnceLock<Arc<Link>> = OnceLock::new();
/// The descriptors that came with this process, but for the link.
static LEFT_OPEN: OnceLock<Vec<RawFd>> = OnceLock::new();
static LEAVING: AtomicBool = AtomicBool::new(false);
static FRONT_GONE: AtomicBool = AtomicBool::new(false);
/// The sessions of which the front was told.
static SESSIONS: Mutex<Vec<Heir>> = Mutex::new(Vec::new());

/// Becomes the mover if this process was started as one.
pub(crate) fn begin() -> bool {
    let number = std::env::args_os()
        .next()
        .and_then(|name| name.to_str()?.strip_prefix(NAME)?.parse().ok());
    let Some(number) = number else {
        return false;
    };
    let mut left_open = sys::left_open();
    left_open.retain(|open| *open != number);
    let Ok(link) = sys::inherited(number) else {
        return false;
    };
    // Set once: a process becomes the mover once.
    drop(LEFT_OPEN.set(left_open));
    let link = Arc::new(Link::new(OwnedFd::from(link)));
    let listening = Arc::clone(&link);
    if LINK.set(link).is_err() {
        return false;
    }
    guard_process::tell(witness);
    cut_short::ends_by(cut_short_now);
    terminal::tells(tell_asks);
    // Without a thread the front cannot ask us to end, and kills us instead.
    drop(thread::Builder::new().spawn(move || {
        while listening.wait_for_signal() {
            signals::relayed();
        }
        FRONT_GONE.store(true, Ordering::SeqCst);
        signals::front_gone();
    }));
    true
}

/// Does the work in the process that was started, which could not start another.
/// It has handlers for signals already; a byte comes for each signal.
pub(super) fn alone(mut signals: UnixStream) {
    cut_short::ends_by(cut_short_now);
    drop(thread::Builder::new().spawn(move || {
        let mut byte = [0; 1];
        let mut wishes = signals::Wishes::default();
        while signals.read_exact(&mut byte).is_ok() {
            if wishes.note(Instant::now()) {
                signals::relayed();
            }
        }
    }));
}

/// Tells whether something is being asked at the terminal.
fn tell_asks(is_asking: bool) {
    if let Some(link) = LINK.get() {
        // A front that is gone puts nothing back; we do what we can then.
        drop(link.say(&Said::Asks { is_asking }, None));
    }
}

/// Returns who is to be told of sessions.
fn witness() -> Option<Box<dyn Witness>> {
    let link = LINK.get()?;
    Some(Box::new(Front(Arc::clone(link))))
}

/// The front, as the engine knows it.
#[derive(Debug)]
struct Front(Arc<Link>);

impl Witness for Front {
    fn begins(&self, order: &BeginOrder, ends: SessionEnds) -> io::Result<()> {
        let said = Said::Begins {
            order: Box::new(order.clone()),
            connect: ends.connect.clone(),
        };
        self.0.say(&said, Some(&ends))?;
        sessions().push(Heir::new(order.clone(), ends));
        Ok(())
    }

    fn commits(&self, order: &BeginOrder) -> io::Result<()> {
        let session = order.session;
        let mut sessions = sessions();
        for heir in sessions
            .iter_mut()
            .filter(|it| it.order().session == session)
        {
            heir.commits();
        }
        self.0.say(&Said::Commits { session }, None)
    }

    fn ended(&self, order: &BeginOrder) {
        let session = order.session;
        sessions().retain(|heir| heir.order().session != session);
        // A front that is gone will not settle anything.
        drop(self.0.say(&Said::Ended { session }, None));
    }
}

/// Ends the process with a code.
pub(crate) fn leave(code: u8) -> ! {
    claim();
    finish(code)
}

/// Ends the process although its threads may hang: the sessions are left to
/// their guards, the error is told, and the front knows the exit code.
fn cut_short_now(why: Why) -> ! {
    claim();
    let mut untidy = !guard_process::part(GUARDS_MAX);
    if FRONT_GONE.load(Ordering::SeqCst) {
        // With the guard gone as well there is nobody else; where it lives it
        // was quicker.
        let left = std::mem::take(&mut *sessions());
        let mut settling: Vec<Settling> = left.into_iter().map(Settling::begin).collect();
        let warnings = settling::wait_for(&mut settling);
        untidy = !warnings.is_empty();
        for warning in &warnings {
            output::warn(warning);
        }
    }
    terminal::put_back();
    let cut = CutShort {
        why,
        doing: doing::now(),
        untidy,
    };
    let code = if cut.is_asked() {
        advice::INTERRUPTED
    } else {
        advice::FAILED
    };
    let (so_far, code) = match several::end() {
        Some(mut so_far) => {
            so_far.codes.push(code);
            let code = several::code_of_all(&so_far.codes);
            (Some(so_far.results), code)
        }
        None => (None, code),
    };
    // For the thread, or for us where there is none.
    let so_far = Arc::new(Mutex::new(so_far));
    let (told, wait) = channel();
    let (copy, shared) = (cut.clone(), Arc::clone(&so_far));
    let telling = thread::Builder::new().spawn(move || {
        tell(copy, &shared, code);
        let _ = told.send(());
    });
    if telling.is_err() {
        tell(cut, &so_far, code);
    }
    // Whether it was told or not, there is nothing more to wait for.
    let _ = wait.recv_timeout(TELL_MAX);
    finish(code)
}

/// Tells why it was cut short; with several VMs also what came of the others.
fn tell(cut: CutShort, so_far: &Mutex<Option<Vec<OneOfSeveral>>>, code: u8) {
    let vm = cut.doing.vm().map(str::to_owned);
    let error = CliError::CutShort(cut);
    let advice = advice::advise(&error);
    let so_far = so_far.lock().unwrap_or_else(PoisonError::into_inner).take();
    let as_json = output::wants_json();
    match so_far {
        Some(mut results) if as_json && !output::prints_events() => {
            output::print_error(&error, &advice, false);
            let failure = json::Failure::new(vm.as_deref(), &error.chain(), &advice);
            results.push(OneOfSeveral::Failed(failure));
            drop(output::document(&json::Backups::new(results)));
        }
        Some(_) | None => output::print_error(&error, &advice, as_json),
    }
    output::end_of_events(code);
}

fn sessions() -> MutexGuard<'static, Vec<Heir>> {
    SESSIONS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One thread ends the process. Another that wants to as well waits for that.
fn claim() {
    if LEAVING.swap(true, Ordering::SeqCst) {
        loop {
            thread::park();
        }
    }
}

#[expect(
    clippy::exit,
    reason = "a call into a dead repository may hold the main thread for ever"
)]
fn finish(code: u8) -> ! {
    drop(io::stdout().flush());
    if let Some(link) = LINK.get() {
        // The process may be unable to end, and then its descriptors stay open:
        // whoever reads our output must see its end nevertheless.
        if let Ok(null) = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
        {
            let _ = rustix::stdio::dup2_stdout(&null);
            let _ = rustix::stdio::dup2_stderr(&null);
            sys::give_up(LEFT_OPEN.get().map_or(&[], Vec::as_slice), &null);
        }
        drop(link.say(&Said::Done { code }, None));
    }
    std::process::exit(i32::from(code))
}
