//! A launcher starts QEMU with its flags, as SlapOS does; backups come like
//! cron's, and everything is killed in every order. After each of it, the next
//! plain backup is good, and no operator has done anything.

use anyhow::{Context as _, Result, ensure};
use highwater_model::step::Step;
use highwater_testkit::{Attach, BareVm, DiskSpec, MIB, tool};
use serde_json::{Value, json};

use crate::processes::{guard_of, mover_of, signal, wait_for_end};
use crate::tale::{BareBed, Tale};
use crate::waiting::{Waiting, wait_until};

/// The flags of the launcher, but for KVM, the network and the screen.
fn launched(bed: &BareBed) -> Result<Tale> {
    let cd = bed.lab.path("boot.iso");
    std::fs::write(&cd, vec![0; 1 << 20])?;
    let disk = DiskSpec::qcow2("virtio0", 64 * MIB);
    // Not named by the launcher: QEMU calls it virtio0 and its node `#block123`.
    let vm = bed.lab.vm("kvm0").disk_as(disk, Attach::drive());
    let vm = vm.args([
        "-boot",
        "menu=on",
        "-device",
        "usb-ehci,id=usb",
        "-drive",
        &format!(
            "file={},media=cdrom,if=ide,id=ide0-cd0,format=raw",
            cd.display()
        ),
        "-msg",
        "timestamp=on",
    ]);
    let vm = vm.start()?;
    let tale = Tale::of(bed, &vm, &["virtio0"]);
    tale.writes(1)?;
    Ok(tale)
}

fn backup_at(tale: &Tale, step: Step) -> Result<Waiting> {
    let command = tale.bed.command(&tale.vm.uri(), &["backup", "kvm0"]);
    let dir = tale.bed.lab.dir();
    Waiting::at(command, &dir, step, "wait")
}

#[test]
fn cron_goes_on_whatever_is_killed_in_whatever_order() -> Result<()> {
    let bed = BareBed::start()?;
    let mut tale = launched(&bed)?;
    tale.backs_up(&["full: first-backup"])?;
    let before = tale.vm.graph()?;
    // Of our three processes, in every order; QEMU lives.
    let orders = [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ];
    for (round, order) in (2_u8..).zip(orders) {
        tale.writes(round)?;
        let mut waiting = backup_at(&tale, Step::Begun)?;
        tale.writes(round + 20)?;
        let (mover, guard) = (mover_of(&waiting.run)?, guard_of(&waiting.run)?);
        let pids = [waiting.run.id(), mover, guard];
        for number in order {
            signal("-KILL", pids[number])?;
        }
        waiting.run.wait()?;
        wait_for_end(mover)?;
        wait_for_end(guard)?;
        tale.writes(round + 40)?;
        tale.backs_up(&["incremental"])?;
        tale.is_tidy(&before)?;
    }
    tale.ends_well()
}

/// What dies first when the machine's time has come.
#[derive(Debug, Clone, Copy)]
enum First {
    Qemu,
    Tool,
}

#[test]
fn qemu_and_tool_killed_in_either_order_cost_a_rescan_and_nothing_else() -> Result<()> {
    let bed = BareBed::start()?;
    let mut tale = launched(&bed)?;
    tale.backs_up(&["full: first-backup"])?;
    for (round, first) in (2_u8..).zip([First::Qemu, First::Tool, First::Qemu]) {
        // Once it is stored, the bitmap dangles after the crash.
        if round > 2 {
            tale.vm.quit()?;
            tale.vm.start()?;
        }
        tale.writes(round)?;
        let mut waiting = backup_at(&tale, Step::Begun)?;
        tale.writes(round + 20)?;
        match first {
            First::Qemu => {
                tale.vm.kill()?;
                waiting.kill_all()?;
            }
            First::Tool => {
                waiting.kill_all()?;
                tale.vm.kill()?;
            }
        }
        tale.vm.start()?;
        tale.writes(round + 40)?;
        let expected = match round {
            2 => "rescan: bitmap-missing",
            _ => "rescan: bitmap-inconsistent",
        };
        tale.backs_up(&[expected])?;
        tale.one_mark_each()?;
        tale.no_files()?;
        tale.writes(round + 60)?;
        tale.backs_up(&["incremental"])?;
    }
    tale.ends_well()
}

