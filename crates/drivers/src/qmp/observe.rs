//! Reports everything about a VM. Changes nothing.

use std::io::{self, Read as _};
use std::path::Path;

use highwater_hypervisor::{
    ErrorKind, FirmwareFile, FirmwareRole, HypervisorError, RunState, VmFacts, VmRef,
};
use serde_json::{Value, json};

use super::QmpDriver;
use super::agent;
use super::client::Client;
use super::disks;
use super::error::{QmpError, explain};
use super::files::{Files, Location};
use super::identity::run_state;
use super::jobs;
use super::layout::{self, Layout};
use super::secrets::masked;
use super::tpm;
use crate::host;

/// A definition is kept with each restore point; no sane one is longer.
const DEFINITION_BYTES_MAX: u64 = 1 << 20;

impl QmpDriver {
    pub(super) fn observe_vm(&mut self, vm: &VmRef) -> Result<VmFacts, HypervisorError> {
        let client = self.expect_vm(vm)?;
        let failed = |error: &QmpError| explain(format!("cannot observe VM `{}`", vm.name), error);
        let process = self.process();
        let arguments = process
            .as_ref()
            .and_then(|process| host::arguments(process.identity.pid))
            .unwrap_or_default();
        let files = Files::of(process.as_ref());
        // Before the bitmaps: a write that came between the two questions, and
        // was counted, would look like one that its bitmap has missed.
        let counters = disks::write_counters(&client).map_err(|error| failed(&error))?;
        let layout = layout::look(&client).map_err(|error| failed(&error))?;
        let run_state = run_state_with_images(&client, &layout).map_err(|error| failed(&error))?;
        let found = layout.disks.iter();
        let disks = found
            .map(|disk| disks::facts(disk, &layout, &files, &counters))
            .collect();
        Ok(VmFacts {
            vm: vm.clone(),
            run_state,
            persistent: true,
            definition: self.definition(vm, &arguments)?,
            firmware: firmware(&layout, &files, &arguments),
            tpm_state: tpm::state_dir(&arguments),
            disks,
            skipped: layout.skipped.clone(),
            checkpoints: Vec::new(),
            expects_records: false,
            job: jobs::running_job(&client, &layout).map_err(|error| failed(&error))?,
            agent: agent::state(self.agent().as_ref()),
            process: process.map(|process| process.identity),
            versions: version(&client).into_iter().collect(),
        })
    }

    /// Returns what a restore needs to know of the VM: the file that was named
    /// for it, else the command line.
    fn definition(&self, vm: &VmRef, arguments: &[String]) -> Result<String, HypervisorError> {
        let Some(path) = &self.options.config else {
            return Ok(command_line(arguments));
        };
        match read_definition(path) {
            Ok(text) => Ok(text),
            Err(error) => Err(HypervisorError::new(
                ErrorKind::Other,
                format!(
                    "cannot read the configuration `{}` of VM `{}`",
                    path.display(),
                    vm.name
                ),
            )
            .because(error.to_string())),
        }
    }
}

