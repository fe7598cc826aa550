//! The settings that are in effect, as data.

use std::path::PathBuf;

/// A setting as `highwater config` shows it.
#[derive(Debug, serde::Serialize)]
pub(crate) struct Shown {
    pub(crate) setting: &'static str,
    pub(crate) value: String,
    pub(crate) from: String,
}

/// Everything `highwater config` shows.
#[derive(Debug, Default)]
pub(crate) struct Effective {
    pub(crate) files: Vec<PathBuf>,
    pub(crate) settings: Vec<Shown>,
}
