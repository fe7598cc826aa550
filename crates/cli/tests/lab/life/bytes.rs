//! What a disk holds, as a model knows it: bytes, and nothing clever.
//!
//! Copies share blocks that did not change since, so that a model can keep each
//! restore point of a long life whole.

use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};

const BLOCK: u64 = 64 << 10;

/// The content of a disk. Cheap to copy.
#[derive(Clone)]
pub(super) struct Bytes {
    len: u64,
    /// `None` is zero. The last one is whole, and zero behind the end.
    blocks: Vec<Option<Arc<Vec<u8>>>>,
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.len)
    }
}

impl Bytes {
    pub(super) fn zeroes(len: u64) -> Self {
        let mut it = Self {
            len: 0,
            blocks: Vec::new(),
        };
        it.resize(len);
        it
    }

    /// Reads a raw image.
    pub(super) fn read(image: &Path) -> Result<Self> {
        let bytes = fs::read(image)?;
        let blocks = bytes.chunks(usize::try_from(BLOCK)?);
        let keep = |block: &[u8]| {
            let mut whole = block.to_vec();
            whole.resize(usize::try_from(BLOCK).ok()?, 0);
            whole.iter().any(|it| *it != 0).then(|| Arc::new(whole))
        };
        Ok(Self {
            len: bytes.len() as u64,
            blocks: blocks.map(keep).collect(),
        })
    }

    pub(super) const fn len(&self) -> u64 {
        self.len
    }

    /// Writes this byte over and over.
    pub(super) fn fill(&mut self, offset: u64, len: u64, byte: u8) {
        assert!(offset + len <= self.len, "a write within the disk");
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let stop = end.min((at / BLOCK + 1) * BLOCK);
            let place = &mut self.blocks[index(at / BLOCK)];
            let within = index(at % BLOCK)..index(at % BLOCK) + index(stop - at);
            if byte == 0 && stop - at == BLOCK {
                *place = None;
            } else if byte != 0 || place.is_some() {
                let block = place.get_or_insert_with(|| Arc::new(vec![0; index(BLOCK)]));
                Arc::make_mut(block)[within].fill(byte);
                // Zero has one form only, so that blocks can be compared.
                if byte == 0 && block.iter().all(|it| *it == 0) {
                    *place = None;
                }
            }
            at = stop;
        }
    }

    /// What is new is zero; what is cut off is gone.
    pub(super) fn resize(&mut self, len: u64) {
        if len < self.len {
            let tail = (len.div_ceil(BLOCK) * BLOCK).min(self.len);
            self.fill(len, tail - len, 0);
        }
        self.len = len;
        self.blocks.resize(index(len.div_ceil(BLOCK)), None);
    }

    /// Returns the byte that a range consists of, if it is one.
    pub(super) fn uniform(&self, offset: u64, len: u64) -> Option<u8> {
        let byte = self.at(offset);
        let is_it = (offset..offset + len).all(|at| self.at(at) == byte);
        is_it.then_some(byte)
    }

    fn at(&self, offset: u64) -> u8 {
        let block = self.blocks[index(offset / BLOCK)].as_ref();
        block.map_or(0, |block| block[index(offset % BLOCK)])
    }

    /// Fails unless a raw image holds the same.
    pub(super) fn check(&self, image: &Path) -> Result<()> {
        let found = Self::read(image).with_context(|| format!("{}", image.display()))?;
        ensure!(
            found.len == self.len,
            "{} has {} bytes instead of {}",
            image.display(),
            found.len,
            self.len
        );
        let pairs = self.blocks.iter().zip(&found.blocks).zip(0..);
        let differ: Vec<u64> = pairs
            .filter(|((due, is), _)| due != is)
            .map(|(_, number)| number)
            .collect();
        let Some(first) = differ.first() else {
            return Ok(());
        };
        let at = (first * BLOCK..self.len).find(|at| self.at(*at) != found.at(*at));
        let at = at.unwrap_or_default();
        anyhow::bail!(
            "{} differs in {} blocks of 64 KiB, {differ:?}; first at byte {at}: {:#04x} instead of {:#04x}",
            image.display(),
            differ.len(),
            found.at(at),
            self.at(at)
        )
    }
}

fn index(number: u64) -> usize {
    usize::try_from(number).expect("a small disk")
}

#[test]
fn the_bytes_of_a_model_are_those_of_a_plain_vector() -> Result<()> {
    use highwater_testkit::workload::Random;
    let mut random = Random(5);
    let (mut bytes, mut plain) = (Bytes::zeroes(200_000), vec![0_u8; 200_000]);
    let file = tempfile::NamedTempFile::new()?;
    for round in 0..300 {
        let len = 1 + random.below(150_000).min(bytes.len() - 1);
        let offset = random.below(bytes.len() - len + 1);
        let byte = u8::try_from(random.below(3))?;
        let before = bytes.clone();
        bytes.fill(offset, len, byte);
        plain[index(offset)..index(offset + len)].fill(byte);
        if round % 7 == 0 {
            let new = 100_000 + random.below(200_000);
            bytes.resize(new);
            plain.resize(index(new), 0);
        }
        fs::write(file.path(), &plain)?;
        bytes.check(file.path())?;
        ensure!(before.uniform(offset, len) == Some(byte) || before.check(file.path()).is_err());
    }
    plain[77] ^= 1;
    fs::write(file.path(), &plain)?;
    ensure!(bytes.check(file.path()).is_err());
    Ok(())
}
