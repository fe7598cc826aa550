//! The process that the user starts: it watches the one that does the work.
//!
//! ```text
//!   front ── starts ──► mover ── starts ──► guard
//!     ▲                   │ repository        │ VM
//!     └── sessions, exit code                 │
//!     └── starts another guard if both of them are gone, or one hangs
//! ```
//!
//! A process that waits for a dead file system cannot be killed, its exit never
//! completes, and its parent waits for ever. So the one whose exit code scripts
//! see, and that gets the signals, is another one: it reads arguments and
//! `/proc`, and no file of anybody else's. The mover is this very binary with
//! the same arguments, terminal and process group.

mod link;
pub(crate) mod mover;
mod settling;

use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use highwater_engine::{Heir, SessionEnds};
use highwater_model::SessionId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::advice::{self, CliError};
use crate::args::{Args, Command as Typed, JsonStyle};
use crate::cut_short::{CutShort, Why};
use crate::doing::Doing;
use crate::dying::is_dying;
use crate::output;
use crate::signals::{self, Wishes};
use crate::terminal::Terminal;
use link::{Heard, Link, Said};
use settling::Settling;

/// How long a mover that was asked to end may take. It allows itself less; one
/// that takes longer is stopped, or hangs.
///
/// Longer than the mover's own 5 s for a clean end, 3 s for its guards and 1 s
/// for telling: it is to have its say first.
const GRACE: Duration = Duration::from_secs(10);
/// The same when it was asked twice: it only waits for its guard, and tells.
const GRACE_AT_ONCE: Duration = Duration::from_secs(6);
/// So long before that it is parted from its guards: the VM is to be free, though
/// nobody may have said anything yet.
const PARTING_EARLIER: Duration = Duration::from_secs(3);
/// How long a mover may take to end when it has said that it is done, or was
/// killed. One whose files are on a dead file system never does.
const EXIT_MAX: Duration = Duration::from_secs(1);
/// How long a mover may take to replace a guard that died. One that is stopped,
/// or hangs, never does.
const REPLACE_MAX: Duration = Duration::from_secs(3);
/// How often the mover is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Whether a command needs a mover. The others touch neither repository nor VM.
pub(crate) const fn is_needed(command: &Typed) -> bool {
    !matches!(command, Typed::Completions(_) | Typed::Man(_))
}

/// Has the work done by a mover and returns its exit code.
/// `None` if none can be started, and nothing was done.
pub(crate) fn run(args: &Args) -> Option<u8> {
    let json = args.global.json_style;
    output::want_json(json.is_some());
    if json == Some(JsonStyle::Events) {
        output::print_events();
    }
    match Front::start() {
        Ok(mut front) => {
            let end = front.watch();
            Some(front.conclude(&end))
        }
        Err(signals) => {
            signals.into_iter().for_each(mover::alone);
            None
        }
    }
}

/// Tells what the mover cannot, or did not.
fn tell(error: &CliError) -> u8 {
    let advice = advice::advise(error);
    output::print_error(error, &advice, output::wants_json());
    output::end_of_events(advice.code);
    advice.code
}

/// How the mover ended.
enum End {
    /// With a code, and all was told.
    Code(u8),
    /// Killed, by a signal that is known or not.
    Killed(Option<i32>),
    /// It did not end though it was asked to.
    Overdue,
}

struct Front {
    mover: Child,
    pid: Pid,
    /// Old kernels have none; then it is looked at more seldom.
    pidfd: Option<OwnedFd>,
    link: Link,
    is_linked: bool,
    signals: UnixStream,
    wishes: Wishes,
    /// As it was before anything was asked there.
    terminal: Option<Terminal>,
    is_asking: bool,
    /// When the mover must have ended.
    end_by: Option<Instant>,
    /// What it said its exit code is, and since when.
    said: Option<(u8, Instant)>,
    dying: Option<Instant>,
    sessions: Vec<Session>,
    settling: Vec<Settling>,
}

/// A session that was told of.
struct Session {
    heir: Heir,
    /// Since when mover and guard have parted.
    parted: Option<Instant>,
}

