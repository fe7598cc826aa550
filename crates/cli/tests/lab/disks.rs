//! Every kind of disk: backed up twice, restored and compared, or left out
//! with its reason.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{DiskSpec, Vm, compare_images, tool};
use serde_json::{Value, json};

use crate::support::{Bed, assert_same, disk, mode, point, reference};

const MIB: u64 = 1 << 20;

fn create_qcow2(path: &Path, options: &[&str]) -> Result<()> {
    let create = tool("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .args(options);
    create.arg(path).arg("16M").run()?;
    Ok(())
}

/// Attaches a file to a loop device for as long as it lives.
struct Loop(PathBuf);

impl Loop {
    fn attach(file: &Path) -> Result<Self> {
        let device = tool("losetup").args(["--find", "--show"]).arg(file).run()?;
        Ok(Self(PathBuf::from(device.trim())))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // It goes at once, or when the QEMU that has it open is gone.
        drop(tool("losetup").arg("-d").arg(&self.0).run());
    }
}

fn block(target: &str, format: &str, device: &Path) -> DiskSpec {
    let xml = format!(
        "<disk type='block' device='disk'><driver name='qemu' type='{format}' discard='unmap'/>\
         <source dev='{}'/><target dev='{target}' bus='virtio'/></disk>",
        device.display()
    );
    DiskSpec::raw_xml(target, &xml)
}

/// Serves a raw file over NBD, as a server of somebody else's would.
fn network(bed: &Bed, target: &str) -> Result<DiskSpec> {
    let (image, socket) = (bed.lab.path("network.raw"), bed.lab.path("network.sock"));
    fs::File::create(&image)?.set_len(16 * MIB)?;
    let server = bed.lab.inside("qemu-nbd");
    let server = server.args([
        "-t",
        "-f",
        "raw",
        "-e",
        "8",
        "--fork",
        "--discard=unmap",
        "-x",
        "export",
    ]);
    server.arg("-k").arg(&socket).arg(&image).run()?;
    let xml = format!(
        "<disk type='network' device='disk'><driver name='qemu' type='raw' discard='unmap'/>\
         <source protocol='nbd' name='export'><host transport='unix' socket='{}'/></source>\
         <target dev='{target}' bus='virtio'/></disk>",
        socket.display()
    );
    Ok(DiskSpec::raw_xml(target, &xml))
}

/// A volume of a pool that is a directory.
fn volume(bed: &Bed, target: &str) -> Result<DiskSpec> {
    let pool = bed.lab.path("pool");
    fs::create_dir(&pool)?;
    create_qcow2(&pool.join("volume.qcow2"), &[])?;
    let dir = pool.to_str().context("a path is text")?;
    bed.lab
        .virsh(&["pool-create-as", "images", "dir", "--target", dir])?;
    let xml = format!(
        "<disk type='volume' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/>\
         <source pool='images' volume='volume.qcow2'/><target dev='{target}' bus='virtio'/></disk>"
    );
    Ok(DiskSpec::raw_xml(target, &xml))
}

/// What the guest does between two backups: data, zeroes and discards, also
/// over what was there.
const FIRST: [&str; 3] = ["write -P 1 1M 2M", "write -P 2 8M 1M", "write -P 3 15M 1M"];
const SECOND: [&str; 4] = [
    "write -P 4 2M 200k",
    "discard 8M 512k",
    "write -z -u 1M 64k",
    "write -z 15M 4k",
];

fn write(vm: &Vm, targets: &[&str], commands: &[&str]) -> Result<()> {
    let commands: Vec<String> = commands.iter().map(|&command| command.to_owned()).collect();
    for target in targets {
        vm.write_all(target, &commands)?;
        vm.flush(target)?;
    }
    Ok(())
}

/// Returns the raw content of an image that the testkit did not make.
fn copy(bed: &Bed, image: &Path, format: &str, name: &str) -> Result<PathBuf> {
    let to = bed.lab.path(name);
    let convert = tool("qemu-img").args(["convert", "-U", "-O", "raw", "-f", format]);
    convert.arg(image).arg(&to).run()?;
    Ok(to)
}

/// Backs up, changes, backs up again; both points must equal what `read` saw.
fn two_backups_equal_the_disks(
    bed: &Bed,
    vm: &Vm,
    expected: &[(&str, &str)],
    read: &dyn Fn(&str, &str) -> Result<PathBuf>,
) -> Result<()> {
    let targets: Vec<&str> = expected.iter().map(|(target, _)| *target).collect();
    let mut taken = Vec::new();
    for commands in [&FIRST[..], &SECOND[..]] {
        write(vm, &targets, commands)?;
        let report = bed.backup(vm, &[])?;
        let run = taken.len();
        for (target, second) in expected {
            let word = if run == 0 {
                "full: first-backup"
            } else {
                second
            };
            assert_eq!(mode(&report, target), word, "{target} in {report}");
        }
        let mut seen = Vec::new();
        for target in &targets {
            seen.push(read(target, &format!("ref-{run}-{target}"))?);
        }
        taken.push((point(&report), seen));
    }
    for (run, (point, seen)) in taken.iter().enumerate() {
        let dir = bed.restore(point, &format!("out-{run}"), &["--format", "raw"])?;
        for (target, reference) in targets.iter().zip(seen) {
            assert_same(reference, &dir.join(format!("{target}.raw")))
                .with_context(|| format!("{target}, point {run}"))?;
        }
    }
    assert_nothing_but_a_mark(bed, vm)
}

/// Like [`Bed::assert_tidy`] where the VM has nodes that the testkit knows no
/// image of.
fn assert_nothing_but_a_mark(bed: &Bed, vm: &Vm) -> Result<()> {
    let left = vm.leftovers(&bed.runtime().join("scratch"))?;
    ensure!(
        !left.job && left.exports.is_empty() && left.files.is_empty(),
        "{left:?}"
    );
    ensure!(left.checkpoints.len() == 1, "{left:?}");
    ensure!(vm.state()? == "running", "the guest is {}", vm.state()?);
    Ok(())
}

#[test]
fn a_network_disk_a_volume_and_block_devices_come_back_byte_for_byte() -> Result<()> {
    let bed = Bed::start()?;
    let (raw, qcow2) = (bed.lab.path("device-raw"), bed.lab.path("device-qcow2"));
    fs::File::create(&raw)?.set_len(16 * MIB)?;
    fs::File::create(&qcow2)?.set_len(32 * MIB)?;
    let (raw, qcow2) = (Loop::attach(&raw)?, Loop::attach(&qcow2)?);
    create_qcow2(&qcow2.0, &[])?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(network(&bed, "vda")?)
        .disk(volume(&bed, "vdb")?)
        .disk(block("vdc", "raw", &raw.0))
        .disk(block("vdd", "qcow2", &qcow2.0))
        .start()?;
    let expected = [
        ("vda", "rescan: no-marks-on-raw"),
        ("vdb", "incremental"),
        ("vdc", "rescan: no-marks-on-raw"),
        ("vdd", "incremental"),
    ];
    let result = two_backups_equal_the_disks(&bed, &vm, &expected, &|target, name| match target {
        "vda" => copy(&bed, &bed.lab.path("network.raw"), "raw", name),
        "vdb" => copy(&bed, &bed.lab.path("pool/volume.qcow2"), "qcow2", name),
        "vdc" => copy(&bed, &raw.0, "raw", name),
        _ => copy(&bed, &qcow2.0, "qcow2", name),
    });
    // Before the loop devices are detached.
    vm.destroy()?;
    result
}

#[test]
fn a_chain_a_data_file_subclusters_and_other_clusters_come_back_byte_for_byte() -> Result<()> {
    let bed = Bed::start()?;
    let base = bed.lab.path("base.raw");
    fs::write(&base, vec![0x5a; 16 << 20])?;
    let middle = bed.lab.path("middle.qcow2");
    create_qcow2(
        &middle,
        &["-F", "raw", "-b", base.to_str().context("a path is text")?],
    )?;
    tool("qemu-io")
        .args(["-f", "qcow2", "-c", "write -P 9 4M 1M"])
        .arg(&middle)
        .run()?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB).backing(&middle, "qcow2"))
        .disk(DiskSpec::qcow2("vdb", 16 * MIB).data_file())
        .disk(DiskSpec::qcow2("vdc", 16 * MIB).extended_l2())
        .disk(DiskSpec::qcow2("vdd", 16 * MIB).cluster(2 * MIB))
        .disk(DiskSpec::qcow2("vde", 16 * MIB).cluster(4 << 10))
        .disk(DiskSpec::qcow2("sda", 16 * MIB))
        .start()?;
    let expected = ["vda", "vdb", "vdc", "vdd", "vde", "sda"].map(|target| (target, "incremental"));
    two_backups_equal_the_disks(&bed, &vm, &expected, &|target, name| {
        reference(&bed, &vm, target, name)
    })
}

