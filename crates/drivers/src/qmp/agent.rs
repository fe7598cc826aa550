//! Freezes the guest's file systems around the point in time, and no longer,
//! over the socket of its agent.
//!
//! ```text
//! agent silent ------------------------------------------> not frozen (require: error)
//! frozen by somebody else --------------------------------> used, left as found
//! freeze -> point in time -> still frozen? -> thaw -> thawed? -> done
//!              `- after 5 s the connection is cut, and another one thaws
//! ```
//!
//! A guest left frozen is the worst outcome of all, worse than no backup: every
//! path out of here thaws what was frozen here and asks whether it worked.
//!
//! The socket is QEMU's end of a serial port: it serves one client at a time,
//! and what an earlier one did not read may still be in it. So the first thing
//! that is asked is a number, and what comes before it is nobody's.

use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use highwater_hypervisor::{Agent, ErrorKind, HypervisorError, Quiesce, VmRef};
use highwater_model::ClaimId;
use highwater_model::step::patience;
use serde_json::{Value, json};

use super::address::{Address, Stream};
use super::error::QmpError;
use super::wire::{Splitter, refusal};

/// How long the agent may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// How long it may take to say whether it is there at all.
const SYNC_LIMIT: Duration = Duration::from_secs(2);
/// How long a guest may be frozen.
const FREEZE_DEADLINE: Duration = Duration::from_secs(5);
/// How long thawing is tried before giving up.
const THAW_DEADLINE: Duration = Duration::from_mins(1);
/// Pause between two attempts to thaw.
const THAW_INTERVAL: Duration = Duration::from_millis(200);

const STATUS: &str = "guest-fsfreeze-status";
const FREEZE: &str = "guest-fsfreeze-freeze";
const FREEZE_LIST: &str = "guest-fsfreeze-freeze-list";
const THAW: &str = "guest-fsfreeze-thaw";

/// Where an agent listens, and whose it is.
#[derive(Clone)]
pub(super) struct Door {
    pub(super) address: Address,
    /// Returns whether the VM is known to have ended. Not being able to connect
    /// proves nothing: a socket may be moved, and a file table full.
    pub(super) is_over: Arc<dyn Fn() -> bool + Send + Sync>,
}

/// Why an agent was not heard.
#[derive(Debug, Clone, PartialEq, Eq)]
enum AgentError {
    /// Nobody listens, and the VM is known to have ended, its guest with it.
    Gone(String),
    /// Anything else.
    Failed(String),
}

impl AgentError {
    fn text(self) -> String {
        match self {
            Self::Gone(text) | Self::Failed(text) => text,
        }
    }
}

/// Tells whether there is an agent that answers.
pub(super) fn state(door: Option<&Door>) -> Agent {
    match door.map(Connection::open) {
        None => Agent::Missing,
        Some(Ok(_)) => Agent::Connected,
        Some(Err(_)) => Agent::Silent,
    }
}

/// A guest whose file systems are frozen. Dropping it thaws them.
pub(super) struct Frozen {
    vm: VmRef,
    door: Door,
    connection: Connection,
    since: Instant,
    /// `None` if somebody else froze the guest: then it stays frozen.
    watchdog: Option<Watchdog>,
}

/// What came of the wish to freeze.
pub(super) enum Outcome {
    /// It is frozen.
    Frozen(Frozen),
    /// It is not; why, if it was wished for.
    Not(Option<String>),
}

