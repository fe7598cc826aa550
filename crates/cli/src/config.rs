//! The configuration files: which keys there are, and what they hold.
//!
//! Every key is checked, also in profiles that are not used: a misspelt key
//! that is passed over in silence is a backup that goes elsewhere.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::advice::CliError;
use crate::{nearest, output};

/// Larger ones are no configuration of ours.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// What a key holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// A text, or a number as a text.
    Text,
    Flag,
    List,
}

/// All keys; each has the name of its flag.
const KEYS: [(&str, Shape); 19] = [
    ("audit", Shape::Text),
    ("compression", Shape::Text),
    ("connect", Shape::Text),
    ("freeze-mountpoint", Shape::List),
    ("group", Shape::Text),
    ("key-file", Shape::Text),
    ("limit", Shape::Text),
    ("no-progress", Shape::Flag),
    ("offline", Shape::Text),
    ("password-command", Shape::Text),
    ("password-file", Shape::Text),
    ("quiesce", Shape::Text),
    ("quiet", Shape::Flag),
    ("repo", Shape::Text),
    ("scratch-dir", Shape::Text),
    ("strict", Shape::Flag),
    ("tag", Shape::List),
    ("threshold", Shape::Text),
    ("workers", Shape::Text),
];

/// Names under which people would write a secret itself.
const SECRETS: [&str; 6] = [
    "password",
    "passphrase",
    "passwd",
    "secret",
    "key",
    "repo-password",
];

/// A value as a file gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Value {
    Text(String),
    Flag(bool),
    List(Vec<String>),
}

/// A value and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) value: Value,
    pub(crate) file: PathBuf,
    pub(crate) line: usize,
}

/// All settings that the files give, by key.
pub(crate) type Layer = BTreeMap<&'static str, Entry>;

/// One file taken apart.
#[derive(Debug, Default)]
struct Parsed {
    top: Layer,
    profiles: BTreeMap<String, Layer>,
}

/// A file to look for.
pub(crate) struct Wanted {
    pub(crate) path: PathBuf,
    /// Whether it is an error that it is not there.
    pub(crate) named: bool,
}

/// Reads the files, later ones over earlier ones, and a profile over all.
/// Returns the settings and the files that were there.
pub(crate) fn load(
    wanted: &[Wanted],
    profile: Option<&str>,
) -> Result<(Layer, Vec<PathBuf>), CliError> {
    let mut files = Vec::new();
    let mut found = Vec::new();
    for wanted in wanted {
        let Some(text) = read(wanted)? else { continue };
        files.push(parse(&wanted.path, &text)?);
        found.push(wanted.path.clone());
    }
    let mut layer = Layer::new();
    for file in &files {
        layer.extend(file.top.clone());
    }
    if let Some(profile) = profile {
        let mut known = false;
        for chosen in files.iter().filter_map(|file| file.profiles.get(profile)) {
            known = true;
            layer.extend(chosen.clone());
        }
        if !known {
            return Err(no_profile(profile, &files));
        }
    }
    Ok((layer, found))
}

fn no_profile(profile: &str, files: &[Parsed]) -> CliError {
    let names: std::collections::BTreeSet<&str> = files
        .iter()
        .flat_map(|file| file.profiles.keys().map(String::as_str))
        .collect();
    let hint = if names.is_empty() {
        "the configuration has no [profile.NAME]".to_owned()
    } else {
        format!(
            "the configuration has: {}",
            names.into_iter().collect::<Vec<_>>().join(", ")
        )
    };
    CliError::Usage {
        message: format!("cannot find profile `{profile}`"),
        hint,
    }
}

