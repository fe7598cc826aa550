//! Flags, environment and configuration, joined: flag > environment > file >
//! default.

use std::path::PathBuf;
use std::sync::Arc;

use clap::ValueEnum as _;
use highwater_drivers::uri;
use highwater_engine::repository::{Compression, Repository};
use highwater_store::{Location, Store, Watched};

use crate::advice::CliError;
use crate::args::{Args, Backup, Command, ConfiguredSecrets, Global, Offline, Quiesce};
use crate::config::{self, Entry, Layer, Value, Wanted};
use crate::effective::{Effective, Shown};
use crate::{by_hand, env, secrets, values, watchdog};

/// Completes what was typed with the environment, the configuration and the
/// defaults, in that order.
pub(crate) fn complete(args: &mut Args) -> Result<Effective, CliError> {
    let global = &mut args.global;
    let profile = global.profile.clone().or_else(|| text_of(env::PROFILE));
    let (layer, files) = config::load(&config_files(global), profile.as_deref())?;
    let mut from = Sources {
        layer,
        shown: Vec::new(),
    };
    global.repo = from.text("repo", global.repo.take(), Some(env::REPO), None);
    let connect = default_connection();
    let typed = global.connect.take();
    global.connect = from.text("connect", typed, Some(env::CONNECT), Some(connect));
    // Which of several sources of a passphrase counts is settled where they are
    // read: some of the environment's are no settings.
    let path = |text: String| PathBuf::from(at_home(&text));
    let flag = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
    let key_file = flag(&global.key_file);
    let password_file = flag(&global.password_file);
    let file_only = |from: &Sources, key| from.file_text(key).map(|(text, _)| text);
    global.configured = ConfiguredSecrets {
        password_file: file_only(&from, "password-file").map(path),
        password_command: file_only(&from, "password-command"),
        key_file: file_only(&from, "key-file").map(path),
    };
    from.text(
        "password-file",
        password_file,
        Some(env::PASSWORD_FILE),
        None,
    );
    from.text(
        "password-command",
        global.password_command.clone(),
        Some(env::PASSWORD_COMMAND),
        None,
    );
    from.text("key-file", key_file, Some(env::KEY_FILE), None);
    from.flag("quiet", &mut global.quiet, global.verbose);
    from.flag("no-progress", &mut global.no_progress, false);
    from.flag("strict", &mut global.strict, false);
    match &mut args.command {
        Command::Backup(backup) => {
            let typed = BackupSettings::take(backup);
            from.backup(typed)?.give(backup);
        }
        Command::Doctor(doctor) => {
            let typed = BackupSettings {
                scratch_dir: doctor.scratch_dir.take(),
                ..BackupSettings::default()
            };
            doctor.scratch_dir = from.backup(typed)?.scratch_dir;
        }
        Command::Restore(restore) => {
            restore.limit = from.parsed("limit", restore.limit, None, &values::rate)?;
        }
        // Asked for, to show them and to find mistakes in them.
        Command::Config => drop(from.backup(BackupSettings::default())?),
        _ => {}
    }
    Ok(Effective {
        files,
        settings: from.shown,
    })
}

fn config_files(global: &Global) -> Vec<Wanted> {
    let named = |path: PathBuf| vec![Wanted { path, named: true }];
    if let Some(path) = &global.config {
        return named(path.clone());
    }
    match std::env::var_os(env::CONFIG) {
        Some(path) if path.is_empty() => return Vec::new(),
        Some(path) => return named(PathBuf::from(path)),
        None => {}
    }
    let user = user_config_dir().map(|dir| dir.join("highwater/config.toml"));
    std::iter::once(PathBuf::from("/etc/highwater/config.toml"))
        .chain(user)
        .map(|path| Wanted { path, named: false })
        .collect()
}

/// The settings of a backup that the configuration may give.
#[derive(Default)]
struct BackupSettings {
    audit: Option<values::Audit>,
    compression: Option<Compression>,
    freeze_mountpoints: Vec<String>,
    group: Option<String>,
    limit: Option<u64>,
    offline: Option<Offline>,
    quiesce: Option<Quiesce>,
    scratch_dir: Option<PathBuf>,
    tags: Vec<String>,
    threshold: Option<u64>,
    workers: Option<u16>,
}

impl BackupSettings {
    fn take(args: &mut Backup) -> Self {
        Self {
            audit: args.audit.take(),
            compression: args.compression.take(),
            freeze_mountpoints: std::mem::take(&mut args.freeze_mountpoints),
            group: args.group.take(),
            limit: args.limit.take(),
            offline: args.offline.take(),
            quiesce: args.quiesce.take(),
            scratch_dir: args.scratch_dir.take(),
            tags: std::mem::take(&mut args.tags),
            threshold: args.threshold.take(),
            workers: args.workers.take(),
        }
    }

