//! VMs without libvirt, over QEMU's own monitor.

use anyhow::{Result, ensure};
use highwater_testkit::{Attach, BareVm, DiskSpec, KIB, MIB, Qemu, Workload, guest, raw_hash};
use serde_json::json;

use crate::support::{disk, mode, point};
use crate::tale::{BareBed, Tale};

/// A VM as most launchers make it, with two disks.
pub(crate) fn two_disks(bed: &BareBed) -> Result<Tale> {
    let disk = |name: &str| (DiskSpec::qcow2(name, 32 * MIB), Attach::drive().id(name));
    let (vda, vdb) = (disk("vda"), disk("vdb"));
    let vm = bed.lab.vm("kvm0").disk_as(vda.0, vda.1);
    let vm = vm.disk_as(vdb.0, vdb.1).start()?;
    let tale = Tale::of(bed, &vm, &["vda", "vdb"]);
    tale.writes(1)?;
    Ok(tale)
}

fn full_and_incremental(qemu: Qemu) -> Result<()> {
    let bed = BareBed::start()?;
    let attach = Attach::blockdev("virtio-blk-pci");
    let vm = bed.lab.vm("kvm0").qemu(qemu);
    let vm = vm.disk_as(DiskSpec::qcow2("vda", 64 * MIB), attach);
    let vm = vm
        .disk_as(
            DiskSpec::qcow2("vdb", 24 * MIB + 12_800),
            Attach::drive().id("vdb"),
        )
        .start()?;
    let mut tale = Tale::of(&bed, &vm, &["vda", "vdb"]);
    let before = vm.graph()?;
    let mut work = Workload::new(7, usize::try_from(64 * MIB)?);
    work.run(&vm, "vda", 40)?;
    let report = tale.backs_up(&["full: first-backup"])?;
    ensure!(report["consistency"] == "crash", "{report}");
    ensure!(report["warnings"] == json!([]), "{report}");
    tale.is_tidy(&before)?;
    for _ in 0..3 {
        work.run(&vm, "vda", 20)?;
        let report = tale.backs_up(&["incremental"])?;
        ensure!(report["warnings"] == json!([]), "{report}");
        let read = disk(&report, "vda")["read_bytes"].as_u64();
        ensure!(read < Some(32 * MIB), "{report}");
        ensure!(disk(&report, "vdb")["dirty_bytes"] == 0, "{report}");
        tale.is_tidy(&before)?;
    }
    vm.no_nbd_server()?;
    tale.ends_well()
}

#[test]
fn a_vm_without_libvirt_is_backed_up_in_full_and_then_incrementally() -> Result<()> {
    full_and_incremental(Qemu::System)
}

#[test]
fn so_is_one_of_qemu_7_2() -> Result<()> {
    full_and_incremental(Qemu::V7_2)
}

#[test]
fn all_levels_are_what_they_are_elsewhere() -> Result<()> {
    let bed = BareBed::start()?;
    let mut tale = two_disks(&bed)?;
    let before = tale.vm.graph()?;
    let uri = tale.vm.uri();
    tale.backs_up_with(&uri, &["copy"], &["--level", "copy"])?;
    ensure!(tale.marks("vda")?.is_empty());
    let refused = bed.fail(&uri, &["backup", "kvm0", "--level", "incremental"], 1)?;
    ensure!(refused.contains("error: "), "{refused}");
    tale.backs_up(&["rescan: no-mark-yet"])?;
    tale.writes(2)?;
    let mark = tale.marks("vda")?;
    tale.backs_up_with(&uri, &["differential"], &["--level", "differential"])?;
    ensure!(tale.marks("vda")? == mark, "it moved the mark");
    tale.writes(3)?;
    let report = tale.backs_up_with(&uri, &["incremental"], &["--level", "incremental"])?;
    ensure!(
        disk(&report, "vda")["dirty_bytes"].as_u64() > Some(512 * KIB),
        "{report}"
    );
    tale.writes(4)?;
    let full = bed.backup(&uri, "kvm0", &["--level", "full"])?;
    ensure!(mode(&full, "vda").starts_with("full"), "{full}");
    tale.keeps(&point(&full))?;
    tale.writes(5)?;
    tale.backs_up(&["incremental"])?;
    tale.is_tidy(&before)?;
    tale.ends_well()
}

