//! VMs that are off: images without a QEMU.
//!
//! ```text
//! image      what the images of a disk say about themselves, and of each other
//! facts      that, as the facts of a disk
//! session    the point in time, and what proves that nothing was written since
//! witness    locks and stamps: the proof
//! exporter   the child that shows the images over NBD
//! tools      QEMU's tools, by which alone an image is altered
//! marks      takes marks off
//! ```
//!
//! [`ImageDriver`] is for images that only the user knows of; the libvirt driver
//! uses the rest for its VMs that are shut off. ADR 0016 has the reasons.

mod exporter;
mod facts;
mod holders;
mod image;
mod marks;
mod session;
mod sweep;
mod tools;
mod witness;

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use highwater_hypervisor::{
    Agent, BeginOrder, Begun, Claimant, Consistency, DiskSource, Driver, Ended, ErrorKind,
    HypervisorError, LeftDirectory, MarkOrder, RootNode, RunState, Surroundings, Swept, VmFacts,
    VmRef, WriteErrorPolicy,
};
use highwater_model::{ClaimId, Clock, SessionId};
use serde_json::json;

pub(crate) use facts::{OffDisk, Stated, StatedData, StatedImage};
pub(crate) use marks::change as change_mark;
pub(crate) use session::{OfflineSessions, end_stray};
pub(crate) use sweep::{is_kept, leftovers, sweep};

use crate::uri::{self, Uri};
use witness::Witness;

/// Parameters of an `image:` connection.
const PARAMS: [&str; 3] = [uri::NAME, "uuid", "format"];
/// As long as names of disks may be elsewhere.
const TARGET_BYTES_MAX: usize = 100;

/// Reads the images of one VM that is off.
pub struct ImageDriver {
    vm: VmRef,
    disks: Vec<OffDisk>,
    clock: Arc<dyn Clock>,
    sessions: OfflineSessions,
}

impl fmt::Debug for ImageDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImageDriver")
            .field("vm", &self.vm)
            .finish_non_exhaustive()
    }
}

impl ImageDriver {
    /// Takes the images that a URI names: `image:/a.qcow2,data=/b.raw`, with
    /// `?name=NAME&uuid=UUID`, and `format=raw` or `format=qcow2` for all of them
    /// where their first bytes are not to be asked.
    pub fn connect(uri: &str, clock: Arc<dyn Clock>) -> Result<Self, HypervisorError> {
        let parsed = Uri::parse(uri)?;
        parsed.expect_params(&PARAMS)?;
        let wrong = |because: String| {
            let message = format!("cannot use connection `{uri}`");
            HypervisorError::new(ErrorKind::Unreachable, message).because(because)
        };
        let format = parsed.params.get("format").cloned();
        if let Some(other) = format
            .as_deref()
            .filter(|it| !["raw", "qcow2"].contains(it))
        {
            return Err(wrong(format!(
                "`{other}` is no format that can be read: raw, qcow2"
            )));
        }
        let mut disks = Vec::new();
        let mut seen = BTreeSet::new();
        for (target, path) in parsed.list()? {
            let path = absolute(&path).map_err(&wrong)?;
            let target = match target {
                Some(target) => target,
                None => stem(&path).ok_or_else(|| wrong(nameless(&path)))?,
            };
            if !is_target(&target) {
                return Err(wrong(format!("`{target}` cannot be the name of a disk"))
                    .hint("give it one of letters and digits: `image:vda=/path/a.qcow2`"));
            }
            if !seen.insert(target.clone()) {
                return Err(wrong(format!("two disks are called `{target}`"))
                    .hint("give them names: `image:vda=/path/a.qcow2,vdb=/other/a.qcow2`"));
            }
            disks.push(off_disk(target, path, format.clone()));
        }
        // An image's own name does not do: two VMs with a `disk.qcow2` each would be
        // one, and share their points.
        let name = parsed.params.get(uri::NAME).filter(|it| !it.is_empty());
        let name = name.cloned().ok_or_else(|| {
            wrong("images do not tell what their VM is called".to_owned())
                .hint("say it with `--name NAME`, or in the connection: `image:PATH?name=NAME`")
        })?;
        let uuid = parsed
            .params
            .get("uuid")
            .map(|uuid| uuid.to_ascii_lowercase());
        let is_none = |uuid: &String| uuid.chars().all(|letter| matches!(letter, '0' | '-'));
        Ok(Self {
            vm: VmRef {
                name,
                uuid: uuid.filter(|uuid| !is_none(uuid)),
            },
            disks,
            clock,
            sessions: OfflineSessions::default(),
        })
    }

