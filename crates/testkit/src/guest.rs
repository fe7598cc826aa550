//! A real guest: Linux with the guest agent, booted in a few seconds under TCG.
//!
//! It lives in its initial file system alone, so every disk is the test's. An
//! ext4 file system on `/dev/vda` is mounted at `/data`.

mod assets;
mod initramfs;
mod latency;
mod writer;

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

pub use assets::{Assets, assets};
pub use latency::{Latency, LatencyWriter};
pub use writer::{NumberedWriter, Numbering};

use crate::bare::{BareBuilder, BareVm};
use crate::command::{tool, wait_until};
use crate::lab::Lab;
use crate::vm::{Vm, VmBuilder};

/// Boot takes 3 s alone, and many times that on a busy machine.
const BOOT_DEADLINE: Duration = Duration::from_mins(2);

/// The kernel, its initial file system twice (packed and unpacked), and some air.
const MEMORY_MIB: u64 = 256;

/// The agent starts together with the loop that has already answered.
const AGENT_DEADLINE: Duration = Duration::from_secs(30);

/// The guest's end of a VM made with [`VmBuilder::guest`].
#[derive(Debug)]
pub struct Guest {
    name: String,
    agent: AgentLine,
    writer: PathBuf,
    control: Mutex<UnixStream>,
}

/// Who passes words on to the guest agent.
#[derive(Debug)]
enum AgentLine {
    Libvirt(Vm),
    /// Nobody: a socket of QEMU's, for one at a time.
    Socket(PathBuf),
}

impl VmBuilder {
    /// Boots a real guest; see [`Vm::guest`].
    #[must_use]
    pub fn guest(self) -> Self {
        let xml = xml(self.lab(), self.name());
        self.memory_mib(MEMORY_MIB).boot(xml)
    }
}

impl BareBuilder {
    /// Boots a real guest with its agent; see [`BareVm::guest`].
    #[must_use]
    pub fn guest(self) -> Self {
        self.boot(MEMORY_MIB, |lab, name, agent| {
            arguments(&lab.dir(), name, agent)
        })
    }
}

impl Vm {
    /// Waits until the guest has booted and returns the way to it.
    ///
    /// Once per start: there is one line to the guest, and it has one end.
    pub fn guest(&self) -> Result<Guest> {
        let (control, writer) = sockets(&self.lab().dir(), self.name());
        let agent = AgentLine::Libvirt(self.clone());
        Guest::connect(self.name(), &control, writer, agent)
    }
}

impl BareVm {
    /// Like [`Vm::guest`], of a VM made with
    /// [`BareBuilder::guest`](crate::BareBuilder::guest).
    pub fn guest(&self) -> Result<Guest> {
        let (control, writer) = sockets(&self.lab().dir(), self.name());
        let agent = AgentLine::Socket(self.agent_socket());
        Guest::connect(self.name(), &control, writer, agent)
    }
}

impl Guest {
    /// Waits until the guest has booted.
    fn connect(name: &str, socket: &Path, writer: PathBuf, agent: AgentLine) -> Result<Self> {
        let control = UnixStream::connect(socket)
            .with_context(|| format!("cannot reach the guest at {}", socket.display()))?;
        let guest = Self {
            name: name.to_owned(),
            agent,
            writer,
            control: Mutex::new(control),
        };
        let booted = guest.run_within("true", BOOT_DEADLINE);
        booted.with_context(|| format!("guest {} does not boot", guest.name))?;
        Ok(guest)
    }

    /// Runs a shell command in the guest and returns what it printed; fails if
    /// it fails or takes longer than 60 s.
    pub fn run(&self, command: &str) -> Result<String> {
        self.run_within(command, Duration::from_mins(1))
    }

