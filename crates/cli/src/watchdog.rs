//! Gives a repository up that does not answer any more.
//!
//! A call into a dead network file system may never return, and nothing but
//! another thread can see it. To tell *dead* from *slow* the file system is asked
//! for its size beside (`statfs`): one that needs half a minute for a sync
//! answers that at once, a dead server answers nothing. Each question is asked
//! by a thread of its own, which may never come back either.
//!
//! Where questions are answered a single call may take as long as it likes while
//! others come back: much is synced at once, and over a thin line that takes
//! minutes.
//!
//! A file system on a disk answers from memory though the disk is dead. There the
//! kernel tells whether the disk still completes requests.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use highwater_store::{Calls, Waited};

use crate::cut_short::{self, Why};
use crate::disk_below::{DiskBelow, Requests};
use crate::doing::{self, Doing};
use crate::signals;

/// How often calls are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// A call of this age is reason enough to ask the file system.
const ASK_AFTER: Duration = Duration::from_millis(500);
/// A question after one that was answered.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// Calls and questions that nobody has answered for so long never will be, while
/// a session is at the VM: it is to be free within ten seconds, and on a busy
/// machine its guard needs four of them.
const HANGS_AFTER_AT_VM: Duration = Duration::from_secs(5);
/// The same when the user waits for the end.
const HANGS_AFTER_SIGNAL: Duration = Duration::from_secs(2);
/// The same when nobody waits but the command itself: a server that restarts is
/// back by then, and one that is dead should be told of.
const HANGS_AFTER: Duration = Duration::from_mins(1);
/// A disk that has requests and completes none for so long is dead. The kernel
/// gives a request 30 s (`SD_TIMEOUT`) and a flush 60 s (`SD_FLUSH_TIMEOUT`),
/// and tries again for a while.
const DISK_HANGS_AFTER: Duration = Duration::from_secs(90);
/// How long no call may come back where questions are answered. Six packs of
/// 32 MiB that are synced together over 10 Mbit/s take less than three minutes;
/// a file system that is repaired or frozen meanwhile may take many.
const STUCK_AFTER: Duration = Duration::from_mins(20);
/// A look that comes so late tells that this process was stopped, and what was
/// not answered meanwhile says nothing.
const SLEPT: Duration = Duration::from_secs(2);

/// Ends the process when calls into the repository in this directory hang.
pub(crate) fn watch(calls: Arc<Calls>, directory: PathBuf) {
    std::thread::spawn(move || {
        let mut watch = Watch::new(Instant::now());
        let mut asked: Option<Receiver<Option<DiskBelow>>> = None;
        let mut below = None;
        loop {
            std::thread::sleep(LOOK_EVERY);
            let now = Instant::now();
            match asked.as_ref().map(Receiver::try_recv) {
                None | Some(Err(TryRecvError::Empty)) => {}
                Some(answer) => {
                    below = answer.ok().flatten();
                    asked = None;
                    watch.answered(now);
                }
            }
            watch.requests(now, below.as_ref().and_then(DiskBelow::requests));
            match watch.look(now, calls.waited(), patience()) {
                Next::Nothing => {}
                Next::Ask => asked = Some(ask(&directory)),
                // That it hangs is why the end was not clean; it was wished for.
                Next::Hangs(_) | Next::Stuck(_) if signals::is_asked() => {
                    cut_short::end(Why::Asked)
                }
                Next::Hangs(since) => cut_short::end(Why::Hangs {
                    repository: directory.display().to_string(),
                    since,
                }),
                Next::Stuck(since) => cut_short::end(Why::Stuck {
                    repository: directory.display().to_string(),
                    since,
                }),
            }
        }
    });
}

/// Returns how long nobody may answer anything.
fn patience() -> Duration {
    match doing::now() {
        _ if signals::is_asked() => HANGS_AFTER_SIGNAL,
        Doing::Session { .. } | Doing::Committing { .. } => HANGS_AFTER_AT_VM,
        Doing::Other | Doing::Backup { .. } | Doing::Committed { .. } => HANGS_AFTER,
    }
}

