//! Other people at the same VM: what they do for themselves, and to our marks.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::Life;
use super::draw::{Doctor, Foreign, Harm};
use super::model::Power;
use highwater_testkit::tool;

impl Life {
    fn qmp(&self, command: &str, arguments: &Value) -> Result<Value> {
        let command = json!({"execute": command, "arguments": arguments});
        self.vm.monitor(&command)
    }

    /// Returns QEMU's node for the topmost image of a disk.
    fn node(&self, number: usize) -> Result<String> {
        let top = self.model.disks[number].top().to_str();
        let query = json!({"execute": "query-named-block-nodes", "arguments": {"flat": true}});
        let nodes = self.vm.monitor(&query)?;
        let mut nodes = nodes.as_array().into_iter().flatten();
        let node = nodes.find(|it| it["drv"] == "qcow2" && it["file"].as_str() == top);
        let name = node.and_then(|it| it["node-name"].as_str());
        Ok(name.context("a disk has a node")?.to_owned())
    }

    /// Returns a mark of a repository on a disk, if there is one.
    fn bitmap_of(&self, repository: usize, number: usize) -> Result<Option<String>> {
        let Some(prefix) = &self.model.repositories[repository].prefix else {
            return Ok(None);
        };
        let places = self.vm.bitmaps_everywhere()?;
        let of_the_disk = places
            .into_iter()
            .filter(|it| it.file == *self.model.disks[number].top());
        let mut names: Vec<String> = of_the_disk
            .map(|it| it.bitmap.name)
            .filter(|name| name.starts_with(prefix))
            .collect();
        names.sort();
        Ok(names.pop())
    }

    pub(super) fn harm(&mut self, repository: usize, number: usize, what: Harm) -> Result<()> {
        match what {
            Harm::BitmapRemoved | Harm::BitmapDisabled | Harm::BitmapRemovedOff => {
                self.harm_bitmap(repository, number, what)
            }
            Harm::CheckpointDeleted
            | Harm::CheckpointForgotten
            | Harm::CheckpointDeletedWithChildren => self.harm_checkpoint(repository, what),
        }
    }

    fn harm_bitmap(&mut self, repository: usize, number: usize, what: Harm) -> Result<()> {
        let Some(bitmap) = self.bitmap_of(repository, number)? else {
            self.note("there is no mark");
            return Ok(());
        };
        let (node, name) = (self.node(number)?, self.model.disks[number].name);
        let of = json!({"node": node, "name": bitmap});
        match what {
            Harm::BitmapRemovedOff => {
                let image = self.model.disks[number].top().clone();
                self.while_off(|it| {
                    let remove = tool("qemu-img").args(["bitmap", "--remove"]);
                    let done = remove.arg(&image).arg(&bitmap).run();
                    if let Err(error) = done {
                        // It was never stored.
                        it.note(&format!("not removed: {error:#}"));
                    }
                    Ok(())
                })?;
            }
            Harm::BitmapDisabled => {
                let disabled = self.qmp("block-dirty-bitmap-disable", &of);
                if let Err(error) = disabled {
                    // Nobody can do anything with one that is broken.
                    self.note(&format!("not disabled: {error:#}"));
                }
            }
            _ => drop(self.qmp("block-dirty-bitmap-remove", &of)?),
        }
        self.model.repositories[repository].unbroken.remove(name);
        Ok(())
    }

    fn harm_checkpoint(&mut self, repository: usize, what: Harm) -> Result<()> {
        let Some(prefix) = self.model.repositories[repository].prefix.clone() else {
            return Ok(());
        };
        let mut marks = self.vm.checkpoints()?;
        marks.retain(|it| it.starts_with(&prefix));
        marks.sort();
        let Some(mark) = marks.pop() else {
            self.note("there is no mark");
            return Ok(());
        };
        let delete = ["checkpoint-delete", "web01", mark.as_str()];
        let done = match what {
            Harm::CheckpointForgotten => self.virsh(&[&delete[..], &["--metadata"]].concat()),
            Harm::CheckpointDeletedWithChildren => {
                self.virsh(&[&delete[..], &["--children"]].concat())
            }
            _ => self.virsh(&delete),
        };
        match what {
            // It is told again, and nothing is lost.
            Harm::CheckpointForgotten => drop(done?),
            Harm::CheckpointDeletedWithChildren => {
                self.model.breaks_all();
                let left = self.vm.checkpoints()?;
                self.model.theirs.retain(|it| left.contains(it));
            }
            _ => {
                self.model.repositories[repository].unbroken.clear();
                if let Err(error) = done {
                    // libvirt deletes none whose bitmap is gone.
                    self.note(&format!("not deleted: {error:#}"));
                }
            }
        }
        Ok(())
    }

