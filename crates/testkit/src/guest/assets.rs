//! The kernel and the initial file system of test guests, made once per machine.
//!
//! The kernel is the distribution's for virtual machines: downloaded and
//! unpacked, never installed. All else comes from this machine's own packages.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::initramfs::Initramfs;
use crate::cache;
use crate::command::{tool, which};

const INIT: &str = include_str!("init.sh");
const NUMBERED_WRITER: &str = include_str!("numbered_writer.c");
const LATENCY_WRITER: &str = include_str!("latency_writer.c");

/// Packages that depend on the current kernel for virtual machines: Debian's, Ubuntu's.
const KERNEL_PACKAGES: [&str; 2] = ["linux-image-cloud-amd64", "linux-image-virtual"];

/// What the guest needs where it is a module.
const MODULES: [&str; 7] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
];

/// Where the parts of a guest lie.
#[derive(Debug, Clone)]
pub struct Assets {
    /// The kernel.
    pub kernel: PathBuf,
    /// Its initial file system, which is all it has.
    pub initrd: PathBuf,
}

/// Returns the parts of a guest; makes them first where nobody has yet (10 s).
pub fn assets() -> Result<Assets> {
    let agent = which("qemu-ga")?;
    let busybox = which("busybox")?;
    let ours = blake3::hash([INIT, NUMBERED_WRITER, LATENCY_WRITER].concat().as_bytes()).to_hex();
    let name = format!(
        "guest-{}-{}-{}",
        &ours[..8],
        cache::version_of(&agent)?,
        cache::version_of(&busybox)?
    );
    let kernel = cache::once("kernel-1", fetch_kernel)?;
    let guest = cache::once(&name, |draft| {
        let archive = initramfs(&kernel, &agent, &busybox, draft)?;
        fs::write(draft.join("initrd"), archive)?;
        Ok(())
    })?;
    Ok(Assets {
        kernel: kernel.join("vmlinuz"),
        initrd: guest.join("initrd"),
    })
}

/// Leaves the kernel as `vmlinuz` and the modules it has not built in as `*.ko`.
fn fetch_kernel(draft: &Path) -> Result<()> {
    let packages = kernel_packages()?;
    let debs = draft.join("debs");
    fs::create_dir(&debs)?;
    tool("sh")
        .args(["-c", "cd \"$0\" && apt-get download -q \"$@\""])
        .arg(&debs)
        .args(&packages)
        .deadline(Duration::from_mins(5))
        .run()
        .context("cannot download the kernel of test guests")?;
    let unpacked = draft.join("unpacked");
    for deb in fs::read_dir(&debs)? {
        let deb = deb?.path();
        tool("dpkg").arg("-x").arg(deb).arg(&unpacked).run()?;
    }
    let is_kernel = |name: &str| name.starts_with("vmlinuz-");
    let kernel = find_file(&unpacked.join("boot"), &is_kernel)?.context("no vmlinuz-* in it")?;
    fs::copy(kernel, draft.join("vmlinuz"))?;
    for module in MODULES {
        let is_module = |name: &str| {
            let stem = name.split('.').next().unwrap_or_default();
            stem.replace('-', "_") == module && name.contains(".ko")
        };
        // In /usr/lib where /lib is a link to it.
        for lib in ["lib", "usr/lib"] {
            if let Some(file) = find_file(&unpacked.join(lib), &is_module)? {
                unpack_module(&file, &draft.join(format!("{module}.ko")))?;
            }
        }
    }
    fs::remove_dir_all(debs)?;
    fs::remove_dir_all(unpacked)?;
    Ok(())
}

fn kernel_packages() -> Result<Vec<String>> {
    for meta in KERNEL_PACKAGES {
        let mut packages = depends(meta, &["linux-image-", "linux-modules-"]);
        for package in packages.clone() {
            packages.extend(depends(&package, &["linux-modules-"]));
        }
        if !packages.is_empty() {
            packages.sort();
            packages.dedup();
            return Ok(packages);
        }
    }
    bail!(
        "apt knows none of {}: run `apt-get update`",
        KERNEL_PACKAGES.join(", ")
    )
}

fn depends(package: &str, prefixes: &[&str]) -> Vec<String> {
    // A package that apt does not know depends on nothing.
    let listed = tool("apt-cache")
        .args(["depends", package])
        .run()
        .unwrap_or_default();
    listed
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .filter(|name| prefixes.iter().any(|prefix| name.starts_with(prefix)))
        .map(str::to_owned)
        .collect()
}

fn unpack_module(from: &Path, to: &Path) -> Result<()> {
    let unpacker = match from.extension().and_then(OsStr::to_str) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => {
            fs::copy(from, to)?;
            return Ok(());
        }
    };
    fs::write(to, tool(unpacker).arg("-dc").arg(from).run_bytes()?)?;
    Ok(())
}

fn initramfs(kernel: &Path, agent: &Path, busybox: &Path, draft: &Path) -> Result<Vec<u8>> {
    let mut archive = Initramfs::default();
    archive.add("/init", INIT.as_bytes())?;
    archive.add_file("/bin/busybox", busybox)?;
    archive.add_file("/usr/sbin/qemu-ga", agent)?;
    for library in libraries(agent)? {
        let path = library.to_str().context("not a UTF-8 path")?;
        archive.add_file(path, &library)?;
    }
    for module in MODULES {
        let file = kernel.join(format!("{module}.ko"));
        if file.exists() {
            archive.add_file(&format!("/modules/{module}.ko"), &file)?;
        }
    }
    for (name, source) in [
        ("numbered-writer", NUMBERED_WRITER),
        ("latency-writer", LATENCY_WRITER),
    ] {
        let program = draft.join(name);
        tool("cc")
            .args(["-static", "-O2", "-Wall", "-Werror", "-x", "c", "-", "-o"])
            .arg(&program)
            .input(source)
            .run()?;
        archive.add_file(&format!("/usr/bin/{name}"), &program)?;
    }
    archive.finish()
}

/// Returns the shared libraries of a program, the loader included.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let listed = tool("ldd").arg(program).run()?;
    Ok(listed
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect())
}

fn find_file(dir: &Path, wanted: &dyn Fn(&str) -> bool) -> Result<Option<PathBuf>> {
    if !dir.is_dir() {
        return Ok(None);
    }
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let found = if entry.file_type()?.is_dir() {
            find_file(&entry.path(), wanted)?
        } else {
            wanted(&entry.file_name().to_string_lossy()).then(|| entry.path())
        };
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}
