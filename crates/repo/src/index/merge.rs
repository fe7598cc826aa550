//! Makes one index file of many small ones.
//!
//! ```text
//! plan    which files: eight of one size, and all smaller ones with them
//! take    each read whole and proven by its name; a damaged one stays behind
//! store   one put, durable; it lists what it replaces          <- from here on
//! delete  what was replaced                                       nobody needs them
//! ```
//!
//! No row is ever dropped, not even one whose pack seems to be missing: a store
//! may lag, and another copy of the object may be the one that is gone. So two
//! hosts that merge the same files at the same time leave some rows twice and
//! lose none, and a crash at any moment leaves files that say the same.

use std::collections::HashMap;

use highwater_store::{Listed, ObjectKey, ObjectKind, Store, StoreErrorKind};

use crate::error::{Flaw, RepoError};
use crate::index::file::LoadError;
use crate::index::format::{
    BLOCK_LEN, HEADER_LEN, Header, IndexPack, IndexRow, Tables, decode_block, encode, rows_in_block,
};
use crate::wire::{array_from_hex, narrow, to_hex, wide};

/// Files of one size that make a merge worth while. A row is thus written anew
/// once for each eightfold growth, four times in all.
const FAN_IN: usize = 8;
/// Where the first tier begins; each is eight times the one before.
const TIER_LEN: u64 = 4 << 10;
/// Longest merged file. It is made in memory, rows and bytes: 70 MiB.
const MERGED_LEN_MAX: u64 = 32 << 20;
/// A file of this length is left alone: about 170 000 objects.
const FINAL_LEN: u64 = MERGED_LEN_MAX / 4;
/// Files of one merge; those that are left wait for the next.
const INPUTS_MAX: usize = 256;

/// Returns the files to merge, the smallest first; none if it does not pay.
pub(crate) fn plan(mut files: Vec<Listed>) -> Vec<Listed> {
    files.retain(|file| file.len < FINAL_LEN);
    let mut counts: HashMap<u32, usize> = HashMap::new();
    for file in &files {
        let count = counts.entry(tier(file.len)).or_default();
        *count = count.saturating_add(1);
    }
    let full = counts.iter().filter(|(_, count)| **count >= FAN_IN);
    let Some(highest) = full.map(|(tier, _)| *tier).max() else {
        return Vec::new();
    };
    files.retain(|file| tier(file.len) <= highest);
    files.sort_unstable_by(|a, b| (a.len, &a.key).cmp(&(b.len, &b.key)));
    let mut sum = 0_u64;
    files
        .into_iter()
        .take(INPUTS_MAX)
        .take_while(|file| {
            sum = sum.saturating_add(file.len);
            sum <= MERGED_LEN_MAX
        })
        .collect()
}

fn tier(len: u64) -> u32 {
    let bits = len.max(TIER_LEN).ilog2().saturating_sub(TIER_LEN.ilog2());
    // Three bits: each tier is eight times the one before.
    bits / 3
}

/// A merge under way.
#[derive(Default)]
pub(crate) struct Merge {
    replaced: Vec<ObjectKey>,
    packs: Vec<IndexPack>,
    pack_numbers: HashMap<([u8; 32], u64, u8), u32>,
    rows: Vec<IndexRow>,
}

/// A merged file that is durable.
pub(crate) struct Merged {
    pub(crate) listed: Listed,
    /// What may be deleted now.
    pub(crate) replaced: Vec<ObjectKey>,
}

impl Merge {
    /// Returns how many files were taken.
    pub(crate) fn inputs(&self) -> usize {
        self.replaced.len()
    }

    /// Takes all rows of a file, or, on an error, none.
    pub(crate) fn take(&mut self, store: &dyn Store, listed: &Listed) -> Result<(), LoadError> {
        let bytes = match store.get(&listed.key, FINAL_LEN) {
            Err(error) if error.kind() == StoreErrorKind::TooLarge => {
                return Err(Flaw("its length has changed").into());
            }
            other => other?,
        };
        // All of it counts from here on, so all of it is proven.
        if blake3::hash(&bytes).to_hex().as_str() != listed.key.name() {
            return Err(Flaw("its hash is not its name").into());
        }
        let (packs, rows) = decode(&bytes)?;
        let numbers: Vec<u32> = packs.iter().map(|pack| self.number_of(pack)).collect();
        self.rows.reserve(rows.len());
        for mut row in rows {
            let at = usize::try_from(row.pack_no).unwrap_or(usize::MAX);
            row.pack_no = numbers.get(at).copied().unwrap_or(u32::MAX);
            self.rows.push(row);
        }
        self.replaced.push(listed.key.clone());
        Ok(())
    }

    fn number_of(&mut self, pack: &IndexPack) -> u32 {
        let next = u32::try_from(self.packs.len()).unwrap_or(u32::MAX);
        let key = (pack.id, pack.len, pack.kind.code());
        *self.pack_numbers.entry(key).or_insert_with(|| {
            self.packs.push(*pack);
            next
        })
    }

