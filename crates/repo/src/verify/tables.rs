//! Index files and the packs they show: is each file what was written, and is
//! each pack there with its length?

use std::collections::{HashSet, VecDeque};

use highwater_store::{Listed, ObjectKey, ObjectKind, StoreErrorKind};

use crate::error::RepoError;
use crate::index::{IndexPack, need_repository, pack_key};
use crate::pack::RecordPlace;
use crate::verify::Verification;
use crate::verify::findings::FindingNo;
use crate::verify::index_scan;
use crate::verify::report::{VerifyError, VerifyPhase};
use crate::wire::{array_from_hex, wide};

/// A pack as one index file shows it.
pub(super) struct IndexedPack {
    pub(super) pack: IndexPack,
    /// Number of the file in [`Tables::files`].
    pub(super) file: usize,
    /// How many rows show a place in it, and what they add up to.
    pub(super) rows: u64,
    pub(super) sum: u128,
    pub(super) state: PackState,
}

/// What was found in the place of a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PackState {
    There,
    Missing,
    WrongLength(FindingNo),
}

/// All index files in use, in about 110 bytes per pack.
#[derive(Default)]
pub(super) struct Tables {
    pub(super) files: Vec<Listed>,
    /// By id.
    pub(super) packs: Vec<IndexedPack>,
    /// The packs that are there, by id, with their lengths.
    pub(super) there: Vec<([u8; 32], u64)>,
}

impl Tables {
    /// Returns what the index files say of a pack.
    pub(super) fn of_pack(&self, id: &[u8; 32]) -> &[IndexedPack] {
        let start = self.packs.partition_point(|it| it.pack.id < *id);
        let end = self.packs.partition_point(|it| it.pack.id <= *id);
        self.packs.get(start..end).unwrap_or_default()
    }
}

/// Returns a number for a row. Two lists of rows are equal if these add up to
/// the same, except by a chance of one in 2^100: ids are hashes, and no two
/// rows can exchange their places without another sum.
pub(super) fn row_sum(place: &RecordPlace) -> u128 {
    const ODD: u128 = 0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835;
    let (first, rest) = place.id.as_bytes().split_at(16);
    let half = |bytes: &[u8]| bytes.first_chunk().copied().map_or(0, u128::from_le_bytes);
    let fields = u128::from(place.offset) << 64
        | u128::from(place.record_len) << 32
        | u128::from(place.plain_len);
    let mixed =
        (half(first) ^ half(rest).wrapping_mul(ODD).rotate_left(64) ^ fields.wrapping_mul(ODD))
            .wrapping_mul(ODD);
    (mixed ^ mixed >> 71).wrapping_mul(ODD)
}

