//! What is known of an export once it is open.

use crate::error::ProtocolError;
use crate::wire::{
    HeaderStyle, NBD_FLAG_BLOCK_STATUS_PAYLOAD, NBD_FLAG_CAN_MULTI_CONN, NBD_FLAG_READ_ONLY,
    NBD_FLAG_SEND_DF, NBD_FLAG_SEND_FLUSH, NBD_FLAG_SEND_TRIM, NBD_FLAG_SEND_WRITE_ZEROES,
    PAYLOAD_MAX,
};

/// What the server told about an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// The canonical name, if the server told one, else the name asked for.
    pub name: String,
    /// A description for people, often empty.
    pub description: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Transmission flags (`NBD_FLAG_*`), see the predicates.
    pub flags: u16,
    /// What the server wants requests to look like.
    pub block_sizes: BlockSizes,
    /// The metadata contexts both sides agreed on.
    pub contexts: Vec<MetaContext>,
    /// Which headers both sides agreed on.
    pub header_style: HeaderStyle,
}

/// Sizes that requests must respect ("Size constraints").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of this; a power of two.
    pub minimum: u32,
    /// Multiples of this are served without read-modify-write; a power of two.
    pub preferred: u32,
    /// Longest read or write; a multiple of `minimum`, at most 32 MiB.
    pub maximum: u32,
}

impl BlockSizes {
    /// What holds if the server tells nothing.
    pub(crate) const DEFAULT: Self = Self {
        minimum: 1,
        preferred: 4096,
        maximum: PAYLOAD_MAX,
    };

    /// Takes what a server told, refusing what we could not keep to.
    pub(crate) fn checked(
        minimum: u32,
        preferred: u32,
        maximum: u32,
    ) -> Result<Self, ProtocolError> {
        let possible = minimum.is_power_of_two()
            && minimum <= 1 << 16
            && preferred.is_power_of_two()
            && preferred >= minimum
            && maximum >= minimum;
        if !possible {
            return Err(ProtocolError::BlockSizes {
                minimum,
                preferred,
                maximum,
            });
        }
        let limited = maximum.min(PAYLOAD_MAX);
        let odd = limited.checked_rem(minimum).unwrap_or_default();
        Ok(Self {
            minimum,
            preferred,
            maximum: limited.saturating_sub(odd),
        })
    }
}

/// A metadata context on one connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaContext {
    /// Its name, as `base:allocation`.
    pub name: String,
    /// Its id on this connection alone.
    pub id: u32,
}

impl ExportInfo {
    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Returns whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.has(NBD_FLAG_READ_ONLY)
    }

    /// Returns whether several connections see one state of the export.
    pub fn can_multi_conn(&self) -> bool {
        self.has(NBD_FLAG_CAN_MULTI_CONN)
    }

    /// Returns whether a read may ask for a single chunk.
    pub fn can_df(&self) -> bool {
        self.has(NBD_FLAG_SEND_DF)
    }

    /// Returns whether `flush` does something.
    pub fn can_flush(&self) -> bool {
        self.has(NBD_FLAG_SEND_FLUSH)
    }

    /// Returns whether `trim` works.
    pub fn can_trim(&self) -> bool {
        self.has(NBD_FLAG_SEND_TRIM)
    }

    /// Returns whether `write_zeroes` works.
    pub fn can_write_zeroes(&self) -> bool {
        self.has(NBD_FLAG_SEND_WRITE_ZEROES)
    }

    /// Returns whether block status can be asked for one context alone.
    pub fn can_choose_contexts(&self) -> bool {
        self.header_style == HeaderStyle::Extended && self.has(NBD_FLAG_BLOCK_STATUS_PAYLOAD)
    }

    /// Returns the context of that name, if both sides agreed on it.
    pub fn context(&self, name: &str) -> Option<&MetaContext> {
        self.contexts.iter().find(|context| context.name == name)
    }
}

/// One export of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedExport {
    /// Its name.
    pub name: String,
    /// A description for people, often empty.
    pub description: String,
}
