//! Where the state of an emulated TPM is.
//!
//! QEMU knows the socket of the emulator (swtpm) and no more; the emulator's own
//! command line names the directory.

use std::fs;
use std::path::PathBuf;

use crate::host;

/// Finds the state directory of the emulator that QEMU was told to use; `None`
/// if there is none, or it cannot be told.
pub(super) fn state_dir(qemu: &[String]) -> Option<PathBuf> {
    let socket = socket_of(qemu)?;
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let mut found = pids.filter_map(|pid| {
        let arguments = host::arguments(pid)?;
        let dir = state_of(&arguments, &socket)?;
        let working_dir = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
        Some(working_dir.join(dir))
    });
    let dir = found.next()?;
    // Two emulators at one socket: nobody knows which one is meant.
    found.next().is_none().then_some(dir)
}

/// Returns the socket of the emulator.
fn socket_of(qemu: &[String]) -> Option<String> {
    let after = |option: &str| {
        let is_it = move |pair: &&[String]| {
            pair.first()
                .is_some_and(|it| it.trim_start_matches('-') == option)
        };
        let pairs = qemu.windows(2).filter(is_it);
        pairs.filter_map(|pair| pair.get(1)).collect::<Vec<_>>()
    };
    let device = after("tpmdev")
        .into_iter()
        .find(|it| it.starts_with("emulator"))?;
    let id = value(device, "chardev")?;
    let chardev = after("chardev")
        .into_iter()
        .find(|it| it.starts_with("socket") && value(it, "id") == Some(id))?;
    value(chardev, "path").map(str::to_owned)
}

/// Returns the state directory, if this is the command line of an emulator at
/// this socket.
fn state_of(arguments: &[String], socket: &str) -> Option<String> {
    let program = arguments.first()?.rsplit('/').next()?;
    let mentions = |it: &String| {
        it.split(',')
            .any(|part| part.strip_prefix("path=") == Some(socket))
    };
    if program != "swtpm" || !arguments.iter().any(mentions) {
        return None;
    }
    let at = arguments
        .iter()
        .position(|it| it == "--tpmstate" || it == "--tpm-state");
    let state = arguments.get(at?.checked_add(1)?)?;
    value(state, "dir").map(str::to_owned)
}

fn value<'a>(options: &'a str, key: &str) -> Option<&'a str> {
    let mut parts = options.split(',');
    parts.find_map(|part| part.strip_prefix(key)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn the_emulators_command_line_names_the_directory() {
        let qemu = words(
            "qemu -chardev socket,id=mon,path=/q -chardev socket,id=tpm,path=/t/s \
             -tpmdev emulator,id=t0,chardev=tpm -device tpm-tis,tpmdev=t0",
        );
        assert_eq!(socket_of(&qemu).as_deref(), Some("/t/s"));
        assert_eq!(
            socket_of(&words("qemu -chardev socket,id=tpm,path=/t/s")),
            None
        );
        let swtpm =
            words("/usr/bin/swtpm socket --tpmstate dir=/t,mode=0600 --ctrl type=unixio,path=/t/s");
        assert_eq!(state_of(&swtpm, "/t/s").as_deref(), Some("/t"));
        assert_eq!(state_of(&swtpm, "/t/other"), None);
        assert_eq!(
            state_of(&words("cat --tpmstate dir=/t path=/t/s"), "/t/s"),
            None
        );
    }
}
