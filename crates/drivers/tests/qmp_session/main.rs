//! Sessions at a VM without libvirt: real QEMUs, their guests' writes, and what
//! becomes of both when anything is cut off.
#![allow(
    clippy::disallowed_methods,
    reason = "files of a lab die with the test: nothing here must be durable"
)]
#![allow(
    clippy::unwrap_used,
    reason = "what a helper of a test cannot do fails the test, with the error and the line"
)]

mod elsewhere;
mod errors;
mod foreign;
mod gaps;
mod hook;
mod kills;
#[expect(dead_code, reason = "some of it is for other tests")]
#[path = "../reading/mod.rs"]
mod reading;
mod rig;
mod shapes;
mod space;
mod states;
mod trouble;
