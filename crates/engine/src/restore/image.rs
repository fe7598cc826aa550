//! Restores to files.

use std::fs::File;
use std::io::Write as _;
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use highwater_formats::{ChunkSetBuilder, Qcow2Layout};
use highwater_model::ObjectId;
use highwater_repo::{
    DiskRecord, ImageReader, ImageRoot, Manifest, RepoError, RepoErrorKind, Repository,
};
use highwater_store::durable;

use super::{Fetch, Format, RestoreError, RestoreOptions, RestoredDisk, check_length, file_name};
use crate::{DiskDone, DiskProgress, Event};

/// Chunks looked up and sorted by pack at a time. Bounds memory (40 bytes
/// each) and is wide enough that scattered increments are read in pack order:
/// 16 GiB of disk at 64 KiB.
pub(super) const WINDOW_CHUNKS: usize = 1 << 18;

/// Largest saved file that is given back, bytes; larger ones are never saved.
const FILE_BYTES_MAX: usize = 1 << 30;

pub(super) fn make_dir(dir: &Path) -> Result<(), RestoreError> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| RestoreError::Write {
            path: dir.to_owned(),
            source,
        })
}

/// Where the chunks of an image go in a file.
enum Layout {
    Raw,
    Qcow2(Box<Qcow2Layout>),
}

/// Restores one disk to a new file.
pub(super) fn restore_disk(
    repo: &Repository,
    disk: &DiskRecord,
    path: &Path,
    format: Format,
    options: &RestoreOptions<'_>,
) -> Result<RestoredDisk, RestoreError> {
    let read = |source| RestoreError::Read {
        disk: disk.target.clone(),
        source: Box::new(source),
    };
    let write = |source| RestoreError::Write {
        path: path.to_owned(),
        source,
    };
    let began = Instant::now();
    let image = repo.image(&disk.image).map_err(read)?;
    let layout = match format {
        Format::Raw => Layout::Raw,
        Format::Qcow2 => Layout::Qcow2(Box::new(qcow2_layout(&image, disk)?)),
    };
    let temp = Temporary::beside(path)?;
    let file = &temp.file;
    let mut file_bytes = disk.image.size_bytes;
    if let Layout::Qcow2(layout) = &layout {
        file_bytes = layout.file_bytes();
    }
    file.set_len(file_bytes).map_err(write)?;
    if let Layout::Qcow2(layout) = &layout {
        layout
            .write_metadata(|offset, bytes| write_sparsely(file, bytes, offset))
            .map_err(write)?;
    }
    let data_bytes = write_chunks(repo, disk, &image, file, &layout, path, options)?;
    if let (Layout::Raw, Some(file_bytes)) = (&layout, disk.file_bytes) {
        // The source's length was no multiple of QEMU's sector; what QEMU
        // showed beyond it was padding.
        file.set_len(file_bytes.min(disk.image.size_bytes))
            .map_err(write)?;
    }
    temp.publish(path)?;
    options.observer.event(&Event::DiskDone {
        disk: &disk.target,
        failure: None,
        done: Some(DiskDone {
            size_bytes: disk.image.size_bytes,
            dirty_bytes: disk.image.size_bytes,
            read_bytes: data_bytes,
            stored_bytes: 0,
            elapsed: began.elapsed(),
        }),
    });
    Ok(RestoredDisk {
        disk: disk.target.clone(),
        path: Some(path.to_owned()),
        format: format.word(),
        size_bytes: disk.image.size_bytes,
        data_bytes,
        root: disk.image.hash,
    })
}

/// Largest disk a qcow2 image is laid out for, bytes (64 TiB): its set of
/// chunks is kept in memory, and the size comes from outside.
const QCOW2_BYTES_MAX: u64 = 64 << 40;

fn qcow2_layout(image: &ImageReader, disk: &DiskRecord) -> Result<Qcow2Layout, RestoreError> {
    let ImageRoot {
        size_bytes,
        chunk_bytes,
        ..
    } = disk.image;
    if size_bytes > QCOW2_BYTES_MAX {
        return Err(RestoreError::TooLarge {
            disk: disk.target.clone(),
            size_bytes,
        });
    }
    let mut chunks = ChunkSetBuilder::new(chunk_bytes.count(size_bytes));
    for chunk in image.chunks() {
        let (index, _) = chunk.map_err(|source| RestoreError::Read {
            disk: disk.target.clone(),
            source: Box::new(source),
        })?;
        chunks.insert(index);
    }
    Ok(Qcow2Layout::new(size_bytes, chunk_bytes, chunks.build()))
}

