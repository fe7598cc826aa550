//! Where the bytes of a disk are: behind a server, in a pool, on a device,
//! encrypted, and over any of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{DiskSpec, MIB, tool};

use crate::matrix::{Reading, Subject, check, rounds_equal_the_disks, take};
use crate::support::{Bed, mode};

const SIZE: u64 = 3 * MIB + 512;

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path is text")
}

/// Makes a qcow2 image over whatever `options` say.
fn create(image: &Path, options: &[&str], size: u64) -> Result<()> {
    let create = tool("qemu-img").args(["create", "-q", "-f", "qcow2"]);
    let create = create.args(options).arg(image);
    create.arg(size.to_string()).run()?;
    Ok(())
}

/// Serves the bytes of a file under an address, for as long as the lab lives.
struct Served {
    file: PathBuf,
    socket: PathBuf,
}

impl Served {
    fn start(bed: &Bed, name: &str) -> Result<Self> {
        let served = Self {
            file: bed.lab.path(&format!("{name}.served")),
            socket: bed.lab.path(&format!("{name}.sock")),
        };
        let program = bed.lab.inside("qemu-nbd");
        let program = program.args(["-t", "-f", "raw", "-e", "8", "--fork", "--discard=unmap"]);
        let program = program.args(["-x", name, "-k"]).arg(&served.socket);
        program.arg(&served.file).run()?;
        Ok(served)
    }

    fn source(&self, name: &str) -> String {
        format!(
            "<source protocol='nbd' name='{name}'><host transport='unix' socket='{}'/></source>",
            self.socket.display()
        )
    }
}

fn network_disk(target: &str, format: &str, source: &str) -> DiskSpec {
    let xml = format!(
        "<disk type='network' device='disk'><driver name='qemu' type='{format}' discard='unmap'/>\
         {source}<target dev='{target}' bus='virtio'/></disk>"
    );
    DiskSpec::raw_xml(target, &xml)
}

/// Room for the image to grow: a server's export does not.
fn make_room(file: &Path) -> Result<()> {
    let file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(file)?;
    file.set_len(16 * MIB)?;
    Ok(())
}

/// A row of the table; its test is made there.
pub(crate) fn a_qcow2_behind_a_server_is_incremental_and_one_over_it_is_not() -> Result<()> {
    let bed = Bed::start()?;
    for name in ["top", "below", "raw"] {
        let file = bed.lab.path(&format!("{name}.served"));
        if name != "raw" {
            create(&file, &[], SIZE)?;
        }
        make_room(&file)?;
    }
    let io = tool("qemu-io").args(["-f", "qcow2", "-c", "write -P 5 0 2M"]);
    io.arg(bed.lab.path("below.served")).run()?;
    let top = Served::start(&bed, "top")?;
    let below = Served::start(&bed, "below")?;
    let raw = Served::start(&bed, "raw")?;
    let overlay = bed.lab.path("overlay.qcow2");
    let address = format!("nbd+unix:///below?socket={}", text(&below.socket)?);
    create(&overlay, &["-u", "-F", "qcow2", "-b", &address], SIZE)?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(network_disk("vda", "qcow2", &top.source("top")))
        .disk(DiskSpec::existing("vdb", &overlay, "qcow2"))
        .disk(network_disk("vdc", "raw", &raw.source("raw")))
        .start()?;
    let image = |path: &Path, format| Reading::Image(path.to_owned(), format);
    let mut subjects = [
        Subject::new("vda", SIZE, image(&top.file, "qcow2"), "incremental")?,
        Subject::new(
            "vdb",
            SIZE,
            image(&overlay, "qcow2"),
            "rescan: backing-unseen",
        )?,
        Subject::new(
            "vdc",
            16 * MIB,
            image(&raw.file, "raw"),
            "rescan: no-marks-on-raw",
        )?,
    ];
    rounds_equal_the_disks(&bed, &vm, &mut subjects, 3)
}

/// The server gives out an older copy of the image under the same address: with
/// the bitmap of the parent's mark if it was kept with it, else without.
#[test]
fn an_older_image_behind_the_same_address_is_never_taken_for_the_newer_one() -> Result<()> {
    let bed = Bed::start()?;
    let file = bed.lab.path("disk.served");
    create(&file, &[], SIZE)?;
    make_room(&file)?;
    let served = Served::start(&bed, "disk")?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(network_disk("vda", "qcow2", &served.source("disk")))
        .start()?;
    let reading = Reading::Image(file.clone(), "qcow2");
    let mut subjects = [Subject::new("vda", SIZE, reading, "")?];
    let older = bed.lab.path("older");
    // Copied before the first backup, after it, and after the second.
    let mut points = Vec::new();
    for (copy_now, restore_now, expected) in [
        (true, false, "full: first-backup"),
        (false, true, "rescan: bitmap-missing"),
        (true, false, "incremental"),
        (false, true, "rescan: bitmap-missing"),
        (false, false, "incremental"),
        (true, true, "incremental"),
    ] {
        if copy_now {
            vm.destroy()?;
            fs::copy(&file, &older)?;
            vm.start()?;
        }
        subjects[0].write(&vm, 6)?;
        if restore_now {
            vm.destroy()?;
            fs::write(&file, fs::read(&older)?)?;
            vm.start()?;
        }
        let (taken, report) = take(&bed, &vm, &[], &subjects)?;
        assert_eq!(mode(&report, "vda"), expected, "{report}");
        points.push(taken);
    }
    for taken in &points {
        check(&bed, taken)?;
    }
    Ok(())
}

