//! What is kept with the disks: firmware, TPM state, kernel, definition.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{DiskSpec, guest};
use serde_json::Value;

use crate::support::{Bed, point};

const MIB: u64 = 1 << 20;

/// Returns the files of a restore whose names begin with `role`, all private.
fn restored(dir: &Path, role: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let mode = entry.metadata()?.permissions().mode() & 0o777;
        ensure!(
            mode == 0o600,
            "{} has mode {mode:o}",
            entry.path().display()
        );
        if entry.file_name().to_string_lossy().starts_with(role) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

/// Runs the program inside the lab, where libvirt's own places are the lab's.
fn run_inside(bed: &Bed, args: &[&str]) -> Result<String> {
    let mut run = bed
        .lab
        .inside(env!("CARGO_BIN_EXE_highwater"))
        .args(args)
        .args(["-c", &bed.lab.uri()]);
    run = run
        .env("HIGHWATER_REPO", bed.repo())
        .env("HIGHWATER_RUNTIME_DIR", bed.runtime());
    run.run()
}

#[test]
fn firmware_variables_and_tpm_state_come_back_byte_for_byte() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", MIB))
        .uefi()
        .tpm()
        .start()?;
    // Firmware writes its variables while it starts; a paused VM keeps still.
    bed.lab.virsh(&["suspend", "web01"])?;
    let report: Value = serde_json::from_str(&run_inside(&bed, &["backup", "web01", "--json"])?)?;
    assert_eq!(
        report["warnings"].as_array().map(Vec::len),
        Some(0),
        "{report}"
    );
    let dir = bed.restore(&point(&report), "out", &[])?;

    let nvram = restored(&dir, "nvram-")?;
    let [nvram] = nvram.as_slice() else {
        panic!("{nvram:?}")
    };
    assert_eq!(fs::read(nvram)?, fs::read(bed.lab.path("web01-vars.fd"))?);
    let loader = restored(&dir, "loader-")?;
    let [loader] = loader.as_slice() else {
        panic!("{loader:?}")
    };
    assert_eq!(
        fs::read(loader)?,
        fs::read("/usr/share/OVMF/OVMF_CODE_4M.fd")?
    );

    let state = bed.lab.lib_dir().join(format!("swtpm/{}/tpm2", vm.uuid()?));
    let saved = restored(&dir, "tpm-")?;
    let [saved] = saved.as_slice() else {
        panic!("{saved:?}")
    };
    let kept = fs::read(state.join("tpm2-00.permall"))?;
    assert!(!kept.is_empty());
    assert_eq!(fs::read(saved)?, kept);
    Ok(())
}

#[test]
fn a_kernel_that_is_booted_directly_comes_back_with_the_disks() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", MIB))
        .guest()
        .define()?;
    // QEMU has read both; what the guest does with them is not asked here.
    bed.lab.virsh(&["start", "web01", "--paused"])?;
    let assets = guest::assets()?;
    let report = bed.backup(&vm, &[])?;
    let dir = bed.restore(&point(&report), "out", &[])?;
    for (role, source) in [("kernel-", assets.kernel), ("initrd-", assets.initrd)] {
        let found = restored(&dir, role)?;
        let [found] = found.as_slice() else {
            panic!("{role}: {found:?}")
        };
        assert_eq!(fs::read(found)?, fs::read(source)?, "{role}");
    }
    Ok(())
}

#[test]
fn a_file_that_cannot_be_saved_is_a_warning_and_the_disks_are_kept() -> Result<()> {
    let bed = Bed::start()?;
    bed.lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", MIB))
        .uefi()
        .start()?;
    fs::remove_file(bed.lab.path("web01-vars.fd"))?;
    let output = bed.output(&["backup", "web01"])?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("warning: cannot save nvram"), "{stderr}");
    assert!(bed.run(&["show", "web01"])?.contains("cannot save nvram"));
    Ok(())
}

#[test]
fn the_definition_comes_back_with_its_secrets_for_its_owner_alone() -> Result<()> {
    let bed = Bed::start()?;
    let screen = "<graphics type='vnc' port='-1' autoport='yes' passwd='opensesa'/>";
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", MIB))
        .device(screen)
        .start()?;
    let report = bed.backup(&vm, &[])?;
    let dir = bed.restore(&point(&report), "out", &[])?;
    let files = restored(&dir, "web01.xml")?;
    let definition = fs::read_to_string(&files[0])?;
    assert_eq!(
        definition,
        bed.lab
            .virsh(&["dumpxml", "web01", "--inactive", "--security-info"])?
            .trim_end_matches('\n')
            .to_owned()
            + if definition.ends_with('\n') { "\n" } else { "" }
    );
    assert!(definition.contains("passwd='opensesa'"), "{definition}");
    assert_eq!(fs::metadata(&dir)?.permissions().mode() & 0o777, 0o700);
    // It is text that libvirt takes back.
    vm.destroy()?;
    bed.lab
        .virsh(&["undefine", "web01", "--checkpoints-metadata"])?;
    bed.lab.virsh(&["define".as_ref(), files[0].as_os_str()])?;
    Ok(())
}

#[test]
fn names_and_paths_with_odd_characters_are_names_and_paths() -> Result<()> {
    let bed = Bed::start()?;
    let name = "we@b ~1 'a' \"b\" <c> & \u{e9}";
    let image = bed.lab.path("odd 'a',b=\"c\" <d> & %s ${HOME} \u{e9}.raw");
    fs::write(&image, vec![0x5a; 1 << 20])?;
    // libvirt takes names as they are; the text of a definition has them escaped.
    let escape = |text: &str| {
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        text.replace('\'', "&apos;")
    };
    let path = escape(image.to_str().context("a path is text")?);
    let xml = format!(
        "<domain type='qemu'><name>{}</name><memory unit='MiB'>16</memory>\
         <os><type arch='x86_64'>hvm</type></os><devices><disk type='file' device='disk'>\
         <driver name='qemu' type='raw'/><source file='{path}'/>\
         <target dev='vda' bus='virtio'/></disk></devices></domain>",
        escape(name)
    );
    bed.lab.define(&xml)?;
    bed.lab.virsh(&["start", name])?;
    let report: Value = serde_json::from_str(&bed.run(&["backup", name, "--json"])?)?;
    assert_eq!(report["vm"], name);
    let uuid = bed.lab.virsh(&["domuuid", name])?;
    let again = bed.run(&["backup", uuid.trim(), "--json"])?;
    assert_eq!(serde_json::from_str::<Value>(&again)?["vm"], name);
    let dir = bed.restore(&format!("uuid:{}", uuid.trim()), "out", &[])?;
    assert_eq!(fs::read(dir.join("vda.raw"))?, fs::read(&image)?);
    assert!(dir.join("we_b__1__a___b___c____\u{e9}.xml").exists());
    let listed = bed.run(&["list", name])?;
    assert!(listed.contains(name), "{listed}");
    Ok(())
}
