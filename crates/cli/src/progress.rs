//! Shows what happens: bars at a terminal, plain lines otherwise.

use std::collections::HashMap;
use std::io::IsTerminal as _;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use highwater_engine::{DiskDone, DiskProgress, Event, Observer};
use highwater_hypervisor::Consistency;
use highwater_model::format_size;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::args::{Global, JsonStyle};
use crate::json_events::EventLines;
use crate::{doing, output};

/// How often a plain line tells about each disk.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Which talk is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    Quiet,
    Lines,
    Bars,
    Events,
}

/// Renders events of one command.
pub(crate) struct Progress {
    style: Style,
    verbose: bool,
    /// Whether it is told how far things are.
    how_far: bool,
    events: EventLines,
    state: Mutex<State>,
}

struct State {
    bars: MultiProgress,
    plans: HashMap<String, Plan>,
    disks: HashMap<String, ProgressBar>,
    started: Instant,
    told: Instant,
}

/// How a disk was planned to be read.
struct Plan {
    mode: String,
    sentence: Option<String>,
}

impl Progress {
    pub(crate) fn new(global: &Global) -> Self {
        let style = if global.json_style == Some(JsonStyle::Events) {
            Style::Events
        } else if global.quiet || global.json {
            Style::Quiet
        } else if global.no_progress || !std::io::stderr().is_terminal() {
            Style::Lines
        } else {
            Style::Bars
        };
        let now = Instant::now();
        let state = State {
            bars: MultiProgress::new(),
            plans: HashMap::new(),
            disks: HashMap::new(),
            started: now,
            told: now,
        };
        Self {
            style,
            verbose: global.verbose,
            how_far: !global.no_progress,
            events: EventLines::new(),
            state: Mutex::new(state),
        }
    }

    /// Takes the bars away; what was talked stays.
    pub(crate) fn end(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, bar) in state.disks.drain() {
            bar.finish_and_clear();
        }
    }

    fn say(&self, line: &str) {
        match self.style {
            Style::Quiet | Style::Events => {}
            Style::Lines => output::talk(line),
            Style::Bars => {
                let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                state.bars.suspend(|| output::talk(line));
            }
        }
    }

    fn show(&self, disks: &[DiskProgress]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match self.style {
            Style::Quiet | Style::Events => {}
            Style::Bars => {
                for disk in disks {
                    let State { bars, disks, .. } = &mut *state;
                    let bar = disks.entry(disk.disk.clone()).or_insert_with(|| {
                        let bar = ProgressBar::new(disk.size_bytes).with_style(bar_style());
                        bars.add(bar.with_prefix(output::harmless(&disk.disk)))
                    });
                    bar.set_position(disk.done_bytes);
                    bar.set_message(amounts(disk));
                }
            }
            Style::Lines => {
                if !self.how_far || state.told.elapsed() < LINE_EVERY {
                    return;
                }
                state.told = Instant::now();
                let elapsed = state.started.elapsed();
                for disk in disks
                    .iter()
                    .filter(|disk| disk.done_bytes < disk.size_bytes)
                {
                    output::talk(&line(disk, elapsed));
                }
            }
        }
    }
}

