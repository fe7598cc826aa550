//! The QMP driver against real QEMU without libvirt: everything but sessions.
#![allow(
    clippy::disallowed_methods,
    reason = "files of a lab die with the test: nothing here must be durable"
)]
#![allow(
    clippy::unwrap_used,
    reason = "what a helper of a test cannot do fails the test, with the error and the line"
)]

mod claims;
mod marks;
mod monitor;
mod observe;
mod rig;
mod wreckage;
