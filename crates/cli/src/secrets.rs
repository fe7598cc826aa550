//! Where a passphrase or key file comes from. Never from argv.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead as _, BufReader, ErrorKind, IsTerminal as _, Read};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use highwater_engine::repository::{Secret, SecretKind};
use zeroize::Zeroizing;

use crate::advice::CliError;
use crate::args::{Encryption, Global};
use crate::{env, output, sys, terminal};

/// Longest passphrase or key file accepted, bytes.
const SECRET_BYTES_MAX: u64 = 64 << 10;

/// Returns the secret for an existing repository, or `None` if it has none.
pub(crate) fn for_opening(
    global: &Global,
    kinds: &[SecretKind],
) -> Result<Option<Secret>, CliError> {
    if kinds.is_empty() {
        return Ok(None);
    }
    if kinds.contains(&SecretKind::KeyFile)
        && let Some(path) = key_file(global)
    {
        return read_key_file(&path).map(Some);
    }
    if kinds.contains(&SecretKind::Passphrase) {
        return passphrase(global, "passphrase of the repository: ").map(Some);
    }
    Err(CliError::Usage {
        message: "cannot open the repository without its key file".to_owned(),
        hint: "name it with --key-file or in HIGHWATER_KEY_FILE".to_owned(),
    })
}

/// Returns the secret for a new repository, asking twice at a terminal.
pub(crate) fn for_init(
    global: &Global,
    encryption: Encryption,
) -> Result<Option<Secret>, CliError> {
    match encryption {
        Encryption::None => Ok(None),
        Encryption::Keyfile => {
            let path = key_file(global).ok_or_else(|| CliError::Usage {
                message: "cannot encrypt with a key file that is not named".to_owned(),
                hint: "make one with `head -c 64 /dev/urandom > FILE` and name it with --key-file FILE"
                    .to_owned(),
            })?;
            read_key_file(&path).map(Some)
        }
        Encryption::Passphrase => {
            if let Some(secret) = given_passphrase(global)? {
                return Ok(Some(secret));
            }
            let first = prompt("new passphrase: ")?;
            let second = prompt("the same again: ")?;
            if *first != *second {
                return Err(CliError::Usage {
                    message: "cannot use two different passphrases".to_owned(),
                    hint: "type the same one twice".to_owned(),
                });
            }
            Ok(Some(Secret::Passphrase(first)))
        }
    }
}

fn key_file(global: &Global) -> Option<PathBuf> {
    global
        .key_file
        .clone()
        .or_else(|| given(env::KEY_FILE).map(PathBuf::from))
        .or_else(|| global.configured.key_file.clone())
}

fn passphrase(global: &Global, question: &str) -> Result<Secret, CliError> {
    if let Some(secret) = given_passphrase(global)? {
        return Ok(secret);
    }
    prompt(question).map(Secret::Passphrase)
}

/// Returns a variable that names something; an empty one names nothing. (An
/// empty passphrase is another matter: that is a mistake worth telling.)
fn given(variable: &str) -> Option<OsString> {
    std::env::var_os(variable).filter(|value| !value.is_empty())
}

/// Flag, then environment, then systemd's credentials, then the configuration.
fn given_passphrase(global: &Global) -> Result<Option<Secret>, CliError> {
    let line = if let Some(path) = &global.password_file {
        first_line_of_file(path)?
    } else if let Some(command) = &global.password_command {
        first_line_of_command(command)?
    } else if let Ok(password) = std::env::var(env::PASSWORD) {
        Zeroizing::new(password.into_bytes())
    } else if let Some(path) = given(env::PASSWORD_FILE) {
        first_line_of_file(Path::new(&path))?
    } else if let Some(command) = given(env::PASSWORD_COMMAND) {
        first_line_of_command(&command.to_string_lossy())?
    } else if let Some(number) = given(env::PASSWORD_FD) {
        let number = number.to_string_lossy();
        first_line_of_descriptor(&number)?
    } else if let Some(path) = credential() {
        first_line_of_file(&path)?
    } else if let Some(path) = &global.configured.password_file {
        first_line_of_file(path)?
    } else if let Some(command) = &global.configured.password_command {
        first_line_of_command(command)?
    } else {
        return Ok(None);
    };
    if line.is_empty() {
        return Err(CliError::Usage {
            message: "cannot use an empty passphrase".to_owned(),
            hint: "look where it comes from: its first line is taken".to_owned(),
        });
    }
    Ok(Some(Secret::Passphrase(line)))
}

fn credential() -> Option<PathBuf> {
    let dir = std::env::var_os(env::CREDENTIALS)?;
    Some(PathBuf::from(dir).join("highwater.password")).filter(|path| path.exists())
}

