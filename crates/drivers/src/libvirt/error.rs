//! libvirt's error numbers and texts as the kinds that callers branch on.

use highwater_hypervisor::{ErrorKind, HypervisorError};

use super::sys::{CallError, LoadError};

/// Numbers of `virErrorNumber` that mean something to us.
pub(crate) mod code {
    pub(crate) const INTERNAL: i32 = 1;
    pub(crate) const NO_SUPPORT: i32 = 3;
    pub(crate) const NO_CONNECT: i32 = 5;
    pub(crate) const INVALID_CONNECTION: i32 = 6;
    pub(crate) const RPC: i32 = 39;
    pub(crate) const NO_DOMAIN: i32 = 42;
    pub(crate) const AUTH_FAILED: i32 = 45;
    pub(crate) const OPERATION_INVALID: i32 = 55;
    pub(crate) const NO_SECRET: i32 = 66;
    pub(crate) const CONFIG_UNSUPPORTED: i32 = 67;
    pub(crate) const OPERATION_TIMEOUT: i32 = 68;
    pub(crate) const AUTH_CANCELLED: i32 = 79;
    pub(crate) const AGENT_UNRESPONSIVE: i32 = 86;
    pub(crate) const RESOURCE_BUSY: i32 = 87;
    pub(crate) const AUTH_UNAVAILABLE: i32 = 94;
    pub(crate) const NO_CHECKPOINT: i32 = 103;
    pub(crate) const NO_BACKUP: i32 = 104;
    pub(crate) const CHECKPOINT_INCONSISTENT: i32 = 109;
}

/// Classifies an error by its number; by its text only where libvirt has one
/// number (internal error, operation failed) for many things.
pub(crate) fn kind_of(error: &CallError) -> ErrorKind {
    match error.code {
        code::NO_CONNECT
        | code::INVALID_CONNECTION
        | code::RPC
        | code::AUTH_FAILED
        | code::AUTH_CANCELLED
        | code::AUTH_UNAVAILABLE => ErrorKind::Unreachable,
        code::NO_DOMAIN => ErrorKind::NoSuchVm,
        code::OPERATION_INVALID => ErrorKind::WrongState,
        code::OPERATION_TIMEOUT | code::RESOURCE_BUSY => ErrorKind::Busy,
        code::NO_CHECKPOINT => ErrorKind::UnknownMark,
        code::CHECKPOINT_INCONSISTENT => ErrorKind::BadMark,
        code::CONFIG_UNSUPPORTED if error.message.contains("no disk named") => {
            ErrorKind::NoSuchDisk
        }
        _ => kind_by_text(&error.message),
    }
}

/// Texts as of libvirt 11.3 and QEMU 10.0 (seen in experiments).
fn kind_by_text(text: &str) -> ErrorKind {
    const TEXTS: [(&str, ErrorKind); 15] = [
        // What libvirt's client says whose daemon has died: before a call, in
        // the midst of one, and when nobody has heard of it for a while.
        ("client socket is closed", ErrorKind::Unreachable),
        ("End of file while reading data", ErrorKind::Unreachable),
        ("Cannot recv data", ErrorKind::Unreachable),
        ("Cannot write data", ErrorKind::Unreachable),
        ("due to keepalive timeout", ErrorKind::Unreachable),
        ("already in active block job", ErrorKind::Busy),
        ("NBD server already running", ErrorKind::Busy),
        ("is inconsistent and cannot be used", ErrorKind::BadMark),
        ("currently in use by another operation", ErrorKind::Busy),
        ("No space left on device", ErrorKind::Scratch),
        ("Permission denied", ErrorKind::Scratch),
        ("Failed to bind socket", ErrorKind::Scratch),
        ("Failed to create file", ErrorKind::Scratch),
        ("unable to create scratch", ErrorKind::Scratch),
        ("failed to create image file", ErrorKind::Scratch),
    ];
    TEXTS
        .iter()
        .find(|(part, _)| text.contains(part))
        .map_or(ErrorKind::Other, |(_, kind)| *kind)
}

/// Says what could not be done, why, and, where we know it, the way out.
pub(crate) fn explain(message: impl Into<String>, error: &CallError) -> HypervisorError {
    let kind = kind_of(error);
    let explained = HypervisorError::new(kind, message).because(error.message.clone());
    match hint_for(kind, error) {
        Some(hint) => explained.hint(hint),
        None => explained,
    }
}

