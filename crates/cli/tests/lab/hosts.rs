//! One backup per VM, whoever makes it and wherever: two hosts that share
//! nothing but libvirt and the repository.
//!
//! A host here has mount, network and UTS namespaces and a lock directory of its
//! own; one that is hidden has a pid namespace, too, so that the other sees none
//! of its processes. What is signalled are the program's processes on one host.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use highwater_drivers::libvirt::{LibvirtDriver, LibvirtOptions};
use highwater_hypervisor::{Driver as _, Sign, SignKind};
use highwater_model::ClaimId;
use highwater_model::step::Step;
use highwater_testkit::{DiskSpec, MIB, Vm};
use serde_json::Value;

use crate::processes::signal;
use crate::support::{Bed, assert_same, mode, point, reference, wait_for_job, write_noise};

/// Longer than it takes to call a silent one dead and to wait for what it may
/// have been about to do.
const PATIENCE: Duration = Duration::from_secs(90);

/// What one host shows the other of its processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sight {
    Visible,
    Hidden,
}

/// Prepares to run the program on a host.
fn on_host(bed: &Bed, host: &str, sight: Sight, args: &[&str]) -> Command {
    let plain = bed.command(args);
    let mut command = Command::new("unshare");
    command.args(["-m", "-n", "-u"]);
    if sight == Sight::Hidden {
        command.args(["-p", "--fork", "--kill-child", "--mount-proc"]);
    }
    // Not replaced by the program: as the first of a pid namespace it would take
    // its guard along when it dies.
    let script = "hostname \"$1\"; shift; \"$@\"; code=$?; exit $code";
    command
        .args(["sh", "-c", script, "sh", host])
        .arg(plain.get_program())
        .args(plain.get_args())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    for (name, value) in plain.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.env("HIGHWATER_RUNTIME_DIR", bed.lab.path(host));
    command
}

/// A backup on a host that is held up at a step.
struct HeldUp {
    child: Child,
    signs: tempfile::TempDir,
}

impl HeldUp {
    fn at(bed: &Bed, host: &str, sight: Sight, step: Step) -> Result<Self> {
        let signs = tempfile::tempdir_in(bed.lab.dir())?;
        let fault = format!("{}:wait:{}", step.word(), signs.path().display());
        let child = on_host(bed, host, sight, &["backup", "web01", "--json"])
            .env("HIGHWATER_FAULT", fault)
            .spawn()?;
        let sign = signs.path().join(step.word());
        let held = Self { child, signs };
        let since = Instant::now();
        while !fs::metadata(&sign).is_ok_and(|it| it.len() > 0) {
            ensure!(since.elapsed() < PATIENCE, "{host} never came to {step:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(held)
    }

    fn stop(&self) -> Result<()> {
        each(&self.child, "-STOP")
    }

    /// Lets it go on, whatever held it.
    fn go(&self) -> Result<()> {
        fs::File::create(self.signs.path().join("go"))?;
        each(&self.child, "-CONT")
    }

    fn has_ended_within(&mut self, time: Duration) -> Result<bool> {
        let since = Instant::now();
        while since.elapsed() < time {
            if self.child.try_wait()?.is_some() {
                return Ok(true);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(false)
    }

    fn end(self) -> Result<Output> {
        Ok(self.child.wait_with_output()?)
    }
}

/// Sends a signal to each of the program's processes on a host; those that end
/// meanwhile need none.
fn each(started: &Child, with: &str) -> Result<()> {
    let found = processes_below(started.id())?;
    ensure!(with == "-CONT" || !found.is_empty(), "nobody is there");
    for pid in found {
        let sent = signal(with, pid);
        ensure!(
            sent.is_ok() || !Path::new(&format!("/proc/{pid}/exe")).exists(),
            "{with} {pid}: {sent:?}"
        );
    }
    Ok(())
}

/// Returns the program's processes among the descendants of one, eldest first.
fn processes_below(pid: u32) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    let mut open = vec![pid];
    let program = fs::canonicalize(env!("CARGO_BIN_EXE_highwater"))?;
    while let Some(pid) = open.pop() {
        if fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program) {
            found.push(pid);
        }
        for thread in fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
        {
            let children = fs::read_to_string(thread?.path().join("children"));
            let children = children.unwrap_or_default();
            open.extend(
                children
                    .split_whitespace()
                    .filter_map(|it| it.parse::<u32>().ok()),
            );
        }
    }
    Ok(found)
}

fn small_vm(bed: &Bed) -> Result<Vm> {
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 32 * MIB))
        .start()?;
    vm.write("vda", "write -P 1 0 1M")?;
    bed.backup(&vm, &[])?;
    vm.write("vda", "write -P 2 3M 100k")?;
    Ok(vm)
}

