//! Claims as QEMU's objects: two monitors are two doors to one VM.

use highwater_hypervisor::{
    Claim, Claimer, Driver as _, ErrorKind, Sign, SignKind, Signs, Stance, VmRef,
};
use highwater_model::{ClaimId, Timestamp};
use highwater_testkit::{BareLab, BareVm, Qemu};

use crate::rig::{driver, second_driver};

fn claim(number: u8, stance: Stance) -> Claim {
    Claim {
        id: ClaimId::from_bytes([number; 8]),
        stance,
        claimer: Claimer {
            host: "kvm 1 \"quoted\" \u{e4}".to_owned(),
            boot_id: "b".to_owned(),
            pid_namespace: Some(1),
            process: 2,
            start_ticks: Some(3),
            since: Timestamp::from_unix_ms(4),
        },
    }
}

fn vm(lab: &BareLab, qemu: Qemu) -> (BareVm, VmRef) {
    let vm = lab.vm("web01").qemu(qemu).prelaunch().start().unwrap();
    let name = VmRef {
        name: "web01".to_owned(),
        uuid: None,
    };
    (vm, name)
}

#[test]
fn what_one_sets_through_one_monitor_the_other_sees_through_another() {
    see_each_other(Qemu::default());
}

#[test]
fn what_one_sets_in_qemu_7_2_the_other_sees() {
    see_each_other(Qemu::V7_2);
}

fn see_each_other(qemu: Qemu) {
    let lab = BareLab::start().unwrap();
    let (vm, name) = vm(&lab, qemu);
    let (mut one, mut other) = (driver(&vm), second_driver(&vm));
    let mut here = one.claimant(&name).unwrap().unwrap();
    let mut there = other.claimant(&name).unwrap().unwrap();
    assert_eq!(there.signs().unwrap(), Signs::default());

    let (mine, yours) = (claim(1, Stance::Stands), claim(2, Stance::Yields));
    here.set(&Sign::Claim(mine.clone())).unwrap();
    there.set(&Sign::Claim(yours.clone())).unwrap();
    here.set(&Sign::Beat(mine.id, 1)).unwrap();
    here.set(&Sign::Beat(mine.id, 2)).unwrap();
    here.set(&Sign::Acting(mine.id)).unwrap();
    let seen = there.signs().unwrap();
    assert_eq!(seen, here.signs().unwrap());
    assert_eq!(seen.claim(mine.id), Some(&mine));
    assert_eq!(seen.claim(yours.id), Some(&yours));
    assert_eq!(seen.beats, [(mine.id, 2)].into());
    assert_eq!(seen.acting, [mine.id].into());

    // A sign of one's own is replaced, those of others are not touched.
    let yields = claim(1, Stance::Yields);
    here.set(&Sign::Claim(yields.clone())).unwrap();
    assert_eq!(there.signs().unwrap().claim(mine.id), Some(&yields));
    for kind in [SignKind::Claim, SignKind::Beat, SignKind::Acting] {
        here.remove(mine.id, kind).unwrap();
        here.remove(mine.id, kind).unwrap();
    }
    assert_eq!(there.signs().unwrap().claims, [yours]);
    assert!(there.signs().unwrap().beats.is_empty());
}

#[test]
fn claims_go_with_the_process_and_whoever_acts_for_one_notices() {
    let lab = BareLab::start().unwrap();
    let (vm, name) = vm(&lab, Qemu::default());
    let mut own = driver(&vm);
    let mine = claim(1, Stance::Stands);
    let mut claimant = own.claimant(&name).unwrap().unwrap();
    claimant.set(&Sign::Claim(mine.clone())).unwrap();
    own.act_for(Some(mine.id));
    own.still_claimed(&name).unwrap();
    vm.kill().unwrap();
    vm.start().unwrap();
    assert_eq!(claimant.signs().unwrap(), Signs::default());
    let error = own.still_claimed(&name).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Busy);
    own.act_for(None);
    own.still_claimed(&name).unwrap();
}

#[test]
fn a_claim_is_removed_by_hand_as_a_person_is_told_to() {
    let lab = BareLab::start().unwrap();
    let (vm, name) = vm(&lab, Qemu::default());
    let mine = claim(1, Stance::Stands);
    let mut claimant = driver(&vm).claimant(&name).unwrap().unwrap();
    claimant.set(&Sign::Claim(mine.clone())).unwrap();
    let told = claimant.removal_by_hand(mine.id);
    let json = &told[told.find('{').unwrap()..=told.rfind('}').unwrap()];
    let command: serde_json::Value = serde_json::from_str(json).unwrap();
    let name = command["execute"].as_str().unwrap();
    vm.qmp(name, &command["arguments"]).unwrap();
    assert_eq!(claimant.signs().unwrap(), Signs::default());
}

#[test]
fn a_vm_that_was_not_resumed_cannot_be_claimed() {
    let lab = BareLab::start().unwrap();
    let vm = lab.vm("web01").incoming().start().unwrap();
    let mut own = driver(&vm);
    let name = own.find("web01").unwrap();
    assert!(own.claimant(&name).unwrap().is_none());
}
