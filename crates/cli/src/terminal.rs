//! The terminal, put back when the one that asks for a passphrase cannot.
//!
//! The question takes away echo, lines and the meaning of Ctrl-C. Whoever asks
//! gives them back, but not when it is killed, or ends while it waits.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;

use rustix::fs::OFlags;
use rustix::process::getpgrp;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetpgrp, tcsetattr};

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
