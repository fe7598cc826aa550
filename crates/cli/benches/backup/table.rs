//! What was done by whom at what cost: medians, ratios, and how they are shown.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::measure::Cost;

/// The program under test.
pub(crate) const OURS: &str = "highwater";

/// What was done, and by whom.
pub(crate) type Run = (&'static str, &'static str);

/// All runs, each in the order of the rounds.
#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    run: Run,
    costs: Vec<Cost>,
}

impl Table {
    /// Notes one run.
    pub(crate) fn add(&mut self, run: Run, cost: Cost) {
        let (what, who) = run;
        let stored = cost
            .stored_mib
            .map_or(String::new(), |mib| format!(", {mib:.1} MiB stored"));
        eprintln!(
            "bench:   {what}, {who}: {:.2} s, {:.2} s of processor, QEMU {:.2} s, {:.0} MiB{stored}",
            cost.wall_seconds, cost.cpu_seconds, cost.qemu_seconds, cost.memory_mib
        );
        if let Some(row) = self.rows.iter_mut().find(|row| row.run == run) {
            row.costs.push(cost);
            return;
        }
        // What is compared stands together.
        let after = self.rows.iter().rposition(|row| row.run.0 == what);
        let place = after.map_or(self.rows.len(), |at| at + 1);
        let costs = vec![cost];
        self.rows.insert(place, Row { run, costs });
    }

    fn costs(&self, run: Run) -> &[Cost] {
        let row = self.rows.iter().find(|row| row.run == run);
        row.map_or(&[], |row| &row.costs)
    }

    /// Returns the median of one number; NaN, which keeps no bound, if the run
    /// was not measured.
    pub(crate) fn median(&self, run: Run, number: impl Fn(&Cost) -> f64) -> f64 {
        median(self.costs(run).iter().map(number).collect())
    }

    /// Returns the largest of one number in all rounds.
    pub(crate) fn largest(&self, run: Run, number: impl Fn(&Cost) -> f64) -> f64 {
        let all = self.costs(run).iter().map(number);
        all.reduce(f64::max).unwrap_or(f64::NAN)
    }

    /// Returns by what a number of one run must be multiplied to have that of
    /// the other: the median of the rounds' ratios, because a machine that is
    /// busy with other things is so for both runs of a round.
    pub(crate) fn ratio(&self, of: Run, to: Run, number: impl Fn(&Cost) -> f64) -> f64 {
        let rounds = self.costs(of).iter().zip(self.costs(to));
        median(rounds.map(|(of, to)| number(of) / number(to)).collect())
    }

    /// Returns how many times faster we did something than another program.
    pub(crate) fn times_faster(&self, what: &'static str, who: &'static str) -> f64 {
        self.ratio((what, who), (what, OURS), |cost| cost.wall_seconds)
    }

    /// Returns how many times as much as another program we stored.
    pub(crate) fn times_larger(&self, what: &'static str, who: &'static str) -> f64 {
        self.ratio((what, OURS), (what, who), Cost::stored)
    }

    /// Returns the table as Markdown. What others took is divided by what we
    /// took for the same.
    pub(crate) fn markdown(&self) -> String {
        let mut text = String::from(
            "| what | program | seconds | ratio | CPU-s | QEMU's CPU-s | MiB stored | peak MiB of memory |\n\
             |---|---|---:|---:|---:|---:|---:|---:|\n",
        );
        for row in &self.rows {
            let (what, who) = row.run;
            let ratio = if who == OURS {
                f64::NAN
            } else {
                self.times_faster(what, who)
            };
            writeln!(
                text,
                "| {what} | {who} | {:.2} | {} | {:.2} | {:.2} | {} | {:.0} |",
                self.median(row.run, |cost| cost.wall_seconds),
                number(ratio, 1, "x"),
                self.median(row.run, |cost| cost.cpu_seconds),
                self.median(row.run, |cost| cost.qemu_seconds),
                number(self.median(row.run, Cost::stored), 1, ""),
                self.largest(row.run, |cost| cost.memory_mib),
            )
            .expect("writing to a String cannot fail");
        }
        text
    }

    /// Returns every run of every round for machines.
    pub(crate) fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let rounds: Vec<Value> = row.costs.iter().map(Cost::json).collect();
            json!({"what": row.run.0, "program": row.run.1, "rounds": rounds})
        });
        rows.collect()
    }
}

fn number(value: f64, digits: usize, unit: &str) -> String {
    if value.is_nan() {
        String::new()
    } else {
        format!("{value:.digits$}{unit}")
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
