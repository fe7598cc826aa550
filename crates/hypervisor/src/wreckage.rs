//! What another program's backup has left at a VM.

use serde::{Deserialize, Serialize};

/// A program whose wreckage is known well enough to be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Foreign {
    /// qmpbackup: nodes `qmpbackup-*`, the filter among them in the guest's path,
    /// jobs `qmpbackup.*`, bitmaps `qmpbackup-*` and fleece images.
    Qmpbackup,
}

/// What was found of it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Wreckage {
    /// Everything that removing it would remove, in that order.
    pub wrecks: Vec<Wreck>,
    /// Why nothing of it may be removed: it is at work.
    pub in_use: Option<String>,
    /// What could not be removed, and what is left for a person to look at.
    pub warnings: Vec<String>,
}

/// One thing that was left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wreck {
    /// What it is, for people: `filter`, `node`, `bitmap`, `job`, `file`.
    pub kind: String,
    /// Its name or path.
    pub name: String,
    /// Target of the disk it belongs to, if that is known.
    pub disk: Option<String>,
    /// Whether it does harm where it is: it lies in the guest's path, takes
    /// space, costs every write, or keeps its own program from working. What that
    /// program would use again, as a bitmap that records, does not.
    pub harms: bool,
}
