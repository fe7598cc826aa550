//! Gives a restore point back: whole disks, every chunk verified.
//!
//! A target gets its name only when it is complete and durable, by a rename
//! that never replaces anything. Whatever dies before leaves a file whose name
//! says that it is partial.

mod image;
mod stream;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use highwater_model::RootHash;
use highwater_repo::{DiskRecord, Manifest, RepoError, Repository};

use crate::{Cancel, Event, Limiter, Observer};

/// What a restore works with.
#[derive(Clone, Copy)]
pub struct RestoreOptions<'a> {
    /// Disks to restore; empty means all.
    pub disks: &'a [String],
    /// Image format; `None` means the source's.
    pub format: Option<Format>,
    /// Threads that read, verify and write.
    pub workers: usize,
    /// Holds the bytes of disks back to a rate.
    pub limiter: Option<&'a Limiter>,
    /// Is told what happens.
    pub observer: &'a dyn Observer,
    /// The user's wish to stop.
    pub cancel: &'a Cancel,
}

/// Format of a restored image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// qcow2 version 3, 64 KiB clusters.
    Qcow2,
    /// Raw, sparse.
    Raw,
}

impl Format {
    /// Returns the word, which is also the file's extension.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }

    fn of_source(disk: &DiskRecord) -> Self {
        if disk.format == "qcow2" {
            Self::Qcow2
        } else {
            Self::Raw
        }
    }
}

/// Where disks go.
pub enum Target<'a> {
    /// A directory, made if need be: every disk, the definition and the files
    /// saved with the point.
    Directory(&'a Path),
    /// One disk to this file.
    File(&'a Path),
    /// One disk as raw bytes to this stream.
    Stream(&'a mut dyn Write),
}

/// What was restored.
#[derive(Debug, Clone, PartialEq)]
pub struct RestoreReport {
    /// The disks.
    pub disks: Vec<RestoredDisk>,
    /// Other files written (definition, firmware, TPM state).
    pub files: Vec<PathBuf>,
    /// Duration of the whole.
    pub elapsed: Duration,
}

/// One restored disk.
#[derive(Debug, Clone, PartialEq)]
pub struct RestoredDisk {
    /// Target name.
    pub disk: String,
    /// Where it is; `None` for a stream.
    pub path: Option<PathBuf>,
    /// Format word.
    pub format: &'static str,
    /// Size of the disk, bytes.
    pub size_bytes: u64,
    /// Bytes of data written (the rest is zero).
    pub data_bytes: u64,
    /// Root hash that proves it.
    pub root: RootHash,
}

/// Why a restore did not happen, or only in part.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "the messages say what each is; fields are what they name"
)]
pub enum RestoreError {
    #[error("cannot restore disk `{disk}`: the restore point has no such disk")]
    NoSuchDisk { disk: String, known: Vec<String> },
    #[error("cannot restore {count} disks to one file or stream")]
    NeedsOneDisk { count: usize, known: Vec<String> },
    #[error("cannot restore to {}: it exists", path.display())]
    Exists { path: PathBuf },
    #[error("cannot read disk `{disk}` of the restore point")]
    Read {
        disk: String,
        source: Box<RepoError>,
    },
    #[error("cannot use chunk {index} of disk `{disk}`: it has {got} bytes instead of {expected}")]
    WrongLength {
        disk: String,
        index: u64,
        expected: usize,
        got: usize,
    },
    #[error("cannot make a qcow2 image of disk `{disk}`: it has {size_bytes} bytes")]
    TooLarge { disk: String, size_bytes: u64 },
    #[error("cannot read `{file}` of the restore point")]
    ReadFile {
        file: String,
        source: Box<RepoError>,
    },
    #[error("cannot write {}", path.display())]
    Write {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("cannot write to the output")]
    Output { source: std::io::Error },
    #[error("interrupted")]
    Interrupted,
}

impl RestoreOptions<'_> {
    /// Waits until so many bytes of a disk may be given back.
    fn hold_back(&self, bytes: usize) {
        if let Some(limiter) = self.limiter {
            limiter.take(bytes as u64, &|| self.cancel.is_raised());
        }
    }
}

/// Trouble while chunks are fetched: on the reading or on the writing side.
enum Fetch {
    Repo(RepoError),
    Sink(RestoreError),
}

impl From<RepoError> for Fetch {
    fn from(error: RepoError) -> Self {
        Self::Repo(error)
    }
}

impl Fetch {
    fn of_disk(self, disk: &DiskRecord) -> RestoreError {
        match self {
            Self::Repo(source) => RestoreError::Read {
                disk: disk.target.clone(),
                source: Box::new(source),
            },
            Self::Sink(error) => error,
        }
    }
}

/// Refuses a chunk that is not as long as its place in the image.
fn check_length(disk: &str, index: u64, expected: usize, got: usize) -> Result<(), Fetch> {
    if expected == got {
        return Ok(());
    }
    Err(Fetch::Sink(RestoreError::WrongLength {
        disk: disk.to_owned(),
        index,
        expected,
        got,
    }))
}

