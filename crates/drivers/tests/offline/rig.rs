//! A VM without libvirt, a driver for its images, and orders for it.

use std::sync::Arc;

use highwater_drivers::offline::ImageDriver;
use highwater_hypervisor::{
    BeginOrder, BitmapFacts, DiskOrder, Driver as _, ErrorKind, HypervisorError, NewMark, Quiesce,
    ReadMode, VmRef, WhenStarted,
};
use highwater_model::{MarkName, Nonce, SessionId, SystemClock};
use highwater_testkit::{BareBuilder, BareLab, BareVm, DiskSpec, MIB};

use crate::reading::{disk_facts, mark_name};

pub(crate) struct Rig {
    // First: its exporter ends before the VM's directory goes.
    pub(crate) driver: ImageDriver,
    pub(crate) machine: BareVm,
    pub(crate) lab: BareLab,
}

impl Rig {
    /// A VM that is off, with qcow2 disks of 16 MiB.
    pub(crate) fn new(targets: &[&str]) -> Self {
        let disks = targets
            .iter()
            .map(|target| DiskSpec::qcow2(target, 16 * MIB));
        Self::with(disks.collect())
    }

    pub(crate) fn with(disks: Vec<DiskSpec>) -> Self {
        Self::at(BareLab::start().unwrap(), disks)
    }

    pub(crate) fn at(lab: BareLab, disks: Vec<DiskSpec>) -> Self {
        let builder = disks.into_iter().fold(lab.vm("web01"), BareBuilder::disk);
        let machine = builder.create().unwrap();
        let driver = connect(&machine);
        Self {
            driver,
            machine,
            lab,
        }
    }

    /// A second process's driver: it knows nothing of the first one's sessions.
    pub(crate) fn stranger(&self) -> ImageDriver {
        connect(&self.machine)
    }

    pub(crate) fn vm(&self) -> VmRef {
        VmRef {
            name: self.machine.name().to_owned(),
            uuid: None,
        }
    }

    pub(crate) fn bitmap(&mut self, disk: &str, name: &MarkName) -> Option<BitmapFacts> {
        let (vm, name) = (self.vm(), name.to_string());
        let facts = self.driver.observe(&vm).unwrap();
        let mut all = disk_facts(&facts, disk).bitmaps.iter();
        all.find(|one| one.name == name).cloned()
    }

    /// An order over `disks` (target and mark to read since), leaving a new mark
    /// on all of them.
    pub(crate) fn order(&self, disks: &[(&str, Option<&MarkName>)]) -> BeginOrder {
        let session = SessionId::random();
        let target = |disk: &(&str, Option<&MarkName>)| disk.0.to_owned();
        BeginOrder {
            vm: self.vm(),
            session,
            disks: disks
                .iter()
                .map(|disk| DiskOrder {
                    target: target(disk),
                    mode: disk
                        .1
                        .map_or(ReadMode::All, |mark| ReadMode::Since(mark.clone())),
                })
                .collect(),
            new_mark: Some(NewMark {
                name: mark_name(),
                nonce: Nonce::random(),
                disks: disks.iter().map(target).collect(),
            }),
            quiesce: Quiesce::Off,
            freeze_mountpoints: Vec::new(),
            socket_dir: self.lab.path(&format!("run/{session}")),
            scratch_dir: self.lab.path(&format!("scratch/{session}")),
            when_started: WhenStarted::Yield,
        }
    }

    /// Backs up nothing but takes the mark: begin and end.
    pub(crate) fn leave_mark(&mut self, disks: &[&str]) -> MarkName {
        let disks: Vec<_> = disks.iter().map(|disk| (*disk, None)).collect();
        let order = self.order(&disks);
        self.driver.begin(&order).unwrap();
        self.end(&order);
        new_mark(&order)
    }

    /// Ends a session, which must leave nothing but marks.
    pub(crate) fn end(&mut self, order: &BeginOrder) {
        let ended = self.driver.end(order).unwrap();
        assert!(ended.warnings.is_empty(), "{ended:?}");
        assert_no_directories(order);
    }

    pub(crate) fn check(&mut self, order: &BeginOrder) -> Result<(), HypervisorError> {
        self.driver.check(&order.vm, order.session)
    }
}

fn connect(machine: &BareVm) -> ImageDriver {
    ImageDriver::connect(&machine.image_uri(), Arc::new(SystemClock)).unwrap()
}

pub(crate) fn new_mark(order: &BeginOrder) -> MarkName {
    order.new_mark.as_ref().unwrap().name.clone()
}

pub(crate) fn assert_no_directories(order: &BeginOrder) {
    for dir in [&order.socket_dir, &order.scratch_dir] {
        assert!(!dir.exists(), "{}", dir.display());
    }
}

/// Fails unless the session was lost, and the reason says what is expected.
pub(crate) fn assert_lost(looked: Result<(), HypervisorError>, word: &str) {
    let error = looked.unwrap_err();
    assert_eq!(error.kind, ErrorKind::SessionLost, "{error:?}");
    assert!(error.because[0].contains(word), "{error:?}");
}
