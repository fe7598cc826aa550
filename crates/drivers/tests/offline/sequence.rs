//! Off, on, off, crash, on: nothing that was written is ever called clean.

use std::collections::BTreeMap;

use highwater_hypervisor::{BeginOrder, Driver as _, ReadMode};
use highwater_model::MarkName;

use crate::reading::{dirty_ranges, read_export};
use crate::rig::{Rig, new_mark};

/// A backup's view of a disk: what it read so far, put together.
struct Kept {
    bytes: Vec<u8>,
    mark: MarkName,
}

/// Backs the disk up while it is off, from the mark if its bitmap is good, as the
/// plan would have it; compares with the disk.
fn back_up(rig: &mut Rig, kept: Option<Kept>) -> (Kept, bool) {
    let usable = kept.as_ref().and_then(|kept| rig.bitmap("vda", &kept.mark));
    let usable = usable.is_some_and(|it| it.recording && !it.inconsistent);
    let since = kept
        .as_ref()
        .filter(|_| usable)
        .map(|kept| kept.mark.clone());
    let order: BeginOrder = rig.order(&[("vda", since.as_ref())]);
    let begun = rig.driver.begin(&order).unwrap();
    let export = &begun.exports[0];
    let read = read_export(export, &rig.lab.path("read.raw"));
    let now = std::fs::read(read).unwrap();
    let bytes = match (&order.disks[0].mode, kept) {
        (ReadMode::Since(_), Some(Kept { mut bytes, .. })) => {
            for (offset, length) in dirty_ranges(export) {
                let range =
                    usize::try_from(offset).unwrap()..usize::try_from(offset + length).unwrap();
                bytes[range.clone()].copy_from_slice(&now[range]);
            }
            bytes
        }
        (_, _) => now.clone(),
    };
    rig.check(&order).unwrap();
    rig.end(&order);
    let differs = bytes.iter().zip(&now).position(|(is, due)| is != due);
    assert_eq!(differs, None, "what is kept differs at this offset");
    let mark = new_mark(&order);
    (Kept { bytes, mark }, since.is_some())
}

#[test]
fn off_on_off_crash_on_loses_nothing_and_reads_all_only_after_the_crash() {
    let mut rig = Rig::new(&["vda"]);
    let (mut kept, first) = back_up(&mut rig, None);
    assert!(!first);
    let mut seen = BTreeMap::new();
    let life = ["on", "off", "on", "crash", "crash", "on", "off", "on"];
    for (round, act) in (1_u32..).zip(life) {
        rig.machine.start().unwrap();
        let write = format!("write -P {round} {round}M 192k");
        rig.machine.write("vda", &write).unwrap();
        rig.machine.write("vda", "discard 12M 64k").unwrap();
        match act {
            "crash" => {
                rig.machine.flush("vda").unwrap();
                rig.machine.kill().unwrap();
            }
            _ => rig.machine.quit().unwrap(),
        }
        let (next, incremental) = back_up(&mut rig, Some(kept));
        kept = next;
        seen.insert(round, incremental);
    }
    let after_crashes: Vec<bool> = seen.into_values().collect();
    assert_eq!(
        after_crashes,
        [true, true, true, false, false, true, true, true]
    );
}
