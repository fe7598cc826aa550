//! One private libvirtd per test.
//!
//! It runs in mount and process namespaces of its own, under an init process
//! that ends when the test does, however the test ends: the kernel then kills
//! everything inside, QEMU included. Its directories lie in one temporary
//! directory, so sockets and images have the same path inside and outside.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use tempfile::TempDir;

use crate::cache;
use crate::command::{Tool, tool, wait_until, which};

/// What libvirt keeps where, and under which name in the lab.
const PRIVATE: [(&str, &str); 7] = [
    ("run", "/run/libvirt"),
    ("lib", "/var/lib/libvirt"),
    ("etc", "/etc/libvirt"),
    ("cache", "/var/cache/libvirt"),
    ("log", "/var/log/libvirt"),
    ("swtpm-log", "/var/log/swtpm"),
    ("swtpm-ca", "/var/lib/swtpm-localca"),
];

/// Locked while the lab lives, so that no other test sweeps its directory away.
const LOCK: &str = "lock";

/// The test is root in its own corner: no second user, no labels, no cgroups,
/// no private /dev, and QEMU's output in a plain file without a daemon.
const QEMU_CONF: &str = r#"security_driver = "none"
user = "root"
group = "root"
swtpm_user = "root"
swtpm_group = "root"
stdio_handler = "file"
cgroup_controllers = [ ]
namespaces = [ ]
remember_owner = 0
"#;

const LIBVIRTD_CONF: &str = r#"auth_unix_rw = "none"
auth_unix_ro = "none"
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
"#;

/// `qemu-io` over the monitor reports on QEMU's standard output. That is a file
/// here, and a file is written when 4 KiB are full; this makes it line by line.
const LINE_BUFFERED_C: &str = "#include <stdio.h>\n\
    __attribute__((constructor)) static void lines(void) { setvbuf(stdout, NULL, _IOLBF, 0); }\n";

/// A private libvirtd. Dropping the last copy of the handle kills all that runs
/// in it and removes its files.
#[derive(Debug, Clone)]
pub struct Lab {
    life: Arc<Life>,
}

#[derive(Debug)]
struct Life {
    /// `unshare`; its only child is the init process of the namespace.
    outer: Child,
    /// Process id of that init process as seen from outside.
    init: u32,
    // After the processes, in order of declaration: the files go last.
    _lock: File,
    dir: TempDir,
}

impl Lab {
    /// Starts a libvirtd of its own.
    pub fn start() -> Result<Self> {
        let dir = private_dir()?;
        let capabilities = capabilities()?;
        Self::start_in(dir, Some(&capabilities))
    }

    fn start_in(dir: TempDir, capabilities: Option<&Path>) -> Result<Self> {
        let root = dir.path();
        let lock = lock(root)?;
        for (name, _) in PRIVATE {
            fs::create_dir(root.join(name))?;
        }
        fs::create_dir(root.join("files"))?;
        fs::write(root.join("etc/qemu.conf"), QEMU_CONF)?;
        fs::write(root.join("etc/libvirtd.conf"), LIBVIRTD_CONF)?;
        if let Some(known) = capabilities {
            copy_tree(known, &root.join("cache/qemu/capabilities"))?;
        }
        let line_buffered = line_buffered()?;
        fs::write(root.join("libvirtd.sh"), libvirtd_script(&line_buffered))?;
        fs::write(root.join("init.sh"), init_script(root))?;

        let outer = Command::new("unshare")
            .args(["-m", "-p", "-f", "--kill-child", "--mount-proc", "bash"])
            .arg(root.join("init.sh"))
            .env("LC_ALL", "C")
            // The init process reads this pipe: when the test ends, by a signal too, it ends.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(root.join("init.err"))?)
            .spawn()
            .context("cannot start unshare (util-linux)")?;
        let mut life = Life {
            outer,
            init: 0,
            _lock: lock,
            dir,
        };
        life.wait_for_libvirtd()?;
        life.init = only_child(life.outer.id())?;
        Ok(Self {
            life: Arc::new(life),
        })
    }

    fn root(&self) -> &Path {
        self.life.dir.path()
    }

    /// Returns the libvirt URI of this lab, usable from the test's own process.
    pub fn uri(&self) -> String {
        format!(
            "qemu+unix:///system?socket={}",
            self.root().join("run/libvirt-sock").display()
        )
    }