#[test]
fn encrypted_images_of_every_kind_come_back_byte_for_byte() -> Result<()> {
    let bed = Bed::start()?;
    let uuid = "3d0b1c9e-7a0c-4f2e-9f52-0d1f8a4f6b11";
    define_secret(&bed, uuid)?;
    let key = ["--object", "secret,id=s0,data=open sesame"];
    let fast = "iter-time=10";
    // A LUKS container without another format in it.
    let bare = bed.lab.path("bare.luks");
    let make = tool("qemu-img")
        .args(["create", "-q", "-f", "luks"])
        .args(key);
    let make = make
        .args(["-o", &format!("key-secret=s0,{fast}")])
        .arg(&bare);
    make.arg("3M").run()?;
    // A plain image below an encrypted one.
    let plain = bed.lab.path("plain.qcow2");
    create(&plain, &[], SIZE)?;
    let io = tool("qemu-io").args(["-f", "qcow2", "-c", "write -P 5 0 2M"]);
    io.arg(&plain).run()?;
    let over = bed.lab.path("over.qcow2");
    let options = format!("encrypt.format=luks,encrypt.key-secret=s0,encrypt.{fast}");
    let mut arguments = key.to_vec();
    arguments.extend(["-o", &options, "-F", "qcow2", "-b", text(&plain)?]);
    create(&over, &arguments, SIZE)?;

    let disk = |target: &str, format: &str, file: &Path| {
        let xml = format!(
            "<disk type='file' device='disk'><driver name='qemu' type='{format}' discard='unmap'/>\
             <source file='{}'><encryption format='luks'><secret type='passphrase' uuid='{uuid}'/>\
             </encryption></source><target dev='{target}' bus='virtio'/></disk>",
            file.display()
        );
        DiskSpec::raw_xml(target, &xml)
    };
    let vm = bed
        .lab
        .vm("web01")
        .disk(disk("vda", "raw", &bare))
        .disk(disk("vdb", "qcow2", &over))
        .start()?;
    let reading = |source: String| {
        let mut options: Vec<String> = key.iter().map(|&it| it.to_owned()).collect();
        options.extend(["--image-opts".to_owned(), source]);
        Reading::Options(options)
    };
    let bare = format!("driver=luks,key-secret=s0,file.filename={}", bare.display());
    let over = format!(
        "driver=qcow2,encrypt.key-secret=s0,file.filename={}",
        over.display()
    );
    let mut subjects = [
        Subject::new("vda", 3 * MIB, reading(bare), "rescan: no-marks-on-raw")?,
        Subject::new("vdb", SIZE, reading(over), "incremental")?,
    ];
    rounds_equal_the_disks(&bed, &vm, &mut subjects, 2)
}

