//! What tells a session's private directories from everything else, and finds
//! those of dead sessions when nothing else tells of them: QEMU was killed too,
//! and with it the job.
//!
//! They are looked for, so everything found is doubted. A directory counts only
//! if its name is a session, if it and the label inside are ours and no links,
//! and if the label names this very VM. What QEMU's user could put there (it may
//! write into these directories) is none of that.
//!
//! What a session did to its guest ended with the QEMU that it did it to. A
//! label names that process: a guest of another one was frozen or stopped by
//! somebody else.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use highwater_hypervisor::{ProcessIdentity, VmRef};
use highwater_model::SessionId;
use serde::{Deserialize, Serialize};

use crate::host;

/// A label holds three names and a process; paths have 4096 bytes at most.
const LABEL_BYTES_MAX: u64 = 64 << 10;

/// What the label of a session's directory says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Label {
    vm: String,
    pub(crate) socket_dir: PathBuf,
    pub(crate) scratch_dir: PathBuf,
    /// The QEMU that ran the VM, if it could be found.
    #[serde(default)]
    pub(crate) process: Option<ProcessIdentity>,
}

impl Label {
    pub(crate) fn new(
        vm: &VmRef,
        socket_dir: &Path,
        scratch_dir: &Path,
        process: Option<ProcessIdentity>,
    ) -> Self {
        Self {
            vm: key(vm),
            socket_dir: socket_dir.to_path_buf(),
            scratch_dir: scratch_dir.to_path_buf(),
            process,
        }
    }

    pub(crate) fn to_text(&self) -> String {
        // Fails only for paths that are not UTF-8, which are refused before.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Reads the label of a session's directory; `None` if it has none that
    /// counts, and if the directory itself is not ours.
    pub(crate) fn read(dir: &Path, session: SessionId) -> Option<Self> {
        let ours = rustix::process::geteuid().as_raw();
        let found = fs::symlink_metadata(dir).ok()?;
        if !found.is_dir() || found.uid() != ours {
            return None;
        }
        // Neither followed nor waited for: a FIFO would keep us.
        let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(i32::try_from(flags.bits()).ok()?)
            .open(dir.join(label_name(session)))
            .ok()?;
        let found = file.metadata().ok()?;
        if !found.is_file() || found.uid() != ours || found.nlink() != 1 {
            return None;
        }
        let mut text = String::new();
        file.take(LABEL_BYTES_MAX).read_to_string(&mut text).ok()?;
        serde_json::from_str(&text).ok()
    }
}

/// Names a VM as its lock does: by UUID where it has one.
fn key(vm: &VmRef) -> String {
    match &vm.uuid {
        Some(uuid) => format!("uuid:{uuid}"),
        None => format!("name:{}", vm.name),
    }
}

/// Returns the name of the file that makes a directory a session's.
pub(crate) fn label_name(session: SessionId) -> String {
    format!("hw-{session}.session")
}

/// What one session left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Left {
    pub(crate) label: Label,
    pub(crate) dirs: BTreeSet<PathBuf>,
}

impl Left {
    /// Returns a warning if the session's QEMU still runs, and is not the one that
    /// runs the VM now: two VMs may have one name, and one VM two doors. Then it
    /// is no dead session of this VM, as far as anybody here can tell.
    pub(crate) fn is_anothers(
        &self,
        session: SessionId,
        now: Option<&ProcessIdentity>,
    ) -> Option<String> {
        let then = self.label.process.as_ref()?;
        if Some(then) == now || !host::is_alive(then) {
            return None;
        }
        Some(format!(
            "session {session} was begun with another QEMU (process {}), which still runs: its \
             directories stay (do two VMs have one name? give them UUIDs)",
            then.pid
        ))
    }
}