/// Freezes the guest as ordered; `note` is called right before it is. When this
/// fails, nothing is frozen, or the error says that it may be.
pub(super) fn freeze(
    vm: &VmRef,
    door: Option<&Door>,
    wish: Quiesce,
    mountpoints: &[String],
    note: &dyn Fn() -> Result<(), HypervisorError>,
) -> Result<Outcome, HypervisorError> {
    if wish == Quiesce::Off {
        return Ok(Outcome::Not(None));
    }
    let Some(door) = door else {
        let because = "no agent was named (`?agent=SOCKET` in the connection)".to_owned();
        return not_frozen(vm, wish, because);
    };
    // Asked first: an agent that does not answer a question is not sent a
    // command whose outcome nobody would then know.
    let mut connection = match Connection::open(door) {
        Ok(connection) => connection,
        Err(error) => return not_frozen(vm, wish, error.text()),
    };
    match connection.is_frozen() {
        Ok(true) => Ok(Outcome::Frozen(Frozen {
            vm: vm.clone(),
            door: door.clone(),
            connection,
            since: Instant::now(),
            watchdog: None,
        })),
        Ok(false) => match freeze_now(vm, door, connection, mountpoints, note)? {
            Ok(frozen) => Ok(Outcome::Frozen(frozen)),
            Err(because) => not_frozen(vm, wish, because),
        },
        Err(error) => not_frozen(vm, wish, error.text()),
    }
}

fn not_frozen(vm: &VmRef, wish: Quiesce, because: String) -> Result<Outcome, HypervisorError> {
    match wish {
        Quiesce::Require => Err(HypervisorError::new(
            ErrorKind::CannotFreeze,
            format!("cannot freeze the file systems of VM `{}`", vm.name),
        )
        .because(because)
        .hint("is the guest agent (qemu-guest-agent) installed and running in the guest?")),
        Quiesce::Try | Quiesce::Off => Ok(Outcome::Not(Some(because))),
    }
}

/// Sends the command. The inner error says why nothing is frozen; the outer
/// one, that it may be and could not be undone.
fn freeze_now(
    vm: &VmRef,
    door: &Door,
    connection: Connection,
    mountpoints: &[String],
    note: &dyn Fn() -> Result<(), HypervisorError>,
) -> Result<Result<Frozen, String>, HypervisorError> {
    let watchdog = Watchdog::start(vm, door, &connection)?;
    // Before the guest is: a session killed in between is known to have meant it.
    note()?;
    let mut frozen = Frozen {
        vm: vm.clone(),
        door: door.clone(),
        connection,
        since: Instant::now(),
        watchdog: Some(watchdog),
    };
    let asked = if mountpoints.is_empty() {
        frozen.connection.ask(FREEZE, json!({}), ANSWER_LIMIT)
    } else {
        let arguments = json!({"mountpoints": mountpoints});
        frozen.connection.ask(FREEZE_LIST, arguments, ANSWER_LIMIT)
    };
    let because = match asked.map(|count| count.as_i64().unwrap_or_default()) {
        Ok(count) if count > 0 => return Ok(Ok(frozen)),
        Ok(_) => "the agent found no file system to freeze".to_owned(),
        // Some may be frozen, or will be when a late agent gets to it.
        Err(error) => error.text(),
    };
    frozen.thaw().map(|_| Err(because))
}

impl Frozen {
    /// Asks whether the guest is frozen now. Asked after the point in time was
    /// taken, a yes proves that it was frozen all the time.
    pub(super) fn holds(&mut self) -> bool {
        self.connection.is_frozen() == Ok(true)
    }

    /// Thaws, makes sure of it, and returns how long the guest was frozen.
    pub(super) fn thaw(mut self) -> Result<Duration, HypervisorError> {
        self.thaw_now()
    }

    fn thaw_now(&mut self) -> Result<Duration, HypervisorError> {
        let Some(watchdog) = self.watchdog.take() else {
            return Ok(self.since.elapsed());
        };
        let thawed = thaw_until_sure(Some(&mut self.connection), &self.door);
        let elapsed = self.since.elapsed();
        // Only now: until here it would have stepped in, and if it has, the
        // guest was frozen no longer than that.
        let elapsed = watchdog
            .stop()
            .map_or(elapsed, |stepped_in| elapsed.min(stepped_in));
        thawed.map(|()| elapsed).map_err(|because| {
            HypervisorError::new(
                ErrorKind::CannotFreeze,
                format!(
                    "cannot thaw the file systems of VM `{}`: it may still be frozen",
                    self.vm.name
                ),
            )
            .because(because)
            .hint("send `{\"execute\":\"guest-fsfreeze-thaw\"}` to its agent at once, or restart that agent")
        })
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // Reached only when something else failed, which is what gets reported.
        drop(self.thaw_now());
    }
}