    /// Like [`Guest::run`] with a deadline of one's own.
    pub fn run_within(&self, command: &str, deadline: Duration) -> Result<String> {
        ensure!(!command.contains('\n'), "one line is one command");
        let mut control = self
            .control
            .lock()
            .map_err(|_| anyhow::anyhow!("a command before this one panicked"))?;
        control.write_all(format!("{command}\n").as_bytes())?;

        let end = Instant::now() + deadline;
        let mut said = Vec::new();
        let mut piece = [0; 4096];
        loop {
            if let Some((output, status)) = finished(&said) {
                ensure!(status == 0, "`{command}` ended with {status}: {output}");
                return Ok(output);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("`{command}` did not end within {deadline:?}");
            }
            control.set_read_timeout(Some(left))?;
            match control.read(&mut piece) {
                Ok(0) => bail!("the guest is gone (while running `{command}`)"),
                Ok(len) => said.extend_from_slice(&piece[..len]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits until the guest agent answers.
    pub fn wait_for_agent(&self) -> Result<()> {
        let answers = wait_until("the guest agent answers", AGENT_DEADLINE, || {
            Ok(self.agent(r#"{"execute":"guest-ping"}"#).is_ok())
        });
        answers.with_context(|| self.run("cat /tmp/agent").unwrap_or_default())
    }

    /// Sends a command to the guest agent and returns its answer.
    pub fn agent(&self, command: &str) -> Result<String> {
        let vm = match &self.agent {
            AgentLine::Libvirt(vm) => vm,
            AgentLine::Socket(socket) => return ask_agent(socket, command),
        };
        let ask = ["qemu-agent-command", "--timeout", "5", vm.name(), command];
        vm.lab().virsh(&ask)
    }

    /// Says whether the guest's file systems are frozen, as the agent tells.
    pub fn is_frozen(&self) -> Result<bool> {
        let status = self.agent(r#"{"execute":"guest-fsfreeze-status"}"#)?;
        Ok(status.contains("frozen"))
    }
}

/// Asks over the agent's own socket. Who asked before may have gone without its
/// answer, so a number is asked for first.
fn ask_agent(socket: &Path, command: &str) -> Result<String> {
    let mut line = UnixStream::connect(socket)?;
    line.set_read_timeout(Some(Duration::from_secs(5)))?;
    let number = std::process::id();
    let sync = format!(r#"{{"execute":"guest-sync","arguments":{{"id":{number}}}}}"#);
    line.write_all(format!("{sync}\n{command}\n").as_bytes())?;
    let mut answers = BufReader::new(line).lines();
    let synced = format!("{{\"return\": {number}}}");
    loop {
        let answer = answers.next().context("the agent's socket was closed")??;
        if answer == synced {
            return Ok(answers.next().context("the agent's socket was closed")??);
        }
    }
}

/// Splits what was read into a command's output and exit status, once that has come.
fn finished(said: &[u8]) -> Option<(String, i32)> {
    let text = String::from_utf8_lossy(said);
    let (output, status) = text.strip_suffix('\n')?.rsplit_once("@exit ")?;
    Some((output.to_owned(), status.parse().ok()?))
}

/// Makes an ext4 file system, with a journal, in a raw image of this size.
pub fn make_ext4(image: &Path, size_bytes: u64) -> Result<()> {
    std::fs::File::create(image)?.set_len(size_bytes)?;
    tool("mke2fs")
        .args(["-q", "-F", "-t", "ext4"])
        .arg(image)
        .run()?;
    Ok(())
}

/// Returns the elements of `<os>` and `<devices>` that make a VM boot the guest.
fn xml(lab: &Lab, vm: &str) -> Result<(String, String)> {
    let Assets { kernel, initrd } = assets()?;
    let os = format!(
        "<kernel>{}</kernel><initrd>{}</initrd>\
         <cmdline>console=ttyS0 panic=-1 quiet</cmdline>",
        kernel.display(),
        initrd.display()
    );
    let console = lab.path(&format!("{vm}-console.log"));
    let mut devices = format!(
        "<serial type='file'><source path='{}'/></serial>\n\
         <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\n",
        console.display()
    );
    let (control, writer) = sockets(&lab.dir(), vm);
    let ports = [("control", control), ("writer", writer)];
    for (name, socket) in ports {
        writeln!(
            devices,
            "<channel type='unix'><source mode='bind' path='{}'/>\
             <target type='virtio' name='org.highwater.{name}'/></channel>",
            socket.display()
        )?;
    }
    Ok((os, devices))
}

/// Returns QEMU's arguments that make a VM boot the guest; the agent's socket is given.
fn arguments(dir: &Path, vm: &str, agent: &Path) -> Result<Vec<String>> {
    let Assets { kernel, initrd } = assets()?;
    let console = dir.join(format!("{vm}-console.log"));
    let mut arguments: Vec<String> = vec![
        "-cpu".into(),
        "max".into(),
        "-kernel".into(),
        kernel.display().to_string(),
        "-initrd".into(),
        initrd.display().to_string(),
        "-append".into(),
        "console=ttyS0 panic=-1 quiet".into(),
        "-serial".into(),
        format!("file:{}", console.display()),
        "-device".into(),
        "virtio-serial-pci".into(),
    ];
    let (control, writer) = sockets(dir, vm);
    let ports = [
        ("org.qemu.guest_agent.0", agent),
        ("org.highwater.control", &control),
        ("org.highwater.writer", &writer),
    ];
    for (number, (name, socket)) in ports.into_iter().enumerate() {
        let socket = socket.display();
        arguments.extend([
            "-chardev".into(),
            format!("socket,id=port{number},path={socket},server=on,wait=off"),
            "-device".into(),
            format!("virtserialport,chardev=port{number},name={name}"),
        ]);
    }
    Ok(arguments)
}

/// Where the test reaches the guest, and the program that writes in it.
fn sockets(dir: &Path, vm: &str) -> (PathBuf, PathBuf) {
    (
        dir.join(format!("{vm}.control")),
        dir.join(format!("{vm}.writer")),
    )
}