    pub(super) fn foreign(&mut self, what: Foreign) -> Result<()> {
        self.files += 1;
        let number = self.files;
        match what {
            Foreign::Checkpoint => {
                let name = format!("theirs-{number}");
                let mut args = vec!["checkpoint-create-as", "web01", "--name", &name];
                let none: Vec<String> = self.model.disks[1..]
                    .iter()
                    .filter(|disk| disk.attached)
                    .map(|disk| format!("{},checkpoint=no", disk.name))
                    .collect();
                for spec in &none {
                    args.extend(["--diskspec", spec]);
                }
                self.virsh(&args)?;
                self.model.theirs.push(name);
            }
            Foreign::CheckpointDeleted => {
                let name = self.model.theirs.remove(0);
                let delete = ["checkpoint-delete", "web01", &name];
                if self.virsh(&delete).is_err() {
                    // Its bitmap was lost.
                    self.virsh(&[&delete[..], &["--metadata"]].concat())?;
                }
            }
            Foreign::Bitmap { disabled } => {
                let name = format!("theirs-bitmap-{number}");
                let new = json!({
                    "node": self.node(0)?, "name": name, "persistent": true, "disabled": disabled,
                });
                self.qmp("block-dirty-bitmap-add", &new)?;
            }
            Foreign::BackupJob { repository } => self.beside_a_job(repository)?,
            Foreign::BlockJob { repository } => self.beside_a_block_job(repository)?,
            Foreign::Server {
                repository,
                exports,
            } => self.beside_a_server(repository, exports)?,
        }
        Ok(())
    }

    fn beside_a_job(&mut self, repository: usize) -> Result<()> {
        let (xml, socket) = (self.bed.lab.path("job.xml"), self.bed.lab.path("job.sock"));
        let job = format!(
            "<domainbackup mode='pull'><server transport='unix' socket='{}'/></domainbackup>",
            socket.display()
        );
        fs::write(&xml, job)?;
        let path = xml.to_str().context("a path is text")?;
        self.virsh(&["backup-begin", "web01", path])?;
        self.is_refused(repository)?;
        ensure!(self.vm.job_running()?, "their job is gone");
        self.virsh(&["domjobabort", "web01"])?;
        // A libvirtd that dies before it has noticed believes in the job for ever.
        while self.vm.job_running()? {}
        Ok(())
    }

    fn beside_a_block_job(&mut self, repository: usize) -> Result<()> {
        let copy = self.bed.lab.path("theirs.copy");
        let dest = copy.to_str().context("a path is text")?;
        let begin = [
            "blockcopy",
            "web01",
            "vda",
            "--transient-job",
            "--dest",
            dest,
        ];
        self.virsh(&begin)?;
        self.is_refused(repository)?;
        self.virsh(&["blockjob", "web01", "vda", "--abort"])?;
        Ok(fs::remove_file(copy)?)
    }

    fn beside_a_server(&mut self, repository: usize, exports: bool) -> Result<()> {
        let socket = self.bed.lab.path("user.sock");
        let at = json!({"addr": {"type": "unix", "data": {"path": socket}}});
        self.qmp("nbd-server-start", &at)?;
        if exports {
            let export =
                json!({"type": "nbd", "id": "user", "node-name": self.node(0)?, "name": "user"});
            self.qmp("block-export-add", &export)?;
        }
        self.is_refused(repository)?;
        if exports {
            let left = self
                .vm
                .monitor(&json!({"execute": "query-block-exports"}))?;
            ensure!(left[0]["id"] == "user", "their export is gone: {left}");
        }
        self.vm.monitor(&json!({"execute": "nbd-server-stop"}))?;
        Ok(())
    }

    pub(super) fn doctor(&mut self, repository: usize, what: Doctor) -> Result<()> {
        let theirs = self.theirs()?;
        let option: &[&str] = match what {
            Doctor::Look => &[],
            Doctor::Fix => &["--fix"],
            Doctor::Purge => &["--purge-marks"],
        };
        let text = [&["doctor", "web01"], option].concat();
        let args = self.args(repository, &text);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let output = self.bed.output(&args)?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        let code = output.status.code();
        self.note(&format!("exit code {code:?}"));
        let is_on = self.model.power != Power::Off;
        let lost = self.model.libvirtd_died && said.contains("libvirt died");
        let codes: &[i32] = match what {
            Doctor::Look => &[0, 4],
            Doctor::Fix => &[0, 4],
            Doctor::Purge if is_on => &[0, 4],
            Doctor::Purge => &[1],
        };
        ensure!(
            lost || code.is_some_and(|code| codes.contains(&code)),
            "doctor: {code:?}: {said}"
        );
        if lost {
            return Ok(());
        }
        if what != Doctor::Look && is_on {
            self.model.dead_session = false;
        }
        if what == Doctor::Purge && is_on {
            self.purged(repository).context(said)?;
        }
        let left = self.theirs()?;
        ensure!(left == theirs, "others had {theirs:?}, and have {left:?}");
        self.is_in_the_expected_state()
    }

    fn purged(&mut self, number: usize) -> Result<()> {
        let repository = &mut self.model.repositories[number];
        repository.unbroken.clear();
        repository.needed.clear();
        let Some(prefix) = &repository.prefix else {
            return Ok(());
        };
        let checkpoints = self.vm.checkpoints()?;
        let left = checkpoints.iter().find(|it| it.starts_with(prefix));
        ensure!(left.is_none(), "left: {left:?}");
        let bitmaps = self.vm.bitmaps_everywhere()?;
        let left = bitmaps.iter().find(|it| it.bitmap.name.starts_with(prefix));
        ensure!(left.is_none(), "left: {left:?}");
        Ok(())
    }
}