/// Cuts the connection and thaws over one of its own when that takes too long.
struct Watchdog {
    stop: Sender<()>,
    thread: JoinHandle<Option<Duration>>,
}

impl Watchdog {
    fn start(vm: &VmRef, door: &Door, watched: &Connection) -> Result<Self, HypervisorError> {
        let failed = |error: std::io::Error| {
            HypervisorError::new(
                ErrorKind::CannotFreeze,
                format!(
                    "cannot watch over the frozen file systems of VM `{}`",
                    vm.name
                ),
            )
            .because(error.to_string())
        };
        let (stop, stopped) = mpsc::channel();
        let watched = watched.stream.try_clone().map_err(failed)?;
        let door = door.clone();
        let thread = std::thread::Builder::new()
            .name("thaw-watchdog".to_owned())
            .spawn(move || {
                let since = Instant::now();
                if stopped.recv_timeout(FREEZE_DEADLINE) != Err(RecvTimeoutError::Timeout) {
                    return None;
                }
                // The agent's socket serves one at a time.
                watched.shut_down();
                // The first connection's owner tries too and reports the outcome.
                let thawed = thaw_until_sure(None, &door);
                thawed.ok().map(|()| since.elapsed())
            })
            .map_err(failed)?;
        Ok(Self { stop, thread })
    }

    /// Ends it: at once, or when its own attempts are over. Returns when it
    /// thawed the guest, counted from its start.
    fn stop(self) -> Option<Duration> {
        drop(self.stop);
        self.thread.join().ok().flatten()
    }
}

/// Thaws a guest that a dead session froze. Returns whether it was frozen.
pub(super) fn thaw_after(door: &Door) -> Result<bool, String> {
    let mut connection = Connection::open(door).map_err(AgentError::text)?;
    if !connection.is_frozen().map_err(AgentError::text)? {
        return Ok(false);
    }
    thaw_until_sure(Some(&mut connection), door).map(|()| true)
}

/// Thaws until the agent says that nothing is frozen, or the VM is gone.
fn thaw_until_sure(first: Option<&mut Connection>, door: &Door) -> Result<(), String> {
    let since = Instant::now();
    let mut tried = first.map(thaw_once);
    loop {
        let outcome = tried
            .take()
            .unwrap_or_else(|| Connection::open(door).and_then(|mut anew| thaw_once(&mut anew)));
        let because = match outcome {
            // A VM that has ended is not frozen.
            Ok(()) | Err(AgentError::Gone(_)) => return Ok(()),
            Err(AgentError::Failed(because)) => because,
        };
        if since.elapsed() > patience(THAW_DEADLINE) {
            return Err(because);
        }
        std::thread::sleep(THAW_INTERVAL);
    }
}

fn thaw_once(connection: &mut Connection) -> Result<(), AgentError> {
    let thawed = connection.ask(THAW, json!({}), ANSWER_LIMIT);
    if connection.is_frozen()? {
        // Not gone, whatever became of the first question.
        let because = thawed.map_or_else(AgentError::text, |_| {
            "the agent says that it is still frozen".to_owned()
        });
        return Err(AgentError::Failed(because));
    }
    Ok(())
}

/// A connection to an agent that has shown that it is there.
struct Connection {
    stream: Stream,
    splitter: Splitter,
    /// A question was not answered: the next answer is not to the next one.
    is_out_of_step: bool,
}

