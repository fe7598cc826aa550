//! Flags and environment, joined: flag > environment > default.

use std::path::PathBuf;
use std::sync::Arc;

use highwater_engine::repository::Repository;
use highwater_store::Store;

use crate::advice::CliError;
use crate::args::Global;
use crate::{env, secrets};

/// Opens the store that the flags or the environment name.
pub(crate) fn open_store(global: &Global) -> Result<Arc<dyn Store>, CliError> {
    let from_env = || std::env::var(env::REPO).ok().filter(|url| !url.is_empty());
    let url = global
        .repo
        .clone()
        .or_else(from_env)
        .ok_or_else(|| CliError::Usage {
            message: "cannot tell which repository is meant".to_owned(),
            hint: "name it with -r PATH or in HIGHWATER_REPO".to_owned(),
        })?;
    highwater_store::open(&url).map_err(CliError::from)
}

/// Opens the repository, asking for its secret only if it has one.
pub(crate) fn open_repository(global: &Global) -> Result<Repository, CliError> {
    let store = open_store(global)?;
    let kinds = Repository::secret_kinds(store.as_ref())?;
    let secret = secrets::for_opening(global, &kinds)?;
    Ok(Repository::open(store, secret.as_ref())?)
}

/// Returns the hypervisor's URI.
pub(crate) fn connection(global: &Global) -> String {
    global.connect.clone().unwrap_or_else(|| {
        let uri = if is_root() {
            "qemu:///system"
        } else {
            "qemu:///session"
        };
        uri.to_owned()
    })
}

/// Returns the directory for locks and sockets, which need not survive a reboot.
pub(crate) fn runtime_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os(env::RUNTIME_DIR) {
        return PathBuf::from(dir);
    }
    if is_root() {
        return PathBuf::from("/run/highwater");
    }
    std::env::var_os("XDG_RUNTIME_DIR").map_or_else(
        || std::env::temp_dir().join(format!("highwater-{}", rustix::process::getuid().as_raw())),
        |dir| PathBuf::from(dir).join("highwater"),
    )
}

/// Returns the default directory for scratch files: local storage with room.
pub(crate) fn scratch_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os(env::RUNTIME_DIR) {
        return PathBuf::from(dir).join("scratch");
    }
    if is_root() {
        return PathBuf::from("/var/lib/highwater/scratch");
    }
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    cache
        .or_else(home)
        .unwrap_or_else(std::env::temp_dir)
        .join("highwater/scratch")
}

/// Returns `~/.config`, where a libvirt daemon of this user keeps TPM states.
pub(crate) fn user_config_dir() -> Option<PathBuf> {
    let config = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from);
    config.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".config")))
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
