//! Which processes have a file open, for people; and the end of one of ours.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, OFlags, StatxFlags, makedev, statx};
use rustix::process::{Pid, PidfdFlags, Signal};

/// More are not named.
const NAMED_MAX: usize = 4;
/// More open files are not looked at: a host has a few thousands.
const FILES_MAX: usize = 500_000;

/// Names the processes that have the file open, as ` (process 12 qemu-system-x86)`;
/// empty if none is seen, for other users' processes are not.
pub(super) fn of(path: &Path) -> String {
    let own = std::process::id();
    let found: Vec<String> = open_at(path, false)
        .into_iter()
        .filter(|pid| *pid != own)
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

/// Whether a process is seen that may write to the file. It may hold none of QEMU's
/// locks, or hold them at another name of the device: libvirt gives each of its
/// QEMUs a `/dev` of its own.
pub(super) fn has_writer(path: &Path) -> bool {
    !open_at(path, true).is_empty()
}

/// A file as the kernel knows it.
struct Sought {
    inode: (u64, u64),
    /// Which device it is, if it is one.
    device: Option<u64>,
    name: PathBuf,
}

/// Returns the processes that have the file open, or open for writing.
fn open_at(path: &Path, for_writing: bool) -> Vec<u32> {
    let Ok(file) = fs::metadata(path) else {
        return Vec::new();
    };
    let sought = Sought {
        inode: (file.dev(), file.ino()),
        device: file.file_type().is_block_device().then(|| file.rdev()),
        name: fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf()),
    };
    let mut left = FILES_MAX;
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| has_open(*pid, &sought, for_writing, &mut left))
        .take(NAMED_MAX)
        .collect()
}

fn has_open(pid: u32, sought: &Sought, for_writing: bool, left: &mut usize) -> bool {
    let open = fs::read_dir(format!("/proc/{pid}/fdinfo"));
    open.into_iter().flatten().flatten().any(|entry| {
        *left = left.saturating_sub(1);
        if *left == 0 {
            return false;
        }
        let Ok(info) = fs::read_to_string(entry.path()) else {
            return false;
        };
        let number = entry.file_name();
        let link = Path::new("/proc")
            .join(pid.to_string())
            .join("fd")
            .join(number);
        is_meant(&info, &link, sought, for_writing)
    })
}

/// To follow the link of an open file can take for ever, if its server is dead. So
/// that is done only with one that looks like ours, and without asking the server.
fn is_meant(info: &str, link: &Path, sought: &Sought, for_writing: bool) -> bool {
    let value = |key: &str| Some(info.lines().find_map(|line| line.strip_prefix(key))?.trim());
    let flags = value("flags:").and_then(|text| u32::from_str_radix(text, 8).ok());
    if for_writing && flags.unwrap_or_default() & OFlags::ACCMODE.bits() == 0 {
        return false;
    }
    let name = fs::read_link(link).unwrap_or_default();
    if name == sought.name {
        return true;
    }
    // Kernels before 5.14 do not tell.
    let inode: Option<u64> = value("ino:").and_then(|text| text.parse().ok());
    let may_be = inode.is_none_or(|inode| inode == sought.inode.1)
        || (sought.device.is_some() && name.starts_with("/dev"));
    if !may_be {
        return false;
    }
    let wanted = StatxFlags::TYPE | StatxFlags::INO;
    let Ok(found) = statx(CWD, link, AtFlags::STATX_DONT_SYNC, wanted) else {
        return false;
    };
    let device = makedev(found.stx_rdev_major, found.stx_rdev_minor);
    let is_device = FileType::from_raw_mode(found.stx_mode.into()) == FileType::BlockDevice;
    let inode = (
        makedev(found.stx_dev_major, found.stx_dev_minor),
        found.stx_ino,
    );
    inode == sought.inode || (is_device && sought.device == Some(device))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_may_write_is_seen_by_whatever_name_it_has_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("a"), dir.path().join("b"));
        fs::File::create(&path).unwrap();
        fs::hard_link(&path, &other).unwrap();
        let reader = fs::File::open(&path).unwrap();
        assert!(!has_writer(&path) && !has_writer(&other));
        let writer = fs::OpenOptions::new().write(true).open(&path).unwrap();
        assert!(has_writer(&path) && has_writer(&other));
        drop(writer);
        assert!(!has_writer(&path) && !has_writer(&other));
        drop(reader);
    }

    #[test]
    fn a_file_of_the_same_number_elsewhere_is_another_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let file = fs::File::create(&path).unwrap();
        let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let found = fs::metadata(&path).unwrap();
        let info = format!(
            "pos:\t0\nflags:\t0100002\nmnt_id:\t1\nino:\t{}\n",
            found.ino()
        );
        let meant = |dev: u64, info: &str, for_writing| {
            let sought = Sought {
                inode: (dev, found.ino()),
                device: None,
                name: "/nowhere".into(),
            };
            is_meant(info, Path::new(&link), &sought, for_writing)
        };
        assert!(meant(found.dev(), &info, true));
        assert!(!meant(found.dev() + 1, &info, true));
        let reads = info.replace("0100002", "0100000");
        assert!(!meant(found.dev(), &reads, true) && meant(found.dev(), &reads, false));
        assert!(meant(found.dev(), "flags:\t0100001\n", true));
        let elsewhere = info.replace("ino:\t", "ino:\t1");
        assert!(!meant(found.dev(), &elsewhere, true));
    }
}
