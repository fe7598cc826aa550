//! A session is killed after every one of its commands, with nobody left who
//! knows of it.

use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;

use highwater_drivers::qmp::QmpDriver;
use highwater_hypervisor::{BeginOrder, Driver as _, JobFacts, MarkOrder, RunState};
use highwater_model::{MarkName, SystemClock};
use highwater_testkit::{Attach, BareLab, DiskSpec, Graph, MIB};
use serde::{Deserialize, Serialize};

use crate::hook::at_each_step;
use crate::reading::read_export;
use crate::rig::{Rig, mark_of};

const SIZE: u64 = 8 * MIB;
/// In the child: the file that says what to do.
const CHILD: &str = "HIGHWATER_TEST_DIES";
const KILL: i32 = 9;

/// What a child does, and when it dies.
#[derive(Serialize, Deserialize)]
struct Errand {
    uri: String,
    order: BeginOrder,
    /// Begins and ends a session; else sweeps.
    is_session: bool,
    /// Steps that it survives.
    steps: usize,
}

impl Errand {
    /// Does it, unless this process is no child.
    fn run_in_child() -> bool {
        let Some(file) = std::env::var_os(CHILD) else {
            return false;
        };
        let told = Path::new(&file).with_extension("step");
        let errand: Self = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        let mut left = errand.steps;
        at_each_step(move |step| {
            if left == 0 {
                std::fs::write(&told, step.word()).unwrap();
                let me = rustix::process::getpid();
                rustix::process::kill_process(me, rustix::process::Signal::KILL).unwrap();
            }
            left -= 1;
        });
        let mut driver = QmpDriver::connect(&errand.uri, Arc::new(SystemClock)).unwrap();
        let order = &errand.order;
        if errand.is_session {
            driver.begin(order).unwrap();
            driver.end(order).unwrap();
        } else {
            driver.sweep(&order.vm, &[]).unwrap();
        }
        true
    }

    /// Has a child run the same test, and do it. Returns where it died; `None` if it did all of it.
    fn run(&self, dir: &Path) -> Option<String> {
        let file = dir.join("errand.json");
        std::fs::write(&file, serde_json::to_vec(self).unwrap()).unwrap();
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", thread::current().name().unwrap()])
            .env(CHILD, &file)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            return None;
        }
        assert_eq!(output.status.signal(), Some(KILL), "{said}");
        Some(std::fs::read_to_string(file.with_extension("step")).unwrap())
    }
}

/// A VM with two disks, of which one is behind a throttle, with a mark on both.
struct Scene {
    rig: Rig,
    names: Vec<String>,
    parent: MarkName,
    tidy: Graph,
}

impl Scene {
    fn start() -> Self {
        let lab = BareLab::start().unwrap();
        let vm = lab
            .vm("web01")
            .disk(DiskSpec::qcow2("vda", SIZE))
            .disk_as(
                DiskSpec::qcow2("vdb", SIZE),
                Attach::blockdev("virtio-blk-pci").throttled(),
            )
            .start()
            .unwrap();
        let mut rig = Rig::at(vm);
        rig.vm.write("vda", "write -P 1 0 1M").unwrap();
        rig.vm.write("vdb", "write -P 2 0 1M").unwrap();
        let facts = rig.driver.observe(&rig.found.clone()).unwrap();
        let names: Vec<String> = facts.disks.iter().map(|it| it.target.clone()).collect();
        let disks: Vec<_> = names.iter().map(|name| (name.as_str(), None)).collect();
        let order = rig.order(&disks);
        rig.driver.begin(&order).unwrap();
        rig.driver.end(&order).unwrap();
        Self {
            tidy: rig.vm.graph().unwrap(),
            parent: mark_of(&order).clone(),
            names,
            rig,
        }
    }

    fn order(&self) -> BeginOrder {
        let disks = self
            .names
            .iter()
            .map(|name| (name.as_str(), Some(&self.parent)));
        self.rig.order(&disks.collect::<Vec<_>>())
    }

    /// Has a child do something, with nobody else at the monitor.
    fn child(
        mut self,
        is_session: bool,
        order: &BeginOrder,
        steps: usize,
    ) -> (Self, Option<String>) {
        let errand = Errand {
            uri: self.rig.vm.uri(),
            order: order.clone(),
            is_session,
            steps,
        };
        let Rig { driver, vm, found } = self.rig;
        drop(driver);
        let died = errand.run(&vm.lab().dir());
        self.rig = Rig {
            driver: crate::rig::connect(&vm),
            vm,
            found,
        };
        (self, died)
    }

