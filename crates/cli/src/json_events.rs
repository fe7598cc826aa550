//! `--json=events`: one line of JSON per event, schema 1 (docs/json.md).

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use highwater_engine::{DiskProgress, Event};
use highwater_hypervisor::Consistency;
use highwater_model::{Clock as _, SystemClock};
use serde::Serialize;

use crate::{json, output, times};

/// How often the progress of all disks is told.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// Turns events into lines.
pub(crate) struct EventLines(Mutex<State>);

#[derive(Default)]
struct State {
    vm: Option<String>,
    told: Option<Instant>,
}

#[derive(Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
enum Told<'a> {
    Begin,
    Healed {
        what: &'a str,
    },
    Warning {
        what: &'a str,
    },
    Plan {
        disk: &'a str,
        mode: &'a str,
        reason: Option<&'a str>,
        size_bytes: u64,
        dirty_bytes: u64,
    },
    Skipped {
        disk: &'a str,
        reason: &'a str,
    },
    PointInTime {
        consistency: Consistency,
        frozen_ms: Option<u64>,
        stopped_us: Option<u64>,
    },
    Progress {
        disks: Vec<ProgressOf<'a>>,
    },
    Disk {
        disk: &'a str,
        status: &'static str,
        failure: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        size_bytes: Option<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        dirty_bytes: Option<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        read_bytes: Option<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        stored_bytes: Option<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        seconds: Option<f64>,
    },
    Committed {
        point: String,
    },
}

#[derive(Serialize)]
struct ProgressOf<'a> {
    disk: &'a str,
    done_bytes: u64,
    size_bytes: u64,
    read_bytes: u64,
    stored_bytes: u64,
}

#[derive(Serialize)]
struct Stamped<'a> {
    schema: u32,
    #[serde(flatten)]
    told: Told<'a>,
    time: String,
    vm: Option<&'a str>,
}

impl EventLines {
    pub(crate) fn new() -> Self {
        Self(Mutex::default())
    }

    pub(crate) fn event(&self, event: &Event<'_>) {
        // Held while the line is written, so that lines stay in order.
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let told = match event {
            Event::Started { vm } => {
                state.vm = Some((*vm).to_owned());
                Told::Begin
            }
            Event::Healed(what) => Told::Healed { what },
            Event::Warning(what) => Told::Warning { what },
            Event::Planned {
                disk,
                mode,
                reason,
                size_bytes,
                dirty_bytes,
                ..
            } => Told::Plan {
                disk,
                mode,
                reason: *reason,
                size_bytes: *size_bytes,
                dirty_bytes: *dirty_bytes,
            },
            Event::Skipped { disk, reason } => Told::Skipped { disk, reason },
            Event::Beginning | Event::EndedWithWarnings | Event::Committing => return,
            Event::Begun {
                consistency,
                frozen_ms,
                stopped_us,
            } => Told::PointInTime {
                consistency: *consistency,
                frozen_ms: *frozen_ms,
                stopped_us: *stopped_us,
            },
            Event::Progress(disks) => {
                if state
                    .told
                    .is_some_and(|told| told.elapsed() < PROGRESS_EVERY)
                {
                    return;
                }
                state.told = Some(Instant::now());
                Told::Progress {
                    disks: disks.iter().map(progress_of).collect(),
                }
            }
            Event::DiskDone {
                disk,
                failure,
                done,
            } => Told::Disk {
                disk,
                status: if failure.is_some() { "failed" } else { "ok" },
                failure: *failure,
                size_bytes: done.map(|done| done.size_bytes),
                dirty_bytes: done.map(|done| done.dirty_bytes),
                read_bytes: done.map(|done| done.read_bytes),
                stored_bytes: done.map(|done| done.stored_bytes),
                seconds: done.map(|done| json::seconds(done.elapsed)),
            },
            Event::Committed { point } => Told::Committed {
                point: point.to_string(),
            },
        };
        // Whoever stopped reading gets no less of a backup.
        drop(output::line(&Stamped {
            schema: json::SCHEMA,
            told,
            time: times::rfc3339(SystemClock.now()),
            vm: state.vm.as_deref(),
        }));
    }
}

fn progress_of(disk: &DiskProgress) -> ProgressOf<'_> {
    ProgressOf {
        disk: &disk.disk,
        done_bytes: disk.done_bytes,
        size_bytes: disk.size_bytes,
        read_bytes: disk.read_bytes,
        stored_bytes: disk.stored_bytes,
    }
}
