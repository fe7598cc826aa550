//! What is costly and the same for every test is made once per machine.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// Returns the cache directory: `HIGHWATER_LAB_CACHE`, or `highwater-lab` in
/// the user's cache directory. Deleting it loses time, nothing else.
pub(crate) fn dir() -> Result<PathBuf> {
    let dir = std::env::var_os("HIGHWATER_LAB_CACHE")
        .map(PathBuf::from)
        .or_else(|| {
            std::env::var_os("XDG_CACHE_HOME").map(|dir| Path::new(&dir).join("highwater-lab"))
        })
        .or_else(|| {
            std::env::var_os("HOME").map(|dir| Path::new(&dir).join(".cache/highwater-lab"))
        })
        .context("neither HIGHWATER_LAB_CACHE nor XDG_CACHE_HOME nor HOME is set")?;
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    Ok(dir)
}

/// Returns the directory `name` of the cache, made by `make` if it is not there.
///
/// Safe against other tests doing the same: one makes, the others wait. A
/// `make` that fails or is killed leaves nothing behind that counts.
pub(crate) fn once(name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let cache = dir()?;
    let done = cache.join(name);
    if done.exists() {
        return Ok(done);
    }
    let lock_path = cache.join(format!("{name}.lock"));
    let lock = File::create(&lock_path)
        .with_context(|| format!("cannot create {}", lock_path.display()))?;
    lock.lock()?;
    if done.exists() {
        return Ok(done);
    }
    let draft = tempfile::Builder::new()
        .prefix(&format!("{name}.draft-"))
        .tempdir_in(&cache)?;
    make(draft.path())?;
    // Whoever finds it under its name finds it whole.
    fs::rename(draft.keep(), &done)?;
    Ok(done)
}

/// Tells one version of a file from another, as libvirt does: by its change time.
pub(crate) fn version_of(path: &Path) -> Result<String> {
    let meta = fs::metadata(path)
        .with_context(|| format!("cannot find {}: is it installed?", path.display()))?;
    Ok(format!("{}-{}", meta.ctime(), meta.size()))
}