    /// Says who has one of the images open for writing.
    fn in_use(&self) -> Option<String> {
        let chains: Vec<_> = self.disks.iter().map(OffDisk::chain).collect();
        let witness = Witness::open(chains.iter()).ok()?;
        let image = witness.writer().ok()??.to_path_buf();
        Some(format!(
            "`{}` is in use by a running VM{}",
            image.display(),
            holders::of(&image)
        ))
    }

    /// Whether directories of this VM may be those of a session that lives: one that
    /// reads the images keeps them, and one of the running VM is not known here.
    fn another_may_live(&self) -> bool {
        is_kept(&self.disks, &self.sessions) || self.in_use().is_some()
    }

    fn run_state(&self) -> RunState {
        match self.in_use() {
            None => RunState::Off,
            Some(_) => RunState::Other,
        }
    }

    fn expect(&self, vm: &VmRef) -> Result<(), HypervisorError> {
        if *vm == self.vm {
            return Ok(());
        }
        Err(self.unknown(&vm.name))
    }

    fn unknown(&self, name: &str) -> HypervisorError {
        HypervisorError::new(ErrorKind::NoSuchVm, format!("cannot find VM `{name}`"))
            .because(format!("these are the images of VM `{}`", self.vm.name))
            .hint("say what the VM is called with `--name`")
    }

    /// Describes the VM, for who has to make one of its disks.
    fn definition(&self) -> String {
        let disks = self.disks.iter().map(|disk| {
            let facts = disk.facts();
            json!({
                "disk": facts.target,
                "image": disk.top.as_ref().ok(),
                "format": facts.format,
                "size_bytes": facts.size_bytes,
            })
        });
        let all = json!({
            "name": self.vm.name,
            "uuid": self.vm.uuid,
            "disks": disks.collect::<Vec<_>>(),
        });
        format!("{all:#}\n")
    }
}

fn off_disk(target: String, path: PathBuf, format: Option<String>) -> OffDisk {
    let is_device = image::open(&path).is_ok_and(|(_, is_device)| is_device);
    OffDisk {
        target,
        serial: None,
        device: None,
        device_known: false,
        source: if is_device {
            DiskSource::Block(path.clone())
        } else {
            DiskSource::File(path.clone())
        },
        top: Ok(path),
        format,
        write_errors: WriteErrorPolicy::Pause,
        encrypted: false,
        stated: None,
    }
}

/// The same image has the same name, from wherever it is named.
fn absolute(path: &str) -> Result<PathBuf, String> {
    if path.is_empty() {
        return Err("an image has no path".to_owned());
    }
    std::path::absolute(path).map_err(|error| format!("`{path}`: {error}"))
}

fn stem(path: &Path) -> Option<String> {
    let stem = path.file_stem()?.to_str()?.to_owned();
    is_target(&stem).then_some(stem)
}

fn nameless(path: &Path) -> String {
    format!(
        "a disk cannot be called as `{}` is: give it a name, as in `vda=PATH`",
        path.display()
    )
}

/// Names of disks become names of files and exports.
fn is_target(text: &str) -> bool {
    let is_good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
    (1..=TARGET_BYTES_MAX).contains(&text.len())
        && text.bytes().all(is_good)
        && !text.starts_with('.')
}

impl Driver for ImageDriver {
    fn list(&mut self) -> Result<Vec<(VmRef, RunState)>, HypervisorError> {
        Ok(vec![(self.vm.clone(), self.run_state())])
    }

    fn find(&mut self, name_or_uuid: &str) -> Result<VmRef, HypervisorError> {
        let is_uuid = self.vm.uuid.as_deref() == Some(&name_or_uuid.to_ascii_lowercase());
        if is_uuid || self.vm.name == name_or_uuid {
            return Ok(self.vm.clone());
        }
        Err(self.unknown(name_or_uuid))
    }

    fn observe(&mut self, vm: &VmRef) -> Result<VmFacts, HypervisorError> {
        self.expect(vm)?;
        let in_use = self.in_use();
        let mut disks: Vec<_> = self.disks.iter().map(OffDisk::facts).collect();
        if let Some(why) = &in_use {
            for disk in &mut disks {
                disk.root_node = RootNode::Unknown(why.clone());
            }
        }
        Ok(VmFacts {
            vm: self.vm.clone(),
            run_state: match in_use {
                None => RunState::Off,
                Some(_) => RunState::Other,
            },
            persistent: true,
            definition: self.definition(),
            firmware: Vec::new(),
            tpm_state: None,
            disks,
            skipped: Vec::new(),
            checkpoints: Vec::new(),
            expects_records: false,
            job: None,
            agent: Agent::Missing,
            process: None,
            versions: tools::version()
                .map(|version| ("qemu-img".to_owned(), version))
                .into_iter()
                .collect(),
        })
    }

