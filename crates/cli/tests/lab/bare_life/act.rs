//! Carries out what happens in the life of a VM without libvirt.

use anyhow::{Context as _, Result, ensure};
use highwater_model::step::Step;
use highwater_testkit::tool;
use highwater_testkit::workload::Random;
use serde_json::json;

use super::draw::{Death, End, Level, Operation};
use super::{Life, Mark};
use crate::processes::{guard_of, mover_of, signal};
use crate::support::{mode, point};
use crate::tale::{Moment, uri};
use crate::waiting::{Waiting, wait_until};

/// What a run was that waited at a step.
enum Run {
    Waits(Waiting),
    /// It did not come by, and made its point.
    Ended,
}

impl Life {
    pub(super) fn act(&mut self, operation: &Operation, random: &mut Random) -> Result<()> {
        match *operation {
            Operation::Writes { disk, count } => {
                let disk = &mut self.disks[disk];
                disk.writes.run(&self.tale.vm, disk.name, count)
            }
            Operation::Backup(level) => self.back_up_at(level),
            Operation::Killed { step, death } => self.killed(step, death, random),
            Operation::Started(step) => self.started(step),
            Operation::Start => self.start(),
            Operation::End(how) => self.end(how),
            Operation::PauseOrResume => {
                let command = if self.is_paused { "cont" } else { "stop" };
                self.tale.vm.qmp(command, &json!({}))?;
                self.is_paused = !self.is_paused;
                Ok(())
            }
            Operation::MarkRemoved(disk) => self.remove_marks(disk),
            Operation::ForeignBitmap(disk) => self.add_foreign_bitmap(disk),
            Operation::DoctorFix => {
                let uri = uri(&self.tale.vm);
                self.tale.bed.run(&uri, &["doctor", "kvm0", "--fix"])?;
                self.is_littered = false;
                self.check_tidy()
            }
        }
    }

    pub(super) fn back_up(&mut self) -> Result<()> {
        self.back_up_at(Level::Auto)
    }

    fn back_up_at(&mut self, level: Level) -> Result<()> {
        let args: &[&str] = match level {
            Level::Auto => &[],
            Level::Full => &["--level", "full"],
            Level::Differential => &["--level", "differential"],
            Level::Copy => &["--level", "copy"],
        };
        let report = self.tale.bed.backup(&uri(&self.tale.vm), "kvm0", args)?;
        for disk in &mut self.disks {
            let mode = mode(&report, disk.name);
            self.log.push(format!("       {}: {mode}", disk.name));
            let is_right = match level {
                Level::Auto => disk.mark.allows(&mode),
                Level::Full => mode.starts_with("full"),
                Level::Copy => mode == "copy",
                Level::Differential => mode == "differential",
            };
            ensure!(is_right, "{} is {:?}: {mode}", disk.name, disk.mark);
            if level == Level::Copy && disk.mark == Mark::None {
                disk.mark = if disk.is_raw { Mark::Raw } else { Mark::Broken };
            }
        }
        self.tale.keeps(&point(&report))?;
        self.is_littered = false;
        if matches!(level, Level::Auto | Level::Full) {
            self.has_marks();
            self.check_marks()?;
        }
        self.check_disks()?;
        self.check_tidy()
    }

    /// A plain backup has made a point.
    fn has_marks(&mut self) {
        let is_on = self.tale.vm.is_active();
        for disk in &mut self.disks {
            let is_lost = disk.is_raw && !is_on;
            disk.mark = if is_lost { Mark::Raw } else { Mark::Good };
        }
    }

    fn run_until(&mut self, step: Step, points: usize) -> Result<Run> {
        let command = self
            .tale
            .bed
            .command(&uri(&self.tale.vm), &["backup", "kvm0"]);
        match Waiting::at(command, &self.tale.bed.lab.dir(), step, "wait") {
            Ok(waiting) => Ok(Run::Waits(waiting)),
            Err(error) => {
                let is_done = format!("{error:#}").contains("nobody passed the step");
                if !is_done || self.tale.points()? == points {
                    return Err(error);
                }
                self.log.push("       it passed another way".to_owned());
                Ok(Run::Ended)
            }
        }
    }

    /// It was a plain backup, and no more.
    fn just_ended(&mut self, moment: Moment) -> Result<()> {
        self.tale.keeps_newest_as(moment)?;
        self.is_littered = false;
        self.has_marks();
        self.check_marks()?;
        self.check_tidy()
    }

