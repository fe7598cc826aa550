//! Shows what happens: bars at a terminal, plain lines otherwise.

use std::collections::HashMap;
use std::io::IsTerminal as _;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use highwater_engine::{DiskProgress, Event, Observer};
use highwater_hypervisor::Consistency;
use highwater_model::format_size;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::args::Global;
use crate::output;

/// How often a plain line tells about each disk.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Which talk is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    Quiet,
    Lines,
    Bars,
}

/// Renders events of one command.
pub(crate) struct Progress {
    style: Style,
    state: Mutex<State>,
}

struct State {
    bars: MultiProgress,
    disks: HashMap<String, ProgressBar>,
    started: Instant,
    told: Instant,
}

impl Progress {
    pub(crate) fn new(global: &Global) -> Self {
        let style = if global.quiet || global.json {
            Style::Quiet
        } else if global.no_progress || !std::io::stderr().is_terminal() {
            Style::Lines
        } else {
            Style::Bars
        };
        let now = Instant::now();
        let state = State {
            bars: MultiProgress::new(),
            disks: HashMap::new(),
            started: now,
            told: now,
        };
        Self {
            style,
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
            Style::Quiet => {}
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
            Style::Quiet => {}
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
                if state.told.elapsed() < LINE_EVERY {
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

impl Observer for Progress {
    fn event(&self, event: &Event<'_>) {
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
                reason,
                size_bytes,
            } => {
                let why = reason.map_or_else(String::new, |reason| format!(" ({reason})"));
                self.say(&format!(
                    "  {disk}: {mode}{why}, {}",
                    format_size(*size_bytes)
                ));
            }
            Event::Skipped { disk, reason } => self.say(&format!("  {disk}: skipped, {reason}")),
            Event::Beginning | Event::Committing | Event::Committed { .. } => {}
            Event::Begun {
                consistency,
                frozen_ms,
            } => {
                let how = match consistency {
                    Consistency::Filesystem => "file systems frozen",
                    Consistency::Crash => "as after a power cut",
                    Consistency::Offline => "VM off",
                    Consistency::Paused => "VM paused",
                };
                let frozen = frozen_ms.map_or_else(String::new, |ms| format!(" for {ms} ms"));
                self.say(&format!("  point in time taken: {how}{frozen}"));
            }
            Event::Progress(disks) => self.show(disks),
            Event::DiskDone { disk, failure } => {
                let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(bar) = state.disks.remove(*disk) {
                    bar.finish_and_clear();
                }
                drop(state);
                if let Some(failure) = failure {
                    self.say(&format!("  {disk}: failed: {failure}"));
                }
            }
        }
    }
}
