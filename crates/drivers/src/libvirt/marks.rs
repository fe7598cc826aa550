//! Changes marks outside a session.
//!
//! A mark is a record of libvirt and a bitmap per disk of QEMU, and each may be
//! there without the other: libvirt forgets records (undefine, migration), and
//! a QEMU that was killed never stored its bitmaps.

use highwater_hypervisor::{ErrorKind, HypervisorError, MarkOrder, Redefinition, RunState, VmRef};
use highwater_model::step::{Step, pass};

use super::backup_xml;
use super::connection::{LibvirtDriver, query_blocks};
use super::disks;
use super::domain_xml::DomainXml;
use super::error::{code, explain};
use super::jobs::{expect_own_images, run_state};
use super::observe::read_definition;
use super::sys::CallError;
use super::sys::handles::DomainHandle;
use crate::blocks;

/// `VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE` and `..._REDEFINE_VALIDATE`.
const REDEFINE: u32 = 1;
const VALIDATE: u32 = 1 << 2;
/// `VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY`.
const METADATA_ONLY: u32 = 1 << 1;

impl LibvirtDriver {
    pub(super) fn change_mark(
        &mut self,
        vm: &VmRef,
        order: &MarkOrder,
    ) -> Result<(), HypervisorError> {
        if self.change_mark_off(vm, order)?.is_some() {
            return Ok(());
        }
        match order {
            MarkOrder::Remove(name) => self.remove_mark(vm, &name.to_string()),
            MarkOrder::Distrust { name, nodes } => self.distrust_mark(vm, &name.to_string(), nodes),
            MarkOrder::Redefine(mark) => self.redefine_mark(vm, mark),
        }
    }

    /// Removes record and bitmaps, and makes sure that neither is left.
    pub(super) fn remove_mark(&mut self, vm: &VmRef, name: &str) -> Result<(), HypervisorError> {
        let domain = self.domain(vm)?;
        let message = || format!("cannot remove mark `{name}` of VM `{}`", vm.name);
        if run_state(vm, &domain)? == RunState::Off {
            return Err(HypervisorError::new(ErrorKind::WrongState, message())
                .because("the VM is off, and libvirt removes bitmaps only from one that runs"));
        }
        expect_own_images(vm, &domain, message)?;
        delete_record(&domain, name).map_err(|error| explain(message(), &error))?;
        pass(Step::RecordDeleted);
        let left = query_blocks(vm, &domain)?.holders(name);
        if left.is_empty() {
            return Ok(());
        }
        let mut because = Vec::new();
        for node in &left {
            match remove_bitmap(&domain, node, name) {
                Ok(()) => pass(Step::BitmapRemoved),
                Err(error) => because.push(error),
            }
        }
        if !because.is_empty() {
            // A bitmap in a backing file: only libvirt can have QEMU open that
            // for writing, and only for a record that it knows.
            let definition = read_definition(vm, &domain, true)?;
            because.extend(delete_through_records(&domain, &definition, name));
        }
        if query_blocks(vm, &domain)?.holders(name).is_empty() {
            return Ok(());
        }
        let kind = if because.iter().any(|text| text.contains("in use")) {
            ErrorKind::Busy
        } else {
            ErrorKind::Other
        };
        Err(because.into_iter().fold(
            HypervisorError::new(kind, message()),
            HypervisorError::because,
        ))
    }

    /// Removes the bitmaps of a mark from some nodes. libvirt keeps the record,
    /// which the other disks need.
    fn distrust_mark(
        &mut self,
        vm: &VmRef,
        name: &str,
        nodes: &[String],
    ) -> Result<(), HypervisorError> {
        let domain = self.domain(vm)?;
        let message = || format!("cannot take mark `{name}` off a disk of VM `{}`", vm.name);
        expect_own_images(vm, &domain, message)?;
        let there = query_blocks(vm, &domain)?.holders(name);
        let mut because = Vec::new();
        for node in nodes.iter().filter(|node| there.contains(node)) {
            because.extend(remove_bitmap(&domain, node, name).err());
        }
        if because.is_empty() {
            return Ok(());
        }
        Err(because.into_iter().fold(
            HypervisorError::new(ErrorKind::Other, message()),
            HypervisorError::because,
        ))
    }

