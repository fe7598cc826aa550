//! Compression of one object at a time, with contexts that are reused.

use crate::error::Flaw;

/// How chunks are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// LZ4: fast, weak.
    Lz4,
    /// Zstandard at this level.
    Zstd(i32),
}

impl Default for Compression {
    fn default() -> Self {
        Self::Zstd(1)
    }
}

/// How stored bytes were compressed, as written in a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Codec {
    Raw,
    Zstd,
    Lz4,
}

impl Codec {
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Raw => 0,
            Self::Zstd => 1,
            Self::Lz4 => 2,
        }
    }

    pub(crate) const fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Raw),
            1 => Some(Self::Zstd),
            2 => Some(Self::Lz4),
            _ => None,
        }
    }
}

/// Compresses objects of one lane, each into the room of the one before.
pub(crate) struct Compressor {
    method: Method,
    room: Vec<u8>,
}

enum Method {
    None,
    Lz4,
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Compressor {
    pub(crate) fn new(compression: Compression) -> Result<Self, Flaw> {
        let method = match compression {
            Compression::None => Method::None,
            Compression::Lz4 => Method::Lz4,
            Compression::Zstd(level) => Method::Zstd(
                zstd::bulk::Compressor::new(level)
                    .map_err(|_| Flaw("the compression level is not one of Zstandard"))?,
            ),
        };
        let room = Vec::new();
        Ok(Self { method, room })
    }

    /// Returns `plain` compressed if that saves at least a sixteenth, or else
    /// as it is.
    pub(crate) fn compress<'a>(&'a mut self, plain: &'a [u8]) -> (Codec, &'a [u8]) {
        // Less is not worth the time a restore spends on it.
        let worthwhile = plain.len().saturating_sub(plain.len().div_ceil(16));
        let room = &mut self.room;
        let (codec, written) = match &mut self.method {
            Method::None => (Codec::Raw, None),
            Method::Lz4 => {
                // With less than the longest output the codec does not begin.
                room.resize(lz4_flex::block::get_maximum_output_size(plain.len()), 0);
                let written = lz4_flex::block::compress_into(plain, room).ok();
                (Codec::Lz4, written.filter(|len| *len <= worthwhile))
            }
            Method::Zstd(context) => {
                room.resize(worthwhile, 0);
                let room = room.as_mut_slice();
                (Codec::Zstd, context.compress_to_buffer(plain, room).ok())
            }
        };
        match written.and_then(|len| room.get(..len)) {
            Some(text) => (codec, text),
            None => (Codec::Raw, plain),
        }
    }
}

/// Decompresses objects of one thread; makes its context when it is needed.
#[derive(Default)]
pub(crate) struct Decompressor(Option<zstd::bulk::Decompressor<'static>>);

impl Decompressor {
    /// Fills `into`, whose length is the plain length, or reports damage.
    pub(crate) fn decompress(
        &mut self,
        codec: Codec,
        stored: &[u8],
        into: &mut [u8],
    ) -> Result<(), Flaw> {
        let len = match codec {
            Codec::Raw if stored.len() == into.len() => {
                into.copy_from_slice(stored);
                Some(stored.len())
            }
            Codec::Raw => None,
            Codec::Zstd => {
                let new = || zstd::bulk::Decompressor::new().ok();
                let context = match &mut self.0 {
                    Some(context) => Some(context),
                    none => new().map(|context| none.insert(context)),
                };
                context.and_then(|context| context.decompress_to_buffer(stored, into).ok())
            }
            Codec::Lz4 => lz4_flex::block::decompress_into(stored, into).ok(),
        };
        if len == Some(into.len()) {
            Ok(())
        } else {
            Err(Flaw("it cannot be decompressed"))
        }
    }
}
