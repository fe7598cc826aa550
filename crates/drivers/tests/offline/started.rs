//! A VM that is started while it is backed up.

use std::fs;
use std::time::Duration;

use highwater_hypervisor::{Driver as _, ErrorKind, MarkOrder, RootNode, RunState, WhenStarted};

use highwater_testkit::{BareLab, DiskSpec, MIB, compare_images, tool, wait_until};

use crate::reading::read_export;
use crate::rig::{Rig, assert_lost, new_mark};

#[test]
fn a_vm_starts_at_once_and_its_session_is_lost_but_no_write() {
    let mut rig = Rig::new(&["vda", "vdb"]);
    let order = rig.order(&[("vda", None), ("vdb", None)]);
    rig.driver.begin(&order).unwrap();
    rig.check(&order).unwrap();
    rig.machine.start().unwrap();
    assert!(rig.driver.is_alarmed(order.session));
    assert_lost(rig.check(&order), "open for writing");
    rig.machine.write("vda", "write -P 9 2M 64k").unwrap();
    // Lost once is lost, whatever is seen later.
    rig.machine.quit().unwrap();
    assert_lost(rig.check(&order), "open for writing");
    rig.end(&order);
    let bitmap = rig.bitmap("vda", &new_mark(&order)).unwrap();
    assert_eq!((bitmap.recording, bitmap.dirty_bytes), (true, 64 << 10));
}

#[test]
fn a_vm_that_ran_between_two_looks_is_seen() {
    let mut rig = Rig::new(&["vda"]);
    let order = rig.order(&[("vda", None)]);
    rig.driver.begin(&order).unwrap();
    rig.check(&order).unwrap();
    rig.machine.start().unwrap();
    rig.machine.write("vda", "write -P 9 2M 64k").unwrap();
    rig.machine.quit().unwrap();
    assert_lost(rig.check(&order), "not as it was");
    rig.end(&order);
}

#[test]
fn with_hold_no_vm_starts_before_the_session_has_ended() {
    for disk in [DiskSpec::qcow2("vda", MIB), DiskSpec::raw("vda", MIB)] {
        let mut rig = Rig::with(vec![disk]);
        let mut order = rig.order(&[("vda", None)]);
        order.new_mark = None;
        order.when_started = WhenStarted::Hold;
        rig.driver.begin(&order).unwrap();
        let refused = format!("{:#}", rig.machine.start().unwrap_err());
        assert!(refused.contains("lock"), "{refused}");
        rig.check(&order).unwrap();
        rig.end(&order);
        rig.machine.start().unwrap();
    }
}

#[test]
fn images_of_a_running_vm_are_neither_read_nor_marked() {
    let mut rig = Rig::new(&["vda"]);
    let mark = rig.leave_mark(&["vda"]);
    rig.machine.start().unwrap();
    let vm = rig.vm();
    let facts = rig.driver.observe(&vm).unwrap();
    assert_eq!(facts.run_state, RunState::Other);
    let RootNode::Unknown(why) = &facts.disks[0].root_node else {
        panic!("{facts:?}")
    };
    let process = format!("process {}", rig.machine.pid().unwrap());
    assert!(why.contains(&process), "{why}");
    let order = rig.order(&[("vda", None)]);
    let error = rig.driver.begin(&order).unwrap_err();
    assert_eq!(error.kind, ErrorKind::WrongState, "{error:?}");
    assert!(error.because[0].contains(&process), "{error:?}");
    let error = rig
        .driver
        .mark(&vm, &MarkOrder::Remove(mark.clone()))
        .unwrap_err();
    assert_eq!(error.kind, ErrorKind::Busy, "{error:?}");
    rig.machine.quit().unwrap();
    assert!(rig.bitmap("vda", &mark).unwrap().recording);
    assert_eq!(rig.bitmap("vda", &new_mark(&order)), None);
    rig.driver
        .mark(&vm, &MarkOrder::Remove(mark.clone()))
        .unwrap();
    rig.driver
        .mark(&vm, &MarkOrder::Remove(mark.clone()))
        .unwrap();
    assert_eq!(rig.bitmap("vda", &mark), None);
}

#[test]
fn an_image_that_a_program_without_locks_may_write_to_is_not_read() {
    let mut rig = Rig::new(&["vda"]);
    let order = rig.order(&[("vda", None)]);
    let image = rig.machine.image("vda");
    let writer = fs::OpenOptions::new().write(true).open(&image).unwrap();
    let error = rig.driver.begin(&order).unwrap_err();
    assert_eq!(error.kind, ErrorKind::WrongState, "{error:?}");
    assert!(error.because[0].contains("open for writing"), "{error:?}");
    assert_eq!(rig.bitmap("vda", &new_mark(&order)), None);
    drop(writer);
    rig.driver.begin(&order).unwrap();
    rig.end(&order);
}

