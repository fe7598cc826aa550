//! Stops and kills mover, guard and libvirtd at bad moments: neither the guest
//! nor the next backup may notice.

use std::io::Read as _;
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

use crate::support::{Bed, assert_same, mode, point, reference};

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

fn signal(signal: &str, pid: u32) -> Result<()> {
    tool("kill")
        .args([signal, &pid.to_string()])
        .run()
        .map(drop)
}

/// Returns the process id of a mover's guard.
fn guard_of(mover: &Child) -> Result<u32> {
    let pid = mover.id();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    children
        .trim()
        .parse()
        .with_context(|| format!("the mover has not one child: {children}"))
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

/// Waits until libvirt knows of the job, and copying goes on.
fn wait_for_job(vm: &Vm) -> Result<()> {
    // libvirt cannot tell in the moment in which the job starts.
    wait("a job", Duration::from_secs(20), || {
        Ok(vm.job_running().unwrap_or_default())
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
    signal("-STOP", mover.id())?;
    wait_until_tidy(&bed, &vm, &marks)?;
    heals(&bed, &vm)?;
    signal("-CONT", mover.id())?;
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
        let mut mover = begin(&bed)?;
        wait_for_socket(&bed)?;
        mover.kill()?;
        mover.wait()?;
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

/// A row of the table; its test is made there.
pub(crate) fn mover_and_guard_killed_together_are_healed_by_the_next_backup() -> Result<()> {
    let bed = Bed::start()?;
    let vm = busy_vm(&bed)?;
    let pulse = Pulse::of(&bed);
    let mut mover = begin(&bed)?;
    wait_for_job(&vm)?;
    let guard = guard_of(&mover)?;
    // Stopped first: neither may see the other die.
    signal("-STOP", guard)?;
    mover.kill()?;
    mover.wait()?;
    signal("-KILL", guard)?;
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

#[test]
fn a_libvirtd_restarted_before_and_during_the_look_at_the_vm_costs_one_backup_at_most() -> Result<()>
{
    let bed = Bed::start()?;
    let vm = busy_vm(&bed)?;
    let marks = vm.checkpoints()?;
    let pulse = Pulse::of(&bed);
    bed.lab.restart_libvirtd()?;
    // From connecting, over the look at the VM, into the start call.
    for after in [0, 40, 80, 120, 160].map(Duration::from_millis) {
        let mover = begin(&bed)?;
        std::thread::sleep(after);
        bed.lab.kill_libvirtd()?;
        let output = mover.wait_with_output()?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.code() == Some(1),
            "{}: {stderr}",
            output.status
        );
        bed.lab.start_libvirtd()?;
    }
    // What the last of them could not take away, the next one does.
    heals(&bed, &vm)?;
    ensure!(vm.checkpoints()? != marks, "{marks:?}");
    pulse.check().map(drop)
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

/// libvirtd dies within the start call, at each moment of it.
#[test]
fn a_libvirtd_that_dies_within_the_start_call_is_told_of_with_the_way_out() -> Result<()> {
    let bed = Bed::start()?;
    let vm = busy_vm(&bed)?;
    let pulse = pulse_socket(&bed);
    let mut stuck = 0;
    for after in [0, 5, 20].map(Duration::from_millis) {
        let mover = begin_with(&bed, "zstd:1")?;
        wait_for_socket(&bed)?;
        std::thread::sleep(after);
        bed.lab.kill_libvirtd()?;
        let output = mover.wait_with_output()?;
        ensure!(output.status.code() == Some(1), "{output:?}");
        bed.lab.start_libvirtd()?;
        let mut next = bed.output(&["backup", "web01", "--json"])?;
        let told = String::from_utf8_lossy(&next.stderr).into_owned();
        if next.status.code() == Some(11) {
            // libvirt has forgotten the job and cannot forget that there was one.
            stuck += 1;
            ensure!(told.contains("has lost what it knew of the job"), "{told}");
            ensure!(
                told.contains("hint: until the VM is shut down, libvirtd"),
                "{told}"
            );
            let jobs = vm.monitor(&serde_json::json!({"execute": "query-jobs"}))?;
            ensure!(jobs == serde_json::json!([]), "QEMU still copies: {jobs}");
            vm.destroy()?;
            bed.lab.restart_libvirtd()?;
            vm.start()?;
            next = bed.output(&["backup", "web01", "--json"])?;
        }
        eprintln!("{after:?}: {next:?}");
        ensure!(next.status.success(), "{next:?}");
        heals(&bed, &vm)?;
        std::fs::remove_dir_all(bed.lab.path("restored"))?;
        std::fs::remove_file(bed.lab.path("now.raw"))?;
        vm.write("vda", "write -P 9 1M 64k")?;
    }
    eprintln!("{stuck} of 3 were stuck; {}", greeting(&pulse)?.as_millis());
    Ok(())
}
