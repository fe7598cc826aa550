//! Reports everything about a VM. Changes nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use highwater_hypervisor::{
    CheckpointFacts, ErrorKind, HypervisorError, RunState, SkippedDisk, VmFacts, VmRef,
    WriteCounters,
};

use super::claims::without_signs;
use super::connection::{LibvirtDriver, query_blocks, vm_ref};
use super::disks::{self, DiskQueries};
use super::domain_xml::{self, DomainXml, TpmXml};
use super::error::{code, explain};
use super::jobs;
use super::off_disks;
use super::record_xml;
use super::sys::CallError;
use super::sys::handles::{ConnectionHandle, DomainHandle};
use crate::blocks;
use crate::host;

/// `virDomainXMLFlags`.
const SECURE: u32 = 1;
const INACTIVE: u32 = 2;

impl LibvirtDriver {
    pub(super) fn observe_vm(&mut self, vm: &VmRef) -> Result<VmFacts, HypervisorError> {
        let domain = self.domain(vm)?;
        let failed = |error: &CallError| explain(format!("cannot observe VM `{}`", vm.name), error);
        let vm = &vm_ref(&domain).map_err(|error| failed(&error))?;
        let mut run_state = jobs::run_state(vm, &domain)?;
        let is_on = run_state != RunState::Off;
        let definition = read_definition(vm, &domain, is_on)?;
        // Before the bitmaps: a write that came between the two questions, and
        // was counted, would look like one that its bitmap has missed.
        let counters = if is_on {
            write_counters(&domain, &definition)
        } else {
            BTreeMap::new()
        };
        let blocks = if is_on {
            Some(query_blocks(vm, &domain)?)
        } else {
            None
        };
        if let Some(blocks) = &blocks {
            run_state = jobs::run_state_with_images(vm, &domain, blocks)?;
        }
        let queries = Queries {
            counters,
            ..Queries::of(&self.connection, &domain)
        };
        let mut found = Vec::new();
        let mut skipped = Vec::new();
        for disk in &definition.disks {
            if let Some(reason) = disks::skip_reason(disk) {
                skipped.push(SkippedDisk {
                    target: disk.target.clone(),
                    reason,
                });
                continue;
            }
            found.extend(match &blocks {
                Some(blocks) => disks::facts(disk, blocks, &queries),
                None => off_disks::facts(disk, &queries),
            });
        }
        let job = if is_on {
            jobs::running_job(vm, &domain, &definition)?
        } else {
            None
        };
        Ok(VmFacts {
            vm: vm.clone(),
            run_state,
            persistent: domain.is_persistent().map_err(|error| failed(&error))?,
            definition: domain
                .xml(SECURE | INACTIVE)
                .map(without_signs)
                .map_err(|error| failed(&error))?,
            tpm_state: definition
                .tpm
                .as_ref()
                .and_then(|tpm| tpm_state(vm, tpm, &self.dialer)),
            firmware: definition.firmware,
            disks: found,
            skipped,
            checkpoints: checkpoints(vm, &domain)?,
            expects_records: is_on,
            job,
            agent: definition.agent,
            process: is_on
                .then(|| vm.uuid.as_deref().and_then(host::qemu_process))
                .flatten()
                .map(|process| process.identity),
            versions: versions(&self.connection, &domain, is_on),
        })
    }
}

/// Reads the definition as it runs, or as it would be started.
pub(super) fn read_definition(
    vm: &VmRef,
    domain: &DomainHandle,
    is_on: bool,
) -> Result<DomainXml, HypervisorError> {
    let message = || format!("cannot read the definition of VM `{}`", vm.name);
    let xml = domain
        .xml(if is_on { 0 } else { INACTIVE })
        .map_err(|error| explain(message(), &error))?;
    domain_xml::parse(&xml).map_err(|error| {
        HypervisorError::new(ErrorKind::Other, message()).because(error.to_string())
    })
}

