//! The guard without a hypervisor: what it asks for, and when.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use highwater_hypervisor::{
    Begun, Claimant, Consistency, LeftDirectory, Quiesce, RunState, Surroundings, Swept, VmFacts,
};
use highwater_model::{ClaimId, MarkName, Nonce, PointId, RepoId, SessionId, Timestamp};

use super::*;
use crate::guard::Guard;

/// A hypervisor that says of a session what a test wants, and notes what it is
/// asked to do.
#[derive(Default)]
struct Script {
    asked: Mutex<Vec<&'static str>>,
    /// What is wrong with the session, and so with the hypervisor.
    trouble: Mutex<Option<ErrorKind>>,
    is_alarmed: AtomicBool,
    /// Whether its sessions read images that others may write to.
    reads_images: bool,
}

impl Script {
    fn broken() -> Arc<Self> {
        let script = Self::default();
        script.set(Some(ErrorKind::SessionLost));
        Arc::new(script)
    }

    fn set(&self, trouble: Option<ErrorKind>) {
        *self.trouble.lock().unwrap() = trouble;
    }

    fn asked(&self) -> Vec<&'static str> {
        self.asked.lock().unwrap().clone()
    }

    /// Waits until it is asked for something; returns how long that took.
    fn wait_for(&self, what: &str) -> Duration {
        let since = Instant::now();
        while !self.asked().contains(&what) {
            assert!(since.elapsed() < Duration::from_secs(20), "no {what}");
            std::thread::sleep(Duration::from_millis(2));
        }
        since.elapsed()
    }

    fn trouble(&self) -> Result<(), HypervisorError> {
        let trouble = *self.trouble.lock().unwrap();
        let error = |kind| HypervisorError::new(kind, "cannot keep the session");
        trouble.map_or(Ok(()), |kind| Err(error(kind)))
    }
}

struct Scripted(Arc<Script>);

impl Scripted {
    #[expect(clippy::unnecessary_wraps, reason = "it is what every method answers")]
    fn note<T>(&self, what: &'static str, answer: T) -> Result<T, HypervisorError> {
        self.0.asked.lock().unwrap().push(what);
        Ok(answer)
    }
}

impl Driver for Scripted {
    fn list(&mut self) -> Result<Vec<(VmRef, RunState)>, HypervisorError> {
        self.note("list", Vec::new())
    }
    fn find(&mut self, name: &str) -> Result<VmRef, HypervisorError> {
        let name = name.to_owned();
        self.note("find", VmRef { name, uuid: None })
    }
    fn observe(&mut self, _: &VmRef) -> Result<VmFacts, HypervisorError> {
        Err(no_session())
    }
    fn begin(&mut self, _: &BeginOrder) -> Result<Begun, HypervisorError> {
        let begun = Begun {
            exports: Vec::new(),
            consistency: Consistency::Crash,
            taken_at: Timestamp::from_unix_ms(0),
            frozen_ms: None,
            reads_images: self.0.reads_images,
            stopped_us: None,
            mark_created_s: None,
            disks: Vec::new(),
            warnings: Vec::new(),
            reserve: None,
        };
        self.note("begin", begun)
    }
    fn check(&mut self, _: &VmRef, _: SessionId) -> Result<(), HypervisorError> {
        self.0.trouble()
    }
    fn is_alarmed(&mut self, _: SessionId) -> bool {
        self.0.is_alarmed.load(Ordering::SeqCst)
    }
    fn end(&mut self, _: &BeginOrder) -> Result<Ended, HypervisorError> {
        if *self.0.trouble.lock().unwrap() == Some(ErrorKind::Unreachable) {
            self.0.trouble()?;
        }
        self.note("end", Ended::default())
    }
    fn end_leftover(&mut self, _: &VmRef, _: SessionId) -> Result<Ended, HypervisorError> {
        self.note("end_leftover", Ended::default())
    }
    fn mark(&mut self, _: &VmRef, _: &MarkOrder) -> Result<(), HypervisorError> {
        self.note("mark", ())
    }
    fn survey(&mut self, _: &VmRef) -> Result<Surroundings, HypervisorError> {
        self.note("survey", Surroundings::default())
    }
    fn leftovers(
        &mut self,
        _: &VmRef,
        _: &[PathBuf],
    ) -> Result<Vec<LeftDirectory>, HypervisorError> {
        self.note("leftovers", Vec::new())
    }
    fn sweep(&mut self, _: &VmRef, _: &[PathBuf]) -> Result<Swept, HypervisorError> {
        self.note("sweep", Swept::default())
    }
    fn claimant(&mut self, _: &VmRef) -> Result<Option<Box<dyn Claimant>>, HypervisorError> {
        Ok(None)
    }
    fn act_for(&mut self, _: Option<ClaimId>) {}
    fn still_claimed(&mut self, _: &VmRef) -> Result<(), HypervisorError> {
        Ok(())
    }
}

