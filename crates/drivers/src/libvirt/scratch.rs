//! Decides what scratch files a session needs, and makes those that are ours.
//!
//! libvirt makes them, inside the start call, where it can: plain files that
//! grow. It cannot reserve their space, and one that is encrypted it makes so
//! slowly that the guest stands still meanwhile; where a disk needs either, all
//! files of the session are made here, before anything is frozen.

use std::path::PathBuf;

use highwater_hypervisor::{HypervisorError, ScratchReserve, WriteErrorPolicy};
use highwater_model::SessionId;
use highwater_model::step::{Step, pass};

use super::backup_xml::scratch_secret;
use super::begin::Ordered;
use super::error::{code, explain};
use super::sys::CallError;
use super::sys::handles::DomainHandle;
use crate::directories::{SessionPaths, refuse_without_room};
use crate::host::User;
use crate::scratch_image::{self, Space, image_bytes};

/// The scratch files of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Scratch {
    /// They were made here; libvirt is to use them as they are.
    pub(super) is_ours: bool,
    /// UUID of the secret that opens encrypted ones.
    pub(super) secret: Option<String>,
    /// Where to keep an eye on the room that is left, and how much must be;
    /// `None` if all of it is reserved.
    pub(super) reserve: Option<ScratchReserve>,
}

/// Makes sure that there is room, and makes the files that libvirt cannot make.
pub(super) fn prepare(
    session: SessionId,
    domain: &DomainHandle,
    ordered: &[Ordered<'_>],
    paths: &SessionPaths,
    qemu: Option<&User>,
) -> Result<Scratch, HypervisorError> {
    let loses_writes = |one: &Ordered<'_>| one.disk.write_errors != WriteErrorPolicy::Pause;
    let space = if ordered.iter().any(loses_writes) {
        Space::Reserved
    } else {
        Space::AsNeeded
    };
    let dir = paths.scratch_dir();
    let needed = room_needed(ordered, space);
    refuse_without_room(dir, needed)?;
    let encrypted = ordered.iter().any(|one| one.disk.encrypted);
    let reserve = (space == Space::AsNeeded).then(|| ScratchReserve {
        dir: dir.to_path_buf(),
        bytes: scratch_image::reserve_bytes(needed),
    });
    if space == Space::AsNeeded && !encrypted {
        return Ok(Scratch {
            is_ours: false,
            secret: None,
            reserve,
        });
    }
    // One flag of the start call covers all disks, so all files are ours.
    let secret = if encrypted {
        Some(Secret::define(session, domain, paths)?)
    } else {
        None
    };
    for one in ordered {
        let key = secret
            .as_ref()
            .filter(|_| one.disk.encrypted)
            .map(|secret| secret.key.as_path());
        scratch_image::create(&one.scratch, image_bytes(one.size_bytes), space, key, qemu)?;
    }
    let secret = secret.map(Secret::remove_key).transpose()?;
    Ok(Scratch {
        is_ours: true,
        secret,
        reserve,
    })
}

fn room_needed(ordered: &[Ordered<'_>], space: Space) -> u64 {
    let sum = |bytes: fn(&Ordered<'_>) -> u64| {
        ordered
            .iter()
            .fold(0_u64, |sum, one| sum.saturating_add(bytes(one)))
    };
    match space {
        Space::Reserved => sum(|one| scratch_image::reserved_bytes(image_bytes(one.size_bytes))),
        Space::AsNeeded => scratch_image::room_bytes(sum(|one| one.size_bytes)),
    }
}

/// A key for this session alone, known to libvirt's memory and, while the files
/// are made, to a private file.
struct Secret {
    uuid: String,
    key: PathBuf,
}

impl Secret {
    fn define(
        session: SessionId,
        domain: &DomainHandle,
        paths: &SessionPaths,
    ) -> Result<Self, HypervisorError> {
        let uuid = secret_uuid(session);
        let value = scratch_image::new_key();
        domain
            .connection()
            .define_secret(&scratch_secret(session, &uuid), value.as_bytes())
            .map_err(|error| explain("cannot give libvirt a key for scratch files", &error))?;
        pass(Step::SecretDefined);
        let key = paths.key();
        scratch_image::write_key(&key, &value)?;
        Ok(Self { uuid, key })
    }

    fn remove_key(self) -> Result<String, HypervisorError> {
        scratch_image::remove_key(&self.key)?;
        Ok(self.uuid)
    }
}

/// Has libvirt forget the session's key, if it had one. Returns a warning.
pub(super) fn forget_secret(session: SessionId, domain: &DomainHandle) -> Option<String> {
    match domain.connection().forget_secret(&secret_uuid(session)) {
        Ok(())
        | Err(CallError {
            code: code::NO_SECRET | code::NO_SUPPORT,
            ..
        }) => None,
        Err(error) => Some(format!("cannot remove the key of scratch files: {error}")),
    }
}

/// Follows from the session, so that whoever ends it finds the secret.
fn secret_uuid(session: SessionId) -> String {
    let digits = session.to_string();
    let (high, low) = digits.split_at_checked(4).unwrap_or((&digits, ""));
    // The first half is "hw-sessi".
    format!("68772d73-6573-7369-{high}-{low}")
}
