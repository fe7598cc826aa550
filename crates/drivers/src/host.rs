//! What the host itself knows: the QEMU process, files, file systems.

use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use highwater_hypervisor::ProcessIdentity;

/// A VM's QEMU process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct QemuProcess {
    pub(crate) identity: ProcessIdentity,
    /// Whom it runs as.
    pub(crate) user: User,
}

/// Whom a process runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Its other groups.
    pub(crate) groups: Vec<u32>,
}

/// Finds the process that runs the VM with this UUID.
///
/// libvirt does not tell its process id, and its pid file may lie in another
/// mount or pid namespace, so the processes are looked through for libvirt's
/// `-uuid` argument. More than one match (a migration between two daemons of
/// one host) proves nothing, so it is none.
pub(crate) fn qemu_process(uuid: &str) -> Option<QemuProcess> {
    let mut found = fs::read_dir("/proc")
        .ok()?
        .filter_map(Result::ok)
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| runs_vm(*pid, uuid));
    let pid = found.next()?;
    if found.next().is_some() {
        return None;
    }
    process(pid)
}

/// Returns what identifies the process with this number now.
pub(crate) fn process(pid: u32) -> Option<QemuProcess> {
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .ok()?
        .trim()
        .to_owned();
    let start_ticks = start_ticks(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?;
    let user = user(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?)?;
    Some(QemuProcess {
        identity: ProcessIdentity {
            pid,
            start_ticks,
            boot_id,
        },
        user,
    })
}

/// Returns the arguments that a process was started with.
pub(crate) fn arguments(pid: u32) -> Option<Vec<String>> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let text = bytes.strip_suffix(&[0]).unwrap_or(&bytes);
    let arguments = text.split(|byte| *byte == 0);
    Some(
        arguments
            .map(|one| String::from_utf8_lossy(one).into_owned())
            .collect(),
    )
}

/// Returns whether this very process still runs here. One of another boot, or
/// that cannot be looked at, does not.
pub(crate) fn is_alive(process: &ProcessIdentity) -> bool {
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid)).unwrap_or_default();
    boot_id.trim() == process.boot_id
        && start_ticks(&stat) == Some(process.start_ticks)
        // One that has ended waits for its parent under the same number.
        && !stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with(['Z', 'X']))
}

fn runs_vm(pid: u32, uuid: &str) -> bool {
    let Ok(arguments) = fs::read(format!("/proc/{pid}/cmdline")) else {
        return false;
    };
    let mut arguments = arguments
        .split(|byte| *byte == 0)
        .skip_while(|one| *one != b"-uuid");
    arguments
        .nth(1)
        .is_some_and(|found| found.eq_ignore_ascii_case(uuid.as_bytes()))
}

/// Field 22 of `/proc/PID/stat`. The name in field 2 may hold anything, so
/// fields are counted from its closing parenthesis.
fn start_ticks(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(19)?.parse().ok()
}

fn user(status: &str) -> Option<User> {
    let numbers = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        Some(
            line.split_ascii_whitespace()
                .filter_map(|text| text.parse().ok())
                .collect::<Vec<u32>>(),
        )
    };
    Some(User {
        // The second number is the effective one.
        uid: *numbers("Uid:")?.get(1)?,
        gid: *numbers("Gid:")?.get(1)?,
        groups: numbers("Groups:").unwrap_or_default(),
    })
}

/// What identifies a local file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileIdentity {
    pub(crate) inode: (u64, u64),
    /// Length, if it is a regular file.
    pub(crate) bytes: Option<u64>,
    pub(crate) modified_ns: Option<i64>,
    pub(crate) changed_ns: Option<i64>,
}

/// Looks at a file; `None` if it is not there or may not be seen.
pub(crate) fn file_identity(path: &Path) -> Option<FileIdentity> {
    let found = fs::metadata(path).ok()?;
    let nanoseconds =
        |seconds: i64, rest: i64| seconds.checked_mul(1_000_000_000)?.checked_add(rest);
    Some(FileIdentity {
        inode: (found.dev(), found.ino()),
        bytes: found.is_file().then_some(found.len()),
        modified_ns: nanoseconds(found.mtime(), found.mtime_nsec()),
        changed_ns: nanoseconds(found.ctime(), found.ctime_nsec()),
    })
}

/// Opens a file for reading. A pipe would keep us until somebody writes into it.
pub(crate) fn open_without_waiting(path: &Path) -> io::Result<fs::File> {
    let flags = rustix::fs::OFlags::NONBLOCK.bits();
    fs::OpenOptions::new()
        .read(true)
        .custom_flags(i32::try_from(flags).unwrap_or_default())
        .open(path)
}

/// Returns the version in a qcow2 file's header; `None` if it is no qcow2 or
/// may not be read. Used for VMs that are off, where QEMU cannot be asked.
pub(crate) fn qcow2_version(path: &Path) -> Option<u32> {
    let mut header = [0_u8; 8];
    let mut file = open_without_waiting(path).ok()?;
    file.read_exact(&mut header).ok()?;
    let [b'Q', b'F', b'I', 0xfb, version @ ..] = header else {
        return None;
    };
    Some(u32::from_be_bytes(version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_with_blanks_and_parentheses_does_not_shift_the_start_time() {
        let stat = "42 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21";
        assert_eq!(start_ticks(stat), Some(4711));
        assert_eq!(start_ticks("42 (cut"), None);
    }

    #[test]
    fn a_process_is_alive_while_it_is_the_same_one() {
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        let mut me = ProcessIdentity {
            pid: std::process::id(),
            start_ticks: start_ticks(&stat).unwrap(),
            boot_id: boot_id.trim().to_owned(),
        };
        assert!(is_alive(&me));
        me.start_ticks += 1;
        assert!(!is_alive(&me));
    }

    #[test]
    fn the_effective_user_counts() {
        let status = "Name:\tq\nUid:\t1\t64055\t3\t4\nGid:\t1\t106\t3\t4\nGroups:\t106 993 \n";
        assert_eq!(
            user(status),
            Some(User {
                uid: 64055,
                gid: 106,
                groups: vec![106, 993]
            })
        );
    }

    #[test]
    fn no_process_runs_a_vm_that_nobody_started() {
        assert_eq!(qemu_process("00000000-1111-2222-3333-444444444444"), None);
    }
}
