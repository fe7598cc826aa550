//! Which processes have a file open, for people; and the end of one of ours.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::process::{Pid, PidfdFlags, Signal};

/// More are not named.
const NAMED_MAX: usize = 4;

/// Names the processes that have the file open, as ` (process 12 qemu-system-x86)`;
/// empty if none is seen, for other users' processes are not.
pub(super) fn of(path: &Path) -> String {
    let Ok(file) = fs::metadata(path) else {
        return String::new();
    };
    let own = std::process::id();
    let found: Vec<String> = processes()
        .filter(|pid| *pid != own && has_open(*pid, (file.dev(), file.ino())))
        .take(NAMED_MAX)
        .map(|pid| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            format!("process {pid} {}", name.trim().escape_debug())
        })
        .collect();
    if found.is_empty() {
        return String::new();
    }
    format!(" ({})", found.join(", "))
}

fn processes() -> impl Iterator<Item = u32> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn has_open(pid: u32, inode: (u64, u64)) -> bool {
    let open = fs::read_dir(format!("/proc/{pid}/fd"));
    open.into_iter().flatten().flatten().any(|entry| {
        // Follows the link.
        fs::metadata(entry.path()).is_ok_and(|file| (file.dev(), file.ino()) == inode)
    })
}

/// Kills the process that wrote its number into this note, if it is the one whose
/// arguments name the note; says whether it was.
pub(super) fn end_process_of_note(note: &Path) -> bool {
    let Ok(text) = fs::read_to_string(note) else {
        return false;
    };
    let Some(pid) = text.trim().parse().ok().and_then(Pid::from_raw) else {
        return false;
    };
    // Taken before it is looked at: then it is the one that is killed.
    let Ok(process) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else {
        return false;
    };
    let arguments = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero()));
    let names_the_note = arguments.is_ok_and(|all| {
        all.split(|byte| *byte == 0)
            .any(|one| one == note.as_os_str().as_bytes())
    });
    names_the_note && rustix::process::pidfd_send_signal(&process, Signal::KILL).is_ok()
}
