//! The terminal, put back when the one that asks for a passphrase cannot.
//!
//! The question takes away echo, lines and the meaning of Ctrl-C. Whoever asks
//! gives them back, but not when it is killed, or ends while it waits.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::fs::OFlags;
use rustix::process::getpgrp;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetpgrp, tcsetattr};

/// The terminal as it was, while something is being asked there.
static ASKED: Mutex<Option<Terminal>> = Mutex::new(None);
/// Who wants to know that something is, and that it was.
static TELL: OnceLock<fn(bool)> = OnceLock::new();

/// Has somebody told of the beginning and the end of each question.
pub(crate) fn tells(tell: fn(bool)) {
    // The first one stays; there is one process that can be told.
    let _ = TELL.set(tell);
}

/// Asks something at the terminal, which takes it apart for that long.
pub(crate) fn ask<T>(question: impl FnOnce() -> T) -> T {
    let tell = |is_asking| TELL.get().into_iter().for_each(|tell| tell(is_asking));
    *asked() = Terminal::look();
    tell(true);
    let answer = question();
    *asked() = None;
    tell(false);
    answer
}

/// Returns whether a question waits for its answer.
pub(crate) fn is_asking() -> bool {
    asked().is_some()
}

/// Makes the terminal as it was if it is taken apart.
pub(crate) fn put_back() {
    if let Some(terminal) = &*asked() {
        terminal.put_back();
    }
}

fn asked() -> MutexGuard<'static, Option<Terminal>> {
    ASKED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Our terminal, as it was when we looked.
pub(crate) struct Terminal {
    tty: File,
    before: Termios,
}

impl Terminal {
    /// Looks at the terminal of this process, if it has one.
    pub(crate) fn look() -> Option<Self> {
        let flags = OFlags::NOCTTY.bits().cast_signed();
        let tty = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open("/dev/tty")
            .ok()?;
        let before = tcgetattr(&tty).ok()?;
        Some(Self { tty, before })
    }

    /// Makes it as it was, if it is ours now: in the background it is somebody
    /// else's, and we would be stopped for touching it.
    pub(crate) fn put_back(&self) {
        if tcgetpgrp(&self.tty).is_ok_and(|group| group == getpgrp()) {
            // Fails if the terminal is gone.
            let _ = tcsetattr(&self.tty, OptionalActions::Now, &self.before);
        }
    }
}
