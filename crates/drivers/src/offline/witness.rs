//! Proof that nobody has written to the images of a session.
//!
//! A VM that is off has no QEMU that would tell of its start, so its files do.
//! QEMU locks single bytes of each image it uses (`block/file-posix.c`): who may
//! write holds byte 101 or 103, before it writes. And a file that was written to
//! has another stamp: size, times, inode. The first shows a VM that runs now, the
//! second one that ran in between, and both are looked at after the last byte was
//! read.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::time::ClockId;

use super::image::{Chain, open};
use crate::directories::network_file_system;
use crate::sys;

/// QEMU: `RAW_LOCK_PERM_BASE` and `BLK_PERM_WRITE`, `..._WRITE_UNCHANGED`,
/// `..._RESIZE`, each of which a VM that runs holds, or a program that alters
/// images.
const WRITER_START: i64 = 101;
const WRITER_BYTES: i64 = 3;
/// QEMU: `RAW_LOCK_SHARED_BASE` and the same permissions: who holds one of these
/// has nobody write. QEMU looks at them after it has taken its own, and does not
/// start.
const NO_WRITER_START: i64 = 201;
const NO_WRITER_BYTES: i64 = 3;

/// The kernel takes times from a clock that ticks with 100 Hz at least: a write
/// within the same tick would leave the same stamp.
const TICK: Duration = Duration::from_millis(25);
/// FAT has the coarsest clock of all.
const COARSE_TICK: Duration = Duration::from_millis(2100);
/// More is not waited for; times may lie ahead of a clock that was set back.
const SETTLE_MAX: Duration = Duration::from_secs(5);

/// What has become of the images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Seen {
    /// Nothing.
    Untouched,
    /// Somebody has this one open for writing.
    Open(PathBuf),
    /// This one was written to, or replaced.
    Written(PathBuf),
    /// This one could not be looked at.
    Unknown(PathBuf, String),
}

/// The files of a session's images.
#[derive(Debug)]
pub(crate) struct Witness {
    files: Vec<Watched>,
}

/// One file, held open so that it is the same one all the time.
#[derive(Debug)]
struct Watched {
    path: PathBuf,
    file: File,
    /// Whether the guest writes to it: an image, or its data file. Those below
    /// may belong to several VMs, and libvirt changes their owner whenever one of
    /// them starts.
    is_written: bool,
    is_device: bool,
    stamp: Stamp,
}