/// Starts a guard of this hypervisor, with a session.
fn with_session(script: &Arc<Script>) -> (Guard, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (lifeline, cutter) = UnixStream::pair().unwrap();
    let driver = Arc::clone(script);
    let serving = std::thread::spawn(move || {
        serve(theirs, cutter, &move |_| {
            Ok(Box::new(Scripted(Arc::clone(&driver))))
        });
    });
    let guard = Guard::connect(ours, lifeline, "test:///", &std::env::temp_dir()).unwrap();
    let repo = RepoId::from_bytes([1; 16]);
    let order = BeginOrder {
        vm: guard.find("web01").unwrap(),
        session: SessionId::random(),
        disks: Vec::new(),
        new_mark: Some(highwater_hypervisor::NewMark {
            name: MarkName::new(repo, PointId::new(Timestamp::from_unix_ms(1))),
            nonce: Nonce::random(),
            disks: vec!["vda".to_owned()],
        }),
        quiesce: Quiesce::Off,
        freeze_mountpoints: Vec::new(),
        socket_dir: PathBuf::from("/nowhere"),
        scratch_dir: PathBuf::from("/nowhere"),
        when_started: highwater_hypervisor::WhenStarted::Yield,
    };
    guard.begin(&order).unwrap();
    (guard, serving)
}

/// A guest that a full scratch file stopped waits for the end of the session,
/// and the mover may hang in a dead repository.
#[test]
fn a_broken_session_is_ended_before_the_mover_says_anything() {
    let script = Script::broken();
    let (guard, serving) = with_session(&script);
    script.wait_for("mark");
    assert_eq!(script.asked(), ["find", "begin", "end", "mark"]);
    let refused = guard.committing().unwrap_err();
    assert_eq!(refused.kind, ErrorKind::SessionLost, "{refused:?}");
    assert_eq!(guard.lost().unwrap().kind, ErrorKind::SessionLost);
    guard.finish(Outcome::Failed).unwrap();
    assert_eq!(script.asked(), ["find", "begin", "end", "mark"], "once");
    drop(guard);
    serving.join().unwrap();
    assert_eq!(script.asked(), ["find", "begin", "end", "mark"], "once");
}

/// A VM that is started between the last look at its images and the manifest
/// spoils what was read; and to take the mark out then would keep it from starting.
#[test]
fn a_session_that_reads_images_is_looked_at_before_its_commit_and_leaves_its_mark_if_lost() {
    for is_heard_of_first in [false, true] {
        let script = Arc::new(Script {
            reads_images: true,
            ..Script::default()
        });
        let (guard, serving) = with_session(&script);
        script.set(Some(ErrorKind::SessionLost));
        if is_heard_of_first {
            script.wait_for("end");
        }
        let refused = guard.committing().unwrap_err();
        assert_eq!(refused.kind, ErrorKind::SessionLost, "{refused:?}");
        let ended = guard.finish(Outcome::Failed).unwrap();
        assert!(
            ended.warnings[0].contains("stays in the images"),
            "{ended:?}"
        );
        drop(guard);
        serving.join().unwrap();
        assert_eq!(script.asked(), ["find", "begin", "end"]);
    }
    // One that nobody has spoilt commits, and takes its mark along if it does not.
    let script = Arc::new(Script {
        reads_images: true,
        ..Script::default()
    });
    let (guard, _serving) = with_session(&script);
    guard.committing().unwrap();
    guard.finish(Outcome::Failed).unwrap();
    assert_eq!(script.asked(), ["find", "begin", "end", "mark"]);
}

