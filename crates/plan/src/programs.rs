//! Whose names are these? A guess for people; nothing is decided by it.

/// Names the program that gives such names to checkpoints, bitmaps, nodes and
/// files, if one is known for it.
pub fn known_program(name: &str) -> Option<&'static str> {
    let starts = |prefix: &str| name.starts_with(prefix);
    if starts("virtnbdbackup") {
        return Some("virtnbdbackup");
    }
    if starts("qmpbackup") {
        return Some("qmpbackup");
    }
    if starts("pbs-") || starts("drive-backup") {
        return Some("Proxmox Backup");
    }
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|it| it.is_ascii_digit());
    if name.strip_prefix("backup-").is_some_and(is_number) {
        return Some("CloudStack");
    }
    is_uuid(name).then_some("oVirt, or another manager that names them by UUID")
}

fn is_uuid(name: &str) -> bool {
    let parts: Vec<&str> = name.split('-').collect();
    let hex = |part: &&str| part.bytes().all(|it| it.is_ascii_hexdigit());
    parts.iter().map(|part| part.len()).eq([8, 4, 4, 4, 12]) && parts.iter().all(hex)
}

#[cfg(test)]
mod tests {
    use super::known_program;

    #[test]
    fn names_that_programs_are_known_for_are_recognised() {
        for (name, expected) in [
            ("virtnbdbackup.3", Some("virtnbdbackup")),
            ("qmpbackup-ide0-hd0-3c3a6f2e", Some("qmpbackup")),
            ("pbs-incremental-dirty-bitmap", Some("Proxmox Backup")),
            ("backup-1763712000", Some("CloudStack")),
            ("backup-of-mine", None),
            ("backup-", None),
            (
                "6ba7b810-9dad-11d1-80b4-00c04fd430c8",
                Some("oVirt, or another manager that names them by UUID"),
            ),
            ("6ba7b810-9dad-11d1-80b4", None),
            ("nightly", None),
        ] {
            assert_eq!(known_program(name), expected, "{name}");
        }
    }
}
