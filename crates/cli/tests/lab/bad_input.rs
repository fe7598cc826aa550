//! What is asked for is not there, or the repository is not what it should be:
//! a clear error, the right exit code, and nothing is harmed.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use anyhow::Result;
use highwater_testkit::tool;

use crate::scene::{Mount, Scene};
use crate::support::Bed;

#[test]
fn an_unknown_vm_or_disk_and_a_vm_that_is_off_are_named() -> Result<()> {
    let scene = Scene::start()?;
    scene.bed.lab.vm("web02").define()?;
    scene.refused(
        &["backup", "web0l"],
        1,
        &[
            "error: cannot look at VM `web0l`",
            "  because: cannot find VM `web0l`",
            "  because: libvirt at `URI` knows no VM of that name or UUID",
            "state: no restore point was added; earlier ones are untouched",
            "hint: did you mean `web01`? `virsh list --all` shows all VMs",
        ],
    )?;
    for option in ["-d", "-x"] {
        scene.refused(
            &["backup", "web01", option, "vdz"],
            2,
            &[
                "error: cannot back up disk `vdz` of VM `web01`: no such disk",
                "state: no restore point was added; earlier ones are untouched",
                "hint: its disks are: vda",
            ],
        )?;
    }
    scene.refused(
        &["backup", "web02", "--offline", "refuse"],
        1,
        &[
            "error: cannot back up VM `web02`: it is off",
            "state: no restore point was added; earlier ones are untouched",
            "hint: start it (`virsh start web02`), or have its images read: `--offline yield`",
        ],
    )?;
    scene.unharmed()
}

#[test]
fn a_place_that_is_no_repository_is_never_written_to() -> Result<()> {
    let scene = Scene::start()?;
    let place = |name: &str| scene.bed.lab.path(name);
    fs::create_dir(place("empty"))?;
    fs::create_dir(place("photos"))?;
    fs::write(place("photos/a.jpg"), "not a repository")?;
    fs::write(place("file"), "not even a directory")?;
    // What restic leaves: a file `config` that is binary, and like folders.
    for folder in ["data", "index", "keys", "locks", "snapshots"] {
        fs::create_dir_all(place("restic").join(folder))?;
    }
    fs::write(place("restic/config"), [0x9f, 0x02, 0xfe, 0x11, 0x80, 0x0a])?;
    for (name, code, lines) in [
        (
            "missing",
            10,
            &[
                "error: cannot find a repository in LAB/missing",
                "hint: check the path, or create one with `highwater init --encryption ...`",
            ][..],
        ),
        (
            "empty",
            10,
            &[
                "error: cannot find a repository in LAB/empty",
                "hint: check the path, or create one with `highwater init --encryption ...`",
            ],
        ),
        (
            "photos",
            10,
            &[
                "error: cannot find a repository in LAB/photos",
                "hint: check the path, or create one with `highwater init --encryption ...`",
            ],
        ),
        (
            "restic",
            10,
            &[
                "error: cannot find a repository of Highwater",
                "  because: there is a `config`, but of another program",
                "hint: check the path, or create one with `highwater init --encryption ...`",
            ],
        ),
        (
            "file",
            10,
            &[
                "error: cannot find a repository in LAB/file",
                "hint: check the path, or create one with `highwater init --encryption ...`",
            ],
        ),
    ] {
        let path = place(name);
        let before = listing(&scene.bed, name)?;
        let repo = path.to_str().unwrap();
        scene.refused(&["backup", "web01", "-r", repo], code, lines)?;
        scene.refused(&["list", "-r", repo], code, lines)?;
        assert_eq!(listing(&scene.bed, name)?, before, "{name} was changed");
    }
    scene.unharmed()
}

/// All that lies below a place, with times.
fn listing(bed: &Bed, name: &str) -> Result<String> {
    let find = tool("sh").args(["-c", "find \"$1\" -printf '%p %s %T@\\n' 2>&1 | sort", "sh"]);
    find.arg(bed.lab.path(name)).run()
}

#[test]
fn a_newer_repository_and_a_wrong_key_are_told_apart() -> Result<()> {
    let scene = Scene::encrypted()?;
    let config = scene.bed.repo().join("config");
    let good = fs::read_to_string(&config)?;
    for (from, to, what) in [
        (
            "\"version\":1",
            "\"version\":2",
            "version 2 with features []",
        ),
        (
            "\"features_incompat\":[]",
            "\"features_incompat\":[\"sparse\\u001b[2J\"]",
            "version 1 with features [\"sparse\\u{1b}[2J\"]",
        ),
    ] {
        assert!(good.contains(from), "{good}");
        fs::set_permissions(&config, fs::Permissions::from_mode(0o600))?;
        fs::write(&config, good.replace(from, to))?;
        let because = format!("  because: it has format {what}; this program knows version 1");
        let lines = [
            "error: cannot open the repository",
            &because,
            "hint: use the version of highwater that made it, or a newer one",
        ];
        scene.refused(&["backup", "web01"], 1, &lines)?;
        scene.refused(&["restore", "web01", "--to", "/nowhere"], 1, &lines)?;
    }
    fs::write(&config, &good)?;
    let lines = [
        "error: cannot unlock the repository",
        "  because: no key fits this secret, or `config` was tampered with",
        "hint: check the passphrase or the key file",
    ];
    let mut wrong = scene.bed.command(&["backup", "web01"]);
    scene.refused_by(wrong.env("HIGHWATER_PASSWORD", "wrong"), 12, &lines)?;
    scene.unharmed()
}

#[test]
fn a_read_only_repository_can_be_read_and_takes_no_backup() -> Result<()> {
    let scene = Scene::start()?;
    let mount = Mount::read_only(&scene.bed.repo())?;
    scene.refused(
        &["backup", "web01"],
        1,
        &[
            "error: cannot store the backup of VM `web01`",
            "  because: cannot go on after a failed upload",
            "  because: cannot begin a pack",
            "  because: cannot write `tmp` in LAB/repo",
            "  because: Read-only file system (os error 30)",
            "state: no restore point was added; earlier ones are untouched; the session at the VM was ended",
            "hint: make the repository writable, then run `highwater backup web01` again",
        ],
    )?;
    scene.bed.run(&["list"])?;
    scene.first_is_whole()?;
    drop(mount);
    scene.unharmed()
}
