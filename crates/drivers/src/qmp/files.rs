//! The files that a QEMU has open, seen from here.
//!
//! Their names are QEMU's: relative to the working directory that it had when it
//! opened them (one that became a daemon has another now), and valid in its
//! mount namespace, where the same path may be another file than here. What is
//! said of a file is said of the one that QEMU holds open, or of none.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use crate::host::{self, FileIdentity, QemuProcess};

/// How QEMU's file names are understood.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Files {
    working_dir: Option<PathBuf>,
    root: Option<PathBuf>,
    /// Device and inode numbers of what it has open, if that may be seen.
    held: Option<BTreeSet<(u64, u64)>>,
    /// What these are called now.
    names: BTreeSet<PathBuf>,
}

/// Where the bytes of a node are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Location {
    File(PathBuf),
    Block(PathBuf),
    /// Anything else, as QEMU spells it.
    Other(String),
}

impl Files {
    /// Looks at the files of a process.
    pub(super) fn of(process: Option<&QemuProcess>) -> Self {
        let Some(process) = process else {
            return Self::default();
        };
        let base = PathBuf::from(format!("/proc/{}", process.identity.pid));
        let open: Option<Vec<PathBuf>> = fs::read_dir(base.join("fd"))
            .ok()
            .map(|entries| entries.flatten().map(|entry| entry.path()).collect());
        let held = open.as_ref().map(|open| {
            let about = open.iter().filter_map(|entry| fs::metadata(entry).ok());
            about.map(|about| (about.dev(), about.ino())).collect()
        });
        let names = open.iter().flatten();
        Self {
            working_dir: fs::read_link(base.join("cwd")).ok(),
            root: Some(base.join("root")),
            held,
            names: names.filter_map(|open| fs::read_link(open).ok()).collect(),
        }
    }

    /// Understands the file name of a node with this driver.
    pub(super) fn location(&self, driver: &str, file: &str) -> Location {
        let is_block = matches!(driver, "host_device" | "host_cdrom");
        if driver != "file" && !is_block {
            return Location::Other(file.to_owned());
        }
        let Some(path) = plain_name(file).map(|name| self.absolute(&name)) else {
            return Location::Other(file.to_owned());
        };
        if is_block {
            Location::Block(path)
        } else {
            Location::File(path)
        }
    }

    /// Makes a path of QEMU's absolute: the file of that name that it holds open,
    /// if there is one and no other, else what its working directory makes of it.
    pub(super) fn absolute(&self, path: &str) -> PathBuf {
        let path: PathBuf = Path::new(path)
            .components()
            .filter(|part| *part != Component::CurDir)
            .collect();
        if !path.is_relative() {
            return path;
        }
        let here = self.working_dir.as_ref().map(|dir| dir.join(&path));
        let real = here
            .as_ref()
            .map(|here| here.canonicalize().unwrap_or_else(|_| here.clone()));
        if let Some(real) = real.filter(|real| self.names.contains(real)) {
            return real;
        }
        let mut named = self.names.iter().filter(|name| name.ends_with(&path));
        match (named.next(), named.next()) {
            (Some(only), None) => only.clone(),
            _ => here.unwrap_or(path),
        }
    }

    /// Returns whether this path leads to a file that QEMU has open, seen from
    /// here and not from where QEMU is.
    pub(super) fn is_held_here(&self, path: &Path) -> bool {
        let held = |identity: FileIdentity| {
            let held = self.held.as_ref();
            held.is_none_or(|held| held.contains(&identity.inode))
        };
        path.is_absolute() && host::file_identity(path).is_some_and(held)
    }

    /// Looks at a file that QEMU has open; `None` if it cannot be seen.
    pub(super) fn identity(&self, path: &Path) -> Option<FileIdentity> {
        if path.is_relative() {
            return None;
        }
        let inside = self.root.as_ref().zip(path.strip_prefix("/").ok());
        let inside = inside.map(|(root, path)| root.join(path));
        [Some(path.to_path_buf()), inside]
            .into_iter()
            .flatten()
            .find(|path| self.is_held_here(path))
            .and_then(|path| host::file_identity(&path))
    }
}

/// Returns the plain name of a file that QEMU may spell with its options.
fn plain_name(file: &str) -> Option<String> {
    let Some(json) = file.strip_prefix("json:") else {
        let name = file.strip_prefix("file:").unwrap_or(file);
        return (!name.is_empty()).then(|| name.to_owned());
    };
    let options: Value = serde_json::from_str(json).ok()?;
    let name = options.get("filename")?.as_str()?;
    Some(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_are_understood_however_qemu_spells_them() {
        let files = Files {
            working_dir: Some("/vm".into()),
            ..Files::default()
        };
        let file = |text: &str| Location::File(text.into());
        for (driver, spelt, location) in [
            ("file", "a.qcow2", file("/vm/a.qcow2")),
            ("file", "./a.qcow2", file("/vm/a.qcow2")),
            ("file", "/i/a.qcow2", file("/i/a.qcow2")),
            (
                "file",
                r#"json:{"driver":"file","filename":"/i/a","locking":"off"}"#,
                file("/i/a"),
            ),
            (
                "host_device",
                "/dev/vg/a",
                Location::Block("/dev/vg/a".into()),
            ),
            ("rbd", "rbd:p/i", Location::Other("rbd:p/i".to_owned())),
            ("file", "json:{", Location::Other("json:{".to_owned())),
        ] {
            assert_eq!(files.location(driver, spelt), location, "{spelt}");
        }
    }

    #[test]
    fn a_relative_name_is_that_of_a_file_which_qemu_holds() {
        let of = |cwd: &str, names: &[&str], name: &str| {
            let files = Files {
                working_dir: Some(cwd.into()),
                names: names.iter().map(PathBuf::from).collect(),
                ..Files::default()
            };
            files.absolute(name).display().to_string()
        };
        // A daemon's directory is `/`.
        assert_eq!(of("/", &["/vm/a", "/vm/b"], "a"), "/vm/a");
        assert_eq!(of("/", &["/vm/x/a"], "./x/a"), "/vm/x/a");
        assert_eq!(of("/vm", &["/vm/a", "/other/a"], "a"), "/vm/a");
        // Two of that name: nobody knows which.
        assert_eq!(of("/", &["/vm/a", "/other/a"], "a"), "/a");
        assert_eq!(of("/vm", &[], "a"), "/vm/a");
        assert_eq!(of("/vm", &["/other/a"], "/vm/a"), "/vm/a");
    }

    #[test]
    fn a_file_that_qemu_does_not_hold_is_not_the_one_that_is_meant() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let _file = fs::File::create(&path).unwrap();
        let own = Files::default().identity(&path).unwrap();
        let files = |held: BTreeSet<(u64, u64)>| Files {
            held: Some(held),
            ..Files::default()
        };
        assert!(files([own.inode].into()).identity(&path).is_some());
        assert!(files(BTreeSet::new()).identity(&path).is_none());
    }
}
