//! Tidies up after dead sessions of a libvirt VM, by the directories that they
//! left and by what QEMU still holds.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use highwater_hypervisor::{ErrorKind, HypervisorError, LeftDirectory, RunState, Swept, VmRef};
use highwater_model::SessionId;

use super::claims::other_job_runs;
use super::connection::LibvirtDriver;
use super::jobs::{backup_job, run_state};
use super::remains;
use crate::directories::SessionPaths;
use crate::label::{Left, find, occupied_bytes};
use crate::{host, offline};

impl LibvirtDriver {
    pub(super) fn find_leftovers(
        &mut self,
        vm: &VmRef,
        places: &[PathBuf],
    ) -> Result<Vec<LeftDirectory>, HypervisorError> {
        let found = self.dead_sessions(vm, places)?;
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
        // A VM that is gone has neither job nor frozen guest.
        let domain = match self.domain(vm) {
            Ok(domain) => Some(domain),
            Err(error) if error.kind == ErrorKind::NoSuchVm => None,
            Err(error) => return Err(error),
        };
        let mut swept = Swept::default();
        if let Some(domain) = &domain {
            // Nobody can claim it now, so nobody knows who is dead.
            if other_job_runs(domain) {
                return Ok(swept);
            }
            let cleared = remains::clear_unless_job(vm, domain, self.claim)?;
            swept.in_process.extend(cleared.sessions);
            swept.warnings.extend(cleared.warnings);
        }
        // Their files last: QEMU holds them open no longer.
        let found = self.dead_sessions(vm, places)?;
        // After the list was made: what a successor has made is not in it.
        if domain.is_some() && !found.is_empty() {
            self.expect_claim(vm)?;
        }
        let process = vm.uuid.as_deref().and_then(host::qemu_process);
        let here = process.map(|process| process.identity);
        // A domain may run where its process cannot be seen.
        let is_known = here.is_some() || domain.is_none();
        for (session, left) in found {
            if is_known && let Some(warning) = left.is_anothers(session, here.as_ref()) {
                swept.warnings.push(warning);
                continue;
            }
            let paths =
                SessionPaths::of_leftover(session, &left.label.socket_dir, &left.label.scratch_dir);
            offline::end_stray(&paths, session);
            match &domain {
                Some(domain) => {
                    let ended = self.stop_job(vm, domain, session, &paths)?;
                    swept.warnings.extend(ended.warnings);
                }
                None => paths.note_thawed(),
            }
            let still_there = |dir: &&PathBuf| fs::symlink_metadata(dir).is_ok();
            let before = left.dirs.iter().filter(still_there).count();
            swept.warnings.extend(paths.remove());
            if left.dirs.iter().filter(still_there).count() < before {
                swept.sessions.push(session);
            }
        }
        if let Some(domain) = &domain
            && self.stop_what_a_dead_run_started(vm, domain)?
        {
            swept.warnings.push(
                "the VM was started paused by a backup that died, and is shut off again".to_owned(),
            );
        }
        Ok(swept)
    }

    fn dead_sessions(
        &mut self,
        vm: &VmRef,
        places: &[PathBuf],
    ) -> Result<BTreeMap<SessionId, Left>, HypervisorError> {
        let mut found = find(vm, places);
        found.retain(|session, _| !self.offline.has(*session));
        if found.is_empty() {
            return Ok(found);
        }
        match self.domain(vm) {
            Ok(domain) => {
                let running = backup_job(vm, &domain)?.and_then(|job| job.session);
                found.retain(|session, _| Some(*session) != running);
                // A session that reads images has no job that would tell of it.
                if run_state(vm, &domain)? == RunState::Off
                    && offline::is_kept(&self.off_disks(vm, &domain)?, &self.offline)
                {
                    found.clear();
                }
            }
            Err(error) if error.kind == ErrorKind::NoSuchVm => {}
            Err(error) => return Err(error),
        }
        Ok(found)
    }
}

#[cfg(test)]
mod with_a_real_guest {
    use highwater_hypervisor::Driver as _;
    use highwater_testkit::{DiskSpec, Lab, MIB, guest};

    use super::*;
    use crate::host::{QemuProcess, qemu_process};
    use crate::libvirt::LibvirtOptions;

    #[test]
    fn a_guest_that_a_dead_session_froze_is_thawed_and_one_that_others_froze_is_not() {
        let lab = Lab::start().unwrap();
        guest::make_ext4(&lab.path("files.raw"), 16 * MIB).unwrap();
        let files = DiskSpec::existing("vda", &lab.path("files.raw"), "raw");
        let vm = lab.vm("web01").disk(files).guest().start().unwrap();
        let inside = vm.guest().unwrap();
        inside.wait_for_agent().unwrap();
        let mut driver = LibvirtDriver::connect(&lab.uri(), &LibvirtOptions::default()).unwrap();
        let found = driver.find("web01").unwrap();
        let places = [lab.path("run"), lab.path("scratch")];
        let mut left = |froze: bool, qemu: Option<&QemuProcess>| {
            let session = SessionId::random();
            let [run, scratch] = places
                .each_ref()
                .map(|place| place.join(session.to_string()));
            let paths = SessionPaths::of_leftover(session, &run, &scratch);
            paths.create(&found, qemu).unwrap();
            if froze {
                paths.note_freezing().unwrap();
            }
            let swept = driver.sweep(&found, &places).unwrap();
            assert_eq!(swept.sessions, [session]);
            swept.warnings
        };
        let qemu = qemu_process(found.uuid.as_deref().unwrap()).unwrap();
        let mut before = qemu.clone();
        before.identity.start_ticks -= 1;
        lab.virsh(&["domfsfreeze", "web01"]).unwrap();
        assert!(left(false, Some(&qemu)).is_empty());
        assert!(inside.is_frozen().unwrap(), "somebody else froze it");
        assert!(left(true, Some(&before)).is_empty());
        assert!(inside.is_frozen().unwrap(), "it was another QEMU's guest");
        assert!(left(true, Some(&qemu))[0].contains("left frozen"));
        assert!(!inside.is_frozen().unwrap());
        // It was thawed in time by somebody, who did not get to say so.
        assert!(left(true, Some(&qemu)).is_empty());
        // Nobody could tell which QEMU it was: frozen for ever is worse.
        lab.virsh(&["domfsfreeze", "web01"]).unwrap();
        assert!(left(true, None)[0].contains("left frozen"));
        assert!(!inside.is_frozen().unwrap());
    }
}
