//! Stops and kills mover, guard and libvirtd at bad moments: neither the guest
//! nor the next backup may notice.

use std::io::{BufRead as _, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use highwater_testkit::{DiskSpec, Vm, tool};
use serde_json::Value;

use crate::processes::{guard_of, kill_all, mover_of, signal};
use crate::support::{Bed, assert_same, mode, point, reference, wait_for_job};

const MIB: u64 = 1 << 20;
/// Longest time QEMU's main loop may not answer. It answers within
/// milliseconds; a drain that waits for a mover would last ten seconds and more.
const PULSE_MAX: Duration = Duration::from_secs(4);

/// A VM with a finished backup, and incompressible bytes written since.
fn busy_vm(bed: &Bed) -> Result<Vm> {
    let display = format!(
        "<graphics type='vnc' socket='{}'/>",
        pulse_socket(bed).display()
    );
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 64 * MIB))
        .device(&display)
        .start()?;
    bed.backup(&vm, &[])?;
    let noise = bed.lab.path("noise");
    tool("dd")
        .args(["if=/dev/urandom", "bs=1M", "count=40", "status=none"])
        .arg(format!("of={}", noise.display()))
        .run()?;
    vm.write("vda", &format!("write -s {} 0 40M", noise.display()))?;
    Ok(vm)
}

fn pulse_socket(bed: &Bed) -> PathBuf {
    bed.lab.path("pulse")
}

/// Feels QEMU's pulse: its main loop greets who connects to the display.
struct Pulse {
    stop: Arc<AtomicBool>,
    longest: JoinHandle<Result<Duration>>,
}

