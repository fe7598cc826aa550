//! One backup per VM at a time on this host: an `flock` held by the guard.
//!
//! The kernel lets go of it when the guard is gone, however it died, so there
//! is no stale lock and no clock to trust. The file's text only tells people
//! who holds it.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use highwater_hypervisor::{ErrorKind, HypervisorError, VmRef};
use highwater_model::{Clock, SystemClock, Timestamp};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

/// How long between two tries; a dying holder needs a second or two.
const RETRY: Duration = Duration::from_millis(100);
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
            process,
            since: since.map(Timestamp::from_unix_ms),
        }
    }

    /// Says who it is, with an age, which needs no time zone.
    pub fn words(&self, now: Timestamp) -> String {
        let Some(process) = self.process else {
            return "another process".to_owned();
        };
        match self.since {
            Some(since) => {
                let seconds = now.unix_ms().saturating_sub(since.unix_ms()) / 1000;
                format!("process {process}, for {seconds} s")
            }
            None => format!("process {process}"),
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
    let mut file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(cannot(&error)),
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
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|source| cannot(&source))?;
    let until = Instant::now() + wait;
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => {
                std::thread::sleep(RETRY);
            }
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(held(&mut file, vm)),
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

fn held(file: &mut File, vm: &VmRef) -> HypervisorError {
    let who = LockHolder::read(file).words(SystemClock.now());
    HypervisorError::new(ErrorKind::Busy, format!("cannot lock VM `{}`", vm.name))
        .because(format!("another backup of it runs: {who}"))
        .hint("wait until it has ended, or end that process: the VM is tidied up then")
}

#[cfg(test)]
mod tests {
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
