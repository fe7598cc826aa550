//! Which store an address means.

use std::path::PathBuf;
use std::sync::Arc;

use crate::{LocalStore, Store, StoreError, StoreErrorKind};

/// Where a repository is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// A directory.
    Directory(PathBuf),
}

impl Location {
    /// Reads an address: `/path`, `relative/path` or `file:///path`.
    pub fn parse(text: &str) -> Result<Self, StoreError> {
        let wrong = |why: &str| {
            StoreError::new(StoreErrorKind::BadLocation, "open", "repository", text)
                .because(why.to_owned())
        };
        if text.is_empty() {
            return Err(wrong("the address is empty"));
        }
        let Some((scheme, rest)) = text.split_once(':') else {
            return Ok(Self::Directory(PathBuf::from(text)));
        };
        let is_scheme = scheme.len() > 1
            && scheme
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-'));
        if !is_scheme {
            return Ok(Self::Directory(PathBuf::from(text)));
        }
        match scheme {
            "file" => match rest.strip_prefix("//") {
                Some(path) if path.starts_with('/') => Ok(Self::Directory(PathBuf::from(path))),
                _ => Err(wrong("a file address is `file:///absolute/path`")),
            },
            "s3" => Err(wrong("object storage is not supported by this version")),
            _ if rest.starts_with("//") => Err(wrong("this kind of address is not supported")),
            _ => Ok(Self::Directory(PathBuf::from(text))),
        }
    }
}

/// Opens the store at an address; reads and creates nothing yet.
pub fn open(address: &str) -> Result<Arc<dyn Store>, StoreError> {
    match Location::parse(address)? {
        Location::Directory(path) => Ok(Arc::new(LocalStore::new(path))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_path_or_a_known_scheme() {
        for (text, path) in [
            ("/backup/repo", "/backup/repo"),
            ("repo", "repo"),
            ("./a:b", "./a:b"),
            ("a:b", "a:b"),
            ("file:///backup/r", "/backup/r"),
        ] {
            let location = Location::parse(text).unwrap();
            assert_eq!(location, Location::Directory(PathBuf::from(path)), "{text}");
        }
        for wrong in [
            "",
            "s3://bucket/prefix",
            "s3:https://h/b",
            "sftp://h/p",
            "file://host/p",
        ] {
            let error = Location::parse(wrong).unwrap_err();
            assert_eq!(error.kind(), StoreErrorKind::BadLocation, "{wrong}");
        }
    }
}
