//! The disk that a directory lies on, and whether it completes requests.

use std::fs;
use std::path::{Path, PathBuf};

/// A block device of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskBelow(PathBuf);

/// What a disk has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Requests {
    /// How many requests it has completed.
    pub(crate) completed: u64,
    /// Whether it has some that it has not.
    pub(crate) under_way: bool,
}

impl DiskBelow {
    /// Finds it; `None` where there is none, or none that the kernel counts for
    /// (memory, a network, btrfs). May hang with the file system.
    pub(crate) fn of(directory: &Path) -> Option<Self> {
        let device = rustix::fs::stat(directory).ok()?.st_dev;
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let counts = PathBuf::from(format!("/sys/dev/block/{major}:{minor}/stat"));
        counts.exists().then_some(Self(counts))
    }

    /// Asks the kernel. Never waits for the disk.
    pub(crate) fn requests(&self) -> Option<Requests> {
        parse(&fs::read_to_string(&self.0).ok()?)
    }
}

/// Reads `/sys/dev/block/*/stat` (Linux, Documentation/block/stat.rst): reads,
/// writes, discards and flushes that were completed, and what is in flight.
fn parse(counts: &str) -> Option<Requests> {
    let numbers: Vec<u64> = counts
        .split_whitespace()
        .map_while(|number| number.parse().ok())
        .collect();
    // Older kernels count neither discards nor flushes.
    let completed = [0, 4, 11, 15]
        .into_iter()
        .filter_map(|field: usize| numbers.get(field))
        .fold(0_u64, |sum, count| sum.wrapping_add(*count));
    Some(Requests {
        completed,
        under_way: *numbers.get(8)? > 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_as_the_kernel_counts_them() {
        let counts = " 10 1 2 3 20 4 5 6 1 7 8 300 9 9 9 4000 9\n";
        let requests = parse(counts).unwrap();
        assert_eq!((requests.completed, requests.under_way), (4330, true));
        let idle = parse("10 1 2 3 20 4 5 6 0 7 8").unwrap();
        assert_eq!((idle.completed, idle.under_way), (30, false));
        assert_eq!(parse("10 1 2"), None);
        assert_eq!(parse(""), None);
    }
}
