//! A VM of a lab: its making, its life, and a look into it.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::command::{tool, wait_until};
use crate::disk::{DiskSpec, IOTHREAD};
use crate::lab::Lab;
use crate::{images, xml};

/// A VM to be made; see [`Lab::vm`].
///
/// Without more words it has no guest: no boot medium, 16 MiB of memory, and
/// QEMU's device models ready for writes through the monitor.
#[derive(Debug)]
pub struct VmBuilder {
    lab: Lab,
    name: String,
    disks: Vec<DiskSpec>,
    uuid: Option<String>,
    machine: String,
    memory_mib: u64,
    os: String,
    devices: String,
    /// Told when the VM is made, so that building it reads as one sentence.
    problem: Option<anyhow::Error>,
}

impl Lab {
    /// Begins the description of a VM.
    pub fn vm(&self, name: &str) -> VmBuilder {
        VmBuilder::new(self.clone(), name)
    }
}

impl VmBuilder {
    fn new(lab: Lab, name: &str) -> Self {
        Self {
            lab,
            name: name.to_owned(),
            disks: Vec::new(),
            uuid: None,
            machine: "pc".to_owned(),
            memory_mib: 16,
            os: String::new(),
            devices: String::new(),
            problem: None,
        }
    }

    /// Adds a disk.
    #[must_use]
    pub fn disk(mut self, disk: DiskSpec) -> Self {
        if disk.target.starts_with("sd") && !self.devices.contains("virtio-scsi") {
            self.devices
                .push_str("<controller type='scsi' model='virtio-scsi'/>\n");
        }
        self.disks.push(disk);
        self
    }

    /// Adds an element to `<devices>`.
    #[must_use]
    pub fn device(mut self, xml: &str) -> Self {
        self.devices.push_str(xml);
        self.devices.push('\n');
        self
    }

    /// Gives it the UUID of another one, which it is to be taken for.
    #[must_use]
    pub fn uuid(mut self, uuid: &str) -> Self {
        self.uuid = Some(uuid.to_owned());
        self
    }

    /// Sets the memory.
    #[must_use]
    pub const fn memory_mib(mut self, mib: u64) -> Self {
        self.memory_mib = mib;
        self
    }

    /// Boots UEFI firmware with variables of its own.
    #[must_use]
    pub fn uefi(mut self) -> Self {
        "q35".clone_into(&mut self.machine);
        // OVMF does not start with less.
        self.memory_mib = self.memory_mib.max(128);
        let vars = self.lab.path(&format!("{}-vars.fd", self.name));
        self.os = format!(
            "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>\
             <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>{}</nvram>",
            vars.display()
        );
        self
    }

    /// Gives it an emulated TPM 2.0.
    #[must_use]
    pub fn tpm(self) -> Self {
        self.device("<tpm model='tpm-tis'><backend type='emulator' version='2.0'/></tpm>")
    }

    /// Adds what the VM boots: elements of `<os>` and of `<devices>`.
    pub(crate) fn boot(mut self, xml: Result<(String, String)>) -> Self {
        match xml {
            Ok((os, devices)) => {
                self.os.push_str(&os);
                self.devices.push_str(&devices);
            }
            Err(error) => self.problem = Some(error),
        }
        self
    }

