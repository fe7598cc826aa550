//! What becomes of the disks of a VM, and of some of them only.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use highwater_testkit::{DiskSpec, ErrorPolicy, KIB};
use serde_json::{Value, json};

use super::marks::finds_the_lie;
use super::tracked::{SIZE, Tracked, qemu_img, text};
use crate::matrix::{Reading, Subject, take};
use crate::support::{Bed, disk, mode};

fn scsi() -> Result<Tracked> {
    let disks = [DiskSpec::qcow2("sda", SIZE), DiskSpec::qcow2("sdb", SIZE)];
    Tracked::unseen(&disks)
}

pub(super) fn new_disk() -> Result<()> {
    let mut it = scsi()?;
    it.vm.detach("sdb")?;
    let new = it.disks.remove(1);
    it.heals("full: first-backup")?;
    it.vm.attach("sdb")?;
    it.disks.push(new);
    it.heals_each(&["incremental", "full: new-disk"])?;
    it.ends_well()
}

pub(super) fn disk_gone() -> Result<()> {
    crate::matrix_changes::a_disk_taken_out_is_told_of_in_the_next_point_and_in_no_other()?;
    let mut it = scsi()?;
    it.heals("full: first-backup")?;
    it.write()?;
    it.vm.detach("sdb")?;
    let gone = it.disks.remove(1);
    it.forgets("sdb");
    it.heals("incremental")?;
    // Back again it has its bitmap, which went on recording.
    it.vm.attach("sdb")?;
    it.disks.push(gone);
    it.heals("incremental")?;
    it.ends_well()
}

pub(super) fn partial_runs() -> Result<()> {
    let mut it = Tracked::two()?;
    for args in [["-d", "vda"], ["-d", "vda"], ["-x", "vda"], ["-d", "vdb"]] {
        it.write()?;
        let report = it.back_up(&args)?;
        ensure!(report["disks"].as_array().map(Vec::len) == Some(1));
        let backed_up = report["disks"][0]["disk"].as_str().unwrap_or_default();
        ensure!(mode(&report, backed_up) == "incremental", "{report}");
        it.check_marks()?;
    }
    it.heals("incremental")?;
    it.ends_well()
}

/// A qcow2 image behind a server that can be made to read nothing.
pub(super) struct Unreadable {
    pub(super) trigger: PathBuf,
    /// What QEMU calls the file.
    address: PathBuf,
}

impl Unreadable {
    fn start(bed: &Bed, file: &Path) -> Result<(Self, DiskSpec)> {
        let socket = bed.lab.path("vdb.sock");
        let trigger = bed.lab.path("unreadable");
        qemu_img(&["create", "-q", "-f", "qcow2", text(file)?, "2M"])?;
        // Room for the image to grow: what a server exports does not.
        fs::OpenOptions::new()
            .write(true)
            .open(file)?
            .set_len(2 * SIZE)?;
        let server = bed.lab.inside("nbdkit").arg("-U").arg(&socket);
        let server = server.args(["--filter=error", "file"]).arg(file);
        let server = server.args(["error-pread=EIO", "error-pread-rate=100%"]);
        let trigger_file = format!("error-pread-file={}", trigger.display());
        server.arg(trigger_file).run()?;
        let xml = format!(
            "<disk type='network' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/>\
             <source protocol='nbd' name=''><host transport='unix' socket='{}'/></source>\
             <target dev='vdb' bus='virtio'/></disk>",
            socket.display()
        );
        let address = PathBuf::from(format!("nbd+unix://?socket={}", socket.display()));
        Ok((Self { trigger, address }, DiskSpec::raw_xml("vdb", &xml)))
    }
}

/// `vda`, and a `vdb` that can be made to fail; without any point.
pub(super) fn beside_unreadable() -> Result<(Tracked, Unreadable)> {
    let bed = Bed::start()?;
    let file = bed.lab.path("vdb.served");
    let (server, vdb) = Unreadable::start(&bed, &file)?;
    let vda = DiskSpec::qcow2("vda", SIZE);
    let vm = bed.lab.vm("web01").disk(vda).disk(vdb).start()?;
    let subject = |target: &str, image: &Path| {
        let reading = Reading::Image(image.to_owned(), "qcow2");
        Subject::new(target, SIZE, reading, "incremental")
    };
    let disks = vec![subject("vda", &vm.image("vda"))?, subject("vdb", &file)?];
    let mut it = Tracked::of(bed, vm, disks);
    it.served.insert(server.address.clone(), file);
    Ok((it, server))
}