fn bar_style() -> ProgressStyle {
    ProgressStyle::with_template(
        "{prefix:>6} {bar:28} {percent:>3}%  {binary_bytes_per_sec}  {msg}  ETA {eta}",
    )
    .unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn amounts(disk: &DiskProgress) -> String {
    format!(
        "read {}, stored {}",
        format_size(disk.read_bytes),
        format_size(disk.stored_bytes)
    )
}

fn line(disk: &DiskProgress, elapsed: Duration) -> String {
    let percent = disk.done_bytes.saturating_mul(100) / disk.size_bytes.max(1);
    let seconds = elapsed.as_secs().max(1);
    let rate = disk.read_bytes / seconds;
    let left = disk.size_bytes.saturating_sub(disk.done_bytes);
    let pace = (disk.done_bytes / seconds).max(1);
    format!(
        "{}: {percent} %, {}, {}/s, {} s left",
        disk.disk,
        amounts(disk),
        format_size(rate),
        left / pace
    )
}

/// The one line of a disk that a person wants to see in the morning.
fn done_line(disk: &str, plan: Option<&Plan>, done: &DiskDone) -> Option<String> {
    let plan = plan?;
    let knows_what_changed = matches!(plan.mode.as_str(), "incremental" | "differential");
    let why = plan
        .sentence
        .as_ref()
        .map_or_else(String::new, |sentence| format!(" ({sentence})"));
    let (amount, word) = if knows_what_changed {
        (done.dirty_bytes, "dirty")
    } else {
        (done.read_bytes, "read")
    };
    Some(format!(
        "  {disk}  {}{why}: {} of {} {word}, {} stored in {:.1} s",
        plan.mode,
        format_size(amount),
        format_size(done.size_bytes),
        format_size(done.stored_bytes),
        done.elapsed.as_secs_f64(),
    ))
}

impl Observer for Progress {
    fn event(&self, event: &Event<'_>) {
        doing::note(event);
        if let Event::Warning(_) = event {
            output::note_warning();
        }
        if self.style == Style::Events {
            return self.events.event(event);
        }
        match event {
            Event::Started { vm } => {
                let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                state.started = Instant::now();
                drop(state);
                self.say(vm);
            }
            Event::Healed(what) => self.say(&format!("  healed: {what}")),
            // A warning is told even when everything else is quiet.
            Event::Warning(what) if self.style == Style::Quiet => {
                output::talk(&format!("warning: {what}"));
            }
            Event::Warning(what) => self.say(&format!("  warning: {what}")),
            Event::Planned {
                disk,
                mode,
                sentence,
                size_bytes,
                dirty_bytes,
                ..
            } => self.planned(disk, mode, *sentence, *dirty_bytes, *size_bytes),
            Event::Skipped { disk, reason } => self.say(&format!("  {disk}  left out: {reason}")),
            Event::Beginning
            | Event::EndedWithWarnings
            | Event::Committing
            | Event::Committed { .. } => {}
            Event::Begun {
                consistency,
                frozen_ms,
                stopped_us,
            } if self.verbose => {
                let how = match consistency {
                    Consistency::Filesystem => "file systems frozen",
                    Consistency::Crash => "as after a power cut",
                    Consistency::Offline => "VM off",
                    Consistency::Paused => "VM paused",
                };
                let frozen = frozen_ms.map_or_else(String::new, |ms| format!(" for {ms} ms"));
                let stopped = stopped_us.map_or_else(String::new, |us| {
                    let (whole, tenths) = (us / 1000, us % 1000 / 100);
                    format!(", stopped for {whole}.{tenths} ms")
                });
                self.say(&format!("  point in time taken: {how}{frozen}{stopped}"));
            }
            Event::Begun { .. } => {}
            Event::Progress(disks) => self.show(disks),
            Event::DiskDone {
                disk,
                failure,
                done,
            } => self.done(disk, *failure, done.as_ref()),
        }
    }
}

impl Progress {
    fn planned(
        &self,
        disk: &str,
        mode: &str,
        sentence: Option<&str>,
        dirty_bytes: u64,
        size_bytes: u64,
    ) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = Plan {
            mode: mode.to_owned(),
            sentence: sentence.map(str::to_owned),
        };
        state.plans.insert(disk.to_owned(), plan);
        drop(state);
        if self.verbose {
            let why = sentence.map_or_else(String::new, |why| format!(" ({why})"));
            self.say(&format!(
                "  {disk}  plan: {mode}{why}, {} of {} to look at",
                format_size(dirty_bytes),
                format_size(size_bytes)
            ));
        }
    }

    fn done(&self, disk: &str, failure: Option<&str>, done: Option<&DiskDone>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bar) = state.disks.remove(disk) {
            bar.finish_and_clear();
        }
        let line = done.and_then(|done| done_line(disk, state.plans.get(disk), done));
        drop(state);
        if let Some(failure) = failure {
            self.say(&format!("  {disk}  NOT in this restore point: {failure}"));
        }
        if let Some(line) = line {
            self.say(&line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_one_line_that_says_what_was_read_and_why() {
        let check = |mode: &str, sentence: Option<&str>, expected: &str| {
            let plan = Plan {
                mode: mode.to_owned(),
                sentence: sentence.map(str::to_owned),
            };
            let done = DiskDone {
                size_bytes: 20 << 30,
                dirty_bytes: 31 << 20,
                read_bytes: 30 << 20,
                stored_bytes: 29 << 20,
                elapsed: Duration::from_millis(421),
            };
            assert_eq!(done_line("vda", Some(&plan), &done).unwrap(), expected);
        };
        check(
            "incremental",
            None,
            "  vda  incremental: 31 MiB of 20 GiB dirty, 29 MiB stored in 0.4 s",
        );
        check(
            "rescan",
            Some("bitmap missing"),
            "  vda  rescan (bitmap missing): 30 MiB of 20 GiB read, 29 MiB stored in 0.4 s",
        );
    }
}