fn shapes() -> Vec<(&'static str, DiskSpec, Attach)> {
    let disk = |name: &'static str| DiskSpec::qcow2(name, 16 * MIB);
    let long = "a-node-name-of-31-characters-xx";
    vec![
        ("v1", disk("v1"), Attach::drive().id("v1")),
        (
            "v2",
            disk("v2"),
            Attach::drive_and_device("virtio-blk-pci")
                .id("v2")
                .iothread(),
        ),
        (
            "v3",
            disk("v3"),
            Attach::json("virtio-blk-pci").id("v3").anonymous(),
        ),
        (
            "v4",
            disk("v4"),
            Attach::blockdev("virtio-blk-pci").node(long),
        ),
        ("v5", disk("v5"), Attach::blockdev("scsi-hd").throttled()),
        (
            "v6",
            disk("v6"),
            Attach::drive_and_device("ide-hd").id("v6").throttled(),
        ),
        ("v7", disk("v7"), Attach::blockdev("nvme")),
        (
            "v8",
            disk("v8").data_file(),
            Attach::blockdev("scsi-hd").iothread(),
        ),
        (
            "v9",
            disk("v9").cluster(2 * MIB).serial("S9"),
            Attach::blockdev("usb-storage"),
        ),
    ]
}

#[test]
fn disks_of_every_shape_come_back_byte_for_byte() -> Result<()> {
    let bed = BareBed::start()?;
    let mut vm = bed
        .lab
        .vm("kvm0")
        .uuid("5a2c7d10-3f52-4c0e-8a55-71c8c1f0a9e4");
    let names: Vec<_> = shapes().into_iter().map(|(name, _, _)| name).collect();
    for (_, disk, attach) in shapes() {
        vm = vm.disk_as(disk, attach);
    }
    let vm = vm.uefi().start()?;
    let mut tale = Tale::of(&bed, &vm, &names);
    let before = vm.graph()?;
    tale.writes(1)?;
    let report = tale.backs_up(&["full: first-backup"])?;
    ensure!(
        report["vm_uuid"] == "5a2c7d10-3f52-4c0e-8a55-71c8c1f0a9e4",
        "{report}"
    );
    tale.is_tidy(&before)?;
    tale.writes(2)?;
    tale.backs_up(&["incremental"])?;
    tale.is_tidy(&before)?;
    // What is written between and found again in the images themselves.
    vm.quit()?;
    vm.start()?;
    let before = vm.graph()?;
    tale.writes(3)?;
    tale.backs_up(&["incremental"])?;
    tale.is_tidy(&before)?;
    tale.ends_well()
}

/// A disk in front of a backing file, and one that has no name at all.
#[test]
fn a_disk_without_any_name_and_one_with_a_backing_file_come_back() -> Result<()> {
    let bed = BareBed::start()?;
    let base = bed.lab.path("base.qcow2");
    let create = highwater_testkit::tool("qemu-img").args(["create", "-q", "-f", "qcow2"]);
    create.arg(&base).arg("16M").run()?;
    let write = highwater_testkit::tool("qemu-io").args(["-f", "qcow2", "-c", "write -P 9 2M 1M"]);
    write.arg(&base).run()?;
    let disk = DiskSpec::qcow2("vda", 16 * MIB).backing(&base, "qcow2");
    // QEMU calls the first such drive so.
    let second = DiskSpec::qcow2("virtio1", 8 * MIB);
    let vm = bed.lab.vm("kvm0").disk_as(disk, Attach::drive().id("vda"));
    let vm = vm.disk(second).start()?;
    let mut tale = Tale::of(&bed, &vm, &["vda", "virtio1"]);
    tale.writes(1)?;
    tale.backs_up(&["full: first-backup"])?;
    tale.writes(2)?;
    tale.backs_up(&["incremental"])?;
    tale.one_mark_each()?;
    tale.ends_well()
}

#[test]
fn every_state_is_given_back_as_it_was() -> Result<()> {
    let bed = BareBed::start()?;
    let vm = |name: &str| {
        let disk = |name: &str| (DiskSpec::qcow2(name, 8 * MIB), Attach::drive().id(name));
        let (vda, vdb) = (disk("vda"), disk("vdb"));
        bed.lab.vm(name).disk_as(vda.0, vda.1).disk_as(vdb.0, vdb.1)
    };
    let disks = ["vda", "vdb"];
    let prelaunch = vm("prelaunch").prelaunch().start()?;
    let mut tale = Tale::of(&bed, &prelaunch, &disks);
    let before = prelaunch.graph()?;
    for expected in ["full: first-backup", "incremental"] {
        let report = tale.backs_up(&[expected])?;
        ensure!(report["consistency"] == "paused", "{report}");
        tale.is_tidy(&before)?;
        tale.writes(1)?;
    }
    ensure!(prelaunch.state()? == "prelaunch");

    let paused = vm("paused").start()?;
    paused.qmp("stop", &json!({}))?;
    let mut tale = Tale::of(&bed, &paused, &disks);
    let before = paused.graph()?;
    tale.backs_up(&["full: first-backup"])?;
    tale.is_tidy(&before)?;
    ensure!(paused.state()? == "paused");

    let incoming = vm("incoming").incoming().start()?;
    let before = incoming.graph()?;
    let refused = bed.fail(&incoming.uri(), &["backup", "incoming"], 1)?;
    ensure!(refused.contains("state: no restore point"), "{refused}");
    ensure!(incoming.graph()? == before);
    Ok(())
}

