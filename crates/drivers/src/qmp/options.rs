//! What a `qmp:` URI says.

use std::path::PathBuf;

use highwater_hypervisor::{ErrorKind, HypervisorError};

use super::address::Address;
use crate::uri::Uri;

/// Everything that is said about a VM beside what QEMU tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) monitor: Address,
    /// Where the guest agent listens, if it may be asked.
    pub(super) agent: Option<Address>,
    /// The VM's name, where QEMU has none or another.
    pub(super) name: Option<String>,
    /// Likewise its UUID.
    pub(super) uuid: Option<String>,
    /// A file that is kept as the VM's definition.
    pub(super) config: Option<PathBuf>,
}

impl Options {
    pub(super) fn parse(text: &str) -> Result<Self, HypervisorError> {
        let refused = |because: String| {
            HypervisorError::new(
                ErrorKind::Unreachable,
                format!("cannot use connection `{text}`"),
            )
            .because(because)
            .hint("use `qmp:/path/to.sock` or `qmp:tcp:127.0.0.1:PORT`")
        };
        let uri = Uri::parse(text)?;
        if uri.scheme() != "qmp" {
            return Err(refused("it does not begin with `qmp:`".to_owned()));
        }
        uri.expect_params(&["name", "uuid", "agent", "config"])?;
        let body = uri.body()?;
        let given = |key: &str| uri.params.get(key).filter(|value| !value.is_empty());
        let address =
            |text: &str| Address::parse(text).map_err(|why| refused(format!("`{text}`: {why}")));
        Ok(Self {
            monitor: address(&body)?,
            agent: given("agent").map(|text| address(text)).transpose()?,
            name: given("name").cloned(),
            uuid: given("uuid")
                .map(|text| uuid(text).ok_or_else(|| refused(format!("`{text}` is no UUID"))))
                .transpose()?,
            config: given("config").map(PathBuf::from),
        })
    }
}

/// Returns a UUID as libvirt spells it; none for one of zeroes.
pub(super) fn uuid(text: &str) -> Option<String> {
    let digits: String = text
        .chars()
        .filter(|letter| *letter != '-')
        .map(|letter| letter.to_ascii_lowercase())
        .collect();
    let is_one = digits.len() == 32
        && digits.bytes().all(|it| it.is_ascii_hexdigit())
        && digits.bytes().any(|it| it != b'0');
    if !is_one {
        return None;
    }
    let part = |from: usize, to: usize| digits.get(from..to).unwrap_or_default();
    Some(format!(
        "{}-{}-{}-{}-{}",
        part(0, 8),
        part(8, 12),
        part(12, 16),
        part(16, 20),
        part(20, 32)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_says_where_and_who() {
        let options = Options::parse(
            "qmp:/a%3f/b.sock?name=web%2601&uuid=6F0AB0F5-0000-0000-0000-000000000001&agent=/g",
        )
        .unwrap();
        assert_eq!(options.monitor.to_string(), "/a?/b.sock");
        assert_eq!(options.name.as_deref(), Some("web&01"));
        assert_eq!(
            options.uuid.as_deref(),
            Some("6f0ab0f5-0000-0000-0000-000000000001")
        );
        assert!(options.agent.is_some());
        for bad in [
            "qmp:",
            "qmp:/s?nam=x",
            "qmp:/s?name=a&name=b",
            "qmp:/s?uuid=00000000-0000-0000-0000-000000000000",
            "qmp:/s?name=%zz",
            "qmp:tcp:10.0.0.1:1",
        ] {
            assert!(Options::parse(bad).is_err(), "{bad}");
        }
    }
}
