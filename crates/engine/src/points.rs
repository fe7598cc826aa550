//! Finds the restore point a user means.
//!
//! `POINT` is `VM` (its latest), `VM@ID-prefix`, `VM@latest`,
//! `VM@2026-11-20T03:00` (newest at or before) or `VM~2` (two before the
//! latest). It is split at the last `@` or `~`; `id:…` and `uuid:…` are never
//! ambiguous.

use highwater_model::Timestamp;
use highwater_repo::{Manifest, VmIdentity};

/// A `POINT` as written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PointRef {
    vm: Option<String>,
    which: Which,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Which {
    Latest,
    Before(usize),
    IdPrefix(String),
    AtOrBefore(Timestamp),
}

/// Why no single restore point is meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PointError {
    /// The text is no `POINT`.
    #[error("cannot read `{0}` as a restore point")]
    Unreadable(String),
    /// No VM of that name has points.
    #[error("cannot find a restore point of VM `{0}`")]
    NoSuchVm(String),
    /// The VM has none that fits.
    #[error("cannot find restore point `{0}`")]
    NoSuchPoint(String),
    /// Several VMs or points fit.
    #[error("cannot choose between {count} {what} that fit `{text}`")]
    Ambiguous {
        /// As written.
        text: String,
        /// `VMs` or `restore points`.
        what: &'static str,
        /// How many.
        count: usize,
        /// Unambiguous ways to write each of them.
        candidates: Vec<String>,
    },
}

impl PointError {
    /// Returns whether the fault is in how the point was written.
    pub const fn is_usage(&self) -> bool {
        matches!(self, Self::Unreadable(_) | Self::Ambiguous { .. })
    }
}

impl PointRef {
    /// Reads a `POINT`; `to_time` turns a local or zoned time into a moment.
    pub fn parse(
        text: &str,
        to_time: &dyn Fn(&str) -> Option<Timestamp>,
    ) -> Result<Self, PointError> {
        let unreadable = || PointError::Unreadable(text.to_owned());
        if text.is_empty() {
            return Err(unreadable());
        }
        if let Some(prefix) = text.strip_prefix("id:") {
            let which = id_prefix(prefix).ok_or_else(unreadable)?;
            return Ok(Self { vm: None, which });
        }
        let Some(at) = text.rfind(['@', '~']) else {
            return Ok(Self {
                vm: Some(text.to_owned()),
                which: Which::Latest,
            });
        };
        let (vm, rest) = text.split_at(at);
        if vm.is_empty() {
            return Err(unreadable());
        }
        let mut rest = rest.chars();
        let separator = rest.next();
        let rest = rest.as_str();
        let which = if separator == Some('~') {
            Which::Before(rest.parse().map_err(|_| unreadable())?)
        } else if rest == "latest" {
            Which::Latest
        } else if rest.contains('-') || rest.contains(':') {
            Which::AtOrBefore(to_time(rest).ok_or_else(unreadable)?)
        } else {
            id_prefix(rest).ok_or_else(unreadable)?
        };
        Ok(Self {
            vm: Some(vm.to_owned()),
            which,
        })
    }
}

fn id_prefix(text: &str) -> Option<Which> {
    let fits =
        !text.is_empty() && text.len() <= 26 && text.chars().all(|c| c.is_ascii_alphanumeric());
    fits.then(|| Which::IdPrefix(text.to_ascii_uppercase()))
}

/// Returns whether `name` (a name, a UUID, or `uuid:…`) means this VM.
fn means(name: &str, vm: &VmIdentity) -> bool {
    let uuid = name.strip_prefix("uuid:");
    let by_uuid = |text: &str| {
        vm.uuid
            .as_deref()
            .is_some_and(|it| it.eq_ignore_ascii_case(text))
    };
    uuid.map_or_else(|| vm.name == name || by_uuid(name), by_uuid)
}

/// Returns the points of the VM that `name` means, or an error if it means
/// several VMs (the same name, different UUIDs).
pub fn select_vm<'a>(points: &'a [Manifest], name: &str) -> Result<Vec<&'a Manifest>, PointError> {
    let found: Vec<&Manifest> = points
        .iter()
        .filter(|point| means(name, &point.vm))
        .collect();
    let mut keys: Vec<String> = found
        .iter()
        .map(|point| {
            point
                .vm
                .uuid
                .as_ref()
                .map_or_else(String::new, |uuid| format!("uuid:{uuid}"))
        })
        .collect();
    keys.sort();
    keys.dedup();
    match keys.len() {
        0 => Err(PointError::NoSuchVm(name.to_owned())),
        1 => Ok(found),
        count => Err(PointError::Ambiguous {
            text: name.to_owned(),
            what: "VMs",
            count,
            candidates: keys,
        }),
    }
}

