//! The connection to a monitor.
//!
//! ```text
//! connect -> greeting -> capabilities -> commands (numbered; several threads)
//!               |                            `-- a thread reads: answers, events
//!               `- none in time: another client has the monitor
//! ```
//!
//! A monitor serves one client at a time, so everybody in this process who has
//! something to ask shares one [`Client`]. Answers find their command by its
//! number; one that comes too late finds nobody, and is dropped.

use std::collections::{BTreeMap, VecDeque};
use std::io::{Read as _, Write as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::address::{Address, Stream};
use super::error::QmpError;
use super::wire::{self, Event, Message, Splitter};

/// How long a command may take. QEMU answers in milliseconds unless its storage
/// hangs, and then nothing can be done about it anyway.
pub(crate) const COMMAND_LIMIT: Duration = Duration::from_secs(30);
/// How long a monitor may take to greet: one that is free does so at once.
pub(crate) const GREETING_LIMIT: Duration = Duration::from_secs(5);
/// Events that are kept.
const EVENTS_MAX: usize = 256;
/// Read at once.
const READ_BYTES: usize = 64 << 10;

/// What may be of interest to a backup; a guest can cause others as often as it
/// likes (its clock, its serial ports, its balloon).
const NOTEWORTHY: [&str; 23] = [
    "BLOCK_EXPORT_DELETED",
    "BLOCK_IMAGE_CORRUPTED",
    "BLOCK_IO_ERROR",
    "BLOCK_JOB_CANCELLED",
    "BLOCK_JOB_COMPLETED",
    "BLOCK_JOB_ERROR",
    "BLOCK_JOB_PENDING",
    "BLOCK_JOB_READY",
    "BLOCK_WRITE_THRESHOLD",
    "DEVICE_DELETED",
    "GUEST_CRASHLOADED",
    "GUEST_PANICKED",
    "JOB_STATUS_CHANGE",
    "MIGRATION",
    "POWERDOWN",
    "QUORUM_FAILURE",
    "QUORUM_REPORT_BAD",
    "RESET",
    "RESUME",
    "SHUTDOWN",
    "STOP",
    "SUSPEND",
    "WAKEUP",
];

/// A connection to a monitor. Clones share it; it ends with the last one.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    connection: Arc<Connection>,
}

#[derive(Debug)]
struct Connection {
    stream: Stream,
    /// Whole commands only.
    writing: Mutex<()>,
    next_id: AtomicU64,
    shared: Arc<Shared>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Ends the thread that reads.
        self.stream.shut_down();
    }
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Noteworthy events, and the end of the connection.
    heard: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    /// Commands under way, and their answers as they come.
    commands: BTreeMap<u64, Option<Result<Value, QmpError>>>,
    events: VecDeque<Event>,
    end: Option<QmpError>,
}

/// What was heard since a connection was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Heard {
    /// The last noteworthy events, oldest first.
    pub(crate) events: Vec<Event>,
    /// How many there have been.
    pub(crate) count: u64,
}

impl Heard {
    /// Returns the events that came after so many.
    pub(crate) fn since(&self, count: u64) -> &[Event] {
        let new = usize::try_from(self.count.saturating_sub(count)).unwrap_or(usize::MAX);
        let from = self.events.len().saturating_sub(new);
        self.events.get(from..).unwrap_or_default()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A thread that panicked with it left it whole: no step can fail.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, why: QmpError) {
        self.lock().end.get_or_insert(why);
        self.heard.fetch_add(1, Ordering::Release);
        self.changed.notify_all();
    }
}

impl Client {
    /// Connects, and waits for the greeting no longer than the limit.
    pub(crate) fn connect(address: &Address, limit: Duration) -> Result<Self, QmpError> {
        let stream = address.connect(limit)?;
        let mut splitter = Splitter::default();
        await_greeting(&stream, &mut splitter, limit)?;
        let shared = Arc::new(Shared::default());
        let failed = |error: std::io::Error| QmpError::Unreachable(error.to_string());
        stream
            .set_limits(None, Some(COMMAND_LIMIT))
            .map_err(failed)?;
        let (reading, sink) = (stream.try_clone().map_err(failed)?, Arc::clone(&shared));
        std::thread::Builder::new()
            .name("qmp-reader".to_owned())
            .spawn(move || read_all(&reading, splitter, &sink))
            .map_err(failed)?;
        let client = Self {
            connection: Arc::new(Connection {
                stream,
                writing: Mutex::new(()),
                next_id: AtomicU64::new(1),
                shared,
            }),
        };
        client.run_within("qmp_capabilities", Value::Null, limit)?;
        Ok(client)
    }

    /// Carries out a command within [`COMMAND_LIMIT`].
    pub(crate) fn run(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.run_within(command, arguments, COMMAND_LIMIT)
    }

