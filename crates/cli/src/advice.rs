//! What a person does about an error, and the exit code. The only place that
//! knows both library errors and command names.

use std::error::Error;
use std::path::PathBuf;

use highwater_engine::repository::{RepoError, RepoErrorKind};
use highwater_engine::{BackupError, DoctorError, PointError, RestoreError};
use highwater_hypervisor::{ErrorKind, HypervisorError, JobFacts, RunState};
use highwater_store::{StoreError, StoreErrorKind};

use crate::by_hand;
use crate::cut_short::{CutShort, LEFT_TO_THE_NEXT, NO_POINT, TIDIED, TIDIED_BUT, UNKNOWN_POINT};
use crate::doing;

pub(crate) const DONE: u8 = 0;
pub(crate) const FAILED: u8 = 1;
pub(crate) const USAGE: u8 = 2;
pub(crate) const SOME_FAILED: u8 = 3;
pub(crate) const WARNED: u8 = 4;
pub(crate) const NO_REPOSITORY: u8 = 10;
pub(crate) const BUSY: u8 = 11;
pub(crate) const WRONG_KEY: u8 = 12;
pub(crate) const DAMAGE: u8 = 20;
pub(crate) const INTERRUPTED: u8 = 130;

/// Why a command did not do what it was asked to.
#[derive(Debug)]
pub(crate) enum CliError {
    Usage {
        message: String,
        hint: String,
    },
    /// What was typed is no command of ours.
    CommandLine {
        reason: String,
        hint: String,
    },
    /// A configuration file that cannot be used.
    Config {
        path: PathBuf,
        reason: String,
        hint: Option<String>,
    },
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    Write {
        path: PathBuf,
        source: std::io::Error,
    },
    PasswordCommand {
        reason: String,
    },
    Output {
        source: std::io::Error,
    },
    Init(RepoError),
    Backup(Box<BackupError>),
    Restore(Box<RestoreError>),
    Repo(RepoError),
    Store(StoreError),
    Point(PointError),
    /// A point that was not found, though a VM has the whole text as its name.
    PointOrVm {
        error: PointError,
        vm: String,
        uuid: Option<String>,
    },
    /// A VM without points, and one with a name that is nearly the same.
    PointNear {
        error: PointError,
        name: String,
    },
    /// A VM that was not found, and what the names of others are.
    NoSuchVm {
        error: Box<BackupError>,
        hint: String,
    },
    /// A VM that could not be looked at, and what the names of others are.
    Doctor {
        error: Box<DoctorError>,
        hint: Option<String>,
    },
    Hypervisor(HypervisorError),
    Interrupted,
    /// The command did not come to its own end.
    CutShort(CutShort),
}

impl CliError {
    /// Returns whether the reader of our output went away, which is no error.
    pub(crate) fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Output { source } if source.kind() == std::io::ErrorKind::BrokenPipe)
    }

    /// Returns the message and its causes, outermost first.
    pub(crate) fn chain(&self) -> Vec<String> {
        let one = |message: String, source: &dyn Error| vec![message, source.to_string()];
        match self {
            Self::Usage { message, .. } => vec![message.clone()],
            Self::CommandLine { reason, .. } => vec![
                "cannot understand the command line".to_owned(),
                reason.clone(),
            ],
            Self::Config { path, reason, .. } => vec![
                format!("cannot use configuration {}", path.display()),
                reason.clone(),
            ],
            Self::Write { path, source } => one(format!("cannot write {}", path.display()), source),
            Self::Read { path, source } => one(format!("cannot read {}", path.display()), source),
            Self::PasswordCommand { reason } => {
                vec![
                    "cannot get the passphrase from its command".to_owned(),
                    reason.clone(),
                ]
            }
            Self::Output { source } => one("cannot write the output".to_owned(), source),
            Self::Init(error) | Self::Repo(error) => chain(error),
            Self::Backup(error) => chain(error.as_ref()),
            Self::Restore(error) => chain(error.as_ref()),
            Self::Store(error) => chain(error),
            Self::Point(error) | Self::PointOrVm { error, .. } | Self::PointNear { error, .. } => {
                chain(error)
            }
            Self::NoSuchVm { error, .. } => chain(error.as_ref()),
            Self::Doctor { error, .. } => chain(error.as_ref()),
            Self::Hypervisor(error) => chain(error),
            Self::Interrupted => vec!["interrupted".to_owned()],
            Self::CutShort(cut) => cut.chain(),
        }
    }
}