#[test]
fn qemu_stopped_in_order_during_a_backup_costs_nothing_but_that_backup() -> Result<()> {
    let bed = BareBed::start()?;
    let mut tale = launched(&bed)?;
    tale.backs_up(&["full: first-backup"])?;
    for (round, end) in (2_u8..).zip([BareVm::quit, BareVm::terminate]) {
        tale.writes(round)?;
        let waiting = backup_at(&tale, Step::Begun)?;
        tale.writes(round + 20)?;
        end(&tale.vm)?;
        waiting.go()?;
        let ended = waiting.end(Ok(()))?;
        ensure!(
            ended.status.code() == Some(1),
            "{}: {}",
            ended.status,
            ended.said
        );
        ensure!(ended.said.contains("state: "), "{}", ended.said);
        tale.vm.start()?;
        tale.writes(round + 40)?;
        tale.backs_up(&["incremental"])?;
        tale.one_mark_each()?;
        tale.no_files()?;
    }
    tale.ends_well()
}

/// Seed 000: reboot in mid-backup, twice, each time with the bitmap of the last
/// good backup stored in the image. It then dangles, and the nodes of the dead
/// backup would be duplicates if the next one took the same names.
#[test]
fn a_reboot_in_mid_backup_is_healed_by_the_next_backup_alone() -> Result<()> {
    let bed = BareBed::start()?;
    let mut tale = launched(&bed)?;
    tale.backs_up(&["full: first-backup"])?;
    tale.vm.quit()?;
    tale.vm.start()?;
    tale.writes(2)?;
    let mut waiting = backup_at(&tale, Step::PackStored)?;
    // The server reboots.
    waiting.kill_all()?;
    tale.vm.kill()?;
    let dangling = tale.vm.bitmaps("virtio0")?;
    ensure!(dangling.iter().any(|it| it.inconsistent), "{dangling:?}");
    tale.vm.start()?;
    tale.writes(3)?;
    let report = tale.backs_up(&["rescan: bitmap-inconsistent"])?;
    let healed = report["healed"].as_array().context("what was healed")?;
    ensure!(!healed.is_empty(), "{report}");
    tale.writes(4)?;
    // This time only the tool dies, twice in a row, and its nodes stay.
    for step in [Step::Begun, Step::Copied] {
        backup_at(&tale, step)?.kill_all()?;
        tale.writes(5)?;
    }
    tale.backs_up(&["incremental"])?;
    tale.one_mark_each()?;
    tale.no_files()?;
    tale.ends_well()
}

/// The other program's commands, as it sends them, up to its running job.
fn qmpbackup_begins(tale: &Tale, uuid: &str, stamp: u32) -> Result<()> {
    let vm = &tale.vm;
    let target = tale.bed.lab.path("backup/virtual.qcow2");
    std::fs::create_dir_all(&target)?;
    let partial = target.join(format!("FULL-{stamp}-virtual.qcow2.partial"));
    let fleece = tale
        .bed
        .lab
        .path(&format!("FULL-{stamp}-virtio0.fleece.qcow2"));
    let node = vm.node("virtio0")?;
    let safe = node.replace('#', "");
    let size = 64 * MIB;
    for image in [&partial, &fleece] {
        let create = tool("qemu-img").args(["create", "-q", "-f", "qcow2"]);
        create.arg(image).arg(size.to_string()).run()?;
    }
    let names = ["", "-fleece", "-cbw", "-snap"].map(|end| format!("qmpbackup-{safe}{end}"));
    let [n, n_fleece, n_cbw, n_snap] = &names;
    let image = |name: &String, path: &std::path::Path| {
        json!({"driver": "qcow2", "node-name": name,
            "file": {"driver": "file", "filename": path, "aio": "threads"}})
    };
    vm.qmp("blockdev-add", &image(n, &partial))?;
    vm.qmp("blockdev-add", &image(n_fleece, &fleece))?;
    let cbw = json!({"driver": "copy-before-write", "node-name": n_cbw, "file": node,
        "target": n_fleece, "on-cbw-error": "break-snapshot", "cbw-timeout": 45});
    vm.qmp("blockdev-add", &cbw)?;
    let drive = json!({"path": vm.device("virtio0")?, "property": "drive", "value": n_cbw});
    vm.qmp("qom-set", &drive)?;
    let snap = json!({"driver": "snapshot-access", "file": n_cbw, "node-name": n_snap});
    vm.qmp("blockdev-add", &snap)?;
    let bitmap = json!({"node": node, "name": format!("qmpbackup-{uuid}"), "persistent": true});
    let backup = json!({"device": n_snap, "target": n, "sync": "full", "speed": 65536,
        "job-id": "qmpbackup.virtio0.virtual.qcow2"});
    let actions = json!([{"type": "block-dirty-bitmap-add", "data": bitmap},
        {"type": "blockdev-backup", "data": backup}]);
    vm.qmp("transaction", &json!({"actions": actions}))
        .map(drop)
}