fn points(bed: &Bed) -> Result<usize> {
    let listed: Value = serde_json::from_str(&bed.run(&["list", "web01", "--json"])?)?;
    Ok(listed["points"]
        .as_array()
        .context("a list of points")?
        .len())
}

/// Fails unless the point of a report equals the disk.
fn is_right(bed: &Bed, report: &Value, now: &Path) -> Result<()> {
    let id = report["point"].as_str().context("a point")?;
    let dir = bed.restore(&point(report), &format!("out-{id}"), &["--format", "raw"])?;
    assert_same(now, &dir.join("vda.raw"))
}

fn report_of(output: &Output) -> Result<Value> {
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {told}", output.status);
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Fails unless nothing of anybody is left: no claim, no job, one mark, no
/// directory of any host.
fn tidy(bed: &Bed, vm: &Vm) -> Result<()> {
    bed.assert_tidy(vm, 1)?;
    // A guard gives its claim back while its command has returned.
    let since = Instant::now();
    loop {
        let signs = bed.lab.virsh(&["dumpxml", "web01"])?;
        if !signs.contains("highwater.invalid") {
            break;
        }
        ensure!(since.elapsed() < Duration::from_secs(5), "{signs}");
    }
    ensure!(vm.bitmaps("vda")?.len() == 1, "{:?}", vm.bitmaps("vda")?);
    for host in ["kvm1", "kvm2"] {
        let left = directories_below(&bed.lab.path(host))?;
        ensure!(left.is_empty(), "{left:?}");
    }
    Ok(())
}

/// Returns the directories of sessions.
fn directories_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(directories_below(&entry.path())?);
            let is_session = entry.file_name().to_string_lossy().len() == 16;
            found.extend(is_session.then(|| entry.path()));
        }
    }
    Ok(found)
}

fn start_at_once(sight: Sight) -> Result<()> {
    let bed = Bed::start()?;
    let vm = small_vm(&bed)?;
    let mut expected = points(&bed)?;
    for round in 0..10 {
        vm.write("vda", &format!("write -P {} 5M 200k", round + 1))?;
        let start = |host| on_host(&bed, host, sight, &["backup", "web01", "--json"]).spawn();
        let both = [start("kvm1")?, start("kvm2")?];
        for one in both {
            let output = one.wait_with_output()?;
            let told = String::from_utf8_lossy(&output.stderr);
            match output.status.code() {
                Some(0) => expected += 1,
                Some(11) => ensure!(told.contains("another backup of it runs"), "{told}"),
                _ => anyhow::bail!("round {round}: {}: {told}", output.status),
            }
        }
        ensure!(points(&bed)? == expected, "round {round}");
    }
    let now = reference(&bed, &vm, "vda", "now.raw")?;
    is_right(&bed, &bed.backup(&vm, &[])?, &now)?;
    tidy(&bed, &vm)
}

#[test]
fn two_hosts_that_start_at_once_never_meet_at_the_vm() -> Result<()> {
    start_at_once(Sight::Visible)
}

#[test]
fn two_hosts_that_cannot_see_each_other_and_start_at_once_never_meet_at_the_vm() -> Result<()> {
    start_at_once(Sight::Hidden)
}

