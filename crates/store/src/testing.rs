//! For tests: a store in memory, one that fails on purpose, and the contract.

pub mod contract;
mod faulty;
mod memory;

pub use faulty::{Fault, FaultyStore};
pub use memory::MemStore;
