//! A VM of libvirt's, running.

use std::path::{Path, PathBuf};

use highwater_drivers::libvirt::{LibvirtDriver, LibvirtOptions};
use highwater_hypervisor::Driver;
use highwater_testkit::{BitmapSeen, DiskSpec, Lab, Leftovers, Vm, VmBuilder};
use serde_json::json;

use crate::bench::Bench;

/// A VM of libvirt's, running.
pub(crate) struct Running {
    lab: Lab,
    vm: Vm,
}

pub(crate) fn define(disks: Vec<DiskSpec>) -> (Lab, Vm) {
    let lab = Lab::start().unwrap();
    let builder = lab.vm("web01");
    let builder = disks.into_iter().fold(builder, VmBuilder::disk);
    let vm = builder.define().unwrap();
    (lab, vm)
}

pub(crate) fn connect(lab: &Lab) -> Box<dyn Driver> {
    Box::new(LibvirtDriver::connect(&lab.uri(), &LibvirtOptions::default()).unwrap())
}

/// Tells of everything but bitmaps and libvirt's records of them.
pub(crate) fn shape(lab: &Lab, vm: &Vm) -> String {
    let left = vm.leftovers(&lab.path("scratch")).unwrap();
    let left = Leftovers {
        checkpoints: Vec::new(),
        bitmaps: Vec::new(),
        ..left
    };
    format!("{}: {left:?}", vm.state().unwrap())
}

impl Bench for Running {
    const RUNS: bool = true;

    fn start(disks: Vec<DiskSpec>) -> Self {
        let (lab, vm) = define(disks);
        vm.start().unwrap();
        Self { lab, vm }
    }

    fn driver(&self) -> Box<dyn Driver> {
        connect(&self.lab)
    }

    fn stranger(&self) -> Box<dyn Driver> {
        connect(&self.lab)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.lab.path(name)
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
        let nodes = json!({"execute": "query-named-block-nodes", "arguments": {"flat": true}});
        let nodes = self.vm.monitor(&nodes).unwrap();
        let image = self.vm.image(disk);
        let is_its_node = |node: &&serde_json::Value| {
            node["drv"] == "qcow2" && node["file"].as_str() == image.to_str()
        };
        let node = nodes.as_array().unwrap().iter().find(is_its_node).unwrap();
        let bitmap = json!({"node": node["node-name"], "name": name, "persistent": true});
        let add = json!({"execute": "block-dirty-bitmap-add", "arguments": bitmap});
        self.vm.monitor(&add).unwrap();
    }

    fn shape(&self) -> String {
        shape(&self.lab, &self.vm)
    }

    fn cycle(&self) {
        self.vm.destroy().unwrap();
        self.vm.start().unwrap();
    }

    fn crash(&self) {
        self.vm.kill_qemu().unwrap();
        self.vm.start().unwrap();
    }

    fn turn(&self) {
        self.vm.kill_qemu().unwrap();
    }
}