/// One backup runs, and another host wants the VM.
fn is_told(sight: Sight) -> Result<()> {
    let bed = Bed::start()?;
    let vm = small_vm(&bed)?;
    write_noise(&bed, &vm, "vda", 4, 24)?;
    let first = HeldUp::at(&bed, "kvm1", sight, Step::Begun)?;
    for args in [&["doctor", "web01", "--fix"][..], &["backup", "web01"]] {
        let second = on_host(&bed, "kvm2", sight, args).output()?;
        let told = String::from_utf8_lossy(&second.stderr);
        ensure!(
            second.status.code() == Some(11),
            "{}: {told}",
            second.status
        );
        ensure!(
            told.contains("another backup of it runs: process "),
            "{told}"
        );
        ensure!(told.contains(" on host kvm1, for "), "{told}");
    }
    let look = on_host(&bed, "kvm2", sight, &["doctor", "web01", "--json"]).output()?;
    let look: Value = serde_json::from_slice(&look.stdout)?;
    ensure!(look["held_by"]["host"] == "kvm1", "{look:#}");
    let now = reference(&bed, &vm, "vda", "now.raw")?;
    first.go()?;
    is_right(&bed, &report_of(&first.end()?)?, &now)?;
    tidy(&bed, &vm)
}

#[test]
fn a_backup_is_told_which_process_on_which_host_has_the_vm() -> Result<()> {
    is_told(Sight::Visible)
}

#[test]
fn a_backup_that_cannot_see_the_others_process_knows_that_it_lives() -> Result<()> {
    is_told(Sight::Hidden)
}

#[test]
fn a_stopped_backup_that_can_be_seen_is_alive_and_stays_so() -> Result<()> {
    let bed = Bed::start()?;
    let vm = small_vm(&bed)?;
    let first = HeldUp::at(&bed, "kvm1", Sight::Visible, Step::Begun)?;
    first.stop()?;
    let second = on_host(&bed, "kvm2", Sight::Visible, &["backup", "web01"]).output()?;
    let told = String::from_utf8_lossy(&second.stderr);
    ensure!(
        second.status.code() == Some(11),
        "{}: {told}",
        second.status
    );
    ensure!(vm.job_running()?, "the job of a living one is gone: {told}");
    each(&first.child, "-KILL")?;
    first.end()?;
    bed.backup(&vm, &[])?;
    bed.assert_tidy(&vm, 1)
}

#[test]
fn a_killed_backup_that_nobody_could_see_is_taken_over_when_it_is_silent() -> Result<()> {
    let bed = Bed::start()?;
    let vm = small_vm(&bed)?;
    let mut first = HeldUp::at(&bed, "kvm1", Sight::Hidden, Step::Begun)?;
    // Its pid namespace dies with it, so nobody is left to tidy up.
    first.child.kill()?;
    first.child.wait()?;
    let now = reference(&bed, &vm, "vda", "now.raw")?;
    let since = Instant::now();
    // Not hidden: whoever does not see QEMU's process reads the whole disk.
    let second = on_host(&bed, "kvm2", Sight::Visible, &["backup", "web01", "--json"]).output()?;
    let took = since.elapsed();
    let report = report_of(&second)?;
    eprintln!("taken over after {took:?}");
    ensure!(took < Duration::from_secs(30), "it took {took:?}");
    ensure!(mode(&report, "vda") == "incremental", "{report}");
    let healed = report["healed"].to_string();
    ensure!(
        healed.contains("ended the backup job of dead session"),
        "{healed}"
    );
    is_right(&bed, &report, &now)?;
    tidy(&bed, &vm)
}

/// What becomes of one that was taken for dead and wakes up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Woken {
    /// It had no session yet: it waits, and backs up after its successor.
    GoesOn,
    /// It fails, without a point.
    Fails,
    /// Its point was made before it was stopped.
    HasItsPoint,
    /// The kernel ended it when its time was over.
    IsKilled,
}

