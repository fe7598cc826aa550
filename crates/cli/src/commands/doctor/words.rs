//! What each finding means, and what to do about it.

use std::path::PathBuf;

use highwater_engine::{
    BitmapView, ChangedGraph, Checkup, Finding, MarkOnDisk, Problem, Refusal, Refused, Remedy,
    Strange, Verdict, Wrecks, known_program,
};
use highwater_hypervisor::{JobFacts, RunState};
use highwater_model::{Clock as _, MarkName, SessionId, SystemClock, format_size};

use crate::by_hand;

/// A finding in words.
pub(super) struct Said {
    /// What it is, and what it costs.
    pub(super) what: String,
    /// What to do, line by line; empty if there is nothing to be done.
    pub(super) todo: Vec<String>,
}

/// Says one finding.
pub(super) fn say(finding: &Finding, checkup: &Checkup) -> Said {
    let vm = &checkup.vm.name;
    let (what, hand) = match &finding.problem {
        Problem::DeadSession(session) => (dead_session(*session, checkup), Vec::new()),
        Problem::ForeignJob => foreign_job(checkup),
        Problem::Stuck => (
            "the VM is paused because a write of it failed".to_owned(),
            vec![format!(
                "see {}, make room, then {}",
                by_hand::see_disk_errors(vm),
                by_hand::resume(vm)
            )],
        ),
        Problem::GraphChanged { disk } => graph_changed(disk, checkup),
        Problem::GraphUnknown { disk } => graph_unknown(disk, checkup),
        Problem::BitmapBusy { disk } => (
            format!("disk {disk}: something uses the bitmap of its mark, so a backup is refused"),
            vec!["end the job or export that uses it".to_owned()],
        ),
        Problem::BitmapLied { disk } => (
            format!(
                "disk {disk}: the bitmap of its mark lies: blocks that it calls clean were written to"
            ),
            Vec::new(),
        ),
        Problem::LeftDirectories(session) => (left_directories(*session, checkup), Vec::new()),
        Problem::Remains(session) => (
            format!(
                "dead session {session} left nodes or exports in QEMU: they hold its files open, \
                 and QEMU's one NBD server may be in use because of them"
            ),
            Vec::new(),
        ),
        Problem::Mark { name, verdict } => (mark(name, verdict), Vec::new()),
        Problem::UnreadablePoint(point) => (
            format!("restore point {point} cannot be read; its mark, if it has one, is kept"),
            vec!["highwater verify".to_owned()],
        ),
        Problem::OtherRepository { repo, marks } => (
            format!(
                "{} of another repository ({repo}...): left alone",
                count(marks.len(), "mark")
            ),
            vec![format!(
                "to look at them or to remove them: highwater doctor {vm} -r THAT-REPOSITORY"
            )],
        ),
        Problem::OtherVm(marks) => (
            format!(
                "{} of another VM in a backing file: left alone",
                count(marks.len(), "mark")
            ),
            Vec::new(),
        ),
        Problem::Strange(strange @ Strange::Export { is_nbd: true, .. }) => (
            strange_thing(strange),
            vec![
                "end the program that made it; or, if that is gone:".to_owned(),
                by_hand::qmp(vm, r#"{"execute":"nbd-server-stop"}"#),
            ],
        ),
        Problem::Strange(strange) => (strange_thing(strange), Vec::new()),
        Problem::Wreckage(wrecks) => wreckage(*wrecks, checkup),
    };
    let todo = match finding.remedy {
        Remedy::Hand | Remedy::Nothing => hand,
        Remedy::Fix => vec![format!("highwater doctor {vm} --fix")],
        Remedy::NextBackup if checkup.held_by.is_some() => {
            vec!["nothing: the running backup or the next one repairs it".to_owned()]
        }
        Remedy::NextBackup => {
            vec!["nothing: the next backup repairs it once the VM runs".to_owned()]
        }
    };
    Said { what, todo }
}

fn wreckage(wrecks: Wrecks, checkup: &Checkup) -> (String, Vec<String>) {
    let found = &checkup.wreckage;
    let names: Vec<String> = found
        .wrecks
        .iter()
        .map(|wreck| format!("{} {}", wreck.kind, wreck.name))
        .collect();
    let names = names.join(", ");
    if let Some(because) = &found.in_use {
        return (
            format!("qmpbackup is at work ({because}): {names}"),
            Vec::new(),
        );
    }
    let remove = format!(
        "highwater doctor {} --fix --foreign qmpbackup",
        checkup.vm.name
    );
    if wrecks.harmful == 0 {
        return (
            format!("qmpbackup has been here: {names}: left alone"),
            vec![format!(
                "to remove it, if qmpbackup is used no more: {remove}"
            )],
        );
    }
    (
        format!(
            "a backup of qmpbackup was cut short and left: {names}; its filter copies what the \
             guest overwrites into a file that grows, and qmpbackup itself fails as long as they \
             are there"
        ),
        vec![remove],
    )
}

fn dead_session(session: SessionId, checkup: &Checkup) -> String {
    let job = checkup.surroundings.job.as_ref();
    let since = job
        .and_then(|job| job.running_s)
        .map_or_else(String::new, |seconds| format!(", since {seconds} s"));
    format!(
        "the backup job of dead session {session} runs on{since}: it blocks backups, migration, \
         save and snapshots of the VM"
    )
}

fn foreign_job(checkup: &Checkup) -> (String, Vec<String>) {
    let vm = &checkup.vm.name;
    let details = checkup.surroundings.job.as_ref();
    let since = details
        .and_then(|job| job.running_s)
        .map_or_else(String::new, |seconds| format!(", since {seconds} s"));
    if checkup.job == Some(JobFacts::Forgotten) {
        return (
            "libvirt died while it started a backup job, has lost what it knew of the job, and \
             holds the VM for it"
                .to_owned(),
            vec![crate::advice::forgotten_job(vm)],
        );
    }
    let blocks = "until it ends, libvirt refuses backups, migration, save and snapshots";
    let Some(JobFacts::ForeignBackup(_)) = &checkup.job else {
        let word = match &checkup.job {
            Some(JobFacts::Other(word)) => word.as_str(),
            _ => "job",
        };
        return (
            format!("a {word} runs{since}: {blocks}"),
            vec!["wait until it has ended".to_owned()],
        );
    };
    let files = details.map(|job| job.files.as_slice()).unwrap_or_default();
    let address = details.and_then(|job| job.address.clone());
    let names = address.iter().map(PathBuf::from).chain(files.to_vec());
    let known = names
        .filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
        .find_map(|name| known_program(&name));
    let at = address.map_or_else(String::new, |address| format!(", read at {address}"));
    (
        format!(
            "a backup job of {} runs{since}{at}: {blocks}",
            known.unwrap_or("another program")
        ),
        vec![
            "wait for it".to_owned(),
            format!("or, if its program is gone: {}", by_hand::end_job(vm)),
        ],
    )
}

fn changed<'a>(disk: &str, checkup: &'a Checkup) -> Option<&'a ChangedGraph> {
    checkup.changed.iter().find(|it| it.disk == disk)
}

