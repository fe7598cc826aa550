//! `highwater doctor`

mod document;
mod text;
mod words;

use highwater_engine::repository::Repository;
use highwater_engine::{
    self as engine, BackupContext, BackupOptions, Cancel, Checkup, DoctorError, DoctorOptions,
    Event, Guard, Observer,
};
use highwater_hypervisor::{ErrorKind, Foreign, HypervisorError};
use highwater_model::SystemClock;
use serde::Serialize;

use crate::advice::{self, CliError};
use crate::args::{self, Doctor, Global, JsonStyle};
use crate::commands::{backup, each_once, names_of_vms};
use crate::progress::Progress;
use crate::{guard_process, json, output, settings, signals};

pub(crate) fn run(global: &Global, args: &Doctor) -> Result<u8, CliError> {
    let cancel = signals::cancel_on_signals();
    let repo = settings::open_repository(global)?;
    let uri = settings::connection(global, args.name.as_deref())?;
    let vms = match &args.name {
        Some(name) => vec![name.clone()],
        None if args.all => all_vms(&guard_process::start(&uri)?)?,
        None => each_once(&args.vms),
    };
    let next_backup = args::Backup {
        scratch_dir: args.scratch_dir.clone(),
        ..args::Backup::default()
    };
    let run = Run {
        global,
        repo: &repo,
        uri: &uri,
        backup: backup::options(&next_backup),
        fix: args.fix || args.purge_marks,
        purge_marks: args.purge_marks,
        foreign: args
            .foreign
            .map(|args::Foreign::Qmpbackup| Foreign::Qmpbackup),
        cancel: &cancel,
    };
    if let [name] = vms.as_slice() {
        let seen = run.one(name)?;
        run.tell(&seen)?;
        if global.json {
            output::document(&document::Document::new(&seen))?;
        }
        return Ok(seen.code());
    }
    run.several(&vms)
}

fn all_vms(guard: &Guard) -> Result<Vec<String>, CliError> {
    let vms = guard.list()?.into_iter();
    let names: Vec<String> = vms.map(|(vm, _)| vm.uuid.unwrap_or(vm.name)).collect();
    if names.is_empty() {
        return Err(CliError::Usage {
            message: "cannot look at all VMs: there is none".to_owned(),
            hint: "check the connection with -c".to_owned(),
        });
    }
    Ok(names)
}

/// A VM that was looked at, and what for.
struct Seen {
    checkup: Checkup,
    fix: bool,
}

impl Seen {
    fn code(&self) -> u8 {
        if !self.checkup.failed.is_empty() {
            advice::FAILED
        } else if self.checkup.is_healthy() {
            advice::DONE
        } else {
            advice::WARNED
        }
    }
}

/// One of several VMs.
#[derive(Serialize)]
#[serde(untagged)]
enum Told<'a> {
    Seen(Box<document::Document<'a>>),
    Failed(json::Failure),
}

impl<'a> Told<'a> {
    fn new(seen: &'a Result<Seen, (u8, json::Failure)>) -> Self {
        match seen {
            Ok(seen) => Self::Seen(Box::new(document::Document::new(seen))),
            Err((_, failure)) => Self::Failed(failure.clone()),
        }
    }
}

#[derive(Serialize)]
struct Results<'a> {
    schema: u32,
    results: Vec<Told<'a>>,
}

struct Run<'a> {
    global: &'a Global,
    repo: &'a Repository,
    uri: &'a str,
    backup: BackupOptions,
    fix: bool,
    purge_marks: bool,
    foreign: Option<Foreign>,
    cancel: &'a Cancel,
}