/// Finds what sessions of the VM left. A place that cannot be read holds
/// nothing that could be removed.
pub(crate) fn find(vm: &VmRef, places: &[PathBuf]) -> BTreeMap<SessionId, Left> {
    let mut found: BTreeMap<SessionId, Left> = BTreeMap::new();
    let mut places: Vec<&PathBuf> = places.iter().collect();
    places.sort();
    places.dedup();
    for entry in places
        .into_iter()
        .filter_map(|place| fs::read_dir(place).ok())
        .flatten()
        .flatten()
    {
        let session = entry.file_name().to_str().and_then(|it| it.parse().ok());
        let Some(session) = session else { continue };
        let Some(label) = label_of(&entry.path(), session, vm) else {
            continue;
        };
        let twins = [label.socket_dir.clone(), label.scratch_dir.clone()];
        let is_of_it = |dir: &PathBuf| label_of(dir, session, vm).as_ref() == Some(&label);
        let dirs: BTreeSet<PathBuf> = twins.into_iter().filter(is_of_it).collect();
        // A copy, or one that was moved: its label speaks of other places, and
        // nothing is known about this one.
        if !dirs.contains(&entry.path()) {
            continue;
        }
        found.entry(session).or_insert(Left { label, dirs });
    }
    found
}

/// Returns the label of a session's directory if it is one of this VM.
fn label_of(dir: &Path, session: SessionId, vm: &VmRef) -> Option<Label> {
    let is_named_so = dir
        .file_name()
        .is_some_and(|name| name.to_str() == Some(session.to_string().as_str()));
    let label = Label::read(dir, session).filter(|label| label.vm == key(vm));
    label.filter(|_| is_named_so)
}

