//! The contract of the command line, as far as it needs no VM: exit codes,
//! hints, JSON. It holds on a host without libvirt.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    dead_code,
    reason = "a test may stop at the first surprise"
)]

#[path = "../golden/mod.rs"]
mod golden;
mod hostile;
mod output;
mod settings;
mod shelf;
mod verify;

use std::fs;

use anyhow::Result;
use serde_json::{Value, json};

use crate::shelf::{Said, Shelf, UUID, below};

#[test]
fn a_repository_is_never_made_without_a_word_on_encryption() -> Result<()> {
    let shelf = Shelf::without_repository()?;
    let said = shelf.say(&["init"])?;
    said.expect(
        2,
        &["hint: say --encryption passphrase, --encryption keyfile or --encryption none"],
    );
    assert!(!shelf.repo().exists());
    Ok(())
}

#[test]
fn a_repository_is_never_made_over_another() -> Result<()> {
    let shelf = Shelf::with_points()?;
    let said = shelf.say(&["init", "--encryption", "none"])?;
    said.expect(
        1,
        &["state: nothing that was there before has been changed"],
    );
    assert_eq!(
        shelf.json(&["list"])?["points"].as_array().map(Vec::len),
        Some(3)
    );
    Ok(())
}

#[test]
fn a_wrong_passphrase_ends_with_12_before_any_vm_is_touched() -> Result<()> {
    let shelf = Shelf::encrypted()?;
    assert_eq!(
        shelf.json(&["list"])?,
        json!({"schema": 1, "points": [], "damaged": []})
    );
    for args in [
        &["list"][..],
        &[
            "backup",
            "web01",
            "-c",
            "qemu+unix:///system?socket=/nowhere",
        ],
    ] {
        let output = shelf
            .command(args)
            .env("HIGHWATER_PASSWORD", "wrong")
            .output()?;
        Said::of(&output).expect(12, &["hint: check the passphrase or the key file"]);
        assert!(!shelf.path("run").exists());
    }
    Ok(())
}

#[test]
fn no_repository_ends_with_10_and_a_hint_for_every_command() -> Result<()> {
    let shelf = Shelf::without_repository()?;
    for place in ["missing", "empty"] {
        let dir = shelf.path(place);
        if place == "empty" {
            fs::create_dir(&dir)?;
        }
        let dir = dir.to_str().unwrap();
        for args in [
            &["list", "-r", dir][..],
            &["show", "web01", "-r", dir],
            &["backup", "web01", "-r", dir],
            &["doctor", "--all", "-r", dir],
            &["restore", "web01", "--to", "/nowhere", "-r", dir],
        ] {
            shelf.say(args)?.expect(10, &["hint: check the path"]);
        }
    }
    assert!(below(&shelf.path("empty"))?.is_empty());
    Ok(())
}

#[test]
fn what_cannot_be_meant_is_a_usage_error_with_a_hint() -> Result<()> {
    let shelf = Shelf::with_points()?;
    let out = shelf.path("out");
    let to = out.to_str().unwrap();
    for (args, code, part) in [
        (&["show", "nobody"][..], 1, "hint: see `highwater list`"),
        (
            &["show", "web01@ZZZZ"],
            1,
            "hint: see `highwater list --all`",
        ),
        (&["show", "web01~9"], 1, "hint: see `highwater list --all`"),
        (&["show", "web01@"], 2, "hint: write VM, VM@ID"),
        (&["show", "id:0"], 2, "hint: name one of them: id:0"),
        (
            &["restore", "web01", "--to", to, "-d", "vdz"],
            2,
            "hint: its disks are: vda",
        ),
        (
            &["restore", "web01", "--to", "-", "--format", "qcow2"],
            2,
            "hint: a qcow2 image",
        ),
        (&["backup"], 2, "<VM>"),
        (&["backup", "web01", "--all"], 2, "cannot be used with"),
        (&["doctor", "--fix"], 2, "<VM>"),
        (&["backup", "web01", "--compression", "zstd:0"], 2, "zstd:1"),
    ] {
        shelf.say(args)?.expect(code, &[part]);
    }
    assert!(!out.exists());
    let mut command = shelf.command(&["list"]);
    let said = Said::of(&command.env_remove("HIGHWATER_REPO").output()?);
    said.expect(2, &["hint: name it with -r PATH, in HIGHWATER_REPO"]);
    Ok(())
}

#[test]
fn a_failure_is_told_in_json_too() -> Result<()> {
    let shelf = Shelf::with_points()?;
    let said = shelf.say(&["show", "nobody", "--json"])?;
    said.expect(1, &["error: cannot find a restore point of VM `nobody`"]);
    let document: Value = serde_json::from_str(&said.stdout)?;
    assert_eq!(
        document,
        json!({"schema": 1, "status": "failed",
               "error": "cannot find a restore point of VM `nobody`", "because": [],
               "state": null, "hint": "see `highwater list` for VMs with restore points",
               "exit_code": 1})
    );
    Ok(())
}

