//! A QEMU without libvirt: a child of the test, started as launchers start it.

mod attach;
mod graph;
mod monitor;
mod qemu;

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

pub use attach::Attach;
pub use graph::Graph;
pub use qemu::Qemu;

use crate::command::{tool, wait_until};
use crate::disk::DiskSpec;
use crate::lab;
use crate::vm::{BitmapSeen, bitmaps_in_image, bitmaps_of_image, check_qemu_io};

use monitor::Monitor;

/// From its start to its first word. QEMU takes 0.2 s, on a busy machine 5 s.
const START: Duration = Duration::from_mins(1);

/// How long a QEMU that was asked to end may take to write its images.
const END: Duration = Duration::from_secs(30);

/// A private directory for VMs without libvirt, removed with the last copy of
/// the handle.
#[derive(Debug, Clone)]
pub struct BareLab {
    files: Arc<Files>,
}

#[derive(Debug)]
struct Files {
    _lock: File,
    dir: TempDir,
}

impl BareLab {
    /// Makes the directory.
    pub fn start() -> Result<Self> {
        let dir = lab::private_dir()?;
        let lock = lab::lock(dir.path())?;
        let files = Arc::new(Files { _lock: lock, dir });
        Ok(Self { files })
    }

    /// Returns the directory for images and other files.
    pub fn dir(&self) -> PathBuf {
        self.files.dir.path().to_owned()
    }

    /// Returns the path of `name` in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.files.dir.path().join(name)
    }

    /// Begins the description of a VM.
    pub fn vm(&self, name: &str) -> BareBuilder {
        BareBuilder {
            lab: self.clone(),
            name: name.to_owned(),
            qemu: Qemu::default(),
            naming: vec!["-name".to_owned(), name.to_owned()],
            disks: Vec::new(),
            arguments: Vec::new(),
            memory_mib: 16,
            problem: None,
        }
    }
}

/// A VM to be made; see [`BareLab::vm`].
#[derive(Debug)]
pub struct BareBuilder {
    lab: BareLab,
    name: String,
    qemu: Qemu,
    naming: Vec<String>,
    disks: Vec<(DiskSpec, Attach)>,
    arguments: Vec<String>,
    memory_mib: u64,
    /// Told when the VM is made, so that building it reads as one sentence.
    problem: Option<anyhow::Error>,
}

impl BareBuilder {
    /// Chooses the QEMU.
    #[must_use]
    pub const fn qemu(mut self, qemu: Qemu) -> Self {
        self.qemu = qemu;
        self
    }

    /// Adds a disk the way most launchers do: `-drive file=...,if=virtio`.
    #[must_use]
    pub fn disk(self, disk: DiskSpec) -> Self {
        self.disk_as(disk, Attach::drive())
    }

    /// Adds a disk.
    #[must_use]
    pub fn disk_as(mut self, disk: DiskSpec, attach: Attach) -> Self {
        self.disks.push((disk, attach));
        self
    }

