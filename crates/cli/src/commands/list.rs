//! `highwater list`

use std::collections::BTreeMap;

use highwater_engine::repository::Manifest;
use highwater_engine::select_vm;
use highwater_model::format_size;

use crate::advice::{self, CliError};
use crate::args::{Global, List};
use crate::commands::{all_points, damage_line, short, unknown_vm};
use crate::{json, output, settings, times};

pub(crate) fn run(global: &Global, args: &List) -> Result<u8, CliError> {
    let repo = settings::open_repository(global)?;
    let list = all_points(&repo)?;
    let mut points: Vec<&Manifest> = match &args.vm {
        Some(vm) => select_vm(&list.points, vm).map_err(|error| unknown_vm(&list.points, error))?,
        None => list.points.iter().collect(),
    };
    let all = points.len();
    points.retain(|point| is_wanted(args, point));
    if global.json {
        let damaged = list.damaged.iter().map(damage_line).collect();
        output::document(&json::Points::new(points.into_iter(), damaged))?;
    } else if points.is_empty() && all > 0 {
        output::talk("no restore points with these tags and this group");
    } else if points.is_empty() {
        output::talk("no restore points yet");
    } else if args.vm.is_some() || args.all {
        output::data(&output::table(&point_rows(&points)))?;
    } else {
        output::data(&output::table(&vm_rows(&points)))?;
    }
    Ok(if list.damaged.is_empty() {
        advice::DONE
    } else {
        advice::DAMAGE
    })
}

fn is_wanted(args: &List, point: &Manifest) -> bool {
    let in_group = args.group.is_none() || args.group == point.group;
    in_group && args.tags.iter().all(|tag| point.tags.contains(tag))
}

fn point_rows(points: &[&Manifest]) -> Vec<Vec<String>> {
    let head = [
        "VM",
        "POINT",
        "TAKEN AT",
        "MODE",
        "CONSISTENCY",
        "DISKS",
        "SIZE",
        "STORED",
        "GROUP",
        "TAGS",
    ];
    // Columns in which there is nothing to see are left out.
    let labelled = |point: &&Manifest| point.group.is_some() || !point.tags.is_empty();
    let columns = if points.iter().any(labelled) {
        head.len()
    } else {
        head.len() - 2
    };
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for point in points {
        rows.push(vec![
            point.vm.name.clone(),
            short(&point.point.to_string()).to_owned(),
            times::show(point.taken_at),
            modes(point),
            point.consistency.clone(),
            point.disks.len().to_string(),
            format_size(point.disks.iter().map(|disk| disk.image.size_bytes).sum()),
            format_size(point.disks.iter().map(|disk| disk.stored_bytes).sum()),
            point.group.clone().unwrap_or_else(|| "-".to_owned()),
            point.tags.join(","),
        ]);
    }
    for row in &mut rows {
        row.truncate(columns);
    }
    rows
}

/// One word if all disks share it, else each word once.
fn modes(point: &Manifest) -> String {
    let mut words: Vec<&str> = point.disks.iter().map(|disk| disk.mode.as_str()).collect();
    words.sort_unstable();
    words.dedup();
    words.join("+")
}

fn vm_rows(points: &[&Manifest]) -> Vec<Vec<String>> {
    let head = ["VM", "UUID", "POINTS", "LATEST", "POINT", "SIZE"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let mut vms: BTreeMap<(&str, Option<&str>), Vec<&Manifest>> = BTreeMap::new();
    for point in points {
        let key = (point.vm.name.as_str(), point.vm.uuid.as_deref());
        vms.entry(key).or_default().push(point);
    }
    for ((name, uuid), points) in vms {
        let Some(latest) = points.last() else {
            continue;
        };
        rows.push(vec![
            name.to_owned(),
            uuid.unwrap_or("-").to_owned(),
            points.len().to_string(),
            times::show(latest.taken_at),
            short(&latest.point.to_string()).to_owned(),
            format_size(latest.disks.iter().map(|disk| disk.image.size_bytes).sum()),
        ]);
    }
    rows
}
