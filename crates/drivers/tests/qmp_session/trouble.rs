//! What goes wrong around a session: it costs the backup, never the guest.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use highwater_drivers::qmp::QmpDriver;
use highwater_hypervisor::{BeginOrder, Begun, Driver as _, ErrorKind, ExportAddress, MarkOrder};
use highwater_model::SystemClock;
use highwater_testkit::{Attach, BareLab, DiskSpec, MIB, tool};
use serde_json::json;

use crate::reading::{dirty_ranges, read_export, uri};
use crate::rig::{Rig, mark_of};
use crate::space::SmallSpace;

const SIZE: u64 = 8 * MIB;

fn one_disk() -> Rig {
    let lab = BareLab::start().unwrap();
    let attach = Attach::blockdev("virtio-blk-pci").node("disk");
    let disk = DiskSpec::qcow2("vda", SIZE);
    let vm = lab.vm("web01").disk_as(disk, attach).start().unwrap();
    vm.write("vda", "write -P 1 0 4M").unwrap();
    Rig::at(vm)
}

fn begin(rig: &mut Rig) -> (BeginOrder, Begun) {
    let order = rig.order(&[("vda", None)]);
    let begun = rig.driver.begin(&order).unwrap();
    (order, begun)
}

fn assert_reads(rig: &Rig, begun: &Begun, wanted: &[u8]) {
    let read = read_export(&begun.exports[0], &rig.lab().path("read.raw"));
    assert!(std::fs::read(read).unwrap() == wanted);
}

fn disk(rig: &Rig) -> Vec<u8> {
    let copy = rig.lab().path("copy.raw");
    rig.vm.raw_copy("vda", &copy).unwrap();
    std::fs::read(copy).unwrap()
}

#[test]
fn a_scratch_file_that_finds_no_room_costs_the_backup_and_no_guest_a_write() {
    let small = SmallSpace::mount("2m");
    let mut rig = one_disk();
    let (first, _) = begin(&mut rig);
    rig.driver.end(&first).unwrap();
    let parent = mark_of(&first).clone();
    let mut order = rig.order(&[("vda", Some(&parent))]);
    order.scratch_dir = small.path().join(order.session.to_string());
    let begun = rig.driver.begin(&order).unwrap();
    rig.driver.check(&order.vm, order.session).unwrap();
    // More than there is room for; each of them is asked for its success.
    for offset in 0..8 {
        rig.vm
            .write("vda", &format!("write -P 7 {}k 512k", offset * 512))
            .unwrap();
    }
    assert_eq!(rig.vm.state().unwrap(), "running");
    let error = rig.driver.check(&order.vm, order.session).unwrap_err();
    assert_eq!(error.kind, ErrorKind::SessionLost, "{error:?}");
    let uri = uri(&begun.exports[0]);
    let read = tool("qemu-img").args(["convert", "-f", "raw", "-O", "raw", &uri]);
    assert!(read.arg(rig.lab().path("read.raw")).run().is_err());
    rig.driver.end(&order).unwrap();
    assert!(std::fs::read_dir(small.path()).unwrap().next().is_none());
    let new = mark_of(&order).clone();
    rig.driver.mark(&order.vm, &MarkOrder::Remove(new)).unwrap();
    // The old mark has seen it all.
    let order = rig.order(&[("vda", Some(&parent))]);
    let begun = rig.driver.begin(&order).unwrap();
    assert_eq!(dirty_ranges(&begun.exports[0]), [(0, 4 * MIB)]);
    assert_reads(&rig, &begun, &disk(&rig));
    rig.driver.end(&order).unwrap();
}

#[test]
fn a_scratch_directory_without_room_is_refused_before_anything_is_done() {
    let small = SmallSpace::mount("256k");
    let mut rig = one_disk();
    let before = rig.vm.graph().unwrap();
    let mut order = rig.order(&[("vda", None)]);
    order.scratch_dir = small.path().join(order.session.to_string());
    let error = rig.driver.begin(&order).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Scratch, "{error:?}");
    assert!(!error.left_behind);
    assert_eq!(rig.vm.graph().unwrap(), before);
    rig.assert_no_files();
}