/// Restores disks of a point.
///
/// Disks are written one after another; when it returns an error, those done
/// before are complete and have their names, the one under way has none.
pub fn restore(
    repo: &Repository,
    point: &Manifest,
    target: Target<'_>,
    options: &RestoreOptions<'_>,
) -> Result<RestoreReport, RestoreError> {
    let started = Instant::now();
    let disks = wanted_disks(point, options.disks)?;
    options
        .observer
        .event(&Event::Started { vm: &point.vm.name });
    let mut report = RestoreReport {
        disks: Vec::new(),
        files: Vec::new(),
        elapsed: Duration::ZERO,
    };
    match target {
        Target::Directory(dir) => {
            let paths: Vec<(PathBuf, Format)> = disks
                .iter()
                .map(|disk| {
                    let format = options.format.unwrap_or_else(|| Format::of_source(disk));
                    (
                        dir.join(format!("{}.{}", file_name(&disk.target), format.word())),
                        format,
                    )
                })
                .collect();
            refuse_existing(paths.iter().map(|(path, _)| path.as_path()))?;
            image::make_dir(dir)?;
            for (disk, (path, format)) in disks.iter().zip(paths) {
                report
                    .disks
                    .push(image::restore_disk(repo, disk, &path, format, options)?);
            }
            // The definition last: a directory that has one has all disks of the point.
            if options.disks.is_empty() {
                report.files = image::restore_files(repo, point, dir)?;
            }
        }
        Target::File(path) => {
            let disk = only_disk(point, &disks)?;
            refuse_existing(std::iter::once(path))?;
            let by_extension = match path.extension().and_then(|it| it.to_str()) {
                Some("qcow2") => Some(Format::Qcow2),
                Some("raw" | "img") => Some(Format::Raw),
                _ => None,
            };
            let format = options
                .format
                .or(by_extension)
                .unwrap_or_else(|| Format::of_source(disk));
            report
                .disks
                .push(image::restore_disk(repo, disk, path, format, options)?);
        }
        Target::Stream(output) => {
            let disk = only_disk(point, &disks)?;
            report
                .disks
                .push(stream::restore_disk(repo, disk, output, options)?);
        }
    }
    report.elapsed = started.elapsed();
    Ok(report)
}

fn wanted_disks<'a>(
    point: &'a Manifest,
    wanted: &[String],
) -> Result<Vec<&'a DiskRecord>, RestoreError> {
    for disk in wanted {
        if point.disks.iter().all(|known| known.target != *disk) {
            return Err(RestoreError::NoSuchDisk {
                disk: disk.clone(),
                known: names(point),
            });
        }
    }
    let is_wanted = |disk: &&DiskRecord| wanted.is_empty() || wanted.contains(&disk.target);
    Ok(point.disks.iter().filter(is_wanted).collect())
}

fn only_disk<'a>(
    point: &Manifest,
    disks: &[&'a DiskRecord],
) -> Result<&'a DiskRecord, RestoreError> {
    match disks {
        [disk] => Ok(disk),
        several => Err(RestoreError::NeedsOneDisk {
            count: several.len(),
            known: names(point),
        }),
    }
}

fn names(point: &Manifest) -> Vec<String> {
    point.disks.iter().map(|disk| disk.target.clone()).collect()
}

fn refuse_existing<'a>(paths: impl Iterator<Item = &'a Path>) -> Result<(), RestoreError> {
    for path in paths {
        // `symlink_metadata`: a dangling link is something, too.
        if path.symlink_metadata().is_ok() {
            return Err(RestoreError::Exists {
                path: path.to_owned(),
            });
        }
    }
    Ok(())
}

/// Longest name made of one from a repository, bytes: Linux allows 255, and a
/// role, a number and an extension are put around it.
const NAME_BYTES_MAX: usize = 200;

/// Returns a name from the repository as one harmless file name: it comes from
/// outside and may hold slashes, be `..`, or have any length.
fn file_name(name: &str) -> String {
    let mut safe: String = name
        .chars()
        .map(|c| {
            if c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | '+') {
                c
            } else {
                '_'
            }
        })
        .collect();
    safe.truncate(safe.floor_char_boundary(NAME_BYTES_MAX));
    if safe.is_empty() || safe.starts_with('.') {
        format!("_{safe}")
    } else {
        safe
    }
}

#[cfg(test)]
mod tests {
    use super::{check_length, file_name};

    #[test]
    fn a_chunk_of_another_length_than_its_place_is_refused() {
        for (got, is_right) in [(65_536, true), (65_535, false), (65_537, false), (0, false)] {
            assert_eq!(
                check_length("vda", 7, 65_536, got).is_ok(),
                is_right,
                "{got}"
            );
        }
    }

    #[test]
    fn a_name_from_outside_never_leaves_the_directory() {
        for (name, safe) in [
            ("vda", "vda"),
            ("..", "_.."),
            ("../../etc/passwd", "_.._.._etc_passwd"),
            ("", "_"),
            (".bashrc", "_.bashrc"),
            ("a/b\0c", "a_b_c"),
        ] {
            assert_eq!(file_name(name), safe);
        }
        assert_eq!(file_name(&"\u{e9}".repeat(2000)), "\u{e9}".repeat(100));
    }
}