    fn give(self, args: &mut Backup) {
        args.audit = self.audit;
        args.compression = self.compression;
        args.freeze_mountpoints = self.freeze_mountpoints;
        args.group = self.group;
        args.limit = self.limit;
        args.offline = self.offline;
        args.quiesce = self.quiesce;
        args.scratch_dir = self.scratch_dir;
        args.tags = self.tags;
        args.threshold = self.threshold;
        args.workers = self.workers;
    }
}

/// Where settings come from, and what was taken so far.
struct Sources {
    layer: Layer,
    shown: Vec<Shown>,
}

const FLAG: &str = "command line";
const DEFAULT: &str = "default";

impl Sources {
    fn show(&mut self, setting: &'static str, value: impl Into<String>, from: impl Into<String>) {
        self.shown.push(Shown {
            setting,
            value: value.into(),
            from: from.into(),
        });
    }

    fn file_text(&self, key: &str) -> Option<(String, String)> {
        let entry = self.layer.get(key)?;
        match &entry.value {
            Value::Text(text) => Some((text.clone(), place(entry))),
            Value::Flag(_) | Value::List(_) => None,
        }
    }

    fn text(
        &mut self,
        key: &'static str,
        flag: Option<String>,
        variable: Option<&str>,
        default: Option<String>,
    ) -> Option<String> {
        let environment = || {
            let variable = variable?;
            Some((text_of(variable)?, format!("environment {variable}")))
        };
        let found = flag
            .map(|text| (text, FLAG.to_owned()))
            .or_else(environment)
            .or_else(|| {
                self.file_text(key)
                    .map(|(text, from)| (at_home(&text), from))
            })
            .or_else(|| default.map(|text| (text, DEFAULT.to_owned())));
        found.map(|(text, from)| {
            self.show(key, &text, from);
            text
        })
    }

    /// A value with a form of its own; the same mistakes are mistakes in a file.
    fn parsed<T: std::fmt::Display>(
        &mut self,
        key: &'static str,
        flag: Option<T>,
        default: Option<T>,
        parse: &dyn Fn(&str) -> Result<T, String>,
    ) -> Result<Option<T>, CliError> {
        if let Some(value) = flag {
            self.show(key, value.to_string(), FLAG);
            return Ok(Some(value));
        }
        let Some((text, from)) = self.file_text(key) else {
            if let Some(value) = &default {
                self.show(key, value.to_string(), DEFAULT);
            }
            return Ok(default);
        };
        let value = parse(&text).map_err(|why| self.wrong(key, &text, &why))?;
        self.show(key, text, from);
        Ok(Some(value))
    }

    fn list(
        &mut self,
        key: &'static str,
        flag: Vec<String>,
        check: &dyn Fn(&str) -> Result<String, String>,
    ) -> Result<Vec<String>, CliError> {
        if !flag.is_empty() {
            self.show(key, flag.join(", "), FLAG);
            return Ok(flag);
        }
        let Some(entry) = self.layer.get(key).cloned() else {
            return Ok(flag);
        };
        let Value::List(items) = &entry.value else {
            return Ok(flag);
        };
        for item in items {
            check(item).map_err(|why| self.wrong(key, item, &why))?;
        }
        self.show(key, items.join(", "), place(&entry));
        Ok(items.clone())
    }

    fn flag(&mut self, key: &'static str, flag: &mut bool, overruled: bool) {
        let file = match self.layer.get(key) {
            Some(entry) => match &entry.value {
                Value::Flag(value) => Some((*value, place(entry))),
                Value::Text(_) | Value::List(_) => None,
            },
            None => None,
        };
        let (value, from) = match file {
            _ if *flag => (true, FLAG.to_owned()),
            _ if overruled => (false, FLAG.to_owned()),
            Some((value, from)) => (value, from),
            None => (false, DEFAULT.to_owned()),
        };
        self.show(key, value.to_string(), from);
        *flag = value;
    }

