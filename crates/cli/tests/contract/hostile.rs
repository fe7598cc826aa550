//! Names in a repository may come from an enemy, and none does harm.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use anyhow::Result;

use crate::shelf::{Shelf, Told, below};

const EVIL: Told<'static> = Told {
    vm: "../../\u{1b}]0;evil\u{7}\nweb01",
    hours: 0,
    disk: "../../../vda\u{1b}[2J",
    file: "/nvram/..",
    content: b"evil",
};

#[test]
fn a_restore_never_leaves_its_directory_and_what_it_writes_is_private() -> Result<()> {
    let shelf = Shelf::plain()?;
    let id = shelf.add(&EVIL)?;
    let out = shelf.path("deep/deeper/out");
    shelf.run(&[
        "restore",
        &format!("id:{id}"),
        "--to",
        out.to_str().unwrap(),
    ])?;
    assert_eq!(below(&shelf.path(""))?, ["deep", "repo"]);
    assert_eq!(below(&shelf.path("deep"))?, ["deeper"]);
    assert_eq!(below(&shelf.path("deep/deeper"))?, ["out"]);
    let written = below(&out)?;
    assert_eq!(written.len(), 3, "{written:?}");
    for name in written {
        assert!(
            !name.contains(|letter: char| letter.is_control()),
            "{name:?}"
        );
        let mode = fs::metadata(out.join(&name))?.permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name:?}");
    }
    Ok(())
}

#[test]
fn names_with_control_characters_never_reach_the_terminal() -> Result<()> {
    let shelf = Shelf::plain()?;
    let id = format!("id:{}", shelf.add(&EVIL)?);
    let out = shelf.path("out");
    let to = out.to_str().unwrap();
    for args in [
        &["list"][..],
        &["list", "--all"],
        &["show", &id],
        &["restore", &id, "--to", to],
        &["restore", &id, "--to", to, "-d", "vdz"],
    ] {
        let said = shelf.say(args)?;
        for text in [&said.stdout, &said.stderr] {
            let is_harmful = |letter: char| letter.is_control() && letter != '\n';
            assert!(!text.contains(is_harmful), "{args:?}: {text:?}");
            assert!(
                !text.lines().any(|line| line.starts_with("web01")),
                "{args:?}: {text:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn names_of_any_length_are_restored_under_shorter_ones() -> Result<()> {
    let shelf = Shelf::plain()?;
    let long = "\u{e9}".repeat(2000);
    let id = shelf.add(&Told {
        vm: &long,
        hours: 0,
        disk: &long,
        file: &long,
        content: b"high",
    })?;
    let out = shelf.path("out");
    shelf.run(&[
        "restore",
        &format!("id:{id}"),
        "--to",
        out.to_str().unwrap(),
    ])?;
    assert_eq!(below(&out)?.len(), 3);
    Ok(())
}