/// Returns an error and its causes, outermost first. A hypervisor's error
/// crossed a process boundary and carries its causes as text.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> Vec<String> {
    let mut lines = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        lines.push(error.to_string());
        if let Some(error) = error.downcast_ref::<HypervisorError>() {
            lines.extend(error.because.iter().cloned());
        }
        next = error.source();
    }
    lines.dedup();
    lines
}

macro_rules! from {
    ($($source:ty => $variant:ident),*) => {
        $(impl From<$source> for CliError {
            fn from(error: $source) -> Self {
                Self::$variant(error.into())
            }
        })*
    };
}
from!(
    BackupError => Backup, RestoreError => Restore, RepoError => Repo, StoreError => Store,
    PointError => Point, HypervisorError => Hypervisor
);

/// What the person is told beside the error.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Advice {
    /// What is intact and what was left; for jobs that can fail half way.
    pub(crate) state: Option<String>,
    /// What to do.
    pub(crate) hint: Option<String>,
    /// Exit code.
    pub(crate) code: u8,
}

impl Advice {
    const fn code(code: u8) -> Self {
        Self {
            state: None,
            hint: None,
            code,
        }
    }

    fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    fn state(mut self, state: impl Into<String>) -> Self {
        self.state = Some(state.into());
        self
    }
}

/// Returns what to do about an error.
pub(crate) fn advise(error: &CliError) -> Advice {
    match error {
        CliError::Usage { hint, .. } | CliError::CommandLine { hint, .. } => {
            Advice::code(USAGE).hint(hint)
        }
        CliError::Config { hint, .. } => Advice {
            hint: hint.clone(),
            ..Advice::code(USAGE)
        },
        CliError::Read { .. }
        | CliError::Write { .. }
        | CliError::PasswordCommand { .. }
        | CliError::Output { .. } => Advice::code(FAILED),
        CliError::CutShort(cut) => Advice {
            state: cut.state(),
            hint: cut.hint(),
            code: if cut.is_asked() { INTERRUPTED } else { FAILED },
        },
        CliError::Init(error) => of_init(error),
        CliError::Backup(error) => {
            let mut advice = of_backup(error);
            if advice.state.as_deref() == Some(TIDIED) && doing::has_warned() {
                advice = advice.state(TIDIED_BUT);
            }
            advice
        }
        CliError::Restore(error) => of_restore(error),
        CliError::Repo(error) => of_repo(error),
        CliError::Store(error) => of_store(error),
        CliError::Point(error) => of_point(error),
        CliError::PointNear { error, name } => of_point(error).hint(format!(
            "did you mean `{name}`? See `highwater list` for VMs with restore points"
        )),
        CliError::PointOrVm { error, vm, uuid } => {
            let uuid = uuid.as_ref().map(|it| format!(" or `uuid:{it}`"));
            of_point(error).hint(format!(
                "the text is split at its last `@` or `~`; VM `{vm}` is written `{vm}@latest`{}, \
                 a restore point of it `id:ID`",
                uuid.unwrap_or_default()
            ))
        }
        CliError::NoSuchVm { error, hint } => of_backup(error).hint(hint),
        CliError::Hypervisor(error) => of_hypervisor(error),
        CliError::Doctor { error, hint } => {
            let advice = of_doctor(error);
            match hint {
                Some(hint) => advice.hint(hint),
                None => advice,
            }
        }
        CliError::Interrupted => Advice::code(INTERRUPTED).state(UNCHANGED),
    }
}