impl Pulse {
    fn of(bed: &Bed) -> Self {
        let socket = pulse_socket(bed);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let longest = std::thread::spawn(move || {
            let mut longest = Duration::ZERO;
            while !stopped.load(Ordering::SeqCst) {
                longest = longest.max(greeting(&socket)?);
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(longest)
        });
        Self { stop, longest }
    }

    /// Fails if the pulse was ever missing for too long.
    fn check(self) -> Result<Duration> {
        self.stop.store(true, Ordering::SeqCst);
        let longest = self
            .longest
            .join()
            .expect("feeling a pulse does not panic")?;
        ensure!(longest < PULSE_MAX, "QEMU did not answer for {longest:?}");
        Ok(longest)
    }
}

fn greeting(socket: &Path) -> Result<Duration> {
    let since = Instant::now();
    let mut stream = UnixStream::connect(socket).context("cannot reach the display")?;
    stream.set_read_timeout(Some(Duration::from_mins(1)))?;
    let mut version = [0; 12];
    stream
        .read_exact(&mut version)
        .context("QEMU did not greet")?;
    Ok(since.elapsed())
}

fn begin(bed: &Bed) -> Result<Child> {
    begin_with(bed, "zstd:19")
}

/// Begins a backup that the compression keeps busy for long enough.
fn begin_with(bed: &Bed, compression: &str) -> Result<Child> {
    let slow = ["--workers", "1", "--compression", compression];
    bed.spawn(&[&["backup", "web01"], &slow[..]].concat())
}

/// Waits until QEMU listens for the session: the start call is under way, its
/// transaction comes next.
fn wait_for_socket(bed: &Bed) -> Result<()> {
    wait("a session's socket", Duration::from_secs(20), || {
        let entries = std::fs::read_dir(bed.runtime())?.flatten();
        let mut files = entries
            .filter_map(|dir| std::fs::read_dir(dir.path()).ok())
            .flatten()
            .flatten();
        Ok(files.any(|file| file.path().extension().is_some_and(|end| end == "sock")))
    })
}

fn wait(what: &str, limit: Duration, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !done()? {
        ensure!(Instant::now() < deadline, "waited {limit:?} for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Waits until a guard has left the VM as it was, and checks that it has.
fn wait_until_tidy(bed: &Bed, vm: &Vm, marks: &[String]) -> Result<()> {
    wait("the guard to tidy up", Duration::from_secs(40), || {
        Ok(!vm.job_running().unwrap_or(true)
            && vm.checkpoints()? == marks
            && bed.assert_tidy(vm, 1).is_ok())
    })
    .or_else(|error| bed.assert_tidy(vm, 1).and(Err(error)))
}

/// Backs up plainly and compares the point with the disk.
fn heals(bed: &Bed, vm: &Vm) -> Result<Value> {
    let report = bed.backup(vm, &[])?;
    ensure!(mode(&report, "vda") == "incremental", "{report}");
    let now = reference(bed, vm, "vda", "now.raw")?;
    let dir = bed.restore(&point(&report), "restored", &[])?;
    assert_same(&now, &dir.join("vda.qcow2"))?;
    bed.assert_tidy(vm, 1)?;
    Ok(report)
}

/// Stops the mover some time after its start call; what follows must be as if
/// it had never begun. Returns QEMU's longest silence.
fn stopped_mover(after: Duration) -> Result<Duration> {
    let bed = Bed::start()?;
    let vm = busy_vm(&bed)?;
    let marks = vm.checkpoints()?;
    let pulse = Pulse::of(&bed);
    let mover = begin(&bed)?;
    wait_for_socket(&bed)?;
    std::thread::sleep(after);
    signal("-STOP", mover_of(&mover)?)?;
    wait_until_tidy(&bed, &vm, &marks)?;
    heals(&bed, &vm)?;
    signal("-CONT", mover_of(&mover)?)?;
    let output = mover.wait_with_output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1),
        "a lost session is no success: {stderr}"
    );
    ensure!(
        stderr.contains("state: no restore point was added"),
        "{stderr}"
    );
    bed.assert_tidy(&vm, 1)?;
    pulse.check()
}

#[test]
fn a_mover_stopped_at_any_moment_holds_up_neither_guest_nor_successor() -> Result<()> {
    // From within the start call, over connecting, to replies under way. All
    // at once: the guard is patient for ten seconds.
    let moments = [0, 30, 80, 150].map(Duration::from_millis);
    let runs = moments.map(|after| (after, std::thread::spawn(move || stopped_mover(after))));
    for (after, run) in runs {
        let silence = run.join().expect("a run does not panic");
        let silence = silence.with_context(|| format!("stopped {after:?} after the start"))?;
        eprintln!("stopped {after:?} after the start: QEMU was silent for {silence:?} at most");
    }
    Ok(())
}

#[test]
fn a_mover_killed_within_the_start_call_leaves_nothing() -> Result<()> {
    let bed = Bed::start()?;
    let vm = busy_vm(&bed)?;
    let marks = vm.checkpoints()?;
    let pulse = Pulse::of(&bed);
    for _ in 0..3 {
        let mut started = begin(&bed)?;
        wait_for_socket(&bed)?;
        signal("-KILL", mover_of(&started)?)?;
        ensure!(started.wait()?.code() == Some(1));
        wait_until_tidy(&bed, &vm, &marks)?;
    }
    heals(&bed, &vm)?;
    pulse.check().map(drop)
}

#[test]
fn a_guard_killed_in_mid_copy_is_replaced_and_the_vm_tidied_up() -> Result<()> {
    let bed = Bed::start()?;
    let vm = busy_vm(&bed)?;
    let marks = vm.checkpoints()?;
    let pulse = Pulse::of(&bed);
    let mover = begin(&bed)?;
    wait_for_job(&vm)?;
    signal("-KILL", guard_of(&mover)?)?;
    let output = mover.wait_with_output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1),
        "{}: {stderr}",
        output.status
    );
    ensure!(
        stderr.contains("cannot reach the guard process"),
        "{stderr}"
    );
    ensure!(
        stderr.contains("state: no restore point was added"),
        "{stderr}"
    );
    // At once, not at the next backup.
    bed.assert_tidy(&vm, 1)?;
    ensure!(vm.checkpoints()? == marks, "{:?}", vm.checkpoints()?);
    heals(&bed, &vm)?;
    pulse.check().map(drop)
}

/// Kills all three processes in mid copy.
fn all_of_us_killed(bed: &Bed, vm: &Vm) -> Result<()> {
    let mut started = begin(bed)?;
    wait_for_job(vm)?;
    let (mover, guard) = (mover_of(&started)?, guard_of(&started)?);
    // Stopped first: the guard must not see the mover die.
    signal("-STOP", guard)?;
    kill_all(&mut started, mover, guard)
}

