//! One backup per VM at a time among those who share a directory: an `flock`
//! held by the guard. Among all others the VM's claims see to it (see
//! [`claims`](super::claims)).
//!
//! The kernel lets go of it when the guard is gone, however it died, so there
//! is no stale lock and no clock to trust. The file's text only tells people
//! who holds it.

use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use highwater_hypervisor::{ErrorKind, HypervisorError, VmRef};
use highwater_model::{Clock, SystemClock, Timestamp};
use rustix::fs::{CWD, FileType, FlockOperation, Mode, OFlags};
use serde::{Deserialize, Serialize};

/// How long between two tries. A dying holder needs a second or two; one whose
/// backup has just ended gives the VM back while its command has returned.
const RETRY: Duration = Duration::from_millis(20);
/// A note is far shorter.
const NOTE_BYTES_MAX: u64 = 200;

/// Returns the lock file of a VM.
pub fn lock_path(dir: &Path, vm: &VmRef) -> PathBuf {
    let key = vm.uuid.as_deref().unwrap_or(&vm.name);
    let safe: String = key
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || c == '-' {
                c
            } else {
                '_'
            }
        })
        .collect();
    dir.join(format!("vm-{safe}.lock"))
}

/// Who holds a lock, as far as its note tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockHolder {
    /// Its host; `None` if that is this one, and its process id is one of here.
    pub host: Option<String>,
    /// The guard's process.
    pub process: Option<u32>,
    /// Since when.
    pub since: Option<Timestamp>,
}

impl LockHolder {
    fn read(file: &mut File) -> Self {
        let mut note = String::new();
        // The note is for people; a lock without one is held as well.
        let read = file.take(NOTE_BYTES_MAX).read_to_string(&mut note);
        let mut words = note.split_whitespace().filter(|_| read.is_ok());
        let process = words.nth(1).and_then(|word| word.parse().ok());
        let since = words.nth(1).and_then(|word| word.parse().ok());
        Self {
            host: None,
            process,
            since: since.map(Timestamp::from_unix_ms),
        }
    }

    /// Says who it is, with an age, which needs no time zone.
    pub fn words(&self, now: Timestamp) -> String {
        let Some(process) = self.process else {
            return "another process".to_owned();
        };
        let host = self.host.as_deref();
        let host = host.map_or_else(String::new, |host| format!(" on host {host}"));
        match self.since {
            Some(since) => {
                // A clock that is ahead of ours has it begin in the future.
                let age_ms = now.unix_ms().saturating_sub(since.unix_ms()).max(0);
                format!("process {process}{host}, for {} s", age_ms / 1000)
            }
            None => format!("process {process}{host}"),
        }
    }
}

/// Returns who holds the VM's lock now. Takes nothing and makes no file.
pub(super) fn holder(dir: &Path, vm: &VmRef) -> Result<Option<LockHolder>, HypervisorError> {
    let path = lock_path(dir, vm);
    let cannot = |cause: &dyn std::fmt::Display| {
        HypervisorError::new(
            ErrorKind::Other,
            format!("cannot tell whether VM `{}` is locked", vm.name),
        )
        .because(format!("cannot use {}", path.display()))
        .because(cause.to_string())
    };
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut file = match rustix::fs::openat(CWD, &path, flags, Mode::empty()) {
        Ok(opened) => File::from(opened),
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        Err(source) => return Err(cannot(&source)),
    };
    // Shared, and given back at once: whoever wants the lock tries again.
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(None),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(Some(LockHolder::read(&mut file))),
        Err(source) => Err(cannot(&source)),
    }
}

/// A held lock; dropping it lets go.
#[derive(Debug)]
pub(super) struct VmLock {
    _file: File,
}

/// Takes the lock, waiting at most `wait` for another holder to end.
pub(super) fn take(dir: &Path, vm: &VmRef, wait: Duration) -> Result<VmLock, HypervisorError> {
    let path = lock_path(dir, vm);
    let cannot = |cause: &dyn std::fmt::Display| {
        HypervisorError::new(ErrorKind::Other, format!("cannot lock VM `{}`", vm.name))
            .because(format!("cannot use {}", path.display()))
            .because(cause.to_string())
    };
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(dir)
        .map_err(|source| cannot(&source))?;
    let safe_dir = open_dir(dir).map_err(|why| {
        cannot(&why).hint(format!(
            "make {} a directory of your own that nobody else may write to (`chmod go-w`), or name \
             another one in HIGHWATER_RUNTIME_DIR",
            dir.display()
        ))
    })?;
    let mut file = open_file(&safe_dir, &path).map_err(|why| cannot(&why))?;
    let until = Instant::now() + wait;
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => {
                std::thread::sleep(RETRY);
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(held(&LockHolder::read(&mut file), vm));
            }
            Err(source) => return Err(cannot(&source)),
        }
    }
    let note = format!(
        "process {} since {} ms after 1970-01-01T00:00Z\n",
        std::process::id(),
        SystemClock.now().unix_ms()
    );
    // The note is for people; a lock without one is as good.
    let noted = file
        .rewind()
        .and_then(|()| file.set_len(0))
        .and_then(|()| file.write_all(note.as_bytes()));
    drop(noted);
    Ok(VmLock { _file: file })
}