    /// Returns the directory for images and other files; QEMU sees it too.
    pub fn dir(&self) -> PathBuf {
        self.root().join("files")
    }

    /// Returns the path of `name` in [`Lab::dir`].
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// Runs virsh against this lab.
    pub fn virsh<A: AsRef<std::ffi::OsStr>>(&self, args: &[A]) -> Result<String> {
        tool("virsh")
            .args(["-q", "-c", &self.uri()])
            .args(args)
            .run()
    }

    /// Defines a persistent domain.
    pub fn define(&self, xml: &str) -> Result<()> {
        let file = tempfile::Builder::new()
            .suffix(".xml")
            .tempfile_in(self.root())?;
        fs::write(file.path(), xml)?;
        self.virsh(&["define".as_ref(), file.path().as_os_str()])
            .with_context(|| format!("cannot define {xml}"))?;
        Ok(())
    }

    /// Prepares to run a program inside the namespaces of this libvirtd, where
    /// the process ids that libvirt reports mean something.
    pub fn inside(&self, program: &str) -> Tool {
        tool("nsenter").args(["-m", "-p", "-t", &self.life.init.to_string(), "--", program])
    }

    /// Kills libvirtd with SIGKILL; QEMU runs on. See [`Lab::start_libvirtd`].
    pub fn kill_libvirtd(&self) -> Result<()> {
        let pid = self.libvirtd_pid()?;
        self.inside("kill").args(["-9", &pid]).run()?;
        wait_until("libvirtd is gone", Duration::from_secs(10), || {
            Ok(self.inside("kill").args(["-0", &pid]).run().is_err())
        })
    }

    /// Starts libvirtd after [`Lab::kill_libvirtd`]; returns when it answers.
    pub fn start_libvirtd(&self) -> Result<()> {
        self.inside("bash")
            .arg(self.root().join("libvirtd.sh"))
            .run()?;
        self.virsh(&["version"])?;
        Ok(())
    }

    /// Kills libvirtd and starts it again.
    pub fn restart_libvirtd(&self) -> Result<()> {
        self.kill_libvirtd()?;
        self.start_libvirtd()
    }

    /// Returns the end of libvirtd's log, for messages.
    pub fn libvirtd_log(&self) -> String {
        end_of_log(self.root())
    }

    /// Returns the file that holds the output of a VM's QEMU.
    pub fn qemu_log(&self, vm: &str) -> PathBuf {
        self.root().join(format!("log/qemu/{vm}.log"))
    }

    /// Returns where libvirt keeps its state of running VMs (`/run/libvirt`).
    pub fn run_dir(&self) -> PathBuf {
        self.root().join("run")
    }

    /// Returns where libvirt keeps what must survive (`/var/lib/libvirt`).
    pub fn lib_dir(&self) -> PathBuf {
        self.root().join("lib")
    }

    fn libvirtd_pid(&self) -> Result<String> {
        let pid = fs::read_to_string(self.root().join("run/libvirtd.pid"))
            .context("libvirtd has left no pid file")?;
        Ok(pid.trim().to_owned())
    }
}

impl Life {
    fn wait_for_libvirtd(&mut self) -> Result<()> {
        let stdout = self.outer.stdout.take().context("unshare has no stdout")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        if line.trim() != "ready" {
            let root = self.dir.path();
            let said = fs::read_to_string(root.join("init.err")).unwrap_or_default();
            bail!(
                "cannot start a private libvirtd (this needs root and libvirt): {said}{}",
                end_of_log(root)
            );
        }
        Ok(())
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        // Not gracefully: libvirtd may take 30 s for that. `--kill-child` lets
        // the init process die with `unshare`, and all others die with init.
        drop(self.outer.kill());
        drop(self.outer.wait());
        // QEMU may make files as long as it lives, so the directory goes when the
        // init process has: it is the last one to die.
        let gone = || Ok(self.init == 0 || is_dead(self.init));
        drop(wait_until("namespace gone", Duration::from_secs(5), gone));
    }
}