/// Asks the file system something that is no work for it, and on which disk it is.
fn ask(directory: &Path) -> Receiver<Option<DiskBelow>> {
    let (answer, answered) = channel();
    let directory = directory.to_owned();
    std::thread::spawn(move || {
        // An error is an answer as well.
        let _ = rustix::fs::statvfs(&directory);
        drop(answer.send(DiskBelow::of(&directory)));
    });
    answered
}

/// What is to be done after a look.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    Nothing,
    Ask,
    Hangs(Duration),
    Stuck(Duration),
}

/// What is known from one look to the next.
struct Watch {
    looked: Instant,
    /// Nothing before this counts.
    awake: Instant,
    /// Since when a question has not been answered.
    asked: Option<Instant>,
    answered: Option<Instant>,
    requests: Option<Requests>,
    /// Since when the disk has had requests and has completed none.
    still: Option<Instant>,
}

impl Watch {
    const fn new(now: Instant) -> Self {
        Self {
            looked: now,
            awake: now,
            asked: None,
            answered: None,
            requests: None,
            still: None,
        }
    }

    /// Notes what the disk below has done so far.
    fn requests(&mut self, now: Instant, requests: Option<Requests>) {
        let is_still = requests.is_some_and(|it| it.under_way) && requests == self.requests;
        self.still = is_still.then(|| self.still.unwrap_or(now));
        self.requests = requests;
    }

    const fn answered(&mut self, now: Instant) {
        self.asked = None;
        self.answered = Some(now);
    }

    fn look(&mut self, now: Instant, waited: Option<Waited>, limit: Duration) -> Next {
        if now.duration_since(self.looked) > SLEPT {
            self.awake = now;
        }
        self.looked = now;
        let awake = now.duration_since(self.awake);
        let (call, nothing) = waited.map_or_else(Default::default, |waited| {
            (waited.oldest.min(awake), waited.silent.min(awake))
        });
        let silent = self.asked.map(|asked| now.duration_since(asked).min(awake));
        let still = self.still.map(|since| now.duration_since(since).min(awake));
        if call >= DISK_HANGS_AFTER && still.is_some_and(|still| still >= DISK_HANGS_AFTER) {
            return Next::Hangs(call);
        }
        if nothing >= STUCK_AFTER {
            return Next::Stuck(call);
        }
        match silent {
            Some(silent) if call >= limit && silent >= limit => Next::Hangs(call),
            Some(_) => Next::Nothing,
            None => self.ask_if_due(now, call),
        }
    }