#[test]
fn a_guest_that_writes_past_the_filter_fails_the_backup() {
    let mut rig = one_disk();
    let (order, _) = begin(&mut rig);
    let device = rig.vm.device("vda").unwrap();
    let past = json!({"path": device, "property": "drive", "value": "disk"});
    rig.driver.check(&order.vm, order.session).unwrap();
    // QEMU refuses it itself while the snapshot is read: the filter shares no
    // writing with others. Whoever wants it all the same removes that first.
    assert!(rig.vm.qmp("qom-set", &past).is_err());
    let exports = rig.vm.graph().unwrap().exports;
    let remove = json!({"id": exports[0], "mode": "hard"});
    rig.vm.qmp("block-export-del", &remove).unwrap();
    let error = rig.driver.check(&order.vm, order.session).unwrap_err();
    assert_eq!(error.kind, ErrorKind::SessionLost, "{error:?}");
    rig.driver.end(&order).unwrap();
    rig.assert_no_files();
}

#[test]
fn a_snapshot_taken_meanwhile_stays_what_the_guest_writes_to() {
    let mut rig = one_disk();
    let (order, begun) = begin(&mut rig);
    let wanted = disk(&rig);
    let overlay = rig.lab().path("overlay.qcow2");
    let create = tool("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&overlay);
    create.arg("8M").run().unwrap();
    let add = json!({"driver": "qcow2", "node-name": "overlay", "backing": null,
        "file": {"driver": "file", "filename": overlay}});
    rig.vm.qmp("blockdev-add", &add).unwrap();
    let snapshot = json!({"node": "disk", "overlay": "overlay"});
    rig.vm.qmp("blockdev-snapshot", &snapshot).unwrap();
    rig.vm.write("vda", "write -P 9 1M 1M").unwrap();
    assert_reads(&rig, &begun, &wanted);
    rig.driver.end(&order).unwrap();
    let roots = rig.vm.graph().unwrap().roots;
    assert!(roots[0].ends_with("-> overlay"), "{roots:?}");
    // It is in the overlay, not in the image below.
    assert!(disk(&rig) == wanted);
    rig.assert_no_files();
}

#[test]
fn a_snapshot_of_the_guests_device_loses_the_session_and_no_image_names_our_filter() {
    for format in ["qcow2", "raw"] {
        let lab = BareLab::start().unwrap();
        let attach = Attach::blockdev("virtio-blk-pci").node("disk");
        let spec = match format {
            "raw" => DiskSpec::raw("vda", SIZE),
            _ => DiskSpec::qcow2("vda", SIZE),
        };
        let mut rig = Rig::at(lab.vm("web01").disk_as(spec, attach).start().unwrap());
        rig.vm.write("vda", "write -P 1 0 4M").unwrap();
        let (order, _) = begin(&mut rig);
        let overlays = ["one", "two"].map(|name| rig.lab().path(name));
        for overlay in &overlays {
            let roots = rig.vm.graph().unwrap().roots;
            let (_, root) = roots[0].split_once("-> ").unwrap();
            let snapshot = json!({"node-name": root, "snapshot-file": overlay, "format": "qcow2",
                "snapshot-node-name": overlay.file_name().unwrap().to_str()});
            rig.vm.qmp("blockdev-snapshot-sync", &snapshot).unwrap();
        }
        rig.vm.write("vda", "write -P 9 1M 1M").unwrap();
        let error = rig.driver.check(&order.vm, order.session).unwrap_err();
        assert_eq!(error.kind, ErrorKind::SessionLost, "{error:?}");
        let since = Instant::now();
        let ended = rig.driver.end(&order).unwrap();
        assert!(since.elapsed() < Duration::from_secs(5), "{ended:?}");
        assert_eq!(ended.warnings, Vec::<String>::new());
        rig.assert_no_files();
        // The guest goes on, and its images can be opened by anybody.
        rig.vm.write("vda", "write -P 8 2M 1M").unwrap();
        let mut wanted = vec![1; 4 << 20];
        wanted.resize(8 << 20, 0);
        wanted[1 << 20..2 << 20].fill(9);
        wanted[2 << 20..3 << 20].fill(8);
        rig.vm.flush("vda").unwrap();
        let about = tool("qemu-img").args(["info", "-U", "--backing-chain"]);
        let about = about.arg(&overlays[1]).run().unwrap();
        assert!(
            about.contains(&format!("backing file format: {format}")),
            "{about}"
        );
        assert!(!about.contains("copy-before"), "{about}");
        let whole = rig.lab().path("whole.raw");
        let convert = tool("qemu-img").args(["convert", "-U", "-O", "raw"]);
        convert.arg(&overlays[1]).arg(&whole).run().unwrap();
        assert!(std::fs::read(&whole).unwrap() == wanted);
        // So does the next backup.
        let target = rig.driver.observe(&order.vm).unwrap().disks[0]
            .target
            .clone();
        let mut order = rig.order(&[(target.as_str(), None)]);
        order.new_mark = None;
        let begun = rig.driver.begin(&order).unwrap();
        assert_reads(&rig, &begun, &wanted);
        rig.driver.end(&order).unwrap();
        rig.assert_no_files();
    }
}

#[test]
fn what_cannot_be_taken_out_is_said_and_keeps_its_files() {
    let mut rig = one_disk();
    let (order, _) = begin(&mut rig);
    let fleece = rig.vm.graph().unwrap().nodes;
    let fleece = fleece.iter().find(|it| it.starts_with("hw-fleece-"));
    let (fleece, _) = fleece.unwrap().split_once(' ').unwrap();
    // Somebody reads it for a purpose of their own.
    let add = json!({"driver": "raw", "node-name": "theirs", "file": fleece});
    rig.vm.qmp("blockdev-add", &add).unwrap();
    let since = Instant::now();
    let ended = rig.driver.end(&order).unwrap();
    assert!(since.elapsed() < Duration::from_secs(30), "{ended:?}");
    let warnings = ended.warnings.join("\n");
    assert!(warnings.contains("is still in VM"), "{warnings}");
    assert!(order.scratch_dir.exists());
    let swept = rig.driver.sweep(&order.vm, &rig.places()).unwrap();
    assert!(!swept.warnings.is_empty(), "{swept:?}");
    assert!(order.scratch_dir.exists());
    let del = json!({"node-name": "theirs"});
    rig.vm.qmp("blockdev-del", &del).unwrap();
    rig.driver.sweep(&order.vm, &rig.places()).unwrap();
    rig.assert_no_files();
}

#[test]
fn a_reader_that_hangs_keeps_no_session_from_its_end() {
    let mut rig = one_disk();
    let tidy = rig.vm.graph().unwrap().without_bitmaps();
    let (order, begun) = begin(&mut rig);
    // It opens the export, and never says another word.
    let ExportAddress::Unix(socket) = &begun.exports[0].address else {
        panic!("{begun:?}")
    };
    let mut reader = UnixStream::connect(socket).unwrap();
    let name = begun.exports[0].name.as_bytes();
    reader.read_exact(&mut [0; 18]).unwrap();
    let mut opens = vec![0, 0, 0, 3];
    opens.extend(b"IHAVEOPT\x00\x00\x00\x01");
    opens.extend(u32::try_from(name.len()).unwrap().to_be_bytes());
    opens.extend(name);
    reader.write_all(&opens).unwrap();
    let mut size = [0; 10];
    reader.read_exact(&mut size).unwrap();
    assert_eq!(size[..8], SIZE.to_be_bytes());
    let ended = rig.driver.end(&order).unwrap();
    assert_eq!(ended.warnings, Vec::<String>::new());
    assert_eq!(rig.vm.graph().unwrap().without_bitmaps(), tidy);
}

#[test]
fn a_qemu_that_ends_meanwhile_takes_its_session_along() {
    let mut rig = one_disk();
    let (order, _) = begin(&mut rig);
    assert!(!rig.driver.is_alarmed(order.session));
    rig.vm.kill().unwrap();
    let since = Instant::now();
    while !rig.driver.is_alarmed(order.session) {
        assert!(since.elapsed() < Duration::from_secs(10));
    }
    let error = rig.driver.check(&order.vm, order.session).unwrap_err();
    assert_eq!(error.kind, ErrorKind::SessionLost, "{error:?}");
    let ended = rig.driver.end(&order).unwrap();
    assert!(!ended.ended_job);
    rig.assert_no_files();
    // Another one at the same place is another QEMU.
    rig.vm.start().unwrap();
    let (order, _) = begin(&mut rig);
    rig.driver.end(&order).unwrap();
}

#[test]
fn a_disk_that_is_unplugged_meanwhile_fails_the_backup_and_is_let_go() {
    let lab = BareLab::start().unwrap();
    let attach = Attach::blockdev("scsi-hd").node("disk");
    let disk = DiskSpec::qcow2("vda", SIZE);
    let vm = lab.vm("web01").disk_as(disk, attach).start().unwrap();
    let mut rig = Rig::at(vm);
    let (order, _) = begin(&mut rig);
    let device = rig.driver.observe(&order.vm).unwrap().disks[0]
        .device
        .clone()
        .unwrap();
    rig.vm.qmp("device_del", &json!({"id": device})).unwrap();
    let since = Instant::now();
    while !rig.vm.graph().unwrap().roots.is_empty() {
        assert!(
            since.elapsed() < Duration::from_secs(30),
            "it is still there"
        );
    }
    let error = rig.driver.check(&order.vm, order.session).unwrap_err();
    assert_eq!(error.kind, ErrorKind::SessionLost, "{error:?}");
    rig.driver.end(&order).unwrap();
    let left = rig.vm.graph().unwrap();
    assert!(
        left.nodes.iter().all(|node| !node.starts_with("hw-")),
        "{left:?}"
    );
    assert!(
        left.nodes.iter().any(|node| node.starts_with("disk ")),
        "{left:?}"
    );
    rig.assert_no_files();
}

#[test]
fn an_encrypted_disk_has_an_encrypted_scratch_file() {
    let lab = BareLab::start().unwrap();
    let image = lab.path("luks.qcow2");
    let luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    tool("qemu-img")
        .args([
            "create",
            "-q",
            "-f",
            "qcow2",
            "--object",
            "secret,id=s,data=sesame",
            "-o",
            luks,
        ])
        .arg(&image)
        .arg("8M")
        .run()
        .unwrap();
    let opened = format!(
        "qcow2,node-name=disk,encrypt.format=luks,encrypt.key-secret=s,file.driver=file,file.filename={}",
        image.display()
    );
    let vm = lab.vm("web01").args([
        "-object",
        "secret,id=s,data=sesame",
        "-blockdev",
        &opened,
        "-device",
        "virtio-blk-pci,drive=disk,id=vda",
    ]);
    let mut rig = Rig::at(vm.start().unwrap());
    let write = |rig: &Rig, command: &str| {
        let line = format!("qemu-io -d /machine/peripheral/vda/virtio-backend \"{command}\"");
        rig.vm.hmp(&line).unwrap();
    };
    let secret = "a secret of the guest's, as it was at the point in time";
    let pattern = lab.path("pattern");
    std::fs::write(&pattern, format!("{secret:<512}")).unwrap();
    write(&rig, &format!("write -s {} 0 64k", pattern.display()));
    let tidy = rig.vm.graph().unwrap().without_bitmaps();
    let (order, begun) = begin(&mut rig);
    write(&rig, "write -P 9 0 64k");
    let read = read_export(&begun.exports[0], &lab.path("read.raw"));
    let read = std::fs::read(read).unwrap();
    assert!(read.starts_with(secret.as_bytes()));
    let scratch = order
        .scratch_dir
        .join(format!("hw-{}-vda.scratch", order.session));
    let scratch = std::fs::read(scratch).unwrap();
    let shows = |needle: &[u8]| scratch.windows(needle.len()).any(|it| it == needle);
    assert!(scratch.len() > 64 << 10 && !shows(secret.as_bytes()));
    rig.driver.end(&order).unwrap();
    assert_eq!(rig.vm.graph().unwrap().without_bitmaps(), tidy);
    rig.assert_no_files();
}

/// QEMU needs neither a UUID nor a name of its own.
#[test]
fn a_session_at_another_vm_of_the_same_name_is_left_alone() {
    let mut rig = one_disk();
    let (order, _) = begin(&mut rig);
    let mut other = rig.lab().vm("other").nameless().prelaunch();
    other = other.disk(DiskSpec::qcow2("vda", SIZE));
    let other = other.start().unwrap();
    let uri = format!("{}?name=web01", other.uri());
    let mut driver = QmpDriver::connect(&uri, Arc::new(SystemClock)).unwrap();
    let twin = driver.find("web01").unwrap();
    assert_eq!(twin, rig.found, "nothing tells one from the other");
    let places = rig.places();
    assert_eq!(driver.leftovers(&twin, &places).unwrap(), []);
    let swept = driver.sweep(&twin, &places).unwrap();
    assert_eq!(swept.sessions, []);
    assert!(
        swept.warnings[0].contains("another QEMU"),
        "{:?}",
        swept.warnings
    );
    assert!(order.scratch_dir.is_dir() && order.socket_dir.is_dir());
    rig.driver.check(&order.vm, order.session).unwrap();
    rig.driver.end(&order).unwrap();
    rig.assert_no_files();
}
