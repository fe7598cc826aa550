//! What images tell, against what QEMU tells of them while the VM runs.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use highwater_drivers::offline::ImageDriver;
use highwater_hypervisor::{
    DiskFacts, Driver as _, ErrorKind, MarkSupport, NoMarks, Place, RootNode, RunState, VmRef,
};
use highwater_model::{DATA_FILE_FORMAT, SystemClock};
use highwater_testkit::tool;

use crate::rig::Rig;

fn create(path: &Path, options: &str) {
    tool("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", options])
        .arg(path)
        .arg("4M")
        .run()
        .unwrap();
}

fn look(path: &Path) -> DiskFacts {
    let uri = format!("image:vda={}?name=vm", path.display());
    let mut driver = ImageDriver::connect(&uri, Arc::new(SystemClock)).unwrap();
    let vm = driver.find("vm").unwrap();
    driver.observe(&vm).unwrap().disks.remove(0)
}

fn links(facts: &DiskFacts) -> Vec<(String, &str)> {
    let name = |name: &str| name.rsplit('/').next().unwrap_or_default().to_owned();
    let links = facts.chain.iter();
    links
        .map(|link| (name(&link.name), link.format.as_str()))
        .collect()
}

#[test]
fn a_chain_is_followed_over_relative_names_data_files_and_json() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir(at("sub")).unwrap();
    fs::write(at("base.raw"), vec![0; 4 << 20]).unwrap();
    create(
        &at("sub/mid.qcow2"),
        "backing_file=../base.raw,backing_fmt=raw",
    );
    let data = format!("data_file={},data_file_raw=on", at("data").display());
    create(&at("df.qcow2"), &data);
    create(
        &at("top.qcow2"),
        "backing_file=sub/mid.qcow2,backing_fmt=qcow2",
    );
    let json = format!(
        r#"json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{}"}}}}"#,
        at("top.qcow2").display()
    );
    tool("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &json])
        .arg(at("over.qcow2"))
        .run()
        .unwrap();
    let facts = look(&at("over.qcow2"));
    let seen = links(&facts);
    let expected = [
        ("over.qcow2", "qcow2"),
        ("top.qcow2", "qcow2"),
        ("mid.qcow2", "qcow2"),
        ("base.raw", "raw"),
    ];
    let expected: Vec<_> = expected.map(|(a, b)| (a.to_owned(), b)).into();
    assert_eq!(seen, expected);
    assert_eq!(facts.root_node, RootNode::Same);
    assert!(facts.chain.iter().all(|link| link.stamp().is_some()));
    assert_eq!(
        facts.chain[3].name,
        format!("{}/sub/../base.raw", dir.path().display())
    );
    let facts = look(&at("df.qcow2"));
    let expected = [("df.qcow2", "qcow2"), ("data", DATA_FILE_FORMAT)];
    let expected: Vec<_> = expected.map(|(a, b)| (a.to_owned(), b)).into();
    assert_eq!(links(&facts), expected);
    assert_eq!((facts.marks, facts.size_bytes), (MarkSupport::Yes, 4 << 20));
}

#[test]
fn what_cannot_be_read_whole_is_not_read_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let unknown = |path: &Path, word: &str| {
        let facts = look(path);
        let RootNode::Unknown(why) = &facts.root_node else {
            panic!("{facts:?}")
        };
        assert!(why.contains(word), "{why}");
        facts
    };
    unknown(&at("nowhere.qcow2"), "cannot be opened");
    unknown(dir.path(), "neither a file nor a block device");
    create(&at("base.qcow2"), "compat=1.1");
    create(
        &at("top.qcow2"),
        "backing_file=base.qcow2,backing_fmt=qcow2",
    );
    fs::remove_file(at("base.qcow2")).unwrap();
    unknown(&at("top.qcow2"), "base.qcow2");
    tool("qemu-img")
        .args(["create", "-q", "-u", "-f", "qcow2", "-F", "raw"])
        .args(["-b", "nbd://127.0.0.1:1/x"])
        .arg(at("far.qcow2"))
        .arg("4M")
        .run()
        .unwrap();
    let far = unknown(&at("far.qcow2"), "no file of this host");
    assert_eq!(far.chain[1].place, Place::Network);
    // A part of a file is not the file, however it is said.
    fs::write(at("parts.raw"), vec![0; 8 << 20]).unwrap();
    let parts = at("parts.raw");
    let part = format!(
        r#"json:{{"driver":"raw","offset":1048576,"size":4194304,"file.driver":"file","file.filename":"{}"}}"#,
        parts.display()
    );
    let qcow2 = format!(
        r#"json:{{"driver":"qcow2","file.driver":"file","file.filename":"{}"}}"#,
        parts.display()
    );
    for (name, below, word) in [
        ("part.qcow2", part, "`offset`"),
        ("two.qcow2", qcow2, "is said to be raw"),
    ] {
        tool("qemu-img")
            .args([
                "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", &below,
            ])
            .arg(at(name))
            .arg("4M")
            .run()
            .unwrap();
        unknown(&at(name), word);
    }
    create(&at("loop.qcow2"), "compat=1.1");
    tool("qemu-img")
        .args(["rebase", "-u", "-F", "qcow2", "-b", "loop.qcow2"])
        .arg(at("loop.qcow2"))
        .run()
        .unwrap();
    unknown(&at("loop.qcow2"), "its own backing file");
    create(&at("old.qcow2"), "compat=0.10");
    let old = look(&at("old.qcow2"));
    assert_eq!(old.marks, MarkSupport::No(NoMarks::Qcow2Version2));
}

#[test]
fn a_guest_cannot_have_its_raw_disk_taken_for_an_image_of_the_hosts_files() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.img");
    fs::write(dir.path().join("secret"), [7; 4096]).unwrap();
    create(&raw, "backing_file=secret,backing_fmt=raw");
    let facts = look(&raw);
    assert!(matches!(facts.root_node, RootNode::Unknown(_)), "{facts:?}");
    // Below an image that says so it is a raw one, whatever it holds.
    let top = dir.path().join("top.qcow2");
    create(&top, "backing_file=disk.img,backing_fmt=raw");
    assert_eq!(
        links(&look(&top)),
        [
            ("top.qcow2".to_owned(), "qcow2"),
            ("disk.img".to_owned(), "raw")
        ]
    );
    let uri = format!("image:vda={}?name=vm&format=qcow2", raw.display());
    let mut driver = ImageDriver::connect(&uri, Arc::new(SystemClock)).unwrap();
    let vm = driver.find("vm").unwrap();
    let told = driver.observe(&vm).unwrap();
    assert_eq!(told.disks[0].root_node, RootNode::Same);
}

#[test]
fn a_vm_that_is_off_is_found_by_its_name_only() {
    let mut rig = Rig::new(&["vda"]);
    let vm = rig.vm();
    assert_eq!(rig.driver.list().unwrap(), [(vm.clone(), RunState::Off)]);
    assert_eq!(rig.driver.find("web01").unwrap(), vm);
    let error = rig.driver.find("web02").unwrap_err();
    assert_eq!(error.kind, ErrorKind::NoSuchVm);
    let other = VmRef {
        name: "web02".to_owned(),
        uuid: None,
    };
    assert!(rig.driver.observe(&other).is_err());
    let facts = rig.driver.observe(&vm).unwrap();
    assert!(!facts.expects_records && !facts.disks[0].device_known);
    assert!(
        facts.definition.contains("\"image\""),
        "{}",
        facts.definition
    );
    assert_eq!(facts.versions[0].0, "qemu-img");
}