    /// What the next run finds is put right, and nothing else is.
    fn heals(&mut self, order: &BeginOrder, what: &str, ends_leftover: bool) {
        self.rig.vm.write("vda", "write -P 9 3M 64k").unwrap();
        let found = self.rig.found.clone();
        let facts = self.rig.driver.observe(&found).unwrap();
        if let (Some(JobFacts::Ours(session)), true) = (&facts.job, ends_leftover) {
            assert_eq!(*session, order.session, "{what}");
            self.rig.driver.end_leftover(&found, *session).unwrap();
        }
        let places = self.rig.places();
        self.rig.driver.sweep(&found, &places).unwrap();
        let left = self.rig.driver.leftovers(&found, &places).unwrap();
        assert!(left.is_empty(), "{what}: {left:?}");
        let new = mark_of(order).clone();
        self.rig
            .driver
            .mark(&found, &MarkOrder::Remove(new))
            .unwrap();
        assert_eq!(self.rig.vm.graph().unwrap(), self.tidy, "{what}");
        self.rig.vm.no_nbd_server().unwrap();
        let again = self.rig.driver.sweep(&found, &places).unwrap();
        assert_eq!(again, highwater_hypervisor::Swept::default(), "{what}");
    }

    fn is_backed_up(&mut self, what: &str) {
        let order = self.order();
        let begun = self
            .rig
            .driver
            .begin(&order)
            .unwrap_or_else(|error| panic!("{what}: {error:?}"));
        for (export, disk) in begun.exports.iter().zip(["vda", "vdb"]) {
            let lab = self.rig.lab();
            let (read, copy) = (lab.path("read.raw"), lab.path("copy.raw"));
            self.rig.vm.raw_copy(disk, &copy).unwrap();
            let read = std::fs::read(read_export(export, &read)).unwrap();
            assert!(read == std::fs::read(copy).unwrap(), "{what}");
        }
        self.rig.driver.end(&order).unwrap();
        let new = mark_of(&order).clone();
        self.rig
            .driver
            .mark(&order.vm, &MarkOrder::Remove(new))
            .unwrap();
    }
}

#[test]
fn a_session_killed_after_any_command_is_undone_by_whoever_finds_it() {
    if Errand::run_in_child() {
        return;
    }
    let mut scene = Scene::start();
    for steps in 0.. {
        let order = scene.order();
        let died;
        (scene, died) = scene.child(true, &order, steps);
        let Some(what) = died else {
            assert!(steps > 25, "only {steps} steps were cut");
            break;
        };
        if steps % 4 == 3 {
            // Only QEMU itself still knows of it.
            for place in scene.rig.places() {
                drop(std::fs::remove_dir_all(place));
            }
        }
        scene.heals(&order, &what, steps % 2 == 1);
        if steps % 4 != 3 {
            scene.rig.assert_no_files();
        }
        scene.is_backed_up(&what);
    }
}

#[test]
fn a_sweep_killed_after_any_command_is_done_by_the_next() {
    if Errand::run_in_child() {
        return;
    }
    let mut scene = Scene::start();
    for steps in 0.. {
        let order = scene.order();
        scene.rig.driver.begin(&order).unwrap();
        let died;
        (scene, died) = scene.child(false, &order, steps);
        let what = died.clone().unwrap_or_default();
        scene.heals(&order, &what, false);
        scene.rig.assert_no_files();
        if died.is_none() {
            assert!(steps > 8, "only {steps} steps were cut");
            break;
        }
    }
}

#[test]
fn a_guest_that_a_dead_session_stopped_runs_again_and_one_that_somebody_else_stopped_does_not() {
    if Errand::run_in_child() {
        return;
    }
    let mut scene = Scene::start();
    let mut stopped = 0;
    for steps in 0.. {
        let order = scene.order();
        let died;
        (scene, died) = scene.child(true, &order, steps);
        let Some(what) = died else { break };
        let was_stopped = scene.rig.vm.state().unwrap() != "running";
        stopped += usize::from(was_stopped);
        if !was_stopped {
            scene.rig.vm.qmp("stop", &serde_json::json!({})).unwrap();
        }
        let found = scene.rig.found.clone();
        let noted = scene
            .rig
            .vm
            .graph()
            .unwrap()
            .objects
            .iter()
            .any(|it| it.starts_with("hw-stop-"));
        let swept = scene.rig.driver.sweep(&found, &scene.rig.places()).unwrap();
        let state = scene.rig.driver.list().unwrap()[0].1;
        if was_stopped {
            assert!(
                swept.warnings.iter().any(|it| it.contains("runs again")),
                "{what}: {swept:?}"
            );
            assert_eq!(state, RunState::Running, "{what}");
        } else if !noted {
            assert_eq!(state, RunState::Paused, "{what}");
            scene.rig.vm.qmp("cont", &serde_json::json!({})).unwrap();
        }
        let new = mark_of(&order).clone();
        scene
            .rig
            .driver
            .mark(&found, &MarkOrder::Remove(new))
            .unwrap();
        assert_eq!(scene.rig.vm.graph().unwrap(), scene.tidy, "{what}");
    }
    assert!(stopped >= 3, "the guest was stopped {stopped} times");
}
