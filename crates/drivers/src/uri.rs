//! Connection URIs that are not libvirt's: `qmp:` and `image:`.
//!
//! ```text
//! qmp:/run/vm/qmp.sock?name=web01&agent=/run/vm/qga.sock
//! image:/images/a.qcow2,data=/images/b.raw?name=web01
//! ```
//!
//! After the scheme come a body and, after `?`, parameters. `%XX` stands for a
//! byte that would mean something else there.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use highwater_hypervisor::{ErrorKind, HypervisorError};

/// Parameters of both schemes; each may take fewer.
pub const NAME: &str = "name";

/// Characters that mean something in a URI of ours, and are so written in others'
/// way.
const SPECIAL: [char; 6] = ['%', '?', '&', '=', ',', '#'];

/// A URI in its parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uri {
    scheme: String,
    body: String,
    /// What stands after `?`, decoded.
    pub params: BTreeMap<String, String>,
}

impl Uri {
    /// Takes a URI apart.
    pub fn parse(text: &str) -> Result<Self, HypervisorError> {
        let wrong = |because: &str| wrong(text, because);
        let (scheme, rest) = text
            .split_once(':')
            .ok_or_else(|| wrong("it has no scheme, as `qmp:` or `image:`"))?;
        let (body, query) = rest.split_once('?').unwrap_or((rest, ""));
        if body.is_empty() {
            return Err(wrong("nothing follows the scheme"));
        }
        let mut params = BTreeMap::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair
                .split_once('=')
                .ok_or_else(|| wrong("a parameter has no value"))?;
            let value = decode(value).ok_or_else(|| wrong("`%` is not followed by a byte"))?;
            if params.insert(key.to_owned(), value).is_some() {
                return Err(wrong("a parameter is there twice"));
            }
        }
        Ok(Self {
            scheme: scheme.to_owned(),
            body: body.to_owned(),
            params,
        })
    }

    /// Returns what stands before the first colon.
    pub fn scheme(&self) -> &str {
        &self.scheme
    }

    /// Returns the body as one text.
    pub fn body(&self) -> Result<String, HypervisorError> {
        self.decoded(&self.body)
    }

    /// Returns the body as a list: each part with its name, where it has one.
    pub fn list(&self) -> Result<Vec<(Option<String>, String)>, HypervisorError> {
        self.body
            .split(',')
            .map(|part| match part.split_once('=') {
                Some((name, value)) => Ok((Some(self.decoded(name)?), self.decoded(value)?)),
                None => Ok((None, self.decoded(part)?)),
            })
            .collect()
    }

    /// Fails if there is a parameter other than `known`.
    pub fn expect_params(&self, known: &[&str]) -> Result<(), HypervisorError> {
        match self
            .params
            .keys()
            .find(|key| !known.contains(&key.as_str()))
        {
            None => Ok(()),
            Some(key) => Err(wrong(
                &format!("{}:{}", self.scheme, self.body),
                &format!("`{key}` is none of its parameters: {}", known.join(", ")),
            )),
        }
    }

    fn decoded(&self, text: &str) -> Result<String, HypervisorError> {
        decode(text).ok_or_else(|| {
            wrong(
                &format!("{}:{}", self.scheme, self.body),
                "`%` is not followed by a byte",
            )
        })
    }
}

/// Says in a URI of ours what the VM is called. `None` if it is not one of ours,
/// or says so already.
pub fn with_name(uri: &str, name: &str) -> Option<String> {
    let parsed = Uri::parse(uri).ok()?;
    let takes_names = ["qmp", "image"].contains(&parsed.scheme());
    if !takes_names || parsed.params.contains_key(NAME) {
        return None;
    }
    let sign = if uri.contains('?') { '&' } else { '?' };
    Some(format!("{uri}{sign}{NAME}={}", encode(name)))
}

/// Writes a text so that nothing in it means something else.
pub fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for letter in text.chars() {
        if SPECIAL.contains(&letter) {
            // Fails never: it is memory.
            let _ = write!(encoded, "%{:02X}", u32::from(letter));
        } else {
            encoded.push(letter);
        }
    }
    encoded
}

fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first == b'%' {
            let digits = str::from_utf8(rest.get(..2)?).ok()?;
            if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return None;
            }
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = rest.get(2..)?;
        } else {
            bytes.push(*first);
        }
    }
    // A NUL is in no path and no name.
    String::from_utf8(bytes)
        .ok()
        .filter(|text| !text.contains('\0'))
}

fn wrong(uri: &str, because: &str) -> HypervisorError {
    HypervisorError::new(
        ErrorKind::Unreachable,
        format!("cannot use connection `{uri}`"),
    )
    .because(because)
    .hint(
        "write it as `qmp:/path/to.sock`, `qmp:tcp:127.0.0.1:4444` or \
         `image:/path/a.qcow2,/path/b.qcow2`, with `?name=NAME` where the VM has no name",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_is_taken_apart_and_what_is_strange_in_a_path_is_written_in_others_way() {
        let uri = Uri::parse("qmp:/run/a%3Fb.sock?name=web%2601&agent=/q").unwrap();
        assert_eq!(uri.body().unwrap(), "/run/a?b.sock");
        assert_eq!(uri.params["name"], "web&01");
        assert_eq!(uri.params["agent"], "/q");
        let odd = "a%b?c&d=e,f#g \u{e4}";
        let uri = Uri::parse(&format!("image:/{},vdb=/{0}", encode(odd))).unwrap();
        let path = format!("/{odd}");
        assert_eq!(
            uri.list().unwrap(),
            [(None, path.clone()), (Some("vdb".to_owned()), path)]
        );
    }

    #[test]
    fn what_is_no_uri_of_ours_is_refused() {
        for text in [
            "",
            "/a",
            "qmp:",
            "qmp:?name=a",
            "qmp:/a?name",
            "qmp:/a?b=1&b=2",
        ] {
            let error = Uri::parse(text).unwrap_err();
            assert!(error.hint.is_some(), "{text}");
        }
        for text in ["qmp:/a%4", "qmp:/a%zz", "qmp:/a%00", "qmp:/%ff"] {
            assert!(Uri::parse(text).unwrap().body().is_err(), "{text}");
        }
        let uri = Uri::parse("qmp:/a?nmae=b").unwrap();
        assert!(uri.expect_params(&["name"]).is_err());
        assert!(uri.expect_params(&["name", "nmae"]).is_ok());
    }

    #[test]
    fn a_name_is_added_once_and_to_ours_only() {
        assert_eq!(
            with_name("qmp:/a", "w=1").as_deref(),
            Some("qmp:/a?name=w%3D1")
        );
        assert_eq!(
            with_name("qmp:/a?agent=/b", "w").as_deref(),
            Some("qmp:/a?agent=/b&name=w")
        );
        assert_eq!(with_name("qmp:/a?name=b", "w"), None);
        assert_eq!(with_name("qemu:///system", "w"), None);
    }
}
