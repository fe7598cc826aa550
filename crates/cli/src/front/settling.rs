//! Ends sessions beside everything else: whoever is asked may hang as well.

use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use highwater_engine::Heir;

use crate::{advice, guard_process};

/// For how long it is tried: libvirtd may be being restarted.
const TRY_MAX: Duration = Duration::from_secs(10);
const TRY_EVERY: Duration = Duration::from_millis(300);
/// One try may use all of that time up, when its guard gives up on libvirt.
const TRIES_MIN: u32 = 3;
/// How long the user waits for it in the end: longer than a guard waits for the
/// VM's lock (30 s) and then acts (20 s).
const WAIT_MAX: Duration = Duration::from_mins(1);

/// A session that is being ended.
pub(super) struct Settling {
    vm: String,
    done: Receiver<Vec<String>>,
}

impl Settling {
    pub(super) fn begin(heir: Heir) -> Self {
        let vm = heir.order().vm.name.clone();
        let (told, done) = channel();
        let (give, given) = channel::<Heir>();
        let telling = told.clone();
        let settling = thread::Builder::new().spawn(move || {
            if let Ok(heir) = given.recv() {
                drop(telling.send(settle(heir)));
            }
        });
        // Where no thread can be had it is done here and now.
        if settling.is_err() {
            drop(told.send(settle(heir)));
        } else {
            drop(give.send(heir));
        }
        Self { vm, done }
    }
}

/// Waits for all of them; returns what could not be done.
pub(super) fn wait_for(all: &mut Vec<Settling>) -> Vec<String> {
    let end = Instant::now() + WAIT_MAX;
    let mut untidy = Vec::new();
    for settling in all.drain(..) {
        let left = end.saturating_duration_since(Instant::now());
        let failed = settling.done.recv_timeout(left);
        let failed = failed.unwrap_or_else(|_| vec!["it takes too long".to_owned()]);
        untidy.extend(failed.iter().map(|why| {
            format!(
                "cannot see that the session at VM `{}` was ended: {why}; the next backup of this \
                 VM repairs it",
                settling.vm
            )
        }));
    }
    untidy
}

fn settle(mut heir: Heir) -> Vec<String> {
    heir.part();
    let end = Instant::now() + TRY_MAX;
    let mut tries = 0;
    loop {
        tries += 1;
        let failed = match heir.settle(&guard_process::start) {
            Ok(warnings) if warnings.is_empty() => return warnings,
            Ok(warnings) => warnings,
            Err(error) => vec![advice::chain(&error).join(": ")],
        };
        if tries >= TRIES_MIN && Instant::now() >= end {
            return failed;
        }
        thread::sleep(TRY_EVERY);
    }
}