/// A row of the table; its test is made there.
pub(crate) fn all_processes_killed_together_are_healed_by_the_next_backup() -> Result<()> {
    let bed = Bed::start()?;
    let vm = busy_vm(&bed)?;
    let pulse = Pulse::of(&bed);
    all_of_us_killed(&bed, &vm)?;
    ensure!(vm.job_running()?, "nobody was left to end the job");
    let report = heals(&bed, &vm)?;
    let healed = report["healed"].to_string();
    ensure!(
        healed.contains("ended the backup job of dead session"),
        "{healed}"
    );
    ensure!(healed.contains("removed unfinished mark"), "{healed}");
    pulse.check().map(drop)
}

#[test]
fn a_libvirtd_killed_in_mid_copy_costs_no_point_and_no_mark() -> Result<()> {
    let bed = Bed::start()?;
    let vm = busy_vm(&bed)?;
    let pulse = Pulse::of(&bed);
    // It goes on to the end, so not for long.
    let mover = begin_with(&bed, "zstd:12")?;
    wait_for_job(&vm)?;
    bed.lab.restart_libvirtd()?;
    let output = mover.wait_with_output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    // QEMU serves on. Whether the guard looks at the job before libvirtd is
    // back is chance; if it does, the backup is given up.
    let code = output.status.code();
    ensure!(
        code == Some(0) || code == Some(1),
        "{}: {stderr}",
        output.status
    );
    eprintln!("libvirtd was restarted: exit {code:?}: {stderr}");
    heals(&bed, &vm)?;
    pulse.check().map(drop)
}

/// Talks to QEMU while libvirtd, whose monitor it is, is dead.
fn ask_qemu(bed: &Bed, command: &str) -> Result<()> {
    let find = tool("find").arg(bed.lab.lib_dir().join("qemu"));
    let monitor = find.args(["-name", "monitor.sock"]).run()?;
    let mut stream = UnixStream::connect(monitor.trim()).context("cannot reach QEMU")?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut answers = std::io::BufReader::new(stream.try_clone()?).lines();
    for command in [r#"{"execute":"qmp_capabilities"}"#, command] {
        stream.write_all(command.as_bytes())?;
        let answered = answers.find(|line| {
            let line = line.as_deref().unwrap_or_default();
            line.contains("\"return\"") || line.contains("\"error\"")
        });
        let answer = answered.context("QEMU is gone")??;
        ensure!(answer.contains("\"return\""), "{command}: {answer}");
    }
    Ok(())
}

/// Kills all of us and libvirtd in mid copy: nobody ends the job.
fn all_but_qemu_killed(bed: &Bed, vm: &Vm) -> Result<()> {
    all_of_us_killed(bed, vm)?;
    bed.lab.kill_libvirtd()
}

/// Takes something out of what libvirtd remembers of the VM, as if it had died
/// before it wrote it down, or after it had struck it out.
fn forget(bed: &Bed, from: &str, to: &str) -> Result<()> {
    let status = bed.lab.run_dir().join("qemu/web01.xml");
    let text = std::fs::read_to_string(&status)?;
    let (before, rest) = text.split_once(from).context("it is not there")?;
    let (_, after) = rest.split_once(to).context("it has no end")?;
    Ok(std::fs::write(&status, format!("{before}{after}"))?)
}

