//! A command that did not come to its own end: why, what is left, what to do.

use std::sync::OnceLock;
use std::time::Duration;

use signal_hook::consts::{SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGTRAP};

use crate::doing::Doing;

pub(crate) const NO_POINT: &str = "no restore point was added; earlier ones are untouched";
pub(crate) const LEFT_TO_THE_NEXT: &str =
    "no restore point was added; the next backup tidies what is left at the VM";
pub(crate) const TIDIED: &str =
    "no restore point was added; earlier ones are untouched; the session at the VM was ended";
pub(crate) const TIDIED_BUT: &str = "no restore point was added; earlier ones are untouched; the \
     session at the VM was ended but for what the warnings tell";
pub(crate) const UNKNOWN_POINT: &str =
    "the restore point may or may not exist; both marks were kept";

/// How the process that does the work is ended.
static END: OnceLock<fn(Why) -> !> = OnceLock::new();

/// Says how this process is ended when it does not come to its own end.
pub(crate) fn ends_by(end: fn(Why) -> !) {
    // The first one stays; there is one way.
    let _ = END.set(end);
}

/// Ends this process, though its other threads may hang.
pub(crate) fn end(why: Why) -> ! {
    match END.get() {
        Some(end) => end(why),
        // Only what works can be cut short.
        None => loop {
            std::thread::park();
        },
    }
}

/// A command that was cut short.
#[derive(Debug, Clone)]
pub(crate) struct CutShort {
    pub(crate) why: Why,
    /// What it was doing.
    pub(crate) doing: Doing,
    /// Whether something may be left at the VM.
    pub(crate) untidy: bool,
}

/// Why it was.
#[derive(Debug, Clone)]
pub(crate) enum Why {
    /// A signal asked for it, and a clean end took too long, or was not wanted.
    Asked,
    /// The repository does not answer.
    Hangs { repository: String, since: Duration },
    /// The repository answers, and yet a call does not come back.
    Stuck { repository: String, since: Duration },
    /// The process that did the work was killed; by which signal, if known.
    Killed { signal: Option<i32> },
}

/// What the kernel sends to a process for what that has done itself, and SIGABRT.
const FAULTS: [i32; 6] = [SIGILL, SIGTRAP, SIGABRT, SIGBUS, SIGFPE, SIGSEGV];

impl CutShort {
    /// Returns the message and its causes, outermost first.
    pub(crate) fn chain(&self) -> Vec<String> {
        let cause = match &self.why {
            Why::Asked => {
                return vec![match self.doing.vm() {
                    Some(vm) => format!("interrupted: the backup of VM `{vm}` was given up"),
                    None => "interrupted".to_owned(),
                }];
            }
            Why::Hangs { repository, since } => {
                let seconds = since.as_secs();
                format!("the repository at {repository} has not answered for {seconds} s")
            }
            Why::Stuck { repository, since } => {
                let seconds = since.as_secs();
                format!("a call into the repository at {repository} has taken {seconds} s so far")
            }
            Why::Killed { signal } => match signal {
                Some(signal) if FAULTS.contains(signal) => format!(
                    "the process that did the work ended by a fault of its own (signal {signal})"
                ),
                Some(signal) => {
                    format!("the process that did the work was killed by signal {signal}")
                }
                None => "the process that did the work was killed".to_owned(),
            },
        };
        let what = match (&self.doing, &self.why) {
            (Doing::Other, Why::Hangs { .. } | Why::Stuck { .. }) => {
                "cannot use the repository".to_owned()
            }
            (Doing::Other, _) => "cannot go on".to_owned(),
            (Doing::Committed { vm, .. }, _) => {
                format!("cannot end the backup of VM `{vm}` as it should")
            }
            (
                Doing::Backup { vm } | Doing::Session { vm } | Doing::Committing { vm },
                Why::Hangs { .. } | Why::Stuck { .. },
            ) => format!("cannot store the backup of VM `{vm}`"),
            (Doing::Backup { vm } | Doing::Session { vm } | Doing::Committing { vm }, _) => {
                format!("cannot back up VM `{vm}`")
            }
        };
        vec![what, cause]
    }

    /// Returns whether that was the user's wish.
    pub(crate) const fn is_asked(&self) -> bool {
        matches!(self.why, Why::Asked)
    }

