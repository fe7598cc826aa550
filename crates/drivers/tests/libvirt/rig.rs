//! A lab, a driver connected to it, and orders for it.

use std::path::Path;

use crate::reading::{disk_facts, mark_name};
use highwater_drivers::libvirt::{LibvirtDriver, LibvirtOptions};
use highwater_hypervisor::{
    BeginOrder, BitmapFacts, DiskOrder, Driver as _, MarkOrder, NewMark, Quiesce, ReadMode,
    VmFacts, VmRef, WhenStarted,
};
use highwater_model::{MarkName, Nonce, SessionId};
use highwater_testkit::{Lab, Leftovers, Vm, tool};

/// A driver and the lab it is connected to.
pub(crate) struct Rig {
    pub(crate) driver: LibvirtDriver,
    pub(crate) lab: Lab,
}

impl Rig {
    pub(crate) fn start() -> Self {
        let lab = Lab::start().unwrap();
        let driver = connect(&lab);
        Self { driver, lab }
    }

    /// A second process's driver: it knows nothing of the first one's sessions.
    #[allow(dead_code, reason = "for the tests with a guest")]
    pub(crate) fn stranger(&self) -> LibvirtDriver {
        connect(&self.lab)
    }

    pub(crate) fn find(&mut self, vm: &Vm) -> VmRef {
        self.driver.find(vm.name()).unwrap()
    }

    pub(crate) fn observe(&mut self, vm: &Vm) -> VmFacts {
        let vm = self.find(vm);
        self.driver.observe(&vm).unwrap()
    }

    pub(crate) fn bitmap(&mut self, vm: &Vm, disk: &str, name: &MarkName) -> Option<BitmapFacts> {
        let name = name.to_string();
        disk_facts(&self.observe(vm), disk)
            .bitmaps
            .iter()
            .find(|one| one.name == name)
            .cloned()
    }

    /// An order over `disks` (target and mark to read since), leaving a new mark
    /// on all of them.
    pub(crate) fn order(&mut self, vm: &Vm, disks: &[(&str, Option<&MarkName>)]) -> BeginOrder {
        let session = SessionId::random();
        BeginOrder {
            vm: self.find(vm),
            session,
            disks: disks
                .iter()
                .map(|(target, since)| DiskOrder {
                    target: (*target).to_owned(),
                    mode: since.map_or(ReadMode::All, |mark| ReadMode::Since(mark.clone())),
                })
                .collect(),
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
            socket_dir: self.lab.path(&format!("run/{session}")),
            scratch_dir: self.lab.path(&format!("scratch/{session}")),
            when_started: WhenStarted::Yield,
        }
    }

    /// Backs up nothing but takes the mark: begin and end.
    pub(crate) fn leave_mark(&mut self, vm: &Vm, disks: &[&str]) -> NewMark {
        let disks: Vec<_> = disks.iter().map(|disk| (*disk, None)).collect();
        let order = self.order(vm, &disks);
        self.driver.begin(&order).unwrap();
        self.driver.end(&order).unwrap();
        order.new_mark.unwrap()
    }

    pub(crate) fn remove(&mut self, vm: &Vm, mark: &MarkName) {
        let vm = self.find(vm);
        self.driver
            .mark(&vm, &MarkOrder::Remove(mark.clone()))
            .unwrap();
    }
}

fn connect(lab: &Lab) -> LibvirtDriver {
    LibvirtDriver::connect(&lab.uri(), &LibvirtOptions::default()).unwrap()
}

/// Asserts that a session left nothing but the marks named.
pub(crate) fn assert_only_marks(rig: &Rig, vm: &Vm, order: &BeginOrder, marks: &[&MarkName]) {
    let left = vm.leftovers(&rig.lab.path("scratch")).unwrap();
    let names: Vec<String> = marks.iter().map(ToString::to_string).collect();
    let mut checkpoints = left.checkpoints.clone();
    checkpoints.sort();
    let mut expected = names.clone();
    expected.sort();
    assert_eq!(checkpoints, expected);
    assert!(
        left.bitmaps
            .iter()
            .all(|bitmap| names.iter().any(|name| bitmap.ends_with(name))),
        "{left:?}"
    );
    assert_eq!(
        Leftovers {
            checkpoints: Vec::new(),
            bitmaps: Vec::new(),
            ..left
        },
        Leftovers::default()
    );
    assert!(!order.socket_dir.exists(), "{}", order.socket_dir.display());
    assert!(
        !order.scratch_dir.exists(),
        "{}",
        order.scratch_dir.display()
    );
}

/// Makes a qcow2 image with LUKS, and a secret of libvirt's that opens it.
/// Returns the `<encryption>` element that its disk needs.
pub(crate) fn make_luks(lab: &Lab, image: &Path) -> String {
    let uuid = "f981dd17-143f-45bc-88e6-ed1fe20ce9da";
    let secret = lab.path("secret.xml");
    std::fs::write(
        &secret,
        format!("<secret ephemeral='no' private='no'><uuid>{uuid}</uuid></secret>"),
    )
    .unwrap();
    lab.virsh(&["secret-define", secret.to_str().unwrap()])
        .unwrap();
    std::fs::write(lab.path("passphrase"), "sesame").unwrap();
    let file = format!("--file={}", lab.path("passphrase").display());
    lab.virsh(&["secret-set-value", uuid, &file, "--plain"])
        .unwrap();
    tool("qemu-img")
        .args([
            "create",
            "-q",
            "-f",
            "qcow2",
            "--object",
            "secret,id=s,data=sesame",
        ])
        .args([
            "-o",
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        ])
        .arg(image)
        .arg("8M")
        .run()
        .unwrap();
    format!("<encryption format='luks'><secret type='passphrase' uuid='{uuid}'/></encryption>")
}

/// A small file system. Mounted before the lab starts: what is mounted later is
/// not seen inside.
pub(crate) struct SmallSpace(tempfile::TempDir);

impl SmallSpace {
    pub(crate) fn mount(size: &str) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("hws-")
            .tempdir_in("/dev/shm")
            .unwrap();
        tool("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"])
            .arg(dir.path())
            .run()
            .unwrap();
        Self(dir)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallSpace {
    fn drop(&mut self) {
        drop(tool("umount").arg("-l").arg(self.0.path()).run());
    }
}