fn read(wanted: &Wanted) -> Result<Option<String>, CliError> {
    let cannot = |source: std::io::Error| CliError::Config {
        path: wanted.path.clone(),
        reason: source.to_string(),
        hint: None,
    };
    let file = match std::fs::File::open(&wanted.path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !wanted.named => {
            return Ok(None);
        }
        Err(error) => return Err(cannot(error)),
    };
    let about = file.metadata().map_err(cannot)?;
    if about.is_file() && about.mode() & 0o022 != 0 {
        // It may name a command, which we run.
        output::warn(&format!(
            "{} can be changed by others than its owner: run `chmod go-w` on it",
            wanted.path.display()
        ));
    }
    let mut text = String::new();
    file.take(FILE_BYTES_MAX.saturating_add(1))
        .read_to_string(&mut text)
        .map_err(cannot)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        let why = std::io::Error::other("it is too large for a configuration");
        return Err(cannot(why));
    }
    Ok(Some(text))
}

/// Says what is wrong with a file, and where.
struct Complaint<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Complaint<'_> {
    fn line(&self, at: usize) -> usize {
        let before = self.text.as_bytes().iter().take(at);
        before.filter(|byte| **byte == b'\n').count() + 1
    }

    fn at(&self, at: usize, reason: &str, hint: Option<String>) -> CliError {
        CliError::Config {
            path: self.path.to_owned(),
            reason: format!("line {}: {reason}", self.line(at)),
            hint,
        }
    }
}

fn parse(path: &Path, text: &str) -> Result<Parsed, CliError> {
    let complaint = Complaint { path, text };
    let table = DeTable::parse(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        complaint.at(at, error.message(), None)
    })?;
    let mut parsed = Parsed::default();
    for (key, value) in table.get_ref() {
        if key.get_ref() != "profile" {
            take(
                &complaint,
                key.get_ref(),
                key.span().start,
                value,
                &mut parsed.top,
            )?;
            continue;
        }
        let DeValue::Table(profiles) = value.get_ref() else {
            let hint = "write [profile.NAME], and its keys below".to_owned();
            let at = key.span().start;
            return Err(complaint.at(at, "`profile` is a table of profiles", Some(hint)));
        };
        for (name, body) in profiles {
            let DeValue::Table(body) = body.get_ref() else {
                let reason = format!("profile `{}` is no table", name.get_ref());
                let hint = format!("write [profile.NAME], and `{}` below it", name.get_ref());
                return Err(complaint.at(name.span().start, &reason, Some(hint)));
            };
            let mut layer = Layer::new();
            for (key, value) in body {
                take(
                    &complaint,
                    key.get_ref(),
                    key.span().start,
                    value,
                    &mut layer,
                )?;
            }
            parsed.profiles.insert(name.get_ref().to_string(), layer);
        }
    }
    Ok(parsed)
}

fn take(
    complaint: &Complaint<'_>,
    key: &str,
    at: usize,
    value: &Spanned<DeValue<'_>>,
    into: &mut Layer,
) -> Result<(), CliError> {
    let Some((name, shape)) = KEYS.iter().find(|(name, _)| *name == key) else {
        return Err(unknown(complaint, key, at));
    };
    let text = |value: &DeValue<'_>| match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => Some(number.as_str().to_owned()),
        _ => None,
    };
    let value = match (shape, value.get_ref()) {
        (Shape::Flag, DeValue::Boolean(flag)) => Some(Value::Flag(*flag)),
        (Shape::List, DeValue::Array(items)) => items
            .iter()
            .map(|item| text(item.get_ref()))
            .collect::<Option<Vec<String>>>()
            .map(Value::List),
        (Shape::List, one) => text(one).map(|one| Value::List(vec![one])),
        (Shape::Text, one) => text(one).map(Value::Text),
        (Shape::Flag, _) => None,
    };
    let Some(value) = value else {
        let wanted = match shape {
            Shape::Text => "a text in quotes",
            Shape::Flag => "true or false",
            Shape::List => "a list of texts, such as [\"a\", \"b\"]",
        };
        return Err(complaint.at(at, &format!("`{key}` wants {wanted}"), None));
    };
    let entry = Entry {
        value,
        file: complaint.path.to_owned(),
        line: complaint.line(at),
    };
    into.insert(name, entry);
    Ok(())
}

