//! SIGINT, SIGTERM and SIGHUP: end cleanly; asked again or after a while, at once.
//!
//! A terminal sends its signals to front and mover, `kill` to one of them. The
//! front passes on what it gets, so that one wish may come twice: what counts is
//! whoever of the two was asked more often. `timeout` signals its child and then
//! the whole group, a closing terminal sends SIGHUP twice, systemd SIGTERM and
//! SIGHUP: what comes together is one wish, too.
//!
//! A signal that was ignored when we were started stays so: that is all that
//! `nohup` does.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use highwater_engine::Cancel;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::cut_short::{self, Why};
use crate::dying::has_signal;
use crate::terminal;

/// How long a clean end may take. A repository that hangs would hold us for
/// ever; the guard settles at the VM whether we end cleanly or not, and it is
/// to be done ten seconds after the signal.
const GRACE: Duration = Duration::from_secs(5);

/// The mask of ignored signals in `/proc/PID/status`.
const IGNORED: &str = "SigIgn";

/// Signals within this time are one wish.
const TOGETHER: Duration = Duration::from_millis(300);

static CANCEL: OnceLock<Cancel> = OnceLock::new();
/// How often we were asked ourselves.
static DIRECT: AtomicU32 = AtomicU32::new(0);
/// How often the front was.
static RELAYED: AtomicU32 = AtomicU32::new(0);

/// Returns a flag that the first signal raises.
pub(crate) fn cancel_on_signals() -> Cancel {
    let cancel = CANCEL.get_or_init(Cancel::default).clone();
    // Without handlers the default action ends us; the guard settles then, too.
    if let Ok(mut signals) = Signals::new(heeded()) {
        let handle = signals.handle();
        let listening = thread::Builder::new().spawn(move || {
            let mut wishes = Wishes::default();
            for _ in signals.forever() {
                if wishes.note(Instant::now()) {
                    DIRECT.fetch_add(1, Ordering::SeqCst);
                    act();
                }
            }
        });
        if listening.is_err() {
            // Without a thread nobody acts on them; the front still does.
            handle.close();
        }
    }
    cancel
}

/// Returns the signals that ask us to end, without those that whoever started
/// us had ignored.
pub(crate) fn heeded() -> Vec<i32> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mut all = vec![SIGINT, SIGTERM, SIGHUP];
    all.retain(|signal| !has_signal(&status, IGNORED, *signal));
    all
}

/// Counts wishes for the end.
#[derive(Debug, Default)]
pub(crate) struct Wishes {
    times: u32,
    last: Option<Instant>,
}

impl Wishes {
    /// Notes a signal; returns whether it is a wish of its own.
    pub(crate) fn note(&mut self, now: Instant) -> bool {
        let together = self
            .last
            .is_some_and(|last| now.duration_since(last) < TOGETHER);
        if !together {
            self.times = self.times.saturating_add(1);
            self.last = Some(now);
        }
        !together
    }

    /// How many there were.
    pub(crate) const fn times(&self) -> u32 {
        self.times
    }
}

/// The front was sent a signal.
pub(crate) fn relayed() {
    RELAYED.fetch_add(1, Ordering::SeqCst);
    act();
}

/// The front was killed: nobody waits for what we do any more, and nobody but us
/// could do anything if the guard died.
pub(crate) fn front_gone() {
    RELAYED.fetch_max(1, Ordering::SeqCst);
    act();
}

/// Returns whether the user wants us to end.
pub(crate) fn is_asked() -> bool {
    times_asked() > 0
}

fn times_asked() -> u32 {
    wishes(
        DIRECT.load(Ordering::SeqCst),
        RELAYED.load(Ordering::SeqCst),
    )
}

/// How often somebody wished for the end, by what both processes have got.
fn wishes(direct: u32, relayed: u32) -> u32 {
    direct.max(relayed)
}

fn act() {
    let Some(cancel) = CANCEL.get() else {
        // Nothing is under way that would have to be ended.
        cut_short::end(Why::Asked);
    };
    // Nothing has begun while a question waits for an answer.
    if times_asked() > 1 || terminal::is_asking() {
        // Others may have to be heard while this one waits for the guard.
        let ending = thread::Builder::new().spawn(|| cut_short::end(Why::Asked));
        if ending.is_err() {
            cut_short::end(Why::Asked);
        }
    } else if !cancel.is_raised() {
        cancel.raise();
        // Without a thread the front sees to it that this takes no longer.
        drop(thread::Builder::new().spawn(|| {
            thread::sleep(GRACE);
            cut_short::end(Why::Asked);
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_that_both_processes_get_is_one_wish() {
        for (direct, relayed, expected) in [(0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1), (2, 2, 2)] {
            assert_eq!(wishes(direct, relayed), expected);
        }
        // Asked twice, whoever got both.
        assert_eq!((wishes(0, 2), wishes(2, 1)), (2, 2));
    }

    #[test]
    fn signals_that_come_together_are_one_wish() {
        let mut wishes = Wishes::default();
        let begin = Instant::now();
        let noted = [0, 5, 299, 300, 310, 2_000]
            .map(|millis| wishes.note(begin + Duration::from_millis(millis)));
        assert_eq!(noted, [true, false, false, true, false, true]);
        assert_eq!(wishes.times(), 3);
    }

    #[test]
    fn an_ignored_signal_is_told_from_one_that_is_not() {
        let status = "SigBlk:\t0000000000000001\nSigIgn:\t0000000000001001\nSigCgt:\tff\n";
        let ignored = [SIGHUP, SIGINT, SIGTERM].map(|signal| has_signal(status, IGNORED, signal));
        assert_eq!(ignored, [true, false, false]);
        assert!(!has_signal("", IGNORED, SIGHUP));
    }
}
