//! What a qcow2 image says about itself: size, chain, bitmaps. Reads only.
//!
//! A VM that is off has no QEMU to ask, and `qemu-img info` does not tell whether
//! QEMU would believe the bitmaps it lists, nor how much they call dirty. Numbers
//! and names are those of QEMU's `docs/interop/qcow2.rst`, limits those of its
//! code: what QEMU refuses is refused here.
//!
//! Images are written by guests and by strangers, so each length is held against
//! a limit before it is believed, and what is read in all is bounded
//! ([`Qcow2Reader::count_dirty`]).

#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

mod bitmaps;
mod header;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

pub use bitmaps::{BitmapState, StoredBitmap};
pub use header::{DataFile, ImageEncryption, Qcow2Header};

/// Where the bytes of an image come from.
pub trait ReadAt {
    /// Fills `buf` from the bytes at `offset`; fails if there are fewer.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Fills as much of `buf` as there is, and returns how much.
    fn read_up_to(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize>;
}

impl ReadAt for File {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(buf, offset)
    }

    fn read_up_to(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0_usize;
        while let Some(rest) = buf.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let at = offset.saturating_add(u64::try_from(filled).unwrap_or(u64::MAX));
            match FileExt::read_at(self, rest, at) {
                Ok(0) => break,
                Ok(count) => filled = filled.saturating_add(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }
}

impl ReadAt for [u8] {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if self.read_up_to(offset, buf)? == buf.len() {
            return Ok(());
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }

    fn read_up_to(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let there = self.get(start..).unwrap_or_default();
        let count = there.len().min(buf.len());
        if let (Some(to), Some(from)) = (buf.get_mut(..count), there.get(..count)) {
            to.copy_from_slice(from);
        }
        Ok(count)
    }
}

impl<R: ReadAt + ?Sized> ReadAt for &R {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        (**self).read_at(offset, buf)
    }

    fn read_up_to(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        (**self).read_up_to(offset, buf)
    }
}

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Qcow2Error {
    /// The file could not be read, or is cut off.
    #[error("cannot read the image")]
    Read(#[from] io::Error),
    /// Some field says what no image of QEMU's says.
    #[error("cannot understand the image: {0}")]
    Malformed(&'static str),
    /// More would have to be read than the caller allows.
    #[error("its bitmaps are too large to be counted")]
    TooMuch,
    /// It needs a version or feature that is not known here.
    #[error("cannot understand the image: it needs {0}")]
    Unknown(String),
}

/// An image that is being looked at.
#[derive(Debug)]
pub struct Qcow2Reader<R> {
    image: R,
    header: Qcow2Header,
}

impl<R: ReadAt> Qcow2Reader<R> {
    /// Reads the header; `None` if this is no qcow2.
    pub fn open(image: R) -> Result<Option<Self>, Qcow2Error> {
        let header = Qcow2Header::read(&image)?;
        Ok(header.map(|header| Self { image, header }))
    }

    /// What the header says.
    pub const fn header(&self) -> &Qcow2Header {
        &self.header
    }

    /// Lists the bitmaps that QEMU would find when it opens the image: none if a
    /// program that does not know of bitmaps has written to it since.
    pub fn bitmaps(&self) -> Result<Vec<StoredBitmap>, Qcow2Error> {
        bitmaps::list(&self.image, &self.header)
    }

    /// Returns how many bytes a bitmap calls dirty. At most `budget_bytes` are
    /// read, and taken off it; one that needs more is an error.
    pub fn count_dirty(
        &self,
        bitmap: &StoredBitmap,
        budget_bytes: &mut u64,
    ) -> Result<u64, Qcow2Error> {
        bitmaps::count_dirty(&self.image, &self.header, bitmap, budget_bytes)
    }
}

/// Reads fields from the front of bytes.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8], Qcow2Error> {
        let (taken, rest) = self
            .0
            .split_at_checked(count)
            .ok_or(Qcow2Error::Malformed("it is cut off"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Qcow2Error> {
        let taken = self.bytes(N)?;
        taken
            .try_into()
            .map_err(|_| Qcow2Error::Malformed("it is cut off"))
    }

    fn u8(&mut self) -> Result<u8, Qcow2Error> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Result<u16, Qcow2Error> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, Qcow2Error> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, Qcow2Error> {
        self.array().map(u64::from_be_bytes)
    }
}