#[test]
fn an_image_that_is_moved_away_ends_the_session() {
    let mut rig = Rig::new(&["vda"]);
    let order = rig.order(&[("vda", None)]);
    rig.driver.begin(&order).unwrap();
    let image = rig.machine.image("vda");
    fs::rename(&image, rig.lab.path("elsewhere")).unwrap();
    assert_lost(rig.check(&order), "not as it was");
    fs::rename(rig.lab.path("elsewhere"), &image).unwrap();
    rig.end(&order);
}

#[test]
fn whenever_a_vm_starts_while_a_session_begins_no_write_is_missed() {
    let mut rig = Rig::new(&["vda", "vdb"]);
    let mut sessions = 0;
    for round in 0..16_u32 {
        let order = rig.order(&[("vda", None), ("vdb", None)]);
        let Rig {
            driver, machine, ..
        } = &mut rig;
        let (begun, looked) = std::thread::scope(|scope| {
            let (written, until_written) = std::sync::mpsc::channel::<()>();
            let order = &order;
            // What it begins dies with it.
            let session = scope.spawn(move || {
                let begun = driver.begin(order).map(drop);
                // Fails if the VM could not be started, which is told there.
                let _ = until_written.recv();
                let looked = driver.check(&order.vm, order.session);
                drop(driver.end(order));
                (begun, looked)
            });
            std::thread::sleep(Duration::from_millis(u64::from(round) * 6));
            // While a mark is added, the image is somebody's.
            let start = || Ok(machine.start().is_ok());
            wait_until("the VM starts", Duration::from_secs(20), start).unwrap();
            let write = format!("write -P {} {}k 64k", round + 1, u64::from(round) * 64);
            let writes = [("vda", write.clone()), ("vdb", write)];
            machine.write_each(&writes).unwrap();
            written.send(()).unwrap();
            let outcome = session.join().unwrap();
            machine.quit().unwrap();
            outcome
        });
        assert!(looked.is_err(), "a session beside a VM that runs stands");
        let mark = new_mark(&order);
        for disk in ["vda", "vdb"] {
            let bitmap = rig.bitmap(disk, &mark);
            match (&begun, bitmap) {
                (Ok(()), Some(bitmap)) => {
                    assert!(bitmap.recording && !bitmap.inconsistent, "{bitmap:?}");
                    assert_eq!(bitmap.dirty_bytes, 64 << 10, "round {round}, {disk}");
                }
                (Ok(()), None) => panic!("round {round}: the mark of {disk} is gone"),
                (Err(_), None) => {}
                // It ran before it could be taken off again.
                (Err(error), Some(_)) => assert!(error.left_behind, "{error:?}"),
            }
        }
        sessions += u32::from(begun.is_ok());
        let vm = rig.vm();
        rig.driver.mark(&vm, &MarkOrder::Remove(mark)).unwrap();
    }
    assert!(sessions > 0, "no session began before the VM was started");
}

/// A loop device, which ends with this.
struct Loop(std::path::PathBuf);

impl Loop {
    fn over(file: &std::path::Path) -> Self {
        let device = tool("losetup").args(["--find", "--show"]).arg(file).run();
        Self(device.unwrap().trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        drop(tool("losetup").arg("-d").arg(&self.0).run());
    }
}

#[test]
fn a_block_device_is_read_only_by_order_and_no_vm_starts_meanwhile() {
    let lab = BareLab::start().unwrap();
    let file = lab.path("device.raw");
    fs::write(&file, vec![7; 1 << 20]).unwrap();
    let device = Loop::over(&file);
    let disk = DiskSpec::existing("vda", &device.0, "raw");
    let mut rig = Rig::at(lab, vec![disk]);
    let mut order = rig.order(&[("vda", None)]);
    order.new_mark = None;
    // It could be in use by another host, too.
    let error = rig.driver.begin(&order).unwrap_err();
    assert_eq!(error.kind, ErrorKind::WrongState, "{error:?}");
    assert!(error.because[0].contains("block device"), "{error:?}");
    order.when_started = WhenStarted::Hold;
    let begun = rig.driver.begin(&order).unwrap();
    let read = read_export(&begun.exports[0], &rig.lab.path("read.raw"));
    compare_images(&file, &read).unwrap();
    assert!(rig.machine.start().is_err());
    rig.check(&order).unwrap();
    rig.end(&order);
    rig.machine.start().unwrap();
    let vm = rig.vm();
    assert_eq!(rig.driver.observe(&vm).unwrap().run_state, RunState::Other);
    rig.machine.quit().unwrap();
}
