//! Domains that are shut off: their disks as images, and sessions on them.
//!
//! libvirt reports the images of a domain that is off by the topmost one, knows
//! no bitmaps, and can neither back it up nor remove a bitmap from it. So the
//! images are asked (see [`offline`](crate::offline)); what they tell is the same
//! as what libvirt tells while the domain runs.

use highwater_hypervisor::{
    BeginOrder, Begun, Consistency, ErrorKind, HypervisorError, MarkOrder, RunState, VmRef,
};
use highwater_model::Nonce;
use highwater_model::step::{Step, pass};

use super::connection::LibvirtDriver;
use super::disks::skip_reason;
use super::error::{code, explain};
use super::jobs::{backup_job, run_state};
use super::observe::{Queries, read_definition};
use super::off_disks::off_disk;
use super::sys::CallError;
use super::sys::handles::DomainHandle;
use crate::offline::{self, OffDisk};

/// `VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY`: with the domain off, libvirt
/// deletes nothing else.
const METADATA_ONLY: u32 = 1 << 1;

impl LibvirtDriver {
    /// The disks of a domain that is off, as far as they can be backed up.
    pub(super) fn off_disks(
        &self,
        vm: &VmRef,
        domain: &DomainHandle,
    ) -> Result<Vec<OffDisk>, HypervisorError> {
        let definition = read_definition(vm, domain, false)?;
        let queries = Queries::of(&self.connection, domain);
        let disks = definition.disks.iter();
        Ok(disks
            .filter(|disk| skip_reason(disk).is_none())
            .filter_map(|disk| off_disk(disk, &queries))
            .collect())
    }

    pub(super) fn begin_off(
        &mut self,
        order: &BeginOrder,
        domain: &DomainHandle,
    ) -> Result<Begun, HypervisorError> {
        let message = || format!("cannot begin a backup of VM `{}`", order.vm.name);
        let is_saved = domain
            .has_saved_state()
            .map_err(|error| explain(message(), &error))?;
        let disks = self.off_disks(&order.vm, domain)?;
        let consistency = if is_saved {
            Consistency::Crash
        } else {
            Consistency::Offline
        };
        let clock = self.clock.clone();
        let mut begun = self.offline.begin(order, &disks, &*clock, consistency)?;
        if is_saved {
            begun.warnings.push(
                "the VM is saved (`virsh managedsave`): what its memory holds is in that file, \
                 and its disks are as after a power cut"
                    .to_owned(),
            );
        }
        Ok(begun)
    }

    /// Changes a mark of a domain that is off; `None` if it is not off.
    pub(super) fn change_mark_off(
        &mut self,
        vm: &VmRef,
        order: &MarkOrder,
    ) -> Result<Option<()>, HypervisorError> {
        let domain = self.domain(vm)?;
        if run_state(vm, &domain)? != RunState::Off {
            return Ok(None);
        }
        let disks = self.off_disks(vm, &domain)?;
        // Bitmaps first: without its record a bitmap is still one of ours, while a
        // record without bitmaps would look like a mark that lost them.
        offline::change_mark(vm, &disks, order)?;
        if let MarkOrder::Remove(name) = order {
            let name = name.to_string();
            delete_record(&domain, &name).map_err(|error| {
                explain(
                    format!("cannot remove mark `{name}` of VM `{}`", vm.name),
                    &error,
                )
            })?;
            pass(Step::RecordDeleted);
        }
        Ok(Some(()))
    }

    /// Starts a domain that is off, paused, and leaves a sign at it.
    ///
    /// The sign is in the definition before the start, so that there is no moment
    /// at which the domain runs without it, and is taken out of it at once: the
    /// next start is somebody else's.
    pub(super) fn start_vm_paused(&mut self, vm: &VmRef) -> Result<(), HypervisorError> {
        let domain = self.domain(vm)?;
        let message = || format!("cannot start VM `{}` paused", vm.name);
        let failed = |error: &CallError| explain(message(), error);
        if run_state(vm, &domain)? != RunState::Off {
            return Err(
                HypervisorError::new(ErrorKind::WrongState, message()).because("it is not off")
            );
        }
        if domain.has_saved_state().map_err(|error| failed(&error))? {
            return Err(HypervisorError::new(ErrorKind::WrongState, message())
                .because("it is saved, and a start would use its saved state up")
                .hint("back it up without `--start-paused`"));
        }
        // Another run's sign is not ours to take away.
        let run = Nonce::random().to_string();
        started::sign(&domain, &run).map_err(|error| failed(&error))?;
        let began = domain.start_paused();
        let unsigned = started::unsign_definition(&domain);
        if began
            .as_ref()
            .is_err_and(|error| error.code == code::OPERATION_INVALID)
        {
            // Somebody else was faster, and has got the sign with the definition.
            if started::is_signed_by(&domain, &run).map_err(|error| failed(&error))? {
                started::unsign_running(&domain).map_err(|error| failed(&error))?;
            }
        }
        began.map_err(|error| failed(&error))?;
        unsigned.map_err(|error| failed(&error))
    }