impl Verification<'_> {
    /// Reads all index files.
    pub(super) fn check_index(&mut self) -> Result<Tables, VerifyError> {
        let what = "read the index";
        let listed = self.store.list(ObjectKind::Index, "");
        let listed = listed.map_err(|error| RepoError::store(what, error))?;
        let total = listed
            .iter()
            .fold(0, |sum: u64, it| sum.saturating_add(it.len));
        let mut superseded: HashSet<String> = HashSet::new();
        let mut tables = Tables::default();
        let mut seen: HashSet<ObjectKey> = listed.iter().map(|file| file.key.clone()).collect();
        let mut waiting = VecDeque::from(listed);
        while let Some(file) = waiting.pop_front() {
            self.tell(VerifyPhase::Index, self.checked.index_bytes, total)?;
            let mut sums: Vec<(u64, u128)> = Vec::new();
            let scanned = index_scan::scan(self.store, &file, &mut |number, _, row| {
                if sums.len() <= number {
                    sums.resize(number.saturating_add(1), (0, 0));
                }
                if let Some((rows, sum)) = sums.get_mut(number) {
                    *rows = rows.saturating_add(1);
                    *sum = sum.wrapping_add(row_sum(&row.place));
                }
            });
            let scanned = match scanned {
                Ok(scanned) => scanned,
                // Merged into another one and deleted since it was listed.
                Err(error) if error.kind() == StoreErrorKind::NotFound => {
                    need_repository(self.store)?;
                    let listed = self.store.list(ObjectKind::Index, "");
                    let listed = listed.map_err(|error| RepoError::store(what, error))?;
                    let new = listed.into_iter().filter(|it| seen.insert(it.key.clone()));
                    waiting.extend(new);
                    continue;
                }
                Err(error) => return Err(RepoError::store(what, error).into()),
            };
            self.checked.index_files = self.checked.index_files.saturating_add(1);
            self.checked.index_bytes = self.checked.index_bytes.saturating_add(file.len);
            self.checked.rows = self.checked.rows.saturating_add(scanned.rows);
            if let Some(flaw) = scanned.flaw {
                self.findings.note(&file.key, flaw);
            }
            superseded.extend(scanned.supersedes);
            let number = tables.files.len();
            for (pack_no, pack) in scanned.packs.into_iter().enumerate() {
                let (rows, sum) = sums.get(pack_no).copied().unwrap_or_default();
                tables.packs.push(IndexedPack {
                    pack,
                    file: number,
                    rows,
                    sum,
                    state: PackState::There,
                });
            }
            tables.files.push(file);
        }
        let is_used: Vec<bool> = tables
            .files
            .iter()
            .map(|file| !superseded.contains(file.key.name()))
            .collect();
        let is_used = |file: usize| is_used.get(file).copied().unwrap_or_default();
        tables.packs.retain(|pack| is_used(pack.file));
        tables
            .packs
            .sort_unstable_by_key(|it| (it.pack.id, it.file));
        Ok(tables)
    }

    /// Looks for all packs that index files show.
    pub(super) fn check_packs(&mut self, tables: &mut Tables) -> Result<(), VerifyError> {
        let what = "list packs";
        let listed = self.store.list(ObjectKind::Pack, "");
        let mut foreign = 0_u64;
        for Listed { key, len } in listed.map_err(|error| RepoError::store(what, error))? {
            match array_from_hex::<32>(key.name()) {
                Ok(id) => tables.there.push((id, len)),
                Err(_) => foreign = foreign.saturating_add(1),
            }
        }
        tables.there.sort_unstable();
        if foreign > 0 {
            self.warnings.push(format!(
                "packs: {foreign} files whose names are not those of packs"
            ));
        }
        self.checked.packs = wide(tables.there.len());
        let bytes = tables.there.iter().map(|(_, len)| *len);
        self.checked.pack_bytes = bytes.fold(0, u64::saturating_add);
        let mut indexed = HashSet::new();
        for it in &mut tables.packs {
            indexed.insert(it.pack.id);
            let at = tables
                .there
                .binary_search_by_key(&it.pack.id, |(id, _)| *id);
            let listed = at
                .ok()
                .and_then(|at| tables.there.get(at))
                .map(|(_, len)| *len);
            let key = pack_key(&it.pack.id);
            let len = match listed {
                Some(len) => Some(len),
                // A listing may lag.
                None => match self.store.size(&key) {
                    Ok(len) => Some(len),
                    Err(error) if error.kind() == StoreErrorKind::NotFound => None,
                    Err(error) => return Err(RepoError::store("look for a pack", error).into()),
                },
            };
            it.state = match len {
                None => PackState::Missing,
                Some(len) if len == it.pack.len => PackState::There,
                Some(len) => {
                    let wanted = it.pack.len;
                    let what = format!("it has {len} bytes instead of {wanted}");
                    PackState::WrongLength(self.findings.note(&key, what))
                }
            };
        }
        let spare = tables.there.iter().filter(|(id, _)| !indexed.contains(id));
        let (count, bytes) = spare.fold((0_u64, 0_u64), |(count, bytes), (_, len)| {
            (count.saturating_add(1), bytes.saturating_add(*len))
        });
        if count > 0 {
            self.warnings.push(format!(
                "packs: {count} ({bytes} bytes) that no index file shows: a backup was \
                 interrupted or is running, or an index file is lost"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use highwater_model::ObjectId;

    use super::*;

    #[test]
    fn rows_that_exchange_any_of_their_fields_have_another_sum() {
        let row = |id, offset, plain_len| RecordPlace {
            id: ObjectId::from_bytes([id; 32]),
            offset,
            record_len: 86,
            plain_len,
        };
        let sum = |rows: [RecordPlace; 2]| rows.iter().map(row_sum).fold(0, u128::wrapping_add);
        let right = sum([row(1, 48, 10), row(2, 134, 20)]);
        assert_eq!(
            right,
            sum([row(2, 134, 20), row(1, 48, 10)]),
            "in any order"
        );
        for (what, wrong) in [
            ("offsets", [row(1, 134, 10), row(2, 48, 20)]),
            ("lengths", [row(1, 48, 20), row(2, 134, 10)]),
            ("one offset", [row(1, 49, 10), row(2, 133, 20)]),
            ("an id", [row(1, 48, 10), row(3, 134, 20)]),
        ] {
            assert_ne!(right, sum(wrong), "{what}");
        }
    }
}
