//! Lets tests make something happen at a step of a backup.
//!
//! `HIGHWATER_FAULT=STEP:ACTION:DIR`: whoever passes the step first leaves a
//! file `STEP` with its process id in that directory. Then, by the action,
//!
//! ```text
//! kill           it kills itself
//! wait           it goes on when there is a file `go` as well
//! store-...      it waits likewise, and from the step on the store fails, in
//!                whichever process it is used: see `faults::store`
//! ```
//!
//! `HIGHWATER_FAULT_PATIENCE=SECONDS` shortens the waiting for a daemon that is
//! away. Debug builds only.

mod store;

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use highwater_model::step::{Step, limit_patience, on_step};
use highwater_store::Store;

use store::{FailingStore, Failure};

const VARIABLE: &str = "HIGHWATER_FAULT";
/// Seconds after which nobody waits any longer for what is away.
const PATIENCE: &str = "HIGHWATER_FAULT_PATIENCE";
const LOOK: Duration = Duration::from_millis(5);

static FAULT: OnceLock<Fault> = OnceLock::new();

struct Fault {
    step: Step,
    action: Action,
    dir: PathBuf,
}

#[derive(Clone, Copy)]
enum Action {
    Kill,
    Wait,
    Store(Failure),
}

/// Does what the environment asks for, from the next step on.
pub(crate) fn install() {
    let patience = std::env::var(PATIENCE).ok();
    if let Some(seconds) = patience.and_then(|text| text.parse().ok()) {
        limit_patience(Duration::from_secs(seconds));
    }
    let Ok(wish) = std::env::var(VARIABLE) else {
        return;
    };
    let fault = parse(&wish).unwrap_or_else(|| panic!("{VARIABLE}={wish}: not `STEP:ACTION:DIR`"));
    if FAULT.set(fault).is_ok() {
        on_step(act);
    }
}

/// Puts a store beneath the program that fails as the environment asks for.
pub(crate) fn beneath(store: Arc<dyn Store>) -> Arc<dyn Store> {
    match FAULT.get() {
        Some(fault) => match fault.action {
            Action::Store(failure) => Arc::new(FailingStore::new(store, failure, sign(fault))),
            Action::Kill | Action::Wait => store,
        },
        None => store,
    }
}

fn parse(wish: &str) -> Option<Fault> {
    let (word, rest) = wish.split_once(':')?;
    let (action, dir) = rest.split_once(':')?;
    Some(Fault {
        step: *Step::ALL.iter().find(|step| step.word() == word)?,
        action: match action {
            "kill" => Action::Kill,
            "wait" => Action::Wait,
            other => Action::Store(Failure::parse(other.strip_prefix("store-")?)?),
        },
        dir: PathBuf::from(dir),
    })
}

fn act(step: Step) {
    if let Some(fault) = FAULT.get().filter(|fault| fault.step == step)
        && is_first(fault)
    {
        if matches!(fault.action, Action::Kill) {
            let me = rustix::process::getpid();
            let _ = rustix::process::kill_process(me, rustix::process::Signal::KILL);
        }
        while !fault.dir.join("go").exists() {
            std::thread::sleep(LOOK);
        }
    }
}

fn sign(fault: &Fault) -> PathBuf {
    fault.dir.join(fault.step.word())
}

/// Leaves the sign; another process, or another pass, may have left it before.
fn is_first(fault: &Fault) -> bool {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(sign(fault));
    file.and_then(|mut file| write!(file, "{}", std::process::id()))
        .is_ok()
}