#[test]
fn a_raw_disk_is_incremental_for_as_long_as_its_qemu_lives() -> Result<()> {
    let bed = BareBed::start()?;
    let disk = |name: &str| (DiskSpec::raw(name, 64 * MIB), Attach::drive().id(name));
    let (raw, old) = (disk("raw"), disk("old"));
    let old = (DiskSpec::qcow2("old", 16 * MIB).compat_v2(), old.1);
    let vm = bed
        .lab
        .vm("kvm0")
        .disk_as(raw.0, raw.1)
        .disk_as(old.0, old.1);
    let vm = vm.start()?;
    let mut tale = Tale::of(&bed, &vm, &["raw", "old"]);
    let mut work = Workload::new(3, usize::try_from(64 * MIB)?);
    work.run(&vm, "raw", 60)?;
    tale.backs_up(&["full: first-backup"])?;
    for round in 2..4 {
        tale.write("raw", &format!("write -P {round} 3M 64k"))?;
        let report = tale.backs_up(&["incremental"])?;
        ensure!(
            crate::support::disk(&report, "raw")["dirty_bytes"] == 64 * KIB,
            "{report}"
        );
    }
    let gone = ["rescan: no-marks-on-raw", "rescan: no-marks-on-qcow2-v2"];
    for end in [BareVm::quit, BareVm::kill] {
        tale.write("raw", "write -P 9 5M 64k")?;
        tale.vm.flush("raw")?;
        end(&vm)?;
        vm.start()?;
        tale.write("raw", "write -P 8 7M 64k")?;
        let report = tale.backs_up(&gone)?;
        let raw = crate::support::disk(&report, "raw");
        // All is read, and what differs is stored.
        ensure!(raw["stored_bytes"].as_u64() < Some(256 * KIB), "{report}");
        tale.write("raw", "write -P 7 8M 64k")?;
        tale.backs_up(&["incremental"])?;
    }
    tale.ends_well()
}

#[test]
fn what_becomes_of_a_bitmap_is_told_and_healed() -> Result<()> {
    let bed = BareBed::start()?;
    let mut tale = two_disks(&bed)?;
    let vm = tale.vm.clone();
    tale.backs_up(&["full: first-backup"])?;
    tale.writes(2)?;
    vm.kill()?;
    vm.start()?;
    tale.backs_up(&["rescan: bitmap-missing"])?;
    tale.writes(3)?;
    vm.quit()?;
    vm.start()?;
    tale.backs_up(&["incremental"])?;
    vm.terminate()?;
    vm.start()?;
    tale.writes(4)?;
    vm.kill()?;
    vm.start()?;
    tale.backs_up(&["rescan: bitmap-inconsistent"])?;
    tale.one_mark_each()?;
    let remove = |vm: &BareVm, disk: &str, name: &str| -> Result<()> {
        let bitmap = json!({"node": vm.node(disk)?, "name": name});
        vm.qmp("block-dirty-bitmap-remove", &bitmap).map(drop)
    };
    remove(&vm, "vda", &tale.marks("vda")?[0])?;
    tale.writes(5)?;
    tale.backs_up(&["rescan: bitmap-missing", "incremental"])?;
    let mark = tale.marks("vdb")?.remove(0);
    let bitmap = json!({"node": vm.node("vdb")?, "name": mark});
    vm.qmp("block-dirty-bitmap-disable", &bitmap)?;
    tale.writes(6)?;
    tale.backs_up(&["incremental", "rescan: bitmap-not-recording"])?;
    // Made anew by somebody, in this process: it lies.
    let mark = tale.marks("vda")?.remove(0);
    tale.writes(7)?;
    remove(&vm, "vda", &mark)?;
    let bitmap = json!({"node": vm.node("vda")?, "name": mark, "persistent": true});
    vm.qmp("block-dirty-bitmap-add", &bitmap)?;
    let report = tale.backs_up_with(
        &vm.uri(),
        &["rescan: bitmap-lied", "incremental"],
        &["--audit", "100%"],
    )?;
    ensure!(report["warnings"].to_string().contains("lied"), "{report}");
    tale.one_mark_each()?;
    tale.ends_well()
}

#[test]
fn two_doors_lead_to_the_same_vm() -> Result<()> {
    let bed = BareBed::start()?;
    let disk = DiskSpec::qcow2("vda", 16 * MIB);
    let vm = bed
        .lab
        .vm("kvm0")
        .disk_as(disk, Attach::drive().id("vda"))
        .tcp();
    let vm = vm.start()?;
    let mut tale = Tale::of(&bed, &vm, &["vda"]);
    tale.writes(1)?;
    tale.backs_up(&["full: first-backup"])?;
    let second = format!("qmp:{}", vm.second_socket().display());
    for (round, uri) in [vm.tcp_uri()?, second].iter().enumerate() {
        tale.writes(u8::try_from(round + 2)?)?;
        tale.backs_up_with(uri, &["incremental"], &[])?;
    }
    tale.ends_well()
}

