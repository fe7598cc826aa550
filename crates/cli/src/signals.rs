//! SIGINT, SIGTERM and SIGHUP: end cleanly; asked again or after a while, at once.
//!
//! A terminal sends its signals to front and mover, `kill` to one of them. The
//! front passes on what it gets, so that one wish may come twice: what counts is
//! whoever of the two was asked more often.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use highwater_engine::Cancel;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::cut_short::{self, Why};

/// How long a clean end may take. A repository that hangs would hold us for
/// ever; the guard settles at the VM whether we end cleanly or not, and it is
/// to be done ten seconds after the signal.
const GRACE: Duration = Duration::from_secs(5);

static CANCEL: OnceLock<Cancel> = OnceLock::new();
/// How often we were asked ourselves.
static DIRECT: AtomicU32 = AtomicU32::new(0);
/// How often the front was.
static RELAYED: AtomicU32 = AtomicU32::new(0);

/// Returns a flag that the first signal raises.
pub(crate) fn cancel_on_signals() -> Cancel {
    let cancel = CANCEL.get_or_init(Cancel::default).clone();
    // Without handlers the default action ends us; the guard settles then, too.
    if let Ok(mut signals) = Signals::new([SIGINT, SIGTERM, SIGHUP]) {
        std::thread::spawn(move || {
            for _ in signals.forever() {
                DIRECT.fetch_add(1, Ordering::SeqCst);
                act();
            }
        });
    }
    cancel
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
    if times_asked() > 1 {
        // Others may have to be heard while this one waits for the guard.
        std::thread::spawn(|| cut_short::end(Why::Asked));
    } else if !cancel.is_raised() {
        cancel.raise();
        std::thread::spawn(|| {
            std::thread::sleep(GRACE);
            cut_short::end(Why::Asked);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::wishes;

    #[test]
    fn a_signal_that_both_processes_get_is_one_wish() {
        for (direct, relayed, expected) in [(0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1), (2, 2, 2)] {
            assert_eq!(wishes(direct, relayed), expected);
        }
        // Asked twice, whoever got both.
        assert_eq!((wishes(0, 2), wishes(2, 1)), (2, 2));
    }
}
