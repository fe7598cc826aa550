//! The only place that renames and syncs.
//!
//! A file appears under its final name only when its bytes are on the disk,
//! and a call returns `Ok` only when the name is on the disk too:
//!
//! ```text
//! create temporary file -> write -> fsync file -> move into place, never over
//! another file -> fsync directory
//! ```
//!
//! A crash in between leaves at most a temporary file. An error says on which
//! side of the move it happened, because only before it the file certainly is
//! not there.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;

/// What of a durable change failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Nothing has changed under the final name.
    Prepare,
    /// Writing the file's bytes to the disk failed; nothing has changed under
    /// the final name, and the disk cannot be trusted.
    SyncFile,
    /// The final name is taken by another file.
    Exists,
    /// The name has changed, but that may not survive a crash, and the disk
    /// cannot be trusted.
    SyncDirectory,
}

/// Why a durable change failed.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct DurableError {
    /// How far it came.
    pub stage: Stage,
    /// What the operating system said.
    pub error: io::Error,
}

impl DurableError {
    fn at(stage: Stage) -> impl FnOnce(io::Error) -> Self {
        move |error| Self { stage, error }
    }
}

/// Creates the file `path` with what `write` writes, whole and durable, or not
/// at all. Never replaces a file.
pub fn create_new(
    path: &Path,
    mode: u32,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> Result<(), DurableError> {
    let folder = parent(path);
    let (temp, mut file) =
        create_temporary(folder, mode).map_err(DurableError::at(Stage::Prepare))?;
    let written = write(&mut file).map_err(DurableError::at(Stage::Prepare));
    let outcome = written.and_then(|()| publish(&file, &temp, path));
    if outcome.is_err() {
        discard(&temp);
    }
    outcome
}

/// Creates a new file with an unguessable name in `folder`, open for writing.
pub fn create_temporary(folder: &Path, mode: u32) -> io::Result<(PathBuf, File)> {
    use std::fmt::Write as _;
    let mut random = [0_u8; 16];
    getrandom::fill(&mut random).map_err(|error| io::Error::other(error.to_string()))?;
    let mut name = String::from(".hw-");
    for byte in random {
        write!(name, "{byte:02x}").map_err(io::Error::other)?;
    }
    let path = folder.join(name);
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&path)?;
    Ok((path, file))
}

/// Gives the complete file `temp` (open as `file`) its final name, durably,
/// and never in the place of another file.
pub fn publish(file: &File, temp: &Path, path: &Path) -> Result<(), DurableError> {
    publish_by(file, temp, path, move_without_replacing)
}

/// As [`publish`], with the way of moving as a parameter so that tests reach
/// the fallback on any file system.
fn publish_by(
    file: &File,
    temp: &Path,
    path: &Path,
    move_into_place: fn(&Path, &Path) -> io::Result<()>,
) -> Result<(), DurableError> {
    file.sync_all().map_err(DurableError::at(Stage::SyncFile))?;
    match move_into_place(temp, path) {
        Ok(()) => {}
        // A network file system may do the work and lose the answer. Who was
        // told "not done" gives up what the file speaks of.
        Err(_) if is_published(file, path) == Some(true) => discard(temp),
        Err(error) if Errno::from_io_error(&error) == Some(Errno::EXIST) => {
            return Err(DurableError {
                stage: Stage::Exists,
                error,
            });
        }
        Err(error) => {
            let stage = match is_published(file, path) {
                Some(_) => Stage::Prepare,
                None => Stage::SyncDirectory,
            };
            return Err(DurableError { stage, error });
        }
    }
    sync_directory(parent(path)).map_err(DurableError::at(Stage::SyncDirectory))
}

/// Says whether `path` is the open file; `None` if that cannot be learned.
fn is_published(file: &File, path: &Path) -> Option<bool> {
    match fs::symlink_metadata(path) {
        Ok(there) => {
            let ours = file.metadata().ok()?;
            Some((ours.dev(), ours.ino()) == (there.dev(), there.ino()))
        }
        Err(error) if is_certain_absence(&error) => Some(false),
        Err(_) => None,
    }
}

fn is_certain_absence(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

fn move_without_replacing(temp: &Path, path: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(CWD, temp, CWD, path, RenameFlags::NOREPLACE) {
        // Old kernels and some file systems (NFS) have no such rename.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => link_and_unlink(temp, path),
        outcome => outcome.map_err(io::Error::from),
    }
}

/// A hard link fails where a file exists, on every file system that has links.
fn link_and_unlink(temp: &Path, path: &Path) -> io::Result<()> {
    if let Err(error) = fs::hard_link(temp, path) {
        // A network file system may do the work, lose the answer, ask again
        // and be told "exists": then both names are one file.
        if !is_same_file(temp, path) {
            return Err(error);
        }
    }
    discard(temp);
    Ok(())
}

fn is_same_file(one: &Path, other: &Path) -> bool {
    match (fs::symlink_metadata(one), fs::symlink_metadata(other)) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}

/// Removes a temporary file. It is named nowhere, so a failure only costs its
/// space.
pub fn discard(temp: &Path) {
    if let Err(error) = fs::remove_file(temp) {
        debug_assert_ne!(error.kind(), io::ErrorKind::IsADirectory);
    }
}

/// Removes a file durably; one that is not there is no error.
pub fn remove(path: &Path) -> Result<(), DurableError> {
    match fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => {
            return Err(DurableError {
                stage: Stage::Prepare,
                error,
            });
        }
    }
    sync_directory(parent(path)).map_err(DurableError::at(Stage::SyncDirectory))
}