    /// Adds arguments of QEMU's.
    #[must_use]
    pub fn args<A: AsRef<str>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        let arguments = arguments.into_iter();
        self.arguments
            .extend(arguments.map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// Starts it with `-S`: its state is `prelaunch`.
    #[must_use]
    pub fn prelaunch(self) -> Self {
        self.args(["-S"])
    }

    /// Starts it with `-incoming defer`: its state is `inmigrate`.
    #[must_use]
    pub fn incoming(self) -> Self {
        self.args(["-incoming", "defer"])
    }

    /// Starts it without `-name`.
    #[must_use]
    pub fn nameless(mut self) -> Self {
        self.naming.clear();
        self
    }

    /// Gives it a UUID; it has none otherwise.
    #[must_use]
    pub fn uuid(self, uuid: &str) -> Self {
        self.args(["-uuid", uuid])
    }

    /// Adds a monitor on a free TCP port of the loopback; see [`BareVm::tcp_uri`].
    #[must_use]
    pub fn tcp(self) -> Self {
        self.args([
            "-chardev",
            "socket,id=tcp,host=127.0.0.1,port=0,server=on,wait=off",
            "-mon",
            "chardev=tcp,mode=control",
        ])
    }

    /// Adds the two flash chips of a UEFI, with variables of its own.
    #[must_use]
    pub fn uefi(mut self) -> Self {
        let vars = self.lab.path(&format!("{}-vars.fd", self.name));
        if let Err(error) = fs::copy("/usr/share/OVMF/OVMF_VARS_4M.fd", &vars) {
            self.problem = Some(anyhow::Error::new(error).context("cannot copy OVMF's variables"));
        }
        // OVMF does not start with less.
        self.memory_mib = self.memory_mib.max(128);
        self.args([
            "-drive",
            "if=pflash,unit=0,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd",
            "-drive",
            &format!("if=pflash,unit=1,format=raw,file={}", vars.display()),
        ])
    }

    /// Adds what the VM boots.
    pub(crate) fn boot(
        mut self,
        memory_mib: u64,
        arguments: impl FnOnce(&BareLab, &str, &Path) -> Result<Vec<String>>,
    ) -> Self {
        self.memory_mib = memory_mib;
        let agent = agent_socket(&self.lab, &self.name);
        match arguments(&self.lab, &self.name, &agent) {
            Ok(arguments) => self.args(arguments),
            Err(error) => {
                self.problem = Some(error);
                self
            }
        }
    }

    /// Makes the images; the VM is off.
    pub fn create(self) -> Result<BareVm> {
        if let Some(problem) = self.problem {
            return Err(problem);
        }
        let mut disks = Vec::new();
        let mut arguments = self.naming;
        for (spec, attach) in &self.disks {
            let image = spec.create(&self.lab.dir(), &self.name)?;
            let (image, format) = image.context("a disk made of libvirt's XML")?;
            arguments.extend(attach.arguments(spec, &image, &format));
            disks.push(BareDisk {
                target: spec.target.clone(),
                image,
                format,
            });
        }
        arguments.extend(["-m".to_owned(), self.memory_mib.to_string()]);
        arguments.extend(self.arguments);
        Ok(BareVm {
            inner: Arc::new(Inner {
                lab: self.lab,
                name: self.name,
                qemu: self.qemu,
                disks,
                arguments: Mutex::new(arguments),
                running: Mutex::new(None),
            }),
        })
    }

    /// Makes the images and starts the VM.
    pub fn start(self) -> Result<BareVm> {
        let vm = self.create()?;
        vm.start()?;
        Ok(vm)
    }
}

/// A VM without libvirt. It ends with the last copy of the handle, and with the
/// thread that started it.
#[derive(Debug, Clone)]
pub struct BareVm {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    lab: BareLab,
    name: String,
    qemu: Qemu,
    disks: Vec<BareDisk>,
    arguments: Mutex<Vec<String>>,
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct BareDisk {
    target: String,
    image: PathBuf,
    format: String,
}

#[derive(Debug)]
struct Running {
    child: Child,
    monitor: Monitor,
    /// What QEMU calls the device of each disk.
    devices: Vec<String>,
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl BareVm {
    /// Returns its name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Returns where it lives.
    pub fn lab(&self) -> &BareLab {
        &self.inner.lab
    }

    /// Adds arguments for its next start.
    pub fn add_args(&self, arguments: &[&str]) {
        let arguments = arguments.iter().map(|&argument| argument.to_owned());
        lock(&self.inner.arguments).extend(arguments);
    }

    /// Starts it, with the same arguments each time.
    pub fn start(&self) -> Result<()> {
        let mut running = self.running();
        ensure!(running.is_none(), "VM {} runs already", self.name());
        let mut child = self.spawn()?;
        let started = self.greet(&mut child);
        let log = || fs::read_to_string(self.log()).unwrap_or_default();
        match started.and_then(|monitor| self.meet(monitor)) {
            Ok((monitor, devices)) => {
                *running = Some(Running {
                    child,
                    monitor,
                    devices,
                });
                Ok(())
            }
            Err(error) => {
                drop(child.kill());
                drop(child.wait());
                Err(error).with_context(|| format!("VM {} does not start: {}", self.name(), log()))
            }
        }
    }

    fn spawn(&self) -> Result<Child> {
        let mut command = self.inner.qemu.command()?.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-machine",
            "pc,accel=tcg",
        ]);
        for monitor in ["test", "qmp", "second"] {
            let socket = self.socket(monitor);
            // A killed QEMU leaves its sockets, and who connects meanwhile is refused.
            drop(fs::remove_file(&socket));
            let socket = socket.display();
            command = command.args([
                "-chardev",
                &format!("socket,id={monitor},path={socket},server=on,wait=off"),
                "-mon",
                &format!("chardev={monitor},mode=control"),
            ]);
        }
        let command = command.args(lock(&self.inner.arguments).iter());
        let log = File::options().create(true).append(true).open(self.log())?;
        let mut command = command
            .env("LD_PRELOAD", lab::line_buffered()?)
            .into_command();
        command
            .current_dir(self.inner.lab.dir())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        command.spawn().context("cannot start setpriv (util-linux)")
    }