impl Session {
    fn id(&self) -> SessionId {
        self.heir.order().session
    }

    fn doing(&self) -> Doing {
        let vm = self.heir.order().vm.name.clone();
        if self.heir.is_committing() {
            Doing::Committing { vm }
        } else {
            Doing::Session { vm }
        }
    }
}

impl Front {
    /// Starts a mover. Without one, returns where signals come from, if they do.
    fn start() -> Result<Self, Option<UnixStream>> {
        let signals = catch_signals().map_err(|_| None)?;
        let terminal = Terminal::look();
        let Ok((mover, link)) = start_mover() else {
            return Err(Some(signals));
        };
        // From here on nothing may fail: there is somebody to be watched.
        let never_waits = signals.set_nonblocking(true);
        debug_assert!(never_waits.is_ok(), "a socket can be told not to wait");
        let pid = Pid::from_child(&mover);
        Ok(Self {
            mover,
            pid,
            pidfd: pidfd_open(pid, PidfdFlags::empty()).ok(),
            link,
            is_linked: true,
            signals,
            wishes: Wishes::default(),
            terminal,
            is_asking: false,
            end_by: None,
            said: None,
            dying: None,
            sessions: Vec::new(),
            settling: Vec::new(),
        })
    }

    /// Watches until the mover has ended, or never will.
    fn watch(&mut self) -> End {
        loop {
            self.wait();
            self.pass_signals_on();
            // What it said comes before its end.
            let has_ended = self.mover.try_wait();
            self.hear();
            if let Ok(Some(status)) = has_ended {
                return self.end_of(status);
            }
            let now = Instant::now();
            let is_over = |since: Instant| now.duration_since(since) >= EXIT_MAX;
            if let Some((code, since)) = self.said
                && is_over(since)
            {
                return End::Code(code);
            }
            // One that has had its say ends soon, or is left behind.
            if let Some(end) = self.end_by.filter(|_| self.said.is_none()) {
                if now >= end {
                    return End::Overdue;
                }
                if now + PARTING_EARLIER >= end {
                    self.sessions.iter().for_each(|it| it.heir.part());
                }
            }
            if !is_dying(self.pid) {
                self.dying = None;
            } else if is_over(*self.dying.get_or_insert(now)) && self.said.is_none() {
                return End::Killed(None);
            }
            self.replace_guards(now);
        }
    }

    fn end_of(&self, status: ExitStatus) -> End {
        match (self.said, status.code(), status.signal()) {
            (Some((code, _)), ..) => End::Code(code),
            (None, Some(code), _) => End::Code(u8::try_from(code).unwrap_or(advice::FAILED)),
            (None, None, signal) => End::Killed(signal),
        }
    }

