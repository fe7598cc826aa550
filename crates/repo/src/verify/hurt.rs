//! What does damage hurt: which points, which disks, which bytes of them?

use std::collections::{BTreeMap, BTreeSet};

use highwater_model::{ByteRange, ObjectId};
use highwater_store::{ObjectKind, StoreErrorKind};

use crate::error::RepoError;
use crate::index::pack_key;
use crate::manifest::ImageRoot;
use crate::objects::Objects;
use crate::verify::Verification;
use crate::verify::data::BadPacks;
use crate::verify::findings::{BadObjects, FindingNo, is_damage, last_cause};
use crate::verify::index_scan;
use crate::verify::report::{HurtFile, HurtImage, HurtPoint, VerifyError, VerifyPhase};
use crate::verify::seen::Seen;
use crate::verify::small::{ImageName, PointInfo};
use crate::verify::tables::{PackState, Tables};
use crate::verify::walk::{Shape, child_number, children, read_page};
use crate::wire::wide;

/// Ranges listed for one disk, and for all together (16 MiB).
const RANGES_MAX: usize = 1 << 16;
const RANGES_MAX_IN_ALL: usize = 1 << 20;

impl<'a> Verification<'a> {
    /// Finds out whose fault it is that objects cannot be read, and which
    /// objects damaged packs have taken with them.
    pub(super) fn blame(
        &mut self,
        objects: &Objects,
        tables: &Tables,
        packs: &BadPacks,
        bad: &mut BadObjects,
    ) -> Result<(), VerifyError> {
        if bad.unexplained() == 0 && packs.is_empty() {
            return Ok(());
        }
        let used: BTreeSet<usize> = tables.packs.iter().map(|pack| pack.file).collect();
        for number in used {
            let Some(file) = tables.files.get(number) else {
                continue;
            };
            let mut failed = None;
            let scanned = index_scan::scan(self.store, file, &mut |_, pack, row| {
                let id = row.place.id;
                if let Some(finding) = packs.get(&pack.id) {
                    // Exactly what a restore would do, other copies included.
                    match objects.object(pack.kind, &id) {
                        Ok(_) => {}
                        Err(error) if is_damage(&error) => bad.insert(id, Some(*finding)),
                        Err(error) => failed = Some(error),
                    }
                } else if bad.is_unexplained(&id) {
                    let state = tables.of_pack(&pack.id).iter().find(|it| it.file == number);
                    match state.map(|it| it.state) {
                        Some(PackState::Missing) => {
                            let key = pack_key(&pack.id);
                            let finding = self.findings.note(&key, "it is missing");
                            bad.insert(id, Some(finding));
                        }
                        Some(PackState::WrongLength(finding)) => bad.insert(id, Some(finding)),
                        Some(PackState::There) | None => {}
                    }
                }
            });
            match (scanned, failed) {
                (_, Some(error)) => return Err(error.into()),
                (Ok(_), None) => {}
                (Err(error), None) if error.kind() == StoreErrorKind::NotFound => {}
                (Err(error), None) => return Err(RepoError::store("read the index", error).into()),
            }
        }
        self.blame_the_index(bad);
        Ok(())
    }

    /// No row shows these objects, or their row lies in a damaged part.
    fn blame_the_index(&mut self, bad: &mut BadObjects) {
        let count = bad.unexplained();
        if count == 0 {
            return;
        }
        let damaged: Vec<FindingNo> = self.findings.of_kind(ObjectKind::Index).collect();
        let finding = if let [only] = damaged.as_slice() {
            *only
        } else {
            let what = format!("none shows {count} chunks or tree pages that restore points need");
            self.findings.note_unnamed(ObjectKind::Index, what)
        };
        bad.explain_rest(finding);
    }

    /// Tells of packs that are missing and that nothing needed so far.
    pub(super) fn tell_of_missing_packs(&mut self, tables: &Tables, can_tell: bool) {
        let missing = tables
            .packs
            .iter()
            .filter(|it| it.state == PackState::Missing);
        let keys: Vec<_> = missing.map(|it| pack_key(&it.pack.id)).collect();
        if !can_tell {
            for key in keys {
                self.findings.note(&key, "it is missing");
            }
            return;
        }
        let count = keys.iter().filter(|key| !self.findings.names(key)).count();
        if count > 0 {
            self.warnings.push(format!(
                "packs: {count} that index files show are not there; no restore point \
                 that was checked needs them"
            ));
        }
    }

