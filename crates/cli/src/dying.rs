//! Is a process at its end, though it does not get there?

use rustix::process::Pid;
use signal_hook::consts::SIGKILL;

/// Whether a process was killed, or ends by itself, and cannot: one of its
/// threads waits for what never comes.
pub(crate) fn is_dying(pid: Pid) -> bool {
    let path = format!("/proc/{}/status", pid.as_raw_nonzero());
    std::fs::read_to_string(path).is_ok_and(|status| says_dying(&status))
}

/// Reads `/proc/PID/status`: its first thread is dead, or has SIGKILL pending,
/// or has given its memory back already.
fn says_dying(status: &str) -> bool {
    field(status, "State").is_some_and(|state| state.starts_with('Z'))
        || has_signal(status, "SigPnd", SIGKILL)
        || has_signal(status, "ShdPnd", SIGKILL)
        || field(status, "VmSize").is_none()
}

/// Returns whether a mask of `/proc/PID/status` has a signal in it.
pub(crate) fn has_signal(status: &str, mask: &str, signal: i32) -> bool {
    let mask = field(status, mask).and_then(|mask| u64::from_str_radix(mask, 16).ok());
    // The masks count from signal 1.
    let bit = u32::try_from(signal - 1).ok();
    let bit = bit.and_then(|bit| 1_u64.checked_shl(bit));
    mask.unwrap_or_default() & bit.unwrap_or_default() != 0
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = status.lines();
    let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_cannot_end_is_told_from_one_that_waits() {
        let status = |state: &str, pending: &str, size: &str| {
            format!("Name:\texe\nState:\t{state}\n{size}SigPnd:\t{pending}\nShdPnd:\t0000\n")
        };
        let size = "VmSize:\t  1000 kB\n";
        for (status, dying) in [
            (status("S (sleeping)", "0000000000000000", size), false),
            (status("D (disk sleep)", "0000000000000000", size), false),
            (status("T (stopped)", "0000000000000000", size), false),
            (status("D (disk sleep)", "0000000000000002", size), false),
            (status("D (disk sleep)", "0000000000000100", size), true),
            (status("Z (zombie)", "0000000000000000", ""), true),
            (status("D (disk sleep)", "0000000000000000", ""), true),
        ] {
            assert_eq!(says_dying(&status), dying, "{status}");
        }
        let own = std::fs::read_to_string("/proc/self/status").unwrap();
        assert!(!says_dying(&own), "{own}");
    }
}
