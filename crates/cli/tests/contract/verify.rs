//! `verify` finds damage, names what it hurts, and ends with 20.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::shelf::{Said, Shelf, Told, below};

/// Returns the objects below a folder of the repository, sorted.
fn objects(shelf: &Shelf, folder: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![shelf.repo().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Returns the packs of chunks.
fn chunk_packs(shelf: &Shelf) -> Result<Vec<PathBuf>> {
    let mut packs = objects(shelf, "packs")?;
    packs.retain(|path| fs::read(path).is_ok_and(|bytes| bytes[7] == 1));
    Ok(packs)
}

fn flip_last_bit(path: &Path) -> Result<()> {
    let mut bytes = fs::read(path)?;
    *bytes.last_mut().context("an object is not empty")? ^= 1;
    put(path, &bytes)
}

fn put(path: &Path, bytes: &[u8]) -> Result<()> {
    Ok(fs::File::create(path)?.write_all(bytes)?)
}

fn name(shelf: &Shelf, path: &Path) -> String {
    let path = path.strip_prefix(shelf.repo()).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Runs `verify`, which must find damage; returns its document.
fn damaged(shelf: &Shelf, args: &[&str]) -> Result<Value> {
    let said = shelf.say(&[args, &["--json"]].concat())?;
    said.expect(
        20,
        &[
            "error: cannot call the repository whole",
            "state: ",
            "hint: ",
        ],
    );
    Ok(serde_json::from_str(&said.stdout)?)
}

fn add(shelf: &Shelf, vm: &str, hours: i64, content: &[u8]) -> Result<String> {
    let file = "/nvram/vars.fd";
    shelf.add(&Told {
        vm,
        hours,
        disk: "vda",
        file,
        content,
    })
}

#[test]
fn a_whole_repository_is_called_whole_and_the_counts_are_right() -> Result<()> {
    let shelf = Shelf::with_points()?;
    let text = shelf.run(&["check", "--read-data"])?;
    assert!(
        text.contains("checked: 3 restore points (3 disks, 3 files)"),
        "{text}"
    );
    assert!(text.ends_with("no damage found\n"), "{text}");
    let document = shelf.json(&["verify"])?;
    assert_eq!(document["status"], "ok");
    assert_eq!(document["damage"], json!([]));
    assert_eq!(document["checked"]["points"], 3);
    assert_eq!(document["checked"]["packs_read"], 0);
    assert_eq!(shelf.run(&["verify", "--quiet"])?, "");
    Ok(())
}

#[test]
fn a_flipped_bit_in_a_chunk_is_found_by_reading_and_named_to_the_byte() -> Result<()> {
    let shelf = Shelf::plain()?;
    let id = add(&shelf, "web01", 0, b"high")?;
    let pack = &chunk_packs(&shelf)?[0];
    flip_last_bit(pack)?;
    // Nobody has looked at the content.
    shelf.run(&["verify"])?;
    let document = damaged(&shelf, &["verify", "--read-data"])?;
    let object = &document["damage"][0];
    assert_eq!(
        object["object"],
        json!({"kind": "pack", "name": name(&shelf, pack)})
    );
    assert_eq!(object["points"][0]["vm"], "web01");
    assert_eq!(object["points"][0]["point"], json!(id));
    // The last record of the pack is that of the file.
    assert_eq!(object["points"][0]["disks"], json!([]));
    assert_eq!(
        object["points"][0]["files"],
        json!([{"role": "nvram", "path": "/nvram/vars.fd"}])
    );
    assert_eq!(document["checked"]["points_damaged"], 1);
    Ok(())
}

#[test]
fn a_lost_pack_is_named_with_the_ranges_it_took_and_a_restore_leaves_nothing_wrong() -> Result<()> {
    let shelf = Shelf::plain()?;
    add(&shelf, "web01", 0, b"high")?;
    add(&shelf, "db01", 1, b"other")?;
    let packs = chunk_packs(&shelf)?;
    assert_eq!(packs.len(), 2);
    fs::remove_file(&packs[0])?;
    let document = damaged(&shelf, &["verify"])?;
    let object = &document["damage"][0];
    assert_eq!(object["what"], "it is missing");
    let hurt = object["points"][0]["vm"]
        .as_str()
        .context("a VM")?
        .to_owned();
    assert_eq!(
        object["points"][0]["disks"],
        json!([{"disk": "vda", "damaged_bytes": 65536,
                "ranges": [{"start": 0, "length": 65536}], "more_ranges": 0}])
    );
    let text = shelf.say(&["verify"])?.stdout;
    assert!(text.contains("    vda: 64 KiB at 0+65536\n"), "{text}");
    for format in ["raw", "qcow2"] {
        let out = shelf.path(format);
        let to = out.to_str().context("a path is text")?;
        shelf
            .say(&["restore", &hurt, "--to", to, "--format", format])?
            .expect(20, &["error: cannot read disk `vda`"]);
        assert_eq!(below(&out)?, Vec::<String>::new(), "{format}");
    }
    let whole = if hurt == "web01" { "db01" } else { "web01" };
    let out = shelf.path("whole");
    shelf.run(&[
        "restore",
        whole,
        "--to",
        out.to_str().context("a path is text")?,
    ])?;
    // Only what was asked for: the other VM's damage is none of its business.
    shelf.run(&["verify", whole, "--read-data"])?;
    damaged(&shelf, &["verify", whole, &hurt])?;
    Ok(())
}

#[test]
fn every_kind_of_object_cut_emptied_or_flipped_ends_with_its_code() -> Result<()> {
    for (folder, code) in [
        ("keys", 20),
        ("packs", 20),
        ("index", 20),
        ("points", 20),
        ("config", 20),
    ] {
        let shelf = Shelf::encrypted()?;
        add(&shelf, "web01", 0, b"high")?;
        let path = match folder {
            "config" => shelf.repo().join("config"),
            folder => objects(&shelf, folder)?.remove(0),
        };
        let good = fs::read(&path)?;
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 4;
        for bad in [&good[..good.len() - 1], &[], &flipped] {
            put(&path, bad)?;
            for args in [
                &["verify", "--read-data"][..],
                &["verify", "--read-data", "--no-key"],
            ] {
                let said = shelf.say(args)?;
                assert_eq!(said.code, Some(code), "{folder}: {said:?}");
                let name = name(&shelf, &path);
                let named = said.stdout.contains(&name) || said.stderr.contains(&name);
                assert!(named, "{folder}: {said:?}");
            }
        }
        put(&path, &good)?;
        shelf.run(&["verify", "--read-data"])?;
    }
    Ok(())
}

#[test]
fn without_the_key_all_is_checked_that_shows_and_the_rest_is_said() -> Result<()> {
    let shelf = Shelf::encrypted()?;
    add(&shelf, "web01", 0, b"high")?;
    let say = |args: &[&str], password: Option<&str>| -> Result<Said> {
        let mut command = shelf.command(args);
        match password {
            Some(password) => command.env("HIGHWATER_PASSWORD", password),
            None => command.env_remove("HIGHWATER_PASSWORD"),
        };
        Ok(Said::of(&command.output()?))
    };
    say(&["verify"], Some("wrong"))?.expect(12, &["hint: check the passphrase"]);
    say(&["verify"], None)?.expect(2, &["--no-key"]);
    say(&["verify", "--no-key", "web01"], None)?.expect(2, &["--no-key"]);
    let said = say(&["verify", "--no-key", "--read-data"], None)?;
    said.expect(0, &[]);
    for part in [
        "encrypted, checked without its key",
        "not checked: trees",
        "not checked: the sealed",
    ] {
        assert!(said.stdout.contains(part), "no `{part}` in {said:?}");
    }
    flip_last_bit(&chunk_packs(&shelf)?[0])?;
    let said = say(&["verify", "--no-key", "--read-data"], None)?;
    said.expect(
        20,
        &["state: which restore points are hurt cannot be told without the key"],
    );
    Ok(())
}

#[test]
fn a_lost_config_is_no_repository() -> Result<()> {
    let shelf = Shelf::with_points()?;
    fs::remove_file(shelf.repo().join("config"))?;
    shelf
        .say(&["verify"])?
        .expect(10, &["hint: check the path"]);
    Ok(())
}

#[test]
fn after_the_index_is_lost_new_points_are_whole_and_share_with_old_ones() -> Result<()> {
    let shelf = Shelf::plain()?;
    add(&shelf, "web01", 0, b"high")?;
    for index in objects(&shelf, "index")? {
        fs::remove_file(index)?;
    }
    let document = damaged(&shelf, &["verify"])?;
    assert_eq!(
        document["damage"][0]["object"],
        json!({"kind": "index", "name": null})
    );
    assert!(
        document["hint"]
            .as_str()
            .context("a hint")?
            .contains("-l full")
    );
    // What the hint says: everything that is stored again heals the old point, too.
    add(&shelf, "web01", 1, b"high")?;
    let document = shelf.json(&["verify", "--read-data"])?;
    shelf
        .say(&["verify", "--strict"])?
        .expect(4, &["warning: packs: "]);
    assert_eq!(document["checked"]["points"], 2);
    assert_eq!(
        document["warnings"].as_array().map(Vec::len),
        Some(1),
        "{document}"
    );
    Ok(())
}

#[test]
fn names_with_control_characters_never_reach_the_terminal_from_a_report() -> Result<()> {
    let shelf = Shelf::plain()?;
    shelf.add(&Told {
        vm: "\u{1b}]0;evil\u{7}\nweb01",
        hours: 0,
        disk: "vda\u{1b}[2J",
        file: "/nvram/\nx",
        content: b"evil",
    })?;
    for pack in chunk_packs(&shelf)? {
        fs::remove_file(pack)?;
    }
    let said = shelf.say(&["verify"])?;
    said.expect(20, &[]);
    for text in [&said.stdout, &said.stderr] {
        let is_harmful = |letter: char| letter.is_control() && letter != '\n';
        assert!(!text.contains(is_harmful), "{text:?}");
        assert!(
            !text.lines().any(|line| line.starts_with("web01")),
            "{text:?}"
        );
    }
    Ok(())
}
