//! Every command as people see it, without a VM.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::golden::Golden;
use crate::shelf::{Shelf, Told};

/// Runs `highwater` with `words`, which are told as they are typed.
fn say(golden: &mut Golden, shelf: &Shelf, words: &str) -> Result<()> {
    let args: Vec<&str> = words.split(' ').filter(|word| !word.is_empty()).collect();
    golden.run(&format!("highwater {words}"), &mut shelf.command(&args))?;
    Ok(())
}

fn golden(name: &'static str, shelf: &Shelf) -> Golden {
    Golden::new(name)
        .path(&shelf.repo(), "/backup")
        .path(&shelf.path("").join("x").with_file_name(""), "/dir/")
}

/// Writes a file with a mode of its own.
fn file(path: &Path, text: &str, mode: u32) -> Result<()> {
    fs::write(path, text)?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(mode))?)
}

#[test]
fn init_says_what_it_made_and_why_it_did_not() -> Result<()> {
    let shelf = Shelf::without_repository()?;
    let mut golden = golden("init", &shelf);
    for words in [
        "init",
        "init --encryption passphrase",
        "init --encryption keyfile",
        "init --encryption none --chunk-size 100K",
        "init --encryption none",
        "init --encryption none",
        "init --encryption none --json",
        "init --encryption none --json -r s3://bucket/prefix",
    ] {
        say(&mut golden, &shelf, words)?;
    }
    golden.check()
}

#[test]
fn list_shows_vms_and_points_and_says_why_it_shows_none() -> Result<()> {
    let shelf = Shelf::with_points()?;
    let mut golden = golden("list", &shelf);
    for words in [
        "list",
        "snapshots web01",
        "list --all",
        "list --all --tag nightly --group web",
        "list --all --tag nightly --tag other",
        "list --group db --json",
        "list wbe01",
        "list mail",
        "list web01 --quiet",
        "list web01 --json=events",
    ] {
        say(&mut golden, &shelf, words)?;
    }
    golden.check()
}

#[test]
fn show_tells_of_a_point_and_of_how_to_name_one() -> Result<()> {
    let shelf = Shelf::with_points()?;
    shelf.add(&Told {
        vm: "web@home",
        hours: 3,
        disk: "vda",
        file: "/nvram/vars.fd",
        content: b"high",
    })?;
    let mut golden = golden("show", &shelf);
    for words in [
        "show web01",
        "show web01~1 --json",
        "show web01~9",
        "show wbe01",
        "show web01@",
        "show web01@yesterday",
        "show web@home",
        "show web@home@latest --json",
        "show id:0",
    ] {
        say(&mut golden, &shelf, words)?;
    }
    golden.check()
}

#[test]
fn restore_says_what_it_wrote_and_what_it_refuses() -> Result<()> {
    let shelf = Shelf::with_points()?;
    let mut golden = golden("restore", &shelf);
    let out = shelf.path("out");
    let to = out.display();
    for words in [
        format!("restore web01 --to {to}"),
        format!("restore web01 --to {to}"),
        format!("restore web01 --to {to}/one.qcow2 -d vda --json"),
        format!("restore web01 --to {to}/two.raw -i vda --quiet"),
        format!("restore web01 --to {to}/four -d vdz"),
        format!("restore web01 --to {to}/gone/vda.raw -d vda"),
        "restore web01 --to - -d vda --format qcow2".to_owned(),
        "restore web01 --to - -d vda --json".to_owned(),
        format!("restore nobody --to {to}/five"),
        "restore web01".to_owned(),
    ] {
        say(&mut golden, &shelf, &words)?;
    }
    golden.check()
}

#[test]
fn verify_says_that_all_is_whole_and_what_is_not() -> Result<()> {
    let shelf = Shelf::with_points()?;
    let mut golden = golden("verify", &shelf);
    say(&mut golden, &shelf, "verify nobody")?;
    say(&mut golden, &shelf, "check --quiet")?;
    let pack = file_below(&shelf.repo().join("packs"))?;
    fs::remove_file(pack)?;
    say(&mut golden, &shelf, "verify web01 --quiet --json=xml")?;
    assert_eq!(shelf.say(&["verify"])?.code, Some(20));
    assert_eq!(shelf.say(&["check", "--json=events"])?.code, Some(20));
    golden.check()
}

/// Returns some file below a directory.
fn file_below(dir: &Path) -> Result<std::path::PathBuf> {
    let mut path = dir.to_owned();
    while path.is_dir() {
        let entry = fs::read_dir(&path)?.next().context("it is empty")??;
        path = entry.path();
    }
    Ok(path)
}

#[test]
fn stats_add_up() -> Result<()> {
    let shelf = Shelf::plain()?;
    let mut empty = golden("stats-empty", &shelf);
    say(&mut empty, &shelf, "stats")?;
    empty.check()?;
    for (vm, hours, content) in [
        ("web01", 0, b"high"),
        ("web01", 1, b"rise"),
        ("db01", 2, b"high"),
    ] {
        shelf.add(&Told {
            vm,
            hours,
            disk: "vda",
            file: "/nvram/vars.fd",
            content,
        })?;
    }
    let stats = shelf.json(&["stats"])?;
    let stored = &stats["stored"];
    let kinds = [
        "chunks",
        "pages",
        "index",
        "manifests",
        "other",
        "unindexed",
    ];
    let all: u64 = kinds.iter().filter_map(|kind| stored[kind].as_u64()).sum();
    assert_eq!(stats["stored_bytes"], all, "{stats}");
    let on_disk = bytes_below(&shelf.repo().join("packs"))?;
    assert_eq!(
        stored["chunks"].as_u64().unwrap() + stored["pages"].as_u64().unwrap(),
        on_disk
    );
    // A manifest is compressed, and ids of points are drawn.
    let saving = stats["saving_ratio"].as_f64().unwrap_or_default();
    let mut golden = golden("stats", &shelf)
        .text(stats["stored_bytes"].to_string(), "ALL")
        .text(stored["manifests"].to_string(), "MANIFESTS")
        .text(
            format!(" {saving:.0} x smaller in all"),
            " 000 x smaller in all",
        )
        .text(saving.to_string(), "SAVING");
    say(&mut golden, &shelf, "stats")?;
    say(&mut golden, &shelf, "stats --json")?;
    golden.check()
}