    /// Carries out a command. When it fails with anything but a refusal, nobody
    /// knows whether it was done.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "arguments are made for the call"
    )]
    pub(crate) fn run_within(
        &self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        let connection = &self.connection;
        let id = connection.next_id.fetch_add(1, Ordering::Relaxed);
        let text = wire::command(command, &arguments, id);
        {
            let mut state = connection.shared.lock();
            if let Some(end) = &state.end {
                return Err(end.clone());
            }
            state.commands.insert(id, None);
        }
        let written = {
            let _whole = connection
                .writing
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            (&connection.stream).write_all(&text)
        };
        if written.is_err() {
            // Half a command may be out: no other can follow it.
            connection.stream.shut_down();
            connection.shared.end(QmpError::Closed);
        }
        connection.wait(id, command, limit)
    }

    /// Returns what was heard.
    pub(crate) fn heard(&self) -> Heard {
        let state = self.connection.shared.lock();
        self.connection.heard(&state)
    }

    /// Returns a number that changes whenever something is heard. Asks nobody
    /// and waits for nobody.
    pub(crate) fn heard_count(&self) -> u64 {
        self.connection.shared.heard.load(Ordering::Acquire)
    }

    /// Returns whether the connection has ended.
    pub(crate) fn is_closed(&self) -> bool {
        self.connection.shared.lock().end.is_some()
    }

    /// The socket, to learn who is at its other end.
    pub(super) fn stream(&self) -> &Stream {
        &self.connection.stream
    }
}

