//! `highwater stats`

use highwater_model::format_size;

use crate::advice::{self, CliError};
use crate::args::Global;
use crate::commands::all_points;
use crate::stats::{Stats, by_vm, size_of};
use crate::{json, output, settings};

pub(crate) fn run(global: &Global) -> Result<u8, CliError> {
    let repo = settings::open_repository(global)?;
    let list = all_points(&repo)?;
    let stats = Stats {
        id: repo.id().to_string(),
        encrypted: repo.is_encrypted(),
        chunk_bytes: repo.chunk_size().bytes(),
        storage: repo.storage()?,
        points: list.points.len(),
        logical_bytes: list.points.iter().map(size_of).sum(),
        vms: by_vm(&list.points),
    };
    if global.json {
        output::document(&json::Stats::new(&stats))?;
    } else {
        output::data(&text(&stats))?;
    }
    Ok(if list.damaged.is_empty() {
        advice::DONE
    } else {
        advice::DAMAGE
    })
}

fn text(stats: &Stats) -> String {
    let storage = &stats.storage;
    let told = |ratio: Option<f64>, before: &str, after: &str| {
        let places = if ratio.is_some_and(|it| it >= 100.0) {
            0
        } else {
            2
        };
        ratio.map_or_else(String::new, |it| format!("{before}{it:.places$}{after}"))
    };
    let about = if storage.is_exact { "" } else { "about " };
    let encrypted = if stats.encrypted {
        "encrypted"
    } else {
        "not encrypted"
    };
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut row = |cells: [&str; 3]| rows.push(cells.map(str::to_owned).to_vec());
    let chunk = format_size(stats.chunk_bytes);
    row([
        "repository",
        &stats.id,
        &format!("{encrypted}, {chunk} chunks"),
    ]);
    let vms = match stats.vms.len() {
        1 => "of 1 VM".to_owned(),
        vms => format!("of {vms} VMs"),
    };
    row(["restore points", &stats.points.to_string(), &vms]);
    let logical = format_size(stats.logical_bytes);
    row([
        "their disks",
        &logical,
        "what could be restored, zeroes included",
    ]);
    let plain = format!("{about}{}", format_size(storage.chunks.plain_bytes));
    row([
        "distinct data",
        &plain,
        &told(stats.dedup(), "zeroes and sharing save ", " x"),
    ]);
    let total = format_size(storage.total_bytes());
    row([
        "stored",
        &total,
        &told(stats.saving(), "", " x smaller in all"),
    ]);
    let before = format!("compressed {about}");
    let compression = told(stats.compression(), &before, " x");
    row([
        "  chunks",
        &format_size(storage.chunks.stored_bytes),
        &compression,
    ]);
    row(["  tree pages", &format_size(storage.pages.stored_bytes), ""]);
    row(["  index", &format_size(storage.index_bytes), ""]);
    row(["  manifests", &format_size(storage.manifest_bytes), ""]);
    row(["  keys and others", &format_size(storage.other_bytes), ""]);
    if storage.unindexed_bytes > 0 {
        let why =
            "being written, left by runs cut off, or an index file is damaged (`highwater verify`)";
        row(["  in no index", &format_size(storage.unindexed_bytes), why]);
    }
    let mut text = output::table(&rows);
    if !stats.vms.is_empty() {
        let head = ["VM", "POINTS", "FIRST", "LATEST", "SIZE", "READ", "ADDED"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        for vm in &stats.vms {
            rows.push(vec![
                vm.vm.clone(),
                vm.points.to_string(),
                vm.first_shown.clone(),
                vm.latest_shown.clone(),
                format_size(vm.size_bytes),
                format_size(vm.read_bytes),
                format_size(vm.stored_bytes),
            ]);
        }
        text.push('\n');
        text.push_str(&output::table(&rows));
    }
    text
}
