//! A bench with a driver connected to it, and orders for it.

use highwater_hypervisor::{
    BeginOrder, Begun, DiskOrder, Driver, MarkOrder, NewMark, Quiesce, ReadMode, VmFacts, VmRef,
    WhenStarted,
};
use highwater_model::{MarkName, Nonce, SessionId};
use highwater_testkit::{DiskSpec, MIB, compare_images};

use crate::bench::{Bench, in_a_process_that_dies};
use crate::reading::{dirty_ranges, mark_name, read_export};

pub(crate) struct Stage<B> {
    // First: what it holds of the VM goes before the VM.
    pub(crate) driver: Box<dyn Driver>,
    pub(crate) vm: VmRef,
    pub(crate) bench: B,
}

impl<B: Bench> Stage<B> {
    /// A VM with disks `vda`, `vdb` ... of 16 MiB.
    pub(crate) fn start(disks: usize) -> Self {
        let targets = ["vda", "vdb", "vdc"].into_iter().take(disks);
        let specs = targets.map(|target| DiskSpec::qcow2(target, 16 * MIB));
        let bench = B::start(specs.collect());
        let mut driver = bench.driver();
        let vm = driver.find("web01").unwrap();
        Self { driver, vm, bench }
    }

    pub(crate) fn observe(&mut self) -> VmFacts {
        self.driver.observe(&self.vm).unwrap()
    }

    pub(crate) fn write(&self, disk: &str, command: &str) {
        self.bench.write(&[(disk, command.to_owned())]);
    }

    /// An order over `disks` (target and mark to read since), leaving a new mark
    /// on all of them.
    pub(crate) fn order(&self, disks: &[(&str, Option<&MarkName>)]) -> BeginOrder {
        let session = SessionId::random();
        let target = |disk: &(&str, Option<&MarkName>)| disk.0.to_owned();
        BeginOrder {
            vm: self.vm.clone(),
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
            socket_dir: self.bench.path(&format!("run/{session}")),
            scratch_dir: self.bench.path(&format!("scratch/{session}")),
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

    /// Removes a mark.
    pub(crate) fn remove(&mut self, mark: &MarkName) {
        let order = MarkOrder::Remove(mark.clone());
        self.driver.mark(&self.vm, &order).unwrap();
    }

    /// Begins a session in a process that dies at once; connects again.
    pub(crate) fn die_in(&mut self, order: &BeginOrder) {
        // Some have one door, for one driver at a time.
        self.driver = self.bench.stranger();
        let bench = &self.bench;
        in_a_process_that_dies(|| bench.driver().begin(order).map(drop).unwrap());
        self.driver = self.bench.driver();
    }

    /// Fails unless each export holds the disk as it was copied to `name-TARGET`.
    pub(crate) fn assert_points(&self, begun: &Begun, name: &str) {
        for export in &begun.exports {
            let copy = self.copy_path(name, &export.target);
            let read = self.bench.path("read.raw");
            compare_images(&copy, &read_export(export, &read)).unwrap();
        }
    }

    /// Copies disks as they are now.
    pub(crate) fn copies(&self, name: &str, disks: &[&str]) {
        for disk in disks {
            self.bench.copy(disk, &self.copy_path(name, disk));
        }
    }

    fn copy_path(&self, name: &str, disk: &str) -> std::path::PathBuf {
        self.bench.path(&format!("{name}-{disk}.raw"))
    }

    /// Fails unless an earlier copy, with the dirty ranges of each export laid
    /// over it, is the disk as it was copied later.
    pub(crate) fn assert_increments(&self, begun: &Begun, from: &str, to: &str) {
        for export in &begun.exports {
            let mut disk = std::fs::read(self.copy_path(from, &export.target)).unwrap();
            let now = read_export(export, &self.bench.path("read.raw"));
            let now = std::fs::read(now).unwrap();
            for (offset, len) in dirty_ranges(export) {
                let range =
                    usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap();
                disk[range.clone()].copy_from_slice(&now[range]);
            }
            let expected = std::fs::read(self.copy_path(to, &export.target)).unwrap();
            let differs = disk.iter().zip(&expected).position(|(is, due)| is != due);
            assert_eq!(differs, None, "{} at this offset", export.target);
        }
    }

    /// Returns the names of all bitmaps of a disk, sorted.
    pub(crate) fn names(&self, disk: &str) -> Vec<String> {
        let bitmaps = self.bench.bitmaps(disk).into_iter();
        let mut names: Vec<_> = bitmaps.map(|bitmap| bitmap.name).collect();
        names.sort();
        names
    }
}

pub(crate) fn new_mark(order: &BeginOrder) -> MarkName {
    order.new_mark.as_ref().unwrap().name.clone()
}

pub(crate) fn assert_no_directories(order: &BeginOrder) {
    for dir in [&order.socket_dir, &order.scratch_dir] {
        assert!(!dir.exists(), "{}", dir.display());
    }
}
