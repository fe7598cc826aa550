//! Which VM is behind the monitor, and how it runs.

use highwater_hypervisor::{ErrorKind, HypervisorError, RunState, VmRef};
use serde_json::Value;

use super::QmpDriver;
use super::client::Client;
use super::error::{QmpError, explain};
use super::options::uuid;

impl QmpDriver {
    pub(super) fn list_vms(&mut self) -> Result<Vec<(VmRef, RunState)>, HypervisorError> {
        let client = self.client()?;
        let vm = self.vm(&client)?;
        let state = run_state(&client)
            .map_err(|error| explain(format!("cannot see how VM `{}` runs", vm.name), &error))?;
        Ok(vec![(vm, state)])
    }

    pub(super) fn find_vm(&mut self, name_or_uuid: &str) -> Result<VmRef, HypervisorError> {
        let client = self.client()?;
        let vm = self.vm(&client)?;
        let is_it = vm.name == name_or_uuid || (vm.uuid.is_some() && vm.uuid == uuid(name_or_uuid));
        if is_it {
            return Ok(vm);
        }
        Err(HypervisorError::new(
            ErrorKind::NoSuchVm,
            format!("cannot find VM `{name_or_uuid}`"),
        )
        .because(format!(
            "the one behind `{}` is VM `{}`",
            self.options.monitor, vm.name
        )))
    }

    /// Returns the connection, if the VM behind it is this one.
    pub(super) fn expect_vm(&mut self, vm: &VmRef) -> Result<Client, HypervisorError> {
        let client = self.client()?;
        let found = self.vm(&client)?;
        let is_it = match (&found.uuid, &vm.uuid) {
            (Some(one), Some(other)) => one == other,
            _ => found.name == vm.name,
        };
        if is_it {
            return Ok(client);
        }
        Err(
            HypervisorError::new(ErrorKind::NoSuchVm, format!("cannot find VM `{}`", vm.name))
                .because(format!(
                    "another one, `{}`, is behind `{}` now",
                    found.name, self.options.monitor
                )),
        )
    }

    /// Names the VM: as the URI says, else as QEMU does.
    fn vm(&self, client: &Client) -> Result<VmRef, HypervisorError> {
        let message = || format!("cannot tell which VM is behind `{}`", self.options.monitor);
        let ask = |command: &str, field: &str| {
            let answer = client.run(command, Value::Null);
            answer
                .map(|answer| {
                    let text = answer.get(field).and_then(Value::as_str);
                    text.filter(|text| !text.is_empty()).map(str::to_owned)
                })
                .map_err(|error| explain(message(), &error))
        };
        let found = match &self.options.uuid {
            Some(uuid) => Some(uuid.clone()),
            None => ask("query-uuid", "UUID")?.as_deref().and_then(uuid),
        };
        let name = match &self.options.name {
            Some(name) => Some(name.clone()),
            None => ask("query-name", "name")?,
        };
        match name.or_else(|| found.clone()) {
            Some(name) => Ok(VmRef { name, uuid: found }),
            None => Err(HypervisorError::new(ErrorKind::NoSuchVm, message())
                .because("QEMU was started with neither a name nor a UUID")
                .hint("name it: `--name NAME`, or start QEMU with `-name NAME -uuid UUID`")),
        }
    }
}

/// Asks how the VM runs.
pub(super) fn run_state(client: &Client) -> Result<RunState, QmpError> {
    let answer = client.run("query-status", Value::Null)?;
    status(&answer)
        .map(state_of)
        .ok_or_else(|| QmpError::Malformed("it tells no status".to_owned()))
}

/// Returns QEMU's word for how the VM runs.
pub(super) fn status(answer: &Value) -> Option<&str> {
    answer.get("status").and_then(Value::as_str)
}

/// What QEMU's word means for a backup.
pub(super) fn state_of(status: &str) -> RunState {
    match status {
        "running" => RunState::Running,
        // vCPUs stand still, and the images are QEMU's own. A guest that
        // suspended itself writes nothing until it wakes up.
        "paused" | "prelaunch" | "suspended" | "debug" | "watchdog" => RunState::Paused,
        "io-error" => RunState::PausedOnError,
        // Not its own yet, or not any more.
        "inmigrate" | "postmigrate" | "finish-migrate" | "restore-vm" | "save-vm" | "colo" => {
            RunState::NotResumed
        }
        _ => RunState::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_states_in_which_the_images_are_qemus_own_count_as_paused() {
        for (status, state) in [
            ("running", RunState::Running),
            ("prelaunch", RunState::Paused),
            ("suspended", RunState::Paused),
            ("io-error", RunState::PausedOnError),
            ("inmigrate", RunState::NotResumed),
            ("postmigrate", RunState::NotResumed),
            ("internal-error", RunState::Other),
            ("guest-panicked", RunState::Other),
            ("shutdown", RunState::Other),
            ("what comes later", RunState::Other),
        ] {
            assert_eq!(state_of(status), state, "{status}");
        }
    }
}