fn bytes_below(dir: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        bytes += if entry.metadata()?.is_dir() {
            bytes_below(&entry.path())?
        } else {
            entry.metadata()?.len()
        };
    }
    Ok(bytes)
}

#[test]
fn what_was_typed_wrongly_is_told_like_every_error() -> Result<()> {
    let shelf = Shelf::with_points()?;
    let mut golden = golden("usage", &shelf);
    for words in [
        "",
        "bakcup web01",
        "backup",
        "backup web01 --all",
        "backup web01 --foo",
        "backup web01 --tgas nightly",
        "backup web01 --limit fast",
        "backup web01 --threshold",
        "backup web01 --tag a,b",
        "backup web01 --compression zstd:0",
        "backup web01 --level some",
        "list --json=xml",
        "show --json",
        "restore web01 --json=events",
        "list -q -v",
        "list -r s3://bucket/prefix",
        "completions tcsh",
    ] {
        say(&mut golden, &shelf, words)?;
    }
    golden.check()
}

#[test]
fn a_repository_that_cannot_be_used_is_told_with_its_own_code() -> Result<()> {
    let shelf = Shelf::encrypted()?;
    let mut golden = golden("repository", &shelf);
    let mut tell = |words: &str, change: &dyn Fn(&mut Command)| -> Result<()> {
        let args: Vec<&str> = words.split(' ').collect();
        let mut command = shelf.command(&args);
        change(&mut command);
        golden
            .run(&format!("highwater {words}"), &mut command)
            .map(drop)
    };
    tell("list", &|command| {
        command.env("HIGHWATER_PASSWORD", "wrong");
    })?;
    tell("list --json", &|command| {
        command.env("HIGHWATER_PASSWORD", "wrong");
    })?;
    tell("list", &|command| {
        command.env_remove("HIGHWATER_PASSWORD");
    })?;
    tell("list", &|command| {
        command.env_remove("HIGHWATER_REPO");
    })?;
    tell("list -r /nowhere/at/all", &|_| {})?;
    tell("backup web01 -r /nowhere/at/all", &|_| {})?;
    tell("list -r ftp://host/dir", &|_| {})?;
    golden.check()
}

#[test]
fn the_configuration_counts_after_flags_and_environment_and_tells_of_mistakes() -> Result<()> {
    let shelf = Shelf::with_points()?;
    let mut golden = golden("config", &shelf);
    let repo = shelf.repo();
    let config = shelf.path("config.toml");
    let good = "# How this host backs up\nrepo = \"repo\"\ncompression = \"zstd:3\"\n\
         limit = \"80MiB\"\ntag = [\"nightly\"]\nstrict = true\n\n[profile.weekly]\n\
         tag = [\"weekly\", \"keep\"]\nthreshold = 4096\nstrict = false\nworkers = 2\n";
    file(&config, good, 0o644)?;
    let run = |golden: &mut Golden, words: &str| -> Result<()> {
        let args: Vec<&str> = words.split(' ').collect();
        let mut command = shelf.command(&args);
        // Relative paths, so that the tables are the same everywhere.
        command
            .env_remove("HIGHWATER_REPO")
            .env("HIGHWATER_CONFIG", "config.toml")
            .env("HIGHWATER_RUNTIME_DIR", "run")
            .current_dir(repo.parent().context("the repository is in a directory")?);
        golden
            .run(&format!("highwater {words}"), &mut command)
            .map(drop)
    };
    run(&mut golden, "config")?;
    run(&mut golden, "config --profile weekly -r /flag")?;
    run(&mut golden, "config --profile weekly --json")?;
    run(&mut golden, "list")?;
    run(&mut golden, "list --profile weakly")?;
    run(&mut golden, "config --config gone.toml")?;
    for wrong in [
        "repos = \"/r\"",
        "\n\npassword = \"secret\"",
        "[profile.a]\nlimmit = \"1\"",
        "quiet = \"yes\"",
        "repo = /backup",
    ] {
        file(&config, wrong, 0o644)?;
        run(&mut golden, "list")?;
    }
    file(&config, "limit = \"fast\"", 0o666)?;
    run(&mut golden, "config")?;
    golden.check()
}

/// No process can be started there, and nobody can be looked at.
#[test]
fn without_proc_the_work_is_done_nevertheless() -> Result<()> {
    let shelf = Shelf::without_repository()?;
    shelf.run(&["init", "--encryption", "none"])?;
    let plain = shelf.command(&["list"]);
    let mut command = Command::new("unshare");
    let script = "mount -t tmpfs none /proc && exec \"$0\" \"$@\"";
    command.args(["-rm", "sh", "-c", script]);
    command.arg(plain.get_program()).args(plain.get_args());
    for (name, value) in plain.get_envs() {
        command.env(name, value.unwrap_or_default());
    }
    let output = command
        .output()
        .context("no `unshare`: install util-linux")?;
    let told = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "{}: {told}", output.status);
    anyhow::ensure!(told.contains("no restore points yet"), "{told}");
    Ok(())
}
