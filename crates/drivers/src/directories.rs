//! The private directories of a session: made, checked, removed.
//!
//! QEMU creates the NBD socket, and libvirt the scratch files, as QEMU's user.
//! The socket has no password and the scratch files hold the guest's old data,
//! so both lie in directories that nobody but us and QEMU's group can enter.
//!
//! A directory that we made holds a file that names the session in its name,
//! and the VM and both directories inside. Only a directory with that file is
//! ever cleared, and only files that carry the session's name are removed from
//! it: a wrong path in an order, or a directory that somebody shares, costs
//! nobody a file.

use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};

use highwater_hypervisor::{BeginOrder, ErrorKind, HypervisorError, ProcessIdentity, VmRef};
use highwater_model::{SessionId, format_size};

use crate::host::{QemuProcess, User};
use crate::label::{Label, label_name};

/// `sun_path` of a unix socket has 108 bytes, one of them the final zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// `f_type` of file systems on another host (linux/magic.h, and the headers of
/// those that are not in it). A stalled server would stall the guest's writes.
const NETWORK_FILE_SYSTEMS: [(u32, &str); 10] = [
    (0x6969, "NFS"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB"),
    (0x517b, "SMB"),
    (0x6573_5546, "FUSE"),
    (0x00c3_6400, "Ceph"),
    (0x0102_1997, "9P"),
    (0x5346_414f, "AFS"),
    (0x6b41_4653, "AFS"),
    (0x0bd0_0bd0, "Lustre"),
];

/// What an order's paths are, and what lies in them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SessionPaths {
    session: SessionId,
    socket_dir: PathBuf,
    scratch_dir: PathBuf,
}

impl SessionPaths {
    pub(crate) fn of_order(order: &BeginOrder) -> Self {
        Self {
            session: order.session,
            socket_dir: order.socket_dir.clone(),
            scratch_dir: order.scratch_dir.clone(),
        }
    }

    /// For a session that only its job tells of.
    pub(crate) fn of_leftover(session: SessionId, socket_dir: &Path, scratch_dir: &Path) -> Self {
        Self {
            session,
            socket_dir: socket_dir.to_path_buf(),
            scratch_dir: scratch_dir.to_path_buf(),
        }
    }

    /// For a session of which the scratch directory is known; `None` if that is
    /// not one, or says that it belongs to another place.
    pub(crate) fn of_scratch_dir(session: SessionId, scratch_dir: &Path) -> Option<Self> {
        let label = Label::read(scratch_dir, session)?;
        (label.scratch_dir == scratch_dir)
            .then(|| Self::of_leftover(session, &label.socket_dir, scratch_dir))
    }

    pub(crate) const fn session(&self) -> SessionId {
        self.session
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.socket_dir.join(format!("hw-{}.sock", self.session))
    }

    pub(crate) fn scratch_dir(&self) -> &Path {
        &self.scratch_dir
    }

    pub(crate) fn scratch(&self, target: &str) -> PathBuf {
        self.scratch_dir
            .join(format!("hw-{}-{target}.scratch", self.session))
    }

    /// Where the key of encrypted scratch files is while they are made.
    pub(crate) fn key(&self) -> PathBuf {
        self.scratch_dir.join(format!("hw-{}.key", self.session))
    }

    /// Returns which process ran the VM when the session made its directories,
    /// if they are still there and say so.
    pub(crate) fn process(&self) -> Option<ProcessIdentity> {
        Label::read(&self.socket_dir, self.session)?.process
    }

    fn made_by_us(&self, dir: &Path) -> PathBuf {
        dir.join(label_name(self.session))
    }

    /// Present if the guest was already stopped by an I/O error when the session
    /// began: then ending the session must not let it run.
    fn was_stopped(&self) -> PathBuf {
        self.socket_dir
            .join(format!("hw-{}.was-stopped", self.session))
    }

    /// Present while the guest is frozen by the session: whoever ends a dead one
    /// has to thaw it, and must not thaw what somebody else froze.
    fn froze(&self) -> PathBuf {
        self.socket_dir.join(format!("hw-{}.froze", self.session))
    }

