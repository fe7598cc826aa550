//! Each row of the table in docs/checkpoints.md with real libvirt and QEMU.
//!
//! The tests are made from the list in `highwater_plan`; a row without a
//! function of its name here does not compile.

mod chains;
mod disks;
mod histories;
mod marks;
mod others;
mod tracked;

use anyhow::Result;

use chains::*;
use disks::*;
use marks::*;
use others::*;

macro_rules! real {
    ($($name:ident: $found:literal => $done:literal;)+) => {
        mod row {
            $(#[test]
            fn $name() -> super::Result<()> {
                super::$name()
            })+
        }
    };
}
highwater_plan::with_rows!(real);