fn graph_changed(disk: &str, checkup: &Checkup) -> (String, Vec<String>) {
    let vm = &checkup.vm.name;
    let Some(graph) = changed(disk, checkup) else {
        return (
            format!("disk {disk}: its image chain was changed"),
            Vec::new(),
        );
    };
    let (guest, exported) = (&graph.guest, &graph.exported);
    let file = graph
        .file
        .as_ref()
        .map_or_else(String::new, |it| format!(" ({it})"));
    let what = format!(
        "disk {disk}: a snapshot was taken over QMP, behind libvirt: the guest writes to \
         `{guest}`{file}, and a backup would read `{exported}`, so it is refused; do not shut the \
         VM down before this is undone: libvirt would start it without what was written since"
    );
    let qmp = |command: &str| by_hand::qmp(vm, command);
    let job = format!("merge-{disk}");
    (
        what,
        vec![
            "merge the snapshot into the image below it, while the VM runs:".to_owned(),
            qmp(&format!(
                r#"{{"execute":"block-commit","arguments":{{"job-id":"{job}","device":"{guest}","base-node":"{exported}"}}}}"#
            )),
            qmp(r#"{"execute":"query-block-jobs"}"#) + "   until it says \"ready\": true",
            qmp(&format!(
                r#"{{"execute":"block-job-complete","arguments":{{"device":"{job}"}}}}"#
            )),
        ],
    )
}

fn graph_unknown(disk: &str, checkup: &Checkup) -> (String, Vec<String>) {
    let because = changed(disk, checkup).and_then(|graph| graph.unknown.clone());
    (
        format!(
            "disk {disk}: cannot learn which image the guest writes to ({}), so a backup is refused",
            because.unwrap_or_else(|| "nobody says why".to_owned())
        ),
        vec![format!(
            "back up the other disks: highwater backup {} -x {disk}",
            checkup.vm.name
        )],
    )
}

fn left_directories(session: SessionId, checkup: &Checkup) -> String {
    let left = checkup.left.iter().filter(|it| it.session == session);
    let bytes = left
        .clone()
        .fold(0, |sum: u64, it| sum.saturating_add(it.bytes));
    let dirs: Vec<String> = left.map(|it| it.dir.display().to_string()).collect();
    format!(
        "dead session {session} left {} in {}",
        format_size(bytes),
        dirs.join(" and ")
    )
}

fn mark(name: &MarkName, verdict: &Verdict) -> String {
    match verdict {
        Verdict::Unfinished => format!("mark {name} is of a backup that was never committed"),
        Verdict::Forgotten(disks) => format!(
            "libvirt forgot mark {name}, which the next backup of {} builds on",
            disks.join(", ")
        ),
        Verdict::Superseded => format!("mark {name} is superseded by a newer one"),
        Verdict::Useless(why) => format!("mark {name} is useless: {}", why.sentence()),
        _ => format!("mark {name} is needed by no disk"),
    }
}

fn strange_thing(strange: &Strange) -> String {
    let of = |name: &str| {
        let program = known_program(name).unwrap_or("another program");
        format!("of {program}")
    };
    match strange {
        Strange::Checkpoint { name, disks } => format!(
            "checkpoint `{name}` {} on {}: left alone; every write is recorded for it, too, and it \
             keeps the VM from being reverted to an internal snapshot",
            of(name),
            list_or(disks, "no disk"),
        ),
        Strange::Bitmap {
            name,
            disk,
            recording,
        } => format!(
            "bitmap `{name}` {} on {disk}, without a checkpoint: left alone{}",
            of(name),
            if *recording {
                "; every write is recorded for it, too"
            } else {
                "; it does not record"
            }
        ),
        Strange::InnerJob { id, kind } => format!(
            "job `{id}` ({kind}) {} runs inside QEMU: left alone",
            of(id)
        ),
        Strange::Export { id, node, is_nbd } => format!(
            "export `{id}` of node `{node}` {}: left alone{}",
            of(id),
            if *is_nbd {
                "; QEMU has one NBD server only, so a backup is refused while it is in use"
            } else {
                ""
            }
        ),
        Strange::Node {
            node,
            driver,
            root_of,
        } => {
            let root = root_of
                .as_ref()
                .map_or_else(String::new, |disk| format!(", which disk {disk} writes to"));
            format!(
                "block node `{node}` ({driver}) {}{root}: left alone",
                of(node)
            )
        }
        Strange::WriteErrors { disk, is_ignored } => {
            let means = if *is_ignored {
                "`ignore`: a write that fails is lost without a word"
            } else {
                "`report`: a write that fails is the guest's trouble"
            };
            format!(
                "disk {disk} has error_policy {means}; a backup reserves the whole disk's size as \
                 scratch space for it, `stop` needs none of that"
            )
        }
    }
}

/// Says how the VM runs.
pub(super) const fn state(state: RunState) -> &'static str {
    match state {
        RunState::Running => "running",
        RunState::Paused => "paused",
        RunState::PausedOnError => "paused by a write error",
        RunState::NotResumed => "loaded from a saved state or a migration, and not resumed since",
        RunState::Off => "off",
        RunState::Other => "neither running nor paused",
    }
}

