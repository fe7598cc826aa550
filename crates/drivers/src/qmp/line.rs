//! The one connection that all in this process share, made anew when it ends.

use std::sync::{Mutex, PoisonError};

use highwater_hypervisor::HypervisorError;

use super::address::Address;
use super::client::{Client, GREETING_LIMIT};
use super::error::{QmpError, explain};
use super::process;
use crate::host::QemuProcess;

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
    let client = Client::connect(address, GREETING_LIMIT).map_err(|error| {
        let error = match error {
            QmpError::Taken(_) => QmpError::Taken(process::holders(address)),
            error => error,
        };
        explain(format!("cannot connect to QEMU at `{address}`"), &error)
    })?;
    let process = process::behind(address, client.stream());
    Ok(Connected { client, process })
}
