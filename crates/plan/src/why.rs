//! The named reasons: why a disk is read as a whole, or not at all.

/// Why a disk is read as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Why {
    /// Nothing of this VM is in the repository yet.
    FirstBackup,
    /// This disk is in no earlier point.
    NewDisk,
    /// No earlier backup left a mark on this disk.
    NoMarkYet,
    /// Serial number or device name differ: another disk has taken its place.
    DiskSwapped,
    /// The images it consists of are others.
    ChainChanged,
    /// The disk became smaller.
    DiskShrank,
    /// The image file was replaced by another of the same name.
    ImageReplaced,
    /// The image file cannot be seen, so nobody knows whether it is the same.
    ImageUnseen,
    /// A backing file was written to.
    BackingChanged,
    /// Nobody can tell whether a backing file was written to: it is a device,
    /// behind a server, or cannot be seen.
    BackingUnseen,
    /// The mark's bitmap is gone.
    BitmapMissing,
    /// The mark's bitmap was not closed properly.
    BitmapInconsistent,
    /// The mark's bitmap does not record.
    BitmapNotRecording,
    /// The mark's bitmap is not kept in the image.
    BitmapNotPersistent,
    /// The mark's bitmap has another granularity than it had.
    BitmapGranularity,
    /// Writes are missing from the mark's bitmap.
    BitmapLied,
    /// Somebody made a mark of the same name.
    MarkRemade,
    /// The hypervisor's process cannot be identified, and the mark's bitmap is
    /// only in that.
    ProcessUnknown,
    /// The hypervisor forgot the mark and refused to be told.
    MarkRefused,
    /// Raw images cannot carry marks.
    NoMarksOnRaw,
    /// qcow2 version 2 cannot carry marks.
    NoMarksOnQcow2V2,
    /// The parent's tree cannot be read.
    ParentDamaged,
    /// The parent was made with another chunk size.
    ChunkSizeDiffers,
}

impl Why {
    /// Returns the word of JSON and manifest.
    pub const fn word(self) -> &'static str {
        match self {
            Self::FirstBackup => "first-backup",
            Self::NewDisk => "new-disk",
            Self::NoMarkYet => "no-mark-yet",
            Self::DiskSwapped => "disk-swapped",
            Self::ChainChanged => "chain-changed",
            Self::DiskShrank => "disk-shrank",
            Self::ImageReplaced => "image-replaced",
            Self::ImageUnseen => "image-unseen",
            Self::BackingChanged => "backing-changed",
            Self::BackingUnseen => "backing-unseen",
            Self::BitmapMissing => "bitmap-missing",
            Self::BitmapInconsistent => "bitmap-inconsistent",
            Self::BitmapNotRecording => "bitmap-not-recording",
            Self::BitmapNotPersistent => "bitmap-not-persistent",
            Self::BitmapGranularity => "bitmap-granularity",
            Self::BitmapLied => "bitmap-lied",
            Self::MarkRemade => "mark-remade",
            Self::ProcessUnknown => "process-unknown",
            Self::MarkRefused => "mark-refused",
            Self::NoMarksOnRaw => "no-marks-on-raw",
            Self::NoMarksOnQcow2V2 => "no-marks-on-qcow2-v2",
            Self::ParentDamaged => "parent-damaged",
            Self::ChunkSizeDiffers => "chunk-size-differs",
        }
    }

    /// Returns the reason as a person reads it.
    pub const fn sentence(self) -> &'static str {
        match self {
            Self::FirstBackup => "first backup of this VM",
            Self::NewDisk => "first backup of this disk",
            Self::NoMarkYet => "no earlier backup left a mark on this disk",
            Self::DiskSwapped => "another disk has taken this place",
            Self::ChainChanged => "its image chain is another one",
            Self::DiskShrank => "the disk became smaller",
            Self::ImageReplaced => "its image file was replaced",
            Self::ImageUnseen => "its image file cannot be seen from here",
            Self::BackingChanged => "a backing file was changed",
            Self::BackingUnseen => "a backing file cannot be checked for changes",
            Self::BitmapMissing => "bitmap missing",
            Self::BitmapInconsistent => "bitmap inconsistent",
            Self::BitmapNotRecording => "bitmap not recording",
            Self::BitmapNotPersistent => "bitmap not persistent",
            Self::BitmapGranularity => "the bitmap's granularity is another one",
            Self::BitmapLied => "bitmap lied: it calls blocks clean that were written to",
            Self::MarkRemade => "mark was re-made by somebody else",
            Self::ProcessUnknown => {
                "nobody can tell whether the bitmap is the one made with the mark"
            }
            Self::MarkRefused => "the hypervisor forgot the mark and refused it",
            Self::NoMarksOnRaw => "raw images cannot carry marks",
            Self::NoMarksOnQcow2V2 => "qcow2 version 2 cannot carry marks",
            Self::ParentDamaged => "the parent's tree cannot be read",
            Self::ChunkSizeDiffers => "the parent has another chunk size",
        }
    }
}

/// Why a disk is not read at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// The export would show another node than the guest writes to.
    GraphChanged,
    /// Whether it would cannot be learned.
    GraphUnknown,
    /// Something uses the mark's bitmap.
    BitmapBusy,
    /// The level wants an increment and there is none, for this reason.
    NoIncrement(Why),
}