/// Returns what the files of a directory occupy, for people.
pub(crate) fn occupied_bytes(dir: &Path) -> u64 {
    let sizes = |dir: &Path| -> io::Result<u64> {
        let mut sum = 0_u64;
        for entry in fs::read_dir(dir)? {
            let about = fs::symlink_metadata(entry?.path())?;
            sum = sum.saturating_add(about.blocks().saturating_mul(512));
        }
        Ok(sum)
    };
    sizes(dir).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::directories::SessionPaths;

    fn vm(name: &str) -> VmRef {
        VmRef {
            name: name.to_owned(),
            uuid: None,
        }
    }

    fn put(path: &Path, bytes: &[u8]) {
        let mut file = fs::File::create(path).unwrap();
        file.write_all(bytes).unwrap();
    }

    fn session(n: u8) -> SessionId {
        SessionId::from_bytes([n; 8])
    }

    /// Makes a session's directories as a backup does.
    fn left(base: &Path, owner: &str, n: u8) -> SessionPaths {
        let id = session(n).to_string();
        let paths = SessionPaths::of_leftover(
            session(n),
            &base.join("run").join(&id),
            &base.join("scratch").join(&id),
        );
        paths.create(&vm(owner), None).unwrap();
        paths
    }

    fn places(base: &Path) -> [PathBuf; 2] {
        [base.join("run"), base.join("scratch")]
    }

    fn found(base: &Path, owner: &str) -> Vec<SessionId> {
        find(&vm(owner), &places(base)).into_keys().collect()
    }

    #[test]
    fn directories_of_another_vm_are_never_found() {
        let base = tempfile::tempdir().unwrap();
        left(base.path(), "web01", 1);
        left(base.path(), "web02", 2);
        assert_eq!(found(base.path(), "web01"), [session(1)]);
        assert_eq!(found(base.path(), "web02"), [session(2)]);
        assert_eq!(found(base.path(), "web0"), []);
    }

    #[test]
    fn a_session_whose_own_qemu_lives_is_no_dead_one_of_another() {
        let base = tempfile::tempdir().unwrap();
        let living = host::process(std::process::id()).unwrap();
        let mut dead = living.clone();
        dead.identity.start_ticks -= 1;
        for (n, qemu) in [(1, Some(&living)), (2, Some(&dead)), (3, None)] {
            let id = session(n).to_string();
            let (run, scratch) = (base.path().join("run"), base.path().join("scratch"));
            let paths = SessionPaths::of_leftover(session(n), &run.join(&id), &scratch.join(&id));
            paths.create(&vm("web01"), qemu).unwrap();
        }
        let found = find(&vm("web01"), &places(base.path()));
        let is_anothers = |n: u8, now: Option<&ProcessIdentity>| {
            found[&session(n)].is_anothers(session(n), now).is_some()
        };
        assert!(is_anothers(1, None));
        assert!(is_anothers(1, Some(&dead.identity)));
        assert!(!is_anothers(1, Some(&living.identity)));
        assert!(!is_anothers(2, Some(&living.identity)));
        assert!(!is_anothers(3, Some(&living.identity)));
    }

    #[test]
    fn one_directory_leads_to_the_other_wherever_it_is() {
        let base = tempfile::tempdir().unwrap();
        let paths = left(base.path(), "web01", 1);
        let only_run = [base.path().join("run")];
        let found = find(&vm("web01"), &only_run);
        assert_eq!(found[&session(1)].dirs.len(), 2);
        // A reboot takes one of them away.
        fs::remove_dir_all(base.path().join("run")).unwrap();
        let found = find(&vm("web01"), &places(base.path()));
        assert_eq!(found[&session(1)].dirs.len(), 1);
        assert_eq!(paths.remove(), Vec::<String>::new());
        assert!(find(&vm("web01"), &places(base.path())).is_empty());
    }

    #[test]
    fn links_labels_of_others_and_things_without_a_label_are_nobodys() {
        let base = tempfile::tempdir().unwrap();
        let run = base.path().join("run");
        let label = label_name(session(1));
        left(base.path(), "web01", 1);
        let real = run.join(session(1).to_string());
        let good = fs::read(real.join(&label)).unwrap();
        // A link to a directory of ours, under the name of another session.
        symlink(&real, run.join(session(2).to_string())).unwrap();
        // A directory without, with a linked, with a foreign and with a copied label.
        for (n, kind) in [
            (3, "none"),
            (4, "link"),
            (5, "garbage"),
            (6, "copy"),
            (7, "dir"),
        ] {
            let dir = run.join(session(n).to_string());
            let own = dir.join(label_name(session(n)));
            fs::create_dir(&dir).unwrap();
            match kind {
                "link" => symlink(real.join(&label), own).unwrap(),
                "garbage" => put(&own, b"{\"vm\":"),
                "copy" => put(&own, &good),
                "dir" => fs::create_dir(own).unwrap(),
                _ => {}
            }
        }
        assert_eq!(found(base.path(), "web01"), [session(1)]);
    }

    #[test]
    fn what_lies_in_a_left_directory_is_removed_and_never_followed() {
        let base = tempfile::tempdir().unwrap();
        let precious = base.path().join("precious");
        fs::create_dir(&precious).unwrap();
        put(&precious.join("file"), b"kept");
        let paths = left(base.path(), "web01", 1);
        let dir = base.path().join("scratch").join(session(1).to_string());
        for (name, to) in [("vda.scratch", "file"), ("vdb.scratch", "")] {
            let link = dir.join(format!("hw-{}-{name}", session(1)));
            symlink(precious.join(to), link).unwrap();
        }
        assert_eq!(paths.remove(), Vec::<String>::new());
        assert!(!dir.exists());
        assert_eq!(fs::read_to_string(precious.join("file")).unwrap(), "kept");
    }

    #[test]
    fn a_directory_with_a_strangers_file_stays_known_as_ours() {
        let base = tempfile::tempdir().unwrap();
        let paths = left(base.path(), "web01", 1);
        let dir = base.path().join("scratch").join(session(1).to_string());
        put(&dir.join("strange"), b"");
        assert_eq!(paths.remove().len(), 1);
        assert_eq!(found(base.path(), "web01"), [session(1)]);
        fs::remove_file(dir.join("strange")).unwrap();
        assert!(paths.remove().is_empty());
        assert_eq!(found(base.path(), "web01"), []);
    }
}