/// libvirtd dies when it has heard of the copy's end, and before it ends the
/// server.
#[test]
fn an_nbd_server_that_libvirt_forgot_is_ended_before_the_next_backup() -> Result<()> {
    let bed = Bed::start()?;
    let vm = busy_vm(&bed)?;
    let pulse = Pulse::of(&bed);
    all_but_qemu_killed(&bed, &vm)?;
    let job = |what: &str| {
        let id = r#"{"id":"backup-vda-libvirt-1-format"}"#;
        ask_qemu(&bed, &format!(r#"{{"execute":"{what}","arguments":{id}}}"#))
    };
    job("job-cancel")?;
    wait("the copy's end", Duration::from_secs(10), || {
        Ok(job("job-dismiss").is_ok())
    })?;
    forget(&bed, "<blockjob name=", "</blockjob>")?;
    bed.lab.start_libvirtd()?;
    let left = vm.leftovers(&bed.runtime().join("scratch"))?;
    ensure!(left.exports.len() == 1, "{left:?}");
    let report = heals(&bed, &vm)?;
    ensure!(report["warnings"] == serde_json::json!([]), "{report}");
    pulse.check().map(drop)
}

/// libvirtd that dies within the start call holds the VM for a job, and knows
/// nothing more of it.
#[test]
fn a_job_that_libvirt_has_lost_is_told_of_with_the_way_out_and_copies_no_longer() -> Result<()> {
    let bed = Bed::start()?;
    let vm = busy_vm(&bed)?;
    let pulse = Pulse::of(&bed);
    all_but_qemu_killed(&bed, &vm)?;
    forget(&bed, "<domainbackup", "</domainbackup>")?;
    bed.lab.start_libvirtd()?;
    for _ in 0..2 {
        let (code, told) = bed.fail(&["backup", "web01"])?;
        ensure!(code == 11 && told.contains(LOST), "{code}: {told}");
        let way_out = "hint: shut `web01` down, restart libvirtd, and start `web01` again";
        ensure!(told.contains(way_out), "{told}");
        // Nobody looks after its scratch file any more.
        let jobs = vm.monitor(&serde_json::json!({"execute": "query-jobs"}))?;
        ensure!(jobs == serde_json::json!([]), "QEMU still copies: {jobs}");
    }
    pulse.check()?;
    way_out(&bed, &vm)?;
    heals(&bed, &vm).map(drop)
}

const LOST: &str = "libvirt died while it started a backup job, has lost what it knew of the job";

fn way_out(bed: &Bed, vm: &Vm) -> Result<()> {
    vm.destroy()?;
    bed.lab.restart_libvirtd()?;
    vm.start()
}

#[test]
fn a_libvirtd_restarted_before_and_during_the_look_at_the_vm_costs_one_backup_at_most() -> Result<()>
{
    let bed = Bed::start()?;
    let vm = busy_vm(&bed)?;
    let pulse = Pulse::of(&bed);
    bed.lab.restart_libvirtd()?;
    // From connecting on, over the look at the VM.
    let mut last = String::new();
    for after in [0, 15, 30, 45].map(Duration::from_millis) {
        let mover = begin(&bed)?;
        std::thread::sleep(after);
        bed.lab.kill_libvirtd()?;
        let output = mover.wait_with_output()?;
        last = String::from_utf8_lossy(&output.stderr).into_owned();
        let code = output.status.code();
        ensure!(code == Some(1) || last.contains(LOST), "{code:?}: {last}");
        bed.lab.start_libvirtd()?;
    }
    pulse.check()?;
    // A machine in a hurry had begun the start call.
    let next = bed.output(&["backup", "web01"])?;
    if String::from_utf8_lossy(&next.stderr).contains(LOST) {
        way_out(&bed, &vm)?;
    } else {
        ensure!(next.status.success(), "{last} {next:?}");
    }
    heals(&bed, &vm).map(drop)
}

#[test]
fn a_libvirtd_that_dies_between_commit_and_settling_costs_no_point_and_no_mark() -> Result<()> {
    let bed = Bed::start()?;
    let vm = busy_vm(&bed)?;
    let pulse = Pulse::of(&bed);
    let manifests = || -> Result<usize> {
        let find = tool("find").arg(bed.repo().join("points"));
        Ok(find.args(["-type", "f"]).run()?.lines().count())
    };
    let before = manifests()?;
    let mover = begin_with(&bed, "zstd:1")?;
    wait("the manifest", Duration::from_secs(20), || {
        Ok(manifests()? > before)
    })?;
    bed.lab.kill_libvirtd()?;
    let output = mover.wait_with_output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    // The point is there, and nobody says that it is not.
    ensure!(output.status.success(), "{}: {stderr}", output.status);
    eprintln!("libvirtd died after the commit: {stderr}");
    bed.lab.start_libvirtd()?;
    let report = heals(&bed, &vm)?;
    let dirty = report["disks"][0]["dirty_bytes"].as_u64();
    ensure!(dirty == Some(0), "not since the newest point: {report}");
    pulse.check().map(drop)
}
