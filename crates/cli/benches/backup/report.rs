//! What is printed at the end, and the file for machines.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::bound;
use crate::parts::Choice;
use crate::programs;
use crate::stage::{Part, Stage};

/// All that was found.
pub(crate) struct Report {
    versions: Vec<String>,
    load_before: String,
    parts: Vec<(&'static Choice, Result<Part>)>,
}

impl Report {
    /// Notes what takes part.
    pub(crate) fn begin() -> Result<Self> {
        Ok(Self {
            versions: programs::versions()?,
            load_before: programs::load()?,
            parts: Vec::new(),
        })
    }

    /// Notes what a part has found, or why it found nothing.
    pub(crate) fn add(&mut self, choice: &'static Choice, outcome: Result<Part>) {
        self.parts.push((choice, outcome));
    }

    /// Says whether all parts ended and all gates hold.
    pub(crate) fn is_good(&self, stage: &Stage) -> bool {
        self.parts.iter().all(|(_, outcome)| match outcome {
            Ok(part) => !stage.is_whole() || part.bounds.iter().all(bound::Bound::is_no_failure),
            Err(_) => false,
        })
    }

    /// Returns it as Markdown.
    pub(crate) fn markdown(&self, stage: &Stage) -> Result<String> {
        let mut text = format!(
            "{}. Load {} before, {} at the end (this benchmark's included). {} rounds, medians.\n",
            self.versions.join(", "),
            self.load_before,
            programs::load()?,
            stage.rounds
        );
        if !stage.is_whole() {
            writeln!(
                text,
                "\n**A trial: sizes times {}, so no bound is judged.**",
                stage.scale
            )?;
        }
        let done = self.parts.iter().filter_map(|(_, part)| part.as_ref().ok());
        text.push('\n');
        text.push_str(&bound::markdown(done.flat_map(|part| &part.bounds)));
        for (choice, outcome) in &self.parts {
            writeln!(text, "\n### {}\n", choice.title)?;
            match outcome {
                Ok(part) => {
                    write!(text, "{}\n\n{}", part.about, part.table.markdown())?;
                }
                Err(error) => writeln!(text, "FAILED: {error:#}")?,
            }
        }
        Ok(text)
    }

    /// Writes all numbers of all rounds for machines; returns where.
    pub(crate) fn write_json(&self, stage: &Stage) -> Result<PathBuf> {
        let parts: Vec<Value> = self
            .parts
            .iter()
            .map(|(choice, outcome)| match outcome {
                Ok(part) => json!({
                    "part": choice.name, "title": choice.title, "about": part.about,
                    "runs": part.table.json(),
                    "bounds": part.bounds.iter().map(bound::Bound::json).collect::<Vec<_>>(),
                }),
                Err(error) => json!({"part": choice.name, "error": format!("{error:#}")}),
            })
            .collect();
        let all = json!({
            "schema": 1, "versions": self.versions, "load_before": self.load_before,
            "load_after": programs::load()?, "rounds": stage.rounds, "scale": stage.scale,
            "parts": parts,
        });
        // Beside the directory for temporary files, that is in `target`.
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).with_file_name("bench.json");
        std::fs::write(&path, format!("{all:#}\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }
}
