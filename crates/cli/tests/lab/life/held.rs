//! A backup that waits at a step while something happens, or somebody dies.

use std::fs;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use highwater_model::step::{Process, Step};
use highwater_testkit::workload::Random;

use super::Life;
use super::backup::Ended;
use super::draw::Meanwhile;
use super::model::is_before_the_point;
use crate::processes::{guard_of, kill_all, mover_of, signal};

/// How long a backup may take to a step, and to its end.
const PATIENCE: Duration = Duration::from_secs(60);

fn wait(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while !done()? {
        ensure!(Instant::now() < end, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(Duration::from_millis(3));
    }
    Ok(())
}

impl Life {
    pub(super) fn held(
        &mut self,
        repository: usize,
        step: Step,
        meanwhile: Meanwhile,
        random: &mut Random,
    ) -> Result<()> {
        let theirs = self.theirs()?;
        let mut content = self.model.content(&self.model.attached());
        let signs = tempfile::tempdir_in(self.bed.lab.dir())?;
        let action = if meanwhile == Meanwhile::Dies {
            "kill"
        } else {
            "wait"
        };
        let fault = format!("{}:{action}:{}", step.word(), signs.path().display());
        let (stdout, stderr) = (signs.path().join("stdout"), signs.path().join("stderr"));
        let args = self.args(repository, &["backup", "web01", "--json"]);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let mut mover = self
            .bed
            .command(&args)
            .env("HIGHWATER_FAULT", fault)
            .stdout(Stdio::from(fs::File::create(&stdout)?))
            .stderr(Stdio::from(fs::File::create(&stderr)?))
            .spawn()?;
        let sign = signs.path().join(step.word());
        let is_reached = || fs::metadata(&sign).is_ok_and(|it| it.len() > 0);
        wait("the step", || {
            Ok(is_reached() || mover.try_wait()?.is_some())
        })?;
        let reached = is_reached();
        if reached {
            self.model.held = true;
            self.happens(repository, meanwhile, step, &mut mover, random)?;
            self.model.held = false;
        } else {
            self.note("the step was not passed".to_owned());
        }
        if matches!(meanwhile, Meanwhile::Writes(_)) && is_before_the_point(step) {
            content = self.model.content(&self.model.attached());
        }
        fs::write(signs.path().join("go"), "")?;
        let ended = wait("the backup's end", || Ok(mover.try_wait()?.is_some()));
        drop(mover.kill());
        let ended = ended.map(|()| mover.wait())??;
        let ended = Ended {
            code: ended.code(),
            stdout: fs::read_to_string(stdout)?,
            stderr: fs::read_to_string(stderr)?,
        };
        self.goes_on(if reached { Some(meanwhile) } else { None })?;
        self.judge(repository, reached.then_some(meanwhile), &ended, content)
            .with_context(|| format!("it said {}{}", ended.stdout, ended.stderr))?;
        if !matches!(meanwhile, Meanwhile::QemuDies) || !reached {
            self.others_are_unharmed(&theirs, meanwhile)?;
        }
        Ok(())
    }

    fn happens(
        &mut self,
        repository: usize,
        what: Meanwhile,
        step: Step,
        mover: &mut Child,
        random: &mut Random,
    ) -> Result<()> {
        match what {
            Meanwhile::Writes(count) => {
                let attached = 0..self.model.disks.len();
                let attached: Vec<usize> = attached
                    .filter(|it| self.model.disks[*it].attached)
                    .collect();
                self.write(&attached, count, true, random)?;
            }
            Meanwhile::Looks => {
                let nth = random.next();
                self.check_any(repository, nth, false, "raw")?;
                self.looks_busy(repository, step)?;
            }
            Meanwhile::Dies => {}
            Meanwhile::MoverDies => signal("-KILL", mover_of(mover)?)?,
            Meanwhile::GuardDies => signal("-KILL", guard_of(mover)?)?,
            Meanwhile::BothDie => {
                let (mover_id, guard) = (mover_of(mover)?, guard_of(mover)?);
                // The one that waits sees nothing.
                match step.process() {
                    Process::Mover => kill_all(mover, guard, mover_id)?,
                    Process::Guard => kill_all(mover, mover_id, guard)?,
                }
                self.model.dead_session = true;
            }
            Meanwhile::QemuDies => {
                self.vm.kill_qemu()?;
                self.qemu_is_dead()?;
            }
            Meanwhile::LibvirtdRestarts => {
                self.bed.lab.restart_libvirtd()?;
                self.model.libvirtd_died = true;
            }
            Meanwhile::LibvirtdDies => {
                self.bed.lab.kill_libvirtd()?;
                self.model.libvirtd_died = true;
            }
            Meanwhile::Terminated => signal("-TERM", mover_of(mover)?)?,
            Meanwhile::Interrupted => signal("-INT", mover_of(mover)?)?,
        }
        Ok(())
    }

    /// A doctor who may repair finds that a backup holds the VM; one who only
    /// looks has nothing to say against it.
    fn looks_busy(&mut self, repository: usize, step: Step) -> Result<()> {
        for (option, due) in [(None, 0), (Some("--fix"), 11)] {
            let mut text = vec!["doctor", "web01"];
            text.extend(option);
            let args = self.args(repository, &text);
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let output = self.bed.output(&args)?;
            let said = String::from_utf8_lossy(&output.stderr);
            let said = format!("{:?}: {said}", output.status.code());
            self.note(format!("doctor at {}: {said}", step.word()));
            ensure!(
                output.status.code() == Some(due),
                "doctor {option:?}: {said}"
            );
        }
        Ok(())
    }

    /// What is dead is started again; who is left may settle.
    fn goes_on(&mut self, what: Option<Meanwhile>) -> Result<()> {
        match what {
            Some(Meanwhile::QemuDies) => {
                self.vm.start()?;
                self.is_on();
            }
            Some(Meanwhile::LibvirtdDies) => self.bed.lab.start_libvirtd()?,
            Some(Meanwhile::BothDie) => return Ok(()),
            Some(_) | None => {}
        }
        // Nobody was left who could settle.
        if self.model.libvirtd_died || self.model.dead_session {
            return Ok(());
        }
        let calm = || self.is_calm();
        let settled = wait("calm", || Ok(calm().is_ok()));
        settled.or_else(|error| calm().and(Err(error)))
    }

    /// Nothing of a session is left; marks are the next run's business.
    fn is_calm(&self) -> Result<()> {
        let left = self.vm.leftovers(&self.bed.runtime().join("scratch"))?;
        ensure!(
            !left.job && left.exports.is_empty() && left.nodes.is_empty(),
            "left at the VM: {left:?}"
        );
        ensure!(left.files.is_empty(), "left: {left:?}");
        self.is_in_the_expected_state()
    }

    /// What the run claims, and what there is.
    fn judge(
        &mut self,
        repository: usize,
        happened: Option<Meanwhile>,
        ended: &Ended,
        content: std::collections::BTreeMap<&'static str, super::bytes::Bytes>,
    ) -> Result<()> {
        let must_succeed = matches!(
            happened,
            None | Some(Meanwhile::Writes(_) | Meanwhile::Looks)
        );
        let may_be_lost = self.model.libvirtd_died && ended.code == Some(11);
        let settled = !matches!(
            happened,
            Some(Meanwhile::QemuDies | Meanwhile::LibvirtdDies | Meanwhile::LibvirtdRestarts)
        );
        if (must_succeed && !may_be_lost) || (settled && ended.code == Some(0)) {
            self.succeeded(repository, ended, content, "auto")?;
            // After a death, old marks are the next run's business.
            return if must_succeed {
                self.check_tidy(repository)
            } else {
                self.is_calm()
            };
        }
        let unknown = self.unknown(repository)?;
        self.note(format!("exit code {:?}, points {unknown:?}", ended.code));
        ensure!(unknown.len() < 2, "two points of one run: {unknown:?}");
        if let [id] = &unknown[..] {
            let disks: Vec<&str> = content.keys().copied().collect();
            self.exists(repository, id, content)?;
            ensure!(
                !ended.stderr.contains("no restore point was added"),
                "it denies its point {id}"
            );
            let unbroken = self.model.repositories[repository].unbroken.clone();
            self.model.marked(repository, id, &disks);
            if happened == Some(Meanwhile::QemuDies) {
                self.model.repositories[repository].unbroken = unbroken;
            }
        } else {
            ensure!(ended.code != Some(0), "it claims a point that is not there");
        }
        let codes: &[Option<i32>] = match happened {
            Some(Meanwhile::Terminated | Meanwhile::Interrupted) => &[Some(130)],
            Some(Meanwhile::GuardDies) => &[Some(1)],
            Some(Meanwhile::QemuDies) => &[Some(0), Some(1)],
            Some(Meanwhile::LibvirtdDies | Meanwhile::LibvirtdRestarts) => {
                &[Some(0), Some(1), Some(11)]
            }
            _ => return Ok(()),
        };
        ensure!(codes.contains(&ended.code), "exit code {:?}", ended.code);
        Ok(())
    }

    fn others_are_unharmed(
        &self,
        theirs: &std::collections::BTreeSet<super::check::Theirs>,
        meanwhile: Meanwhile,
    ) -> Result<()> {
        use super::check::Theirs;
        // What the guest wrote is in their bitmaps, too.
        let names = |of: &std::collections::BTreeSet<Theirs>| -> Vec<Theirs> {
            let without_count = of.iter().cloned().map(|mut it| {
                if let (Theirs::Bitmap { dirty_bytes, .. }, Meanwhile::Writes(_)) =
                    (&mut it, meanwhile)
                {
                    *dirty_bytes = 0;
                }
                it
            });
            without_count.collect()
        };
        let left = self.theirs()?;
        ensure!(
            names(&left) == names(theirs),
            "others had {theirs:?}, and have {left:?}"
        );
        Ok(())
    }
}