/// One backup is stopped at a step where nobody can see it. The next one takes
/// the VM over, and while its session runs the first one is woken.
fn wakes_up(step: Step, expected: Woken) -> Result<()> {
    let bed = Bed::start()?;
    let vm = small_vm(&bed)?;
    let before = points(&bed)?;
    let then = reference(&bed, &vm, "vda", "then.raw")?;
    let mut first = HeldUp::at(&bed, "kvm1", Sight::Hidden, step)?;
    first.stop()?;
    vm.write("vda", "write -P 9 7M 300k")?;
    let now = reference(&bed, &vm, "vda", "now.raw")?;
    let since = Instant::now();
    let second = HeldUp::at(&bed, "kvm2", Sight::Visible, Step::Begun)?;
    eprintln!(
        "stopped at {step:?}, taken over after {:?}",
        since.elapsed()
    );
    first.go()?;
    // It has all the time to do what it must not; some wait for their turn.
    let has_ended = first.has_ended_within(Duration::from_secs(6))?;
    eprintln!("the first one has ended: {has_ended}");
    ensure!(vm.job_running()?, "the successor's job was ended");
    second.go()?;
    let report = report_of(&second.end()?)?;
    // A mark that a hidden one has made is not trusted by anybody.
    if expected == Woken::Fails {
        ensure!(mode(&report, "vda") == "incremental", "{report}");
    }
    ensure!(report["warnings"] == serde_json::json!([]), "{report}");
    is_right(&bed, &report, &now)?;
    let first = first.end()?;
    let told = String::from_utf8_lossy(&first.stderr).into_owned();
    eprintln!("the first one: {}: {told}", first.status);
    let made = points(&bed)? - before;
    match expected {
        Woken::GoesOn => {
            is_right(&bed, &report_of(&first)?, &now)?;
            ensure!(made == 2, "{made} points");
        }
        Woken::Fails => {
            let code = first.status.code();
            ensure!(code == Some(1) || code == Some(11), "{code:?}: {told}");
            ensure!(made == 1, "{made} points: {told}");
        }
        Woken::HasItsPoint => {
            is_right(&bed, &report_of(&first)?, &then)?;
            ensure!(made == 2, "{made} points: {told}");
        }
        Woken::IsKilled => ensure!(made <= 2, "{made} points: {told}"),
    }
    let last = bed.backup(&vm, &[])?;
    if expected == Woken::Fails {
        ensure!(mode(&last, "vda") == "incremental", "{last}");
    }
    is_right(&bed, &last, &now)?;
    tidy(&bed, &vm)
}

#[test]
fn one_that_wakes_up_while_it_claims_the_vm_waits_for_its_successor() -> Result<()> {
    wakes_up(Step::ClaimSet, Woken::GoesOn)
}

#[test]
fn one_that_wakes_up_with_the_vm_claimed_begins_nothing_beside_its_successor() -> Result<()> {
    wakes_up(Step::Planned, Woken::Fails)
}

#[test]
fn one_that_wakes_up_in_its_session_fails_and_its_successor_does_not() -> Result<()> {
    wakes_up(Step::Begun, Woken::Fails)
}

#[test]
fn one_that_wakes_up_before_it_commits_makes_no_point() -> Result<()> {
    wakes_up(Step::IndexStored, Woken::Fails)
}

#[test]
fn one_that_wakes_up_right_after_its_commit_leaves_its_successor_alone() -> Result<()> {
    wakes_up(Step::Committed, Woken::HasItsPoint)
}

#[test]
fn one_that_was_about_to_end_its_job_never_ends_its_successors() -> Result<()> {
    wakes_up(Step::JobSeen, Woken::IsKilled)
}

#[test]
fn a_libvirtd_that_is_restarted_does_not_let_another_host_in() -> Result<()> {
    let bed = Bed::start()?;
    let vm = small_vm(&bed)?;
    let first = HeldUp::at(&bed, "kvm1", Sight::Hidden, Step::Begun)?;
    bed.lab.restart_libvirtd()?;
    let second = on_host(&bed, "kvm2", Sight::Hidden, &["doctor", "web01", "--fix"]).output()?;
    let told = String::from_utf8_lossy(&second.stderr);
    ensure!(
        second.status.code() == Some(11),
        "{}: {told}",
        second.status
    );
    ensure!(told.contains(" on host kvm1, for "), "{told}");
    let now = reference(&bed, &vm, "vda", "now.raw")?;
    first.go()?;
    is_right(&bed, &report_of(&first.end()?)?, &now)?;
    tidy(&bed, &vm)
}

