//! Descriptors that somebody else opened for us, known by number only.

#![expect(
    unsafe_code,
    reason = "a descriptor that a parent process left open has no owner in this program"
)]

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd as _, IntoRawFd as _, OwnedFd, RawFd};

use rustix::io::{FdFlags, dup2, fcntl_dupfd_cloexec, fcntl_getfd, fcntl_setfd};

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

/// Returns the numbers of the descriptors beyond the first three that are open
/// now. To be called before this process has opened any: then they are the
/// caller's, such as that of a lock in a script.
pub(crate) fn left_open() -> Vec<RawFd> {
    let Ok(listed) = std::fs::read_dir("/proc/self/fd") else {
        return Vec::new();
    };
    let numbers = listed
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut numbers: Vec<RawFd> = numbers.filter(|number| *number > 2).collect();
    // The directory itself was one of them, and is closed by now.
    numbers.retain(|number| {
        // SAFETY: the number is not -1 and the borrow ends with the call, which
        // fails with EBADF if nothing is open under it.
        let borrowed = unsafe { BorrowedFd::borrow_raw(*number) };
        fcntl_getfd(borrowed).is_ok()
    });
    numbers
}

/// Gives up what the caller left open: what is read from it is nothing, and a
/// lock it stands for is held no longer on our account.
pub(crate) fn give_up(left_open: &[RawFd], nothing: impl AsFd) {
    for number in left_open {
        // SAFETY: the number came with this process and nothing of it owns or
        // closes it. What is under it now is open for as long as the process is,
        // and the owner made here is taken apart again without closing it.
        let mut held = unsafe { OwnedFd::from_raw_fd(*number) };
        // Fails only if the number is beyond the limit, which it was not.
        let _ = dup2(nothing.as_fd(), &mut held);
        let _ = held.into_raw_fd();
    }
}