/// Reads all checkpoint records.
pub(super) fn checkpoints(
    vm: &VmRef,
    domain: &DomainHandle,
) -> Result<Vec<CheckpointFacts>, HypervisorError> {
    let message = || format!("cannot read the checkpoints of VM `{}`", vm.name);
    let failed = |error: &CallError| explain(message(), error);
    let mut facts = Vec::new();
    for checkpoint in domain.checkpoints().map_err(|error| failed(&error))? {
        let xml = match checkpoint.xml() {
            Ok(xml) => xml,
            // Deleted between the list and the question.
            Err(error) if error.code == code::NO_CHECKPOINT => continue,
            Err(error) => return Err(failed(&error)),
        };
        facts.push(record_xml::checkpoint(&xml).map_err(|error| {
            HypervisorError::new(ErrorKind::Other, message()).because(error.to_string())
        })?);
    }
    Ok(facts)
}

/// The state directory of the emulated TPM: where the definition says, else
/// where libvirt keeps it.
fn tpm_state(vm: &VmRef, tpm: &TpmXml, dialer: &super::connection::Dialer) -> Option<PathBuf> {
    if let Some(path) = &tpm.state {
        return Some(path.clone());
    }
    let version = if tpm.version == "1.2" {
        "tpm1.2"
    } else {
        "tpm2"
    };
    Some(dialer.swtpm_dir()?.join(vm.uuid.as_deref()?).join(version))
}

fn versions(
    connection: &ConnectionHandle,
    domain: &DomainHandle,
    is_on: bool,
) -> Vec<(String, String)> {
    let spell = |number: u64| {
        format!(
            "{}.{}.{}",
            number / 1_000_000,
            number / 1_000 % 1_000,
            number % 1_000
        )
    };
    let running = || {
        let reply = domain.monitor_command(blocks::QUERY_VERSION).ok()?;
        blocks::version(&reply).ok()
    };
    let qemu = is_on
        .then(running)
        .flatten()
        .or_else(|| connection.hypervisor_version().ok().map(spell));
    let libvirt = connection.libvirt_version().ok().map(spell);
    [("libvirt", libvirt), ("qemu", qemu)]
        .into_iter()
        .filter_map(|(name, version)| Some((name.to_owned(), version?)))
        .collect()
}

/// What the connection knows about single disks.
pub(super) struct Queries<'a> {
    connection: &'a Arc<ConnectionHandle>,
    domain: &'a DomainHandle,
    counters: BTreeMap<String, WriteCounters>,
}

impl<'a> Queries<'a> {
    /// Without counters.
    pub(super) fn of(connection: &'a Arc<ConnectionHandle>, domain: &'a DomainHandle) -> Self {
        Self {
            connection,
            domain,
            counters: BTreeMap::new(),
        }
    }
}

/// Asks what the guest has written to each disk, by target name.
pub(super) fn write_counters(
    domain: &DomainHandle,
    definition: &DomainXml,
) -> BTreeMap<String, WriteCounters> {
    let of_disk = |target: &String| {
        let stats = domain.block_stats(target).ok()?;
        // libvirt says -1 where QEMU counts nothing.
        let counters = WriteCounters {
            bytes: u64::try_from(stats.write_bytes).ok()?,
            operations: u64::try_from(stats.write_requests).ok()?,
        };
        Some((target.clone(), counters))
    };
    let disks = definition.disks.iter();
    let backed_up = disks.filter(|disk| disks::skip_reason(disk).is_none());
    backed_up.filter_map(|disk| of_disk(&disk.target)).collect()
}

impl DiskQueries for Queries<'_> {
    fn volume_path(&self, pool: &str, volume: &str) -> Option<PathBuf> {
        self.connection
            .volume_path(pool, volume)
            .ok()
            .filter(|path| path.as_path() != Path::new(""))
    }

    fn capacity(&self, target: &str) -> Option<u64> {
        self.domain.capacity(target).ok()
    }

    fn counters(&self, target: &str) -> Option<WriteCounters> {
        self.counters.get(target).copied()
    }
}
