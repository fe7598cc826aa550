//! Which QEMU a VM without libvirt is run with.

use std::path::PathBuf;

use anyhow::{Result, ensure};

use crate::cache;
use crate::command::{Tool, tool, which};

/// Which QEMU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Qemu {
    /// The one that is installed.
    #[default]
    System,
    /// Version 7.2, the oldest that is tried, unpacked beside it. Tests that
    /// need it have `qemu_7_2` in their names.
    V7_2,
}

impl Qemu {
    /// Returns the program.
    pub fn program(self) -> Result<PathBuf> {
        match self {
            Self::System => which("qemu-system-x86_64"),
            Self::V7_2 => {
                let program = unpacked()?.join("usr/bin/qemu-system-x86_64");
                ensure!(
                    program.is_file(),
                    "QEMU 7.2 is not unpacked: `scripts/setup.sh --for test` does it on Debian 12; \
                     where packages of it are not to be had, `make test WITHOUT=qemu_7_2` leaves \
                     out what needs it"
                );
                Ok(program)
            }
        }
    }

    /// Prepares to run it. With `setpriv` before it, it dies with the thread that
    /// starts it, however that ends.
    pub(super) fn command(self) -> Result<Tool> {
        let command = tool("setpriv").args(["--pdeathsig", "KILL", "--"]);
        let command = command.arg(self.program()?);
        if self == Self::System {
            return Ok(command);
        }
        let root = unpacked()?;
        let modules = root.join("usr/lib/x86_64-linux-gnu/qemu");
        let data = root.join("usr/share/qemu");
        // The BIOS comes from a package of its own, and is none of QEMU's.
        let command = command
            .arg("-L")
            .arg(data)
            .args(["-L", "/usr/share/seabios"]);
        Ok(command.env("QEMU_MODULE_DIR", modules))
    }
}

fn unpacked() -> Result<PathBuf> {
    Ok(cache::dir()?.join("qemu-7.2"))
}
