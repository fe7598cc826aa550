//! A VM without libvirt, running: two versions of QEMU, two shapes of disks.

use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use highwater_drivers::qmp::QmpDriver;
use highwater_hypervisor::Driver;
use highwater_model::SystemClock;
use highwater_testkit::{Attach, BareLab, BareVm, BitmapSeen, DiskSpec, Qemu};
use serde_json::json;

use crate::bench::Bench;

/// A VM without libvirt, running.
pub(crate) struct Bare<V> {
    vm: BareVm,
    version: PhantomData<V>,
}

/// What it is made of.
pub(crate) trait Version: Sync {
    const QEMU: Qemu;
    fn attach(target: &str) -> Attach;
}

/// The installed QEMU, and disks that are named in full.
pub(crate) struct Named;

impl Version for Named {
    const QEMU: Qemu = Qemu::System;

    fn attach(target: &str) -> Attach {
        let node = format!("{target}-and-a-rather-long-node-name");
        Attach::blockdev("virtio-blk-pci").node(&node[..31])
    }
}

/// The oldest QEMU, and disks of which only the drive has a name.
pub(crate) struct Oldest;

impl Version for Oldest {
    const QEMU: Qemu = Qemu::V7_2;

    fn attach(target: &str) -> Attach {
        Attach::drive().id(target)
    }
}

pub(crate) fn create<V: Version>(disks: Vec<DiskSpec>) -> BareVm {
    let lab = BareLab::start().unwrap();
    let mut builder = lab.vm("web01").qemu(V::QEMU);
    for disk in disks {
        let attach = V::attach(disk.target());
        builder = builder.disk_as(disk, attach);
    }
    builder.create().unwrap()
}

fn connect(socket: &Path) -> Box<dyn Driver> {
    let uri = format!("qmp:{}", socket.display());
    Box::new(QmpDriver::connect(&uri, Arc::new(SystemClock)).unwrap())
}

/// Tells of everything but bitmaps.
fn shape(vm: &BareVm) -> String {
    format!("{:#?}", vm.graph().unwrap().without_bitmaps())
}

impl<V: Version> Bench for Bare<V> {
    const RUNS: bool = true;

    fn start(disks: Vec<DiskSpec>) -> Self {
        let vm = create::<V>(disks);
        vm.start().unwrap();
        let version = PhantomData;
        Self { vm, version }
    }

    fn driver(&self) -> Box<dyn Driver> {
        connect(&self.vm.qmp_socket())
    }

    fn stranger(&self) -> Box<dyn Driver> {
        connect(&self.vm.second_socket())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.vm.lab().path(name)
    }

    fn write(&self, writes: &[(&str, String)]) {
        self.vm.write_each(writes).unwrap();
    }

    fn copy(&self, disk: &str, to: &Path) {
        self.vm.raw_copy(disk, to).unwrap();
    }

    fn bitmaps(&self, disk: &str) -> Vec<BitmapSeen> {
        self.vm.bitmaps(disk).unwrap()
    }

    fn add_bitmap(&self, disk: &str, name: &str) {
        let node = self.vm.node(disk).unwrap();
        let bitmap = json!({"node": node, "name": name, "persistent": true});
        self.vm.qmp("block-dirty-bitmap-add", &bitmap).unwrap();
    }

    fn shape(&self) -> String {
        shape(&self.vm)
    }

    fn cycle(&self) {
        self.vm.quit().unwrap();
        self.vm.start().unwrap();
    }

    fn crash(&self) {
        self.vm.kill().unwrap();
        self.vm.start().unwrap();
    }

    fn turn(&self) {
        self.vm.kill().unwrap();
    }
}