/// Makes a directory for one test, and removes those of tests that were killed.
pub(crate) fn private_dir() -> Result<TempDir> {
    let base = std::env::var_os("HIGHWATER_LAB_DIR")
        .map_or_else(|| PathBuf::from("/dev/shm"), PathBuf::from);
    sweep(&base);
    // Short: a unix socket's path has room for 107 bytes.
    let mut dir = tempfile::Builder::new()
        .prefix("hwl-")
        .tempdir_in(&base)
        .with_context(|| format!("cannot make a lab in {}", base.display()))?;
    dir.disable_cleanup(std::env::var_os("HIGHWATER_LAB_KEEP").is_some());
    Ok(dir)
}

/// Keeps others from sweeping the directory away for as long as it is held.
pub(crate) fn lock(dir: &Path) -> Result<File> {
    // Locked before it has the name that sweepers look for.
    let lock = File::create(dir.join("lock.new"))?;
    lock.lock()?;
    fs::rename(dir.join("lock.new"), dir.join(LOCK))?;
    Ok(lock)
}

fn end_of_log(root: &Path) -> String {
    let log = fs::read_to_string(root.join("log/libvirtd.log")).unwrap_or_default();
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// Returns a directory of libvirt's knowledge about this QEMU: asking QEMU takes
/// libvirt 8 s, reading it 0.1 s.
fn capabilities() -> Result<PathBuf> {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let name = format!(
        "capabilities-{}-{}-{}",
        cache::version_of(&which("qemu-system-x86_64")?)?,
        cache::version_of(&which("libvirtd")?)?,
        kernel.trim()
    );
    cache::once(&name, |draft| {
        let dir = tempfile::Builder::new().prefix("hwl-").tempdir_in("/tmp")?;
        let lab = Lab::start_in(dir, None)?;
        lab.virsh(&["domcapabilities", "--virttype", "qemu"])?;
        let learnt = lab.root().join("cache/qemu/capabilities");
        ensure!(
            fs::read_dir(&learnt)?.next().is_some(),
            "libvirtd has learnt nothing about QEMU"
        );
        copy_tree(&learnt, draft)
    })
}

pub(crate) fn line_buffered() -> Result<PathBuf> {
    let dir = cache::once("line-buffered-1", |draft| {
        tool("cc")
            .args(["-shared", "-fPIC", "-O2", "-x", "c", "-", "-o"])
            .arg(draft.join("line-buffered.so"))
            .input(LINE_BUFFERED_C)
            .run()?;
        Ok(())
    })?;
    Ok(dir.join("line-buffered.so"))
}

/// libvirt passes LD_PRELOAD on to QEMU, and of the rest of our environment little.
fn libvirtd_script(line_buffered: &Path) -> String {
    format!(
        "export PATH=/usr/sbin:/usr/bin:/sbin:/bin\n\
         export LD_PRELOAD={}\n\
         exec libvirtd --pid-file /run/libvirt/libvirtd.pid -d\n",
        line_buffered.display()
    )
}

fn init_script(root: &Path) -> String {
    use std::fmt::Write as _;
    let root = root.display();
    let mut script = String::from("set -e\nmount --make-rprivate /\n");
    for (name, place) in PRIVATE {
        writeln!(
            script,
            "mkdir -p {place}; mount --bind {root}/{name} {place}"
        )
        .expect("writing to a String cannot fail");
    }
    // Were there a systemd behind it, it would want to know of every VM, by name.
    script.push_str("if [ -d /run/dbus ]; then mount -t tmpfs none /run/dbus; fi\n");
    writeln!(script, "bash {root}/libvirtd.sh </dev/null >&2").expect("as above");
    // bash reaps what is re-parented to it; libvirt waits for a dead QEMU to vanish.
    script.push_str("echo ready\nwhile read -r _; do :; done\n");
    script
}

/// A zombie is dead: with `unshare` gone it waits for a foreign parent's attention.
fn is_dead(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in parentheses may hold anything, so look behind it.
    stat.rsplit_once(") ")
        .is_none_or(|(_, fields)| fields.starts_with(['Z', 'X']))
}

fn only_child(pid: u32) -> Result<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    children
        .split_whitespace()
        .next()
        .and_then(|pid| pid.parse().ok())
        .context("unshare has no child")
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

/// Removes labs whose test was killed before it could.
fn sweep(base: &Path) {
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        let is_lab = entry.file_name().to_string_lossy().starts_with("hwl-");
        let Ok(lock) = File::open(entry.path().join(LOCK)) else {
            continue;
        };
        if is_lab && lock.try_lock().is_ok() {
            drop(fs::remove_dir_all(entry.path()));
        }
    }
}