impl Connection {
    fn wait(&self, id: u64, command: &str, limit: Duration) -> Result<Value, QmpError> {
        let since = Instant::now();
        let mut state = self.shared.lock();
        loop {
            if let Some(Some(_)) = state.commands.get(&id) {
                let answer = state.commands.remove(&id).flatten();
                return answer.unwrap_or(Err(QmpError::Closed));
            }
            if let Some(end) = state.end.clone() {
                state.commands.remove(&id);
                return Err(end);
            }
            let left = limit.saturating_sub(since.elapsed());
            if left.is_zero() {
                state.commands.remove(&id);
                return Err(QmpError::TimedOut(command.to_owned()));
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn heard(&self, state: &State) -> Heard {
        Heard {
            events: state.events.iter().cloned().collect(),
            count: self.shared.heard.load(Ordering::Acquire),
        }
    }
}

/// Waits for the greeting. Nothing is sent before: whoever is not a monitor
/// shall not be spoken to.
fn await_greeting(
    stream: &Stream,
    splitter: &mut Splitter,
    limit: Duration,
) -> Result<(), QmpError> {
    let since = Instant::now();
    let mut buffer = [0_u8; 4096];
    loop {
        let left = limit.saturating_sub(since.elapsed());
        if left.is_zero() {
            return Err(QmpError::Taken(String::new()));
        }
        stream
            .set_limits(Some(left), None)
            .map_err(|error| QmpError::Unreachable(error.to_string()))?;
        let mut reading = stream;
        let count = match reading.read(&mut buffer) {
            Ok(0) => return Err(QmpError::Closed),
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => return Err(QmpError::Closed),
        };
        let messages = splitter.take(buffer.get(..count).unwrap_or_default())?;
        // Nothing follows it before a command was sent.
        if let Some(first) = messages.first() {
            return match wire::message(first)? {
                Message::Greeting => Ok(()),
                _ => Err(QmpError::Malformed(
                    "it does not greet as a monitor of QEMU does".to_owned(),
                )),
            };
        }
    }
}

fn read_all(stream: &Stream, mut splitter: Splitter, shared: &Shared) {
    let mut buffer = vec![0_u8; READ_BYTES];
    loop {
        let mut reading = stream;
        let count = match reading.read(&mut buffer) {
            Ok(0) => return shared.end(QmpError::Closed),
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => return shared.end(QmpError::Closed),
        };
        let messages = splitter
            .take(buffer.get(..count).unwrap_or_default())
            .and_then(|messages| messages.iter().map(|it| wire::message(it)).collect());
        let messages: Vec<Message> = match messages {
            Ok(messages) => messages,
            Err(error) => {
                stream.shut_down();
                return shared.end(error);
            }
        };
        for message in messages {
            file(message, shared);
        }
        shared.changed.notify_all();
    }
}

/// Puts a message where it belongs.
fn file(message: Message, shared: &Shared) {
    match message {
        Message::Answer(id, answer) => {
            // Nobody waits any more for one that is not there.
            if let Some(place) = shared.lock().commands.get_mut(&id) {
                *place = Some(answer);
            }
        }
        Message::Event(event) if NOTEWORTHY.contains(&event.name.as_str()) => {
            let mut state = shared.lock();
            if state.events.len() >= EVENTS_MAX {
                state.events.pop_front();
            }
            state.events.push_back(event);
            shared.heard.fetch_add(1, Ordering::Release);
        }
        Message::Event(_) | Message::Greeting | Message::Other => {}
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::Path;
    use std::thread::JoinHandle;

    use super::*;

    /// Answers each command with what `answers` says to it.
    fn monitor(
        path: &Path,
        answers: impl Fn(&Value) -> Vec<String> + Send + 'static,
    ) -> (Address, JoinHandle<()>) {
        let listener = UnixListener::bind(path).unwrap();
        let thread = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            say(&stream, r#"{"QMP":{"version":{},"capabilities":[]}}"#);
            for line in BufReader::new(&stream).lines() {
                let Ok(line) = line else { return };
                let command: Value = serde_json::from_str(&line).unwrap();
                for answer in answers(&command) {
                    say(&stream, &answer);
                }
            }
        });
        (Address::Unix(path.to_path_buf()), thread)
    }

    fn say(mut stream: &UnixStream, text: &str) {
        let _gone = stream.write_all(format!("{text}\r\n").as_bytes());
    }

    fn done(command: &Value) -> String {
        format!(
            r#"{{"return":{{"did":{}}},"id":{}}}"#,
            command["execute"], command["id"]
        )
    }

    const LIMIT: Duration = Duration::from_secs(10);

    #[test]
    fn answers_find_their_command_whatever_comes_between() {
        let dir = tempfile::tempdir().unwrap();
        let (address, thread) = monitor(&dir.path().join("s"), |command| {
            let stray = r#"{"return":{},"id":999}"#.to_owned();
            let event = r#"{"event":"STOP","timestamp":{}}"#.to_owned();
            let chatter = r#"{"event":"RTC_CHANGE","data":{"offset":1},"timestamp":{}}"#.to_owned();
            vec![stray, event, chatter, done(command)]
        });
        let client = Client::connect(&address, LIMIT).unwrap();
        let threads: Vec<_> = (0..8)
            .map(|n| {
                let client = client.clone();
                std::thread::spawn(move || {
                    let name = format!("command-{n}");
                    assert_eq!(client.run(&name, Value::Null).unwrap()["did"], name);
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        // Each was read before the answer that came after it.
        assert_eq!(client.heard().count, 9);
        assert!(
            client
                .heard()
                .events
                .iter()
                .all(|event| event.name == "STOP")
        );
        drop(client);
        thread.join().unwrap();
    }

    #[test]
    fn a_command_without_an_answer_ends_in_time_and_so_does_a_closed_connection() {
        let dir = tempfile::tempdir().unwrap();
        let (address, thread) = monitor(&dir.path().join("s"), |command| match command["execute"]
            .as_str()
            .unwrap()
        {
            "silent" => Vec::new(),
            "garbage" => vec!["}{".to_owned()],
            _ => vec![done(command)],
        });
        let client = Client::connect(&address, LIMIT).unwrap();
        let silent = client.run_within("silent", Value::Null, Duration::from_millis(50));
        assert_eq!(silent, Err(QmpError::TimedOut("silent".to_owned())));
        assert!(client.run("next", Value::Null).is_ok());
        assert!(!client.is_closed());
        let garbage = client.run("garbage", Value::Null);
        assert!(
            matches!(garbage, Err(QmpError::Malformed(_))),
            "{garbage:?}"
        );
        assert!(client.run("after", Value::Null).is_err());
        assert!(client.is_closed());
        thread.join().unwrap();
    }

    #[test]
    fn a_monitor_that_does_not_greet_is_taken_even_if_it_takes_no_connection() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _listener = UnixListener::bind(&path).unwrap();
        let address = Address::Unix(path.clone());
        let limit = Duration::from_millis(50);
        let error = Client::connect(&address, limit).unwrap_err();
        assert_eq!(error, QmpError::Taken(String::new()));
        // One more than it has room for.
        let _waiting: Vec<_> = (0..4096)
            .map_while(|_| address.connect(Duration::ZERO).ok())
            .collect();
        let error = Client::connect(&address, limit).unwrap_err();
        assert_eq!(error, QmpError::Taken(String::new()));
    }

    #[test]
    fn who_is_no_monitor_is_told_from_one() {
        let dir = tempfile::tempdir().unwrap();
        for (n, said) in ["HTTP/1.1 400 Bad Request", r#"{"return":{}}"#]
            .into_iter()
            .enumerate()
        {
            let path = dir.path().join(n.to_string());
            let listener = UnixListener::bind(&path).unwrap();
            let thread = std::thread::spawn(move || say(&listener.accept().unwrap().0, said));
            let error = Client::connect(&Address::Unix(path), LIMIT).unwrap_err();
            assert!(matches!(error, QmpError::Malformed(_)), "{error:?}");
            thread.join().unwrap();
        }
        let error = Client::connect(&Address::Unix(dir.path().join("none")), LIMIT).unwrap_err();
        assert!(matches!(error, QmpError::Nobody(_)), "{error:?}");
    }
}
