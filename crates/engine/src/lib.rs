//! The jobs: backup, restore, and finding restore points.
//!
//! Start reading at [`backup`]. The engine names no driver, prints nothing and
//! reads no environment; what happens is told to an [`Observer`].

mod backup;
mod cancel;
mod doctor;
mod events;
#[doc(hidden)]
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod guard;
mod limiter;
mod points;
mod restore;
mod verify;

pub use backup::{
    BackupContext, BackupError, BackupOptions, CopyError, DiskEstimate, DiskReport, Estimate,
    Offline, Report, Status, Tuning, backup, estimate,
};
pub use cancel::Cancel;
pub use doctor::{
    ChangedGraph, Checkup, DoctorError, DoctorOptions, MarkReport, NextBackup, Refused, doctor,
};
pub use events::{DiskDone, DiskProgress, Event, Observer};
pub use guard::{
    Connect, Guard, GuardError, Heir, LockHolder, Outcome, Parting, SessionEnds, Witness,
    lock_path, serve,
};
pub use limiter::Limiter;
pub use points::{PointError, PointRef, resolve, select_vm};
pub use restore::{
    Format, RestoreError, RestoreOptions, RestoreReport, RestoredDisk, Target, restore,
};

pub use verify::{Subject, VerifyJob, verify};

pub use highwater_plan::{
    AuditWish, BitmapView, Finding, Level, MarkOnDisk, Problem, Refusal, Remedy, Strange, Verdict,
    Wrecks, known_program,
};

/// The repository, as far as whoever wires the jobs up needs it.
pub mod repository {
    pub use highwater_repo::{
        Checked, Compression, Damage, DamagedPoint, HurtFile, HurtImage, HurtPoint, ImageRoot,
        InitOptions, Manifest, PointList, Progress, RepoError, RepoErrorKind, Repository, Secret,
        SecretKind, Storage, VerifyDepth, VerifyError, VerifyPhase, VerifyReport, VmIdentity,
        WriterOptions,
    };
}