#[test]
fn what_is_left_out_is_named_with_its_reason() -> Result<()> {
    let bed = Bed::start()?;
    fs::File::create(bed.lab.path("cd.iso"))?.set_len(MIB)?;
    fs::File::create(bed.lab.path("floppy.img"))?.set_len(1440 << 10)?;
    let drive = |device: &str, file: &str, dev: &str, bus: &str| {
        let source = bed.lab.path(file);
        let xml = format!(
            "<disk type='file' device='{device}'><driver name='qemu' type='raw'/>\
             <source file='{}'/><target dev='{dev}' bus='{bus}'/></disk>",
            source.display()
        );
        DiskSpec::raw_xml(dev, &xml)
    };
    let empty = "<disk type='file' device='cdrom'><target dev='hdb' bus='ide'/></disk>";
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", MIB))
        .disk(DiskSpec::raw("vdb", MIB).element("<shareable/>"))
        .disk(DiskSpec::qcow2("vdc", MIB).element("<transient/>"))
        .disk(DiskSpec::raw("vdd", MIB).element("<readonly/>"))
        .disk(DiskSpec::qcow2("vde", MIB))
        .disk(drive("cdrom", "cd.iso", "hda", "ide"))
        .disk(DiskSpec::raw_xml("hdb", empty))
        .disk(drive("floppy", "floppy.img", "fda", "fdc"))
        .start()?;
    let report = bed.backup(&vm, &["-x", "vde"])?;
    assert_eq!(
        report["disks"].as_array().map(Vec::len),
        Some(1),
        "{report}"
    );
    let shown: Value = serde_json::from_str(&bed.run(&["show", &point(&report), "--json"])?)?;
    let text = bed.run(&["show", "web01"])?;
    let expected = [
        (
            "vdb",
            "shared with other VMs, so it has no single point in time",
        ),
        ("vdc", "transient: its content is thrown away at shutdown"),
        ("vdd", "read-only for the guest"),
        ("vde", "left out by the user"),
        ("hda", "a CD-ROM drive"),
        ("hdb", "a drive without a medium"),
        ("fda", "a floppy drive"),
    ];
    for (target, reason) in expected {
        let entry = json!({"disk": target, "reason": reason});
        let skipped = shown["skipped"].as_array().context("a list")?;
        assert!(skipped.contains(&entry), "no {entry} in {shown}");
        assert!(text.contains(&format!("{target}       {reason}")), "{text}");
    }
    assert_eq!(
        shown["skipped"].as_array().map(Vec::len),
        Some(expected.len())
    );
    let (code, stderr) = bed.fail(&["backup", "web01", "-d", "hda"])?;
    assert_eq!(code, 2, "{stderr}");
    assert!(
        stderr.contains("cannot back up disk `hda` of VM `web01`: a CD-ROM drive"),
        "{stderr}"
    );
    let (code, stderr) = bed.fail(&["backup", "web01", "-d", "vdz"])?;
    assert_eq!(code, 2, "{stderr}");
    assert!(
        stderr.contains("hint: its disks are: fda, hda, hdb, vda"),
        "{stderr}"
    );
    assert_nothing_but_a_mark(&bed, &vm)
}