    /// Returns what is intact and what was left.
    pub(crate) fn state(&self) -> Option<String> {
        let is_untidy = self.untidy;
        match &self.doing {
            Doing::Other if is_untidy => Some(LEFT_TO_THE_NEXT.to_owned()),
            // Each command leaves something else; restore points were not touched.
            Doing::Other => None,
            Doing::Backup { .. } => Some(NO_POINT.to_owned()),
            Doing::Session { .. } if is_untidy => Some(LEFT_TO_THE_NEXT.to_owned()),
            Doing::Session { .. } => Some(TIDIED.to_owned()),
            Doing::Committing { .. } => Some(UNKNOWN_POINT.to_owned()),
            Doing::Committed { point, .. } => Some(format!(
                "restore point {point} was added and is complete; the next backup tidies what is \
                 left at the VM"
            )),
        }
    }

    /// Returns what to do about it.
    pub(crate) fn hint(&self) -> Option<String> {
        let again = match self.doing.vm() {
            Some(vm) => format!("run `highwater backup {vm}` again"),
            None => "run the command again".to_owned(),
        };
        match &self.why {
            Why::Asked => None,
            Why::Hangs { repository, .. } | Why::Stuck { repository, .. } => Some(format!(
                "see why what it lies on does not answer (`stat -f {repository}`), then {again}"
            )),
            Why::Killed {
                signal: Some(signal),
            } if FAULTS.contains(signal) => Some(format!(
                "this is a bug of highwater: please report it with what is above; then {again}"
            )),
            Why::Killed { .. } => Some(format!(
                "see who killed it (for want of memory the kernel does: `dmesg`), then {again}"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(why: Why, doing: Doing) -> (Vec<String>, CutShort) {
        let cut = CutShort {
            why,
            doing,
            untidy: false,
        };
        (cut.chain(), cut)
    }

    fn hangs() -> Why {
        Why::Hangs {
            repository: "/backup".to_owned(),
            since: Duration::from_millis(6_900),
        }
    }

    #[test]
    fn a_dead_repository_is_named_with_what_is_left_and_what_to_do() {
        let vm = || "web01".to_owned();
        let (chain, advice) = told(hangs(), Doing::Session { vm: vm() });
        assert_eq!(
            chain,
            [
                "cannot store the backup of VM `web01`",
                "the repository at /backup has not answered for 6 s"
            ]
        );
        assert!(!advice.is_asked());
        assert_eq!(advice.state().as_deref(), Some(TIDIED));
        let hint = advice.hint().unwrap();
        assert!(
            hint.ends_with("run `highwater backup web01` again"),
            "{hint}"
        );
        let (_, advice) = told(hangs(), Doing::Committing { vm: vm() });
        assert_eq!(advice.state().as_deref(), Some(UNKNOWN_POINT));
        let (chain, advice) = told(hangs(), Doing::Other);
        assert_eq!(chain[0], "cannot use the repository");
        assert_eq!(advice.state(), None);
        let point = "01JD".to_owned();
        let (_, advice) = told(hangs(), Doing::Committed { vm: vm(), point });
        assert!(advice.state().unwrap().contains("point 01JD was added"));
    }

    #[test]
    fn whoever_asked_for_the_end_gets_130() {
        let (chain, advice) = told(Why::Asked, Doing::Other);
        assert!(chain.len() == 1 && advice.is_asked());
        let killed = Why::Killed { signal: Some(9) };
        let (chain, advice) = told(killed, Doing::Other);
        assert!(chain[1].ends_with("killed by signal 9"), "{chain:?}");
        assert!(!advice.is_asked());
    }

    #[test]
    fn a_fault_of_our_own_is_no_killing_by_others() {
        let killed = Why::Killed { signal: Some(6) };
        let (chain, advice) = told(killed, Doing::Other);
        assert!(chain[1].ends_with("of its own (signal 6)"), "{chain:?}");
        assert!(advice.hint().unwrap().contains("please report it"));
    }

    #[test]
    fn that_the_session_was_ended_is_said_only_if_it_was() {
        let vm = || "web01".to_owned();
        for why in [Why::Asked, hangs(), Why::Killed { signal: None }] {
            let (_, mut cut) = told(why, Doing::Session { vm: vm() });
            assert_eq!(cut.state().as_deref(), Some(TIDIED));
            cut.untidy = true;
            assert_eq!(cut.state().as_deref(), Some(LEFT_TO_THE_NEXT));
        }
    }
}
