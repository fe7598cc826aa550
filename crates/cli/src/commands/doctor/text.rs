//! What a person reads: short, and the worst first.

use std::fmt::Write as _;

use highwater_engine::{Checkup, DiskEstimate, Finding, MarkReport, NextBackup, Remedy, Verdict};
use highwater_hypervisor::RunState;
use highwater_model::format_size;

use super::Seen;
use super::words::{self, count};
use crate::commands::short;
use crate::output::{harmless, table};

/// Returns the whole report.
pub(super) fn report(seen: &Seen) -> String {
    let checkup = &seen.checkup;
    let mut text = String::new();
    line(&mut text, 0, &headline(seen));
    for what in &checkup.fixed {
        line(&mut text, 2, &format!("repaired: {what}"));
    }
    let (urgent, notes): (Vec<&Finding>, Vec<&Finding>) = checkup
        .findings
        .iter()
        .partition(|finding| finding.needs_something());
    for finding in &urgent {
        tell(&mut text, "!", finding, checkup);
    }
    if urgent.iter().any(|finding| finding.remedy == Remedy::Fix) {
        let vm = &checkup.vm.name;
        line(
            &mut text,
            6,
            &format!("do: highwater doctor {vm} --fix; the next backup does the same"),
        );
    }
    for finding in notes {
        tell(&mut text, "-", finding, checkup);
    }
    if !checkup.marks.is_empty() {
        line(&mut text, 2, "marks");
        for row in table(&mark_rows(&checkup.marks)).lines() {
            line(&mut text, 4, row);
        }
    }
    tell_next(&mut text, &checkup.next, checkup);
    text
}

fn headline(seen: &Seen) -> String {
    let checkup = &seen.checkup;
    let state = words::state(checkup.state);
    let needs = checkup
        .findings
        .iter()
        .filter(|finding| finding.needs_something())
        .count();
    let verdict = if !checkup.failed.is_empty() {
        format!(
            "{} could not be done",
            count(checkup.failed.len(), "repair")
        )
    } else if needs > 0 {
        format!("{} to be done", count(needs, "thing"))
    } else if seen.fix && !checkup.fixed.is_empty() {
        "healthy again".to_owned()
    } else {
        "healthy".to_owned()
    };
    format!("{} ({state}): {verdict}", checkup.vm.name)
}

fn tell(text: &mut String, sign: &str, finding: &Finding, checkup: &Checkup) {
    let said = words::say(finding, checkup);
    line(text, 2, &format!("{sign} {}", said.what));
    // One line for all of them.
    let todo = said.todo.iter().filter(|_| finding.remedy != Remedy::Fix);
    for (number, todo) in todo.enumerate() {
        let label = if number == 0 { "do: " } else { "    " };
        line(text, 6, &format!("{label}{todo}"));
    }
}

fn mark_rows(marks: &[MarkReport]) -> Vec<Vec<String>> {
    let head = ["POINT", "REPOSITORY", "STATE", "CHECKPOINT", "BITMAPS"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for mark in marks {
        let name = mark.name.to_string();
        let repo = match mark.verdict {
            Verdict::OtherRepository => name.split('-').nth(1).unwrap_or_default(),
            _ => "this one",
        };
        let on_disks: Vec<String> = mark.disks.iter().map(words::on_disk).collect();
        rows.push(vec![
            short(&mark.name.point().to_string()).to_owned(),
            repo.to_owned(),
            words::verdict(&mark.verdict),
            if mark.has_record { "yes" } else { "no" }.to_owned(),
            if on_disks.is_empty() {
                "-".to_owned()
            } else {
                on_disks.join(", ")
            },
        ]);
    }
    rows
}

fn tell_next(text: &mut String, next: &NextBackup, checkup: &Checkup) {
    line(text, 2, "next backup");
    if let Some(refused) = &next.refused {
        line(text, 4, &words::refused(refused, checkup));
        // Nothing is known about the disks of a VM that is off, and of the marks
        // of one that was not resumed.
        if matches!(checkup.state, RunState::Off | RunState::NotResumed) {
            return;
        }
    }
    for what in &next.would_heal {
        line(text, 4, &format!("first: {what}"));
    }
    for disk in &next.disks {
        line(text, 4, &disk_line(disk));
    }
}

fn disk_line(disk: &DiskEstimate) -> String {
    let name = &disk.disk;
    let size = format_size(disk.size_bytes);
    match (disk.mode, disk.sentence) {
        ("incremental" | "differential", _) => format!(
            "{name}  {}: {} of {size} dirty",
            disk.mode,
            format_size(disk.dirty_bytes)
        ),
        ("refused", _) => format!("{name}  refused"),
        (mode, Some(sentence)) => format!(
            "{name}  {mode} ({sentence}): up to {} of {size} to read",
            format_size(disk.read_bytes)
        ),
        (mode, None) => format!("{name}  {mode}: {size} to read"),
    }
}

fn line(text: &mut String, indent: usize, line: &str) {
    // Names come from the VM and may hold anything.
    writeln!(text, "{:indent$}{}", "", harmless(line)).expect("writing to a String cannot fail");
}