/// Two repositories track one VM, each with its own mark; a run of one of them
/// dies now and then.
#[test]
fn two_repositories_in_turns_are_incremental_each_and_neither_disturbs_the_other() -> Result<()> {
    let bed = Bed::start()?;
    let vm = small_vm(&bed)?;
    let other = bed.lab.path("repo2");
    let at_other = |args: &[&str]| {
        let mut command = bed.command(args);
        command.env("HIGHWATER_REPO", &other);
        command
    };
    report_is_ok(&at_other(&["init", "--encryption", "none"]).output()?)?;
    report_of(&at_other(&["backup", "web01", "--json"]).output()?)?;
    for round in 1..4 {
        vm.write("vda", &format!("write -P {} {round}M 64k", round + 40))?;
        let now = reference(&bed, &vm, "vda", "now.raw")?;
        if round == 2 {
            let signs = tempfile::tempdir_in(bed.lab.dir())?;
            let fault = format!("{}:kill:{}", Step::Begun.word(), signs.path().display());
            let killed = at_other(&["backup", "web01"])
                .env("HIGHWATER_FAULT", fault)
                .output()?;
            ensure!(!killed.status.success(), "nobody died");
        }
        let reports = [
            report_of(&bed.output(&["backup", "web01", "--json"])?)?,
            report_of(&at_other(&["backup", "web01", "--json"]).output()?)?,
        ];
        for report in &reports {
            ensure!(
                mode(report, "vda") == "incremental",
                "round {round}: {report}"
            );
        }
        is_right(&bed, &reports[0], &now)?;
        let (id, out) = (point(&reports[1]), bed.lab.path(&format!("other-{round}")));
        let to = out.to_str().context("a path is text")?;
        let restored = at_other(&["restore", &id, "--to", to, "--format", "raw"]).output()?;
        report_is_ok(&restored)?;
        assert_same(&now, &out.join("vda.raw"))?;
    }
    bed.assert_tidy(&vm, 2)
}

fn report_is_ok(output: &Output) -> Result<()> {
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {told}", output.status);
    Ok(())
}

/// Its only definition is the one that shows the claims.
#[test]
fn the_definition_of_a_transient_vm_is_kept_without_the_claim_on_it() -> Result<()> {
    let bed = Bed::start()?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", MIB))
        .start_transient()?;
    let report = bed.backup(&vm, &[])?;
    let dir = bed.restore(&point(&report), "out", &[])?;
    let mut definitions = 0;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|it| it == "xml") {
            definitions += 1;
            let text = fs::read_to_string(path)?;
            ensure!(text.contains("<name>web01</name>"), "{text}");
            ensure!(!text.contains("highwater.invalid"), "{text}");
        }
    }
    ensure!(definitions == 1, "{definitions} definitions");
    Ok(())
}

/// A job that runs beside a claim is waited for by nobody else.
#[test]
fn a_claim_is_gone_when_its_backup_has_ended_and_there_while_it_runs() -> Result<()> {
    let bed = Bed::start()?;
    let vm = small_vm(&bed)?;
    let first = HeldUp::at(&bed, "kvm1", Sight::Visible, Step::Begun)?;
    wait_for_job(&vm)?;
    let signs = bed.lab.virsh(&["dumpxml", "web01"])?;
    ensure!(
        signs.matches("highwater.invalid/claim/").count() == 1,
        "{signs}"
    );
    let inactive = bed.lab.virsh(&["dumpxml", "web01", "--inactive"])?;
    ensure!(!inactive.contains("highwater.invalid"), "{inactive}");
    first.go()?;
    report_of(&first.end()?)?;
    tidy(&bed, &vm)
}

/// ADR 0015 counts on it: each beat is a change of the VM's metadata.
#[test]
fn a_sign_at_a_vm_is_changed_in_milliseconds() -> Result<()> {
    const CHANGES: u32 = 100;
    let bed = Bed::start()?;
    let vm = small_vm(&bed)?;
    let mut driver = LibvirtDriver::connect(&bed.lab.uri(), &LibvirtOptions::default())?;
    let named = driver.find(vm.name())?;
    let claimant = driver.claimant(&named)?;
    let mut claimant = claimant.context("the VM runs")?;
    let id = ClaimId::random();
    let since = Instant::now();
    for number in 0..CHANGES {
        claimant.set(&Sign::Beat(id, number.into()))?;
    }
    let one = since.elapsed() / CHANGES;
    claimant.remove(id, SignKind::Beat)?;
    eprintln!(
        "a change of metadata takes {:.2} ms",
        one.as_secs_f64() * 1e3
    );
    ensure!(one < Duration::from_millis(100), "{one:?}");
    Ok(())
}