/// What a write to a file changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    inode: (u64, u64),
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(file: &File) -> io::Result<Self> {
        let found = file.metadata()?;
        Ok(Self {
            inode: (found.dev(), found.ino()),
            bytes: found.len(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }

    fn is_same(&self, other: &Self, is_written: bool) -> bool {
        let Self {
            inode,
            bytes,
            modified,
            changed,
        } = other;
        self.inode == *inode
            && self.bytes == *bytes
            && self.modified == *modified
            && (!is_written || self.changed == *changed)
    }
}

impl Witness {
    /// Opens all files of these chains. Their stamps do not count before
    /// [`stamp`](Self::stamp).
    pub(crate) fn open<'a>(chains: impl Iterator<Item = &'a Chain>) -> Result<Self, String> {
        let mut files: Vec<Watched> = Vec::new();
        let mut add = |path: &Path, is_written: bool| -> Result<(), String> {
            let failed = |why: String| format!("`{}` {why}", path.display());
            let (file, is_device) = open(path).map_err(&failed)?;
            let stamp = Stamp::of(&file).map_err(|error| failed(error.to_string()))?;
            if let Some(known) = files.iter_mut().find(|it| it.stamp.inode == stamp.inode) {
                known.is_written |= is_written;
                return Ok(());
            }
            files.push(Watched {
                path: path.to_path_buf(),
                file,
                is_written,
                is_device,
                stamp,
            });
            Ok(())
        };
        for chain in chains {
            for (place, image) in chain.images.iter().enumerate() {
                add(&image.path, place == 0)?;
                if let Some((data, _)) = &image.data_file {
                    add(data, place == 0)?;
                }
            }
        }
        Ok(Self { files })
    }

    /// Keeps others of us away from what the guest writes to: whoever reads an
    /// image needs it to stay as it is, and whoever marks it changes it. Returns
    /// what somebody else keeps.
    ///
    /// Not on network file systems, where such a lock is a byte-range lock over
    /// the bytes that QEMU locks, nor on block devices, where udev and others wait
    /// for it to be free.
    pub(crate) fn keep(&self) -> Result<Option<&Path>, String> {
        for watched in self
            .files
            .iter()
            .filter(|it| it.is_written && !it.is_device)
        {
            let failed = |error: io::Error| format!("`{}`: {error}", watched.path.display());
            if network_file_system(&watched.path)
                .map_err(failed)?
                .is_some()
            {
                continue;
            }
            match rustix::fs::flock(&watched.file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(Some(&watched.path)),
                Err(error) => return Err(failed(error.into())),
            }
        }
        Ok(None)
    }

    /// Keeps everybody from writing to the images, as QEMU would, from before a
    /// look at who writes: of two that come at the same time one sees the other.
    ///
    /// The exporter would do so for a qcow2 only, as a raw image passes on what
    /// its user allows, and an export allows everything.
    pub(crate) fn hold(&self) -> Result<(), String> {
        for watched in &self.files {
            sys::lock_shared(&watched.file, NO_WRITER_START, NO_WRITER_BYTES)
                .map_err(|error| format!("`{}`: {error}", watched.path.display()))?;
        }
        Ok(())
    }

    /// Returns why the stamps of some file would prove nothing, if that is so:
    /// a write to a block device changes none, and those of a network file system
    /// come from caches and from another host's clock.
    pub(crate) fn blind_spot(&self) -> Option<String> {
        self.files.iter().find_map(|watched| {
            let path = watched.path.display();
            if watched.is_device {
                return Some(format!("`{path}` is a block device"));
            }
            match network_file_system(&watched.path) {
                Ok(None) => None,
                Ok(Some(name)) => Some(format!("`{path}` is on {name}")),
                Err(error) => Some(format!("`{path}` does not tell where it is: {error}")),
            }
        })
    }

    /// Returns a block device among the files.
    pub(crate) fn device(&self) -> Option<&Path> {
        let device = self.files.iter().find(|it| it.is_device)?;
        Some(&device.path)
    }

    /// All files, as they are named.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|it| it.path.as_path())
    }

    /// Returns which image somebody has open for writing.
    pub(crate) fn writer(&self) -> Result<Option<&Path>, String> {
        for watched in &self.files {
            match sys::is_locked(&watched.file, WRITER_START, WRITER_BYTES) {
                Ok(false) => {}
                Ok(true) => return Ok(Some(&watched.path)),
                Err(error) => return Err(format!("`{}`: {error}", watched.path.display())),
            }
        }
        Ok(None)
    }

    /// Takes the stamps: from when this returns on, each write changes one.
    pub(crate) fn stamp(&mut self) -> Result<(), String> {
        let since = Instant::now();
        for watched in &mut self.files {
            let failed = |error: io::Error| format!("`{}`: {error}", watched.path.display());
            loop {
                watched.stamp = Stamp::of(&watched.file).map_err(failed)?;
                let is_settled = watched.is_device || !may_come_again(&watched.stamp, now());
                if is_settled || since.elapsed() > SETTLE_MAX {
                    break;
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        Ok(())
    }

    /// Looks whether everything is as it was.
    pub(crate) fn look(&self) -> Seen {
        for watched in &self.files {
            let seen = watched.look();
            if seen != Seen::Untouched {
                return seen;
            }
        }
        Seen::Untouched
    }
}

impl Watched {
    fn look(&self) -> Seen {
        let unknown = |error: io::Error| Seen::Unknown(self.path.clone(), error.to_string());
        match sys::is_locked(&self.file, WRITER_START, WRITER_BYTES) {
            Ok(false) => {}
            Ok(true) => return Seen::Open(self.path.clone()),
            Err(error) => return unknown(error),
        }
        // A device has an inode of its own only in name.
        if self.is_device {
            return Seen::Untouched;
        }
        let now = match Stamp::of(&self.file) {
            Ok(now) => now,
            Err(error) => return unknown(error),
        };
        let is_there = match fs::metadata(&self.path) {
            Ok(found) => (found.dev(), found.ino()) == now.inode,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return unknown(error),
        };
        if is_there && self.stamp.is_same(&now, self.is_written) {
            return Seen::Untouched;
        }
        Seen::Written(self.path.clone())
    }
}

/// The clock that file systems take their times from.
fn now() -> i128 {
    let now = rustix::time::clock_gettime(ClockId::RealtimeCoarse);
    nanoseconds((now.tv_sec, now.tv_nsec))
}

/// Returns whether a write right now could leave these times as they are. Kernels
/// since 6.13 give a write after a look another time on many file systems, and
/// nobody can tell on which.
fn may_come_again(stamp: &Stamp, now: i128) -> bool {
    [stamp.modified, stamp.changed].into_iter().any(|time| {
        let is_coarse = time.1 == 0;
        let tick = if is_coarse { COARSE_TICK } else { TICK };
        now.abs_diff(nanoseconds(time)) <= tick.as_nanos()
    })
}

fn nanoseconds((seconds, rest): (i64, i64)) -> i128 {
    i128::from(seconds)
        .saturating_mul(1_000_000_000)
        .saturating_add(i128::from(rest))
}

#[cfg(test)]
mod tests {
    use std::io::{Seek as _, Write as _};

    use super::*;

    fn watch(path: &Path) -> Witness {
        let chain = Chain::discover(path, None);
        let mut witness = Witness::open(std::iter::once(&chain)).unwrap();
        witness.stamp().unwrap();
        witness
    }

    #[test]
    fn a_write_right_after_the_stamp_is_seen_every_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.raw");
        for round in 0..50 {
            let mut file = File::create(&path).unwrap();
            file.write_all(&[1; 4096]).unwrap();
            let witness = watch(&path);
            assert_eq!(witness.look(), Seen::Untouched);
            // Of the same length, by a program that takes no locks.
            file.rewind().unwrap();
            file.write_all(&[2; 4096]).unwrap();
            assert_eq!(witness.look(), Seen::Written(path.clone()), "{round}");
        }
    }

    #[test]
    fn a_file_that_was_replaced_or_removed_is_not_the_one_that_was_stamped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.raw");
        let other = dir.path().join("b.raw");
        for file in [&path, &other] {
            File::create(file).unwrap().write_all(&[1; 512]).unwrap();
        }
        let witness = watch(&path);
        rustix::fs::rename(&other, &path).unwrap();
        assert_eq!(witness.look(), Seen::Written(path.clone()));
        fs::remove_file(&path).unwrap();
        assert_eq!(witness.look(), Seen::Written(path));
    }

    #[test]
    fn an_image_that_is_reached_no_more_is_not_the_one_that_the_vm_will_use() {
        let dir = tempfile::tempdir().unwrap();
        let (place, other) = (dir.path().join("images"), dir.path().join("others"));
        for dir in [&place, &other] {
            fs::create_dir(dir).unwrap();
            let mut file = File::create(dir.join("a.raw")).unwrap();
            file.write_all(&[1; 512]).unwrap();
        }
        let path = place.join("a.raw");
        let witness = watch(&path);
        // The file itself stays as it was.
        rustix::fs::rename(&place, dir.path().join("elsewhere")).unwrap();
        assert_eq!(witness.look(), Seen::Written(path.clone()));
        rustix::fs::rename(&other, &place).unwrap();
        assert_eq!(witness.look(), Seen::Written(path));
    }

    #[test]
    fn a_stamp_counts_only_when_the_clock_has_ticked_since() {
        const SECOND: i128 = 1_000_000_000;
        let stamp = |modified, changed| Stamp {
            inode: (1, 2),
            bytes: 3,
            modified,
            changed,
        };
        let fine = stamp((100, 1), (100, 1));
        assert!(may_come_again(&fine, 100 * SECOND + 1));
        assert!(may_come_again(&fine, 100 * SECOND + 10_000_000));
        assert!(!may_come_again(&fine, 100 * SECOND + 50_000_000));
        // A clock that was set back comes by again.
        assert!(!may_come_again(&fine, 50 * SECOND));
        assert!(may_come_again(&stamp((10, 1), (100, 1)), 100 * SECOND + 2));
        // Whole seconds: the file system knows no parts of them.
        let coarse = stamp((100, 0), (100, 0));
        assert!(may_come_again(&coarse, 101 * SECOND));
        assert!(!may_come_again(&coarse, 103 * SECOND));
    }

    #[test]
    fn an_image_is_kept_by_one_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.raw");
        File::create(&path).unwrap().write_all(&[1; 512]).unwrap();
        let (first, second) = (watch(&path), watch(&path));
        assert_eq!(first.keep(), Ok(None));
        assert_eq!(second.keep(), Ok(Some(path.as_path())));
        drop(first);
        assert_eq!(second.keep(), Ok(None));
    }
}
