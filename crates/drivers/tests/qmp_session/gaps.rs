//! The guest writes between every two commands of a session.
//!
//! What the guest has written is known, byte by byte, so what a point must hold
//! is known as well: the disks as they were when the first one was switched. A
//! guest that is stopped writes nothing, as a real one does not.

use std::cell::RefCell;
use std::rc::Rc;

use highwater_hypervisor::{Begun, Driver as _, MarkOrder};
use highwater_model::MarkName;
use highwater_model::step::Step;
use highwater_testkit::{Attach, BareLab, BareVm, DiskSpec, MIB, Qemu};

use crate::hook::{at_each_step, at_no_step};
use crate::reading::{dirty_ranges, read_export};
use crate::rig::{Rig, mark_of};

const SIZE: u64 = 4 * MIB;
const CLUSTER: u64 = 64 << 10;
/// What a guest writes at once.
const BLOCK: u64 = 4 << 10;

fn place(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap()
}

/// The guest: what it writes next, and what its disks hold.
struct Guest {
    vm: BareVm,
    targets: Vec<&'static str>,
    disks: Vec<Vec<u8>>,
    /// What they held when the first one was switched.
    point: Option<Vec<Vec<u8>>>,
    random: u64,
    written: usize,
}

impl Guest {
    fn below(&mut self, limit: u64) -> u64 {
        // Knuth's MMIX; the high bits are good enough.
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % limit
    }

    /// Writes, zeroes or discards something somewhere.
    fn write(&mut self) {
        let targets = u64::try_from(self.targets.len()).unwrap();
        let disk = place(self.below(targets));
        let kind = self.below(5);
        let unit = if kind == 4 { CLUSTER } else { BLOCK };
        let length = (1 + self.below(40 * BLOCK / unit)) * unit;
        let offset = self.below((SIZE - length) / unit) * unit;
        let byte = u8::try_from(1 + self.below(255)).unwrap();
        let (command, byte) = match kind {
            0 | 1 => (format!("write -P {byte}"), byte),
            2 => ("write -z".to_owned(), 0),
            3 => ("write -z -u".to_owned(), 0),
            _ => ("discard".to_owned(), 0),
        };
        let command = format!("{command} {offset} {length}");
        self.vm.write(self.targets[disk], &command).unwrap();
        self.disks[disk][place(offset)..place(offset + length)].fill(byte);
        self.written += 1;
    }

    fn at(&mut self, step: Step) {
        if step == Step::QmpSwitched && self.point.is_none() {
            self.point = Some(self.disks.clone());
        }
        if self.vm.state().unwrap() != "running" {
            return;
        }
        for _ in 0..=self.below(2) {
            self.write();
        }
    }
}

/// What was read of all points so far, one image for each disk.
type Chain = Vec<Vec<u8>>;

fn read_whole(rig: &Rig, begun: &Begun) -> Chain {
    let read = |export| std::fs::read(read_export(export, &rig.lab().path("read.raw"))).unwrap();
    begun.exports.iter().map(read).collect()
}

/// Copies what is dirty, as a backup does.
fn copy_dirty(begun: &Begun, whole: &Chain, chain: &mut Chain) {
    for (index, export) in begun.exports.iter().enumerate() {
        for (offset, length) in dirty_ranges(export) {
            let range = place(offset)..place(offset + length);
            chain[index][range.clone()].copy_from_slice(&whole[index][range]);
        }
    }
}

fn assert_equal(what: &str, found: &Chain, wanted: &Chain) {
    for (index, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        let differs = found
            .iter()
            .zip(wanted)
            .position(|(one, other)| one != other);
        assert!(
            differs.is_none() && found.len() == wanted.len(),
            "{what}: disk {index} differs at {differs:?}"
        );
    }
}

/// A life of several points, some of them given up half-way.
fn lives(qemu: Qemu, targets: &[&'static str], seed: u64, rounds: usize) {
    let lab = BareLab::start().unwrap();
    let mut vm = lab.vm("web01").qemu(qemu);
    for target in targets {
        let attach = Attach::drive().options(",discard=unmap");
        vm = vm.disk_as(DiskSpec::qcow2(target, SIZE), attach);
    }
    let mut rig = Rig::at(vm.start().unwrap());
    let names: Vec<String> = {
        let facts = rig.driver.observe(&rig.found.clone()).unwrap();
        facts.disks.iter().map(|disk| disk.target.clone()).collect()
    };
    let guest = Rc::new(RefCell::new(Guest {
        vm: rig.vm.clone(),
        targets: targets.to_vec(),
        disks: vec![vec![0; place(SIZE)]; targets.len()],
        point: None,
        random: seed,
        written: 0,
    }));
    let hooked = Rc::clone(&guest);
    at_each_step(move |step| hooked.borrow_mut().at(step));
    let mut parent: Option<MarkName> = None;
    let mut chain: Chain = Vec::new();
    for round in 0..rounds {
        let what = format!("seed {seed}, point {round}");
        (0..4).for_each(|_| guest.borrow_mut().write());
        guest.borrow_mut().point = None;
        let before = guest.borrow().written;
        let disks: Vec<_> = names
            .iter()
            .map(|name| (name.as_str(), parent.as_ref()))
            .collect();
        let order = rig.order(&disks);
        let begun = rig.driver.begin(&order).unwrap();
        assert_eq!(begun.stopped_us.is_some(), targets.len() > 1);
        assert!(guest.borrow().written > before + 10, "few gaps were hit");
        let point = guest.borrow().point.clone().unwrap();
        let whole = read_whole(&rig, &begun);
        assert_equal(&what, &whole, &point);
        let is_given_up = round % 3 == 2;
        if !is_given_up {
            if parent.is_some() {
                copy_dirty(&begun, &whole, &mut chain);
            } else {
                chain = whole;
            }
            assert_equal(&format!("{what}, chain"), &chain, &point);
        }
        rig.driver.end(&order).unwrap();
        let new = mark_of(&order).clone();
        let old = if is_given_up {
            Some(new)
        } else {
            parent.replace(new)
        };
        if let Some(old) = old {
            rig.driver.mark(&order.vm, &MarkOrder::Remove(old)).unwrap();
        }
    }
    at_no_step();
    // What the guest has written is what it has: nothing was lost on the way.
    let disks = guest.borrow().disks.clone();
    for (target, wanted) in targets.iter().zip(disks) {
        let copy = lab.path("disk.raw");
        rig.vm.raw_copy(target, &copy).unwrap();
        assert_equal(target, &vec![std::fs::read(copy).unwrap()], &vec![wanted]);
    }
}

#[test]
fn what_the_guest_writes_between_any_two_commands_is_in_the_next_increment() {
    for seed in 1..=6 {
        lives(Qemu::System, &["vda"], seed, 8);
    }
}

#[test]
fn several_disks_have_one_point_whatever_the_guest_writes_between_any_two_commands() {
    for seed in 11..=14 {
        lives(Qemu::System, &["vda", "vdb", "vdc"], seed, 8);
    }
}

#[test]
fn so_it_is_with_qemu_7_2() {
    lives(Qemu::V7_2, &["vda"], 21, 8);
    lives(Qemu::V7_2, &["vda", "vdb", "vdc"], 22, 8);
}
