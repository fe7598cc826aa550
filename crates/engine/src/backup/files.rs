//! Saves what a restore needs beside the disks: firmware, kernel, TPM state.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use highwater_hypervisor::{FirmwareRole, VmFacts};
use highwater_model::Clock;
use highwater_repo::{RepoError, RepoErrorKind, SavedFile, Writer};

/// Largest file saved, bytes: a kernel with initial RAM disk is far below.
const FILE_BYTES_MAX: u64 = 1 << 30;
/// Most files of a TPM's state; swtpm has a handful.
const TPM_FILES_MAX: usize = 64;

/// Saves all of them; one that cannot be read is a warning, because the disks
/// are worth having without it.
pub(super) fn save_files(
    writer: &Writer,
    facts: &VmFacts,
    clock: &dyn Clock,
    warnings: &mut Vec<String>,
) -> Result<Vec<SavedFile>, RepoError> {
    let mut saved = Vec::new();
    let firmware = facts.firmware.iter().map(|file| {
        (
            role_word(file.role),
            file.path.clone(),
            file.path.to_string_lossy().into_owned(),
        )
    });
    let mut wanted: Vec<(&str, PathBuf, String)> = firmware.collect();
    if let Some(dir) = &facts.tpm_state {
        match tpm_files(dir) {
            Ok(files) => wanted.extend(files),
            Err(source) => warnings.push(format!(
                "cannot save the TPM state in {}: {source}",
                dir.display()
            )),
        }
    }
    for (role, path, name) in wanted {
        let (mut file, mode, size_bytes) = match open(&path) {
            Ok(opened) => opened,
            Err(source) => {
                warnings.push(format!("cannot save {role} {}: {source}", path.display()));
                continue;
            }
        };
        let captured_at = clock.now();
        // A file that changes its length while it is read is cut or padded by
        // nobody: `add_bytes` takes exactly `size_bytes` or fails.
        let image = match writer.add_bytes(&mut file, size_bytes) {
            Ok(image) => image,
            Err(source) if source.kind() == RepoErrorKind::Input => {
                warnings.push(format!(
                    "cannot save {role} {}: it changed or failed while it was read",
                    path.display()
                ));
                continue;
            }
            Err(source) => return Err(source),
        };
        saved.push(SavedFile {
            role: role.to_owned(),
            path: name,
            mode,
            captured_at,
            image,
        });
    }
    Ok(saved)
}

fn open(path: &Path) -> io::Result<(File, u32, u64)> {
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
        .open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    if metadata.len() > FILE_BYTES_MAX {
        return Err(io::Error::other("it is larger than 1 GiB"));
    }
    Ok((file, metadata.mode() & 0o7777, metadata.len()))
}

/// Lists the regular files below the state directory, two levels deep
/// (`tpm2/tpm2-00.permall`); names are relative to it.
fn tpm_files(dir: &Path) -> io::Result<Vec<(&'static str, PathBuf, String)>> {
    let mut files = Vec::new();
    let mut pending = vec![(dir.to_owned(), 0_u32)];
    while let Some((current, depth)) = pending.pop() {
        for entry in fs::read_dir(&current)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() && depth < 2 {
                pending.push((entry.path(), depth + 1));
            }
            let path = entry.path();
            let relative = path.strip_prefix(dir).map_err(io::Error::other)?;
            // The lock file is swtpm's own business.
            if kind.is_file() && entry.file_name() != ".lock" {
                files.push(("tpm", path.clone(), relative.to_string_lossy().into_owned()));
            }
            if files.len() > TPM_FILES_MAX {
                return Err(io::Error::other("it holds too many files"));
            }
        }
    }
    files.sort();
    Ok(files)
}

const fn role_word(role: FirmwareRole) -> &'static str {
    match role {
        FirmwareRole::Loader => "loader",
        FirmwareRole::Nvram => "nvram",
        FirmwareRole::Kernel => "kernel",
        FirmwareRole::Initrd => "initrd",
    }
}
