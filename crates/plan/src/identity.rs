//! Is this the disk, and are these the images, that the parent was taken of?

use highwater_model::DATA_FILE_FORMAT;

use crate::why::Why;

/// What identifies a disk: its serial or device name, and its image chain.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Identity {
    /// Serial number.
    pub serial: Option<String>,
    /// Device name.
    pub device: Option<String>,
    /// Whether these two are as they are said to be. Who sees but the images
    /// cannot tell; then the images must.
    pub device_unknown: bool,
    /// Images, topmost first; the data file of one follows it.
    pub chain: Vec<ImageLink>,
}

/// One image of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageLink {
    /// Path or URI.
    pub name: String,
    /// Format.
    pub format: String,
    /// Device and inode number, where it is a file that can be seen.
    pub inode: Option<(u64, u64)>,
    /// Length, modification and change time, likewise. Compared for backing
    /// files only: the topmost image changes with every write.
    pub stamp: Option<(u64, i64, i64)>,
}

/// Where the topmost image of a disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A file or device of this host: its inode number must be known.
    Host,
    /// Behind a server, which tells nothing that identifies it.
    ///
    /// What makes a mark safe there is where it lies: in the image, with the
    /// data it speaks of, under a name that is used once. Whatever the server
    /// gives out under the same address (another image, an older copy) has
    /// either no such bitmap or one that was kept together with its data.
    Network,
}

/// How a disk differs from what it was.
pub(crate) enum Difference {
    /// It is another disk, or consists of other images.
    Another(Why),
    /// It is the same, and something was exchanged below it.
    Changed(Why),
}

/// Returns what of the chain nobody can compare. Two unknowns are equal, and
/// prove nothing.
pub(crate) fn unseen(identity: &Identity, place: Place) -> Option<Why> {
    let chain = &identity.chain;
    let top_is_unseen = chain.first().is_none_or(|top| top.inode.is_none());
    if place == Place::Host && top_is_unseen {
        return Some(Why::ImageUnseen);
    }
    let (written, below) = chain.split_at(written_links(chain));
    // A bitmap speaks of a data file, and does not lie in it: wherever it is,
    // it must be the one of then.
    if written.iter().skip(1).any(|data| data.inode.is_none()) {
        return Some(Why::ImageUnseen);
    }
    // No bitmap of this disk records what is written to an image below it.
    below
        .iter()
        .any(|backing| backing.stamp.is_none())
        .then_some(Why::BackingUnseen)
}

/// Returns how many links at the top of a chain the guest writes to: the image,
/// and its data file if it has one.
fn written_links(chain: &[ImageLink]) -> usize {
    let has_data_file = chain
        .get(1)
        .is_some_and(|second| second.format == DATA_FILE_FORMAT);
    chain.len().min(if has_data_file { 2 } else { 1 })
}

/// Returns what says that it is another disk, or holds something else.
pub(crate) fn difference(now: &Identity, then: &Identity) -> Option<Difference> {
    let differs = |now: &Option<String>, then: &Option<String>| now != then;
    let is_told = !now.device_unknown && !then.device_unknown;
    if is_told && differs(&now.serial, &then.serial) {
        return Some(Difference::Another(Why::DiskSwapped));
    }
    // A device name is positional (`virtio-disk0`); it only speaks where no
    // serial number does.
    if is_told && now.serial.is_none() && differs(&now.device, &then.device) {
        return Some(Difference::Another(Why::DiskSwapped));
    }
    let same_names = now.chain.len() == then.chain.len()
        && now
            .chain
            .iter()
            .zip(&then.chain)
            .all(|(now, then)| now.name == then.name && now.format == then.format);
    if !same_names {
        return Some(Difference::Another(Why::ChainChanged));
    }
    let written = written_links(&now.chain);
    for (depth, (now, then)) in now.chain.iter().zip(&then.chain).enumerate() {
        // A bitmap that does not lie beside its data goes on being right in its
        // own file while the other is exchanged: only the same file is believed.
        if written > 1 && depth < written && now.inode != then.inode {
            return Some(Difference::Changed(Why::ImageReplaced));
        }
        if depth >= written && now.stamp != then.stamp {
            return Some(Difference::Changed(Why::BackingChanged));
        }
    }
    None
}

/// Returns whether some image has another device or inode number, though all
/// else says that it is the same: a reboot, another mount, a copy.
///
/// A mark lies within its image, so whatever was copied brought it along with
/// the data it speaks of. That is a good reason, and no proof.
pub(crate) fn has_moved(now: &Identity, then: &Identity) -> bool {
    let pairs = now.chain.iter().zip(&then.chain);
    pairs.into_iter().any(|(now, then)| now.inode != then.inode)
}
