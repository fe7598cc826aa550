//! A VM without libvirt, a driver at its monitor, and orders for it.

use std::path::PathBuf;
use std::sync::Arc;

use highwater_drivers::qmp::QmpDriver;
use highwater_hypervisor::{
    BeginOrder, DiskOrder, Driver as _, NewMark, Quiesce, ReadMode, VmRef, WhenStarted,
};
use highwater_model::{MarkName, Nonce, SessionId, SystemClock};
use highwater_testkit::{BareLab, BareVm};

use crate::reading::mark_name;

/// A driver and the VM it is connected to.
pub(crate) struct Rig {
    pub(crate) driver: QmpDriver,
    pub(crate) vm: BareVm,
    pub(crate) found: VmRef,
}

/// What to read of a disk, and since which mark.
pub(crate) type Wanted<'a> = (&'a str, Option<&'a MarkName>);

impl Rig {
    pub(crate) fn at(vm: BareVm) -> Self {
        let mut driver = connect(&vm);
        let found = driver.find(vm.name()).unwrap();
        Self { driver, vm, found }
    }

    pub(crate) fn lab(&self) -> &BareLab {
        self.vm.lab()
    }

    /// An order that leaves a new mark on all its disks.
    pub(crate) fn order(&self, disks: &[Wanted<'_>]) -> BeginOrder {
        let session = SessionId::random();
        let of = |(target, since): &Wanted<'_>| DiskOrder {
            target: (*target).to_owned(),
            mode: since.map_or(ReadMode::All, |mark| ReadMode::Since(mark.clone())),
        };
        BeginOrder {
            vm: self.found.clone(),
            session,
            disks: disks.iter().map(of).collect(),
            new_mark: Some(NewMark {
                name: mark_name(),
                nonce: Nonce::random(),
                disks: disks
                    .iter()
                    .map(|(target, _)| (*target).to_owned())
                    .collect(),
            }),
            quiesce: Quiesce::Off,
            freeze_mountpoints: Vec::new(),
            socket_dir: self.lab().path(&format!("run/{session}")),
            scratch_dir: self.lab().path(&format!("scratch/{session}")),
            when_started: WhenStarted::Yield,
        }
    }

    /// Where sessions of this rig have their directories.
    pub(crate) fn places(&self) -> [PathBuf; 2] {
        ["run", "scratch"].map(|place| self.lab().path(place))
    }

    /// Asserts that nothing of a session is left, here or there.
    pub(crate) fn assert_no_files(&self) {
        for place in self.places() {
            let left = std::fs::read_dir(&place).into_iter().flatten().flatten();
            let left: Vec<_> = left.map(|entry| entry.path()).collect();
            assert!(left.is_empty(), "{left:?}");
        }
    }
}

pub(crate) fn connect(vm: &BareVm) -> QmpDriver {
    QmpDriver::connect(&vm.uri(), Arc::new(SystemClock)).unwrap()
}

pub(crate) fn mark_of(order: &BeginOrder) -> &MarkName {
    &order.new_mark.as_ref().unwrap().name
}