    /// Makes the merged file durable.
    pub(crate) fn store(mut self, store: &dyn Store) -> Result<Merged, RepoError> {
        let names = self.replaced.iter().map(|key| array_from_hex(key.name()));
        let names: Vec<[u8; 32]> = names.filter_map(Result::ok).collect();
        let bytes = encode(&names, &self.packs, &mut self.rows);
        drop(self.rows);
        let name = to_hex(blake3::hash(&bytes).as_bytes());
        let key = ObjectKey::new(ObjectKind::Index, name).expect("hexadecimal is a good name");
        let what = || format!("store merged index file `{key}`");
        match store.put(&key, &[&bytes]) {
            Ok(()) => {}
            Err(error) if error.kind() == StoreErrorKind::AlreadyExists => {
                // Another host has merged the same files, or we did and died.
                // Before they are deleted it must be known to be whole.
                let there = store.get(&key, wide(bytes.len()));
                if there.map_err(|error| RepoError::store(what(), error))? != bytes {
                    return Err(RepoError::damaged(
                        what(),
                        Flaw("what lies there is damaged"),
                    ));
                }
            }
            Err(error) => return Err(RepoError::store(what(), error)),
        }
        let len = wide(bytes.len());
        Ok(Merged {
            listed: Listed { key, len },
            replaced: self.replaced,
        })
    }
}

/// Takes a whole index file apart.
fn decode(bytes: &[u8]) -> Result<(Vec<IndexPack>, Vec<IndexRow>), Flaw> {
    let too_short = Flaw("it ends too early");
    let (head, rest) = bytes.split_first_chunk::<HEADER_LEN>().ok_or(too_short)?;
    let header = Header::decode(head)?;
    let counts = header.counts;
    if counts.file_len() != Some(wide(bytes.len())) {
        return Err(Flaw("its length does not fit its counts"));
    }
    let tables_len = counts
        .tables_len()
        .ok_or(Flaw("its counts are impossible"))?;
    let (tables, blocks) = rest
        .split_at_checked(narrow(tables_len)?)
        .ok_or(Flaw("it ends too early"))?;
    let tables = Tables::decode(&header, tables)?;
    let mut rows = Vec::with_capacity(narrow(counts.rows)?);
    for (number, block) in (0_u64..).zip(blocks.as_chunks::<BLOCK_LEN>().0) {
        rows.extend(decode_block(block, rows_in_block(&counts, number)?)?);
    }
    let known = wide(tables.packs.len());
    if rows.iter().any(|row| u64::from(row.pack_no) >= known) {
        return Err(Flaw("a row names no pack"));
    }
    Ok((tables.packs, rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(lens: &[u64]) -> Vec<Listed> {
        let listed = |(n, len): (usize, &u64)| Listed {
            key: ObjectKey::new(ObjectKind::Index, format!("{n:04}")).unwrap(),
            len: *len,
        };
        lens.iter().enumerate().map(listed).collect()
    }

    fn check(lens: &[u64], expected: &[u64]) {
        let lens_of = |files: Vec<Listed>| files.iter().map(|file| file.len).collect::<Vec<_>>();
        assert_eq!(lens_of(plan(files(lens))), expected, "{lens:?}");
    }

    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;

    #[test]
    fn eight_of_one_size_are_merged_with_all_smaller_ones() {
        check(&[], &[]);
        check(&[4 * KIB; 7], &[]);
        check(&[4 * KIB; 8], &[4 * KIB; 8]);
        let mixed = [&[40 * KIB; 8][..], &[4 * KIB; 3], &[MIB; 7]].concat();
        check(&mixed, &[&[4 * KIB; 3][..], &[40 * KIB; 8]].concat());
    }

    #[test]
    fn large_files_are_left_alone_and_a_merge_is_never_too_large() {
        check(&[FINAL_LEN; 1000], &[]);
        check(&[FINAL_LEN - 1; 20], &[FINAL_LEN - 1; 4]);
        check(&[4 * KIB; 1000], &[4 * KIB; INPUTS_MAX]);
    }

    #[test]
    fn however_many_backups_there_were_few_small_files_are_left() {
        let mut lens: Vec<u64> = Vec::new();
        let (mut written, mut most) = (0, 0);
        for _ in 0..20_000 {
            lens.push(5 * KIB);
            let chosen = plan(files(&lens));
            let merged: u64 = chosen.iter().map(|file| file.len).sum();
            for file in &chosen {
                lens.remove(lens.iter().position(|len| *len == file.len).unwrap());
            }
            lens.extend((merged > 0).then_some(merged));
            written += merged;
            let small = lens.iter().filter(|len| **len < FINAL_LEN).count();
            most = most.max(small);
        }
        assert!(most <= 40, "{most} files");
        assert!(written <= 20_000 * 5 * KIB * 5, "{written} bytes");
    }
}
