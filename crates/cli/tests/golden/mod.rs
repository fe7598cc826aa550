//! What the program says, whole: stdout, stderr and exit code, against files
//! that people review as text. `UPDATE_GOLDEN=1` writes them anew.
//!
//! What differs from run to run is replaced, length for length, so that tables
//! stay aligned. The rules, by word:
//!
//! | a word that | becomes |
//! |---|---|
//! | is a point's id, or the 13 first letters of one | `POINT...` |
//! | is a UUID | `UUID...` |
//! | has 16 hexadecimal digits or more | `HEX...` |
//! | is an RFC 3339 time in UTC | `TIME...` |
//! | is a date or a time of day (only where asked for) | `DATE...`, `CLOCK...` |
//! | is a number of seconds or milliseconds | `N` |
//!
//! Paths are replaced by names the test gives.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, Result};

/// One file of expected output, and what was said so far.
pub(crate) struct Golden {
    name: &'static str,
    paths: Vec<(String, &'static str)>,
    dates: bool,
    text: String,
}

impl Golden {
    pub(crate) fn new(name: &'static str) -> Self {
        Self {
            name,
            paths: Vec::new(),
            dates: false,
            text: String::new(),
        }
    }

    /// Has dates and times of day replaced, too.
    pub(crate) fn without_dates(mut self) -> Self {
        self.dates = true;
        self
    }

    /// Has a path shown as a name; give longer paths first.
    pub(crate) fn path(mut self, path: &Path, name: &'static str) -> Self {
        self.paths.push((path.display().to_string(), name));
        self
    }

    /// Has a text that differs from run to run shown as a name.
    pub(crate) fn text(mut self, text: String, name: &'static str) -> Self {
        self.paths.push((text, name));
        self
    }

    /// Runs a command and notes all it says, under the words `shown`.
    pub(crate) fn run(&mut self, shown: &str, command: &mut Command) -> Result<Output> {
        let output = command.output()?;
        let shown = self.normal(shown);
        writeln!(self.text, "$ {shown}")?;
        for (stream, bytes) in [("", &output.stdout), ("! ", &output.stderr)] {
            for line in String::from_utf8_lossy(bytes).lines() {
                let line = self.normal(line);
                writeln!(self.text, "{stream}{line}")?;
            }
        }
        let code = output.status.code().context("it was killed")?;
        writeln!(self.text, "=> {code}\n")?;
        Ok(output)
    }

    /// Fails unless all that was said is what the file holds.
    pub(crate) fn check(self) -> Result<()> {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden")
            .join(format!("{}.txt", self.name));
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            return Ok(std::fs::write(&path, &self.text)?);
        }
        let expected = std::fs::read_to_string(&path)
            .with_context(|| format!("{}: make it with UPDATE_GOLDEN=1", path.display()))?;
        let (mut said, mut wanted) = (self.text.lines(), expected.lines());
        for number in 1.. {
            let (said, wanted) = (said.next(), wanted.next());
            assert_eq!(
                said,
                wanted,
                "{} line {number}, of\n{}",
                path.display(),
                self.text
            );
            if said.is_none() {
                break;
            }
        }
        Ok(())
    }

    fn normal(&self, line: &str) -> String {
        let mut line = line.to_owned();
        for (path, name) in &self.paths {
            line = line.replace(path, name);
        }
        let mut shown = String::new();
        let mut rest = line.as_str();
        while let Some(first) = rest.chars().next() {
            let end = rest.find(|c: char| !is_of_word(c)).unwrap_or(rest.len());
            if end == 0 {
                shown.push(first);
                rest = &rest[first.len_utf8()..];
                continue;
            }
            let (word, after) = rest.split_at(end);
            shown.push_str(&self.word(&shown, word, after));
            rest = after;
        }
        shown
    }

    fn word(&self, before: &str, word: &str, after: &str) -> String {
        if let Some(value) = word.strip_prefix(':') {
            return format!(":{}", self.word(&format!("{before}:"), value, after));
        }
        if let Some(id) = word.strip_prefix("id:") {
            return format!("id:{}", self.word(before, id, after));
        }
        let is_number = word.chars().all(|c| c.is_ascii_digit() || c == '.');
        let is_time = [" s", " ms"].iter().any(|unit| {
            after
                .strip_prefix(unit)
                .is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric()))
        });
        let in_json = ["\"seconds\":", "\"frozen_ms\":"]
            .iter()
            .any(|it| before.ends_with(it));
        if is_number && (is_time || in_json) {
            return "N".to_owned();
        }
        let name = if is_point(word) {
            "POINT"
        } else if is_uuid(word) {
            "UUID"
        } else if word.len() >= 16 && word.chars().all(|c| c.is_ascii_hexdigit()) {
            "HEX"
        } else if word.len() >= 20 && word.ends_with('Z') && shape(&word[..10]) == "0000-00-00" {
            // Whole seconds have no fraction: the length says nothing.
            return if self.dates {
                "TIME".to_owned()
            } else {
                word.to_owned()
            };
        } else if self.dates && shape(word) == "0000-00-00" {
            "DATE"
        } else if self.dates && shape(word) == "00:00:00" {
            "CLOCK"
        } else {
            return word.to_owned();
        };
        format!("{name:.<width$}", width = word.len())
    }
}

fn is_of_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | ':' | '.')
}

/// Crockford's base 32 of a time of this century begins with `01`.
fn is_point(word: &str) -> bool {
    let letters = |c: char| c.is_ascii_digit() || (c.is_ascii_uppercase() && !"ILOU".contains(c));
    matches!(word.len(), 13 | 26) && word.starts_with("01") && word.chars().all(letters)
}

fn is_uuid(word: &str) -> bool {
    word.len() == 36
        && word.split('-').map(str::len).eq([8, 4, 4, 4, 12])
        && word.chars().all(|c| c.is_ascii_hexdigit() || c == '-')
}

fn shape(word: &str) -> String {
    let digit = |c: char| if c.is_ascii_digit() { '0' } else { c };
    word.chars().map(digit).collect()
}