/// The mover lives and beats, and yet does nothing about a session it was
/// told is lost: as when all its other threads hang in a dead repository.
#[test]
fn a_guard_does_not_wait_for_ever_for_a_mover_that_only_beats() {
    let (guard, serving) = with_session(&Script::broken());
    // Ends, and lets go of the lock, by itself.
    serving.join().unwrap();
    assert!(
        guard.committing().is_err(),
        "a session that was ended must not commit"
    );
}

#[test]
fn a_session_that_breaks_while_its_manifest_is_written_keeps_both_marks() {
    let script = Arc::new(Script::default());
    let (guard, serving) = with_session(&script);
    guard.committing().unwrap();
    script.set(Some(ErrorKind::SessionLost));
    script.wait_for("end");
    guard.finish(Outcome::Committed).unwrap();
    drop(guard);
    serving.join().unwrap();
    assert!(!script.asked().contains(&"mark"), "{:?}", script.asked());
}

#[test]
fn a_manifest_that_was_not_written_after_all_takes_its_mark_with_it() {
    let script = Arc::new(Script::default());
    let (guard, _serving) = with_session(&script);
    guard.committing().unwrap();
    script.set(Some(ErrorKind::SessionLost));
    script.wait_for("end");
    guard.finish(Outcome::Failed).unwrap();
    assert!(script.asked().contains(&"mark"), "{:?}", script.asked());
}

#[test]
fn what_is_heard_of_a_session_is_looked_into_at_once() {
    let mut shortest = Duration::MAX;
    // Between two looks there is a second; chance may be kind once.
    for _ in 0..3 {
        let script = Arc::new(Script::default());
        let (_guard, _serving) = with_session(&script);
        std::thread::sleep(CHECK_EVERY / 4);
        script.set(Some(ErrorKind::SessionLost));
        script.is_alarmed.store(true, Ordering::SeqCst);
        shortest = shortest.min(script.wait_for("end"));
    }
    assert!(shortest < CHECK_EVERY / 3, "{shortest:?}");
}

/// QEMU and its job do not notice that libvirtd is restarted.
#[test]
fn a_hypervisor_that_is_away_for_a_moment_breaks_no_session_and_is_waited_for_at_its_end() {
    let script = Arc::new(Script::default());
    let (guard, _serving) = with_session(&script);
    script.set(Some(ErrorKind::Unreachable));
    std::thread::sleep(CHECK_EVERY * 3);
    assert!(guard.lost().is_none(), "{:?}", guard.lost());
    std::thread::scope(|scope| {
        let ending = scope.spawn(|| guard.finish(Outcome::Failed));
        std::thread::sleep(END_INTERVAL * 3);
        assert!(!ending.is_finished());
        script.set(None);
        ending.join().unwrap().unwrap();
    });
    assert_eq!(script.asked(), ["find", "begin", "end", "mark"]);
}

/// Whoever does not hold the lock cannot know that a session is dead.
#[test]
fn directories_are_cleared_only_under_the_lock_of_their_vm() {
    let script = Script::broken();
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (lifeline, cutter) = UnixStream::pair().unwrap();
    let driver = Arc::clone(&script);
    std::thread::spawn(move || {
        serve(theirs, cutter, &move |_| {
            Ok(Box::new(Scripted(Arc::clone(&driver))))
        });
    });
    let guard = Guard::connect(ours, lifeline, "test:///", dir.path()).unwrap();
    let (web01, web02) = (guard.find("web01").unwrap(), guard.find("web02").unwrap());
    assert!(guard.sweep(&web01, &[]).is_err());
    guard.lock(&web02).unwrap();
    assert!(guard.sweep(&web01, &[]).is_err());
    guard.lock(&web01).unwrap();
    guard.sweep(&web01, &[]).unwrap();
    assert_eq!(script.asked(), ["find", "find", "sweep"]);
    let holder = guard.lock_holder(&web01).unwrap();
    assert_eq!(holder.unwrap().process, Some(std::process::id()));
    assert_eq!(guard.lock_holder(&web02).unwrap(), None);
}