#[test]
fn a_monitor_that_somebody_holds_is_busy() -> Result<()> {
    let bed = BareBed::start()?;
    let mut tale = two_disks(&bed)?;
    tale.backs_up(&["full: first-backup"])?;
    let held = std::os::unix::net::UnixStream::connect(tale.vm.qmp_socket())?;
    let told = bed.fail(&tale.vm.uri(), &["backup", "kvm0"], 11)?;
    ensure!(
        told.contains("another program holds this monitor"),
        "{told}"
    );
    drop(held);
    tale.backs_up(&["incremental"])?;
    tale.ends_well()
}

#[test]
fn a_vm_without_a_name_is_named_by_the_user() -> Result<()> {
    let bed = BareBed::start()?;
    let disk = DiskSpec::qcow2("vda", 16 * MIB);
    let vm = bed.lab.vm("kvm0").disk_as(disk, Attach::drive().id("vda"));
    let vm = vm.nameless().start()?;
    let told = bed.fail(&vm.uri(), &["backup", "kvm0"], 1)?;
    ensure!(told.contains("--name"), "{told}");
    for (round, expected) in [(1, "full: first-backup"), (2, "incremental")] {
        vm.write("vda", &format!("write -P {round} 1M 64k"))?;
        let text = bed.run(&vm.uri(), &["backup", "--name", "kvm0", "--json"])?;
        let report = serde_json::from_str(&text)?;
        ensure!(mode(&report, "vda") == expected, "{report}");
        ensure!(report["vm"] == "kvm0", "{report}");
    }
    let named = format!("{}?name=kvm0", vm.uri());
    let mut tale = Tale::of(&bed, &vm, &["vda"]);
    tale.backs_up_with(&named, &["incremental"], &[])?;
    tale.ends_well()
}

#[test]
fn the_command_line_is_kept_with_the_point() -> Result<()> {
    let bed = BareBed::start()?;
    let mut tale = two_disks(&bed)?;
    tale.backs_up(&["full: first-backup"])?;
    let dir = bed.restore("kvm0", "out")?;
    let mut kept = String::new();
    for file in std::fs::read_dir(&dir)? {
        let file = file?.path();
        if file.metadata()?.len() < 1 << 20 && file.extension().is_none_or(|it| it != "raw") {
            kept += &std::fs::read_to_string(&file)?;
        }
    }
    ensure!(
        kept.contains("if=virtio") && kept.contains("kvm0"),
        "{dir:?}: {kept}"
    );
    Ok(())
}

#[test]
fn a_guest_with_an_agent_is_frozen_for_the_point() -> Result<()> {
    let bed = BareBed::start()?;
    let image = bed.lab.path("data.raw");
    guest::make_ext4(&image, 48 * MIB)?;
    let qcow2 = bed.lab.path("data.qcow2");
    let convert = highwater_testkit::tool("qemu-img").args(["convert", "-O", "qcow2"]);
    convert.arg(&image).arg(&qcow2).run()?;
    let disk = DiskSpec::existing("vda", &qcow2, "qcow2");
    let vm = bed.lab.vm("kvm0").disk_as(disk, Attach::drive().id("vda"));
    let vm = vm.guest().start()?;
    let guest = vm.guest()?;
    guest.wait_for_agent()?;
    let uri = format!("{}?agent={}", vm.uri(), vm.agent_socket().display());
    for (round, expected) in ["full: first-backup", "incremental"].iter().enumerate() {
        guest.run(&format!("echo {round} >>/data/rounds"))?;
        let report = bed.backup(&uri, "kvm0", &["--quiesce", "require"])?;
        ensure!(mode(&report, "vda") == *expected, "{report}");
        ensure!(report["consistency"] == "filesystem", "{report}");
        ensure!(!guest.is_frozen()?, "it is still frozen");
        guest.run("echo later >>/data/rounds; sync")?;
        let dir = bed.restore(&point(&report), &format!("out{round}"))?;
        let restored = dir.join("vda.raw");
        ensure!(raw_hash(&restored)? != raw_hash(&image)?);
        // Frozen is clean: nothing for a repair to do.
        let check = highwater_testkit::tool("e2fsck").args(["-f", "-n"]);
        check.arg(&restored).run()?;
        let cat = highwater_testkit::tool("debugfs").args(["-R", "cat /rounds"]);
        let rounds = cat.arg(&restored).run()?;
        ensure!(rounds.trim_end().ends_with(&round.to_string()), "{rounds}");
    }
    Ok(())
}