    /// Tells libvirt about a mark that it forgot. libvirt checks that its
    /// bitmaps are there, whole and recording.
    fn redefine_mark(&mut self, vm: &VmRef, mark: &Redefinition) -> Result<(), HypervisorError> {
        let domain = self.domain(vm)?;
        let message = || format!("cannot redefine mark `{}` of VM `{}`", mark.name, vm.name);
        if mark.disks.is_empty() {
            // libvirt would check nothing and later remove nothing.
            return Err(
                HypervisorError::new(ErrorKind::Other, message()).because("it names no disk")
            );
        }
        // libvirt would miss the bitmaps, and the mark be taken for a useless one.
        expect_own_images(vm, &domain, message)?;
        let xml = backup_xml::redefined_checkpoint(mark);
        match domain.create_checkpoint(&xml, REDEFINE | VALIDATE) {
            Ok(_record) => Ok(()),
            Err(error) => Err(explain(message(), &error)),
        }
    }
}

/// Deletes the record and the bitmaps it knows; if a bitmap is missing, the
/// record alone.
fn delete_record(domain: &DomainHandle, name: &str) -> Result<(), CallError> {
    let record = match domain.checkpoint(name) {
        Ok(record) => record,
        Err(error) if error.code == code::NO_CHECKPOINT => return Ok(()),
        Err(error) => return Err(error),
    };
    match record.delete(0) {
        Ok(()) => Ok(()),
        Err(error) if error.code == code::NO_CHECKPOINT => Ok(()),
        // Busy is the one thing that waiting cures; everything else (a bitmap
        // that is missing on one disk stops libvirt from looking at the others)
        // leaves the bitmaps to be removed one by one.
        Err(error) if super::error::kind_of(&error) == ErrorKind::Busy => Err(error),
        Err(_) => record.delete(METADATA_ONLY),
    }
}

/// Removes one bitmap; the error is QEMU's text.
fn remove_bitmap(domain: &DomainHandle, node: &str, name: &str) -> Result<(), String> {
    let reply = domain
        .monitor_command(&blocks::remove_bitmap(node, name))
        .map_err(|error| error.message)?;
    blocks::reply::<serde_json::Value>(&reply)
        .map(drop)
        .map_err(|error| error.to_string())
}

/// Makes a record for bitmaps that have none, and deletes it with them: one for
/// each disk, because libvirt deletes nothing if one of a record's disks has no
/// such bitmap. Returns what libvirt said against it, which for those disks is
/// just that.
fn delete_through_records(
    domain: &DomainHandle,
    definition: &DomainXml,
    name: &str,
) -> Vec<String> {
    let disks = definition
        .disks
        .iter()
        .filter(|disk| disks::skip_reason(disk).is_none())
        .filter(|disk| disk.chain.iter().any(|link| link.format == "qcow2"));
    disks
        .filter_map(|disk| delete_through_record(domain, &disk.target, name).err())
        .collect()
}

fn delete_through_record(domain: &DomainHandle, disk: &str, name: &str) -> Result<(), String> {
    // Its time is of no matter: it is deleted at once.
    let xml = backup_xml::checkpoint(name, None, Some(0), &[disk.to_owned()]);
    let words = |error: &CallError| error.message.clone();
    let record = domain
        .create_checkpoint(&xml, REDEFINE)
        .map_err(|error| words(&error))?;
    record
        .delete(0)
        .or_else(|error| {
            let left = record.delete(METADATA_ONLY);
            left.and(Err(error))
        })
        .map_err(|error| words(&error))
}