/// The word of JSON for the same.
pub(super) const fn state_word(state: RunState) -> &'static str {
    match state {
        RunState::Running => "running",
        RunState::Paused => "paused",
        RunState::PausedOnError => "paused-on-error",
        RunState::NotResumed => "not-resumed",
        RunState::Off => "off",
        RunState::Other => "other",
    }
}

/// Says why there would be no backup now.
pub(super) fn refused(refused: &Refused, checkup: &Checkup) -> String {
    match refused {
        Refused::Held => match &checkup.held_by {
            Some(holder) => format!(
                "a backup runs ({}); another one waits for it",
                holder.words(SystemClock.now())
            ),
            None => "a backup runs; another one waits for it".to_owned(),
        },
        Refused::NbdServer => "refused while another program uses QEMU's NBD server".to_owned(),
        Refused::Job => "refused while the other job runs".to_owned(),
        Refused::State => format!("refused: the VM is {}", state(checkup.state)),
        Refused::Disk { disk, refusal } => match refusal {
            Refusal::GraphChanged => {
                format!("refused: the image chain of disk {disk} was changed behind libvirt")
            }
            Refusal::GraphUnknown => {
                format!("refused: nobody knows which image disk {disk} writes to")
            }
            Refusal::BitmapBusy => format!("refused: the bitmap of disk {disk} is in use"),
            Refusal::NoIncrement(why) => {
                format!("refused: no increment of disk {disk}: {}", why.sentence())
            }
        },
        Refused::NoDisks => "refused: the VM has no disk that can be backed up".to_owned(),
    }
}