/// Reads a file that somebody named: not a pipe, which would keep us waiting, and
/// whole or not at all.
fn read_definition(path: &Path) -> io::Result<String> {
    let file = host::open_without_waiting(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut text = String::new();
    let limit = DEFINITION_BYTES_MAX.saturating_add(1);
    let bytes = file.take(limit).read_to_string(&mut text)?;
    if u64::try_from(bytes).unwrap_or(u64::MAX) > DEFINITION_BYTES_MAX {
        return Err(io::Error::other("it is longer than 1 MiB"));
    }
    Ok(text)
}

/// Images that another process still owns, or owns again, are told by QEMU 10;
/// older ones tell it by how the VM runs.
fn run_state_with_images(client: &Client, layout: &Layout) -> Result<RunState, QmpError> {
    let state = run_state(client)?;
    let may_be_inactive = matches!(state, RunState::Paused | RunState::PausedOnError);
    if may_be_inactive && layout.blocks.are_active() == Some(false) {
        return Ok(RunState::NotResumed);
    }
    Ok(state)
}

/// Returns QEMU's version, for the report.
pub(super) fn version(client: &Client) -> Option<(String, String)> {
    let version = client.run("query-version", json!({})).ok()?;
    let number = |part: &str| version.get("qemu")?.get(part)?.as_u64();
    let (major, minor, micro) = (number("major")?, number("minor")?, number("micro")?);
    Some(("qemu".to_owned(), format!("{major}.{minor}.{micro}")))
}

/// Writes a command line so that a shell understands it, an option in each line,
/// and without its secrets.
fn command_line(arguments: &[String]) -> String {
    if arguments.is_empty() {
        return "# the command line of this VM's QEMU could not be read\n".to_owned();
    }
    let mut text = String::new();
    for (n, argument) in arguments.iter().enumerate() {
        let is_option = argument.starts_with('-') && argument.len() > 1;
        match (n, is_option) {
            (0, _) => {}
            (_, true) => text.push_str(" \\\n  "),
            (_, false) => text.push(' '),
        }
        text.push_str(&quoted(&masked(argument)));
    }
    text.push('\n');
    text
}

fn quoted(argument: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_=/.,:+@%".contains(&byte);
    if !argument.is_empty() && argument.bytes().all(is_plain) {
        return argument.to_owned();
    }
    format!("'{}'", argument.replace('\'', r"'\''"))
}

/// Returns what the machine is started from beside its disks: flash memory as
/// QEMU tells it, the rest as its command line does.
fn firmware(layout: &Layout, files: &Files, arguments: &[String]) -> Vec<FirmwareFile> {
    let mut found: Vec<FirmwareFile> = layout
        .flash
        .iter()
        .filter_map(|(node, is_read_only)| {
            let storage = disks::storage(node, layout);
            let about = layout.nodes.get(storage)?;
            let Location::File(path) = files.location(&about.driver, &about.file) else {
                return None;
            };
            let role = if *is_read_only {
                FirmwareRole::Loader
            } else {
                FirmwareRole::Nvram
            };
            Some(FirmwareFile { role, path })
        })
        .collect();
    for (option, role) in [
        ("bios", FirmwareRole::Loader),
        ("kernel", FirmwareRole::Kernel),
        ("initrd", FirmwareRole::Initrd),
    ] {
        let value = option_value(arguments, option);
        let path = value.map(|name| files.absolute(name));
        // A firmware's bare name is looked for in a directory of QEMU's own.
        let path = path.filter(|path| path.is_absolute() && Path::new(path).exists());
        found.extend(path.map(|path| FirmwareFile { role, path }));
    }
    found
}

/// Returns what follows an option on a command line.
pub(super) fn option_value<'a>(arguments: &'a [String], option: &str) -> Option<&'a str> {
    let is_it = |argument: &String| {
        argument.strip_prefix("--").or(argument.strip_prefix('-')) == Some(option)
    };
    let at = arguments.iter().position(is_it)?;
    arguments.get(at.checked_add(1)?).map(String::as_str)
}

/// Returns the text of a field, for people.
pub(super) fn text_of(value: &Value, field: &str) -> Option<String> {
    let text = value.get(field)?.as_str()?;
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_is_a_file_and_kept_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config");
        let most = usize::try_from(DEFINITION_BYTES_MAX).unwrap();
        std::fs::write(&path, "x".repeat(most)).unwrap();
        assert_eq!(read_definition(&path).unwrap().len(), most);
        std::fs::write(&path, "x".repeat(most + 1)).unwrap();
        let error = read_definition(&path).unwrap_err();
        assert!(error.to_string().contains("longer"), "{error}");
        let pipe = dir.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        assert!(made.unwrap().success());
        // It does not wait for somebody who writes.
        let error = read_definition(&pipe).unwrap_err();
        assert!(error.to_string().contains("regular"), "{error}");
    }

    #[test]
    fn a_command_line_is_kept_so_that_a_shell_understands_it() {
        let arguments = [
            "qemu",
            "-name",
            "a b",
            "-drive",
            "file=it's,if=virtio",
            "-S",
            "",
        ];
        let arguments: Vec<String> = arguments.iter().map(|it| (*it).to_owned()).collect();
        let text = command_line(&arguments);
        assert_eq!(
            text,
            "qemu \\\n  -name 'a b' \\\n  -drive 'file=it'\\''s,if=virtio' \\\n  -S ''\n"
        );
        assert_eq!(option_value(&arguments, "name"), Some("a b"));
        assert_eq!(option_value(&arguments, ""), None);
        assert!(command_line(&[]).contains("could not be read"));
        let secret = ["qemu", "-object", "secret,id=s,data=hunter2"];
        let text = command_line(&secret.map(str::to_owned));
        assert_eq!(text, "qemu \\\n  -object 'secret,id=s,data=***'\n");
    }
}