    fn greet(&self, child: &mut Child) -> Result<Monitor> {
        let socket = self.socket("test");
        let mut monitor = None;
        wait_until("QEMU greets", START, || {
            if let Some(status) = child.try_wait()? {
                bail!("QEMU ended: {status}");
            }
            monitor = Monitor::connect(&socket).ok();
            Ok(monitor.is_some())
        })?;
        monitor.context("QEMU has not greeted")
    }

    /// Learns what QEMU calls the devices of the disks.
    fn meet(&self, mut monitor: Monitor) -> Result<(Monitor, Vec<String>)> {
        let drives = monitor.run(&json!({"execute": "query-block"}))?;
        let drives = drives.as_array().context("QEMU lists no drives")?;
        let device = |disk: &BareDisk| -> Result<String> {
            let image = disk.image.to_str().context("a path is text")?;
            let is_its_image = |drive: &&Value| drive["inserted"]["image"]["filename"] == image;
            let names_it = |drive: &&Value| drive["inserted"].to_string().contains(image);
            let drive = drives.iter().find(is_its_image);
            let drive = drive.or_else(|| drives.iter().find(names_it));
            let device = drive.and_then(|drive| drive["qdev"].as_str());
            Ok(device
                .with_context(|| format!("no device has {image}: {drives:?}"))?
                .to_owned())
        };
        let devices = self.inner.disks.iter().map(device);
        let devices = devices.collect::<Result<_>>()?;
        Ok((monitor, devices))
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        lock(&self.inner.running)
    }

    fn log(&self) -> PathBuf {
        self.inner.lab.path(&format!("{}.log", self.name()))
    }

    fn socket(&self, monitor: &str) -> PathBuf {
        self.inner.lab.path(&format!("{}.{monitor}", self.name()))
    }

    /// Returns the socket of the monitor that is for the program.
    pub fn qmp_socket(&self) -> PathBuf {
        self.socket("qmp")
    }

    /// Returns the socket of a third monitor: another door to the same VM.
    pub fn second_socket(&self) -> PathBuf {
        self.socket("second")
    }

    /// Returns the guest agent's socket; there is one only with a real guest.
    pub fn agent_socket(&self) -> PathBuf {
        agent_socket(&self.inner.lab, self.name())
    }

    /// Returns the program's URI of this VM.
    pub fn uri(&self) -> String {
        format!("qmp:{}", self.qmp_socket().display())
    }

    /// Returns the program's URI of its images, which it must be off for.
    pub fn image_uri(&self) -> String {
        let images = self.inner.disks.iter();
        let images = images.map(|disk| format!("{}={}", disk.target, disk.image.display()));
        let images: Vec<_> = images.collect();
        format!("image:{}?name={}", images.join(","), self.name())
    }