impl Connection {
    fn open(door: &Door) -> Result<Self, AgentError> {
        let stream = door
            .address
            .connect(SYNC_LIMIT)
            .map_err(|error| match error {
                QmpError::Nobody(text) if (door.is_over)() => AgentError::Gone(text),
                error => AgentError::Failed(error.to_string()),
            })?;
        let mut connection = Self {
            stream,
            splitter: Splitter::default(),
            is_out_of_step: false,
        };
        // The agent takes 63 bits.
        let random = u64::from_be_bytes(*ClaimId::random().as_bytes());
        let number = random.checked_shr(2).unwrap_or_default();
        // The byte ends whatever another client had begun to say.
        let ask = json!({"execute": "guest-sync-delimited", "arguments": {"id": number}});
        let mut text = vec![0xff];
        text.extend(format!("{ask}\n").into_bytes());
        let since = Instant::now();
        connection.say(&text)?;
        loop {
            let answer = connection.next(since, SYNC_LIMIT)?;
            if answer.get("return").and_then(Value::as_u64) == Some(number) {
                return Ok(connection);
            }
        }
    }

    fn is_frozen(&mut self) -> Result<bool, AgentError> {
        match self.ask(STATUS, json!({}), ANSWER_LIMIT)?.as_str() {
            Some("thawed") => Ok(false),
            Some("frozen") => Ok(true),
            _ => Err(AgentError::Failed(
                "the agent says neither that it is frozen nor that it is not".to_owned(),
            )),
        }
    }

