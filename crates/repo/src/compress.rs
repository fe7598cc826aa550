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

/// Compresses objects of one lane.
pub(crate) enum Compressor {
    None,
    /// With room for the longest output: with less the codec does not begin.
    Lz4(Vec<u8>),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Compressor {
    pub(crate) fn new(compression: Compression) -> Result<Self, Flaw> {
        Ok(match compression {
            Compression::None => Self::None,
            Compression::Lz4 => Self::Lz4(Vec::new()),
            Compression::Zstd(level) => Self::Zstd(
                zstd::bulk::Compressor::new(level)
                    .map_err(|_| Flaw("the compression level is not one of Zstandard"))?,
            ),
        })
    }

    /// Writes `plain` to the front of `into`, compressed if that saves at least
    /// a sixteenth, and returns how and how many bytes. `into` must have room
    /// for `plain` as it is.
    pub(crate) fn compress(&mut self, plain: &[u8], into: &mut [u8]) -> (Codec, usize) {
        // Less is not worth the time a restore spends on it.
        let worthwhile = plain.len().saturating_sub(plain.len().div_ceil(16));
        let (codec, written) = match self {
            Self::None => (Codec::Raw, None),
            Self::Lz4(room) => {
                room.resize(lz4_flex::block::get_maximum_output_size(plain.len()), 0);
                let written = lz4_flex::block::compress_into(plain, room).ok();
                let kept = written
                    .and_then(|written| room.get(..written))
                    .filter(|kept| kept.len() <= worthwhile);
                if let Some((to, from)) =
                    kept.and_then(|kept| Some((into.get_mut(..kept.len())?, kept)))
                {
                    to.copy_from_slice(from);
                }
                (Codec::Lz4, kept.map(<[u8]>::len))
            }
            Self::Zstd(context) => {
                let room = into.get_mut(..worthwhile).unwrap_or_default();
                (Codec::Zstd, context.compress_to_buffer(plain, room).ok())
            }
        };
        if let Some(written) = written {
            return (codec, written);
        }
        into.get_mut(..plain.len())
            .expect("the caller leaves room for the plain bytes")
            .copy_from_slice(plain);
        (Codec::Raw, plain.len())
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
