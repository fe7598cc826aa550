//! The libvirt driver against real libvirt, real QEMU and a real guest.
#![allow(
    clippy::disallowed_methods,
    reason = "files of a lab die with the test: nothing here must be durable"
)]
#![allow(
    clippy::unwrap_used,
    reason = "what a helper of a test cannot do fails the test, with the error and the line"
)]

mod marks;
mod observe;
mod off;
#[path = "../reading/mod.rs"]
mod reading;
mod rig;
mod session;
mod trouble;
