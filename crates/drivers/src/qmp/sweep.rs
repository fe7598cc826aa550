//! Tidies up after dead sessions of a VM, by what QEMU still holds and by the
//! directories that they left.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use highwater_hypervisor::{ErrorKind, HypervisorError, LeftDirectory, Swept, VmRef};
use highwater_model::SessionId;

use super::QmpDriver;
use super::client::Client;
use super::end::{Known, cannot_end};
use super::error::explain;
use super::objects::Which;
use super::process;
use super::seen::Seen;
use super::servers::listening;
use crate::directories::SessionPaths;
use crate::label::{Left, find, occupied_bytes};

impl QmpDriver {
    pub(super) fn find_leftovers(
        &mut self,
        vm: &VmRef,
        places: &[PathBuf],
    ) -> Result<Vec<LeftDirectory>, HypervisorError> {
        let client = self.client_of(vm)?;
        let mut found = find(vm, places);
        if let (Some(client), false) = (client, found.is_empty()) {
            let seen = Seen::read(&client).map_err(|error| explain(cannot_end(vm), &error))?;
            for session in seen.ours(&Which::All).sessions {
                found.remove(&session);
            }
        }
        found.retain(|session, left| self.is_anothers(*session, left).is_none());
        let directories = found.into_iter().flat_map(|(session, left)| {
            left.dirs.into_iter().map(move |dir| LeftDirectory {
                session,
                bytes: occupied_bytes(&dir),
                dir,
            })
        });
        Ok(directories.collect())
    }

    pub(super) fn sweep_leftovers(
        &mut self,
        vm: &VmRef,
        places: &[PathBuf],
    ) -> Result<Swept, HypervisorError> {
        let client = self.client_of(vm)?;
        let mut found = find(vm, places);
        let mut swept = Swept::default();
        if let Some(client) = &client {
            let sessions: BTreeSet<SessionId> = found.keys().copied().collect();
            let mut known: Known = found
                .iter()
                .map(|(session, left)| {
                    let label = &left.label;
                    let paths =
                        SessionPaths::of_leftover(*session, &label.socket_dir, &label.scratch_dir);
                    (*session, Some(paths.socket()))
                })
                .collect();
            let seen = Seen::read(client).map_err(|error| explain(cannot_end(vm), &error))?;
            let process = self.process().map(|found| found.identity.pid);
            for session in listening(process, &sessions) {
                known.entry(session).or_default();
            }
            let listed = Which::Hashes(seen.ours(&Which::All).hashes());
            // After the list was made: what a successor has made is not in it.
            self.expect_claim(vm)?;
            let cleared = self.clear(vm, client, &listed, &known)?;
            if cleared.was_there && cleared.sessions.is_empty() {
                swept
                    .warnings
                    .push("objects of a backup were left in QEMU, and are removed".to_owned());
            }
            if cleared.is_left {
                // QEMU still writes to their files.
                found.retain(|session, _| !cleared.sessions.contains(session));
            } else {
                swept.in_process.extend(cleared.sessions);
            }
            swept.warnings.extend(cleared.warnings);
        }
        // Their files last: QEMU holds them open no longer.
        self.remove_directories(vm, client.as_ref(), found, &mut swept)?;
        Ok(swept)
    }

    fn remove_directories(
        &mut self,
        vm: &VmRef,
        client: Option<&Client>,
        found: BTreeMap<SessionId, Left>,
        swept: &mut Swept,
    ) -> Result<(), HypervisorError> {
        let open = process::open_files();
        for (session, left) in found {
            if let Some(warning) = self.is_anothers(session, &left) {
                swept.warnings.push(warning);
                continue;
            }
            if open.as_ref().is_some_and(|open| is_in_use(&left, open)) {
                swept.warnings.push(format!(
                    "the scratch files of session {session} are still open: its directories stay"
                ));
                continue;
            }
            let paths =
                SessionPaths::of_leftover(session, &left.label.socket_dir, &left.label.scratch_dir);
            let same = client.filter(|_| !self.is_another_qemu(&paths));
            if let Some(client) = same {
                let resumed = self.resume_after_error(vm, client, &paths)?;
                swept.warnings.extend(resumed);
                swept.warnings.extend(self.thaw_after(vm, &paths));
            } else {
                paths.note_thawed();
            }
            let still_there = |dir: &&PathBuf| fs::symlink_metadata(dir).is_ok();
            let before = left.dirs.iter().filter(still_there).count();
            swept.warnings.extend(paths.remove());
            if left.dirs.iter().filter(still_there).count() < before {
                swept.sessions.push(session);
            }
        }
        Ok(())
    }

    /// Returns the connection; none if the VM is gone, or another one is there.
    fn client_of(&mut self, vm: &VmRef) -> Result<Option<Client>, HypervisorError> {
        match self.expect_vm(vm) {
            Ok(client) => Ok(Some(client)),
            Err(error) if error.kind == ErrorKind::NoSuchVm => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns a warning if the session belongs to another QEMU that lives. If
    /// nobody can tell which one is here, it is taken for the session's.
    fn is_anothers(&self, session: SessionId, left: &Left) -> Option<String> {
        let now = self.process()?.identity;
        left.is_anothers(session, Some(&now))
    }

    /// Returns whether the VM is run by another QEMU than the session's. If
    /// nobody can tell it counts as the same: a guest that stays frozen is the
    /// worse mistake.
    fn is_another_qemu(&self, paths: &SessionPaths) -> bool {
        let (Some(then), Some(now)) = (paths.process(), self.process()) else {
            return false;
        };
        now.identity != then
    }
}

/// Returns whether a file in the session's directories is open anywhere: whoever
/// has it open is not dead, or has not been ended.
fn is_in_use(left: &Left, open: &BTreeSet<(u64, u64)>) -> bool {
    let entries = left.dirs.iter().filter_map(|dir| fs::read_dir(dir).ok());
    entries.flatten().flatten().any(|entry| {
        let name = entry.file_name();
        let is_scratch = Path::new(&name)
            .extension()
            .is_some_and(|it| it == "scratch");
        let about = fs::symlink_metadata(entry.path());
        is_scratch && about.is_ok_and(|about| open.contains(&(about.dev(), about.ino())))
    })
}