#[test]
fn an_encrypted_image_comes_back_byte_for_byte() -> Result<()> {
    let bed = Bed::start()?;
    let image = bed.lab.path("luks.qcow2");
    let secret = ["--object", "secret,id=s0,data=open sesame"];
    let luks = [
        "-o",
        "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10",
    ];
    let create = tool("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .args(secret)
        .args(luks);
    create.arg(&image).arg("16M").run()?;
    let uuid = "3d0b1c9e-7a0c-4f2e-9f52-0d1f8a4f6b11";
    let file = bed.lab.path("secret.xml");
    fs::write(
        &file,
        format!("<secret ephemeral='no' private='no'><uuid>{uuid}</uuid></secret>"),
    )?;
    bed.lab
        .virsh(&["secret-define".as_ref(), file.as_os_str()])?;
    let key = bed.lab.path("key");
    fs::write(&key, "open sesame")?;
    let key = key.to_str().context("a path is text")?;
    bed.lab
        .virsh(&["secret-set-value", uuid, "--file", key, "--plain"])?;
    let xml = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/>\
         <source file='{}'><encryption format='luks'><secret type='passphrase' uuid='{uuid}'/>\
         </encryption></source><target dev='vda' bus='virtio'/></disk>",
        image.display()
    );
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::raw_xml("vda", &xml))
        .start()?;
    two_backups_equal_the_disks(&bed, &vm, &[("vda", "incremental")], &|_, name| {
        let to = bed.lab.path(name);
        let source = format!(
            "driver=qcow2,encrypt.key-secret=s0,file.driver=file,file.filename={}",
            image.display()
        );
        let convert = tool("qemu-img").args(["convert", "-U"]).args(secret);
        convert
            .args(["-O", "raw", "--image-opts", &source])
            .arg(&to)
            .run()?;
        Ok(to)
    })
}