fn unknown(complaint: &Complaint<'_>, key: &str, at: usize) -> CliError {
    let hint = if SECRETS.contains(&key) {
        "no secret may stand in this file: name a file with `password-file` or `key-file`, \
         or a command with `password-command`"
            .to_owned()
    } else {
        let names = KEYS.iter().map(|(name, _)| *name);
        match nearest::to(&key.replace('_', "-"), names.clone()) {
            Some(name) => format!("did you mean `{name}`?"),
            None => format!("the keys are: {}", names.collect::<Vec<_>>().join(", ")),
        }
    };
    complaint.at(at, &format!("unknown key `{key}`"), Some(hint))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &str) {
        let error = parse(Path::new("/c.toml"), text).expect_err(text);
        let mut said = error.chain().join("; ");
        if let Some(hint) = crate::advice::advise(&error).hint {
            said.push_str("; ");
            said.push_str(&hint);
        }
        assert!(said.contains(expected), "`{expected}` is not in `{said}`");
    }

    #[test]
    fn a_mistake_is_named_with_its_line_and_a_way_out() {
        check(
            "repo = \"/r\"\nrepos = \"/r\"\n",
            "line 2: unknown key `repos`",
        );
        check("repos = 1", "did you mean `repo`?");
        check("password_file = \"x\"", "did you mean `password-file`?");
        check("colour = 1", "the keys are: audit, compression, connect");
        check("password = \"x\"", "no secret may stand in this file");
        check("[profile.a]\n\nrepoo = 1", "line 3: unknown key `repoo`");
        check("quiet = \"yes\"", "line 1: `quiet` wants true or false");
        check("profile = \"a\"", "`profile` is a table of profiles");
        check("[profile]\na = 1", "profile `a` is no table");
        check("repo = ", "line 1: ");
        check("repo = \"a\"\nrepo = \"b\"", "line 2: ");
    }

    #[test]
    fn keys_stand_in_order_so_that_a_list_of_them_reads_well() {
        assert!(KEYS.is_sorted_by_key(|(name, _)| *name));
    }

    #[test]
    fn a_later_file_goes_over_an_earlier_one_and_a_profile_over_both() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::io::Write::write_all(&mut std::fs::File::create(&path).unwrap(), text.as_bytes())
                .unwrap();
            Wanted { path, named: true }
        };
        let files = [
            write(
                "a",
                "repo = \"/a\"\ngroup = \"a\"\ntag = \"x\"\n[profile.p]\nlimit = 5",
            ),
            write(
                "b",
                "repo = \"/b\"\n[profile.p]\ngroup = \"p\"\n[profile.q]",
            ),
        ];
        let text = |layer: &Layer, key: &str| match layer.get(key).map(|it| &it.value) {
            Some(Value::Text(text)) => text.clone(),
            other => format!("{other:?}"),
        };
        let (plain, found) = load(&files, None).unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(
            (text(&plain, "repo"), text(&plain, "group")),
            ("/b".into(), "a".into())
        );
        assert_eq!(plain["tag"].value, Value::List(vec!["x".to_owned()]));
        let (chosen, _) = load(&files, Some("p")).unwrap();
        assert_eq!(
            (text(&chosen, "group"), text(&chosen, "limit")),
            ("p".into(), "5".into())
        );
        let error = load(&files, Some("nightly")).unwrap_err();
        assert!(
            crate::advice::advise(&error)
                .hint
                .unwrap()
                .ends_with("has: p, q")
        );
        let gone = |named| {
            [Wanted {
                path: dir.path().join("gone"),
                named,
            }]
        };
        assert!(load(&gone(false), None).unwrap().1.is_empty());
        assert!(load(&gone(true), None).is_err());
    }
}