    /// Adds to each finding the points, disks and ranges it hurts.
    pub(super) fn find_hurt(
        &mut self,
        objects: &'a Objects,
        points: &[PointInfo],
        bad: &BadObjects,
    ) -> Result<(), VerifyError> {
        if bad.is_empty() {
            return Ok(());
        }
        let images = points.iter().map(|point| wide(point.images.len()));
        let images = images.fold(0, u64::saturating_add);
        let mut search = Search {
            objects,
            bad,
            clean: Seen::new(),
            left: RANGES_MAX_IN_ALL,
            shape: Shape::of_nothing(),
            found: BTreeMap::new(),
        };
        let mut done = 0_u64;
        for info in points {
            let mut hurt: BTreeMap<FindingNo, HurtPoint> = BTreeMap::new();
            for image in &info.images {
                self.tell(VerifyPhase::Ranges, done, images)?;
                done = done.saturating_add(1);
                for (finding, ranges) in search.image(self, &image.root)? {
                    let point = hurt.entry(finding).or_insert_with(|| HurtPoint {
                        vm: Some(info.vm.clone()),
                        point: info.point.to_string(),
                        lost: false,
                        disks: Vec::new(),
                        files: Vec::new(),
                    });
                    match &image.name {
                        ImageName::Disk(disk) => point.disks.push(ranges.into_disk(disk)),
                        ImageName::File { role, path } => point.files.push(HurtFile {
                            role: role.clone(),
                            path: path.clone(),
                        }),
                    }
                }
            }
            if !hurt.is_empty() {
                self.points_hurt.insert(info.point.to_string());
            }
            for (finding, point) in hurt {
                if let Some(damage) = self.findings.get_mut(finding) {
                    damage.points.push(point);
                }
            }
        }
        Ok(())
    }
}

/// Looks for bad objects in trees; remembers which subtrees have none.
struct Search<'a> {
    objects: &'a Objects,
    bad: &'a BadObjects,
    clean: Seen,
    left: usize,
    shape: Shape,
    found: BTreeMap<FindingNo, Ranges>,
}

impl Search<'_> {
    fn image(
        &mut self,
        verification: &mut Verification<'_>,
        root: &ImageRoot,
    ) -> Result<BTreeMap<FindingNo, Ranges>, VerifyError> {
        self.shape = Shape::of(root);
        if let Some(top) = &root.top {
            self.visit(verification, top, self.shape.top_level(), 0)?;
        }
        Ok(std::mem::take(&mut self.found))
    }

    /// Returns whether the subtree is clean.
    fn visit(
        &mut self,
        verification: &mut Verification<'_>,
        id: &ObjectId,
        level: usize,
        number: u64,
    ) -> Result<bool, VerifyError> {
        let inner = self.shape.is_inner(level, number);
        if inner && self.clean.contains(level, id) {
            return Ok(true);
        }
        let page = match read_page(self.objects, &self.shape, id, level, number) {
            Ok(page) => page,
            Err(error) if is_damage(&error) => {
                let finding = match self.bad.of_page(id) {
                    Some(finding) => finding,
                    None => verification.note_bad_page(self.objects, id, &error)?,
                };
                let range = self.shape.range_of_page(level, number);
                self.hurts(finding, range);
                return Ok(false);
            }
            Err(error) => return Err(error.into()),
        };
        let mut clean = true;
        for (slot, child) in children(&page) {
            let number = child_number(number, slot);
            if let Some(below) = level.checked_sub(1) {
                clean &= self.visit(verification, &child, below, number)?;
            } else if let Some(finding) = self.bad.of_chunk(&child, self.shape.chunk_len(number)) {
                clean = false;
                self.hurts(finding, self.shape.range_of_chunk(number));
            }
        }
        if clean && inner {
            self.clean.insert(level, id);
        }
        Ok(clean)
    }

    fn hurts(&mut self, finding: FindingNo, (start, end): (u64, u64)) {
        let Some(range) = ByteRange::between(start, end) else {
            return;
        };
        let added = self
            .found
            .entry(finding)
            .or_default()
            .add(range, self.left > 0);
        self.left = self.left.saturating_sub(usize::from(added));
    }
}

impl Verification<'_> {
    /// A page that reads well in one image and not in another.
    fn note_bad_page(
        &mut self,
        objects: &Objects,
        id: &ObjectId,
        error: &RepoError,
    ) -> Result<FindingNo, VerifyError> {
        let what = format!("page {id} cannot be read: {}", last_cause(error));
        Ok(match objects.index.find(id)? {
            Some(place) => self.findings.note(&place.pack(), what),
            None => self.findings.note_unnamed(ObjectKind::Index, what),
        })
    }
}

/// Hurt ranges of one image, in ascending order.
#[derive(Default)]
struct Ranges {
    list: Vec<ByteRange>,
    more: u64,
    bytes: u64,
    /// Where the last range ends, also if it is not listed.
    end: Option<u64>,
}

impl Ranges {
    /// Returns whether a range was added to the list.
    fn add(&mut self, range: ByteRange, room: bool) -> bool {
        self.bytes = self.bytes.saturating_add(range.len());
        let touches = self.end == Some(range.start());
        self.end = Some(range.end());
        if touches && self.more == 0 {
            if let Some(last) = self.list.last_mut()
                && let Some(joined) = ByteRange::between(last.start(), range.end())
            {
                *last = joined;
            }
            return false;
        }
        if touches {
            return false;
        }
        if room && self.more == 0 && self.list.len() < RANGES_MAX {
            self.list.push(range);
            return true;
        }
        self.more = self.more.saturating_add(1);
        false
    }

    fn into_disk(self, disk: &str) -> HurtImage {
        HurtImage {
            disk: disk.to_owned(),
            ranges: self.list,
            more_ranges: self.more,
            bytes: self.bytes,
        }
    }
}
