//! The libvirt driver against real libvirt, real QEMU and a real guest.
#![allow(
    clippy::disallowed_methods,
    reason = "files of a lab die with the test: nothing here must be durable"
)]

mod marks;
mod observe;
mod rig;
mod session;
mod trouble;
