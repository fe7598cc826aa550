//! What a `qmp:` URI says.

use std::collections::BTreeMap;
use std::path::PathBuf;

use highwater_hypervisor::{ErrorKind, HypervisorError};

use super::address::Address;

/// Everything that is said about a VM beside what QEMU tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) uri: String,
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
    pub(super) fn parse(uri: &str) -> Result<Self, HypervisorError> {
        let refused = |because: String| {
            HypervisorError::new(
                ErrorKind::Unreachable,
                format!("cannot use connection `{uri}`"),
            )
            .because(because)
            .hint("use `qmp:/path/to.sock` or `qmp:tcp:127.0.0.1:PORT`")
        };
        let body = uri
            .strip_prefix("qmp:")
            .ok_or_else(|| refused("it does not begin with `qmp:`".to_owned()))?;
        let (body, query) = body.split_once('?').unwrap_or((body, ""));
        let body = decoded(body).map_err(&refused)?;
        let mut given = BTreeMap::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = decoded(value).map_err(&refused)?;
            if given.insert(key.to_owned(), value).is_some() {
                return Err(refused(format!("`{key}` is given twice")));
            }
        }
        let mut take = |key: &str| given.remove(key).filter(|value| !value.is_empty());
        let options = Self {
            uri: uri.to_owned(),
            monitor: Address::parse(&body).map_err(|why| refused(format!("`{body}`: {why}")))?,
            agent: take("agent")
                .map(|text| Address::parse(&text).map_err(|why| refused(format!("agent: {why}"))))
                .transpose()?,
            name: take("name"),
            uuid: take("uuid")
                .map(|text| uuid(&text).ok_or_else(|| refused(format!("`{text}` is no UUID"))))
                .transpose()?,
            config: take("config").map(PathBuf::from),
        };
        match given.keys().next() {
            Some(unknown) => Err(refused(format!("`{unknown}` means nothing here"))),
            None => Ok(options),
        }
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

fn decoded(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let (byte, tail) = match (first, tail) {
            (b'%', [high, low, tail @ ..]) => {
                let digits = [*high, *low];
                let digits = str::from_utf8(&digits).unwrap_or_default();
                let byte = u8::from_str_radix(digits, 16)
                    .map_err(|_| format!("`%{digits}` is no byte"))?;
                (byte, tail)
            }
            (b'%', _) => return Err("`%` at its end".to_owned()),
            (byte, tail) => (*byte, tail),
        };
        bytes.push(byte);
        rest = tail;
    }
    String::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_owned())
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
            "qmp:rel",
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
