//! Every environment variable the program reads, in one place.

/// A configuration file; empty for none.
pub(crate) const CONFIG: &str = "HIGHWATER_CONFIG";
/// Name of a profile of the configuration.
pub(crate) const PROFILE: &str = "HIGHWATER_PROFILE";
/// The hypervisor's URI.
pub(crate) const CONNECT: &str = "HIGHWATER_CONNECT";
/// The repository's URL.
pub(crate) const REPO: &str = "HIGHWATER_REPO";
/// The passphrase itself.
pub(crate) const PASSWORD: &str = "HIGHWATER_PASSWORD";
/// A file whose first line is the passphrase.
pub(crate) const PASSWORD_FILE: &str = "HIGHWATER_PASSWORD_FILE";
/// A shell command whose first line of output is the passphrase.
pub(crate) const PASSWORD_COMMAND: &str = "HIGHWATER_PASSWORD_COMMAND";
/// The number of an open descriptor to read the passphrase from.
pub(crate) const PASSWORD_FD: &str = "HIGHWATER_PASSWORD_FD";
/// The key file.
pub(crate) const KEY_FILE: &str = "HIGHWATER_KEY_FILE";
/// Where locks and sockets go; tests keep theirs apart.
pub(crate) const RUNTIME_DIR: &str = "HIGHWATER_RUNTIME_DIR";
/// systemd's directory of credentials.
pub(crate) const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";
