//! What a caller may choose about a connection.

use std::sync::Arc;
use std::time::Duration;

use crate::error::UsageError;
use crate::transport::TlsUpgrade;
use crate::wire::NBD_MAX_STRING;

/// Most metadata contexts of one connection; QEMU needs one per bitmap and two more.
pub(crate) const CONTEXTS_MAX: usize = 64;

/// How to connect, and how patient to be.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    /// Name of the export; empty means the server's default.
    pub export: String,
    /// Metadata contexts to ask for. Those the server does not have are absent
    /// from [`ExportInfo::contexts`](crate::ExportInfo::contexts), which is no
    /// error until somebody maps them.
    pub meta_contexts: Vec<String>,
    /// Whether to ask for extended headers (QEMU has them since 8.2).
    pub extended_headers: bool,
    /// How long opening the socket may take.
    pub connect_timeout: Duration,
    /// How long the whole handshake may take. A server at its limit of
    /// connections lets a further one wait here without a word.
    pub handshake_timeout: Duration,
    /// How long one wait for a completion may take in all, and one sending of a
    /// request. The time between calls does not count: a caller that is held
    /// up elsewhere finds its replies in the socket.
    pub reply_timeout: Duration,
    /// Most requests in flight. QEMU stops reading the socket at 16.
    pub in_flight_max: usize,
    /// Speak TLS through this; no TLS if `None`, and never silently.
    pub tls: Option<Arc<dyn TlsUpgrade>>,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            export: String::new(),
            meta_contexts: Vec::new(),
            extended_headers: true,
            connect_timeout: Duration::from_secs(10),
            handshake_timeout: Duration::from_secs(10),
            reply_timeout: Duration::from_mins(1),
            in_flight_max: 16,
            tls: None,
        }
    }
}

impl ConnectOptions {
    /// Returns the defaults for an export.
    pub fn for_export(export: impl Into<String>) -> Self {
        Self {
            export: export.into(),
            ..Self::default()
        }
    }

    /// Refuses names that the protocol cannot carry, before anything is sent.
    pub(crate) fn check(&self) -> Result<(), UsageError> {
        let names = self
            .meta_contexts
            .iter()
            .map(|name| ("a metadata context's name", name.len()));
        let names = std::iter::once(("the export's name", self.export.len())).chain(names);
        for (what, len) in names {
            if len > NBD_MAX_STRING {
                return Err(UsageError::NameTooLong {
                    what,
                    len,
                    max: NBD_MAX_STRING,
                });
            }
        }
        let (len, max) = (self.meta_contexts.len(), CONTEXTS_MAX);
        if len > max {
            return Err(UsageError::NameTooLong {
                what: "the list of contexts",
                len,
                max,
            });
        }
        Ok(())
    }
}
