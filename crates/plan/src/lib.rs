//! Decisions as data: what is read of each disk, what is tidied, what is kept.
//!
//! Everything here is a pure function of what was observed. The rule behind
//! all of them: *incremental only if every fact that makes it safe is known*.
//! A missing or surprising fact never becomes a guess; it becomes a named
//! reason, which is printed and stored in the manifest.

mod audit;
mod diagnosis;
mod disk;
mod hot;
mod identity;
mod marks;
mod origin;
mod partitions;
mod programs;
mod rows;
mod strata;
mod vm;
mod why;

pub use audit::{AuditChoice, AuditDuty, AuditView, AuditWish, MOUNTED_BYTES, choose_audit};
pub use diagnosis::{
    Finding, MarkOnDisk, MarkView, Problem, Remedy, Scene, Strange, Verdict, Wrecks, diagnose,
    judge_marks,
};
pub use disk::{
    BitmapView, Counted, DiskPlan, DiskView, History, Level, MarkSupport, ParentView, Record,
    RootView, Unfit, WritesSince, plan_disk,
};
pub use hot::{DirtySample, HOT_MAX, HotChunk, next_hot};
pub use identity::{Identity, ImageLink, Place};
pub use marks::{
    FoundMark, MarkTraces, MarkUse, Parent, superseded_marks, unfinished_marks, useless_marks_below,
};
pub use origin::{Origin, Process, origin};
pub use partitions::mounted_places;
pub use programs::known_program;
pub use rows::{ROWS, Row};
pub use strata::Strata;
pub use vm::{JobView, VmGate, VmState, gate};
pub use why::{Refusal, Why};