/// Writes every chunk to its place; returns the bytes of data.
fn write_chunks(
    repo: &Repository,
    disk: &DiskRecord,
    image: &ImageReader,
    file: &File,
    layout: &Layout,
    path: &Path,
    options: &RestoreOptions<'_>,
) -> Result<u64, RestoreError> {
    let read = |source| RestoreError::Read {
        disk: disk.target.clone(),
        source: Box::new(source),
    };
    let written = AtomicU64::new(0);
    let chunk_bytes = disk.image.chunk_bytes.bytes();
    let sink = |index: u64, bytes: &[u8]| -> Result<(), Fetch> {
        if options.cancel.is_raised() {
            return Err(Fetch::Sink(RestoreError::Interrupted));
        }
        check_length(&disk.target, index, image.chunk_len(index), bytes.len())?;
        options.hold_back(bytes.len());
        let offset = match layout {
            Layout::Raw => index * chunk_bytes,
            Layout::Qcow2(layout) => layout
                .data_offset(index)
                .expect("the layout was made from the same tree"),
        };
        write_sparsely(file, bytes, offset).map_err(|source| {
            Fetch::Sink(RestoreError::Write {
                path: path.to_owned(),
                source,
            })
        })?;
        written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    };
    let mut window: Vec<(u64, ObjectId)> = Vec::new();
    let mut chunks = image.chunks();
    loop {
        window.clear();
        for chunk in chunks.by_ref().take(WINDOW_CHUNKS) {
            window.push(chunk.map_err(read)?);
        }
        let Some((last, _)) = window.last() else {
            break;
        };
        let done_bytes = (last + 1) * chunk_bytes;
        repo.fetch(&window, options.workers, &sink)
            .map_err(|error| error.of_disk(disk))?;
        options.observer.event(&Event::Progress(&[DiskProgress {
            disk: disk.target.clone(),
            done_bytes: done_bytes.min(disk.image.size_bytes),
            size_bytes: disk.image.size_bytes,
            read_bytes: written.load(Ordering::Relaxed),
            stored_bytes: 0,
        }]));
    }
    Ok(written.load(Ordering::Relaxed))
}

/// Zeroes are looked for in blocks of a page: no file system has smaller holes.
const BLOCK: usize = 4096;
/// A gap of fewer zero blocks is written: a hole would cost a call.
const GAP_BLOCKS: usize = 4;

/// Writes bytes into a file that is new and has its length already, so that
/// what is not written reads as zero: long runs of zeroes stay holes. A disk of
/// little scattered writes would otherwise take many times the space it had.
fn write_sparsely(file: &File, bytes: &[u8], offset: u64) -> std::io::Result<()> {
    for run in data_runs(bytes) {
        let start = offset + run.start as u64;
        file.write_all_at(bytes.get(run).unwrap_or_default(), start)?;
    }
    Ok(())
}

/// Returns the parts of `bytes` between long runs of zeroes.
fn data_runs(bytes: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (number, block) in bytes.chunks(BLOCK).enumerate() {
        let (words, rest) = block.as_chunks::<64>();
        if words.iter().all(|word| *word == [0; 64]) && rest.iter().all(|byte| *byte == 0) {
            continue;
        }
        let start = number * BLOCK;
        match runs.last_mut() {
            Some(run) if start - run.end < GAP_BLOCKS * BLOCK => run.end = start + block.len(),
            _ => runs.push(start..start + block.len()),
        }
    }
    runs
}

/// Writes the definition and the files saved with the point; returns their paths.
pub(super) fn restore_files(
    repo: &Repository,
    point: &Manifest,
    dir: &Path,
) -> Result<Vec<PathBuf>, RestoreError> {
    let mut paths = Vec::new();
    for (number, saved) in point.files.iter().enumerate() {
        let base = Path::new(&saved.path)
            .file_name()
            .and_then(|name| name.to_str());
        let name = format!(
            "{}-{number}-{}",
            file_name(&saved.role),
            file_name(base.unwrap_or("file"))
        );
        let bytes = read_bytes(repo, &saved.image).map_err(|source| RestoreError::ReadFile {
            file: saved.path.clone(),
            source: Box::new(source),
        })?;
        paths.push(write_new(&dir.join(name), &bytes)?);
    }
    // libvirt's is XML; without it there are a command line, or what was known
    // of the images.
    let kind = match point.definition.trim_start().chars().next() {
        Some('<') => "xml",
        Some('{') => "json",
        _ => "txt",
    };
    let definition = dir.join(format!("{}.{kind}", file_name(&point.vm.name)));
    paths.push(write_new(&definition, point.definition.as_bytes())?);
    Ok(paths)
}