const UNCHANGED: &str = "nothing was changed";

fn of_doctor(error: &DoctorError) -> Advice {
    match error {
        DoctorError::Observe { source, .. } if source.kind == ErrorKind::NoSuchVm => {
            of_hypervisor(source)
                .state(UNCHANGED)
                .hint(by_hand::see_names())
        }
        DoctorError::Observe { source, .. } => of_hypervisor(source),
        DoctorError::Locked { source, .. } => of_hypervisor(source).state(UNCHANGED),
        DoctorError::History { source, .. } => of_repo(source),
        DoctorError::Interrupted { .. } => {
            Advice::code(INTERRUPTED).state("what was repaired so far stays repaired")
        }
    }
}

fn of_init(error: &RepoError) -> Advice {
    let untouched = "nothing that was there before has been changed";
    match error.kind() {
        RepoErrorKind::AlreadyExists => Advice::code(FAILED)
            .state(untouched)
            .hint("use it as it is, or choose another place"),
        _ => of_repo(error).state(untouched),
    }
}

fn of_repo(error: &RepoError) -> Advice {
    match error.kind() {
        RepoErrorKind::NoRepository => Advice::code(NO_REPOSITORY)
            .hint("check the path, or create one with `highwater init --encryption ...`"),
        RepoErrorKind::WrongKey => {
            Advice::code(WRONG_KEY).hint("check the passphrase or the key file")
        }
        RepoErrorKind::Damaged => {
            Advice::code(DAMAGE).hint("other restore points may be intact: try them")
        }
        RepoErrorKind::NewerFormat => {
            Advice::code(FAILED).hint("use the version of highwater that made it, or a newer one")
        }
        RepoErrorKind::NoSpace => Advice::code(FAILED).hint("free some space in the repository"),
        _ => Advice::code(FAILED),
    }
}

fn of_store(error: &StoreError) -> Advice {
    match error.kind() {
        StoreErrorKind::NotFound => {
            Advice::code(NO_REPOSITORY).hint("check the path of the repository")
        }
        StoreErrorKind::BadLocation => {
            Advice::code(USAGE).hint("a repository is a directory: write /path or file:///path")
        }
        _ => Advice::code(FAILED),
    }
}

fn of_point(error: &PointError) -> Advice {
    let code = if error.is_usage() { USAGE } else { FAILED };
    let hint = match error {
        PointError::Unreadable(_) => {
            "write VM, VM@ID, VM@latest, VM@2026-11-20T03:00, VM~2 or id:ID".to_owned()
        }
        PointError::NoSuchVm(_) => "see `highwater list` for VMs with restore points".to_owned(),
        PointError::NoSuchPoint(_) => "see `highwater list --all` for what there is".to_owned(),
        PointError::Ambiguous { candidates, .. } => {
            let shown: Vec<&str> = candidates.iter().take(8).map(String::as_str).collect();
            format!("name one of them: {}", shown.join(", "))
        }
    };
    Advice::code(code).hint(hint)
}

fn of_hypervisor(error: &HypervisorError) -> Advice {
    let code = match error.kind {
        ErrorKind::Busy => BUSY,
        _ => FAILED,
    };
    let mut advice = Advice::code(code);
    advice.hint.clone_from(&error.hint);
    advice
}

