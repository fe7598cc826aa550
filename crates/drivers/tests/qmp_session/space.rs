//! A small file system.

use std::path::Path;

use highwater_testkit::tool;

/// Unmounted when it is dropped.
pub(crate) struct SmallSpace(tempfile::TempDir);

impl SmallSpace {
    pub(crate) fn mount(size: &str) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("hws-")
            .tempdir_in("/dev/shm")
            .unwrap();
        tool("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"])
            .arg(dir.path())
            .run()
            .unwrap();
        Self(dir)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallSpace {
    fn drop(&mut self) {
        drop(tool("umount").arg("-l").arg(self.0.path()).run());
    }
}