fn read_key_file(path: &Path) -> Result<Secret, CliError> {
    let cannot = |source| CliError::Read {
        path: path.to_owned(),
        source,
    };
    let mut bytes = Zeroizing::new(Vec::new());
    let file = open_secret(path).map_err(cannot)?;
    // One byte more than is allowed, to see that there is more: a key file
    // that was cut would open nothing that the whole of it opens elsewhere.
    file.take(SECRET_BYTES_MAX.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(cannot)?;
    if bytes.len() as u64 > SECRET_BYTES_MAX {
        return Err(CliError::Usage {
            message: format!(
                "cannot use key file {}: it has more than 64 KiB",
                path.display()
            ),
            hint: "make one with `head -c 64 /dev/urandom > FILE`".to_owned(),
        });
    }
    if bytes.is_empty() {
        return Err(CliError::Usage {
            message: format!("cannot use key file {}: it is empty", path.display()),
            hint: "make one with `head -c 64 /dev/urandom > FILE`".to_owned(),
        });
    }
    Ok(Secret::KeyFile(bytes))
}

/// Opens a file with a secret; warns if it is none for others.
fn open_secret(path: &Path) -> std::io::Result<File> {
    let file = File::open(path)?;
    let about = file.metadata()?;
    if about.is_file() && about.mode() & 0o077 != 0 {
        output::warn(&format!(
            "{} holds a secret and has mode {:04o}: run `chmod 600` on it",
            path.display(),
            about.mode() & 0o7777
        ));
    }
    Ok(file)
}

fn first_line_of_file(path: &Path) -> Result<Zeroizing<Vec<u8>>, CliError> {
    open_secret(path)
        .and_then(first_line)
        .map_err(|source| CliError::Read {
            path: path.to_owned(),
            source,
        })
}

fn first_line_of_descriptor(number: &str) -> Result<Zeroizing<Vec<u8>>, CliError> {
    let descriptor = number.parse().map_err(|_| CliError::Usage {
        message: format!("cannot read a passphrase from descriptor `{number}`"),
        hint: "HIGHWATER_PASSWORD_FD holds the number of an open descriptor".to_owned(),
    })?;
    sys::inherited(descriptor)
        .and_then(first_line)
        .map_err(|source| CliError::Read {
            path: PathBuf::from(format!("descriptor {number}")),
            source,
        })
}

/// Keeps a descriptor with a passphrase from every process that we start,
/// also where another source was used.
pub(crate) fn keep_descriptor() {
    let number = std::env::var(env::PASSWORD_FD).ok();
    if let Some(number) = number.and_then(|number| number.parse().ok()) {
        drop(sys::inherited(number));
    }
}

fn first_line_of_command(command: &str) -> Result<Zeroizing<Vec<u8>>, CliError> {
    let failed = |reason: String| CliError::PasswordCommand { reason };
    let mut child = Command::new("/bin/sh")
        .args(["-c", command])
        .stdin(Stdio::inherit())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|source| failed(source.to_string()))?;
    let output = child
        .stdout
        .take()
        .ok_or_else(|| failed("it has no output".to_owned()))?;
    let line = first_line(output).map_err(|source| failed(source.to_string()))?;
    let status = child.wait().map_err(|source| failed(source.to_string()))?;
    if !status.success() {
        return Err(failed(status.to_string()));
    }
    Ok(line)
}

fn first_line(source: impl Read) -> std::io::Result<Zeroizing<Vec<u8>>> {
    let mut line = Zeroizing::new(Vec::new());
    let source = source.take(SECRET_BYTES_MAX.saturating_add(1));
    BufReader::new(source).read_until(b'\n', &mut line)?;
    if line.len() as u64 > SECRET_BYTES_MAX {
        return Err(std::io::Error::other("its first line has more than 64 KiB"));
    }
    while matches!(line.last(), Some(b'\n' | b'\r')) {
        line.pop();
    }
    Ok(line)
}

fn prompt(question: &str) -> Result<Zeroizing<Vec<u8>>, CliError> {
    if !std::io::stdin().is_terminal() {
        return Err(CliError::Usage {
            message: "cannot ask for the passphrase: there is no terminal".to_owned(),
            hint: "use --password-file, --password-command or HIGHWATER_PASSWORD_FILE".to_owned(),
        });
    }
    let answer = terminal::ask(|| rpassword::prompt_password(question));
    let answer = answer.map_err(|source| match source.kind() {
        // Ctrl-C comes as a character there.
        ErrorKind::Interrupted => CliError::Interrupted,
        _ => CliError::Read {
            path: PathBuf::from("the terminal"),
            source,
        },
    })?;
    Ok(Zeroizing::new(answer.into_bytes()))
}