    /// Makes both directories for QEMU's user, or neither.
    pub(crate) fn create(
        &self,
        vm: &VmRef,
        qemu: Option<&QemuProcess>,
    ) -> Result<(), HypervisorError> {
        if self.socket().as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            return Err(
                trouble("cannot use socket directory", &self.socket_dir).because(format!(
                    "the socket's path would be longer than {SOCKET_PATH_BYTES_MAX} bytes"
                )),
            );
        }
        for dir in [&self.socket_dir, &self.scratch_dir] {
            // The path has to be written into XML.
            if !dir.is_absolute() || std::str::from_utf8(dir.as_os_str().as_bytes()).is_err() {
                return Err(trouble("cannot use directory", dir)
                    .because("its path is not absolute, or not UTF-8"));
            }
        }
        let made = self.create_both(vm, qemu);
        if made.is_err() {
            // Its warnings would only repeat the error.
            drop(self.remove());
        }
        made
    }

    fn create_both(&self, vm: &VmRef, qemu: Option<&QemuProcess>) -> Result<(), HypervisorError> {
        let process = qemu.map(|qemu| qemu.identity.clone());
        let label = Label::new(vm, &self.socket_dir, &self.scratch_dir, process).to_text();
        let qemu = qemu.map(|qemu| &qemu.user);
        self.create_one(&self.socket_dir, &label, qemu)?;
        if self.scratch_dir != self.socket_dir {
            self.create_one(&self.scratch_dir, &label, qemu)?;
        }
        refuse_network_file_system(&self.scratch_dir)
    }

    fn create_one(
        &self,
        dir: &Path,
        label: &str,
        qemu: Option<&User>,
    ) -> Result<(), HypervisorError> {
        let failed =
            |error: &io::Error| trouble("cannot create directory", dir).because(error.to_string());
        if let Some(parent) = dir.parent() {
            // QEMU has to pass through; nobody may list what is there.
            DirBuilder::new()
                .recursive(true)
                .mode(0o711)
                .create(parent)
                .map_err(|error| failed(&error))?;
        }
        DirBuilder::new()
            .mode(0o700)
            .create(dir)
            .map_err(|error| failed(&error))?;
        if let Err(error) = create_private(&self.made_by_us(dir), label) {
            // Not labelled yet, so nobody else would remove it.
            drop(fs::remove_file(self.made_by_us(dir)));
            drop(fs::remove_dir(dir));
            return Err(failed(&error));
        }
        let Some(qemu) = qemu else { return Ok(()) };
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(dir, None, Some(qemu.gid)).map_err(|error| failed(&error))?;
            fs::set_permissions(dir, Permissions::from_mode(0o770))
                .map_err(|error| failed(&error))?;
        }
        refuse_unless_reachable(dir, qemu)
    }

    /// Remembers that the guest was stopped before the session began.
    pub(crate) fn note_stopped_before(&self) -> Result<(), HypervisorError> {
        self.note(&self.was_stopped())
    }

    /// Remembers that the session is about to freeze the guest.
    pub(crate) fn note_freezing(&self) -> Result<(), HypervisorError> {
        self.note(&self.froze())
    }

    /// Forgets it: the guest is thawed.
    pub(crate) fn note_thawed(&self) {
        // A note that stays makes somebody ask the guest once more, and no harm.
        drop(fs::remove_file(self.froze()));
    }

    /// Returns whether the session froze the guest and nobody knows of a thaw.
    pub(crate) fn froze_guest(&self) -> bool {
        self.froze().exists()
    }

    fn note(&self, path: &Path) -> Result<(), HypervisorError> {
        create_private(path, "").map_err(|error| {
            trouble("cannot write into directory", &self.socket_dir).because(error.to_string())
        })
    }

    /// Returns whether the guest was stopped before the session began.
    pub(crate) fn was_stopped_before(&self) -> bool {
        self.was_stopped().exists()
    }

    /// Returns whether this session made its directories and they are still there.
    pub(crate) fn exist(&self) -> bool {
        self.made_by_us(&self.socket_dir).exists()
    }

    /// Gives the room of the scratch files back, and leaves everything else.
    pub(crate) fn free_scratch(&self) {
        if !self.made_by_us(&self.scratch_dir).exists() {
            return;
        }
        let own = format!("hw-{}-", self.session);
        for entry in fs::read_dir(&self.scratch_dir).into_iter().flatten() {
            let Ok(entry) = entry else { continue };
            if entry.file_name().to_string_lossy().starts_with(&own) {
                // What stays is seen, and said, when the directory is removed.
                drop(fs::remove_file(entry.path()));
            }
        }
    }

    /// Removes what the session left, and the directories. What cannot be
    /// removed is returned as warnings; what is not there is no error.
    ///
    /// A session that left the guest frozen keeps them: they say so.
    pub(crate) fn remove(&self) -> Vec<String> {
        if self.froze_guest() {
            return Vec::new();
        }
        // The inner one first, if one lies in the other.
        let mut dirs = [&self.scratch_dir, &self.socket_dir];
        dirs.sort_by_key(|dir| std::cmp::Reverse(dir.components().count()));
        let mut warnings = Vec::new();
        for dir in dirs {
            if let Err(error) = self.remove_one(dir) {
                warnings.push(format!(
                    "cannot remove directory `{}`: {error}",
                    dir.display()
                ));
            }
        }
        warnings
    }

    fn remove_one(&self, dir: &Path) -> io::Result<()> {
        let last = self.made_by_us(dir);
        // A link of that name is nobody's label.
        match fs::symlink_metadata(&last) {
            Ok(found) if found.is_file() => {}
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        }
        let (own, own_disk) = (
            format!("hw-{}.", self.session),
            format!("hw-{}-", self.session),
        );
        let mut strange = None;
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if path == last {
                continue;
            }
            if name.starts_with(&own) || name.starts_with(&own_disk) {
                // Removes a link, and not what it leads to.
                fs::remove_file(&path)?;
            } else {
                strange = Some(name);
            }
        }
        // With its label it stays known as ours, and is tried again.
        if let Some(name) = strange {
            return Err(io::Error::other(format!(
                "it holds `{name}`, which is not ours"
            )));
        }
        fs::remove_file(&last)?;
        fs::remove_dir(dir)
    }
}

