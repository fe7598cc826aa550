//! What other programs make of the manual pages and completions. Needs no VM,
//! but programs that `make check` does not install.

use std::fs;

use anyhow::Result;
use highwater_testkit::tool;
use tempfile::TempDir;

fn highwater(args: &[&str]) -> Result<String> {
    tool(env!("CARGO_BIN_EXE_highwater"))
        .args(args)
        .env("HIGHWATER_CONFIG", "")
        .run()
}

#[test]
fn manual_pages_are_formatted_without_a_warning() -> Result<()> {
    let dir = TempDir::new()?;
    highwater(&["man", dir.path().to_str().unwrap()])?;
    let mut pages = 0;
    for page in fs::read_dir(dir.path())? {
        let output = std::process::Command::new("groff")
            .args(["-man", "-ww", "-z", "-Tutf8"])
            .arg(page?.path())
            .output()?;
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{output:?}"
        );
        pages += 1;
    }
    assert!(pages >= 9, "{pages}");
    Ok(())
}

#[test]
fn zsh_and_fish_take_their_completions() -> Result<()> {
    let dir = TempDir::new()?;
    let zsh = dir.path().join("_highwater");
    fs::write(&zsh, highwater(&["completions", "zsh"])?)?;
    let load = format!(
        "autoload -U compinit && compinit -D -d {0}/dump && source {0}/_highwater \
         && print $_comps[highwater]",
        dir.path().display()
    );
    assert_eq!(
        tool("zsh").args(["-f", "-c", &load]).run()?.trim(),
        "_highwater"
    );
    let fish = dir.path().join("highwater.fish");
    fs::write(&fish, highwater(&["completions", "fish"])?)?;
    let ask = format!("source {}; complete -C 'highwater re'", fish.display());
    let completed = tool("fish").args(["--no-config", "-c", &ask]).run()?;
    assert!(completed.starts_with("restore\t"), "{completed}");
    Ok(())
}