    pub(crate) const fn lab(&self) -> &Lab {
        &self.lab
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Makes the disks and defines the VM, powered off.
    pub fn define(self) -> Result<Vm> {
        let (vm, xml) = self.create()?;
        vm.lab.define(&xml)?;
        Ok(vm)
    }

    /// Makes the disks, defines the VM and starts it.
    pub fn start(self) -> Result<Vm> {
        let vm = self.define()?;
        vm.start()?;
        Ok(vm)
    }

    /// Makes the disks and starts the VM without defining it: it is forgotten
    /// when it ends.
    pub fn start_transient(self) -> Result<Vm> {
        let (vm, xml) = self.create()?;
        let file = vm.lab.path(&format!("{}.xml", vm.name));
        fs::write(&file, &xml)?;
        vm.lab
            .virsh(&["create".as_ref(), file.as_os_str()])
            .with_context(|| format!("cannot start {xml}"))?;
        Ok(vm)
    }

    fn create(mut self) -> Result<(Vm, String)> {
        if let Some(problem) = self.problem {
            return Err(problem);
        }
        let mut disks = Vec::new();
        let mut elements = String::new();
        for spec in &self.disks {
            let image = spec.create(&self.lab.dir(), &self.name)?;
            let element = xml::disk(spec, image.as_ref());
            elements.push_str(&element);
            disks.push(VmDisk {
                target: spec.target.clone(),
                image,
                element,
            });
        }
        self.devices.insert_str(0, &elements);
        let domain = xml::Domain {
            name: self.name.clone(),
            uuid: self.uuid,
            machine: self.machine,
            memory_mib: self.memory_mib,
            iothreads: u32::from(self.disks.iter().any(has_iothread)),
            os: self.os,
            devices: self.devices,
        };
        let vm = Vm {
            lab: self.lab,
            name: self.name,
            disks,
        };
        Ok((vm, domain.to_xml()))
    }
}

fn has_iothread(disk: &DiskSpec) -> bool {
    disk.driver.contains(IOTHREAD)
}

/// A VM. It ends with its lab.
#[derive(Debug, Clone)]
pub struct Vm {
    lab: Lab,
    name: String,
    disks: Vec<VmDisk>,
}

#[derive(Debug, Clone)]
struct VmDisk {
    target: String,
    image: Option<(PathBuf, String)>,
    /// What libvirt is told about it.
    element: String,
}

/// What a backup may have left behind at a VM; see [`Vm::leftovers`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leftovers {
    /// A job of libvirt's runs.
    pub job: bool,
    /// Names of libvirt's checkpoints.
    pub checkpoints: Vec<String>,
    /// `disk/bitmap` of each named bitmap that QEMU knows.
    pub bitmaps: Vec<String>,
    /// Names of NBD exports.
    pub exports: Vec<String>,
    /// Filters in the guest's path and nodes that no disk of the VM is made of.
    pub nodes: Vec<String>,
    /// What lies in the scratch directory.
    pub files: Vec<PathBuf>,
}

/// A named dirty bitmap as QEMU tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapSeen {
    /// Its name.
    pub name: String,
    /// It takes note of writes.
    pub recording: bool,
    /// It cannot be used: QEMU did not close the image.
    pub inconsistent: bool,
    /// A job or export uses it.
    pub busy: bool,
    /// Dirty bytes; 0 where the VM is off and nobody can tell.
    pub dirty_bytes: u64,
}

/// A named dirty bitmap and where it lies; see [`Vm::bitmaps_everywhere`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapPlace {
    /// QEMU's name of the node.
    pub node: String,
    /// The file of that node.
    pub file: PathBuf,
    /// The bitmap.
    pub bitmap: BitmapSeen,
}

impl Vm {
    /// Returns its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns its UUID.
    pub fn uuid(&self) -> Result<String> {
        Ok(self.lab.virsh(&["domuuid", &self.name])?.trim().to_owned())
    }

    /// Returns the lab it lives in.
    pub const fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Starts it.
    pub fn start(&self) -> Result<()> {
        self.lab.virsh(&["start", &self.name])?;
        Ok(())
    }

    /// Pulls the plug; QEMU closes its images in order.
    pub fn destroy(&self) -> Result<()> {
        self.lab.virsh(&["destroy", &self.name])?;
        Ok(())
    }

    /// Takes a disk out of the running VM and waits until it is gone. Only
    /// where nobody in the guest has to agree: a disk on the SCSI bus.
    pub fn detach(&self, disk: &str) -> Result<()> {
        self.lab
            .virsh(&["detach-disk", &self.name, disk, "--live"])?;
        wait_until("the disk is gone", Duration::from_secs(10), || {
            let domain_xml = self.lab.virsh(&["dumpxml", &self.name])?;
            Ok(xml::disk_alias(&domain_xml, disk).is_none())
        })
    }

    /// Puts a disk that the VM was made with, and lost, back into it.
    pub fn attach(&self, disk: &str) -> Result<()> {
        let known = self.disks.iter().find(|known| known.target == disk);
        let known = known.with_context(|| format!("VM {} was made without {disk}", self.name))?;
        let file = tempfile::Builder::new()
            .suffix(".xml")
            .tempfile_in(self.lab.dir())?;
        fs::write(file.path(), &known.element)?;
        self.lab.virsh(&[
            "attach-device".as_ref(),
            self.name.as_ref(),
            file.path().as_os_str(),
            "--live".as_ref(),
        ])?;
        Ok(())
    }

    /// Kills QEMU with SIGKILL and waits until libvirt has seen it.
    pub fn kill_qemu(&self) -> Result<()> {
        let pid = self.qemu_pid()?;
        self.lab.inside("kill").args(["-9", &pid]).run()?;
        wait_until("libvirt sees QEMU dead", Duration::from_secs(20), || {
            Ok(!self.is_active()?)
        })
    }

