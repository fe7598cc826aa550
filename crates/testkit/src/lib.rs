//! Real QEMU, real libvirt, a real guest: what the tests stand on.
//!
//! ```no_run
//! use highwater_testkit::{DiskSpec, Lab, MIB};
//!
//! # fn main() -> anyhow::Result<()> {
//! let lab = Lab::start()?;
//! let vm = lab.vm("web01").disk(DiskSpec::qcow2("vda", 64 * MIB)).start()?;
//! vm.write("vda", "write -P 0xab 10M 3M")?;
//! vm.raw_copy("vda", &lab.path("expected.raw"))?;
//! // ... back up over lab.uri(), restore to lab.path("restored.qcow2") ...
//! highwater_testkit::compare_images(&lab.path("expected.raw"), &lab.path("restored.qcow2"))?;
//! # Ok(())
//! # }
//! ```
//!
//! Every test owns its libvirtd ([`Lab`]), so tests run side by side and may
//! kill, restart and break it. `docs/testing.md` tells how it works.
//!
//! For tests only: errors are `anyhow`, made to be read in a failed test.
#![allow(
    clippy::disallowed_methods,
    reason = "files of a lab live in a temporary directory that dies with the test: nothing here must be durable"
)]

mod bare;
mod cache;
mod command;
mod corpus;
mod disk;
pub mod guest;
mod images;
mod lab;
mod scattered;
mod vm;
pub mod workload;
mod xml;

pub use bare::{Attach, BareBuilder, BareLab, BareVm, Graph, Qemu};
pub use command::{Tool, tool, wait_until};
pub use corpus::replay;
pub use disk::{DiskSpec, ErrorPolicy};
pub use guest::{Guest, Latency, LatencyWriter, NumberedWriter, Numbering};
pub use images::{compare_images, raw_hash};
pub use lab::Lab;
pub use scattered::Scattered;
pub use vm::{BitmapPlace, BitmapSeen, Leftovers, Vm, VmBuilder};
pub use workload::Workload;

/// 1024 bytes.
pub const KIB: u64 = 1 << 10;
/// 1024 KiB.
pub const MIB: u64 = 1 << 20;
/// 1024 MiB.
pub const GIB: u64 = 1 << 30;