fn hint_for(kind: ErrorKind, error: &CallError) -> Option<&'static str> {
    let text = error.message.as_str();
    if kind == ErrorKind::Scratch && text.contains("Permission denied") {
        return Some(
            "QEMU may not use that directory: AppArmor or SELinux may forbid it (see the host's \
             audit log), or a parent directory may not be entered; choose another directory",
        );
    }
    if kind == ErrorKind::Scratch && text.contains("No such file or directory") {
        return Some(
            "libvirt does not see that directory: was it mounted after libvirtd was started, in \
             another mount namespace, or is libvirt on another host? choose another one with \
             `--scratch-dir`",
        );
    }
    if text.contains("NBD server already running") {
        return Some(
            "QEMU has one NBD server at a time, and another program has started it: wait until it is \
             done, or stop the server yourself (`virsh qemu-monitor-command VM --hmp nbd_server_stop`)",
        );
    }
    match error.code {
        code::OPERATION_TIMEOUT => Some(
            "another job runs on the VM (`virsh domjobinfo` names it); try again when it is done",
        ),
        code::AGENT_UNRESPONSIVE => {
            Some("is the guest agent (qemu-guest-agent) installed and running in the guest?")
        }
        _ => None,
    }
}

/// Explains why a daemon cannot be reached.
pub(crate) fn explain_connection(uri: &str, error: &CallError) -> HypervisorError {
    let refused = error.message.contains("Permission denied")
        || matches!(
            error.code,
            code::AUTH_FAILED | code::AUTH_CANCELLED | code::AUTH_UNAVAILABLE
        );
    HypervisorError::new(
        ErrorKind::Unreachable,
        format!("cannot connect to libvirt at `{uri}`"),
    )
    .because(error.message.clone())
    .hint(if refused {
        "run as root or as a member of the group `libvirt`"
    } else {
        "is libvirtd (or virtqemud) running?"
    })
}

/// Explains why libvirt itself cannot be used.
pub(crate) fn explain_load(error: &LoadError) -> HypervisorError {
    let explained = HypervisorError::new(ErrorKind::Unreachable, "cannot use libvirt")
        .because(error.to_string());
    match error {
        LoadError::Missing { .. } => explained.hint(
            "install libvirt's client library (package `libvirt0` or `libvirt-libs`), or choose a \
             connection that needs none",
        ),
        LoadError::TooOld { .. } => explained.hint("libvirt 7.6 or newer is needed"),
        LoadError::Initialise(_) => explained,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(code: i32, message: &str, kind: ErrorKind) {
        assert_eq!(
            kind_of(&CallError {
                code,
                message: message.to_owned()
            }),
            kind,
            "{message}"
        );
    }

    #[test]
    fn every_known_error_has_the_kind_that_callers_branch_on() {
        check(
            109,
            "checkpoint inconsistent: missing or broken bitmap 'X' for disk 'vda'",
            ErrorKind::BadMark,
        );
        check(
            103,
            "Checkpoint 'X' for incremental backup of disk 'vda' not found",
            ErrorKind::UnknownMark,
        );
        check(
            68,
            "cannot acquire state change lock (held by monitor=remoteDispatchDomainBackupBegin)",
            ErrorKind::Busy,
        );
        check(67, "no disk named 'vdq'", ErrorKind::NoSuchDisk);
        check(
            42,
            "Domain not found: no domain with matching name 'x'",
            ErrorKind::NoSuchVm,
        );
        check(55, "no job is active on the domain", ErrorKind::WrongState);
        check(
            1,
            "internal error: unable to execute QEMU command 'nbd-server-start': Failed to bind \
             socket to /var/tmp/x: Permission denied",
            ErrorKind::Scratch,
        );
        check(
            55,
            "disk 'vda' already in active block job",
            ErrorKind::WrongState,
        );
        check(1, "disk 'vda' already in active block job", ErrorKind::Busy);
        check(1, "anything else", ErrorKind::Other);
        for (number, text) in [
            (1, "internal error: client socket is closed"),
            (38, "End of file while reading data: Input/output error"),
            (38, "Cannot recv data: Connection reset by peer"),
            (38, "Cannot write data: Broken pipe"),
            (
                1,
                "internal error: connection closed due to keepalive timeout",
            ),
        ] {
            check(number, text, ErrorKind::Unreachable);
        }
    }

    #[test]
    fn a_socket_that_qemu_may_not_bind_hints_at_the_security_modules() {
        let error = CallError {
            code: 1,
            message: "Failed to bind socket: Permission denied".into(),
        };
        assert!(
            explain("cannot begin", &error)
                .hint
                .is_some_and(|hint| hint.contains("AppArmor"))
        );
    }
}
