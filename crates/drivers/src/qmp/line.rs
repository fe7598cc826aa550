//! The one connection that all in this process share, made anew when it ends.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use highwater_hypervisor::{ErrorKind, HypervisorError};

use super::address::Address;
use super::client::{Client, GREETING_LIMIT};
use super::error::{QmpError, explain};
use super::process;
use crate::host::QemuProcess;

/// What a process of ours is called that has a monitor.
pub(super) const GUARD: &str = "highwater-guard";
/// How long it is waited for, as for a VM's lock: it may be tidying up after a
/// backup that was killed.
const GUARD_PATIENCE: Duration = Duration::from_secs(30);

/// Whoever wants to ask QEMU something asks for its [`Client`] each time.
#[derive(Debug)]
pub(super) struct Line {
    address: Address,
    current: Mutex<Connected>,
}

#[derive(Debug, Clone)]
struct Connected {
    client: Client,
    /// The QEMU at its other end, if it can be told.
    process: Option<QemuProcess>,
}

impl Line {
    pub(super) fn open(address: Address) -> Result<Self, HypervisorError> {
        let connected = dial(&address)?;
        Ok(Self {
            address,
            current: Mutex::new(connected),
        })
    }

    /// Returns the connection, made anew if it has ended: a QEMU that was
    /// restarted listens at the same place.
    pub(super) fn client(&self) -> Result<Client, HypervisorError> {
        self.connected().map(|connected| connected.client)
    }

    /// Returns the QEMU that is there now, if it can be told which it is.
    pub(super) fn process(&self) -> Option<QemuProcess> {
        self.connected().ok()?.process
    }

    /// Returns whether the QEMU that was last at the other end is known to have
    /// ended.
    pub(super) fn is_over(&self) -> bool {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let process = current.process.as_ref();
        process.is_some_and(|process| !crate::host::is_alive(&process.identity))
    }

    fn connected(&self) -> Result<Connected, HypervisorError> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.client.is_closed() {
            *current = dial(&self.address).map_err(away)?;
        }
        Ok(current.clone())
    }
}

/// A monitor that was ours, and that somebody got who waited for it, is away for
/// as long as he has it: a session is not given up for that, and its end is tried
/// until it is back.
fn away(mut error: HypervisorError) -> HypervisorError {
    if error.kind == ErrorKind::Busy {
        error.kind = ErrorKind::Unreachable;
    }
    error
}

fn dial(address: &Address) -> Result<Connected, HypervisorError> {
    let since = Instant::now();
    let mut was_unseen = false;
    let client = loop {
        let error = match Client::connect(address, GREETING_LIMIT) {
            Ok(client) => break client,
            Err(QmpError::Taken(_)) => {
                let holders = process::holders(address);
                // It may have let go in this very moment: then nobody is seen.
                let may_be_free = holders.is_empty() && !was_unseen;
                was_unseen = holders.is_empty();
                let is_ours = holders.contains(GUARD);
                if (is_ours || may_be_free) && since.elapsed() < GUARD_PATIENCE {
                    continue;
                }
                QmpError::Taken(holders)
            }
            Err(error) => error,
        };
        let message = format!("cannot connect to QEMU at `{address}`");
        return Err(explain(message, &error));
    };
    let process = process::behind(address, &client);
    Ok(Connected { client, process })
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_monitor_that_another_one_got_is_away_and_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let address = Address::Unix(path);
        let served = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            writeln!(stream, r#"{{"QMP":{{"version":{{}},"capabilities":[]}}}}"#).unwrap();
            let mut line = String::new();
            let mut reading = BufReader::new(&stream);
            reading.read_line(&mut line).unwrap();
            let asked: serde_json::Value = serde_json::from_str(&line).unwrap();
            writeln!(&stream, r#"{{"return":{{}},"id":{}}}"#, asked["id"]).unwrap();
            listener
        });
        let line = Line::open(address.clone()).unwrap();
        // From now on nobody is greeted.
        let _listener = served.join().unwrap();
        while !line.current.lock().unwrap().client.is_closed() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let error = line.client().unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unreachable, "{error:?}");
        let error = Line::open(address).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Busy, "{error:?}");
    }
}