/// Creates a directory and the missing ones above it, each with `mode` and
/// durably in its parent. One that exists is no error, and its own entry in
/// its parent is synced all the same: somebody else may have made it a moment
/// ago and not come to that.
pub fn create_directories(path: &Path, mode: u32) -> Result<(), DurableError> {
    let mut missing = Vec::new();
    let mut at = path;
    while !at.is_dir() {
        missing.push(at);
        let above = parent(at);
        if above == at {
            break;
        }
        at = above;
    }
    // Nothing under a final name of a file rests on a folder yet, hence not
    // `SyncDirectory`.
    let sync = |folder| sync_directory(parent(folder)).map_err(DurableError::at(Stage::SyncFile));
    for folder in missing.iter().rev() {
        match DirBuilder::new().mode(mode).create(folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(DurableError {
                    stage: Stage::Prepare,
                    error,
                });
            }
            _ => sync(folder)?,
        }
    }
    if missing.is_empty() {
        sync(path)
    } else {
        Ok(())
    }
}

/// Creates a directory in one that is there, durably. One that exists is no
/// error, as in [`create_directories`].
pub fn create_directory(path: &Path, mode: u32) -> Result<(), DurableError> {
    match DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(DurableError {
            stage: Stage::Prepare,
            error,
        }),
        _ => sync_directory(parent(path)).map_err(DurableError::at(Stage::SyncFile)),
    }
}

/// Writes a directory's entries to the disk.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    match File::open(path)?.sync_all() {
        // Some file systems cannot sync a directory at all and say so in this
        // way; there the order of operations is all there is.
        Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) => Ok(()),
        outcome => outcome,
    }
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder.as_os_str().is_empty() => Path::new("."),
        Some(folder) => folder,
        None => path,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn try_both_ways(check: impl Fn(fn(&Path, &Path) -> io::Result<()>)) {
        check(move_without_replacing);
        check(link_and_unlink);
    }

    #[test]
    fn publishing_never_replaces_a_file_whatever_the_file_system_offers() {
        try_both_ways(|way| {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("x");
            for (text, outcome) in [("one", None), ("two", Some(Stage::Exists))] {
                let (temp, mut file) = create_temporary(folder.path(), 0o600).unwrap();
                file.write_all(text.as_bytes()).unwrap();
                let stage = publish_by(&file, &temp, &path, way)
                    .err()
                    .map(|error| error.stage);
                assert_eq!(stage, outcome);
                assert_eq!(fs::read(&path).unwrap(), b"one");
            }
        });
    }

    #[test]
    fn a_link_whose_answer_was_lost_counts_as_done() {
        let folder = tempfile::tempdir().unwrap();
        let (temp, _file) = create_temporary(folder.path(), 0o600).unwrap();
        let path = folder.path().join("x");
        fs::hard_link(&temp, &path).unwrap();
        link_and_unlink(&temp, &path).unwrap();
        assert!(path.exists() && !temp.exists());
    }

    #[test]
    fn a_move_whose_answer_was_lost_counts_as_done_and_any_other_failure_as_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let (temp, file) = create_temporary(folder.path(), 0o600).unwrap();
        let failed = |_: &Path, _: &Path| Err(io::Error::other("timed out"));
        let error = publish_by(&file, &temp, &path, failed).unwrap_err();
        assert_eq!(error.stage, Stage::Prepare);
        publish_by(&file, &temp, &path, |temp, path| {
            move_without_replacing(temp, path)?;
            Err(io::Error::other("timed out"))
        })
        .unwrap();
        assert!(path.exists() && !temp.exists());
    }

    #[test]
    fn a_failed_write_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let outcome = create_new(&path, 0o600, |_| Err(io::Error::other("broken")));
        assert_eq!(outcome.unwrap_err().stage, Stage::Prepare);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_created_is_private() {
        let folder = tempfile::tempdir().unwrap();
        let nested = folder.path().join("a/b/c");
        create_directories(&nested, 0o700).unwrap();
        create_directories(&nested, 0o700).unwrap();
        create_new(&nested.join("x"), 0o600, |file| file.write_all(b"x")).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&folder.path().join("a")), 0o700);
        assert_eq!(mode(&nested.join("x")), 0o600);
    }
}