/// Opens the directory of the locks if no stranger can change what is in it.
///
/// A stranger who could would have us write to a file of his choice, or give
/// two backups of one VM two different files to lock.
fn open_dir(dir: &Path) -> Result<File, String> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
    let opened = match rustix::fs::openat(CWD, dir, flags, Mode::empty()) {
        Ok(opened) => File::from(opened),
        // A link shows as either, depending on the kernel.
        Err(rustix::io::Errno::LOOP | rustix::io::Errno::NOTDIR) => {
            return Err(format!("{} is no directory, or a link", dir.display()));
        }
        Err(source) => return Err(source.to_string()),
    };
    let about = opened.metadata().map_err(|source| source.to_string())?;
    let us = rustix::process::geteuid().as_raw();
    match danger_of_dir(about.mode(), about.uid(), us) {
        None => Ok(opened),
        Some(danger) => Err(format!("directory {} {danger}", dir.display())),
    }
}

/// Says why a directory of this mode and owner is no place for a lock.
fn danger_of_dir(mode: u32, owner: u32, us: u32) -> Option<String> {
    let others_write = mode & 0o022 != 0;
    let is_sticky = mode & 0o1000 != 0;
    if owner != us && owner != 0 {
        return Some(format!("belongs to user {owner}"));
    }
    (others_write && !is_sticky).then(|| "may be written to by others".to_owned())
}

/// Opens the lock file, and makes it if there is none.
fn open_file(dir: &File, path: &Path) -> Result<File, String> {
    let name = path.file_name().unwrap_or_default();
    // What others may have put into a sticky directory is not followed, and a
    // pipe is not waited for.
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let opened = rustix::fs::openat(dir, name, flags | OFlags::CLOEXEC, Mode::from(0o600));
    let file = match opened {
        Ok(opened) => File::from(opened),
        Err(rustix::io::Errno::LOOP) => return Err("it is a link".to_owned()),
        Err(source) => return Err(source.to_string()),
    };
    let about = file.metadata().map_err(|source| source.to_string())?;
    // Our note would overwrite what a second name of the file stands for.
    if FileType::from_raw_mode(about.mode()) != FileType::RegularFile || about.nlink() != 1 {
        return Err("it is not a plain file of one name".to_owned());
    }
    Ok(file)
}

/// Says who holds a VM.
pub(super) fn held(holder: &LockHolder, vm: &VmRef) -> HypervisorError {
    let who = holder.words(SystemClock.now());
    HypervisorError::new(ErrorKind::Busy, format!("cannot lock VM `{}`", vm.name))
        .because(format!("another backup of it runs: {who}"))
        .hint("wait until it has ended, or end that process: the VM is tidied up then")
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn vm() -> VmRef {
        VmRef {
            name: "web01".to_owned(),
            uuid: Some("4d1a".to_owned()),
        }
    }

    #[test]
    fn a_held_lock_names_its_holder_and_a_dropped_one_is_free() {
        let dir = tempfile::tempdir().unwrap();
        let held = take(dir.path(), &vm(), Duration::ZERO).unwrap();
        let error = take(dir.path(), &vm(), Duration::ZERO).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Busy);
        let me = format!("process {}", std::process::id());
        assert!(
            error.because.iter().any(|cause| cause.contains(&me)),
            "{error:?}"
        );
        drop(held);
        assert!(take(dir.path(), &vm(), Duration::ZERO).is_ok());
    }

    fn refused(dir: &Path) -> HypervisorError {
        let error = take(dir, &vm(), Duration::ZERO).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Other, "{error:?}");
        error
    }

    fn set_mode(dir: &Path, mode: u32) {
        fs::set_permissions(dir, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_link_in_place_of_the_lock_is_not_written_through() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        fs::copy("/proc/self/cmdline", &victim).unwrap();
        set_mode(&victim, 0o600);
        let before = fs::read(&victim).unwrap();
        let lock = lock_path(dir.path(), &vm());
        symlink(&victim, &lock).unwrap();
        refused(dir.path());
        fs::remove_file(&lock).unwrap();
        fs::hard_link(&victim, &lock).unwrap();
        refused(dir.path());
        assert_eq!(fs::read(&victim).unwrap(), before);
    }

    #[test]
    fn a_directory_that_others_can_change_is_no_place_for_locks() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("locks");
        drop(take(&dir, &vm(), Duration::ZERO).unwrap());
        for (mode, is_safe) in [
            (0o711, true),
            (0o755, true),
            (0o1777, true),
            (0o777, false),
            (0o770, false),
            (0o702, false),
        ] {
            set_mode(&dir, mode);
            if is_safe {
                drop(take(&dir, &vm(), Duration::ZERO).unwrap());
            } else {
                assert!(refused(&dir).hint.is_some(), "{mode:o}");
            }
        }
        set_mode(&dir, 0o700);
        let link = parent.path().join("link");
        symlink(&dir, &link).unwrap();
        refused(&link);
        // A stranger's is no better for being closed to all but him.
        for (owner, us, is_safe) in [(0, 7, true), (7, 7, true), (8, 7, false), (8, 0, false)] {
            let danger = danger_of_dir(0o755, owner, us);
            assert_eq!(danger.is_none(), is_safe, "{danger:?}");
        }
    }

    #[test]
    fn a_hostile_vm_name_stays_inside_the_directory() {
        let vm = VmRef {
            name: "../../etc/x".to_owned(),
            uuid: None,
        };
        assert_eq!(
            lock_path(Path::new("/run/h"), &vm),
            Path::new("/run/h/vm-______etc_x.lock")
        );
    }
}
