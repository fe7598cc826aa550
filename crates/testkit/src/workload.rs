//! Guest writes drawn from a seed, and the disk they must leave behind.
//!
//! The same seed gives the same writes, so a failed test can be run again. The
//! model is a plain copy of the disk in memory: so simple that it is right.

use std::path::Path;

use anyhow::{Result, bail, ensure};

use crate::KIB;
use crate::bare::BareVm;
use crate::vm::Vm;

/// One write of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestWrite {
    /// What is done.
    pub kind: WriteKind,
    /// Where it begins.
    pub offset: u64,
    /// How many bytes it covers.
    pub len: u64,
}

/// The ways in which a guest changes a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteKind {
    /// Data: this byte, over and over. Never 0.
    Data(u8),
    /// Zeroes, without giving space back.
    Zeroes,
    /// Zeroes, giving space back.
    ZeroesUnmap,
    /// The guest no longer cares; here that reads as zeroes.
    Discard,
    /// The bytes that are there already: dirty, and yet the same.
    Rewrite(u8),
}

/// A VM that writes as it is told.
pub trait Writes {
    /// Lets the guest write: commands of `qemu-io` on one of its disks.
    fn write_all(&self, disk: &str, commands: &[String]) -> Result<()>;
}

impl Writes for Vm {
    fn write_all(&self, disk: &str, commands: &[String]) -> Result<()> {
        Self::write_all(self, disk, commands)
    }
}

impl Writes for BareVm {
    fn write_all(&self, disk: &str, commands: &[String]) -> Result<()> {
        Self::write_all(self, disk, commands)
    }
}

/// An endless sequence of writes, and the disk they make.
#[derive(Debug, Clone)]
pub struct Workload {
    random: Random,
    model: Vec<u8>,
}

impl Workload {
    /// Begins with a disk of zeroes.
    ///
    /// # Panics
    /// If the disk is smaller than 1 MiB: there would be no room to scatter.
    pub fn new(seed: u64, size_bytes: usize) -> Self {
        assert!(size_bytes >= 1 << 20, "a disk of 1 MiB at least");
        Self {
            random: Random(seed),
            model: vec![0; size_bytes],
        }
    }

    /// Draws the next write and carries it out on the model.
    pub fn step(&mut self) -> GuestWrite {
        let write = self.draw();
        self.apply(write);
        write
    }

    /// Draws `count` writes and lets the guest do them on a disk that agrees
    /// with the model so far; afterwards it still does.
    pub fn run(&mut self, vm: &impl Writes, disk: &str, count: usize) -> Result<()> {
        let mut commands = Vec::new();
        for _ in 0..count {
            commands.push(self.step().to_qemu_io());
        }
        vm.write_all(disk, &commands)
    }

    /// Follows a disk that was made larger: its new part is zero.
    ///
    /// # Panics
    /// If the disk became smaller.
    pub fn grow(&mut self, size_bytes: usize) {
        assert!(size_bytes >= self.model.len(), "a disk only grows here");
        self.model.resize(size_bytes, 0);
    }

    /// Returns the disk as it must be now.
    pub fn model(&self) -> &[u8] {
        &self.model
    }

    /// Fails unless a raw image is the model, byte for byte.
    pub fn check(&self, raw_image: &Path) -> Result<()> {
        let bytes = std::fs::read(raw_image)?;
        ensure!(
            bytes.len() == self.model.len(),
            "{} has {} bytes instead of {}",
            raw_image.display(),
            bytes.len(),
            self.model.len()
        );
        if let Some(at) = bytes
            .iter()
            .zip(&self.model)
            .position(|(is, due)| is != due)
        {
            bail!(
                "{} differs at offset {at}: {:#04x} instead of {:#04x}",
                raw_image.display(),
                bytes[at],
                self.model[at]
            );
        }
        Ok(())
    }

