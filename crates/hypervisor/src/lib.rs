//! The seam between the engine and whatever runs the VMs.
//!
//! A driver (libvirt, later QMP and powered-off images) reports [`VmFacts`] and
//! carries out a [`BeginOrder`]; it decides nothing. The engine decides from
//! facts with pure plans and never learns which driver it talks to.
//!
//! These types also travel between the two processes of one backup (the guard,
//! which owns the session at the VM, and the mover, which touches the
//! repository). Both are the same binary, so the `serde` forms here are no
//! promise to anybody else and need no version.

mod claim;
mod driver;
mod error;
mod facts;
mod order;
mod surroundings;
mod wreckage;

pub use claim::{CLAIM_GONE, Claim, Claimant, Claimer, Sign, SignKind, Signs, Stance};
pub use driver::{ACT_MAX, Driver};
pub use error::{ErrorKind, HypervisorError};
pub use facts::{
    Agent, BitmapFacts, ChainLink, CheckpointFacts, DiskFacts, DiskSource, FirmwareFile,
    FirmwareRole, JobFacts, MarkSupport, NoMarks, Place, ProcessIdentity, RootNode, RunState,
    SkipReason, SkippedDisk, VmFacts, VmRef, WriteCounters, WriteErrorPolicy,
};
pub use order::{
    BeginOrder, Begun, BegunDisk, Consistency, DiskOrder, Ended, Export, ExportAddress, MORE_ROOM,
    MarkOrder, NewMark, Quiesce, ReadMode, Redefinition, ScratchReserve, WhenStarted,
};
pub use surroundings::{
    ExportFacts, InnerJob, JobDetails, LeftDirectory, LooseNode, Surroundings, Swept,
};
pub use wreckage::{Foreign, Wreck, Wreckage};