    fn backup(&mut self, typed: BackupSettings) -> Result<BackupSettings, CliError> {
        let offline = typed.offline.map(Word);
        let quiesce = typed.quiesce.map(Word);
        let compression = typed.compression.map(Method);
        let workers = |text: &str| {
            let number = text.parse().ok().filter(|it| (1..=64).contains(it));
            number.ok_or_else(|| "use a number from 1 to 64".to_owned())
        };
        let scratch = typed.scratch_dir.map(|it| it.display().to_string());
        let default_scratch = scratch_dir().display().to_string();
        Ok(BackupSettings {
            scratch_dir: self
                .text("scratch-dir", scratch, None, Some(default_scratch))
                .map(PathBuf::from),
            workers: self.parsed("workers", typed.workers, None, &workers)?,
            compression: self
                .parsed(
                    "compression",
                    compression,
                    Some(Method(Compression::Zstd(1))),
                    &|text| values::compression(text).map(Method),
                )?
                .map(|it| it.0),
            quiesce: self
                .parsed("quiesce", quiesce, Some(Word(Quiesce::Try)), &|text| {
                    let word = Quiesce::from_str(text, false).map(Word);
                    word.map_err(|_| "use off, try or require".to_owned())
                })?
                .map(|it| it.0),
            offline: self
                .parsed("offline", offline, Some(Word(Offline::Yield)), &|text| {
                    let word = Offline::from_str(text, false).map(Word);
                    word.map_err(|_| "use yield, hold or refuse".to_owned())
                })?
                .map(|it| it.0),
            freeze_mountpoints: self.list(
                "freeze-mountpoint",
                typed.freeze_mountpoints,
                &|it| Ok(it.to_owned()),
            )?,
            limit: self.parsed("limit", typed.limit, None, &values::rate)?,
            audit: self.parsed("audit", typed.audit, None, &values::audit)?,
            threshold: self.parsed("threshold", typed.threshold, None, &values::size)?,
            tags: self.list("tag", typed.tags, &values::label)?,
            group: self.parsed("group", typed.group, None, &values::label)?,
        })
    }

    fn wrong(&self, key: &str, text: &str, why: &str) -> CliError {
        let entry = self.layer.get(key);
        CliError::Config {
            path: entry.map(|it| it.file.clone()).unwrap_or_default(),
            reason: format!(
                "line {}: `{key}` cannot be `{text}`",
                entry.map_or(0, |it| it.line)
            ),
            hint: Some(why.to_owned()),
        }
    }
}

/// A compression as it is written.
struct Method(Compression);

impl std::fmt::Display for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Compression::None => f.write_str("none"),
            Compression::Lz4 => f.write_str("lz4"),
            Compression::Zstd(level) => write!(f, "zstd:{level}"),
        }
    }
}

/// A word of the command line as it is written.
struct Word<T>(T);

impl<T: clap::ValueEnum> std::fmt::Display for Word<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let word = self.0.to_possible_value();
        f.write_str(word.as_ref().map_or("", |word| word.get_name()))
    }
}

fn place(entry: &Entry) -> String {
    format!("{} line {}", entry.file.display(), entry.line)
}

/// Returns a variable that is set to something.
fn text_of(variable: &str) -> Option<String> {
    std::env::var(variable).ok().filter(|text| !text.is_empty())
}

/// Returns a path of a file with its `~/` written out: no shell does that there.
fn at_home(text: &str) -> String {
    match (text.strip_prefix("~/"), std::env::var_os("HOME")) {
        (Some(rest), Some(home)) => PathBuf::from(home).join(rest).display().to_string(),
        _ => text.to_owned(),
    }
}

/// Opens the store that was named.
pub(crate) fn open_store(global: &Global) -> Result<Arc<dyn Store>, CliError> {
    let url = global.repo.clone().ok_or_else(|| CliError::Usage {
        message: "cannot tell which repository is meant".to_owned(),
        hint: "name it with -r PATH, in HIGHWATER_REPO, or as `repo` in the configuration"
            .to_owned(),
    })?;
    let store = highwater_store::open(&url)?;
    #[cfg(debug_assertions)]
    let store = crate::faults::beneath(store);
    let Location::Directory(directory) = Location::parse(&url)?;
    let watched = Watched::new(store);
    watchdog::watch(watched.calls(), directory);
    Ok(Arc::new(watched))
}

/// Opens the repository, asking for its secret only if it has one.
pub(crate) fn open_repository(global: &Global) -> Result<Repository, CliError> {
    let store = open_store(global)?;
    let kinds = Repository::secret_kinds(store.as_ref())?;
    let secret = secrets::for_opening(global, &kinds)?;
    Ok(Repository::open(store, secret.as_ref())?)
}

/// Returns the hypervisor's URI.
pub(crate) fn connection(global: &Global, name: Option<&str>) -> Result<String, CliError> {
    let uri = global.connect.clone().unwrap_or_else(default_connection);
    by_hand::connected_to(&uri);
    let Some(name) = name else { return Ok(uri) };
    uri::with_name(&uri, name).ok_or_else(|| CliError::Usage {
        message: format!("cannot give the VM behind `{uri}` a name"),
        hint: "only `-c qmp:` and `-c image:` take --name, unless they have `?name=`; VMs of \
               libvirt have names"
            .to_owned(),
    })
}

fn default_connection() -> String {
    let uri = if is_root() {
        "qemu:///system"
    } else {
        "qemu:///session"
    };
    uri.to_owned()
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
