//! Backups of a guest that lives: it writes, and its file systems are frozen.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test may stop at the first surprise"
)]

mod freeze;
mod point_in_time;
#[path = "../lab/support.rs"]
#[allow(dead_code, reason = "the lab's tests need more of it than these")]
mod support;