fn of_backup(error: &BackupError) -> Advice {
    match error {
        BackupError::Observe { source, .. } if source.kind == ErrorKind::NoSuchVm => {
            of_hypervisor(source)
                .state(NO_POINT)
                .hint(by_hand::see_names())
        }
        BackupError::Observe { source, .. } => of_hypervisor(source).state(NO_POINT),
        BackupError::Busy { vm, job } => {
            let hint = match job {
                Some(JobFacts::ForeignBackup(_)) => format!(
                    "wait until that program is done; if it is dead, {} ends its job",
                    by_hand::end_job(vm)
                ),
                Some(JobFacts::Forgotten) => forgotten_job(vm),
                _ => "wait until it has ended".to_owned(),
            };
            Advice::code(BUSY).state(NO_POINT).hint(hint)
        }
        BackupError::WrongState { vm, state, .. } => {
            let hint = match state {
                RunState::Other if by_hand::are_images() => {
                    "back it up over the connection of whatever runs it, or when it is off"
                        .to_owned()
                }
                RunState::Off => format!(
                    "{}, or have its images read: `--offline yield`",
                    by_hand::start(vm)
                ),
                RunState::NotResumed => format!(
                    "its disks are not its own before it runs: {} (then {} if it is to stand \
                     still), and back it up again",
                    by_hand::resume(vm),
                    by_hand::suspend(vm)
                ),
                RunState::Running
                | RunState::Paused
                | RunState::PausedOnError
                | RunState::Other => {
                    "only VMs that run, are paused, or are off can be backed up".to_owned()
                }
            };
            Advice::code(FAILED).state(NO_POINT).hint(hint)
        }
        BackupError::NoSuchDisk { known, .. } => Advice::code(USAGE)
            .state(NO_POINT)
            .hint(format!("its disks are: {}", known.join(", "))),
        BackupError::DiskCannot { .. } => Advice::code(USAGE).state(NO_POINT),
        BackupError::NoDisks { vm } => Advice::code(FAILED).state(NO_POINT).hint(format!(
            "see {} for its disks, and what -d and -x leave of them",
            by_hand::see_disks(vm)
        )),
        BackupError::Refused {
            refusal, vm, disk, ..
        } => {
            let code = match refusal {
                highwater_engine::Refusal::BitmapBusy => BUSY,
                _ => FAILED,
            };
            Advice::code(code)
                .state(NO_POINT)
                .hint(refusal_hint(*refusal, vm, disk))
        }
        BackupError::Tidy { source, .. } => of_hypervisor(source).state(NO_POINT),
        // Whoever did not hear the answer does not know what was ended.
        BackupError::Begin { source, .. } if source.kind == ErrorKind::Unreachable => {
            of_hypervisor(source).state(LEFT_TO_THE_NEXT)
        }
        BackupError::Begin { source, .. } => {
            let mut advice = of_hypervisor(source).state(TIDIED);
            if source.kind == ErrorKind::Scratch && advice.hint.is_none() {
                advice = advice.hint("choose another place with `--scratch-dir`");
            }
            advice
        }
        BackupError::GuardLost { vm, source } => of_hypervisor(source)
            .state(LEFT_TO_THE_NEXT)
            .hint(format!("run `highwater backup {vm}` again")),
        BackupError::Lost { vm, source } => of_hypervisor(source)
            .state(TIDIED)
            .hint(format!("run `highwater backup {vm}` again")),
        BackupError::NoExport { .. } => Advice::code(FAILED).state(TIDIED),
        BackupError::Copy { vm, source } if source.lost_session().is_some() => {
            let why = source.lost_session();
            let is_reached = why.is_none_or(|why| why.kind != ErrorKind::Unreachable);
            let own = why.and_then(|why| why.hint.clone());
            let hint = own.unwrap_or_else(|| "see why".to_owned());
            Advice::code(FAILED)
                .state(if is_reached { TIDIED } else { LEFT_TO_THE_NEXT })
                .hint(format!("{hint}, then run `highwater backup {vm}` again"))
        }
        BackupError::Copy { vm, .. } | BackupError::AllDisksFailed { vm, .. } => {
            Advice::code(FAILED)
                .state(TIDIED)
                .hint(format!("see why, then run `highwater backup {vm}` again"))
        }
        BackupError::Store { vm, source } => {
            let advice = of_repo(source).state(TIDIED);
            match source.kind() {
                RepoErrorKind::NoSpace => advice.hint(format!(
                    "free some space in the repository, then run `highwater backup {vm}` again"
                )),
                RepoErrorKind::Store => advice.hint(format!(
                    "{}, then run `highwater backup {vm}` again",
                    what_the_store_needs(source)
                )),
                _ => advice,
            }
        }
        BackupError::CommitUnknown { vm, .. } => Advice::code(FAILED).state(UNKNOWN_POINT).hint(
            format!("the next `highwater backup {vm}` finds out and goes on"),
        ),
        BackupError::Interrupted { .. } => Advice::code(INTERRUPTED).state(TIDIED),
    }
}

