//! What a person does at the hypervisor, in the words of whatever runs the VMs.

use std::sync::OnceLock;

static HYPERVISOR: OnceLock<Hypervisor> = OnceLock::new();

/// What runs the VMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hypervisor {
    Libvirt,
    /// One QEMU, over its monitor.
    Qemu,
    /// Nothing: there are images.
    Images,
}

impl Hypervisor {
    fn of(uri: &str) -> Self {
        match uri.split_once(':') {
            Some(("qmp", _)) => Self::Qemu,
            Some(("image", _)) => Self::Images,
            _ => Self::Libvirt,
        }
    }

    fn current() -> Self {
        HYPERVISOR.get().copied().unwrap_or(Self::Libvirt)
    }
}

/// Remembers which connection is used, for what is told later.
pub(crate) fn connected_to(uri: &str) {
    // One per process; the first one stays.
    let _ = HYPERVISOR.set(Hypervisor::of(uri));
}

/// Whether nothing runs the VM as far as this connection goes.
pub(crate) fn are_images() -> bool {
    Hypervisor::current() == Hypervisor::Images
}

/// How to see what the VMs are called.
pub(crate) fn see_names() -> String {
    match Hypervisor::current() {
        Hypervisor::Libvirt => {
            "see `virsh list --all` for its name, or choose another connection with -c".to_owned()
        }
        Hypervisor::Qemu => "QEMU tells its own name and UUID; give a VM without one a name with \
                             --name"
            .to_owned(),
        Hypervisor::Images => {
            "images have no name but the one that --name gives them, or that of the first file"
                .to_owned()
        }
    }
}

/// How to see all VMs there are; `None` where there is but one.
pub(crate) fn see_all() -> Option<&'static str> {
    (Hypervisor::current() == Hypervisor::Libvirt).then_some("`virsh list --all` shows all VMs")
}

/// How to see which disks a VM has.
pub(crate) fn see_disks(vm: &str) -> String {
    match Hypervisor::current() {
        Hypervisor::Libvirt => format!("`virsh domblklist {vm}`"),
        Hypervisor::Qemu => qmp(vm, r#"{"execute":"query-block"}"#),
        Hypervisor::Images => "the images behind -c".to_owned(),
    }
}

/// How to end a backup job whose program is gone.
pub(crate) fn end_job(vm: &str) -> String {
    match Hypervisor::current() {
        Hypervisor::Libvirt => format!("`virsh domjobabort {vm}`"),
        Hypervisor::Qemu | Hypervisor::Images => qmp(
            vm,
            r#"{"execute":"job-cancel","arguments":{"id":"THE-JOB"}}"#,
        ),
    }
}

/// How to start a VM that is off.
pub(crate) fn start(vm: &str) -> String {
    match Hypervisor::current() {
        Hypervisor::Libvirt => format!("start it (`virsh start {vm}`)"),
        Hypervisor::Qemu | Hypervisor::Images => "start it".to_owned(),
    }
}

/// How to let a VM run that stands still.
pub(crate) fn resume(vm: &str) -> String {
    match Hypervisor::current() {
        Hypervisor::Libvirt => format!("`virsh resume {vm}`"),
        Hypervisor::Qemu | Hypervisor::Images => qmp(vm, r#"{"execute":"cont"}"#),
    }
}

/// How to have it stand still.
pub(crate) fn suspend(vm: &str) -> String {
    match Hypervisor::current() {
        Hypervisor::Libvirt => format!("`virsh suspend {vm}`"),
        Hypervisor::Qemu | Hypervisor::Images => qmp(vm, r#"{"execute":"stop"}"#),
    }
}

/// How to see which disk a write failed on.
pub(crate) fn see_disk_errors(vm: &str) -> String {
    match Hypervisor::current() {
        Hypervisor::Libvirt => format!("`virsh domblkerror {vm}`"),
        Hypervisor::Qemu | Hypervisor::Images => qmp(vm, r#"{"execute":"query-block"}"#),
    }
}

/// A command to QEMU's monitor.
pub(crate) fn qmp(vm: &str, command: &str) -> String {
    match Hypervisor::current() {
        Hypervisor::Libvirt => format!("virsh qemu-monitor-command {vm} '{command}'"),
        Hypervisor::Qemu | Hypervisor::Images => {
            format!("tell its monitor, after qmp_capabilities: {command}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Hypervisor;

    #[test]
    fn what_is_no_uri_of_ours_is_libvirts() {
        for (uri, expected) in [
            ("qmp:/run/a.sock", Hypervisor::Qemu),
            ("image:/a.qcow2", Hypervisor::Images),
            ("qemu:///system", Hypervisor::Libvirt),
            ("qemu+unix:///system?socket=/qmp:", Hypervisor::Libvirt),
            ("", Hypervisor::Libvirt),
        ] {
            assert_eq!(Hypervisor::of(uri), expected, "{uri}");
        }
    }
}
