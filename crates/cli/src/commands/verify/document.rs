//! A verification as JSON: schema 1.

#![expect(
    clippy::struct_field_names,
    reason = "the names of fields are the schema"
)]

use highwater_engine::repository::{Damage, HurtFile, HurtImage, HurtPoint, VerifyDepth};
use serde::Serialize;

use super::Verified;

#[derive(Debug, Serialize)]
pub(super) struct Document<'a> {
    schema: u32,
    status: &'static str,
    repository: String,
    encrypted: bool,
    with_key: bool,
    read_data: bool,
    checked: Checked,
    damage: Vec<DamagedObject<'a>>,
    damage_truncated: bool,
    unchecked: &'a [&'static str],
    warnings: &'a [String],
    state: Option<&'a str>,
    hint: Option<&'a str>,
    exit_code: u8,
    seconds: f64,
}

#[derive(Debug, Serialize)]
struct Checked {
    keys: u64,
    points: u64,
    points_damaged: u64,
    disks: u64,
    files: u64,
    index_files: u64,
    index_bytes: u64,
    index_rows: u64,
    packs: u64,
    pack_bytes: u64,
    pages: u64,
    chunks: u64,
    packs_read: u64,
    bytes_read: u64,
    records_read: u64,
}

#[derive(Debug, Serialize)]
struct DamagedObject<'a> {
    object: Object<'a>,
    what: &'a str,
    points: Vec<Point<'a>>,
}

/// `name` is the path in the repository; null if all that is known is that
/// some object of the kind is missing.
#[derive(Debug, Serialize)]
struct Object<'a> {
    kind: &'static str,
    name: Option<&'a str>,
}

#[derive(Debug, Serialize)]
struct Point<'a> {
    vm: Option<&'a str>,
    point: &'a str,
    lost: bool,
    disks: Vec<Disk<'a>>,
    files: Vec<File<'a>>,
}

#[derive(Debug, Serialize)]
struct Disk<'a> {
    disk: &'a str,
    damaged_bytes: u64,
    ranges: Vec<Range>,
    more_ranges: u64,
}

#[derive(Debug, Serialize)]
struct Range {
    start: u64,
    length: u64,
}

#[derive(Debug, Serialize)]
struct File<'a> {
    role: &'a str,
    path: &'a str,
}

impl<'a> Document<'a> {
    pub(super) fn new(
        verified: &'a Verified,
        state: Option<&'a str>,
        hint: Option<&'a str>,
        exit_code: u8,
    ) -> Self {
        let report = &verified.report;
        let checked = report.checked;
        Self {
            schema: 1,
            status: if report.is_clean() { "ok" } else { "damaged" },
            repository: report.repository.to_string(),
            encrypted: report.encrypted,
            with_key: verified.with_key,
            read_data: verified.depth == VerifyDepth::Data,
            checked: Checked {
                keys: checked.keys,
                points: checked.points,
                points_damaged: checked.points_hurt,
                disks: checked.disks,
                files: checked.files,
                index_files: checked.index_files,
                index_bytes: checked.index_bytes,
                index_rows: checked.rows,
                packs: checked.packs,
                pack_bytes: checked.pack_bytes,
                pages: checked.pages,
                chunks: checked.chunks,
                packs_read: checked.read_packs,
                bytes_read: checked.read_bytes,
                records_read: checked.records,
            },
            damage: report.damage.iter().map(DamagedObject::new).collect(),
            damage_truncated: report.truncated,
            unchecked: &report.unchecked,
            warnings: &report.warnings,
            state,
            hint,
            exit_code,
            seconds: f64::from(u32::try_from(verified.elapsed.as_millis()).unwrap_or(u32::MAX))
                / 1000.0,
        }
    }
}

impl<'a> DamagedObject<'a> {
    fn new(damage: &'a Damage) -> Self {
        Self {
            object: Object {
                kind: damage.object.kind_word(),
                name: damage.object.path.as_deref(),
            },
            what: &damage.what,
            points: damage.points.iter().map(Point::new).collect(),
        }
    }
}

impl<'a> Point<'a> {
    fn new(point: &'a HurtPoint) -> Self {
        let file = |file: &'a HurtFile| File {
            role: &file.role,
            path: &file.path,
        };
        Self {
            vm: point.vm.as_deref(),
            point: &point.point,
            lost: point.lost,
            disks: point.disks.iter().map(Disk::new).collect(),
            files: point.files.iter().map(file).collect(),
        }
    }
}

impl<'a> Disk<'a> {
    fn new(disk: &'a HurtImage) -> Self {
        let range = |range: &highwater_model::ByteRange| Range {
            start: range.start(),
            length: range.len(),
        };
        Self {
            disk: &disk.disk,
            damaged_bytes: disk.bytes,
            ranges: disk.ranges.iter().map(range).collect(),
            more_ranges: disk.more_ranges,
        }
    }
}