fn define_secret(bed: &Bed, uuid: &str) -> Result<()> {
    let file = bed.lab.path("secret.xml");
    let xml = format!("<secret ephemeral='no' private='no'><uuid>{uuid}</uuid></secret>");
    fs::write(&file, xml)?;
    bed.lab.virsh(&["secret-define", text(&file)?])?;
    let key = bed.lab.path("key");
    fs::write(&key, "open sesame")?;
    let set = ["secret-set-value", uuid, "--file", text(&key)?, "--plain"];
    bed.lab.virsh(&set)?;
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

/// A device tells no time of its last change, so what lies over it is never
/// believed; what lies on it is.
#[test]
fn a_qcow2_on_a_device_is_incremental_and_one_over_a_device_is_not() -> Result<()> {
    let bed = Bed::start()?;
    let device = |name: &str| {
        let file = bed.lab.path(name);
        make_room(&file)?;
        Loop::attach(&file)
    };
    let (top, below, raw) = (device("top")?, device("below")?, device("raw")?);
    create(&top.0, &[], SIZE)?;
    let io = tool("qemu-io").args(["-f", "raw", "-c", "write -P 5 0 2M"]);
    io.arg(&below.0).run()?;
    let over = bed.lab.path("over.qcow2");
    create(&over, &["-F", "raw", "-b", text(&below.0)?], SIZE)?;
    let block = |target: &str, format: &str, device: &Loop| {
        let xml = format!(
            "<disk type='block' device='disk'><driver name='qemu' type='{format}' discard='unmap'/>\
             <source dev='{}'/><target dev='{target}' bus='virtio'/></disk>",
            device.0.display()
        );
        DiskSpec::raw_xml(target, &xml)
    };
    let vm = bed
        .lab
        .vm("web01")
        .disk(block("vda", "qcow2", &top))
        .disk(DiskSpec::existing("vdb", &over, "qcow2"))
        .disk(block("vdc", "raw", &raw))
        .start()?;
    let image = |path: &Path| Reading::Image(path.to_owned(), "qcow2");
    let raw_image = Reading::Image(raw.0.clone(), "raw");
    let mut subjects = [
        Subject::new("vdc", 16 * MIB, raw_image, "rescan: no-marks-on-raw")?,
        Subject::new("vda", SIZE, image(&top.0), "incremental")?,
        Subject::new("vdb", SIZE, image(&over), "rescan: backing-unseen")?,
    ];
    let result = rounds_equal_the_disks(&bed, &vm, &mut subjects, 3);
    // Before the loop devices are detached.
    vm.destroy()?;
    result
}

/// A volume is known by the path that its pool gives it.
/// A row of the table; its test is made there.
pub(crate) fn volumes_come_back_and_a_pool_made_anew_elsewhere_is_noticed() -> Result<()> {
    let bed = Bed::start()?;
    let pools = ["here", "there"].map(|name| bed.lab.path(name));
    for pool in &pools {
        fs::create_dir(pool)?;
        create(&pool.join("volume.qcow2"), &[], SIZE)?;
    }
    let [here, there] = &pools;
    let define = ["pool-define-as", "images", "dir", "--target"];
    bed.lab.virsh(&[&define[..], &[text(here)?]].concat())?;
    bed.lab.virsh(&["pool-start", "images"])?;
    let xml = "<disk type='volume' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/>\
               <source pool='images' volume='volume.qcow2'/><target dev='vda' bus='virtio'/></disk>";
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::raw_xml("vda", xml))
        .start()?;
    let reading = Reading::Image(here.join("volume.qcow2"), "qcow2");
    let mut subjects = [Subject::new("vda", SIZE, reading, "incremental")?];
    rounds_equal_the_disks(&bed, &vm, &mut subjects, 3)?;

    // Without its pool nobody can say where the image is.
    bed.lab.virsh(&["pool-destroy", "images"])?;
    subjects[0].write(&vm, 5)?;
    let (unseen, report) = take(&bed, &vm, &[], &subjects)?;
    let seen = mode(&report, "vda");
    assert!(
        seen.starts_with("full") || seen.starts_with("rescan"),
        "{report}"
    );
    subjects[0].write(&vm, 5)?;
    let (again, report) = take(&bed, &vm, &[], &subjects)?;
    assert_eq!(mode(&report, "vda"), "rescan: image-unseen", "{report}");

    vm.destroy()?;
    bed.lab.virsh(&["pool-undefine", "images"])?;
    bed.lab.virsh(&[&define[..], &[text(there)?]].concat())?;
    bed.lab.virsh(&["pool-start", "images"])?;
    vm.start()?;
    subjects[0].reading = Reading::Image(there.join("volume.qcow2"), "qcow2");
    subjects[0].write(&vm, 5)?;
    let (elsewhere, report) = take(&bed, &vm, &[], &subjects)?;
    assert_eq!(mode(&report, "vda"), "full: chain-changed", "{report}");
    for taken in [unseen, again, elsewhere] {
        check(&bed, &taken)?;
    }
    Ok(())
}

/// Firmware runs, writes its variables, and starts again from restored ones.
#[test]
fn a_machine_with_firmware_starts_from_what_was_restored() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 2 * MIB))
        .uefi()
        .start()?;
    let variables = bed.lab.path("web01-vars.fd");
    let template = fs::read("/usr/share/OVMF/OVMF_VARS_4M.fd")?;
    wait_until(|| Ok(fs::read(&variables)? != template))?;
    bed.lab.virsh(&["suspend", "web01"])?;
    vm.write("vda", "write -P 7 1M 64k")?;
    let report = bed.backup(&vm, &[])?;
    let dir = bed.restore(&crate::support::point(&report), "out", &[])?;
    let mut restored = None;
    for entry in fs::read_dir(&dir)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if name.starts_with("nvram-") {
            restored = Some(path);
        }
    }
    let restored = restored.context("variables were restored")?;
    let kept = fs::read(&restored)?;
    assert!(kept == fs::read(&variables)?, "they are others");

    vm.destroy()?;
    fs::copy(&restored, bed.lab.path("web02-vars.fd"))?;
    let again = bed
        .lab
        .vm("web02")
        .disk(DiskSpec::existing("vda", &dir.join("vda.qcow2"), "qcow2"))
        .uefi()
        .start()?;
    again.write("vda", "read -P 7 1M 64k")?;
    assert_eq!(again.state()?, "running");
    Ok(())
}

fn wait_until(done: impl Fn() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_mins(1);
    while !done()? {
        ensure!(Instant::now() < deadline, "it did not happen in a minute");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
