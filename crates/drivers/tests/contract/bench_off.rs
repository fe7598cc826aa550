//! VMs that are off: bare images, and libvirt's.
//!
//! The guest writes between two backups, when the VM is started for that.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use highwater_drivers::offline::ImageDriver;
use highwater_hypervisor::Driver;
use highwater_model::SystemClock;
use highwater_testkit::{BareVm, BitmapSeen, DiskSpec, Lab, Vm, tool, wait_until};

use crate::bench::Bench;
use crate::bench_bare::{Named, create};
use crate::bench_libvirt::{connect, define, shape};

/// Images that belong to a VM without libvirt.
pub(crate) struct Images {
    vm: BareVm,
    targets: Vec<String>,
}

impl Images {
    fn connect(&self) -> Box<dyn Driver> {
        Box::new(ImageDriver::connect(&self.vm.image_uri(), Arc::new(SystemClock)).unwrap())
    }
}

/// Returns who has a file open, by name.
///
/// A process that was killed gives back what it has open a moment later.
fn openers(file: &Path) -> Vec<String> {
    let mut openers = Vec::new();
    for process in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(mut open) = std::fs::read_dir(process.path().join("fd")) else {
            continue;
        };
        if open.any(|fd| std::fs::read_link(fd.unwrap().path()).is_ok_and(|to| to == file)) {
            let name = std::fs::read_to_string(process.path().join("comm"));
            openers.push(name.unwrap_or_default().trim().to_owned());
        }
    }
    openers
}

fn openers_of(images: impl Iterator<Item = PathBuf>) -> Vec<String> {
    let images: Vec<_> = images.collect();
    let all = || -> Vec<String> { images.iter().flat_map(|image| openers(image)).collect() };
    let patience = std::time::Duration::from_secs(2);
    // Who is still there then is told of.
    drop(wait_until("nobody has it", patience, || {
        Ok(all().is_empty())
    }));
    all()
}

fn add_bitmap(image: &Path, name: &str) {
    let add = tool("qemu-img").args(["bitmap", "--add"]).arg(image);
    add.arg(name).run().unwrap();
}

impl Bench for Images {
    const RUNS: bool = false;

    fn start(disks: Vec<DiskSpec>) -> Self {
        let targets = disks.iter().map(|disk| disk.target().to_owned()).collect();
        let vm = create::<Named>(disks);
        Self { vm, targets }
    }

    fn driver(&self) -> Box<dyn Driver> {
        self.connect()
    }

    fn stranger(&self) -> Box<dyn Driver> {
        self.connect()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.vm.lab().path(name)
    }

    fn write(&self, writes: &[(&str, String)]) {
        self.vm.start().unwrap();
        self.vm.write_each(writes).unwrap();
        self.vm.quit().unwrap();
    }

    fn copy(&self, disk: &str, to: &Path) {
        self.vm.raw_copy(disk, to).unwrap();
    }

    fn bitmaps(&self, disk: &str) -> Vec<BitmapSeen> {
        self.vm.bitmaps(disk).unwrap()
    }

    fn add_bitmap(&self, disk: &str, name: &str) {
        add_bitmap(&self.vm.image(disk), name);
    }

    fn shape(&self) -> String {
        let images = self.targets.iter().map(|disk| self.vm.image(disk));
        format!("off, open by {:?}", openers_of(images))
    }

    fn cycle(&self) {
        self.vm.start().unwrap();
        self.vm.quit().unwrap();
    }

    fn crash(&self) {
        self.vm.start().unwrap();
        self.vm.kill().unwrap();
    }

    fn turn(&self) {
        self.vm.start().unwrap();
    }
}

/// A VM of libvirt's that is shut off.
pub(crate) struct ShutOff {
    lab: Lab,
    vm: Vm,
    targets: Vec<String>,
}

impl Bench for ShutOff {
    const RUNS: bool = false;

    fn start(disks: Vec<DiskSpec>) -> Self {
        let targets = disks.iter().map(|disk| disk.target().to_owned()).collect();
        let (lab, vm) = define(disks);
        Self { lab, vm, targets }
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
        self.vm.start().unwrap();
        self.vm.write_each(writes).unwrap();
        self.vm.destroy().unwrap();
    }

    fn copy(&self, disk: &str, to: &Path) {
        self.vm.raw_copy(disk, to).unwrap();
    }

    fn bitmaps(&self, disk: &str) -> Vec<BitmapSeen> {
        self.vm.bitmaps(disk).unwrap()
    }

    fn add_bitmap(&self, disk: &str, name: &str) {
        add_bitmap(&self.vm.image(disk), name);
    }

    fn shape(&self) -> String {
        let images = self.targets.iter().map(|disk| self.vm.image(disk));
        let openers = openers_of(images);
        format!("{}, open by {openers:?}", shape(&self.lab, &self.vm))
    }

    fn cycle(&self) {
        self.vm.start().unwrap();
        self.vm.destroy().unwrap();
    }

    fn crash(&self) {
        self.vm.start().unwrap();
        self.vm.kill_qemu().unwrap();
    }

    fn turn(&self) {
        self.vm.start().unwrap();
    }
}
