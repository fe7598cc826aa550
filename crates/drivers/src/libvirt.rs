//! The libvirt driver: VMs of a local libvirt daemon.
//!
//! ```text
//! observe   definition, block nodes, checkpoints, job        (reads only)
//! begin     job? -> directories -> freeze -> backup-begin -> frozen? -> thaw
//! check     does the job stand, does the guest run, is there room for scratch
//! end       ours? -> abort -> gone -> resume what I/O errors stopped -> directories
//! mark      remove: record and bitmaps;  redefine: record, validated
//! survey    what else is there (jobs, exports, nodes), for people
//! sweep     directories that sessions of this VM left, of which no job tells
//! ```
//!
//! libvirt's library is loaded when a connection is opened (see [`sys`]), so a
//! host without it can run everything else. One call starts the job and creates
//! the mark: all disks and the mark share one QEMU transaction, which is what
//! makes the point in time one point.

mod aliases;
mod backup_xml;
mod begin;
mod claims;
mod connection;
mod disks;
mod domain_xml;
mod end;
mod error;
#[doc(hidden)]
pub mod fuzzing;
mod jobs;
mod leftovers;
mod marks;
mod observe;
mod off;
mod off_disks;
mod quiesce;
mod record_xml;
mod remains;
mod scratch;
mod survey;
mod sys;
mod xml;

pub use connection::{LibvirtDriver, LibvirtOptions};