    /// Returns the URI of its monitor on TCP; see [`BareBuilder::tcp`].
    pub fn tcp_uri(&self) -> Result<String> {
        let devices = self.qmp("query-chardev", &json!({}))?;
        let devices = devices.as_array().context("no character devices")?;
        let tcp = devices.iter().find(|device| device["label"] == "tcp");
        let name = tcp.and_then(|device| device["filename"].as_str());
        let name = name.context("the VM has no monitor on TCP")?;
        // `disconnected:tcp:127.0.0.1:38511,server=on`
        let port = name.split([',', ' ']).next().unwrap_or_default();
        let port = port.rsplit(':').next().unwrap_or_default().parse()?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Ok(format!("qmp:tcp:{address}"))
    }

    /// Returns QEMU's process id.
    pub fn pid(&self) -> Result<u32> {
        let running = self.running();
        let running = running.as_ref().context("the VM is off")?;
        Ok(running.child.id())
    }

    /// Says whether it has a QEMU.
    pub fn is_active(&self) -> bool {
        let mut running = self.running();
        let ended = |running: &mut Running| running.child.try_wait().is_ok_and(|it| it.is_some());
        if running.as_mut().is_some_and(ended) {
            *running = None;
        }
        running.is_some()
    }

    /// Kills QEMU with SIGKILL.
    pub fn kill(&self) -> Result<()> {
        let running = self.running().take();
        drop(running.context("the VM is off")?);
        Ok(())
    }

    /// Has QEMU end in order, as a launcher does that cares for its images.
    pub fn quit(&self) -> Result<()> {
        let mut running = self.running().take().context("the VM is off")?;
        running.monitor.run(&json!({"execute": "quit"}))?;
        ended(&mut running.child).map(drop)
    }

    /// Ends QEMU with SIGTERM, which it answers as it does `quit`.
    pub fn terminate(&self) -> Result<()> {
        let mut running = self.running().take().context("the VM is off")?;
        let pid = running.child.id().to_string();
        tool("kill").args(["-TERM", &pid]).run()?;
        ended(&mut running.child).map(drop)
    }

    /// Runs one QMP command over the test's own monitor; returns what stands
    /// under `return`.
    pub fn qmp(&self, command: &str, arguments: &Value) -> Result<Value> {
        let mut running = self.running();
        let running = running.as_mut().context("the VM is off")?;
        let command = json!({"execute": command, "arguments": arguments});
        running.monitor.run(&command)
    }

    /// Sends one command to the human monitor.
    pub fn hmp(&self, command: &str) -> Result<String> {
        let arguments = json!({"command-line": command});
        let answer = self.qmp("human-monitor-command", &arguments)?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    }

    /// Returns QEMU's word for the run state.
    pub fn state(&self) -> Result<String> {
        let status = self.qmp("query-status", &json!({}))?;
        Ok(status["status"].as_str().unwrap_or("?").to_owned())
    }

    /// Lets the guest write; see [`Vm::write`](crate::Vm::write).
    pub fn write(&self, disk: &str, command: &str) -> Result<()> {
        self.write_all(disk, &[command.to_owned()])
    }

    /// Like [`BareVm::write`] for many commands.
    pub fn write_all(&self, disk: &str, commands: &[String]) -> Result<()> {
        let commands: Vec<_> = commands.iter().map(|command| (disk, command)).collect();
        self.write_each(&commands)
    }

    /// Like [`BareVm::write_all`] for commands to any of the disks, in their order.
    pub fn write_each<C: AsRef<str>>(&self, commands: &[(&str, C)]) -> Result<()> {
        let log = self.log();
        let before = fs::read(&log)?.len();
        let mut told = String::new();
        for (disk, command) in commands {
            let (device, command) = (self.device(disk)?, command.as_ref());
            told += &self.hmp(&format!("qemu-io -d {device} \"{command}\""))?;
        }
        let after = fs::read(&log)?;
        let said = String::from_utf8_lossy(&after[before.min(after.len())..]);
        // A flush says nothing.
        let speaking = commands.iter().filter(|(_, it)| it.as_ref() != "flush");
        check_qemu_io(&said, speaking.count())
            .with_context(|| format!("cannot write to VM {}: {said}{told}", self.name()))
    }