/// Says what has to be done before the repository can be written to.
fn what_the_store_needs(error: &RepoError) -> &'static str {
    let mut kind = None;
    let mut cause: Option<&dyn Error> = Some(error);
    while let Some(error) = cause {
        let found = error.downcast_ref::<StoreError>();
        kind = found.map(StoreError::kind).or(kind);
        cause = error.source();
    }
    match kind {
        Some(StoreErrorKind::ReadOnly) => "make the repository writable",
        Some(StoreErrorKind::Permission) => "allow writing to the repository",
        Some(StoreErrorKind::NotFound) => "mount the repository where it was",
        _ => "check the repository and what it lies on",
    }
}

/// Says how a VM is freed that libvirt holds for a job that it has lost.
pub(crate) fn forgotten_job(vm: &str) -> String {
    format!(
        "shut `{vm}` down, restart libvirtd, and start `{vm}` again, in this order; until then \
         libvirt refuses to back it up, save, migrate and snapshot it, and its guest works on"
    )
}

fn refusal_hint(refusal: highwater_engine::Refusal, vm: &str, disk: &str) -> String {
    use highwater_engine::Refusal;
    match refusal {
        Refusal::GraphChanged => format!(
            "another program put a snapshot or a filter over it behind the hypervisor's back: let that \
             program take it away, or shut `{vm}` down, merge the snapshot if it is one, and start \
             `{vm}` again; or leave the disk out with `-x {disk}`"
        ),
        Refusal::GraphUnknown => format!("leave the disk out with `-x {disk}`"),
        Refusal::BitmapBusy => format!(
            "a job or an NBD export of another program uses it: end that, then run \
             `highwater backup {vm}` again"
        ),
        Refusal::NoIncrement(_) => format!("`highwater backup {vm}` reads all of it and goes on"),
    }
}

fn of_restore(error: &RestoreError) -> Advice {
    let partial = "disks restored before are complete; the one under way was removed";
    match error {
        RestoreError::NoSuchDisk { known, .. } => {
            Advice::code(USAGE).hint(format!("its disks are: {}", known.join(", ")))
        }
        RestoreError::NeedsOneDisk { known, .. } => Advice::code(USAGE).hint(format!(
            "choose one with -d: {}; or name a directory",
            known.join(", ")
        )),
        RestoreError::Exists { .. } => Advice::code(FAILED)
            .state("nothing was overwritten")
            .hint("choose another place, or move what is there away"),
        RestoreError::Read { source, .. } | RestoreError::ReadFile { source, .. } => {
            of_repo(source).state(partial)
        }
        RestoreError::TooLarge { .. } => Advice::code(FAILED).hint("restore it with --format raw"),
        RestoreError::WrongLength { .. } => Advice::code(DAMAGE).state(partial),
        RestoreError::Write { source, .. } => {
            Advice::code(FAILED)
                .state(partial)
                .hint(match source.kind() {
                    std::io::ErrorKind::NotFound => {
                        "a file is made in a directory that exists: make it, or name another"
                    }
                    std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                        "free some space there, or choose another place with --to"
                    }
                    _ => "choose another place with --to",
                })
        }
        RestoreError::Output { .. } => Advice::code(FAILED),
        RestoreError::Interrupted => Advice::code(INTERRUPTED).state(partial),
    }
}