#[test]
fn a_paused_vm_stays_paused_and_its_point_says_so() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB))
        .start()?;
    vm.write("vda", "write -P 1 1M 1M")?;
    bed.lab.virsh(&["suspend", "web01"])?;
    for expected in ["full: first-backup", "incremental"] {
        let report = bed.backup(&vm, &[])?;
        assert_eq!(mode(&report, "vda"), expected);
        assert_eq!(report["consistency"], "paused", "{report}");
        assert_eq!(vm.state()?, "paused");
    }
    let (code, stderr) = bed.fail(&["backup", "web01", "--quiesce", "require"])?;
    assert_eq!(code, 1, "{stderr}");
    assert!(
        stderr.contains("because: the VM is paused, so its agent cannot answer"),
        "{stderr}"
    );
    assert_eq!(vm.state()?, "paused");
    let dir = bed.restore("web01", "out", &[])?;
    compare_images(&vm.image("vda"), &dir.join("vda.qcow2"))?;
    bed.lab.virsh(&["resume", "web01"])?;
    vm.write("vda", "write -P 2 2M 64k")?;
    let report = bed.backup(&vm, &[])?;
    assert_eq!(report["consistency"], "crash");
    assert_eq!(disk(&report, "vda")["dirty_bytes"], 64 << 10);
    bed.assert_tidy(&vm, 1)
}

#[test]
fn a_required_freeze_without_an_agents_channel_fails_and_leaves_nothing() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 16 * MIB))
        .start()?;
    let (code, stderr) = bed.fail(&["backup", "web01", "--quiesce", "require"])?;
    assert_eq!(code, 1, "{stderr}");
    assert!(
        stderr.contains("cannot freeze the file systems of VM `web01`"),
        "{stderr}"
    );
    assert!(stderr.contains("hint: is the guest agent"), "{stderr}");
    bed.assert_tidy(&vm, 0)?;
    // Without the wish nobody is bothered about it at every backup.
    let report = bed.backup(&vm, &[])?;
    assert_eq!(report["warnings"], json!([]));
    Ok(())
}