    /// Returns what QEMU calls the device of a disk.
    pub fn device(&self, disk: &str) -> Result<String> {
        let number = self.number(disk);
        let running = self.running();
        let running = running.as_ref().context("the VM is off")?;
        Ok(running.devices[number].clone())
    }

    /// Returns the name of the node that is made of a disk's image.
    pub fn node(&self, disk: &str) -> Result<String> {
        let disk = &self.inner.disks[self.number(disk)];
        let image = disk.image.to_str();
        let nodes = self.nodes()?;
        let mut nodes = nodes.as_array().context("QEMU lists no nodes")?.iter();
        let is_it = |node: &&Value| node["drv"] == *disk.format && node["file"].as_str() == image;
        let node = nodes
            .find(is_it)
            .and_then(|node| node["node-name"].as_str());
        Ok(node.context("no node of the image")?.to_owned())
    }

    fn number(&self, disk: &str) -> usize {
        let mut disks = self.inner.disks.iter();
        disks
            .position(|known| known.target == disk)
            .unwrap_or_else(|| panic!("VM {} has no disk {disk}", self.name()))
    }

    /// Flushes what QEMU holds of the disk in memory to its image.
    pub fn flush(&self, disk: &str) -> Result<()> {
        let device = self.device(disk)?;
        self.hmp(&format!("qemu-io -d {device} \"flush\""))
            .map(drop)
    }

    /// Returns the image of a disk.
    ///
    /// # Panics
    /// If the VM was not made with that disk.
    pub fn image(&self, disk: &str) -> PathBuf {
        self.inner.disks[self.number(disk)].image.clone()
    }

    /// Writes the disk as the guest sees it now to a raw file.
    pub fn raw_copy(&self, disk: &str, to: &Path) -> Result<()> {
        if self.is_active() {
            self.flush(disk)?;
        }
        let disk = &self.inner.disks[self.number(disk)];
        tool("qemu-img")
            .args(["convert", "-U", "-f", &disk.format, "-O", "raw"])
            .arg(&disk.image)
            .arg(to)
            .run()?;
        Ok(())
    }

    /// Returns the named bitmaps of a disk: QEMU's view if it runs, else the image's.
    pub fn bitmaps(&self, disk: &str) -> Result<Vec<BitmapSeen>> {
        let active = self.is_active();
        let disk = &self.inner.disks[self.number(disk)];
        if !active {
            return bitmaps_in_image(&disk.image);
        }
        let nodes = self.nodes()?;
        let nodes = nodes.as_array().context("QEMU lists no nodes")?;
        Ok(bitmaps_of_image(nodes, &disk.image, &disk.format))
    }

    fn nodes(&self) -> Result<Value> {
        self.qmp("query-named-block-nodes", &json!({"flat": true}))
    }

    /// Fails if QEMU has an NBD server: there is one at a time, and no command
    /// that asks for it.
    pub fn no_nbd_server(&self) -> Result<()> {
        let path = self.socket("nbd-probe");
        let address = json!({"type": "unix", "data": {"path": path}});
        self.qmp("nbd-server-start", &json!({"addr": address}))?;
        self.qmp("nbd-server-stop", &json!({})).map(drop)
    }
}

fn agent_socket(lab: &BareLab, vm: &str) -> PathBuf {
    lab.path(&format!("{vm}.agent"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A test that panicked while it held it is lost already.
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn ended(child: &mut Child) -> Result<ExitStatus> {
    let end = Instant::now() + END;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        ensure!(Instant::now() < end, "QEMU does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}
