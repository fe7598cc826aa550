//! SIGINT, SIGTERM and SIGHUP: end cleanly; asked again or after a while, at once.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use highwater_engine::Cancel;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::advice;

/// How long a clean end may take. A repository that hangs would hold us for
/// ever; the guard settles at the VM whether we end cleanly or not.
const GRACE: Duration = Duration::from_secs(8);

/// Returns a flag that the first signal raises.
pub(crate) fn cancel_on_signals() -> Cancel {
    let flag = Arc::new(AtomicBool::new(false));
    let cancel = Cancel::watching(Arc::clone(&flag));
    let raised = cancel.clone();
    // Without handlers the default action ends us; the guard settles then, too.
    if let Ok(mut signals) = Signals::new([SIGINT, SIGTERM, SIGHUP]) {
        std::thread::spawn(move || {
            let mut pending = signals.forever();
            if pending.next().is_none() {
                return;
            }
            raised.raise();
            std::thread::spawn(|| {
                std::thread::sleep(GRACE);
                end_now();
            });
            if pending.next().is_some() {
                end_now();
            }
        });
    }
    cancel
}

#[expect(
    clippy::exit,
    reason = "a call into a dead repository may hold the main thread for ever"
)]
fn end_now() {
    std::process::exit(i32::from(advice::INTERRUPTED));
}
