//! What sessions of a VM that was off left behind: directories, and perhaps an
//! exporter that the kernel did not end.

use std::fs;
use std::path::PathBuf;

use highwater_hypervisor::{LeftDirectory, Swept, VmRef};

use super::facts::OffDisk;
use super::session::OfflineSessions;
use super::witness::Witness;
use crate::directories::SessionPaths;
use crate::label::{find, occupied_bytes};

/// Whether another process keeps an image: it reads or marks it, and its
/// directories are no leftovers.
pub(crate) fn is_kept(disks: &[OffDisk], sessions: &OfflineSessions) -> bool {
    // What this process has begun, it keeps itself.
    if !sessions.is_empty() {
        return false;
    }
    // One by one: one that cannot be read does not hide another.
    disks.iter().any(|disk| {
        let witness = Witness::open(std::iter::once(&disk.chain()));
        witness.is_ok_and(|witness| matches!(witness.keep(), Ok(Some(_))))
    })
}

/// Lists the directories of sessions that this process has not begun.
pub(crate) fn leftovers(
    vm: &VmRef,
    places: &[PathBuf],
    sessions: &OfflineSessions,
) -> Vec<LeftDirectory> {
    find(vm, places)
        .into_iter()
        .filter(|(session, left)| {
            !sessions.has(*session) && left.is_anothers(*session, None).is_none()
        })
        .flat_map(|(session, left)| {
            left.dirs.into_iter().map(move |dir| LeftDirectory {
                session,
                bytes: occupied_bytes(&dir),
                dir,
            })
        })
        .collect()
}

/// Removes them.
pub(crate) fn sweep(vm: &VmRef, places: &[PathBuf], sessions: &mut OfflineSessions) -> Swept {
    let mut swept = Swept::default();
    for (session, left) in find(vm, places) {
        if sessions.has(session) {
            continue;
        }
        // A VM that is off has no QEMU.
        if let Some(warning) = left.is_anothers(session, None) {
            swept.warnings.push(warning);
            continue;
        }
        let paths =
            SessionPaths::of_leftover(session, &left.label.socket_dir, &left.label.scratch_dir);
        let still_there = |dir: &&PathBuf| fs::symlink_metadata(dir).is_ok();
        let before = left.dirs.iter().filter(still_there).count();
        swept
            .warnings
            .extend(sessions.end_at(session, &paths).warnings);
        if left.dirs.iter().filter(still_there).count() < before {
            swept.sessions.push(session);
        }
    }
    swept
}
