//! Promises about numbers, and whether they are kept.

use std::fmt::Write as _;

use serde_json::{Value, json};

/// What becomes of a promise that is missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Weight {
    /// The benchmark fails.
    Gate,
    /// It is said, and no more.
    Goal,
}

/// On which side of a number it must be.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Limit {
    /// Not below.
    AtLeast(f64),
    /// Not above.
    AtMost(f64),
}

/// A promise about one number.
#[derive(Debug)]
pub(crate) struct Bound {
    what: String,
    found: f64,
    limit: Limit,
    weight: Weight,
}

/// Returns a promise that fails the benchmark if it is missed.
pub(crate) fn gate(what: &str, found: f64, limit: Limit) -> Bound {
    Bound {
        what: what.to_owned(),
        found,
        limit,
        weight: Weight::Gate,
    }
}

/// Returns a promise whose miss is only said.
pub(crate) fn goal(what: &str, found: f64, limit: Limit) -> Bound {
    Bound {
        weight: Weight::Goal,
        ..gate(what, found, limit)
    }
}

impl Bound {
    /// Says whether it is kept; a number that is none keeps nothing.
    fn is_kept(&self) -> bool {
        match self.limit {
            Limit::AtLeast(limit) => self.found >= limit,
            Limit::AtMost(limit) => self.found <= limit,
        }
    }

    /// Says whether the benchmark may succeed with it.
    pub(crate) fn is_no_failure(&self) -> bool {
        self.weight == Weight::Goal || self.is_kept()
    }

    fn verdict(&self) -> &'static str {
        match (self.is_kept(), self.weight) {
            (true, _) => "kept",
            (false, Weight::Gate) => "MISSED",
            (false, Weight::Goal) if self.found.is_nan() => "not measured",
            (false, Weight::Goal) => "missed",
        }
    }

    fn weight(&self) -> &'static str {
        match self.weight {
            Weight::Gate => "gate",
            Weight::Goal => "goal",
        }
    }

    fn found(&self) -> String {
        if self.found.is_nan() {
            String::new()
        } else {
            format!("{:.2}", self.found)
        }
    }

    fn limit(&self) -> String {
        match self.limit {
            Limit::AtLeast(limit) => format!("at least {limit}"),
            Limit::AtMost(limit) => format!("at most {limit}"),
        }
    }

    /// Returns it as a line for whoever watches.
    pub(crate) fn line(&self) -> String {
        format!(
            "{} {}: {}: {} ({})",
            self.verdict(),
            self.weight(),
            self.what,
            self.found(),
            self.limit()
        )
    }

    /// Returns it for machines.
    pub(crate) fn json(&self) -> Value {
        let (side, limit) = match self.limit {
            Limit::AtLeast(limit) => ("at-least", limit),
            Limit::AtMost(limit) => ("at-most", limit),
        };
        json!({
            "what": self.what, "weight": self.weight(), "found": self.found,
            "side": side, "limit": limit, "kept": self.is_kept(),
        })
    }
}

/// Returns them as a Markdown table.
pub(crate) fn markdown<'a>(bounds: impl Iterator<Item = &'a Bound>) -> String {
    let mut text = String::from("| | promised | limit | found | |\n|---|---|---|---:|---|\n");
    for bound in bounds {
        writeln!(
            text,
            "| {} | {} | {} | {} | {} |",
            bound.weight(),
            bound.what,
            bound.limit(),
            bound.found(),
            bound.verdict()
        )
        .expect("writing to a String cannot fail");
    }
    text
}