/// Finds the one point that is meant among all points, sorted by time.
pub fn resolve<'a>(
    points: &'a [Manifest],
    wanted: &PointRef,
    text: &str,
) -> Result<&'a Manifest, PointError> {
    let of_vm: Vec<&Manifest> = match &wanted.vm {
        Some(vm) => select_vm(points, vm)?,
        None => points.iter().collect(),
    };
    let none = || PointError::NoSuchPoint(text.to_owned());
    match &wanted.which {
        Which::Latest => of_vm.last().copied().ok_or_else(none),
        Which::Before(count) => of_vm.iter().rev().nth(*count).copied().ok_or_else(none),
        Which::AtOrBefore(time) => of_vm
            .iter()
            .rev()
            .find(|point| point.taken_at <= *time)
            .copied()
            .ok_or_else(none),
        Which::IdPrefix(prefix) => {
            let fits: Vec<&Manifest> = of_vm
                .into_iter()
                .filter(|point| point.point.to_string().starts_with(prefix))
                .collect();
            match fits.as_slice() {
                [] => Err(none()),
                [point] => Ok(point),
                several => Err(PointError::Ambiguous {
                    text: text.to_owned(),
                    what: "restore points",
                    count: several.len(),
                    candidates: several
                        .iter()
                        .map(|point| format!("id:{}", point.point))
                        .collect(),
                }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use highwater_model::PointId;

    use super::*;

    fn point(name: &str, uuid: Option<&str>, ms: i64) -> Manifest {
        serde_json::from_value(serde_json::json!({
            "version": 1, "point": PointId::new(Timestamp::from_unix_ms(ms)),
            "vm": {"name": name, "uuid": uuid}, "sequence": 1, "prev": null,
            "taken_at": ms, "utc_offset_minutes": 0, "committed_at": ms,
            "consistency": "crash", "level": "auto",
            "origin": {"host": "h", "version": "0", "hypervisor": []},
            "definition": "", "definition_at": ms, "files": [], "disks": [], "skipped": [],
            "mark": null, "healed": [], "warnings": [], "tags": [], "group": null,
            "duration_ms": 0, "prune_epoch": 0,
        }))
        .unwrap()
    }

    fn points() -> Vec<Manifest> {
        vec![
            point("web", Some("a"), 1000),
            point("db@1", Some("b"), 1500),
            point("web", Some("a"), 2000),
            point("web", Some("a"), 3000),
        ]
    }

    /// Resolves and tells the time of the point found, or the error.
    fn check(points: &[Manifest], text: &str, expected: Result<i64, &str>) {
        let to_time = |text: &str| {
            text.strip_prefix("t-")
                .and_then(|ms| ms.parse().ok())
                .map(Timestamp::from_unix_ms)
        };
        let found = PointRef::parse(text, &to_time).and_then(|wanted| {
            resolve(points, &wanted, text).map(|point| point.taken_at.unix_ms())
        });
        assert_eq!(
            found.map_err(|error| error.to_string()),
            expected.map_err(str::to_owned),
            "{text}"
        );
    }

    #[test]
    fn a_point_is_found_as_people_name_it() {
        let points = points();
        check(&points, "web", Ok(3000));
        check(&points, "a", Ok(3000));
        check(&points, "uuid:A", Ok(3000));
        check(&points, "web@latest", Ok(3000));
        check(&points, "web~0", Ok(3000));
        check(&points, "web~2", Ok(1000));
        check(&points, "web@t-2999", Ok(2000));
        check(&points, "web@t-3000", Ok(3000));
        check(&points, &format!("id:{}", points[1].point), Ok(1500));
        check(
            &points,
            &format!("web@{}", points[0].point.to_string().to_lowercase()),
            Ok(1000),
        );
        check(&points, "db@1@latest", Ok(1500));
    }

    #[test]
    fn a_point_that_is_not_there_is_not_guessed() {
        let points = points();
        check(&points, "web~3", Err("cannot find restore point `web~3`"));
        check(
            &points,
            "web@t-999",
            Err("cannot find restore point `web@t-999`"),
        );
        check(
            &points,
            "mail",
            Err("cannot find a restore point of VM `mail`"),
        );
        check(
            &points,
            "web@ZZZZ",
            Err("cannot find restore point `web@ZZZZ`"),
        );
        for text in ["", "@latest", "web@", "web~x", "web@not-a-time", "id:"] {
            check(
                &points,
                text,
                Err(&format!("cannot read `{text}` as a restore point")),
            );
        }
    }

    #[test]
    fn an_ambiguous_name_is_refused_with_ways_out() {
        let mut points = points();
        points.push(point("web", Some("c"), 4000));
        check(
            &points,
            "web",
            Err("cannot choose between 2 VMs that fit `web`"),
        );
        check(&points, "uuid:c", Ok(4000));
        check(
            &points,
            "a@0",
            Err("cannot choose between 3 restore points that fit `a@0`"),
        );
    }
}
