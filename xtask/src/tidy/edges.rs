//! Which crate may depend on which: only downwards.

use crate::repository::Text;

/// Each crate and what it may use. ADR 0001 says why.
const ALLOWED: [(&str, &[&str]); 12] = [
    ("model", &[]),
    ("plan", &["model"]),
    ("nbd", &["model"]),
    ("store", &["model"]),
    ("repo", &["model", "store"]),
    ("hypervisor", &["model"]),
    ("drivers", &["model", "hypervisor", "nbd", "formats"]),
    ("formats", &["model"]),
    (
        "engine",
        &[
            "model",
            "plan",
            "nbd",
            "store",
            "repo",
            "hypervisor",
            "formats",
        ],
    ),
    // The words and the seam, but none of the machinery below the engine.
    (
        "cli",
        &["model", "hypervisor", "store", "drivers", "engine"],
    ),
    ("testkit", &["model", "store", "hypervisor", "nbd"]),
    ("xtask", &[]),
];

/// Returns the dependencies that point upwards.
pub(super) fn faults(texts: &[Text]) -> Vec<String> {
    let manifests = texts
        .iter()
        .filter_map(|text| Some((crate_of(&text.path)?, text)));
    let mut faults = Vec::new();
    for (name, manifest) in manifests {
        let allowed = ALLOWED.iter().find(|(known, _)| *known == name);
        let Some((_, allowed)) = allowed else {
            faults.push(format!(
                "{}: a new crate; give it a place in xtask/src/tidy/edges.rs and ADR 0001",
                manifest.path
            ));
            continue;
        };
        for (section, used) in dependencies(&manifest.text) {
            // Tests may stand on the testkit, on features of the crate itself that
            // only tests switch on, and on the plan's list of rows, each of which
            // the program has to prove.
            let for_tests = section == Section::Tests
                && (used == "testkit" || used == name || (name == "cli" && used == "plan"));
            if !for_tests && !allowed.contains(&used.as_str()) {
                faults.push(format!("{}: {name} must not use {used}", manifest.path));
            }
        }
    }
    faults
}

fn crate_of(path: &str) -> Option<&str> {
    if path == "xtask/Cargo.toml" {
        return Some("xtask");
    }
    let name = path.strip_prefix("crates/")?.strip_suffix("/Cargo.toml")?;
    (!name.contains('/')).then_some(name)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Section {
    Program,
    Tests,
}

/// Returns our own crates that a manifest names, without their prefix.
fn dependencies(manifest: &str) -> Vec<(Section, String)> {
    let mut section = None;
    let mut found = Vec::new();
    for line in manifest.lines().map(str::trim) {
        if let Some(header) = line.strip_prefix('[') {
            section = if header.contains("dev-dependencies") {
                Some(Section::Tests)
            } else if header.contains("dependencies") {
                Some(Section::Program)
            } else {
                None
            };
        }
        let key = line.trim_start_matches('[');
        let name = key
            .rsplit_once("dependencies.")
            .map_or(key, |(_, name)| name);
        if let (Some(section), Some(name)) = (section, name.strip_prefix("highwater-")) {
            let end = name.find(|letter: char| !letter.is_ascii_lowercase());
            found.push((section, name[..end.unwrap_or(name.len())].to_owned()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(path: &str, manifest: &str, expected: &[&str]) {
        let text = Text {
            path: path.to_owned(),
            text: manifest.to_owned(),
        };
        assert_eq!(faults(&[text]), expected);
    }

    #[test]
    fn an_edge_that_points_upwards_is_found() {
        let plan = "crates/plan/Cargo.toml";
        check(
            plan,
            "[dependencies]\nhighwater-model.workspace = true\n",
            &[],
        );
        check(
            plan,
            "[dependencies]\nhighwater-store = { path = \"../store\" }\n",
            &["crates/plan/Cargo.toml: plan must not use store"],
        );
        check(
            plan,
            "[target.'cfg(unix)'.dependencies.highwater-nbd]\nworkspace = true\n",
            &["crates/plan/Cargo.toml: plan must not use nbd"],
        );
        check(
            plan,
            "[dev-dependencies]\nhighwater-testkit.workspace = true\n",
            &[],
        );
        check(
            plan,
            "[dependencies]\nhighwater-testkit.workspace = true\n",
            &["crates/plan/Cargo.toml: plan must not use testkit"],
        );
        check(
            plan,
            "[dev-dependencies]\nhighwater-plan = { path = \".\" }\n",
            &[],
        );
        check(
            "crates/engine/Cargo.toml",
            "[dev-dependencies]\nhighwater-drivers.workspace = true\n",
            &["crates/engine/Cargo.toml: engine must not use drivers"],
        );
    }

    #[test]
    fn a_new_crate_needs_a_place() {
        let fault = "crates/tide/Cargo.toml: a new crate; give it a place in \
                     xtask/src/tidy/edges.rs and ADR 0001";
        check("crates/tide/Cargo.toml", "[package]\n", &[fault]);
    }
}
