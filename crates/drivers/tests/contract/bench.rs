//! What the suite needs of a VM, however it is run.

use std::path::{Path, PathBuf};

use highwater_hypervisor::Driver;
use highwater_testkit::{BitmapSeen, DiskSpec};

/// A VM and the way to its driver.
pub(crate) trait Bench: Sized + Sync {
    /// Whether the VM runs while it is backed up. Where it is off, its guest
    /// writes between two backups: it is started and ended for that.
    const RUNS: bool;

    /// Makes a VM named `web01`.
    fn start(disks: Vec<DiskSpec>) -> Self;

    /// Connects, as a new process would.
    fn driver(&self) -> Box<dyn Driver>;

    /// Connects while another driver is connected.
    fn stranger(&self) -> Box<dyn Driver>;

    /// Returns the path of a file that QEMU sees too.
    fn path(&self, name: &str) -> PathBuf;

    /// Lets the guest write.
    fn write(&self, writes: &[(&str, String)]);

    /// Writes a disk as the guest sees it now to a raw file.
    fn copy(&self, disk: &str, to: &Path);

    /// Returns all bitmaps of a disk.
    fn bitmaps(&self, disk: &str) -> Vec<BitmapSeen>;

    /// Adds somebody else's bitmap.
    fn add_bitmap(&self, disk: &str, name: &str);

    /// Tells of all that is at the VM but bitmaps, to be compared.
    fn shape(&self) -> String;

    /// Ends QEMU in order, and starts it again; the other way round where the VM
    /// is off.
    fn cycle(&self);

    /// Kills QEMU and starts it again; the other way round where the VM is off.
    fn crash(&self);

    /// Takes the images away from a session: kills QEMU, or starts it where the
    /// VM is off.
    fn turn(&self);
}

/// Runs in a thread that ends: what was started in it dies as with a process.
pub(crate) fn in_a_process_that_dies<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(work).join().unwrap())
}
