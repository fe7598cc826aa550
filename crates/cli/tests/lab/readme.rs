//! What the README tells people to type is typed here, as it stands there.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::BareLab;

/// What stands before a block that can be run as it is, in an empty directory
/// after the ones before it.
const MARK: &str = "<!-- run -->\n```sh\n";

fn blocks(readme: &str) -> Vec<&str> {
    let after = readme.split(MARK).skip(1);
    after.filter_map(|rest| rest.split("```").next()).collect()
}

#[test]
fn what_the_readme_says_of_vms_without_libvirt_works_as_it_is_written() -> Result<()> {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md");
    let readme = fs::read_to_string(readme)?;
    let blocks = blocks(&readme);
    ensure!(blocks.len() == 2, "blocks to be run: {blocks:?}");
    let lab = BareLab::start()?;
    let program = Path::new(env!("CARGO_BIN_EXE_highwater"));
    let path = format!(
        "{}:{}",
        program.parent().context("it is in a directory")?.display(),
        std::env::var("PATH")?
    );
    // QEMU is a daemon, and nobody's child: it must not outlive a step that fails.
    let script = format!(
        "trap '[ ! -e qemu.pid ] || kill $(cat qemu.pid)' EXIT\ncd {}\n{}",
        lab.dir().display(),
        blocks.concat()
    );
    let told = highwater_testkit::tool("bash")
        .args(["-euxo", "pipefail", "-c", &script])
        .env("PATH", path)
        .env("HIGHWATER_CONFIG", "")
        .env("HIGHWATER_RUNTIME_DIR", lab.path("run"))
        .run()?;
    // The running VM's points, and the one of its images, which goes on.
    let rows = told.lines().filter(|line| line.starts_with("web01  "));
    let modes: Vec<&str> = rows
        .filter_map(|row| row.split_whitespace().nth(4))
        .collect();
    ensure!(modes == ["full", "incremental", "incremental"], "{told}");
    ensure!(lab.path("restored/system.qcow2").exists(), "{told}");
    Ok(())
}