    /// Waits until something happens, but not for long.
    fn wait(&self) {
        let quick = self.said.is_some() || self.dying.is_some();
        let limit = if quick { LOOK_EVERY / 10 } else { LOOK_EVERY };
        let limit = Timespec::try_from(limit).unwrap_or_default();
        let mut polled = vec![PollFd::new(&self.signals, PollFlags::IN)];
        polled.extend(self.pidfd.iter().map(|it| PollFd::new(it, PollFlags::IN)));
        if self.is_linked {
            polled.push(PollFd::from_borrowed_fd(self.link.socket(), PollFlags::IN));
        }
        let live = self.sessions.iter().filter(|it| it.parted.is_none());
        let (guards, connections): (Vec<_>, Vec<_>) = live
            .map(|session| (session.heir.guard(), session.heir.connections()))
            .unzip();
        polled.extend(
            guards
                .iter()
                .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::empty())),
        );
        polled.extend(
            connections
                .iter()
                .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)),
        );
        // Interrupted by a signal: that is what it waits for.
        let _ = poll(&mut polled, Some(&limit));
    }

    fn pass_signals_on(&mut self) {
        let mut bytes = [0; 16];
        let now = Instant::now();
        // What waits there together came together, or we were stopped.
        if !self.signals.read(&mut bytes).is_ok_and(|count| count > 0) || !self.wishes.note(now) {
            return;
        }
        self.link.relay();
        let grace = if self.wishes.times() > 1 {
            GRACE_AT_ONCE
        } else {
            GRACE
        };
        let end = now + grace;
        self.end_by = Some(self.end_by.map_or(end, |before| before.min(end)));
    }

    /// Hears all that the mover has said.
    fn hear(&mut self) {
        while self.is_linked {
            match self.link.hear() {
                Heard::Message(said, descriptors) => self.note(said, descriptors),
                Heard::Nothing => break,
                Heard::End => self.is_linked = false,
            }
        }
        for session in &mut self.sessions {
            session.heir.take_connections();
        }
    }

    fn note(&mut self, said: Said, descriptors: Vec<OwnedFd>) {
        match said {
            Said::Begins { order, connect } => {
                if let Ok([guard, connections]) = <[OwnedFd; 2]>::try_from(descriptors) {
                    let ends = SessionEnds {
                        connect,
                        guard,
                        connections,
                    };
                    self.sessions.push(Session {
                        heir: Heir::new(*order, ends),
                        parted: None,
                    });
                }
            }
            Said::Commits { session } => {
                for it in self.sessions.iter_mut().filter(|it| it.id() == session) {
                    it.heir.commits();
                }
            }
            Said::Ended { session } => self.sessions.retain(|it| it.id() != session),
            Said::Asks { is_asking } => self.is_asking = is_asking,
            Said::Done { code } => self.said = Some((code, Instant::now())),
        }
    }

    /// Does for a mover that lives what it does not do itself.
    fn replace_guards(&mut self, now: Instant) {
        for session in &mut self.sessions {
            if session.parted.is_none() && session.heir.is_parted() {
                session.parted = Some(now);
            }
        }
        let is_due = |session: &mut Session| {
            session
                .parted
                .is_some_and(|since| now.duration_since(since) >= REPLACE_MAX)
        };
        for session in self.sessions.extract_if(.., is_due) {
            self.settling.push(Settling::begin(session.heir));
        }
    }

    /// Tidies up where nobody else does, and returns the exit code.
    fn conclude(&mut self, end: &End) -> u8 {
        if matches!(end, End::Overdue) {
            // It may be stopped, and must not go on later. Fails if it has ended.
            let _ = kill_process(self.pid, Signal::KILL);
        }
        self.sessions.iter().for_each(|it| it.heir.part());
        // Whoever has not said that it commits cannot any more.
        self.hear();
        if let Some(terminal) = self.terminal.as_ref().filter(|_| self.is_asking) {
            terminal.put_back();
        }
        // Those before it are only being tidied up.
        let doing = self.sessions.last().map_or(Doing::Other, Session::doing);
        let open = self.sessions.drain(..).map(|it| Settling::begin(it.heir));
        self.settling.extend(open.collect::<Vec<_>>());
        let untidy = settling::wait_for(&mut self.settling);
        for warning in &untidy {
            output::warn(warning);
        }
        let why = match *end {
            End::Code(code) => return code,
            _ if self.wishes.times() > 0 => Why::Asked,
            End::Killed(Some(SIGINT | SIGTERM | SIGHUP)) | End::Overdue => Why::Asked,
            End::Killed(signal) => Why::Killed { signal },
        };
        let untidy = !untidy.is_empty();
        tell(&CliError::CutShort(CutShort { why, doing, untidy }))
    }
}

/// Has a byte come for each signal, also for those before the mover exists.
fn catch_signals() -> io::Result<UnixStream> {
    let (signals, raised) = UnixStream::pair()?;
    for signal in signals::heeded() {
        signal_hook::low_level::pipe::register(signal, raised.try_clone()?)?;
    }
    Ok(signals)
}

fn start_mover() -> io::Result<(Child, Link)> {
    let (link, theirs) = Link::pair()?;
    // The one descriptor of ours that the mover gets.
    fcntl_setfd(&theirs, FdFlags::empty())?;
    let number = std::os::fd::AsRawFd::as_raw_fd(&theirs);
    let mover = Command::new("/proc/self/exe")
        .arg0(format!("{}{number}", mover::NAME))
        .args(std::env::args_os().skip(1))
        .spawn()?;
    Ok((mover, link))
}