/// Bytes that can still be written in `dir`.
pub(crate) fn free_bytes(dir: &Path) -> Result<u64, HypervisorError> {
    let found = rustix::fs::statvfs(dir)
        .map_err(|error| trouble("cannot look at directory", dir).because(error.to_string()))?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Refuses a scratch directory with less room than needed.
pub(crate) fn refuse_without_room(dir: &Path, needed_bytes: u64) -> Result<(), HypervisorError> {
    let free = free_bytes(dir)?;
    if free >= needed_bytes {
        return Ok(());
    }
    Err(trouble("cannot use scratch directory", dir)
        .because(format!(
            "it has {} free, and {} are needed",
            format_size(free),
            format_size(needed_bytes)
        ))
        .hint("free some space, or choose another one with `--scratch-dir`"))
}

/// Returns the kind of the file system that a file is on, if it is on another
/// host.
pub(crate) fn network_file_system(path: &Path) -> io::Result<Option<&'static str>> {
    let found = rustix::fs::statfs(path)?;
    // The field is signed on some machines; the numbers fit 32 bits on all.
    let magic = u32::try_from(i128::from(found.f_type) & 0xffff_ffff).unwrap_or_default();
    let mut known = NETWORK_FILE_SYSTEMS.iter();
    let known = known.find(|(number, _)| *number == magic);
    Ok(known.map(|(_, name)| *name))
}

fn refuse_network_file_system(dir: &Path) -> Result<(), HypervisorError> {
    let found = network_file_system(dir)
        .map_err(|error| trouble("cannot look at directory", dir).because(error.to_string()))?;
    match found {
        None => Ok(()),
        Some(name) => Err(trouble("cannot use scratch directory", dir)
            .because(format!(
                "it is on {name}, and a stalled server would stall the guest"
            ))
            .hint("choose one on a local disk with `--scratch-dir`")),
    }
}