    /// As [`stop_vm_if_started`](Self::stop_vm_if_started), for a sweep.
    pub(super) fn stop_what_a_dead_run_started(
        &mut self,
        vm: &VmRef,
        domain: &DomainHandle,
    ) -> Result<bool, HypervisorError> {
        // Who has a job at it needs it.
        if run_state(vm, domain)? != RunState::Off && backup_job(vm, domain)?.is_some() {
            return Ok(false);
        }
        self.expect_claim(vm)?;
        self.stop_vm_if_started(vm)
    }

    /// Shuts a domain off that [`start_vm_paused`](Self::start_vm_paused) started,
    /// here or in a process that died, unless somebody has resumed it since.
    pub(super) fn stop_vm_if_started(&mut self, vm: &VmRef) -> Result<bool, HypervisorError> {
        let domain = match self.domain(vm) {
            Ok(domain) => domain,
            Err(error) if error.kind == ErrorKind::NoSuchVm => return Ok(false),
            Err(error) => return Err(error),
        };
        let message = || format!("cannot shut VM `{}` off", vm.name);
        let failed = |error: &CallError| explain(message(), error);
        started::unsign_definition(&domain).map_err(|error| failed(&error))?;
        if run_state(vm, &domain)? == RunState::Off {
            return Ok(false);
        }
        if !started::is_signed(&domain).map_err(|error| failed(&error))? {
            return Ok(false);
        }
        if !started::is_as_started(&domain) {
            // It is theirs who resumed it, also when it stands still again.
            started::unsign_running(&domain).map_err(|error| failed(&error))?;
            return Ok(false);
        }
        domain.shut_off().map_err(|error| failed(&error))?;
        Ok(true)
    }
}

fn delete_record(domain: &DomainHandle, name: &str) -> Result<(), CallError> {
    match domain.checkpoint(name) {
        Ok(record) => match record.delete(METADATA_ONLY) {
            Err(error) if error.code != code::NO_CHECKPOINT => Err(error),
            Ok(()) | Err(_) => Ok(()),
        },
        Err(error) if error.code == code::NO_CHECKPOINT => Ok(()),
        Err(error) => Err(error),
    }
}

/// The sign at a domain that was started by us.
mod started {
    use roxmltree::Node;
    use serde::Deserialize;

    use super::super::claims::{PREFIX, STARTED};
    use super::super::sys::CallError;
    use super::super::sys::handles::{DomainHandle, Which};
    use super::super::xml::{child, document};
    use crate::blocks;

    const QUERY_STATUS: &str = r#"{"execute":"query-status"}"#;

    #[derive(Deserialize)]
    struct Status {
        status: String,
    }

    pub(super) fn sign(domain: &DomainHandle, run: &str) -> Result<(), CallError> {
        let sign = format!("<started run='{run}'/>");
        domain.set_metadata(Some(&sign), PREFIX, STARTED, Which::Definition)
    }

    pub(super) fn unsign_definition(domain: &DomainHandle) -> Result<(), CallError> {
        const INACTIVE: u32 = 2;
        // Removing what is not there is an error of libvirt's.
        if !holds_sign(&domain.xml(INACTIVE)?) {
            return Ok(());
        }
        domain.set_metadata(None, PREFIX, STARTED, Which::Definition)
    }

    pub(super) fn unsign_running(domain: &DomainHandle) -> Result<(), CallError> {
        domain.set_metadata(None, PREFIX, STARTED, Which::Running)
    }

    pub(super) fn is_signed(domain: &DomainHandle) -> Result<bool, CallError> {
        Ok(holds_sign(&domain.xml(0)?))
    }

    pub(super) fn is_signed_by(domain: &DomainHandle, run: &str) -> Result<bool, CallError> {
        Ok(holds(&domain.xml(0)?, |sign| {
            sign.attribute("run") == Some(run)
        }))
    }

    fn holds_sign(xml: &str) -> bool {
        holds(xml, |_| true)
    }

    fn holds(xml: &str, is_meant: impl Fn(Node<'_, '_>) -> bool) -> bool {
        document(xml, "domain").is_ok_and(|document| {
            child(document.root_element(), "metadata").is_some_and(|metadata| {
                let mut elements = metadata.children();
                elements.any(|it| it.tag_name().namespace() == Some(STARTED) && is_meant(it))
            })
        })
    }

    /// QEMU tells a guest that never ran from one that was stopped.
    pub(super) fn is_as_started(domain: &DomainHandle) -> bool {
        let reply = domain.monitor_command(QUERY_STATUS).ok();
        let status = reply.and_then(|reply| blocks::reply::<Status>(&reply).ok());
        status.is_some_and(|status| status.status == "prelaunch")
    }
}
