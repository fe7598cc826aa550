//! Medians, ratios, bounds, and how they are shown.

use std::fmt::Write as _;

use crate::measure::Cost;

/// All runs: by what was done and by whom, in the order of the rounds.
#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    what: &'static str,
    who: &'static str,
    costs: Vec<Cost>,
}

impl Table {
    /// Notes one run.
    pub(crate) fn add(&mut self, what: &'static str, who: &'static str, cost: Cost) {
        eprintln!(
            "bench:   {what}, {who}: {:.2} s, {:.2} s of processor, QEMU {:.2} s",
            cost.wall_seconds, cost.cpu_seconds, cost.qemu_seconds
        );
        let known = self
            .rows
            .iter_mut()
            .find(|row| row.what == what && row.who == who);
        if let Some(row) = known {
            row.costs.push(cost);
            return;
        }
        // What is compared stands together.
        let after = self.rows.iter().rposition(|row| row.what == what);
        let place = after.map_or(self.rows.len(), |at| at + 1);
        self.rows.insert(
            place,
            Row {
                what,
                who,
                costs: vec![cost],
            },
        );
    }

    fn ours(&self, what: &str) -> Option<&Row> {
        self.rows
            .iter()
            .find(|row| row.what == what && row.who == "highwater")
    }

    /// Returns how many times longer the other program took: the median of the
    /// rounds' ratios. NaN, which holds no bound, if there is none.
    pub(crate) fn ratio(&self, what: &str) -> f64 {
        let other = self
            .rows
            .iter()
            .find(|row| row.what == what && row.who != "highwater");
        let (Some(ours), Some(other)) = (self.ours(what), other) else {
            return f64::NAN;
        };
        let rounds = ours.costs.iter().zip(&other.costs);
        median(
            rounds
                .map(|(ours, other)| other.wall_seconds / ours.wall_seconds)
                .collect(),
        )
    }

    /// Returns the median of what we stored.
    pub(crate) fn stored_mib(&self, what: &str) -> f64 {
        self.ours(what).map_or(f64::NAN, |row| {
            row.median(|cost| cost.stored_mib.unwrap_or(f64::NAN))
        })
    }

    /// Returns the median of the seconds we took.
    pub(crate) fn wall(&self, what: &str) -> f64 {
        self.ours(what)
            .map_or(f64::NAN, |row| row.median(|cost| cost.wall_seconds))
    }

    /// Returns the table as Markdown.
    pub(crate) fn text(&self) -> String {
        let mut text = String::from(
            "| what | program | seconds | CPU-s | QEMU's CPU-s | MiB stored | peak MiB of memory | ratio |\n\
             |---|---|---:|---:|---:|---:|---:|---:|\n",
        );
        for row in &self.rows {
            let stored = row.median(|cost| cost.stored_mib.unwrap_or(f64::NAN));
            let ratio = if row.who == "highwater" {
                self.ratio(row.what)
            } else {
                f64::NAN
            };
            writeln!(
                text,
                "| {} | {} | {:.2} | {:.2} | {:.2} | {} | {:.0} | {} |",
                row.what,
                row.who,
                row.median(|cost| cost.wall_seconds),
                row.median(|cost| cost.cpu_seconds),
                row.median(|cost| cost.qemu_seconds),
                if stored.is_nan() {
                    String::new()
                } else {
                    format!("{stored:.1}")
                },
                row.median(|cost| cost.memory_mib),
                if ratio.is_nan() {
                    String::new()
                } else {
                    format!("{ratio:.1}x")
                },
            )
            .expect("writing to a String cannot fail");
        }
        text
    }
}

impl Row {
    fn median(&self, field: impl Fn(&Cost) -> f64) -> f64 {
        median(self.costs.iter().map(field).collect())
    }
}

/// Of an even number of values the worse, that is the larger, middle one would
/// flatter ratios; so the mean of both.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match (values.get(middle.wrapping_sub(1)), values.get(middle)) {
        (_, Some(upper)) if !values.len().is_multiple_of(2) => *upper,
        (Some(lower), Some(upper)) => f64::midpoint(*lower, *upper),
        _ => f64::NAN,
    }
}

/// A promise about one number.
#[derive(Debug)]
pub(crate) struct Bound {
    what: &'static str,
    found: f64,
    limit: f64,
    side: Side,
}

#[derive(Debug, Clone, Copy)]
enum Side {
    AtLeast,
    AtMost,
}

impl Bound {
    /// The number must not be below the limit.
    pub(crate) const fn at_least(what: &'static str, found: f64, limit: f64) -> Self {
        Self {
            what,
            found,
            limit,
            side: Side::AtLeast,
        }
    }

    /// The number must not be above the limit.
    pub(crate) const fn at_most(what: &'static str, found: f64, limit: f64) -> Self {
        Self {
            what,
            found,
            limit,
            side: Side::AtMost,
        }
    }

    /// Says whether it is kept; a number that is none keeps nothing.
    pub(crate) fn holds(&self) -> bool {
        match self.side {
            Side::AtLeast => self.found >= self.limit,
            Side::AtMost => self.found <= self.limit,
        }
    }

    /// Returns it as one line.
    pub(crate) fn text(&self) -> String {
        let verdict = if self.holds() { "kept  " } else { "MISSED" };
        let side = match self.side {
            Side::AtLeast => "at least",
            Side::AtMost => "at most",
        };
        format!(
            "{verdict} {}: {:.2} ({side} {})",
            self.what, self.found, self.limit
        )
    }
}
