//! stdout is data, stderr is talk.

use std::io::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::advice::{Advice, CliError};
use crate::json;

/// Whether documents are lines of a stream of events. How a process prints is
/// settled once, before anything is printed.
static EVENTS: AtomicBool = AtomicBool::new(false);
/// Whether errors are documents, too.
static JSON: AtomicBool = AtomicBool::new(false);
/// Whether a warning was told, for `--strict`.
static WARNED: AtomicBool = AtomicBool::new(false);

/// Has every document printed as a line of a stream of events.
pub(crate) fn print_events() {
    EVENTS.store(true, Ordering::Relaxed);
}

/// Returns whether documents are lines of a stream of events.
pub(crate) fn prints_events() -> bool {
    EVENTS.load(Ordering::Relaxed)
}

/// Has errors printed as documents, too, by whoever cuts the command short.
pub(crate) fn want_json(json: bool) {
    JSON.store(json, Ordering::Relaxed);
}

/// Returns whether errors are documents, too.
pub(crate) fn wants_json() -> bool {
    JSON.load(Ordering::Relaxed)
}

/// Returns whether a warning was told.
pub(crate) fn has_warned() -> bool {
    WARNED.load(Ordering::Relaxed)
}

/// Notes that there is a warning, however it is told.
pub(crate) fn note_warning() {
    WARNED.store(true, Ordering::Relaxed);
}

/// Tells a warning.
pub(crate) fn warn(what: &str) {
    note_warning();
    talk(&format!("warning: {what}"));
}

/// Writes data; a text ends with its line end.
pub(crate) fn data(text: &str) -> Result<(), CliError> {
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|source| CliError::Output { source })
}

/// Writes a JSON document as data.
pub(crate) fn document(document: &impl serde::Serialize) -> Result<(), CliError> {
    if EVENTS.load(Ordering::Relaxed) {
        return line(&json::Line {
            event: "result",
            body: document,
        });
    }
    line(document)
}

/// Ends a stream of events, so that its reader knows that it saw all of it.
pub(crate) fn end_of_events(exit_code: u8) {
    if EVENTS.load(Ordering::Relaxed) {
        // There is nobody left to tell if that fails.
        drop(line(&json::End::new(exit_code)));
    }
}

/// Writes JSON as one line.
pub(crate) fn line(document: &impl serde::Serialize) -> Result<(), CliError> {
    let mut text = serde_json::to_string(document).map_err(|error| CliError::Output {
        source: std::io::Error::other(error),
    })?;
    text.push('\n');
    data(&text)
}

/// Returns text as one line that a terminal only shows. Names come from
/// repositories, guests and servers, and may hold what moves the cursor, sets
/// the clipboard, or looks like a line of ours.
pub(crate) fn harmless(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter.is_control() {
            shown.extend(letter.escape_default());
        } else {
            shown.push(letter);
        }
    }
    shown
}

/// Writes a line of talk. Nobody to talk to is no error.
pub(crate) fn talk(line: &str) {
    drop(writeln!(std::io::stderr().lock(), "{}", harmless(line)));
}

/// Writes an error: what, why, what is intact, what to do.
pub(crate) fn print_error(error: &CliError, advice: &Advice, as_json: bool) {
    let chain = error.chain();
    for (depth, line) in chain.iter().enumerate() {
        // Text from outside may hold line ends; one line stays one line.
        let line = line.replace(['\n', '\r'], " ");
        let label = if depth == 0 { "error" } else { "  because" };
        talk(&format!("{label}: {}", line.trim()));
    }
    if let Some(state) = &advice.state {
        talk(&format!("state: {state}"));
    }
    if let Some(hint) = &advice.hint {
        talk(&format!("hint: {hint}"));
    }
    if as_json {
        // Scripts that asked for JSON get their document in every case; there
        // is nobody left to tell if that fails.
        drop(document(&json::Failure::new(None, &chain, advice)));
    }
}

/// Lines up columns; the first row is the head.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|row| row.iter().map(|cell| harmless(cell)).collect())
        .collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
    };
    let widths: Vec<usize> = (0..columns)
        .map(|column| width(column).unwrap_or_default())
        .collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        let line = cells.collect::<Vec<_>>().join("  ");
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