#[test]
fn list_tells_vms_then_points_and_json_tells_all() -> Result<()> {
    let shelf = Shelf::with_points()?;
    let vms = shelf.run(&["list"])?;
    assert_eq!(vms.lines().count(), 3, "{vms}");
    assert!(
        vms.contains("web01") && vms.contains(UUID) && vms.contains("2026-11-20 04:00:00"),
        "{vms}"
    );
    let of_one = shelf.run(&["snapshots", "web01"])?;
    assert_eq!(of_one.lines().count(), 3, "{of_one}");
    assert!(!of_one.contains("db01"), "{of_one}");
    assert_eq!(shelf.run(&["list", "--all"])?.lines().count(), 4);
    assert_eq!(shelf.run(&["list", &format!("uuid:{UUID}")])?, of_one);

    let points = shelf.json(&["list", "web01"])?;
    assert_eq!(points["schema"], 1);
    let first = &points["points"][0];
    for (field, value) in [
        ("vm", json!("web01")),
        ("vm_uuid", json!(UUID)),
        ("taken_at", json!("2026-11-20T03:00:00Z")),
        ("utc_offset_minutes", json!(60)),
        ("consistency", json!("filesystem")),
        ("size_bytes", json!(1 << 20)),
        ("stored_bytes", json!(4096)),
        ("tags", json!(["nightly"])),
        ("group", json!("web")),
    ] {
        assert_eq!(first[field], value, "{field} in {first}");
    }
    Ok(())
}

#[test]
fn show_tells_everything_about_a_point() -> Result<()> {
    let shelf = Shelf::with_points()?;
    let text = shelf.run(&["show", "web01"])?;
    for part in [
        "web01",
        UUID,
        "2026-11-20 04:00:00",
        "highwater 0.1.0 on host1",
        "nightly",
        "rescan",
        "bitmap-missing",
        "/nvram/vars.fd",
        "hda",
        "a CD-ROM drive",
        "bitmap lied",
        "removed unfinished mark hw-x",
    ] {
        assert!(text.contains(part), "no `{part}` in {text}");
    }
    // Every way to write the older of the two means the same.
    let older = shelf.json(&["show", "web01~1"])?;
    let id = older["point"].as_str().unwrap();
    let of_id = [
        format!("id:{id}"),
        format!("web01@{id}"),
        "web01@2026-11-20T03:30".to_owned(),
    ];
    for point in of_id
        .iter()
        .map(String::as_str)
        .chain(["web01@2026-11-20T05:30+02:00"])
    {
        assert_eq!(shelf.json(&["show", point])?, older, "{point}");
    }
    assert_eq!(
        older["skipped"],
        json!([{"disk": "hda", "reason": "a CD-ROM drive"}])
    );
    assert_eq!(older["files"][0]["role"], "nvram");
    assert_eq!(older["disks"][0]["reason"], "bitmap-missing");
    assert_eq!(older["seconds"], json!(1.234));
    Ok(())
}

#[test]
fn libvirt_on_another_host_is_refused_clearly() -> Result<()> {
    let shelf = Shelf::with_points()?;
    for uri in [
        "qemu+ssh://host/system",
        "qemu+tls://host/system",
        "qemu://host/system",
    ] {
        shelf.say(&["backup", "web01", "-c", uri])?.expect(
            1,
            &[
                &format!("error: cannot use connection `{uri}`"),
                "because: libvirt on another host cannot be used yet",
                "hint: run highwater on the host that runs the VM",
            ],
        );
    }
    Ok(())
}

#[test]
fn without_libvirts_library_everything_works_but_libvirt() -> Result<()> {
    let shelf = Shelf::with_points()?;
    // The loader finds this first, and it is no library.
    let libraries = shelf.path("libraries");
    fs::create_dir(&libraries)?;
    fs::File::create(libraries.join("libvirt.so.0"))?;
    let say = |args: &[&str]| -> Result<Said> {
        Ok(Said::of(
            &shelf
                .command(args)
                .env("LD_LIBRARY_PATH", &libraries)
                .output()?,
        ))
    };
    let out = shelf.path("out");
    say(&["list"])?.expect(0, &[]);
    say(&["show", "web01"])?.expect(0, &[]);
    say(&["restore", "web01", "--to", out.to_str().unwrap()])?.expect(0, &[]);
    assert!(fs::read(out.join("vda.raw"))?.starts_with(b"high"));
    say(&["backup", "web01", "-c", "qemu:///system"])?.expect(
        1,
        &[
            "error: cannot use libvirt",
            "libvirt.so.0",
            "hint: install libvirt's client",
        ],
    );
    Ok(())
}