/// Refuses a directory that QEMU's user cannot reach: QEMU would say so too,
/// but only after the guest was frozen, and not which directory it is.
fn refuse_unless_reachable(dir: &Path, qemu: &User) -> Result<(), HypervisorError> {
    if qemu.uid == 0 {
        return Ok(());
    }
    let looked = |path: &Path, error: &io::Error| {
        trouble("cannot look at directory", path).because(error.to_string())
    };
    let whole = fs::canonicalize(dir).map_err(|error| looked(dir, &error))?;
    for step in whole.ancestors() {
        let found = fs::metadata(step).map_err(|error| looked(step, &error))?;
        if !may_enter(found.mode(), found.uid(), found.gid(), qemu) {
            return Err(trouble("cannot use directory", dir)
                .because(format!(
                    "QEMU (user {}) may not enter `{}`",
                    qemu.uid,
                    step.display()
                ))
                .hint("choose another directory, or allow entering it with `chmod o+x`"));
        }
    }
    Ok(())
}

fn may_enter(mode: u32, uid: u32, gid: u32, user: &User) -> bool {
    let needed = if user.uid == uid {
        0o100
    } else if user.gid == gid || user.groups.contains(&gid) {
        0o010
    } else {
        0o001
    };
    mode & needed != 0
}

fn create_private(path: &Path, text: &str) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?
        .write_all(text.as_bytes())
}

fn trouble(what: &str, dir: &Path) -> HypervisorError {
    HypervisorError::new(ErrorKind::Scratch, format!("{what} `{}`", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm() -> VmRef {
        VmRef {
            name: "web01".to_owned(),
            uuid: None,
        }
    }

    fn paths(dir: &Path) -> SessionPaths {
        SessionPaths::of_leftover(
            SessionId::from_bytes([1; 8]),
            &dir.join("run/session"),
            &dir.join("run/session/scratch"),
        )
    }

    #[test]
    fn directories_are_private_and_vanish_with_everything_of_the_session() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(dir.path());
        paths.create(&vm(), None).unwrap();
        for made in ["run/session", "run/session/scratch"] {
            let mode = fs::metadata(dir.path().join(made)).unwrap().mode();
            assert_eq!(mode & 0o777, 0o700, "{made}");
        }
        create_private(&paths.scratch("vda"), "").unwrap();
        create_private(&paths.socket(), "").unwrap();
        paths.note_stopped_before().unwrap();
        assert!(paths.was_stopped_before());
        assert_eq!(paths.remove(), Vec::<String>::new());
        assert!(!dir.path().join("run/session").exists());
        assert_eq!(paths.remove(), Vec::<String>::new());
    }

    #[test]
    fn a_directory_that_we_did_not_make_is_neither_used_nor_cleared() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(dir.path());
        fs::create_dir_all(dir.path().join("run/session/scratch")).unwrap();
        let file = paths.scratch("vda");
        create_private(&file, "").unwrap();
        assert_eq!(
            paths.create(&vm(), None).unwrap_err().kind,
            ErrorKind::Scratch
        );
        assert_eq!(paths.remove(), Vec::<String>::new());
        assert!(file.exists());
    }

    #[test]
    fn a_strangers_file_keeps_the_directory_and_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(dir.path());
        paths.create(&vm(), None).unwrap();
        let strange = dir.path().join("run/session/scratch/other.scratch");
        create_private(&strange, "").unwrap();
        assert!(!paths.remove().is_empty());
        assert!(strange.exists());
    }

    #[test]
    fn a_parent_that_qemu_may_not_enter_is_found_before_the_guest_is_frozen() {
        let qemu = User {
            uid: 64055,
            gid: 106,
            groups: vec![993],
        };
        assert!(may_enter(0o711, 0, 0, &qemu));
        assert!(!may_enter(0o700, 0, 0, &qemu));
        assert!(may_enter(0o770, 0, 106, &qemu));
        assert!(may_enter(0o710, 0, 993, &qemu));
        // The owner's own bits count, even if others have more.
        assert!(!may_enter(0o077, 64055, 106, &qemu));
    }

    #[test]
    fn a_socket_path_that_the_kernel_cannot_take_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("x".repeat(100));
        let paths = SessionPaths::of_leftover(SessionId::from_bytes([1; 8]), &long, &long);
        assert_eq!(
            paths.create(&vm(), None).unwrap_err().kind,
            ErrorKind::Scratch
        );
        assert!(!long.exists());
    }
}
