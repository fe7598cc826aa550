//! The tour of `make demo`: a real guest is backed up, crashed, backed up again
//! and restored, and every restored byte is compared.
//!
//! Nothing is acted: the guest is Linux with an ext4 file system, the VM lives
//! in a private libvirtd, and the program that runs is the one in the release
//! directory. If a single comparison fails, so does the demo.

mod check;
mod program;
mod screen;
mod story;
mod table;
mod workshop;

use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let since = Instant::now();
    match story::tell(since) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            screen::failure(&error);
            ExitCode::FAILURE
        }
    }
}
