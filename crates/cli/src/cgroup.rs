//! A control group of its own for whoever tidies up.
//!
//! A service that runs out of memory, or is told to stop, is often killed as a
//! whole group (`OOMPolicy=kill`, `memory.oom.group`, `KillMode=control-group`):
//! the guard would die with those it is there to outlive.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// At the top of the hierarchy, where nobody's service is.
const GROUP: &str = "highwater";
const MOUNTS: &str = "/proc/self/mountinfo";

/// Moves this process out of its group. Nothing depends on it, and only root can;
/// where it fails the process stays where it is.
pub(crate) fn leave() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let mounts = fs::read_to_string(MOUNTS).unwrap_or_default();
    if let Some(top) = top_of(&mounts) {
        drop(move_to(&top.join(GROUP)));
    }
}

fn move_to(group: &Path) -> std::io::Result<()> {
    match fs::create_dir(group) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut members = OpenOptions::new()
        .write(true)
        .open(group.join("cgroup.procs"))?;
    // 0 is whoever writes it.
    members.write_all(b"0")
}

/// Finds where the unified hierarchy is mounted from its top (Linux,
/// Documentation/filesystems/proc.rst, 3.5).
fn top_of(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (about, kind) = line.split_once(" - ")?;
        let mut fields = about.split(' ').skip(3);
        let (root, place) = (fields.next()?, fields.next()?);
        // An escaped blank is in no path that anybody mounts it at.
        let is_top = kind.starts_with("cgroup2 ") && root == "/" && !place.contains('\\');
        is_top.then(|| PathBuf::from(place))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_top_of_the_unified_hierarchy_is_found_among_all_mounts() {
        let memory = "31 25 0:27 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory";
        let below = "32 25 0:28 /a /srv/a rw - cgroup2 cgroup2 rw";
        let top = "33 25 0:28 / /sys/fs/cgroup/unified rw shared:1 master:2 - cgroup2 cgroup2 rw";
        let all = [memory, below, top].join("\n");
        assert_eq!(top_of(&all), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(top_of(&[memory, below].join("\n")), None);
        assert_eq!(top_of("cut - cgroup2"), None);
    }
}
