//! Repairs what the examination found, one finding at a time, each on fresh
//! facts: what one repair changes, the next one sees.

use std::collections::BTreeSet;

use highwater_hypervisor::{ErrorKind, Foreign, HypervisorError, MarkOrder};
use highwater_model::MarkName;
use highwater_plan::{Finding, Problem, Remedy, Verdict};

use super::examine::{Examined, is_there};
use super::{Checkup, DoctorError, Ward};
use crate::Event;
use crate::backup::words;
use crate::guard::GuardError;

/// How long a dying holder of the lock is waited for: a guard whose mover was
/// killed ends at once.
const LOCK_WAIT_MS: u64 = 3_000;

/// What was done so far.
#[derive(Default)]
struct Done {
    fixed: Vec<String>,
    failed: Vec<(String, HypervisorError)>,
    warnings: Vec<String>,
}

impl Ward<'_> {
    /// Repairs, and returns what is found afterwards.
    pub(super) fn mend(&self) -> Result<Checkup, DoctorError> {
        self.context
            .guard
            .lock_within(self.vm, LOCK_WAIT_MS)
            .map_err(|source| DoctorError::Locked {
                vm: self.vm.name.clone(),
                source,
            })?;
        let mut done = Done::default();
        let mut tried = BTreeSet::new();
        let mut examined = self.examine(true)?;
        while let Some(finding) = next_repair(&examined.checkup, &mut tried) {
            self.stop_if_cancelled()?;
            self.repair(&finding, &examined, &mut done);
            examined = self.examine(true)?;
        }
        if let Some(of) = self.options.foreign {
            self.clear_wreckage(of, &mut done);
            examined = self.examine(true)?;
        }
        if self.options.purge_marks && self.purge(&examined.checkup, &mut done)? {
            examined = self.examine(true)?;
        }
        let Examined { mut checkup, .. } = examined;
        checkup.fixed = done.fixed;
        checkup.failed = done.failed;
        done.warnings.append(&mut checkup.warnings);
        checkup.warnings = done.warnings;
        Ok(checkup)
    }

    fn repair(&self, finding: &Finding, examined: &Examined, done: &mut Done) {
        match &finding.problem {
            Problem::DeadSession(session) => {
                let ended = self.context.guard.end_leftover(self.vm, *session);
                let ended = ended.map(|ended| ended.warnings);
                self.note(done, words::end_job(*session), ended);
            }
            Problem::Remains(session) => self.sweep(&words::remove_remains(*session), done),
            Problem::LeftDirectories(session) => {
                self.sweep(&words::remove_directories(*session), done);
            }
            Problem::BitmapLied { disk } => {
                if let Some(order) = examined.distrust.get(disk) {
                    let what = format!("remove the mark that lies from disk {disk}");
                    let changed = self.change(order);
                    self.note(done, what, changed);
                }
            }
            Problem::Mark { name, verdict } => self.repair_mark(name, verdict, examined, done),
            // Nothing else is ours to repair.
            _ => {}
        }
    }

    /// Clears what all dead sessions left, in QEMU and on this host; fails unless
    /// `wanted` is among it.
    fn sweep(&self, wanted: &str, done: &mut Done) {
        let places = self.options.backup.session_places();
        let what = wanted.to_owned();
        match self.context.guard.sweep(self.vm, &places) {
            Ok(swept) => {
                let remains = swept.in_process.into_iter().map(words::remove_remains);
                let directories = swept.sessions.into_iter().map(words::remove_directories);
                let removed: Vec<String> = remains.chain(directories).collect();
                let is_done = removed.contains(&what);
                for one in removed {
                    self.note(done, one, Ok(Vec::new()));
                }
                if is_done {
                    done.warnings.extend(swept.warnings);
                } else {
                    let error = HypervisorError::new(ErrorKind::Other, format!("cannot {what}"));
                    let warnings = swept.warnings.into_iter();
                    let error = warnings.fold(error, HypervisorError::because);
                    done.failed.push((what, error));
                }
            }
            Err(error) => done.failed.push((what, error)),
        }
    }

    fn repair_mark(
        &self,
        name: &MarkName,
        verdict: &Verdict,
        examined: &Examined,
        done: &mut Done,
    ) {
        let what = match verdict {
            Verdict::Forgotten(_) => words::tell_again(name),
            Verdict::Unfinished => words::remove_unfinished(name),
            Verdict::Useless(why) => format!("remove useless mark {name} ({})", why.sentence()),
            other => format!("remove {} mark {name}", other.word()),
        };
        let redefinition = examined.forgotten.get(name);
        let Some(mark) = redefinition.filter(|_| matches!(verdict, Verdict::Forgotten(_))) else {
            let removed = self.remove(name);
            return self.note(done, what, removed);
        };
        match self.change(&MarkOrder::Redefine(mark.clone())) {
            // What the hypervisor refuses is of no use to the next backup either.
            Err(error) if matches!(error.kind, ErrorKind::BadMark | ErrorKind::UnknownMark) => {
                let removed = self.remove(name);
                self.note(done, format!("remove refused mark {name}"), removed);
            }
            told => self.note(done, what, told),
        }
    }

    fn remove(&self, name: &MarkName) -> Result<Vec<String>, GuardError> {
        self.change(&MarkOrder::Remove(name.clone()))
    }

    fn change(&self, order: &MarkOrder) -> Result<Vec<String>, GuardError> {
        let changed = self.context.guard.mark(self.vm, order);
        changed.map(|()| Vec::new())
    }

    /// Removes every mark of this repository and VM, whatever it is good for. Returns
    /// whether there was any. Of a VM that does not run it always fails.
    fn purge(&self, checkup: &Checkup, done: &mut Done) -> Result<bool, DoctorError> {
        if !checkup.tells_bitmaps {
            // Records may be gone while bitmaps are in the images: to say that
            // nothing is left would cost the user his internal snapshots.
            done.failed.push(self.cannot_purge());
            return Ok(false);
        }
        let repo = self.context.repo.id();
        let marks = checkup
            .marks
            .iter()
            .filter(|mark| mark.name.is_of(repo) && is_there(mark))
            // Others lie on the same backing file, and need them.
            .filter(|mark| mark.verdict != Verdict::OtherVm);
        let mut any = false;
        for mark in marks {
            self.stop_if_cancelled()?;
            any = true;
            let removed = self.remove(&mark.name);
            self.note(done, format!("remove mark {}", mark.name), removed);
        }
        Ok(any)
    }

    /// Removes what another program has left.
    fn clear_wreckage(&self, of: Foreign, done: &mut Done) {
        let Foreign::Qmpbackup = of;
        let all = "remove the wreckage of qmpbackup".to_owned();
        match self.context.guard.clear_wreckage(self.vm, of) {
            Ok(cleared) => {
                if let Some(because) = cleared.in_use {
                    let error = HypervisorError::new(ErrorKind::Busy, format!("cannot {all}"));
                    done.failed.push((all, error.because(because)));
                }
                for wreck in cleared.wrecks {
                    let what = format!("remove {} {} of qmpbackup", wreck.kind, wreck.name);
                    self.note(done, what, Ok(Vec::new()));
                }
                done.warnings.extend(cleared.warnings);
            }
            Err(error) => done.failed.push((all, error)),
        }
    }

    fn cannot_purge(&self) -> (String, HypervisorError) {
        let what = format!("remove the marks of VM `{}`", self.vm.name);
        let error = HypervisorError::new(ErrorKind::WrongState, format!("cannot {what}"))
            .because(
                "nobody knows which bitmaps are in its images: they are another process's for now, \
                 or cannot be read",
            )
            .hint("let the VM run, or shut it off, or make its images readable");
        (what, error)
    }

    fn note(&self, done: &mut Done, what: String, outcome: Result<Vec<String>, GuardError>) {
        match outcome {
            Ok(warnings) => {
                let what = words::done(&what);
                self.context.observer.event(&Event::Healed(&what));
                done.fixed.push(what);
                done.warnings.extend(warnings);
            }
            Err(error) => done.failed.push((what, error)),
        }
    }

    fn stop_if_cancelled(&self) -> Result<(), DoctorError> {
        if self.context.cancel.is_raised() {
            return Err(DoctorError::Interrupted {
                vm: self.vm.name.clone(),
            });
        }
        Ok(())
    }
}

/// Returns the worst finding that we can repair and have not tried to.
fn next_repair(checkup: &Checkup, tried: &mut BTreeSet<String>) -> Option<Finding> {
    let mut ours = checkup
        .findings
        .iter()
        .filter(|finding| finding.remedy == Remedy::Fix);
    // A mark is tried once, whatever it is called the next time.
    ours.find(|finding| {
        tried.insert(match &finding.problem {
            Problem::Mark { name, .. } => name.to_string(),
            other => format!("{other:?}"),
        })
    })
    .cloned()
}
