//! Changes marks outside a session. A mark is nothing but a bitmap of its name
//! on each of its disks: QEMU keeps no record of what belongs together.

use highwater_hypervisor::{ErrorKind, HypervisorError, MarkOrder, RunState, VmRef};
use highwater_model::step::{Step, pass};
use serde_json::json;

use super::QmpDriver;
use super::client::Client;
use super::error::{QmpError, explain};
use super::identity::run_state;
use super::layout::{self, Layout};
use crate::blocks::Blocks;

impl QmpDriver {
    pub(super) fn change_mark(
        &mut self,
        vm: &VmRef,
        order: &MarkOrder,
    ) -> Result<(), HypervisorError> {
        if let Err(error) = self.client() {
            // It is off, and may stay so: nobody has to wait until it is back.
            return Err(match error.kind {
                ErrorKind::Unreachable if self.line.is_over() => HypervisorError {
                    kind: ErrorKind::WrongState,
                    ..error
                },
                _ => error,
            });
        }
        match order {
            MarkOrder::Remove(name) => {
                let message = format!("cannot remove mark `{name}` of VM `{}`", vm.name);
                self.remove_bitmaps(vm, &name.to_string(), None, &message)
            }
            MarkOrder::Distrust { name, nodes } => {
                let message = format!("cannot take mark `{name}` off a disk of VM `{}`", vm.name);
                self.remove_bitmaps(vm, &name.to_string(), Some(nodes), &message)
            }
            // Nobody to tell.
            MarkOrder::Redefine(_) => Ok(()),
        }
    }

    /// Removes the bitmaps of this name, from some nodes or from all, and makes
    /// sure that none is left there.
    fn remove_bitmaps(
        &mut self,
        vm: &VmRef,
        name: &str,
        nodes: Option<&[String]>,
        message: &str,
    ) -> Result<(), HypervisorError> {
        let client = self.expect_vm(vm)?;
        let failed = |error: &QmpError| explain(message, error);
        if run_state(&client).map_err(|error| failed(&error))? == RunState::NotResumed {
            return Err(HypervisorError::new(ErrorKind::WrongState, message).because(
                "the VM was loaded or moved and has not run since: its images are not QEMU's own",
            ));
        }
        let holders = || -> Result<Vec<String>, HypervisorError> {
            let mut holders = query_blocks(&client)
                .map_err(|error| failed(&error))?
                .holders(name);
            holders.retain(|node| nodes.is_none_or(|nodes| nodes.contains(node)));
            Ok(holders)
        };
        let mut because = Vec::new();
        for node in holders()? {
            match remove_bitmap(&client, &node, name) {
                Ok(()) => pass(Step::BitmapRemoved),
                Err(error) => because.push(error),
            }
        }
        let left = holders()?;
        if left.is_empty() {
            return Ok(());
        }
        let layout = layout::look(&client).map_err(|error| failed(&error))?;
        if let Some(image) = left.iter().find_map(|node| read_only_image(node, &layout)) {
            // To open it for writing would mean to open it with other options
            // than the ones it was opened with, which nobody can ask for.
            return Err(HypervisorError::new(ErrorKind::Other, message)
                .because(format!(
                    "its bitmap is in `{image}`, which QEMU has opened for reading only"
                ))
                .hint(format!(
                    "remove it when the VM is off: `qemu-img bitmap --remove {image} {name}`"
                )));
        }
        let is_busy = because.iter().any(|error| error.kind() == ErrorKind::Busy);
        let kind = if is_busy {
            ErrorKind::Busy
        } else {
            ErrorKind::Other
        };
        Err(because
            .into_iter()
            .fold(HypervisorError::new(kind, message), |explained, error| {
                explained.because(error.to_string())
            }))
    }
}

/// Returns the image of a node that QEMU opened for reading only: a backing file.
fn read_only_image(node: &str, layout: &Layout) -> Option<String> {
    let about = layout.nodes.get(node).filter(|node| node.is_read_only)?;
    Some(about.file.clone())
}

/// Removes one bitmap.
pub(super) fn remove_bitmap(client: &Client, node: &str, name: &str) -> Result<(), QmpError> {
    let arguments = json!({"node": node, "name": name});
    client.run("block-dirty-bitmap-remove", arguments).map(drop)
}

/// Asks QEMU about its block layer.
pub(super) fn query_blocks(client: &Client) -> Result<Blocks, QmpError> {
    let nodes = client.run("query-named-block-nodes", json!({"flat": true}))?;
    let devices = client.run("query-block", json!({}))?;
    Blocks::from_values(nodes, devices).map_err(|error| QmpError::Malformed(error.to_string()))
}