impl Run<'_> {
    /// Looks at several VMs; one that fails keeps none of the others from it.
    fn several(&self, vms: &[String]) -> Result<u8, CliError> {
        let events = self.global.json_style == Some(JsonStyle::Events);
        let mut all = Vec::new();
        for name in vms {
            let seen = self.one(name).map_err(|error| {
                let advice = advice::advise(&error);
                output::print_error(&error, &advice, false);
                (
                    advice.code,
                    json::Failure::new(Some(name), &error.chain(), &advice),
                )
            });
            match &seen {
                Ok(seen) => self.tell(seen)?,
                Err((_, failure)) if events => output::document(failure)?,
                Err(_) => {}
            }
            if let (Ok(seen), true) = (&seen, events) {
                output::document(&document::Document::new(seen))?;
            }
            all.push(seen);
            if self.cancel.is_raised() {
                break;
            }
        }
        let codes: Vec<u8> = all
            .iter()
            .map(|seen| seen.as_ref().map_or_else(|failed| failed.0, Seen::code))
            .collect();
        if self.global.json && !events {
            output::document(&Results {
                schema: json::SCHEMA,
                results: all.iter().map(Told::new).collect(),
            })?;
        }
        if self.cancel.is_raised() {
            return Ok(advice::INTERRUPTED);
        }
        Ok(code_of_all(&codes))
    }

    fn one(&self, name: &str) -> Result<Seen, CliError> {
        let guard = guard_process::start(self.uri)?;
        let progress =
            (self.global.json_style == Some(JsonStyle::Events)).then(|| Progress::new(self.global));
        let observer: &dyn Observer = match &progress {
            Some(progress) => progress,
            None => &Silent,
        };
        let context = BackupContext {
            repo: self.repo,
            guard: &guard,
            restart_guard: &|| guard_process::start(self.uri),
            clock: &SystemClock,
            observer,
            cancel: self.cancel,
        };
        let options = DoctorOptions {
            backup: &self.backup,
            fix: self.fix,
            purge_marks: self.purge_marks,
            foreign: self.foreign,
        };
        let checkup = engine::doctor(&context, name, &options);
        let checkup = checkup.map_err(|error| with_names(error, name, &guard))?;
        Ok(Seen {
            checkup,
            fix: self.fix,
        })
    }

    /// Tells people; scripts have their document.
    fn tell(&self, seen: &Seen) -> Result<(), CliError> {
        for warning in &seen.checkup.warnings {
            output::warn(warning);
        }
        // What needs something is told even when everything else is quiet.
        let is_told = !self.global.quiet || !seen.checkup.is_healthy();
        if is_told && !self.global.json {
            output::data(&text::report(seen))?;
        }
        for (what, error) in &seen.checkup.failed {
            tell_failure(what, error);
        }
        if !seen.checkup.failed.is_empty() {
            output::talk("state: what could be repaired was; the rest is as it was found");
        }
        Ok(())
    }
}

fn tell_failure(what: &str, error: &HypervisorError) {
    output::talk(&format!("error: cannot {what}"));
    let outer = Some(error.message.as_str()).filter(|it| *it != format!("cannot {what}"));
    for because in outer
        .into_iter()
        .chain(error.because.iter().map(String::as_str))
    {
        output::talk(&format!("  because: {because}"));
    }
    if let Some(hint) = &error.hint {
        output::talk(&format!("hint: {hint}"));
    }
}

/// The report tells everything at its end.
struct Silent;

impl Observer for Silent {
    fn event(&self, _: &Event<'_>) {}
}

fn with_names(error: DoctorError, name: &str, guard: &Guard) -> CliError {
    let is_unknown = matches!(
        &error,
        DoctorError::Observe { source, .. } if source.kind == ErrorKind::NoSuchVm
    );
    let hint = is_unknown.then(|| names_of_vms(name, guard)).flatten();
    CliError::Doctor {
        error: Box::new(error),
        hint,
    }
}

/// Returns the exit code of a run over several VMs: a VM that could not be
/// looked at or repaired is worse than one that needs something.
fn code_of_all(codes: &[u8]) -> u8 {
    let is_seen = |code: &u8| matches!(*code, advice::DONE | advice::WARNED);
    let mut failed = codes.iter().copied().filter(|code| !is_seen(code));
    let Some(first) = failed.next() else {
        return codes.iter().copied().max().unwrap_or(advice::DONE);
    };
    if codes.iter().any(is_seen) {
        return advice::SOME_FAILED;
    }
    if failed.all(|code| code == first) {
        first
    } else {
        advice::FAILED
    }
}

#[cfg(test)]
mod tests {
    use super::code_of_all;

    #[test]
    fn of_several_vms_the_worst_counts_and_some_that_failed_are_3() {
        for (codes, expected) in [
            (&[0, 0][..], 0),
            (&[0, 4], 4),
            (&[4, 4], 4),
            (&[0, 1], 3),
            (&[4, 11], 3),
            (&[11, 11], 11),
            (&[1, 11], 1),
            (&[], 0),
        ] {
            assert_eq!(code_of_all(codes), expected, "{codes:?}");
        }
    }
}
