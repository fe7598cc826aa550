//! Descriptors that somebody else opened for us, known by number only.

#![expect(
    unsafe_code,
    reason = "a descriptor that a parent process left open has no owner in this program"
)]

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};

/// Returns a file for a descriptor that was inherited, and keeps the original
/// from every process that we start.
pub(crate) fn inherited(number: RawFd) -> std::io::Result<File> {
    if number < 0 {
        return Err(std::io::Error::other("it is no descriptor"));
    }
    // SAFETY: the number is not -1, and the borrow ends with this function. If
    // nothing is open under it both calls fail with EBADF; if this program
    // itself opened what is there, duplicating it and setting its close-on-exec
    // flag, which everything of ours has, changes nothing for its owner.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let copy: OwnedFd = fcntl_dupfd_cloexec(borrowed, 3)?;
    fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
    Ok(File::from(copy))
}
