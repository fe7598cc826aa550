//! How far the backup under way is, for whoever has to say so when it is cut
//! short: the thread that knows may hang.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use highwater_engine::Event;

static NOW: Mutex<Doing> = Mutex::new(Doing::Other);

/// How far a backup is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Doing {
    /// No backup is under way.
    Other,
    /// There is no session at the VM.
    Backup { vm: String },
    /// There may be a session.
    Session { vm: String },
    /// The manifest may be durable.
    Committing { vm: String },
    /// The manifest is durable.
    Committed { vm: String, point: String },
}

impl Doing {
    /// Which VM is backed up.
    pub(crate) fn vm(&self) -> Option<&str> {
        match self {
            Self::Other => None,
            Self::Backup { vm }
            | Self::Session { vm }
            | Self::Committing { vm }
            | Self::Committed { vm, .. } => Some(vm),
        }
    }

    fn after(self, event: &Event<'_>) -> Self {
        let vm = || self.vm().unwrap_or_default().to_owned();
        match event {
            Event::Started { vm } => Self::Backup {
                vm: (*vm).to_owned(),
            },
            Event::Beginning => Self::Session { vm: vm() },
            Event::Committing => Self::Committing { vm: vm() },
            Event::Committed { point } => Self::Committed {
                vm: vm(),
                point: point.to_string(),
            },
            _ => self,
        }
    }
}

/// Whether warnings tell of the end of the session.
static HAS_WARNED: AtomicBool = AtomicBool::new(false);

/// Returns whether warnings tell how the last backup's session was ended.
pub(crate) fn has_warned() -> bool {
    HAS_WARNED.load(Ordering::Relaxed)
}

/// Notes what happens.
pub(crate) fn note(event: &Event<'_>) {
    match event {
        Event::Started { .. } => HAS_WARNED.store(false, Ordering::Relaxed),
        Event::EndedWithWarnings => HAS_WARNED.store(true, Ordering::Relaxed),
        _ => {}
    }
    let mut now = NOW.lock().unwrap_or_else(PoisonError::into_inner);
    let before = std::mem::replace(&mut *now, Doing::Other);
    *now = before.after(event);
}

/// Notes that the backup has ended, whatever came of it.
pub(crate) fn nothing() {
    *NOW.lock().unwrap_or_else(PoisonError::into_inner) = Doing::Other;
}

/// Returns how far things are.
pub(crate) fn now() -> Doing {
    NOW.lock().unwrap_or_else(PoisonError::into_inner).clone()
}
