//! Keeps away from a fault of QEMU before 9.0 that ends the guest.
//!
//! There, the NBD server may be told by another thread that one of its clients
//! has gone, when the exported disk is served by an iothread, and QEMU ends
//! itself (`nbd_blockdev_client_closed`: assertion failed; seen with 7.2 as soon
//! as the first reader went away). No backup is worth that. Versions are not
//! compared: what tells is a property that came when iothreads were made safe.

use highwater_hypervisor::{ErrorKind, HypervisorError, VmRef};
use serde_json::{Value, json};

use super::client::Client;
use super::error::{QmpError, explain};
use super::sequence::{Placed, cannot_begin};

/// A property of virtio-blk that QEMU has since 9.0.
const SIGN: &str = "iothread-vq-mapping";

/// Refuses disks whose export could end the guest. Nothing has been done yet.
pub(super) fn refuse_where_exports_kill(
    client: &Client,
    vm: &VmRef,
    disks: &[Placed],
) -> Result<(), HypervisorError> {
    let failed = |error: QmpError| explain(cannot_begin(vm), &error);
    let threads = client.run("query-iothreads", json!({})).map_err(failed)?;
    if threads.as_array().is_some_and(Vec::is_empty) || is_safe(client) {
        return Ok(());
    }
    let Some(disk) = disks.iter().find(|disk| has_iothread(client, &disk.device)) else {
        return Ok(());
    };
    Err(HypervisorError::new(ErrorKind::Other, cannot_begin(vm))
        .because(format!(
            "disk `{}` is served by an iothread, and exporting it could end this QEMU",
            disk.target
        ))
        .hint("use QEMU 9.0 or newer, or run this VM's disks without an iothread"))
}

pub(super) fn is_safe(client: &Client) -> bool {
    let listed = client.run(
        "device-list-properties",
        json!({"typename": "virtio-blk-device"}),
    );
    let listed = listed.ok().and_then(|listed| match listed {
        Value::Array(listed) => Some(listed),
        _ => None,
    });
    listed.is_some_and(|listed| {
        let mut names = listed.iter().filter_map(|it| it.get("name"));
        names.any(|name| name.as_str() == Some(SIGN))
    })
}

/// Returns whether the device, or the controller it hangs on, has one.
fn has_iothread(client: &Client, device: &str) -> bool {
    let text = |path: &str, property: &str| {
        let asked = client.run("qom-get", json!({"path": path, "property": property}));
        match asked {
            Ok(Value::String(text)) if !text.is_empty() => Some(text),
            _ => None,
        }
    };
    let bus = text(device, "parent_bus");
    let places = [Some(device), bus.as_deref()].into_iter().flatten();
    places
        .flat_map(ancestors)
        .any(|path| text(path, "iothread").is_some())
}

/// Returns a QOM path and those of everything it is part of.
fn ancestors(path: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(path), |path| {
        let (parent, _) = path.rsplit_once('/')?;
        (!parent.is_empty()).then_some(parent)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_part_of_all_that_its_path_names() {
        let found: Vec<&str> = ancestors("/machine/peripheral/d0/virtio-backend").collect();
        assert_eq!(
            found,
            [
                "/machine/peripheral/d0/virtio-backend",
                "/machine/peripheral/d0",
                "/machine/peripheral",
                "/machine"
            ]
        );
    }
}