    #[expect(
        clippy::needless_pass_by_value,
        reason = "arguments are made for the call"
    )]
    fn ask(
        &mut self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, AgentError> {
        if self.is_out_of_step {
            let text = "the agent did not answer an earlier question".to_owned();
            return Err(AgentError::Failed(text));
        }
        let since = Instant::now();
        self.is_out_of_step = true;
        self.say(format!("{}\n", json!({"execute": command, "arguments": arguments})).as_bytes())?;
        let mut answer = self.next(since, limit)?;
        self.is_out_of_step = false;
        if let Some(error) = answer.get("error") {
            return Err(AgentError::Failed(match refusal(error) {
                QmpError::Refused { desc, .. } => format!("the guest agent answered: {desc}"),
                error => error.to_string(),
            }));
        }
        let answer = answer.get_mut("return").map(Value::take);
        answer.ok_or_else(|| AgentError::Failed("the agent's answer is none".to_owned()))
    }

    fn say(&mut self, bytes: &[u8]) -> Result<(), AgentError> {
        let failed = |error: std::io::Error| AgentError::Failed(error.to_string());
        self.stream
            .set_limits(None, Some(SYNC_LIMIT))
            .map_err(failed)?;
        (&self.stream).write_all(bytes).map_err(failed)
    }

    /// Waits for the next answer.
    fn next(&mut self, since: Instant, limit: Duration) -> Result<Value, AgentError> {
        let failed = |text: &str| AgentError::Failed(text.to_owned());
        let mut buffer = [0_u8; 4096];
        loop {
            let left = limit.saturating_sub(since.elapsed());
            if left.is_zero() {
                return Err(failed("the guest agent does not answer"));
            }
            self.stream
                .set_limits(Some(left), Some(SYNC_LIMIT))
                .map_err(|error| failed(&error.to_string()))?;
            let mut reading = &self.stream;
            let count = match reading.read(&mut buffer) {
                Ok(0) => return Err(failed("the guest agent's socket was closed")),
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(failed(&error.to_string())),
            };
            let messages = self
                .splitter
                .take(buffer.get(..count).unwrap_or_default())
                .map_err(|error| failed(&error.to_string()))?;
            // One question, one answer: more than that is what an earlier client
            // did not read, and the last one is ours.
            if let Some(last) = messages.last() {
                return serde_json::from_slice(last).map_err(|error| failed(&error.to_string()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::Path;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn vm() -> VmRef {
        VmRef {
            name: "web01".to_owned(),
            uuid: None,
        }
    }

    /// An agent that serves one client after the other. `answer` returns what it
    /// says to a command.
    fn agent(path: &Path, answer: impl Fn(&str) -> Option<String> + Send + Sync + 'static) -> Door {
        let listener = UnixListener::bind(path).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                serve(&stream, &answer);
            }
        });
        door(path, false)
    }

    fn door(path: &Path, is_over: bool) -> Door {
        Door {
            address: Address::Unix(path.to_path_buf()),
            is_over: Arc::new(move || is_over),
        }
    }

    fn serve(stream: &UnixStream, answer: &impl Fn(&str) -> Option<String>) {
        // What an earlier client did not read, the last of it in part.
        let mut writing = stream;
        let _gone = writing.write_all(b"\xff{\"return\": 5}\n{\"return\": \"thaw");
        for line in BufReader::new(stream).split(b'\n') {
            let Ok(line) = line else { return };
            let text = line.strip_prefix(&[0xff]).unwrap_or(&line);
            let command: Value = serde_json::from_slice(text).unwrap();
            let name = command["execute"].as_str().unwrap();
            let said = if name == "guest-sync-delimited" {
                let number = &command["arguments"]["id"];
                let _gone = writing.write_all(&[0xff]);
                Some(format!("{{\"return\": {number}}}"))
            } else {
                answer(name)
            };
            if let Some(said) = said {
                let _gone = writing.write_all(format!("{said}\n").as_bytes());
            }
        }
    }

    fn freeze_it(door: &Door, wish: Quiesce) -> Result<Outcome, HypervisorError> {
        freeze(&vm(), Some(door), wish, &[], &|| Ok(()))
    }

    #[test]
    fn what_an_earlier_client_did_not_read_is_no_answer() {
        let dir = tempfile::tempdir().unwrap();
        let address = agent(&dir.path().join("a"), |command| {
            (command == STATUS).then(|| "{\"return\": \"frozen\"}".to_owned())
        });
        let mut connection = Connection::open(&address).unwrap();
        assert_eq!(connection.is_frozen(), Ok(true));
        drop(connection);
        assert_eq!(state(Some(&address)), Agent::Connected);
        assert_eq!(state(None), Agent::Missing);
    }

    #[test]
    fn an_answer_to_somebody_elses_number_is_no_sign_of_life() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            BufReader::new(&stream)
                .read_until(b'\n', &mut Vec::new())
                .unwrap();
            (&stream).write_all(b"\xff{\"return\": 5}\n").unwrap();
        });
        assert_eq!(state(Some(&door(&path, false))), Agent::Silent);
        thread.join().unwrap();
    }

    #[test]
    fn an_agent_that_can_freeze_nothing_is_thawed_and_the_guest_counts_as_not_frozen() {
        let dir = tempfile::tempdir().unwrap();
        let thawed = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&thawed);
        let address = agent(&dir.path().join("a"), move |command| {
            told.fetch_or(command == THAW, Ordering::Relaxed);
            Some(match command {
                STATUS => "{\"return\": \"thawed\"}".to_owned(),
                FREEZE => "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}".to_owned(),
                _ => "{\"return\": 0}".to_owned(),
            })
        });
        let Outcome::Not(Some(because)) = freeze_it(&address, Quiesce::Try).unwrap() else {
            panic!("it is not frozen");
        };
        assert!(because.contains("no"), "{because}");
        assert!(thawed.load(Ordering::Relaxed));
        let Err(error) = freeze_it(&address, Quiesce::Require) else {
            panic!("it cannot be frozen");
        };
        assert_eq!(error.kind, ErrorKind::CannotFreeze);
    }

    #[test]
    fn a_guest_that_somebody_else_froze_stays_frozen() {
        let dir = tempfile::tempdir().unwrap();
        let thawed = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&thawed);
        let address = agent(&dir.path().join("a"), move |command| {
            told.fetch_or(command == THAW, Ordering::Relaxed);
            Some("{\"return\": \"frozen\"}".to_owned())
        });
        let Outcome::Frozen(mut frozen) = freeze_it(&address, Quiesce::Try).unwrap() else {
            panic!("it is frozen");
        };
        assert!(frozen.holds());
        frozen.thaw().unwrap();
        assert!(!thawed.load(Ordering::Relaxed));
    }

    #[test]
    fn without_an_agent_it_is_said_how_to_name_one() {
        let Outcome::Not(Some(because)) =
            freeze(&vm(), None, Quiesce::Try, &[], &|| Ok(())).unwrap()
        else {
            panic!("nobody froze it");
        };
        assert!(because.contains("agent="));
        let dir = tempfile::tempdir().unwrap();
        let nobody = door(&dir.path().join("none"), false);
        assert_eq!(state(Some(&nobody)), Agent::Silent);
        assert!(freeze_it(&nobody, Quiesce::Require).is_err());
    }

    /// A guest counts as thawed when it says so, or when it is no more.
    #[test]
    fn only_a_vm_that_has_ended_is_not_frozen_where_no_agent_is_reached() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("none");
        let refused = dir.path().join("refused");
        drop(UnixListener::bind(&refused).unwrap());
        let broken = dir.path().join("loop");
        std::os::unix::fs::symlink(&broken, &broken).unwrap();
        for (path, is_over, is_gone) in [
            (&missing, true, true),
            (&refused, true, true),
            (&missing, false, false),
            (&refused, false, false),
            // It may be there, and listen.
            (&broken, true, false),
        ] {
            let error = Connection::open(&door(path, is_over)).err().unwrap();
            let found = matches!(error, AgentError::Gone(_));
            assert_eq!(found, is_gone, "{error:?}");
        }
        assert_eq!(thaw_until_sure(None, &door(&missing, true)), Ok(()));
    }

    #[test]
    fn a_tcp_port_where_nobody_listens_says_nothing_about_the_guest() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::Tcp(free.local_addr().unwrap());
        drop(free);
        let of = |is_over: bool| Door {
            address: address.clone(),
            is_over: Arc::new(move || is_over),
        };
        let living = Connection::open(&of(false)).err().unwrap();
        assert!(matches!(living, AgentError::Failed(_)), "{living:?}");
        let dead = Connection::open(&of(true)).err().unwrap();
        assert!(matches!(dead, AgentError::Gone(_)), "{dead:?}");
    }
}

