//! What a person reads of a verification.

use std::fmt::Write as _;

use highwater_engine::repository::{Damage, HurtImage, HurtPoint, VerifyDepth, VerifyReport};
use highwater_model::format_size;

use super::Verified;
use crate::commands::short;
use crate::output::harmless;

/// More than these say less: `--json` lists everything.
const DAMAGE_MAX: usize = 20;
const POINTS_MAX: usize = 8;
const RANGES_MAX: usize = 4;

/// Returns the whole report.
pub(super) fn report(verified: &Verified) -> String {
    let report = &verified.report;
    let mut text = checked(verified);
    for what in &report.unchecked {
        line(&mut text, 0, &format!("not checked: {what}"));
    }
    for damage in report.damage.iter().take(DAMAGE_MAX) {
        text.push('\n');
        tell_damage(&mut text, damage, verified.with_key);
    }
    if let Some(more) = more(report.damage.len(), DAMAGE_MAX) {
        line(&mut text, 0, &format!("\nand {more} more damaged objects"));
    }
    if report.truncated {
        line(&mut text, 0, "there is more damage than can be listed");
    }
    if report.is_clean() {
        line(&mut text, 0, &verdict(report));
    }
    text
}

fn checked(verified: &Verified) -> String {
    let (report, checked) = (&verified.report, &verified.report.checked);
    let mut text = String::new();
    let encrypted = match (report.encrypted, verified.with_key) {
        (true, true) => ", encrypted",
        (true, false) => ", encrypted, checked without its key",
        (false, _) => "",
    };
    line(
        &mut text,
        0,
        &format!("repository {}{encrypted}", report.repository),
    );
    let mut points = count(checked.points, "restore point");
    if verified.with_key {
        let (disks, files) = (count(checked.disks, "disk"), count(checked.files, "file"));
        points = format!("{points} ({disks}, {files})");
    }
    let packs = format!(
        "{} ({})",
        count(checked.packs, "pack"),
        format_size(checked.pack_bytes)
    );
    let mut all = vec![points, count(checked.index_files, "index file"), packs];
    if verified.with_key {
        all.push(count(checked.pages, "tree page"));
        all.push(count(checked.chunks, "chunk"));
    }
    line(&mut text, 0, &format!("checked: {}", all.join(", ")));
    match verified.depth {
        VerifyDepth::Structure => {
            line(
                &mut text,
                0,
                "not read: the content of packs (--read-data does)",
            );
        }
        VerifyDepth::Data => {
            let packs = count(checked.read_packs, "pack");
            let bytes = format_size(checked.read_bytes);
            let proven = if verified.with_key { "proven" } else { "found" };
            let records = count(checked.records, "record");
            line(
                &mut text,
                0,
                &format!("read: {packs} ({bytes}), {records} {proven}"),
            );
        }
    }
    text
}

fn tell_damage(text: &mut String, damage: &Damage, with_key: bool) {
    line(text, 0, &format!("damaged: {}", damage.object));
    line(text, 2, &damage.what);
    for point in damage.points.iter().take(POINTS_MAX) {
        tell_point(text, point);
    }
    if let Some(more) = more(damage.points.len(), POINTS_MAX) {
        line(text, 2, &format!("and {more} more restore points"));
    }
    if damage.points.is_empty() && with_key {
        line(
            text,
            2,
            "no restore point that was checked needs what is damaged",
        );
    }
}

fn tell_point(text: &mut String, point: &HurtPoint) {
    let vm = point.vm.as_deref().unwrap_or("a VM that cannot be told");
    let lost = if point.lost {
        ": cannot be restored"
    } else {
        ""
    };
    line(text, 2, &format!("{vm} {}{lost}", short(&point.point)));
    for disk in &point.disks {
        line(text, 4, &ranges(disk));
    }
    for file in &point.files {
        line(text, 4, &format!("{}: {}", file.role, file.path));
    }
}

/// Ranges as `start+length`, in bytes of the disk.
fn ranges(disk: &HurtImage) -> String {
    let shown = disk.ranges.iter().take(RANGES_MAX);
    let shown: Vec<String> = shown
        .map(|range| format!("{}+{}", range.start(), range.len()))
        .collect();
    let all = (disk.ranges.len() as u64).saturating_add(disk.more_ranges);
    let rest = match all.saturating_sub(shown.len() as u64) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!(
        "{}: {} at {}{rest}",
        disk.disk,
        format_size(disk.bytes),
        shown.join(", ")
    )
}

/// Returns the one sentence that says it all.
pub(super) fn verdict(report: &VerifyReport) -> String {
    match report.damage.len() {
        0 => "no damage found".to_owned(),
        1 => "cannot call the repository whole: an object is damaged".to_owned(),
        damaged => format!("cannot call the repository whole: {damaged} objects are damaged"),
    }
}

/// Returns the state of things and what to do.
pub(super) fn advice(verified: &Verified) -> (Option<String>, Option<&'static str>) {
    let report = &verified.report;
    if report.is_clean() {
        return (None, None);
    }
    let checked = &report.checked;
    let whole = checked.points.saturating_sub(checked.points_hurt);
    let state = if verified.with_key {
        let how = match verified.depth {
            VerifyDepth::Structure => " as far as was looked (without --read-data)",
            VerifyDepth::Data => "",
        };
        format!(
            "{whole} of {} restore points are whole{how}; nothing was changed",
            checked.points
        )
    } else {
        "which restore points are hurt cannot be told without the key; nothing was changed"
            .to_owned()
    };
    let has = |word: &str| report.damage.iter().any(|it| it.object.kind_word() == word);
    // What is gone is stored again when it is met; what is damaged counts as
    // stored as long as it lies there with its length.
    let is_gone = |it: &Damage| it.what == "it is missing" || it.object.kind_word() == "index";
    let hint = if has("key") {
        "get the damaged key object from a copy of the repository: without any key nobody can \
         read it"
    } else if report.damage.iter().all(is_gone) {
        "`highwater backup VM -l full` stores again what the VM still holds, and what points \
         share with it is whole again"
    } else if has("pack") || has("index") {
        "put the object back from a copy of the repository if there is one; what is whole can be \
         restored; back the VM up into a new repository, for this one does not repair itself"
    } else {
        "the other restore points of the VM are not concerned; the next backup adds a complete one"
    };
    (Some(state), Some(hint))
}

fn count(number: u64, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
}

fn more(all: usize, shown: usize) -> Option<usize> {
    all.checked_sub(shown).filter(|more| *more > 0)
}

fn line(text: &mut String, indent: usize, line: &str) {
    // Names come from the repository and may hold anything.
    writeln!(text, "{:indent$}{}", "", harmless(line)).expect("writing to a String cannot fail");
}
