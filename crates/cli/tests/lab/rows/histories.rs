//! Drawn histories: whatever happened, no mark is left that nobody needs, none
//! is missing that somebody does, and every point is right.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::workload::Random;
use serde_json::Value;

use super::chains::{commit, snapshot};
use super::disks::{Unreadable, beside_unreadable};
use super::tracked::Tracked;

struct Drawn {
    it: Tracked,
    server: Unreadable,
    random: Random,
    overlays: usize,
    told: Vec<String>,
}

impl Drawn {
    /// Something happens to the VM, and then a backup.
    fn step(&mut self, number: usize) -> Result<()> {
        let trouble = self.trouble(number)?;
        self.told.push(trouble.to_owned());
        self.it.write()?;
        let way = self.back_up()?;
        self.told.push(way);
        self.it.check_marks()
    }

    fn trouble(&mut self, number: usize) -> Result<&'static str> {
        Ok(match self.random.below(8) {
            0 if self.overlays < 2 => {
                self.overlays += 1;
                snapshot(&mut self.it, &format!("overlay{number}"))?;
                "snapshot"
            }
            1 if self.overlays > 0 => {
                self.overlays = 0;
                commit(&mut self.it)?;
                "commit"
            }
            2 => {
                self.it.vm.kill_qemu()?;
                self.it.vm.start()?;
                // What they recorded is lost, on disks that are left out too.
                self.it.forgets("vda");
                self.it.forgets("vdb");
                "QEMU killed"
            }
            3 => {
                self.it.while_off(|| Ok(()))?;
                "off and on"
            }
            4 => {
                for mark in self.it.vm.checkpoints()? {
                    self.it.virsh(&["checkpoint-delete", "web01", &mark])?;
                }
                self.it.forgets("vda");
                self.it.forgets("vdb");
                "marks purged"
            }
            5 => {
                for mark in self.it.vm.checkpoints()? {
                    let delete = ["checkpoint-delete", "web01", &mark, "--metadata"];
                    self.it.virsh(&delete)?;
                }
                "checkpoints forgotten"
            }
            _ => "nothing",
        })
    }

    fn back_up(&mut self) -> Result<String> {
        let ways: [&[&str]; 7] = [
            &["-d", "vda"],
            &["-d", "vdb"],
            &["-x", "vda"],
            &["-l", "full"],
            &["-l", "copy"],
            &["vdb fails"],
            &[],
        ];
        let drawn = usize::try_from(self.random.below(10))?;
        let way = ways.get(drawn).copied().unwrap_or_default();
        if way == ["vdb fails"] {
            fs::File::create(&self.server.trigger)?;
            let output = self.it.bed.output(&["backup", "web01", "--json"])?;
            fs::remove_file(&self.server.trigger)?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.code() == Some(3), "{}: {said}", output.status);
            let report: Value = serde_json::from_slice(&output.stdout)?;
            self.it.took_only("vda", &report)?;
        } else {
            let report = self.it.back_up(way)?;
            let warnings = report["warnings"].as_array().map(Vec::len);
            ensure!(warnings == Some(0), "warnings: {report}");
        }
        Ok(format!("backup {}", way.join(" ")))
    }
}

fn history(seed: u64) -> Result<()> {
    let (it, server) = beside_unreadable()?;
    let mut drawn = Drawn {
        it,
        server,
        random: Random(seed),
        overlays: 0,
        told: Vec::new(),
    };
    drawn.it.heals("full: first-backup")?;
    for number in 0..16 {
        let step = drawn.step(number);
        step.with_context(|| format!("seed {seed}, step {number}: {:?}", drawn.told))?;
    }
    drawn.it.ends_right()
}

#[test]
fn old_marks_never_pile_up_whatever_happens_between_backups() -> Result<()> {
    history(1)
}

#[test]
fn another_history_leaves_no_mark_that_nobody_needs_either() -> Result<()> {
    history(2)
}
