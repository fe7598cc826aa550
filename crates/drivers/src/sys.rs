//! What only the kernel can promise: deadlines, children that end with us, and
//! who has locked a file.
//!
//! A process that is stopped, or gets no processor, cannot look at a clock; when
//! it goes on, it does what it was about to do, however late that is. So the
//! kernel is asked to kill it by then: SIGKILL ends a stopped process, too, and
//! lets no thread of it run another instruction of its own.
#![expect(unsafe_code, reason = "none of these calls has a safe binding here")]

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::ptr;
use std::time::Duration;

/// Has the kernel kill the child when the thread that starts it ends, and with it
/// the process, however that ends.
pub(crate) fn end_with_us(command: &mut Command) {
    let parent = rustix::process::getpid();
    let ask = move || {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        // It may have died before that.
        if rustix::process::getppid() == Some(parent) {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::ESRCH))
        }
    };
    // SAFETY: runs in the child between fork and exec, where it makes two system
    // calls, allocates nothing and takes no lock.
    unsafe { command.pre_exec(ask) };
}

/// Returns whether another open file holds a lock that one for writing on these
/// bytes would meet.
pub(crate) fn is_locked(file: &File, start: i64, length: i64) -> io::Result<bool> {
    let mut lock = range_lock(libc::F_WRLCK, start, length);
    // SAFETY: an open file and a valid lock that outlives the call.
    let outcome = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    if outcome != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

/// Takes a shared lock on these bytes, until the file is closed; fails if another
/// open file has one for writing.
pub(crate) fn lock_shared(file: &File, start: i64, length: i64) -> io::Result<()> {
    let lock = range_lock(libc::F_RDLCK, start, length);
    // SAFETY: an open file and a valid lock that outlives the call.
    let outcome = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if outcome != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn range_lock(kind: libc::c_int, start: i64, length: i64) -> libc::flock {
    // SAFETY: a `flock` of zeroes is a valid one.
    let mut lock: libc::flock = unsafe { MaybeUninit::zeroed().assume_init() };
    lock.l_type = libc::c_short::try_from(kind).unwrap_or_default();
    lock.l_whence = libc::c_short::try_from(libc::SEEK_SET).unwrap_or_default();
    lock.l_start = start;
    lock.l_len = length;
    lock
}

/// Kills this process when its time has come; dropping it prevents that.
#[derive(Debug)]
pub(crate) struct Deadline {
    timer: libc::timer_t,
}

impl Deadline {
    /// Sets the deadline. From the moment this returns on, the process does not
    /// live for longer.
    pub(crate) fn after(time: Duration) -> io::Result<Self> {
        // SAFETY: a `sigevent` of zeroes is a valid one.
        let mut event: libc::sigevent = unsafe { MaybeUninit::zeroed().assume_init() };
        event.sigev_notify = libc::SIGEV_SIGNAL;
        event.sigev_signo = libc::SIGKILL;
        let mut timer: libc::timer_t = ptr::null_mut();
        // SAFETY: a valid event, and a place for the timer's name.
        if unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) } != 0
        {
            return Err(io::Error::last_os_error());
        }
        // Deleted again if it cannot be set.
        let deadline = Self { timer };
        let once = libc::itimerspec {
            it_interval: libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: libc::timespec {
                tv_sec: time.as_secs().try_into().unwrap_or(libc::time_t::MAX),
                tv_nsec: time.subsec_nanos().into(),
            },
        };
        // SAFETY: a timer that was made above, and a valid time.
        if unsafe { libc::timer_settime(deadline.timer, 0, &raw const once, ptr::null_mut()) } != 0
        {
            return Err(io::Error::last_os_error());
        }
        Ok(deadline)
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        // SAFETY: made in `after`, and deleted nowhere else.
        unsafe { libc::timer_delete(self.timer) };
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::Instant;

    use super::*;

    /// In the child: stops itself within its deadline.
    const CHILD: &str = "HIGHWATER_TEST_DEADLINE";

    #[test]
    fn a_process_that_is_stopped_does_not_outlive_its_deadline() {
        if std::env::var_os(CHILD).is_some() {
            drop(Deadline::after(Duration::from_mins(1)).unwrap());
            let _deadline = Deadline::after(Duration::from_millis(200)).unwrap();
            let me = rustix::process::getpid();
            rustix::process::kill_process(me, rustix::process::Signal::STOP).unwrap();
            std::thread::sleep(Duration::from_mins(1));
            return;
        }
        let since = Instant::now();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "sys::tests::a_process_that_is_stopped_does_not_outlive_its_deadline",
            ])
            .env(CHILD, "1")
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let ended = child.wait().unwrap();
        let signal = std::os::unix::process::ExitStatusExt::signal(&ended);
        assert_eq!(signal, Some(libc::SIGKILL), "{ended}");
        assert!(since.elapsed() < Duration::from_secs(30));
    }
}
