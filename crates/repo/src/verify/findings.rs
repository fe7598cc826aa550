//! Collects what is damaged: one finding per object, whatever leads to it.

use std::collections::HashMap;
use std::error::Error;
use std::io;

use highwater_model::ObjectId;
use highwater_store::{ObjectKey, ObjectKind, StoreError, StoreErrorKind};

use crate::error::{RepoError, RepoErrorKind};
use crate::verify::report::{Damage, DamagedObject};

/// Number of a finding.
pub(super) type FindingNo = usize;

/// All findings so far.
#[derive(Default)]
pub(super) struct Findings {
    list: Vec<Damage>,
    numbers: HashMap<DamagedObject, FindingNo>,
}

impl Findings {
    /// Notes what is wrong with an object. What is said first stays: later
    /// words about the same object are consequences.
    pub(super) fn note(&mut self, key: &ObjectKey, what: impl Into<String>) -> FindingNo {
        self.note_object(
            DamagedObject {
                kind: key.kind(),
                path: Some(key.path()),
            },
            what,
        )
    }

    /// Notes that objects are missing of which nobody knows the names.
    pub(super) fn note_unnamed(&mut self, kind: ObjectKind, what: impl Into<String>) -> FindingNo {
        self.note_object(DamagedObject { kind, path: None }, what)
    }

    fn note_object(&mut self, object: DamagedObject, what: impl Into<String>) -> FindingNo {
        if let Some(number) = self.numbers.get(&object) {
            return *number;
        }
        let number = self.list.len();
        self.numbers.insert(object.clone(), number);
        self.list.push(Damage {
            object,
            what: what.into(),
            points: Vec::new(),
        });
        number
    }

    pub(super) fn get_mut(&mut self, number: FindingNo) -> Option<&mut Damage> {
        self.list.get_mut(number)
    }

    /// Returns whether anything is known to be wrong with an object.
    pub(super) fn names(&self, key: &ObjectKey) -> bool {
        self.numbers.contains_key(&DamagedObject {
            kind: key.kind(),
            path: Some(key.path()),
        })
    }

    /// Returns what is known of one kind of objects.
    pub(super) fn of_kind(&self, kind: ObjectKind) -> impl Iterator<Item = FindingNo> {
        let numbered = self.list.iter().enumerate();
        numbered
            .filter(move |(_, damage)| damage.object.kind == kind)
            .map(|(number, _)| number)
    }

    /// Returns all, sorted by what they hurt and by name.
    pub(super) fn into_damage(self) -> Vec<Damage> {
        let mut list = self.list;
        list.sort_by(|one, two| {
            let key = |damage: &Damage| (damage.points.is_empty(), damage.object.clone());
            key(one).cmp(&key(two))
        });
        list
    }
}

/// Objects that are remembered as unreadable: 64 GiB of 64 KiB chunks. Beyond
/// this the report says that it is not complete.
const BAD_MAX: usize = 1 << 20;

/// Chunks and pages that cannot be read, and whose fault that is.
#[derive(Default)]
pub(super) struct BadObjects {
    /// `None` where the guilty object is not known yet.
    ids: HashMap<ObjectId, Option<FindingNo>>,
    /// Chunks that are not as long as one place in an image demands.
    wrong_len: HashMap<(ObjectId, u32), FindingNo>,
    truncated: bool,
}

impl BadObjects {
    pub(super) fn insert(&mut self, id: ObjectId, finding: Option<FindingNo>) {
        if self.ids.len() >= BAD_MAX && !self.ids.contains_key(&id) {
            self.truncated = true;
            return;
        }
        let known = self.ids.entry(id).or_insert(finding);
        if known.is_none() {
            *known = finding;
        }
    }

    pub(super) fn insert_wrong_len(&mut self, id: ObjectId, expected: u32, finding: FindingNo) {
        if self.wrong_len.len() >= BAD_MAX {
            self.truncated = true;
            return;
        }
        self.wrong_len.insert((id, expected), finding);
    }

    /// Returns whose fault it is that this object cannot be used in a place
    /// that demands `expected` bytes; `None` if it can.
    pub(super) fn of_chunk(&self, id: &ObjectId, expected: u32) -> Option<FindingNo> {
        let by_len = || self.wrong_len.get(&(*id, expected)).copied();
        self.of_page(id).or_else(by_len)
    }

    pub(super) fn of_page(&self, id: &ObjectId) -> Option<FindingNo> {
        self.ids.get(id).copied().flatten()
    }

    pub(super) fn is_unexplained(&self, id: &ObjectId) -> bool {
        self.ids.get(id) == Some(&None)
    }

    pub(super) fn unexplained(&self) -> usize {
        self.ids
            .values()
            .filter(|finding| finding.is_none())
            .count()
    }

    /// Puts the blame for all that nothing else explains on one finding.
    pub(super) fn explain_rest(&mut self, finding: FindingNo) {
        let rest = self.ids.values_mut().filter(|known| known.is_none());
        rest.for_each(|known| *known = Some(finding));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ids.is_empty() && self.wrong_len.is_empty()
    }

    pub(super) fn is_truncated(&self) -> bool {
        self.truncated
    }
}

/// Returns whether an error is about stored bytes, and not about the way to
/// them: an unreachable store must end a verification, a bad sector must not.
pub(super) fn is_damage(error: &RepoError) -> bool {
    error.kind() == RepoErrorKind::Damaged || is_bad_medium(error)
}

/// The same of a store's error at an object that a listing has shown.
pub(super) fn flaw_of(error: &StoreError) -> Option<String> {
    match error.kind() {
        StoreErrorKind::Corrupt => Some("it ends too early".to_owned()),
        StoreErrorKind::TooLarge => Some("it is larger than it can be".to_owned()),
        _ if is_bad_medium(error) => Some(format!("it cannot be read: {}", last_cause(error))),
        _ => None,
    }
}

/// EIO, EBADMSG and EUCLEAN: the disk, or the file system's own checksums.
const BAD_MEDIUM: [i32; 3] = [5, 74, 117];

fn is_bad_medium(error: &(dyn Error + 'static)) -> bool {
    causes(error)
        .filter_map(|cause| cause.downcast_ref::<io::Error>()?.raw_os_error())
        .any(|code| BAD_MEDIUM.contains(&code))
}

/// Returns the innermost cause, which says most about stored bytes.
pub(super) fn last_cause(error: &(dyn Error + 'static)) -> String {
    causes(error)
        .last()
        .map_or_else(String::new, ToString::to_string)
}

fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error| (*error).source())
}