    fn killed(&mut self, step: Step, death: Death, random: &mut Random) -> Result<()> {
        let (points, moment) = (self.tale.points()?, self.tale.moment()?);
        let mut waiting = match self.run_until(step, points)? {
            Run::Ended => return self.just_ended(moment),
            Run::Waits(waiting) => waiting,
        };
        let is_on = self.tale.vm.is_active();
        // Only from here on what is written is not part of the point. What a QEMU
        // that dies has not flushed would be nobody's fault.
        let place = |of: Step| Step::ALL.iter().position(|step| *step == of);
        if is_on && place(step) > place(Step::QmpResumed) && death != Death::Qemu {
            for disk in &mut self.disks {
                let count = usize::try_from(random.below(6))?;
                disk.writes.run(&self.tale.vm, disk.name, count)?;
            }
        }
        match death {
            Death::Mover => signal("-KILL", mover_of(&waiting.run)?)?,
            Death::Guard => signal("-KILL", guard_of(&waiting.run)?)?,
            Death::All => waiting.kill_all()?,
            Death::Qemu => self.tale.vm.kill()?,
        }
        waiting.go()?;
        let ended = waiting.end(Ok(()))?;
        let is_made = self.tale.points()? > points;
        ensure!(is_made || !ended.status.success(), "{}", ended.said);
        self.log.push(format!("       a point: {is_made}"));
        if is_made {
            self.tale.keeps_newest_as(moment)?;
            self.has_marks();
        }
        if death == Death::Qemu {
            return self.lost_qemu(|mark| match mark {
                Mark::None => Mark::None,
                Mark::Good | Mark::Broken | Mark::Unsure | Mark::Raw => Mark::Unsure,
            });
        }
        // What an earlier one has left stopped, this one need not have come to.
        let was_littered = std::mem::replace(&mut self.is_littered, true);
        let said = ended.said.clone();
        // A guard that still waits has to see that it may go on.
        self.last = Some(ended);
        if is_on && death != Death::All && !was_littered {
            let due = if self.is_paused { "paused" } else { "running" };
            let goes_on = || Ok(self.tale.vm.state()? == due);
            wait_until(goes_on).context(said)?;
        }
        Ok(())
    }

    fn started(&mut self, step: Step) -> Result<()> {
        let (points, moment) = (self.tale.points()?, self.tale.moment()?);
        let waiting = match self.run_until(step, points)? {
            Run::Ended => return self.just_ended(moment),
            Run::Waits(waiting) => waiting,
        };
        self.start()?;
        waiting.go()?;
        let ended = waiting.end(Ok(()))?;
        let is_made = self.tale.points()? > points;
        ensure!(is_made || !ended.status.success(), "{}", ended.said);
        self.log.push(format!("       a point: {is_made}"));
        if is_made {
            self.tale.keeps_newest_as(moment)?;
            self.has_marks();
            // This QEMU has none of it.
            self.forgets_raw();
        }
        self.tale.no_files()
    }

    fn start(&mut self) -> Result<()> {
        self.tale.vm.start()?;
        self.graph = self.tale.vm.graph()?;
        Ok(())
    }

    fn forgets_raw(&mut self) {
        let raw = self.disks.iter_mut().filter(|disk| disk.is_raw);
        for disk in raw.filter(|disk| disk.mark != Mark::None) {
            disk.mark = Mark::Raw;
        }
    }

    fn end(&mut self, how: End) -> Result<()> {
        for disk in &self.disks {
            self.tale.vm.flush(disk.name)?;
        }
        match how {
            End::Quit => self.tale.vm.quit()?,
            End::Terminate => self.tale.vm.terminate()?,
            End::Kill => self.tale.vm.kill()?,
        }
        self.lost_qemu(|mark| match (how, mark) {
            (End::Kill, Mark::Good) => Mark::Broken,
            (End::Kill | End::Quit | End::Terminate, mark) => mark,
        })
    }

    /// QEMU has ended.
    fn lost_qemu(&mut self, becomes: impl Fn(Mark) -> Mark) -> Result<()> {
        self.is_paused = false;
        self.is_littered = false;
        for disk in self.disks.iter_mut().filter(|disk| !disk.is_raw) {
            disk.mark = becomes(disk.mark);
            let bitmaps = self.tale.vm.bitmaps(disk.name)?.into_iter();
            // A QEMU that was killed has stored none of them, or stored it once.
            disk.theirs = bitmaps
                .map(|it| it.name)
                .filter(|it| disk.theirs.contains(it))
                .collect();
            disk.theirs.sort();
        }
        self.forgets_raw();
        self.check_disks()
    }

    fn remove_marks(&mut self, number: usize) -> Result<()> {
        let disk = &mut self.disks[number];
        let vm = &self.tale.vm;
        for mark in self.tale.marks(disk.name)? {
            if vm.is_active() {
                let bitmap = json!({"node": vm.node(disk.name)?, "name": mark});
                vm.qmp("block-dirty-bitmap-remove", &bitmap)?;
                continue;
            }
            let remove = tool("qemu-img").args(["bitmap", "--remove"]);
            remove.arg(vm.image(disk.name)).arg(&mark).run()?;
        }
        disk.mark = if disk.is_raw { Mark::Raw } else { Mark::Broken };
        Ok(())
    }

    fn add_foreign_bitmap(&mut self, number: usize) -> Result<()> {
        self.bitmaps += 1;
        let disk = &mut self.disks[number];
        let name = format!("theirs-{:04}", self.bitmaps);
        let node = self.tale.vm.node(disk.name)?;
        let bitmap = json!({"node": node, "name": name, "persistent": true});
        self.tale.vm.qmp("block-dirty-bitmap-add", &bitmap)?;
        disk.theirs.push(name);
        Ok(())
    }
}
