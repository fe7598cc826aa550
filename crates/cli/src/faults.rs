//! Lets tests have a process die, or wait, at a step of a backup.
//!
//! `HIGHWATER_FAULT=STEP:kill:DIR` kills whoever passes the step first, which
//! leaves a file `STEP` with its process id in that directory;
//! `HIGHWATER_FAULT=STEP:wait:DIR` makes it go on when there is a file `go` as
//! well. Debug builds only.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use highwater_model::step::{Step, on_step};

const VARIABLE: &str = "HIGHWATER_FAULT";
const LOOK: Duration = Duration::from_millis(5);

static FAULT: OnceLock<Fault> = OnceLock::new();

struct Fault {
    step: Step,
    kills: bool,
    dir: PathBuf,
}

/// Does what the environment asks for, from the next step on.
pub(crate) fn install() {
    let Ok(wish) = std::env::var(VARIABLE) else {
        return;
    };
    let fault = parse(&wish)
        .unwrap_or_else(|| panic!("{VARIABLE}={wish}: not `STEP:kill:DIR` or `STEP:wait:DIR`"));
    if FAULT.set(fault).is_ok() {
        on_step(act);
    }
}

fn parse(wish: &str) -> Option<Fault> {
    let (word, rest) = wish.split_once(':')?;
    let (action, dir) = rest.split_once(':')?;
    Some(Fault {
        step: *Step::ALL.iter().find(|step| step.word() == word)?,
        kills: match action {
            "kill" => true,
            "wait" => false,
            _ => return None,
        },
        dir: PathBuf::from(dir),
    })
}

fn act(step: Step) {
    if let Some(fault) = FAULT.get().filter(|fault| fault.step == step)
        && is_first(fault)
    {
        if fault.kills {
            let me = rustix::process::getpid();
            let _ = rustix::process::kill_process(me, rustix::process::Signal::KILL);
        }
        while !fault.dir.join("go").exists() {
            std::thread::sleep(LOOK);
        }
    }
}

/// Leaves the sign; another process, or another pass, may have left it before.
fn is_first(fault: &Fault) -> bool {
    let sign = fault.dir.join(fault.step.word());
    let file = OpenOptions::new().write(true).create_new(true).open(sign);
    file.and_then(|mut file| write!(file, "{}", std::process::id()))
        .is_ok()
}
