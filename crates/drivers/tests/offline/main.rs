//! The driver for images against real images, QEMU and its tools.
#![allow(
    clippy::disallowed_methods,
    reason = "files of a lab die with the test: nothing here must be durable"
)]
#![allow(
    clippy::unwrap_used,
    reason = "what a helper of a test cannot do fails the test, with the error and the line"
)]

mod facts;
#[path = "../reading/mod.rs"]
mod reading;
mod rig;
mod sequence;
mod session;
mod started;