    fn draw(&mut self) -> GuestWrite {
        // Half the writes below a cluster, the others one cluster or several:
        // both ways of copy-before-write, and both of storing an increment.
        let len = match self.random.below(8) {
            0..4 => 4 * KIB,
            4..7 => 64 * KIB,
            _ => 64 * KIB * (2 + self.random.below(6)),
        };
        let size = self.model.len() as u64;
        let fill = u8::try_from(1 + self.random.below(255)).unwrap_or(u8::MAX);
        // The end of a disk is nobody's multiple, so it is aimed at.
        if self.random.below(16) == 0 {
            let (offset, kind) = (size - len, WriteKind::Data(fill));
            return GuestWrite { kind, offset, len };
        }
        let offset = self.random.below((size - len) / len + 1) * len;
        let kind = match self.random.below(16) {
            0 | 1 => WriteKind::Zeroes,
            2 => WriteKind::ZeroesUnmap,
            3 | 4 => WriteKind::Discard,
            5 | 6 => self.rewrite(offset, len),
            _ => WriteKind::Data(fill),
        };
        GuestWrite { kind, offset, len }
    }

    /// `qemu-io` writes one byte over and over: only such a place can be rewritten.
    fn rewrite(&self, offset: u64, len: u64) -> WriteKind {
        let place = &self.model[range(offset, len)];
        if place.iter().all(|byte| *byte == place[0]) {
            WriteKind::Rewrite(place[0])
        } else {
            WriteKind::Data(place[0].max(1))
        }
    }

    fn apply(&mut self, write: GuestWrite) {
        let fill = match write.kind {
            WriteKind::Data(byte) | WriteKind::Rewrite(byte) => byte,
            WriteKind::Zeroes | WriteKind::ZeroesUnmap | WriteKind::Discard => 0,
        };
        self.model[range(write.offset, write.len)].fill(fill);
    }
}

impl GuestWrite {
    /// Returns it as a command of `qemu-io`.
    pub fn to_qemu_io(self) -> String {
        let Self { kind, offset, len } = self;
        match kind {
            WriteKind::Data(byte) | WriteKind::Rewrite(byte) => {
                format!("write -P {byte} {offset} {len}")
            }
            WriteKind::Zeroes => format!("write -z {offset} {len}"),
            WriteKind::ZeroesUnmap => format!("write -z -u {offset} {len}"),
            // A discard may be ignored below a cluster; zeroes may not, and
            // only so the model is right about every byte.
            WriteKind::Discard if len < 64 * KIB => format!("write -z -u {offset} {len}"),
            WriteKind::Discard => format!("discard {offset} {len}"),
        }
    }
}

fn range(offset: u64, len: u64) -> std::ops::Range<usize> {
    let start = usize::try_from(offset).expect("an offset within the model");
    let len = usize::try_from(len).expect("a length within the model");
    start..start + len
}

/// Numbers from a seed: splitmix64. Good enough to scatter writes, and without
/// a dependency whose next version draws other numbers.
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    /// Returns the next number.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Returns the next number below `limit`, which is not 0.
    pub const fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::mem::discriminant;

    use super::*;

    #[test]
    fn a_seed_draws_every_kind_within_the_disk_and_always_the_same() {
        let mut one = Workload::new(7, 3 << 20);
        let mut two = Workload::new(7, 3 << 20);
        let mut kinds = HashSet::new();
        let mut end = 0;
        for _ in 0..1000 {
            let write = one.step();
            assert_eq!(write, two.step());
            assert!(write.offset + write.len <= 3 << 20);
            end = end.max(write.offset + write.len);
            kinds.insert(discriminant(&write.kind));
        }
        assert_eq!(kinds.len(), 5);
        assert_eq!(end, 3 << 20);
        assert!(one.model() == two.model());
        assert_ne!(
            Workload::new(8, 3 << 20).step(),
            Workload::new(7, 3 << 20).step()
        );
    }
}
