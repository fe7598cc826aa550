//! `highwater show`

use std::fmt::Write as _;

use highwater_engine::repository::Manifest;
use highwater_model::format_size;

use crate::advice::{self, CliError};
use crate::args::{Global, Show};
use crate::commands::{all_points, find_point};
use crate::{json, output, settings, times};

pub(crate) fn run(global: &Global, args: &Show) -> Result<u8, CliError> {
    let repo = settings::open_repository(global)?;
    let list = all_points(&repo)?;
    let point = find_point(&list.points, &args.point)?;
    if global.json {
        output::document(&json::Shown::new(point))?;
    } else {
        output::data(&text(point))?;
    }
    Ok(advice::DONE)
}

fn text(point: &Manifest) -> String {
    let mut text = String::new();
    let mut line = |label: &str, value: &str| {
        writeln!(text, "{label:<13} {}", output::harmless(value))
            .expect("writing to a String cannot fail");
    };
    line("restore point", &point.point.to_string());
    line("vm", &point.vm.name);
    line("uuid", point.vm.uuid.as_deref().unwrap_or("-"));
    line("taken at", &times::show(point.taken_at));
    line("level", &point.level);
    line("consistency", &point.consistency);
    line(
        "made by",
        &format!(
            "highwater {} on {}",
            point.origin.version, point.origin.host
        ),
    );
    line(
        "mark",
        &point
            .mark
            .as_ref()
            .map_or_else(|| "-".to_owned(), |mark| mark.name.to_string()),
    );
    if !point.tags.is_empty() {
        line("tags", &point.tags.join(", "));
    }
    if let Some(group) = &point.group {
        line("group", group);
    }
    for what in &point.healed {
        line("healed", what);
    }
    for what in &point.warnings {
        line("warning", what);
    }
    let head = [
        "DISK", "MODE", "REASON", "FORMAT", "SIZE", "DIRTY", "READ", "STORED", "ROOT",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for disk in &point.disks {
        rows.push(vec![
            disk.target.clone(),
            disk.mode.clone(),
            disk.reason.clone().unwrap_or_else(|| "-".to_owned()),
            disk.format.clone(),
            format_size(disk.image.size_bytes),
            format_size(disk.dirty_bytes),
            format_size(disk.read_bytes),
            format_size(disk.stored_bytes),
            disk.image.hash.to_string().chars().take(16).collect(),
        ]);
    }
    text.push('\n');
    text.push_str(&output::table(&rows));
    if !point.files.is_empty() {
        let mut rows = vec![["FILE", "SIZE", "PATH"].map(str::to_owned).to_vec()];
        for file in &point.files {
            let size = format_size(file.image.size_bytes);
            rows.push(vec![file.role.clone(), size, file.path.clone()]);
        }
        text.push('\n');
        text.push_str(&output::table(&rows));
    }
    if !point.skipped.is_empty() {
        let mut rows = vec![["LEFT OUT", "WHY"].map(str::to_owned).to_vec()];
        for skipped in &point.skipped {
            rows.push(vec![skipped.target.clone(), skipped.reason.clone()]);
        }
        text.push('\n');
        text.push_str(&output::table(&rows));
    }
    text
}
