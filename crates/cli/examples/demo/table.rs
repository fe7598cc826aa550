//! The table at the end, and the numbers in it.

use std::time::Duration;

use anyhow::{Context as _, Result};
use highwater_model::format_size;
use serde_json::Value;

use crate::program::Program;

/// How much of an id `highwater list` shows, and a user copies.
const ID_SHOWN: usize = 13;

/// A restore point as the program itself reports it.
pub(crate) struct Facts {
    pub(crate) id: String,
    pub(crate) consistency: String,
    /// Mode and reason, once if all disks share them.
    pub(crate) mode: String,
    pub(crate) size_bytes: u64,
    pub(crate) dirty_bytes: u64,
    pub(crate) read_bytes: u64,
    pub(crate) stored_bytes: u64,
    /// How long the command took, from start to exit.
    pub(crate) seconds: f64,
}

impl Facts {
    /// Asks the program about a restore point.
    pub(crate) fn of(program: &Program, point: &str, took: Duration) -> Result<Self> {
        let shown = program.ask(&["show", point])?;
        let disks = shown["disks"].as_array().context("a point has disks")?;
        let sum = |field: &str| disks.iter().filter_map(|disk| disk[field].as_u64()).sum();
        let mut modes: Vec<String> = disks.iter().map(mode).collect();
        modes.dedup();
        let id = shown["point"].as_str().context("a point has an id")?;
        Ok(Self {
            id: id.chars().take(ID_SHOWN).collect(),
            consistency: shown["consistency"].as_str().unwrap_or("?").to_owned(),
            mode: modes.join(" + "),
            size_bytes: sum("size_bytes"),
            dirty_bytes: sum("dirty_bytes"),
            read_bytes: sum("read_bytes"),
            stored_bytes: sum("stored_bytes"),
            seconds: took.as_secs_f64(),
        })
    }
}

fn mode(disk: &Value) -> String {
    let mode = disk["mode"].as_str().unwrap_or("?");
    match disk["reason"].as_str() {
        Some(reason) => format!("{mode}: {reason}"),
        None => mode.to_owned(),
    }
}

/// Lines up the points; the second of each pair says what happened before it.
pub(crate) fn table<'a>(points: impl Iterator<Item = (&'a Facts, &'a str)>) -> String {
    let head = [
        "",
        "before it",
        "mode",
        "dirty",
        "read",
        "stored",
        "seconds",
        "restored",
    ];
    let mut rows = vec![head.map(str::to_owned)];
    for (number, (facts, before)) in points.enumerate() {
        rows.push([
            format!("{}", number + 1),
            before.to_owned(),
            facts.mode.clone(),
            format_size(facts.dirty_bytes),
            format_size(facts.read_bytes),
            format_size(facts.stored_bytes),
            format!("{:.1}", facts.seconds),
            // A point that is not does not get here: the demo has failed then.
            "identical".to_owned(),
        ]);
    }
    let widths: Vec<usize> = (0..head.len())
        .map(|column| {
            rows.iter()
                .map(|row| row[column].len())
                .max()
                .unwrap_or_default()
        })
        .collect();
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        let cells = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(column, (cell, width))| {
                // Numbers line up at their right end.
                if (3..=6).contains(&column) {
                    format!("{cell:>width$}")
                } else {
                    format!("{cell:width$}")
                }
            });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
        if number == 0 {
            let rules = widths.iter().map(|width| "-".repeat(*width));
            text.push_str(rules.collect::<Vec<_>>().join("  ").trim_end());
            text.push('\n');
        }
    }
    text
}