    /// Returns QEMU's process id, as processes inside the lab see it.
    pub fn qemu_pid(&self) -> Result<String> {
        let file = self.lab.run_dir().join(format!("qemu/{}.pid", self.name));
        let pid = fs::read_to_string(&file)
            .with_context(|| format!("VM {} has no {}", self.name, file.display()))?;
        Ok(pid.trim().to_owned())
    }

    /// Says whether it has a QEMU: running or paused.
    pub fn is_active(&self) -> Result<bool> {
        match self.state() {
            Ok(state) => Ok(!matches!(state.as_str(), "shut off" | "crashed")),
            // A transient VM is forgotten when it ends.
            Err(error) if format!("{error:#}").contains("failed to get domain") => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Returns libvirt's word for its state: `running`, `paused`, `shut off` ...
    pub fn state(&self) -> Result<String> {
        Ok(self.lab.virsh(&["domstate", &self.name])?.trim().to_owned())
    }

    /// Lets the guest write: runs one command of `qemu-io` on the disk's device,
    /// such as `write -P 0xab 10M 3M`, `write -z 0 1M`, `discard 1M 1M`.
    ///
    /// The monitor answers nothing, so the outcome is read from what QEMU
    /// prints; a command that fails is an error here.
    pub fn write(&self, disk: &str, command: &str) -> Result<()> {
        self.write_all(disk, &[command.to_owned()])
    }

    /// Like [`Vm::write`] for many commands, at about a millisecond each.
    pub fn write_all(&self, disk: &str, commands: &[String]) -> Result<()> {
        let commands: Vec<_> = commands.iter().map(|command| (disk, command)).collect();
        self.write_each(&commands)
    }

    /// Like [`Vm::write_all`] for commands to any of the disks, in their order.
    pub fn write_each<C: AsRef<str>>(&self, commands: &[(&str, C)]) -> Result<()> {
        let domain_xml = self.lab.virsh(&["dumpxml", &self.name])?;
        let log = self.lab.qemu_log(&self.name);
        let before = fs::read(&log)?.len();
        let mut input = String::new();
        for (disk, command) in commands {
            let command = command.as_ref();
            ensure!(
                !command.contains(['"', '\'', '\n']),
                "a qemu-io command cannot be quoted twice: {command}"
            );
            let device = self.device_in(&domain_xml, disk)?;
            writeln!(
                input,
                "qemu-monitor-command {} --hmp 'qemu-io -d {device} \"{command}\"'",
                self.name
            )?;
        }
        let said_virsh = tool("virsh")
            .args(["-q", "-c", &self.lab.uri()])
            .input(input)
            .run()?;
        let after = fs::read(&log)?;
        let said = String::from_utf8_lossy(&after[before.min(after.len())..]);
        // A flush says nothing.
        let speaking = commands.iter().filter(|(_, it)| it.as_ref() != "flush");
        check_qemu_io(&said, speaking.count())
            .with_context(|| format!("cannot write to VM {}: {said}{said_virsh}", self.name))
    }

    /// Flushes what QEMU holds of the disk in memory to its image.
    pub fn flush(&self, disk: &str) -> Result<()> {
        let device = self.device_path(disk)?;
        self.hmp(&format!("qemu-io -d {device} \"flush\""))?;
        Ok(())
    }

    /// Sends one QMP command; returns what stands under `return`.
    pub fn monitor(&self, command: &Value) -> Result<Value> {
        let reply = self
            .lab
            .virsh(&["qemu-monitor-command", &self.name, &command.to_string()])?;
        let mut reply: Value = serde_json::from_str(&reply)
            .with_context(|| format!("QEMU answered something else than JSON: {reply}"))?;
        if let Some(error) = reply.get("error") {
            bail!("QEMU refused {command}: {error}");
        }
        Ok(reply["return"].take())
    }

    /// Sends one command to the human monitor.
    pub fn hmp(&self, command: &str) -> Result<String> {
        self.lab
            .virsh(&["qemu-monitor-command", &self.name, "--hmp", command])
    }

    /// Returns the image of a disk.
    ///
    /// # Panics
    /// If the VM was not made with that disk, or the disk has no image of ours.
    pub fn image(&self, disk: &str) -> PathBuf {
        self.image_and_format(disk).0
    }

    fn image_and_format(&self, disk: &str) -> (PathBuf, String) {
        self.disks
            .iter()
            .find(|known| known.target == disk)
            .and_then(|known| known.image.clone())
            .unwrap_or_else(|| panic!("VM {} has no image for disk {disk}", self.name))
    }

    /// Writes the disk as the guest sees it now to a raw file.
    pub fn raw_copy(&self, disk: &str, to: &Path) -> Result<()> {
        if self.is_active()? {
            self.flush(disk)?;
        }
        let (image, format) = self.image_and_format(disk);
        tool("qemu-img")
            .args(["convert", "-U", "-f", &format, "-O", "raw"])
            .arg(image)
            .arg(to)
            .run()?;
        Ok(())
    }

    /// Returns the named bitmaps of a disk: QEMU's view if it runs, else the image's.
    pub fn bitmaps(&self, disk: &str) -> Result<Vec<BitmapSeen>> {
        let (image, format) = self.image_and_format(disk);
        if self.is_active()? {
            Ok(bitmaps_of_image(&self.nodes()?, &image, &format))
        } else {
            bitmaps_in_image(&image)
        }
    }

    /// Returns the named bitmaps of all nodes of the running QEMU: in backing
    /// files, too, and in whatever else it has open.
    pub fn bitmaps_everywhere(&self) -> Result<Vec<BitmapPlace>> {
        let mut places = Vec::new();
        for node in self.nodes()? {
            let name = node["node-name"].as_str().unwrap_or_default();
            let file = node["file"].as_str().unwrap_or_default();
            places.extend(bitmaps_of_node(&node).map(|bitmap| BitmapPlace {
                node: name.to_owned(),
                file: PathBuf::from(file),
                bitmap,
            }));
        }
        Ok(places)
    }

    fn nodes(&self) -> Result<Vec<Value>> {
        let query = json!({"execute": "query-named-block-nodes", "arguments": {"flat": true}});
        match self.monitor(&query)? {
            Value::Array(nodes) => Ok(nodes),
            other => bail!("QEMU lists nodes as {other}"),
        }
    }

    /// Returns the names of libvirt's checkpoints.
    pub fn checkpoints(&self) -> Result<Vec<String>> {
        let list = self.lab.virsh(&["checkpoint-list", &self.name, "--name"])?;
        Ok(words(&list))
    }

    /// Says whether a job of libvirt's, such as a backup, runs on it.
    pub fn job_running(&self) -> Result<bool> {
        Ok(self.is_active()? && self.has_job()?)
    }

    fn has_job(&self) -> Result<bool> {
        let info = self.lab.virsh(&["domjobinfo", &self.name])?;
        Ok(!info
            .lines()
            .any(|line| line.starts_with("Job type:") && line.trim_end().ends_with("None")))
    }

    /// Lists all that a backup could have left here and in `scratch`.
    pub fn leftovers(&self, scratch: &Path) -> Result<Leftovers> {
        // Each question is a process, and the answers are of one moment anyway.
        let is_active = self.is_active()?;
        let nodes = if is_active { self.nodes()? } else { Vec::new() };
        let mut left = Leftovers {
            job: is_active && self.has_job()?,
            checkpoints: self.checkpoints().unwrap_or_default(),
            files: files_below(scratch)?,
            ..Leftovers::default()
        };
        for disk in &self.disks {
            let Some((image, format)) = &disk.image else {
                continue;
            };
            let bitmaps = if is_active {
                bitmaps_of_image(&nodes, image, format)
            } else {
                bitmaps_in_image(image)?
            };
            let of_disk = |bitmap: BitmapSeen| format!("{}/{}", disk.target, bitmap.name);
            left.bitmaps.extend(bitmaps.into_iter().map(of_disk));
        }
        if is_active {
            let exports = self.monitor(&json!({"execute": "query-block-exports"}))?;
            left.exports = strings(&exports, "id");
            left.nodes = self.foreign_nodes(&nodes);
        }
        Ok(left)
    }

    fn foreign_nodes(&self, nodes: &[Value]) -> Vec<String> {
        let images: Vec<_> = self
            .disks
            .iter()
            .filter_map(|disk| Some(disk.image.as_ref()?.0.to_str()?.to_owned()))
            .collect();
        let mut foreign = Vec::new();
        for node in nodes {
            let of_a_disk = node["file"]
                .as_str()
                .is_some_and(|file| images.iter().any(|image| is_part_of(file, image)));
            let is_filter = node["drv"] == "copy-before-write" || node["drv"] == "snapshot-access";
            let by_a_tool = node["node-name"]
                .as_str()
                .is_some_and(|name| name.starts_with("hw-"));
            if is_filter || by_a_tool || (!of_a_disk && has_scratch_file(node)) {
                foreign.push(node["node-name"].as_str().unwrap_or("?").to_owned());
            }
        }
        foreign
    }

    fn device_path(&self, disk: &str) -> Result<String> {
        self.device_in(&self.lab.virsh(&["dumpxml", &self.name])?, disk)
    }

    fn device_in(&self, domain_xml: &str, disk: &str) -> Result<String> {
        let alias = xml::disk_alias(domain_xml, disk)
            .with_context(|| format!("VM {} has no running disk {disk}", self.name))?;
        Ok(if alias.starts_with("virtio-disk") {
            format!("/machine/peripheral/{alias}/virtio-backend")
        } else {
            format!("/machine/peripheral/{alias}")
        })
    }
}

/// libvirt opens no file for writing but disks, scratch and firmware variables.
/// An image file, or the raw data file beside it.
fn is_part_of(file: &str, image: &str) -> bool {
    let without_extension = |path| Path::new(path).with_extension("");
    file.ends_with(image) || without_extension(file) == without_extension(image)
}

fn has_scratch_file(node: &Value) -> bool {
    let file = node["file"].as_str().map(Path::new);
    node["ro"] == false
        && file.is_some_and(|file| {
            file.is_absolute() && file.extension().is_none_or(|extension| extension != "fd")
        })
}

/// Each command prints one line `wrote 512/512 bytes at offset 0` (or `read`,
/// `discard`), or something else when it fails.
pub(crate) fn check_qemu_io(said: &str, commands: usize) -> Result<()> {
    let failed = said.lines().find(|line| {
        line.contains(" failed") || line.contains("not found") || line.contains("non-numeric")
    });
    if let Some(line) = failed {
        bail!("qemu-io: {line}");
    }
    let done = said.lines().filter(|line| is_success(line)).count();
    ensure!(
        done == commands,
        "{done} of {commands} qemu-io commands reported success"
    );
    Ok(())
}

fn is_success(line: &str) -> bool {
    let mut words = line.split(' ');
    let verb = words.next();
    let counts = words.next().and_then(|counts| counts.split_once('/'));
    matches!(verb, Some("wrote" | "read" | "discard"))
        && counts.is_some_and(|(done, wanted)| done == wanted)
}

pub(crate) fn bitmaps_of_image(nodes: &[Value], image: &Path, format: &str) -> Vec<BitmapSeen> {
    let of_this_image = nodes.iter().filter(|node| {
        node["drv"] == format && node["file"].as_str() == image.as_os_str().to_str()
    });
    of_this_image.flat_map(bitmaps_of_node).collect()
}

/// Those of a job's own filters have no name.
pub(crate) fn bitmaps_of_node(node: &Value) -> impl Iterator<Item = BitmapSeen> {
    let bitmaps = node["dirty-bitmaps"].as_array().into_iter().flatten();
    bitmaps.filter_map(|bitmap| {
        let name = bitmap["name"].as_str().filter(|name| !name.is_empty())?;
        Some(BitmapSeen {
            name: name.to_owned(),
            recording: bitmap["recording"] == true,
            inconsistent: bitmap["inconsistent"] == true,
            busy: bitmap["busy"] == true,
            dirty_bytes: bitmap["count"].as_u64().unwrap_or(0),
        })
    })
}

pub(crate) fn bitmaps_in_image(image: &Path) -> Result<Vec<BitmapSeen>> {
    let info = images::info(image)?;
    let bitmaps = &info["format-specific"]["data"]["bitmaps"];
    let mut seen = Vec::new();
    for bitmap in bitmaps.as_array().into_iter().flatten() {
        let has = |flag: &str| {
            let flags = bitmap["flags"].as_array();
            flags.is_some_and(|flags| flags.iter().any(|known| known == flag))
        };
        seen.push(BitmapSeen {
            name: bitmap["name"].as_str().unwrap_or("?").to_owned(),
            recording: has("auto"),
            inconsistent: has("in-use"),
            busy: false,
            dirty_bytes: 0,
        });
    }
    Ok(seen)
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

pub(crate) fn strings(list: &Value, field: &str) -> Vec<String> {
    list.as_array()
        .into_iter()
        .flatten()
        .filter_map(|item| item[field].as_str().map(str::to_owned))
        .collect()
}

fn files_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    if !dir.exists() {
        return Ok(files);
    }
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(files_below(&path)?);
        }
        files.push(path);
    }
    files.sort();
    Ok(files)
}
