//! Whose claim is it, and does that process live?
//!
//! Whoever may change a VM's metadata can write a claim that names a process which
//! lives for ever. So only one that runs this program lives by being there; any
//! other one has to beat.

use highwater_hypervisor::Claimer;
use rustix::process::{Pid, test_kill_process};

/// What is known of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Life {
    /// It is there, stopped or not.
    Lives,
    /// It is gone for good.
    Dead,
    /// It cannot be seen from here.
    Unknown,
}

/// Describes this process.
pub(super) fn myself() -> Claimer {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let process = std::process::id();
    Claimer {
        host: rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned(),
        boot_id: read("/proc/sys/kernel/random/boot_id").trim().to_owned(),
        pid_namespace: pid_namespace(),
        process,
        start_ticks: sees_own_namespace()
            .then(|| stat_of(process))
            .flatten()
            .map(|stat| stat.start_ticks),
        since: super::now(),
    }
}

/// Looks for the process that a claim names.
///
/// Only within one boot and one pid namespace does a process id mean anything;
/// a namespace that is gone took its processes along, and its number may be
/// another one's by now, in which they are not.
pub(super) fn life(claimer: &Claimer) -> Life {
    let me = myself();
    let is_here = !me.boot_id.is_empty()
        && claimer.boot_id == me.boot_id
        && me.pid_namespace.is_some()
        && claimer.pid_namespace == me.pid_namespace;
    if !is_here {
        return Life::Unknown;
    }
    let Some(pid) = i32::try_from(claimer.process).ok().and_then(Pid::from_raw) else {
        return Life::Unknown;
    };
    // Any other error is that of one that we may not send a signal to.
    if test_kill_process(pid) == Err(rustix::io::Errno::SRCH) {
        return Life::Dead;
    }
    // A `/proc` of another namespace shows another process by that number.
    if !sees_own_namespace() {
        return Life::Unknown;
    }
    match (stat_of(claimer.process), claimer.start_ticks) {
        (Some(stat), _) if stat.is_dead => Life::Dead,
        (Some(stat), Some(started)) if stat.start_ticks != started => Life::Dead,
        (Some(_), Some(_)) if runs_our_program(claimer.process) => Life::Lives,
        // Another program, hidden from us, or gone since.
        (Some(_) | None, _) => Life::Unknown,
    }
}

/// Returns whether a process was started under our own name. Its file tells
/// nothing: it is replaced when the program is updated.
fn runs_our_program(process: u32) -> bool {
    let own = name_of("self");
    own.is_some() && name_of(&process.to_string()) == own
}

fn name_of(process: &str) -> Option<Vec<u8>> {
    let line = std::fs::read(format!("/proc/{process}/cmdline")).ok()?;
    let name = line.split(|byte| *byte == 0).next()?;
    (!name.is_empty()).then(|| name.to_vec())
}

fn pid_namespace() -> Option<u64> {
    let link = std::fs::read_link("/proc/self/ns/pid").ok()?;
    let number = link.to_str()?.strip_prefix("pid:[")?.strip_suffix(']')?;
    number.parse().ok()
}

/// Returns whether `/proc` is that of our pid namespace.
fn sees_own_namespace() -> bool {
    let link = std::fs::read_link("/proc/self");
    let me = std::process::id().to_string();
    link.is_ok_and(|link| link.to_str() == Some(me.as_str()))
}

struct Stat {
    /// It has ended, and its parent has not asked how.
    is_dead: bool,
    start_ticks: u64,
}

fn stat_of(pid: u32) -> Option<Stat> {
    parse_stat(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The name in field 2 may hold anything, so fields are counted from its closing
/// parenthesis: state is field 3, start time field 22.
fn parse_stat(stat: &str) -> Option<Stat> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_ascii_whitespace();
    let is_dead = matches!(fields.next()?, "Z" | "X");
    let start_ticks = fields.nth(18)?.parse().ok()?;
    Some(Stat {
        is_dead,
        start_ticks,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt as _;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_counts_as_dead_only_where_its_number_means_something() {
        let me = myself();
        assert_eq!(life(&me), Life::Lives);
        let check = |change: &dyn Fn(&mut Claimer), expected| {
            let mut other = me.clone();
            change(&mut other);
            assert_eq!(life(&other), expected, "{other:?}");
        };
        check(&|it| it.start_ticks = Some(1), Life::Dead);
        check(&|it| it.start_ticks = None, Life::Unknown);
        check(&|it| it.boot_id = "another".to_owned(), Life::Unknown);
        check(&|it| it.pid_namespace = Some(1), Life::Unknown);
        check(&|it| it.pid_namespace = None, Life::Unknown);
        check(&|it| it.process = u32::MAX, Life::Unknown);
        check(&|it| it.process = 0, Life::Unknown);
    }

    #[test]
    fn a_process_is_alive_while_it_is_stopped_and_dead_before_it_is_buried() {
        let mut child = Command::new("sleep")
            .arg0(std::env::args_os().next().unwrap())
            .arg("60")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let pid = Pid::from_child(&child);
        let claimer = Claimer {
            process: child.id(),
            start_ticks: stat_of(child.id()).map(|it| it.start_ticks),
            ..myself()
        };
        let since = std::time::Instant::now();
        // The parent of a new program goes on a moment before it has its name.
        while !runs_our_program(child.id()) {
            assert!(since.elapsed().as_secs() < 10, "it has no name");
        }
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        assert_eq!(life(&claimer), Life::Lives);
        child.kill().unwrap();
        let since = std::time::Instant::now();
        while life(&claimer) != Life::Dead {
            assert!(since.elapsed().as_secs() < 10, "a zombie lives");
        }
        child.wait().unwrap();
        assert_eq!(life(&claimer), Life::Dead);
    }

    #[test]
    fn a_claim_that_names_another_program_has_to_beat() {
        let claim_of = |process: u32| Claimer {
            process,
            start_ticks: stat_of(process).map(|it| it.start_ticks),
            ..myself()
        };
        assert_eq!(life(&claim_of(1)), Life::Unknown);
        let mut child = Command::new("sleep")
            .arg("60")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        assert_eq!(life(&claim_of(child.id())), Life::Unknown);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_name_with_blanks_and_parentheses_shifts_nothing() {
        let stat = "42 (a) b (c) Z 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        let stat = parse_stat(stat).unwrap();
        assert_eq!((stat.is_dead, stat.start_ticks), (true, 4711));
        assert!(parse_stat("42 (cut").is_none());
    }
}