    fn ask_if_due(&mut self, now: Instant, call: Duration) -> Next {
        let is_soon = |answered: Instant| now.duration_since(answered) < ASK_EVERY;
        if call < ASK_AFTER || self.answered.is_some_and(is_soon) {
            return Next::Nothing;
        }
        self.asked = Some(now);
        Next::Ask
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A call that began so long ago, beside others the last of which came back
    /// so long ago.
    const fn waited(oldest: Duration, silent: Duration) -> Waited {
        Waited { oldest, silent }
    }

    /// Looks for so many seconds at a call that began with the first look;
    /// `answers` says whether questions are answered at a second. Returns when
    /// it was given up, in milliseconds, and how.
    fn given_up(
        seconds: u32,
        limit: Duration,
        answers: impl Fn(Duration) -> bool,
    ) -> Option<(u128, Next)> {
        let began = Instant::now();
        let mut watch = Watch::new(began);
        for look in 1..=seconds * 4 {
            let age = LOOK_EVERY * look;
            let now = began + age;
            if watch.asked.is_some() && answers(age) {
                watch.answered(now);
            }
            match watch.look(now, Some(waited(age, age)), limit) {
                Next::Nothing | Next::Ask => {}
                verdict => return Some((age.as_millis(), verdict)),
            }
        }
        None
    }

    #[test]
    fn what_answers_nothing_is_given_up_in_time_to_tidy_up() {
        let (at, verdict) = given_up(60, HANGS_AFTER_AT_VM, |_| false).unwrap();
        assert!(matches!(verdict, Next::Hangs(_)), "{verdict:?}");
        assert!((5_000..6_500).contains(&at), "{at} ms");
        let (at, _) = given_up(60, HANGS_AFTER_SIGNAL, |_| false).unwrap();
        assert!((2_000..3_000).contains(&at), "{at} ms");
        let (at, _) = given_up(70, HANGS_AFTER, |_| false).unwrap();
        assert!((60_000..61_500).contains(&at), "{at} ms");
    }

    #[test]
    fn what_is_slow_but_answers_is_waited_for() {
        assert_eq!(given_up(1_199, HANGS_AFTER_AT_VM, |_| true), None);
        // Also when the user wants to stop: other patience ends that.
        assert_eq!(given_up(30, HANGS_AFTER_SIGNAL, |_| true), None);
        let (at, verdict) = given_up(2_000, HANGS_AFTER, |_| true).unwrap();
        assert!(matches!(verdict, Next::Stuck(_)), "{verdict:?}");
        assert_eq!(at, 1_200_000);
        // It answers now and then.
        let now_and_then = |age: Duration| age.as_secs().is_multiple_of(4);
        assert_eq!(given_up(100, HANGS_AFTER_AT_VM, now_and_then), None);
    }

    #[test]
    fn a_call_may_take_hours_while_others_come_back() {
        let began = Instant::now();
        let mut watch = Watch::new(began);
        for second in 1..20_000 {
            let age = Duration::from_secs(second);
            watch.answered(began + age);
            // Each of the others takes a quarter of an hour.
            let silent = Duration::from_secs(second % 900);
            let next = watch.look(began + age, Some(waited(age, silent)), HANGS_AFTER_AT_VM);
            assert!(matches!(next, Next::Nothing | Next::Ask), "{next:?}");
        }
    }

    /// Looks at a call for some minutes at most; `completed` says how many
    /// requests a disk that always has one has completed by a second.
    fn given_up_on_disk(completed: impl Fn(u64) -> u64) -> Option<u64> {
        let began = Instant::now();
        let mut watch = Watch::new(began);
        (1..300).find(|&second| {
            let age = Duration::from_secs(second);
            let now = began + age;
            watch.answered(now);
            let requests = Requests {
                completed: completed(second),
                under_way: true,
            };
            watch.requests(now, Some(requests));
            let next = watch.look(now, Some(waited(age, age)), HANGS_AFTER_AT_VM);
            matches!(next, Next::Hangs(_))
        })
    }

    #[test]
    fn a_disk_that_completes_nothing_is_given_up_and_a_slow_one_is_not() {
        let at = given_up_on_disk(|_| 7).unwrap();
        assert!((90..93).contains(&at), "{at} s");
        assert_eq!(given_up_on_disk(|second| second / 60), None);
        // It worked until then.
        let at = given_up_on_disk(|second| second.min(150)).unwrap();
        assert!((240..243).contains(&at), "{at} s");
    }

    #[test]
    fn a_process_that_was_stopped_blames_nobody() {
        let began = Instant::now();
        let mut watch = Watch::new(began);
        let at = |seconds: u64| began + Duration::from_secs(seconds);
        let look = |watch: &mut Watch, seconds| {
            let age = Duration::from_secs(seconds);
            watch.look(at(seconds), Some(waited(age, age)), HANGS_AFTER_AT_VM)
        };
        assert_eq!(look(&mut watch, 1), Next::Ask);
        // An hour later neither the call nor the question has had its chance.
        assert_eq!(look(&mut watch, 3600), Next::Nothing);
        assert_eq!(look(&mut watch, 3601), Next::Nothing);
        for second in 3602..3605 {
            assert_eq!(look(&mut watch, second), Next::Nothing);
        }
        assert!(matches!(look(&mut watch, 3605), Next::Hangs(_)));
    }
}