/// Says what a mark is good for.
pub(super) fn verdict(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Needed(disks) => format!("needed by {}", disks.join(", ")),
        Verdict::Forgotten(disks) => format!("forgotten, needed by {}", disks.join(", ")),
        Verdict::InFlight => "of the running backup".to_owned(),
        Verdict::Useless(why) => format!("useless: {}", why.sentence()),
        Verdict::Unreadable => "kept: its point cannot be read".to_owned(),
        Verdict::OtherRepository => "left alone".to_owned(),
        Verdict::OtherVm => "of another VM, left alone".to_owned(),
        other => other.word().to_owned(),
    }
}

/// Says where a mark is and how it is there.
pub(super) fn on_disk(disk: &MarkOnDisk) -> String {
    match disk.bitmap {
        Some(BitmapView::Recording { .. }) => {
            format!("{} {} dirty", disk.target, format_size(disk.dirty_bytes))
        }
        other => format!("{} {}", disk.target, bitmap_word(other).replace('-', " ")),
    }
}

/// The word of JSON for the state of a bitmap.
pub(super) const fn bitmap_word(bitmap: Option<BitmapView>) -> &'static str {
    match bitmap {
        None => "unknown",
        Some(BitmapView::Missing) => "missing",
        Some(BitmapView::Inconsistent) => "inconsistent",
        Some(BitmapView::NotRecording) => "not-recording",
        Some(BitmapView::NotPersistent) => "not-persistent",
        Some(BitmapView::Busy) => "in-use",
        Some(BitmapView::Recording { .. }) => "recording",
    }
}

fn list_or(names: &[String], none: &str) -> String {
    if names.is_empty() {
        return none.to_owned();
    }
    names.join(", ")
}

pub(super) fn count(number: usize, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
}
