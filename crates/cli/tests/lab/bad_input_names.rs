//! Names that mean harm, as far as libvirt lets them in.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{DiskSpec, tool};

use crate::support::{Bed, assert_same, disk, mode};

const MIB: u64 = 1 << 20;

fn escaped(text: &str) -> String {
    let letter = |letter: char| match letter {
        '&' | '<' | '>' | '\'' | '"' | '\n' | '\t' => format!("&#{};", u32::from(letter)),
        letter => letter.to_string(),
    };
    text.chars().map(letter).collect()
}

fn element(path: &Path, target: &str, serial: &str) -> Result<String> {
    let path = escaped(path.to_str().context("a path is text")?);
    let (target, serial) = (escaped(target), escaped(serial));
    Ok(format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{path}'/>\
         <target dev='{target}' bus='virtio'/><serial>{serial}</serial></disk>"
    ))
}

#[test]
fn an_image_of_any_name_is_backed_up_and_moves_no_cursor() -> Result<()> {
    let bed = Bed::start()?;
    let path = bed.lab.path("we'ird & \"<b>\u{e9} [2J].qcow2");
    let create = tool("qemu-img").args(["create", "-q", "-f", "qcow2"]);
    create.arg(&path).arg("16M").run()?;
    let fill = tool("qemu-io").args(["-f", "qcow2", "-c", "write -P 7 1M 2M"]);
    fill.arg(&path).run()?;
    let xml = element(&path, "vda", "..S1 + x")?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::raw_xml("vda", &xml))
        .start()?;
    bed.backup(&vm, &[])?;
    let output = bed.output(&["backup", "web01", "-v"])?;
    let shown = bed.output(&["show", "web01"])?;
    for bytes in [&output.stdout, &output.stderr, &shown.stdout] {
        let text = String::from_utf8_lossy(bytes);
        let is_harmful = |letter: char| letter.is_control() && letter != '\n';
        ensure!(!text.contains(is_harmful), "{text:?}");
    }
    ensure!(output.status.success(), "{output:?}");
    let report = bed.backup(&vm, &[])?;
    ensure!(mode(&report, "vda") == "incremental", "{report}");
    ensure!(disk(&report, "vda")["dirty_bytes"] == 0, "{report}");
    let raw = bed.lab.path("ref.raw");
    let convert = tool("qemu-img").args(["convert", "-U", "-O", "raw"]);
    convert.arg(&path).arg(&raw).run()?;
    let dir = bed.restore("web01", "out", &["--format", "raw"])?;
    assert_same(&raw, &dir.join("vda.raw"))
}

#[test]
fn a_target_that_leads_elsewhere_reaches_no_file() -> Result<()> {
    let bed = Bed::start()?;
    let image = bed.lab.path("image.qcow2");
    let create = tool("qemu-img").args(["create", "-q", "-f", "qcow2"]);
    create.arg(&image).arg(format!("{}", 16 * MIB)).run()?;
    let mut accepted = 0;
    for (number, target) in ["vda/../../../x", "vd a", "vda\n", "vda;x", "../vda", "vda'"]
        .iter()
        .enumerate()
    {
        let name = format!("web{number:02}");
        let xml = element(&image, target, "S")?;
        // Most are refused by libvirt itself.
        let Ok(vm) = bed
            .lab
            .vm(&name)
            .disk(DiskSpec::raw_xml(target, &xml))
            .start()
        else {
            continue;
        };
        accepted += 1;
        let (code, said) = bed.fail(&["backup", &name])?;
        ensure!(code == 1, "{target:?}: {code}: {said}");
        ensure!(
            said.contains("which is no name of a disk"),
            "{target:?}: {said}"
        );
        ensure!(said.contains("state: no restore point was added"), "{said}");
        ensure!(vm.state()? == "running" && vm.checkpoints()?.is_empty());
        vm.destroy()?;
    }
    ensure!(bed.run(&["list"])?.lines().count() <= 1);
    eprintln!("libvirt accepts {accepted} of them");
    Ok(())
}
