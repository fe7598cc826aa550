//! Restores one disk as raw bytes to a stream, from first to last.

use std::io::Write;
use std::sync::{Mutex, PoisonError};

use highwater_model::ObjectId;
use highwater_repo::{DiskRecord, ImageReader, Repository};

use super::{Fetch, Format, RestoreError, RestoreOptions, RestoredDisk, check_length};
use crate::{DiskProgress, Event};

/// Bytes of the disk put in order in memory at a time.
const WINDOW_BYTES: u64 = 32 << 20;

/// Writes one disk to `output`.
pub(super) fn restore_disk(
    repo: &Repository,
    disk: &DiskRecord,
    output: &mut dyn Write,
    options: &RestoreOptions<'_>,
) -> Result<RestoredDisk, RestoreError> {
    let read = |source| RestoreError::Read {
        disk: disk.target.clone(),
        source: Box::new(source),
    };
    let image = repo.image(&disk.image).map_err(read)?;
    let chunk_bytes = disk.image.chunk_bytes.bytes();
    let size_bytes = disk
        .file_bytes
        .map_or(disk.image.size_bytes, |it| it.min(disk.image.size_bytes));
    let window_chunks = (WINDOW_BYTES / chunk_bytes).max(1);
    let mut chunks = image.chunks().peekable();
    let mut data_bytes = 0_u64;
    let mut start = 0_u64;
    while start < size_bytes {
        if options.cancel.is_raised() {
            return Err(RestoreError::Interrupted);
        }
        let first = start / chunk_bytes;
        let beyond = first + window_chunks;
        let mut window: Vec<(u64, ObjectId)> = Vec::new();
        while let Some(chunk) = chunks.next_if(|chunk| match chunk {
            Ok((index, _)) => *index < beyond,
            Err(_) => true,
        }) {
            window.push(chunk.map_err(read)?);
        }
        let len = (beyond * chunk_bytes).min(size_bytes) - start;
        let bytes = fetch_in_order(repo, disk, &image, &window, first, len, options)?;
        output
            .write_all(&bytes)
            .map_err(|source| RestoreError::Output { source })?;
        data_bytes += (window.len() as u64 * chunk_bytes).min(len);
        start += len;
        options.observer.event(&Event::Progress(&[DiskProgress {
            disk: disk.target.clone(),
            done_bytes: start,
            size_bytes,
            read_bytes: data_bytes,
            stored_bytes: 0,
        }]));
    }
    output
        .flush()
        .map_err(|source| RestoreError::Output { source })?;
    Ok(RestoredDisk {
        disk: disk.target.clone(),
        path: None,
        format: Format::Raw.word(),
        size_bytes: disk.image.size_bytes,
        data_bytes,
        root: disk.image.hash,
    })
}

/// Returns `len` bytes from chunk `first` on; what has no chunk is zero.
fn fetch_in_order(
    repo: &Repository,
    disk: &DiskRecord,
    image: &ImageReader,
    window: &[(u64, ObjectId)],
    first: u64,
    len: u64,
    options: &RestoreOptions<'_>,
) -> Result<Vec<u8>, RestoreError> {
    let len = usize::try_from(len).expect("a window fits in memory");
    let bytes = Mutex::new(vec![0_u8; len]);
    let chunk_len = disk.image.chunk_bytes.len();
    let sink = |index: u64, chunk: &[u8]| -> Result<(), Fetch> {
        check_length(&disk.target, index, image.chunk_len(index), chunk.len())?;
        options.hold_back(chunk.len());
        let start = usize::try_from(index - first).expect("inside the window") * chunk_len;
        let mut bytes = bytes.lock().unwrap_or_else(PoisonError::into_inner);
        // The last chunk of a raw file of odd length is cut.
        let room = bytes.get_mut(start..).unwrap_or_default();
        for (to, from) in room.iter_mut().zip(chunk) {
            *to = *from;
        }
        Ok(())
    };
    repo.fetch(window, options.workers, &sink)
        .map_err(|error| error.of_disk(disk))?;
    Ok(bytes.into_inner().unwrap_or_else(PoisonError::into_inner))
}
