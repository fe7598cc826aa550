//! The guard as a process: how it is started, and what it does.
//!
//! It is this very binary, started again with sockets as its stdin and stdout
//! and a name nobody types. It leaves our unix session at once, so that Ctrl-C at the
//! terminal ends the mover and never the one that tidies up.

use std::fs::File;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use highwater_drivers::libvirt::{LibvirtDriver, LibvirtOptions};
use highwater_drivers::offline::ImageDriver;
use highwater_drivers::qmp::QmpDriver;
use highwater_engine::{Guard, GuardError, Parting, Witness, serve};
use highwater_hypervisor::{Driver, ErrorKind, HypervisorError};
use highwater_model::SystemClock;
use rustix::fd::AsFd as _;
use rustix::process::{Pid, getppid};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::dying::is_dying;
use crate::{cgroup, env, secrets, settings, sys};

/// The name under which the guard is started.
const NAME: &str = "highwater-guard";

/// How often the mover is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// So many looks in a row: one that was killed and can end does so in no time.
const DYING_TIMES: u32 = 3;

/// The guards there are, and how to part from them.
static PARTINGS: Mutex<Vec<(Child, Parting)>> = Mutex::new(Vec::new());

/// Makes who is told of the sessions of a guard, in a process that has one.
static WITNESS: OnceLock<MakeWitness> = OnceLock::new();

/// Makes one for each guard; `None` where nobody watches.
type MakeWitness = fn() -> Option<Box<dyn Witness>>;

/// Has somebody told of the sessions of all guards from now on.
pub(crate) fn tell(witness: MakeWitness) {
    // The first one stays; there is one process that can be told.
    let _ = WITNESS.set(witness);
}

/// Starts a guard and connects it to a hypervisor.
pub(crate) fn start(uri: &str) -> Result<Guard, GuardError> {
    let (ours, theirs) = UnixStream::pair().map_err(|source| cannot_start(&source))?;
    let (lifeline, cutter) = UnixStream::pair().map_err(|source| cannot_start(&source))?;
    // The guard never opens the repository.
    secrets::keep_descriptor();
    let child = Command::new("/proc/self/exe")
        .arg0(NAME)
        .env_remove(env::PASSWORD)
        .env_remove(env::PASSWORD_COMMAND)
        .env_remove(env::PASSWORD_FD)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::from(OwnedFd::from(cutter)))
        .stderr(Stdio::null())
        .spawn()
        .map_err(|source| cannot_start(&source))?;
    let guard = Guard::connect(ours, lifeline, uri, &settings::runtime_dir())?;
    let mut partings = PARTINGS.lock().unwrap_or_else(PoisonError::into_inner);
    // One that has ended is waited for, or it would stay as a zombie.
    partings.retain_mut(|(child, parting)| {
        let has_ended = parting.is_over() && !matches!(child.try_wait(), Ok(None));
        !has_ended
    });
    partings.push((child, guard.parting()));
    drop(partings);
    Ok(match WITNESS.get().and_then(|witness| witness()) {
        Some(witness) => guard.witnessed_by(witness),
        None => guard,
    })
}

/// Has all guards end their sessions on their own, and waits for that a while;
/// returns whether all have ended.
pub(crate) fn part(limit: Duration) -> bool {
    let partings = PARTINGS.lock().unwrap_or_else(PoisonError::into_inner);
    partings.iter().for_each(|(_, parting)| parting.part());
    let end = Instant::now() + limit;
    let mut have_ended = true;
    for (_, parting) in partings.iter() {
        have_ended &= parting.wait(end.saturating_duration_since(Instant::now()));
    }
    have_ended
}

fn cannot_start(source: &std::io::Error) -> GuardError {
    HypervisorError::new(ErrorKind::Other, "cannot start the guard process")
        .because(source.to_string())
}

/// Returns whether this process was started as a guard.
pub(crate) fn is_wanted() -> bool {
    std::env::args_os().next().is_some_and(|name| name == NAME)
}

/// Is the guard, until its mover is gone.
pub(crate) fn run() -> ExitCode {
    // A script's lock must not be held by whoever tidies up after it.
    let left_open = sys::left_open();
    if let Ok(null) = File::open("/dev/null") {
        sys::give_up(&left_open, &null);
    }
    // Fails only if we lead a session already: then nobody's Ctrl-C reaches us.
    let _ = rustix::process::setsid();
    cgroup::leave();
    // Ends with its mover and for no other reason: whoever asks the whole
    // process group to end wants the VM tidied up.
    let ignored = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        if signal_hook::flag::register(signal, Arc::clone(&ignored)).is_err() {
            return ExitCode::FAILURE;
        }
    }
    let socket = std::io::stdin().as_fd().try_clone_to_owned();
    let lifeline = std::io::stdout().as_fd().try_clone_to_owned();
    let (Ok(socket), Ok(lifeline)) = (socket, lifeline) else {
        return ExitCode::FAILURE;
    };
    let socket = UnixStream::from(socket);
    if let (Some(mover), Ok(stream)) = (getppid(), socket.try_clone()) {
        // Without it a mover that cannot end is noticed later, by its silence.
        drop(std::thread::Builder::new().spawn(move || watch(mover, &stream)));
    }
    serve(socket, UnixStream::from(lifeline), &connect);
    ExitCode::SUCCESS
}

/// Parts from a mover that was killed and cannot end: its sockets stay open, and
/// that it is silent may have other reasons, which are waited for longer.
fn watch(mover: Pid, stream: &UnixStream) {
    let mut times = 0;
    while times < DYING_TIMES {
        std::thread::sleep(LOOK_EVERY);
        times = if is_dying(mover) { times + 1 } else { 0 };
    }
    // Fails if it has ended.
    drop(stream.shutdown(Shutdown::Both));
}

fn connect(uri: &str) -> Result<Box<dyn Driver>, HypervisorError> {
    match uri.split_once(':') {
        Some(("qmp", _)) => return Ok(Box::new(QmpDriver::connect(uri, Arc::new(SystemClock))?)),
        Some(("image", _)) => {
            return Ok(Box::new(ImageDriver::connect(uri, Arc::new(SystemClock))?));
        }
        _ => {}
    }
    let options = LibvirtOptions {
        user_config_dir: settings::user_config_dir(),
        ..LibvirtOptions::default()
    };
    let driver = LibvirtDriver::connect(uri, &options)?;
    Ok(Box::new(driver))
}
