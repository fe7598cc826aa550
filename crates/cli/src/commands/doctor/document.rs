//! A look at a VM as JSON: schema 1.

#![expect(
    clippy::struct_field_names,
    reason = "the names of fields are the schema"
)]

use highwater_engine::{Checkup, DiskEstimate, Finding, MarkReport, Problem, Verdict};
use highwater_hypervisor::JobFacts;
use serde::Serialize;

use super::{Seen, words};
use crate::json::SCHEMA;
use crate::times;

#[derive(Debug, Serialize)]
pub(super) struct Document<'a> {
    schema: u32,
    vm: &'a str,
    vm_uuid: Option<&'a str>,
    status: &'static str,
    state: &'static str,
    held_by: Option<Holder>,
    job: Option<Job>,
    findings: Vec<Told>,
    marks: Vec<Mark>,
    next_backup: Next<'a>,
    fixed: &'a [String],
    failed: Vec<Failed<'a>>,
    warnings: &'a [String],
    exit_code: u8,
}

/// The living backup that holds the VM.
#[derive(Debug, Serialize)]
struct Holder {
    /// Absent where it runs on this host.
    host: Option<String>,
    process: Option<u32>,
    since: Option<String>,
}

#[derive(Debug, Serialize)]
struct Job {
    kind: &'static str,
    session: Option<String>,
    what: Option<String>,
    seconds: Option<u64>,
    address: Option<String>,
}

#[derive(Debug, Serialize)]
struct Told {
    kind: &'static str,
    remedy: &'static str,
    what: String,
    #[serde(rename = "do")]
    todo: Vec<String>,
    mark: Option<String>,
    disk: Option<String>,
}

#[derive(Debug, Serialize)]
struct Mark {
    mark: String,
    point: String,
    this_repository: bool,
    verdict: &'static str,
    reason: Option<&'static str>,
    needed_by: Vec<String>,
    checkpoint: bool,
    disks: Vec<MarkDisk>,
}

#[derive(Debug, Serialize)]
struct MarkDisk {
    disk: String,
    bitmap: &'static str,
    dirty_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Next<'a> {
    possible: bool,
    because: Option<String>,
    would_heal: &'a [String],
    disks: Vec<Disk<'a>>,
}

#[derive(Debug, Serialize)]
struct Disk<'a> {
    disk: &'a str,
    mode: &'static str,
    reason: Option<&'static str>,
    size_bytes: u64,
    dirty_bytes: u64,
    read_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Failed<'a> {
    what: &'a str,
    error: &'a str,
    because: &'a [String],
    hint: Option<&'a str>,
}

impl<'a> Document<'a> {
    pub(super) fn new(seen: &'a Seen) -> Self {
        let checkup = &seen.checkup;
        let failed = |(what, error): &'a (String, highwater_hypervisor::HypervisorError)| Failed {
            what,
            error: &error.message,
            because: &error.because,
            hint: error.hint.as_deref(),
        };
        Self {
            schema: SCHEMA,
            vm: &checkup.vm.name,
            vm_uuid: checkup.vm.uuid.as_deref(),
            status: if !checkup.failed.is_empty() {
                "fix-failed"
            } else if checkup.is_healthy() {
                "healthy"
            } else {
                "needs-fixing"
            },
            state: words::state_word(checkup.state),
            held_by: checkup.held_by.as_ref().map(|holder| Holder {
                host: holder.host.clone(),
                process: holder.process,
                since: holder.since.map(times::rfc3339),
            }),
            job: job(checkup),
            findings: checkup
                .findings
                .iter()
                .map(|it| told(it, checkup))
                .collect(),
            marks: checkup.marks.iter().map(mark).collect(),
            next_backup: Next {
                possible: checkup.next.refused.is_none(),
                because: checkup
                    .next
                    .refused
                    .as_ref()
                    .map(|refused| words::refused(refused, checkup)),
                would_heal: &checkup.next.would_heal,
                disks: checkup.next.disks.iter().map(disk).collect(),
            },
            fixed: &checkup.fixed,
            failed: checkup.failed.iter().map(failed).collect(),
            warnings: &checkup.warnings,
            exit_code: seen.code(),
        }
    }
}

fn job(checkup: &Checkup) -> Option<Job> {
    let details = checkup.surroundings.job.as_ref();
    let (kind, session, what) = match checkup.job.as_ref()? {
        JobFacts::Ours(session) => ("ours", Some(session.to_string()), None),
        JobFacts::ForeignBackup(_) => ("foreign-backup", None, None),
        JobFacts::Forgotten => ("forgotten", None, None),
        JobFacts::Other(word) => ("other", None, Some(word.clone())),
    };
    Some(Job {
        kind,
        session,
        what,
        seconds: details.and_then(|job| job.running_s),
        address: details.and_then(|job| job.address.clone()),
    })
}

fn told(finding: &Finding, checkup: &Checkup) -> Told {
    let said = words::say(finding, checkup);
    let (mark, disk) = match &finding.problem {
        Problem::Mark { name, .. } => (Some(name.to_string()), None),
        Problem::GraphChanged { disk }
        | Problem::GraphUnknown { disk }
        | Problem::BitmapBusy { disk }
        | Problem::BitmapLied { disk } => (None, Some(disk.clone())),
        _ => (None, None),
    };
    Told {
        kind: finding.problem.word(),
        remedy: finding.remedy.word(),
        what: said.what,
        todo: said.todo,
        mark,
        disk,
    }
}

fn mark(mark: &MarkReport) -> Mark {
    Mark {
        mark: mark.name.to_string(),
        point: mark.name.point().to_string(),
        this_repository: mark.verdict != Verdict::OtherRepository,
        verdict: mark.verdict.word(),
        reason: match &mark.verdict {
            Verdict::Useless(why) => Some(why.word()),
            _ => None,
        },
        needed_by: match &mark.verdict {
            Verdict::Needed(disks) | Verdict::Forgotten(disks) => disks.clone(),
            _ => Vec::new(),
        },
        checkpoint: mark.has_record,
        disks: mark
            .disks
            .iter()
            .map(|disk| MarkDisk {
                disk: disk.target.clone(),
                bitmap: words::bitmap_word(disk.bitmap),
                dirty_bytes: disk.dirty_bytes,
            })
            .collect(),
    }
}

fn disk(disk: &DiskEstimate) -> Disk<'_> {
    Disk {
        disk: &disk.disk,
        mode: disk.mode,
        reason: disk.reason,
        size_bytes: disk.size_bytes,
        dirty_bytes: disk.dirty_bytes,
        read_bytes: disk.read_bytes,
    }
}