pub(super) fn failed_disk() -> Result<()> {
    let (mut it, server) = beside_unreadable()?;
    it.heals("full: first-backup")?;
    for _ in 0..2 {
        it.write()?;
        fs::File::create(&server.trigger)?;
        let output = it.bed.output(&["backup", "web01", "--json"])?;
        fs::remove_file(&server.trigger)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(3), "{}: {said}", output.status);
        let report: Value = serde_json::from_slice(&output.stdout)?;
        ensure!(disk(&report, "vdb")["root"].is_null(), "{report}");
        it.took_only("vda", &report)?;
    }
    let (taken, report) = take(&it.bed, &it.vm, &[], &it.disks)?;
    ensure!(mode(&report, "vdb") == "incremental", "{report}");
    it.took(taken, &report);
    it.ends_well()
}

pub(super) fn swapped_disks() -> Result<()> {
    let mut it = Tracked::two()?;
    let (one, two) = (it.vm.image("vda"), it.vm.image("vdb"));
    it.while_off(|| {
        let (one, two) = (text(&one)?, text(&two)?);
        it.redefine(&[(one, "/swapped"), (two, one), ("/swapped", two)])
    })?;
    it.reads("vda", &two, "qcow2")?;
    it.reads("vdb", &one, "qcow2")?;
    it.heals("full: chain-changed")?;
    it.ends_well()
}

pub(super) fn other_serial() -> Result<()> {
    let mut it = Tracked::with(&[DiskSpec::qcow2("vda", SIZE).serial("one")])?;
    it.while_off(|| it.redefine(&[("<serial>one<", "<serial>two<")]))?;
    it.heals("full: disk-swapped")?;
    it.ends_well()
}

pub(super) fn grown_while_running() -> Result<()> {
    let mut it = Tracked::start()?;
    for size in [SIZE + 300 * KIB, 2 * SIZE] {
        it.virsh(&["blockresize", "web01", "vda", &format!("{size}b")])?;
        it.disks[0].writes.grow(usize::try_from(size)?);
        let report = it.heals("incremental")?;
        ensure!(disk(&report, "vda")["size_bytes"] == size, "{report}");
    }
    it.ends_well()
}

pub(super) fn grown_while_off() -> Result<()> {
    let mut it = Tracked::two()?;
    let (image, size) = (it.vm.image("vdb"), SIZE + 300 * KIB);
    it.while_off(|| {
        let bytes = size.to_string();
        qemu_img(&["resize", "-q", "-f", "qcow2", text(&image)?, &bytes])
    })?;
    it.disks[1].writes.grow(usize::try_from(size)?);
    it.heals("incremental")?;
    it.ends_well()
}

pub(super) fn shrunk() -> Result<()> {
    crate::matrix_changes::a_disk_made_smaller_is_read_as_a_whole_and_tracked_again()
}

pub(super) fn shrunk_then_grown() -> Result<()> {
    let mut it = Tracked::start()?;
    it.heals("incremental")?;
    let node = it.node("vda")?;
    for size in [SIZE / 2, SIZE] {
        it.qmp("block_resize", &json!({"node-name": node, "size": size}))?;
    }
    finds_the_lie(&mut it)?;
    it.ends_well()
}

pub(super) fn raw_and_version_2() -> Result<()> {
    crate::levels::a_raw_and_a_version_2_disk_are_read_whole_beside_an_incremental_one()
}

fn write_errors(policy: ErrorPolicy) -> Result<()> {
    let disk = DiskSpec::qcow2("vda", SIZE).error_policy(policy);
    let mut it = Tracked::with(&[disk])?;
    it.heals("incremental")?;
    // Refused where the space cannot be reserved: the guest would lose writes.
    let small = it.bed.lab.path("small");
    fs::create_dir(&small)?;
    let mount = ["-t", "tmpfs", "-o", "size=1m", "none"];
    it.bed.lab.inside("mount").args(mount).arg(&small).run()?;
    it.write()?;
    let mut backup = it.bed.lab.inside(env!("CARGO_BIN_EXE_highwater"));
    backup = backup.args(["backup", "web01", "-c", &it.bed.lab.uri(), "--scratch-dir"]);
    let refused = backup
        .arg(&small)
        .env("HIGHWATER_REPO", it.bed.repo())
        .env("HIGHWATER_RUNTIME_DIR", it.bed.runtime())
        .run();
    let said = format!(
        "{:#}",
        refused
            .err()
            .unwrap_or_else(|| anyhow::anyhow!("it succeeded"))
    );
    ensure!(said.contains("scratch"), "{said}");
    it.heals("incremental")?;
    it.ends_well()
}

pub(super) fn write_errors_reported() -> Result<()> {
    write_errors(ErrorPolicy::Report)
}

pub(super) fn write_errors_ignored() -> Result<()> {
    write_errors(ErrorPolicy::Ignore)
}