    fn begin(&mut self, order: &BeginOrder) -> Result<Begun, HypervisorError> {
        self.expect(&order.vm)?;
        self.sessions
            .begin(order, &self.disks, &*self.clock, Consistency::Offline)
    }

    fn check(&mut self, vm: &VmRef, session: SessionId) -> Result<(), HypervisorError> {
        let looked = self.sessions.check(vm, session);
        looked.unwrap_or_else(|| {
            Err(HypervisorError::session_lost(
                vm,
                session,
                "its exporter is gone",
            ))
        })
    }

    fn is_alarmed(&mut self, session: SessionId) -> bool {
        self.sessions.is_alarmed(session)
    }

    fn end(&mut self, order: &BeginOrder) -> Result<Ended, HypervisorError> {
        Ok(self.sessions.end(order))
    }

    fn end_leftover(&mut self, _vm: &VmRef, _: SessionId) -> Result<Ended, HypervisorError> {
        // A session without its process has no job: its exporter died with it.
        Ok(Ended::default())
    }

    fn mark(&mut self, vm: &VmRef, order: &MarkOrder) -> Result<(), HypervisorError> {
        self.expect(vm)?;
        change_mark(vm, &self.disks, order)
    }

    fn survey(&mut self, _vm: &VmRef) -> Result<Surroundings, HypervisorError> {
        Ok(Surroundings::default())
    }

    fn leftovers(
        &mut self,
        vm: &VmRef,
        places: &[PathBuf],
    ) -> Result<Vec<LeftDirectory>, HypervisorError> {
        if self.another_may_live() {
            return Ok(Vec::new());
        }
        Ok(leftovers(vm, places, &self.sessions))
    }

    fn sweep(&mut self, vm: &VmRef, places: &[PathBuf]) -> Result<Swept, HypervisorError> {
        if self.another_may_live() {
            return Ok(Swept::default());
        }
        Ok(sweep(vm, places, &mut self.sessions))
    }

    fn claimant(&mut self, _vm: &VmRef) -> Result<Option<Box<dyn Claimant>>, HypervisorError> {
        Ok(None)
    }

    fn act_for(&mut self, _claim: Option<ClaimId>) {}

    fn still_claimed(&mut self, _vm: &VmRef) -> Result<(), HypervisorError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use highwater_model::SystemClock;

    use super::*;

    fn connect(uri: &str) -> Result<ImageDriver, HypervisorError> {
        ImageDriver::connect(uri, Arc::new(SystemClock))
    }

    #[test]
    fn disks_are_called_as_the_user_says_or_as_their_images_are() {
        let driver = connect("image:/d/web01.qcow2,data=/d/x%2Cy.img?uuid=AB&name=w").unwrap();
        let targets: Vec<_> = driver.disks.iter().map(|disk| &disk.target).collect();
        assert_eq!(targets, ["web01", "data"]);
        assert_eq!(driver.disks[1].top, Ok(PathBuf::from("/d/x,y.img")));
        assert_eq!(driver.vm.name, "w");
        assert_eq!(driver.vm.uuid.as_deref(), Some("ab"));
        let named = connect("image:/d/a.qcow2?name=web02&uuid=00-00").unwrap();
        assert_eq!((named.vm.name.as_str(), named.vm.uuid), ("web02", None));
    }

    #[test]
    fn images_that_cannot_be_told_apart_are_refused() {
        for uri in [
            "image:/a/x.qcow2,/b/x.qcow2?name=w",
            "image:v=/a,v=/b?name=w",
            "image:a b=/a?name=w",
            "image:/d/%C3%A4.qcow2?name=w",
            "image:vda=?name=w",
            "image:/a?name=w&format=vmdk",
            "image:/a?name=w&agent=/b",
        ] {
            assert!(connect(uri).is_err(), "{uri}");
        }
    }

    #[test]
    fn images_without_a_name_of_their_vm_are_refused_with_a_hint() {
        for uri in ["image:/d/virtual.qcow2", "image:/d/virtual.qcow2?name="] {
            let error = connect(uri).unwrap_err();
            assert!(error.hint.unwrap().contains("--name"), "{uri}");
        }
    }
}
