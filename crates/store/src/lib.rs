//! Where the objects of a repository lie.
//!
//! [`Store`] is the one small trait; its documentation is its specification,
//! and `testing::contract` (feature `testing`) checks every sentence of it
//! against an implementation. [`LocalStore`] keeps objects in a directory.
//! [`durable`] is the only place of the whole program that renames and syncs.

#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

pub mod durable;
mod error;
mod key;
mod local;
mod location;
mod store;
#[cfg(feature = "testing")]
pub mod testing;
mod watched;

pub use error::{StoreError, StoreErrorKind};
pub use key::{KeyError, ObjectKey, ObjectKind};
pub use local::LocalStore;
pub use location::{Location, open};
pub use store::{Listed, Store, Unfinished};
pub use watched::{Calls, Waited, Watched};
