//! The project's own chores; `make check` and friends call it.
fn main() {}