#[cfg(test)]
mod with_a_real_guest {
    use highwater_testkit::{BareLab, DiskSpec, MIB, guest};

    use super::*;

    /// The one that froze it does nothing, as if its QEMU hung.
    #[test]
    fn a_guest_is_thawed_after_five_seconds_whatever_the_first_connection_waits_for_over_qmp() {
        let lab = BareLab::start().unwrap();
        guest::make_ext4(&lab.path("files.raw"), 16 * MIB).unwrap();
        let files = DiskSpec::existing("vda", &lab.path("files.raw"), "raw");
        let vm = lab.vm("web01").disk(files).guest().start().unwrap();
        let inside = vm.guest().unwrap();
        inside.wait_for_agent().unwrap();
        let door = Door {
            address: Address::Unix(vm.agent_socket()),
            is_over: Arc::new(|| false),
        };
        let name = VmRef {
            name: "web01".to_owned(),
            uuid: None,
        };
        let freeze = || freeze(&name, Some(&door), Quiesce::Require, &[], &|| Ok(()));
        let Outcome::Frozen(mut frozen) = freeze().unwrap() else {
            panic!("not frozen")
        };
        assert!(frozen.holds());
        assert!(frozen.thaw().unwrap() < FREEZE_DEADLINE);
        assert_eq!(thaw_after(&door), Ok(false));

        let Outcome::Frozen(mut frozen) = freeze().unwrap() else {
            panic!("not frozen")
        };
        // Until the watchdog cuts the connection and has thawed the guest.
        while frozen.holds() {
            assert!(frozen.since.elapsed() < FREEZE_DEADLINE * 2);
            std::thread::sleep(Duration::from_millis(50));
        }
        let elapsed = frozen.thaw().unwrap();
        assert!(
            elapsed > FREEZE_DEADLINE && elapsed < FREEZE_DEADLINE * 2,
            "{elapsed:?}"
        );

        // One that died left it frozen.
        let Outcome::Frozen(frozen) = freeze().unwrap() else {
            panic!("not frozen")
        };
        frozen.connection.stream.shut_down();
        assert_eq!(thaw_after(&door), Ok(true));
        assert_eq!(thaw_after(&door), Ok(false));
    }
}