/// Reads a small image into memory; saved files are at most 1 GiB.
fn read_bytes(repo: &Repository, root: &ImageRoot) -> Result<Vec<u8>, RepoError> {
    let image = repo.image(root)?;
    let len = usize::try_from(root.size_bytes).unwrap_or(usize::MAX);
    let bytes = Mutex::new(vec![0_u8; len.min(FILE_BYTES_MAX)]);
    let chunks: Vec<(u64, ObjectId)> = image.chunks().collect::<Result<_, _>>()?;
    let sink = |index: u64, chunk: &[u8]| -> Result<(), RepoError> {
        let start = usize::try_from(index)
            .unwrap_or(usize::MAX)
            .saturating_mul(root.chunk_bytes.len());
        let mut bytes = bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let end = start.saturating_add(chunk.len());
        match bytes.get_mut(start..end) {
            Some(place) => place.copy_from_slice(chunk),
            None => {
                return Err(RepoError::new(RepoErrorKind::Damaged, "read a saved file")
                    .because("a chunk lies outside of it"));
            }
        }
        Ok(())
    };
    repo.fetch(&chunks, 1, &sink)?;
    Ok(bytes.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn write_new(path: &Path, bytes: &[u8]) -> Result<PathBuf, RestoreError> {
    super::refuse_existing(std::iter::once(path))?;
    let mut temp = Temporary::beside(path)?;
    temp.file
        .write_all(bytes)
        .map_err(|source| RestoreError::Write {
            path: path.to_owned(),
            source,
        })?;
    temp.publish(path)?;
    Ok(path.to_owned())
}

/// A file without its final name; removed when it is dropped without one.
struct Temporary {
    file: File,
    path: PathBuf,
    published: bool,
}

impl Temporary {
    fn beside(path: &Path) -> Result<Self, RestoreError> {
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let (temp, file) =
            durable::create_temporary(folder, 0o600).map_err(|source| RestoreError::Write {
                path: path.to_owned(),
                source,
            })?;
        Ok(Self {
            file,
            path: temp,
            published: false,
        })
    }

    /// Gives the complete file its name, durably, and never in the place of
    /// another file.
    fn publish(mut self, path: &Path) -> Result<(), RestoreError> {
        let published = durable::publish(&self.file, &self.path, path);
        published.map_err(|failed| match failed.stage {
            durable::Stage::Exists => RestoreError::Exists {
                path: path.to_owned(),
            },
            _ => RestoreError::Write {
                path: path.to_owned(),
                source: failed.error,
            },
        })?;
        self.published = true;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.published {
            durable::discard(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{BLOCK, data_runs};

    #[test]
    fn only_long_runs_of_zeroes_become_holes_and_no_byte_of_data_does() {
        let check = |data: &[usize], len: usize, expected: &[(usize, usize)]| {
            let mut bytes = vec![0; len];
            for at in data {
                bytes[*at] = 1;
            }
            let runs: Vec<_> = data_runs(&bytes)
                .iter()
                .map(|run| (run.start, run.end))
                .collect();
            assert_eq!(runs, expected, "{data:?} of {len}");
        };
        check(&[], 16 * BLOCK, &[]);
        check(&[0], 16 * BLOCK, &[(0, BLOCK)]);
        check(&[16 * BLOCK - 1], 16 * BLOCK, &[(15 * BLOCK, 16 * BLOCK)]);
        // Three blocks between are written, four are not.
        check(&[0, 4 * BLOCK], 16 * BLOCK, &[(0, 5 * BLOCK)]);
        check(
            &[0, 5 * BLOCK],
            16 * BLOCK,
            &[(0, BLOCK), (5 * BLOCK, 6 * BLOCK)],
        );
        // The last block may be short, and no multiple of anything.
        check(&[BLOCK + 70], BLOCK + 71, &[(BLOCK, BLOCK + 71)]);
    }
}