const UUID: &str = "88367741-c591-49fe-81c0-16b10781480a";

#[test]
fn a_reboot_in_qmpbackups_mid_backup_is_no_matter_to_ours() -> Result<()> {
    let bed = BareBed::start()?;
    let mut tale = launched(&bed)?;
    qmpbackup_begins(&tale, UUID, 1_761_647_026)?;
    tale.vm.kill()?;
    tale.vm.start()?;
    tale.writes(2)?;
    // Its bitmap was stored before, so it dangles.
    let bitmap =
        json!({"node": tale.vm.node("virtio0")?, "name": "qmpbackup-old", "persistent": true});
    tale.vm.qmp("block-dirty-bitmap-add", &bitmap)?;
    tale.vm.quit()?;
    tale.vm.start()?;
    tale.vm.kill()?;
    tale.vm.start()?;
    tale.backs_up(&["full: first-backup"])?;
    tale.writes(3)?;
    tale.backs_up(&["incremental"])?;
    let theirs = tale.vm.bitmaps("virtio0")?;
    let theirs = theirs.iter().find(|it| it.name == "qmpbackup-old");
    ensure!(theirs.is_some_and(|it| it.inconsistent), "{theirs:?}");
    tale.one_mark_each()?;
    tale.ends_well()
}

fn doctor(tale: &Tale, args: &[&str]) -> Result<(Option<i32>, Value)> {
    let args = [&["doctor", "kvm0", "--json"], args].concat();
    let output = tale.bed.output(&tale.vm.uri(), &args)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let told = String::from_utf8_lossy(&output.stderr);
    let document = serde_json::from_str(&text).with_context(|| format!("{text}{told}"))?;
    Ok((output.status.code(), document))
}

#[test]
fn what_a_killed_qmpbackup_left_is_told_of_and_removed_on_demand() -> Result<()> {
    let bed = BareBed::start()?;
    let mut tale = launched(&bed)?;
    tale.backs_up(&["full: first-backup"])?;
    let clean = tale.vm.graph()?;
    qmpbackup_begins(&tale, UUID, 1_761_647_026)?;
    tale.writes(2)?;
    // As long as its job runs, it may be alive.
    let working = tale.vm.graph()?;
    let (code, document) = doctor(&tale, &["--fix", "--foreign", "qmpbackup"])?;
    ensure!(tale.vm.graph()? == working, "{code:?}: {document:#}");
    let cancel = json!({"id": "qmpbackup.virtio0.virtual.qcow2"});
    tale.vm.qmp("job-cancel", &cancel)?;
    wait_until(|| Ok(tale.vm.graph()?.jobs.is_empty()))?;

    let wreck = tale.vm.graph()?;
    let (code, document) = doctor(&tale, &[])?;
    ensure!(code == Some(4), "{code:?}: {document:#}");
    let told = document.to_string();
    ensure!(told.contains("qmpbackup"), "{document:#}");
    ensure!(tale.vm.graph()? == wreck, "a look changes nothing");
    let (code, document) = doctor(&tale, &["--fix"])?;
    ensure!(tale.vm.graph()? == wreck, "{code:?}: {document:#}");

    let (code, document) = doctor(&tale, &["--fix", "--foreign", "qmpbackup"])?;
    ensure!(code == Some(0), "{code:?}: {document:#}");
    let left = tale.vm.graph()?;
    ensure!(left == clean, "{clean:#?}\n{left:#?}\n{document:#}");
    let fleece = bed.lab.path("FULL-1761647026-virtio0.fleece.qcow2");
    ensure!(!fleece.exists(), "{document:#}");
    let (code, document) = doctor(&tale, &[])?;
    ensure!(code == Some(0), "{code:?}: {document:#}");
    tale.writes(3)?;
    tale.backs_up(&["incremental"])?;
    tale.is_tidy(&clean)?;
    tale.ends_well()
}
