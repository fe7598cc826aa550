//! The one connection that all in this process share, made anew when it ends.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use highwater_hypervisor::HypervisorError;

use super::address::Address;
use super::client::{Client, GREETING_LIMIT};
use super::error::{QmpError, explain};
use super::process;
use crate::host::QemuProcess;

/// What a process of ours is called that has a monitor.
const GUARD: &str = "highwater-guard";
/// How long it is waited for: it may be tidying up after a backup that was
/// killed, for as long as its VM's lock is waited for otherwise.
const GUARD_PATIENCE: Duration = Duration::from_secs(25);

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

    fn connected(&self) -> Result<Connected, HypervisorError> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.client.is_closed() {
            *current = dial(&self.address)?;
        }
        Ok(current.clone())
    }
}

fn dial(address: &Address) -> Result<Connected, HypervisorError> {
    let since = Instant::now();
    let client = loop {
        let error = match Client::connect(address, GREETING_LIMIT) {
            Ok(client) => break client,
            Err(QmpError::Taken(_)) => {
                let holders = process::holders(address);
                if holders.contains(GUARD) && since.elapsed() < GUARD_PATIENCE {
                    continue;
                }
                QmpError::Taken(holders)
            }
            Err(error) => error,
        };
        let message = format!("cannot connect to QEMU at `{address}`");
        return Err(explain(message, &error));
    };
    let process = process::behind(address, client.stream());
    Ok(Connected { client, process })
}
